"""A teacher from disk gives what the cached teacher gave, and nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gkd_trainer.batch_keys import IGNORE_INDEX, TEACHER_PROMPT_IDS
from gkd_trainer.config import GKDArguments
from gkd_trainer.errors import GKDDataError, GKDTeacherError
from gkd_trainer.signals import HiddenSignal, TopKSignal
from gkd_trainer.teachers import CachedTeacher, FrozenTeacher, OtherTokenizerTeacher
from gkd_trainer.teachers.base import Teacher, all_teachers
from gkd_trainer.teachers.cache import CacheWriter, read_manifest, source_of
from gkd_trainer.teachers.cache.format import write_manifest
from gkd_trainer.teachers.prompt_scores import TopScores, Witness
from gkd_trainer.types import TokenBatch
from tests.teachers.cache.rows import batch_of, cut, make_rows

CPU = torch.device("cpu")
ROWS = make_rows(10, longest=20)


def cached_from(folder, teacher, tokenizer=None, rows=ROWS, kind=None, **source):
    """Write what a teacher says of all rows, in one batch."""
    teacher.prepare(CPU)
    made = source_of(teacher, tokenizer, **source)
    vocabulary = None if tokenizer is None else tokenizer.get_vocab()
    kind = kind or ("hidden" if teacher.top_k is None else "topk")
    with CacheWriter(folder, made, kind=kind, vocabulary=vocabulary) as writer:
        batch = batch_of(rows)
        writer.add(batch, teacher.score(batch))
    return folder


def opened(folder, fallback=None, **preparing):
    teacher = CachedTeacher(folder, fallback)
    teacher.prepare(CPU, **preparing)
    return teacher


@pytest.fixture
def live(tiny_model):
    return lambda seed=1, dtype=torch.float32, **options: FrozenTeacher(tiny_model(seed=seed).to(dtype), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_teachers_states_and_head_come_back_bit_for_bit(live, tmp_path, dtype):
    teacher = live(dtype=dtype)
    cached = opened(cached_from(tmp_path, teacher))
    batch = batch_of(ROWS)
    given, expected = cached.score(batch), teacher.score(batch)
    assert given.hidden_NH.dtype == dtype
    assert torch.equal(given.hidden_NH, expected.hidden_NH)
    assert torch.equal(given.head.weight_VH, expected.head.weight_VH)
    assert given.head.weight_VH.dtype == dtype


@pytest.mark.parametrize("family", ["llama", "phi", "gemma2", "cohere", "granite"])
def test_logits_are_the_live_teachers_whatever_its_head(tiny_model, tmp_path, family):
    teacher = FrozenTeacher(tiny_model(family, seed=1))
    cached = opened(cached_from(tmp_path, teacher))
    batch = batch_of(ROWS)
    given, expected = cached.score(batch), teacher.score(batch)
    assert isinstance(given, HiddenSignal)
    assert torch.allclose(
        given.head.logits(given.hidden_NH), expected.head.logits(expected.hidden_NH), atol=2e-3, rtol=1e-3
    )
    assert (given.head.scale, given.head.softcap) == (expected.head.scale, expected.head.softcap)
    assert cached.vocab_size == teacher.vocab_size == 368


def test_top_tokens_come_back_unchanged(live, tmp_path):
    teacher = live(top_k=7)
    cached = opened(cached_from(tmp_path, teacher))
    batch = batch_of(ROWS)
    given, expected = cached.score(batch), teacher.score(batch)
    assert isinstance(given, TopKSignal)
    assert torch.equal(given.ids_NK, expected.ids_NK)
    assert torch.equal(given.log_p_NK, expected.log_p_NK)
    assert (given.vocab_size, cached.top_k) == (368, 7)


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_are_found_in_any_order_padding_mask_and_length(live, tmp_path, side):
    teacher = live()
    cached = opened(cached_from(tmp_path, teacher))
    shuffled = [ROWS[7], ROWS[2], cut(ROWS[5], len(ROWS[5][0]) - 1), ROWS[0]]
    ids, labels = ROWS[4]
    last = max(index for index, label in enumerate(labels) if label != -100)
    shuffled.append((ids, [-100] * last + labels[last:]))
    shuffled.append(([5, 6, 7], [-100] * 3))  # nothing to score
    batch = batch_of(shuffled, side)
    assert torch.allclose(cached.score(batch).hidden_NH, teacher.score(batch).hidden_NH, atol=1e-3)


def test_a_batch_without_tokens_to_score_gives_an_empty_signal(live, tmp_path):
    batch = batch_of([([5, 6, 7], [-100] * 3)])
    for name, teacher in (("hidden", live()), ("topk", live(top_k=3))):
        signal = opened(cached_from(tmp_path / name, teacher)).score(batch)
        assert len(signal.hidden_NH if name == "hidden" else signal.ids_NK) == 0
        assert signal.vocab_size == 368


def test_a_fallback_that_reads_other_tokens_than_the_students_is_refused(live, byte_level, tmp_path):
    other = OtherTokenizerTeacher(live(), byte_level())
    with pytest.raises(GKDTeacherError, match="this one reads other tokens: train with it in this process"):
        CachedTeacher(cached_from(tmp_path, live()), other)


def test_a_row_that_is_not_in_the_cache_is_named(live, byte_level, tmp_path):
    cached = opened(cached_from(tmp_path, live()), tokenizer=byte_level())
    row = ([40, 41, 42, 43], [-100, -100, 42, 43])
    batch = batch_of([ROWS[3], row])
    batch.side["row_key"] = torch.tensor([7, 8])
    text = byte_level().decode(row[0])
    with pytest.raises(GKDDataError, match="a row is not in the cache") as error:
        cached.score(batch)
    message = str(error.value)
    assert f"a row is not in the cache in {tmp_path} (row_key 8, 4 tokens, [40, 41, 42, 43]…, {text!r})" in message
    assert "set teacher_cache_miss='teacher'" in message
    assert "date" not in message


def test_a_missing_row_under_a_template_that_writes_the_date_names_that_cause(live, byte_level, tmp_path):
    dated = byte_level("{{ strftime_now('%d %b %Y') + messages[0]['content'] }}")
    cached = opened(cached_from(tmp_path, live()), tokenizer=dated)
    with pytest.raises(GKDDataError, match=r"The chat template writes today's date.*cache them with a fixed date"):
        cached.score(batch_of([([40, 41, 42, 43], [-100, -100, 42, 43])]))


def numbered(rows):
    return [(number, batch_of([row])) for number, row in enumerate(rows)]


def test_rows_that_are_not_in_the_cache_are_counted_before_any_is_drawn(live, tmp_path):
    cached = opened(cached_from(tmp_path, live(), rows=ROWS[:7]))
    cached.check_rows(numbered(ROWS[:7]), "train")
    missing = rf"train: 2 of 6 rows looked up are not in the cache in {tmp_path}.*; the first is row 3: "
    with pytest.raises(GKDDataError, match=f"{missing}{len(ROWS[8][0])} tokens"):
        cached.check_rows(numbered([ROWS[4], ROWS[5], ROWS[6], ROWS[8], ROWS[0], ROWS[9]]), "train")


def test_bare_prompts_are_refused_before_the_student_completes_them(live, tmp_path):
    rows = numbered([ROWS[0], ([5, 6], [-100, -100]), ([7, 8, 9], [-100] * 3)])
    cached = opened(cached_from(tmp_path, live()))
    with pytest.raises(GKDDataError, match=r"^eval: 2 of 3 rows .* prompts without a completion, such as row 1;"):
        cached.check_rows(rows, "eval")
    cached.check_rows(rows[:1], "eval")
    opened(tmp_path, live()).check_rows(rows, "eval")


def test_rows_that_the_fallback_will_score_are_counted_in_the_log(live, tmp_path, caplog):
    caplog.set_level("INFO")
    cached = opened(cached_from(tmp_path, live(), rows=ROWS[:7]), live())
    cached.check_rows(numbered(ROWS[5:]), "train")
    assert f"train: 3 of 5 rows looked up are not in the cache in {tmp_path}: the teacher scores them." in caplog.text


def test_an_incomplete_cache_serves_what_it_has_if_the_rows_can_be_looked_up(live, tmp_path, caplog):
    manifest = read_manifest(cached_from(tmp_path, live(), rows=ROWS[:7]))
    write_manifest(tmp_path, manifest.model_copy(update={"is_complete": False}))
    cached = opened(tmp_path)
    assert f"The cache in {tmp_path} is not complete: it holds 7 rows so far." in caplog.text
    cached.check_rows(numbered(ROWS[:7]), "train")
    assert cached.score(batch_of(ROWS[:7])).hidden_NH.shape[0] == batch_of(ROWS[:7]).n_scored
    with pytest.raises(GKDDataError, match=r"3 of 10 rows .* is not complete: it holds 7 rows so far\. Add this data"):
        cached.check_rows(numbered(ROWS), "train")
    with pytest.raises(GKDTeacherError, match=r"not complete.*, and the rows of train can't be looked up before"):
        cached.check_rows(None, "train")
    opened(tmp_path, live()).check_rows(None, "train")


def test_a_fallback_scores_only_the_rows_that_the_cache_lacks(live, tmp_path):
    class Counting(Teacher):
        vocab_size, top_k, vocabulary, is_local, can_generate = 368, None, None, True, False

        def __init__(self, inner):
            self.inner, self.asked = inner, []

        model = property(lambda self: self.inner.model)

        def score(self, batch):
            self.asked.append(batch.model_inputs["input_ids"].tolist())
            return self.inner.score(batch)

        def prepare(self, device, tokenizer=None, max_length=None):
            self.inner.prepare(device)

    fallback = Counting(live())
    cached = opened(cached_from(tmp_path, live(), rows=ROWS[:6]), fallback)
    batch = batch_of([ROWS[8], ROWS[1], ROWS[9], ROWS[3]])
    expected = fallback.inner.score(batch)
    assert torch.allclose(cached.score(batch).hidden_NH, expected.hidden_NH, atol=1e-3)
    [asked] = fallback.asked
    assert [ids[:3] for ids in asked] == [ROWS[8][0][:3], ROWS[9][0][:3]]
    cached.score(batch_of(ROWS[:6]))
    assert len(fallback.asked) == 1
    assert list(all_teachers(cached)) == [cached, fallback]
    assert cached.model is fallback.model


def test_a_fallback_with_top_tokens_stands_in_for_them(live, tmp_path):
    cached = opened(cached_from(tmp_path, live(top_k=4), rows=ROWS[:5]), live(top_k=4))
    teacher = live(top_k=4)
    teacher.prepare(CPU)
    given, expected = cached.score(batch_of(ROWS)), teacher.score(batch_of(ROWS))
    assert torch.equal(given.ids_NK, expected.ids_NK)
    assert torch.allclose(given.log_p_NK, expected.log_p_NK, atol=1e-4)


@pytest.mark.parametrize(
    ("field", "options"),
    [("weights", {"seed": 2}), ("dtype", {"dtype": torch.bfloat16}), ("top_k", {"top_k": 3})],
)
def test_a_fallback_other_than_the_cached_teacher_is_refused(live, tmp_path, field, options):
    folder = cached_from(tmp_path, live())
    with pytest.raises(GKDTeacherError, match=f"was made with another {field}: .* in this run"):
        opened(folder, live(**options))


class Remote(Teacher):
    """A teacher of a user's, elsewhere, whose weights are unknown; it gives two top tokens."""

    vocab_size, top_k, vocabulary, model, is_local, can_generate = None, 2, None, None, False, False

    def __init__(self, shares=(0.6, 0.3)):
        self.shares = shares

    def prepare(self, device, tokenizer=None, max_length=None):
        ids_PK = np.array([[7, 9], [7, 9]])
        self.witness = Witness([4, 5, 6], TopScores(ids_PK, np.log([self.shares, self.shares])))

    def score(self, batch):
        log_p_NK = torch.full((batch.n_scored, 2), -1.0)
        return TopKSignal(torch.tensor([[7, 9]]).expand(batch.n_scored, 2), log_p_NK, 10)


def test_a_fallback_of_unknown_weights_must_have_the_cached_teachers_name(tmp_path):
    folder = cached_from(tmp_path, Remote(), rows=ROWS[:5])
    assert len(opened(folder, Remote()).score(batch_of(ROWS)).ids_NK) == batch_of(ROWS).n_scored
    other = type("Elsewhere", (Remote,), {})()
    with pytest.raises(GKDTeacherError, match="another teacher: 'Remote' there, 'Elsewhere' in this run"):
        opened(folder, other)


def test_a_served_fallback_that_answers_otherwise_than_the_cached_model_is_refused(tmp_path):
    folder = cached_from(tmp_path, Remote(), rows=ROWS[:5])
    opened(folder, Remote((0.55, 0.33)))
    with pytest.raises(GKDTeacherError, match=r"another model: the scores that 'Remote' now gives .* differ by 0\.75"):
        opened(folder, Remote((0.1, 0.05)))
    with pytest.raises(GKDTeacherError, match="another model: the scores that 'Remote' now gives a fixed text"):
        cached_from(tmp_path, Remote((0.1, 0.05)))
    cached_from(tmp_path, Remote((0.6, 0.29)))


def test_top_tokens_of_unknown_size_and_vocabulary_count_the_largest_id(tmp_path):
    assert opened(cached_from(tmp_path, Remote())).score(batch_of(ROWS)).vocab_size == 10


def test_a_fallback_that_shares_weights_with_the_student_is_refused(live, tmp_path):
    fallback = live()
    fallback.shares_weights = True
    with pytest.raises(GKDTeacherError, match="shares weights with the student"):
        CachedTeacher(cached_from(tmp_path, live()), fallback)


def test_rows_may_be_shorter_than_the_cached_ones_but_not_longer(live, tmp_path):
    folder = cached_from(tmp_path, live(), max_length=32)
    opened(folder, max_length=32)
    opened(folder, max_length=16)
    for length in (33, None):
        with pytest.raises(GKDTeacherError, match=f"max_length=32 tokens, but this run has max_length={length}"):
            opened(folder, max_length=length)


def test_another_chat_template_is_refused(live, byte_level, tmp_path):
    folder = cached_from(tmp_path, live(), byte_level())
    opened(folder, tokenizer=byte_level())
    opened(folder, tokenizer=byte_level(chat_template=None))  # rows of plain text need none
    with pytest.raises(GKDTeacherError, match="was made with another chat_template"):
        opened(folder, tokenizer=byte_level(chat_template="{{ messages }}"))


def test_options_that_do_not_fit_the_cache_are_refused(live, tmp_path):
    all_turns = CachedTeacher(cached_from(tmp_path / "all", live(top_k=4), train_on="all_turns"))
    all_turns.check_options(GKDArguments(lmbda=0, train_on="last_turn", teacher_top_k=4))
    with pytest.raises(GKDTeacherError, match="another teacher_top_k: 4 there, 5 in this run"):
        all_turns.check_options(GKDArguments(lmbda=0, teacher_top_k=5))
    last_turn = CachedTeacher(cached_from(tmp_path / "last", live(), train_on="last_turn"))
    with pytest.raises(GKDTeacherError, match="another train_on: 'last_turn' there, 'all_turns' in this run"):
        last_turn.check_options(GKDArguments(lmbda=0))


def test_the_cached_vocabulary_is_the_tokenizers(live, byte_level, tmp_path):
    tokenizer = byte_level()
    assert CachedTeacher(cached_from(tmp_path / "a", live(), tokenizer)).vocabulary == tokenizer.get_vocab()
    assert CachedTeacher(cached_from(tmp_path / "b", FrozenTeacher(live().model))).vocabulary is None


def test_it_states_what_it_can_do(live, tmp_path):
    alone = CachedTeacher(cached_from(tmp_path, live()))
    assert (alone.model, alone.can_generate, alone.is_local, list(alone.teachers)) == (None, False, False, [])
    assert list(alone.manifests) == [tmp_path]
    assert alone.manifests[tmp_path].source.dtype == "float32"
    with pytest.raises(RuntimeError, match="before prepare"):
        alone.score(batch_of(ROWS))
    fallback = live()
    assert CachedTeacher(tmp_path, fallback).can_generate


def test_prompts_of_the_teachers_own_are_refused(live, tmp_path):
    """Also with a fallback: the cache may hold the same tokens behind another prompt."""
    cached = opened(cached_from(tmp_path, live()), live())
    batch = batch_of(ROWS)
    no_prompts_BP = torch.full((len(ROWS), 2), IGNORE_INDEX)
    assert len(cached.score(replace(batch, side={TEACHER_PROMPT_IDS: no_prompts_BP})).hidden_NH) == batch.n_scored
    with_one_BP = no_prompts_BP.clone()
    with_one_BP[3, 0] = 30
    with pytest.raises(GKDDataError, match="prompts of the teacher's own: remove the column teacher_prompt"):
        cached.score(replace(batch, side={TEACHER_PROMPT_IDS: with_one_BP}))


def test_rows_of_an_encoder_decoder_and_images_are_refused(live, tmp_path):
    cached = opened(cached_from(tmp_path, live()))
    batch = batch_of(ROWS[:2])
    with pytest.raises(GKDDataError, match="encoder-decoder can't be cached"):
        cached.score(TokenBatch(batch.model_inputs, batch.labels_BL, batch.is_on_policy_B, label_offset=0))
    inputs = {**batch.model_inputs, "pixel_values": torch.zeros(2, 3)}
    with pytest.raises(GKDDataError, match="in a cache knows only token ids, but this batch also holds"):
        cached.score(TokenBatch(inputs, batch.labels_BL, batch.is_on_policy_B))


def test_rows_from_several_folders_are_scored_as_from_one(live, tmp_path):
    whole = opened(cached_from(tmp_path / "whole", live(dtype=torch.bfloat16)))
    folders = [
        cached_from(tmp_path / name, live(dtype=torch.bfloat16), rows=ROWS[start::2]) for start, name in enumerate("ab")
    ]
    batch = batch_of(ROWS[::-1])
    given, expected = opened(folders).score(batch), whole.score(batch)
    assert torch.allclose(given.hidden_NH, expected.hidden_NH, atol=1e-2)  # scored in other batches
    assert torch.equal(given.head.weight_VH, expected.head.weight_VH)


def test_each_of_several_folders_must_fit_the_run(live, byte_level, tmp_path, caplog):
    folders = [
        cached_from(tmp_path / name, live(), byte_level(), rows=rows, max_length=longest, train_on=turns)
        for name, rows, longest, turns in (("a", ROWS[:5], 64, "all_turns"), ("b", ROWS[5:], 32, "last_turn"))
    ]
    with pytest.raises(GKDTeacherError, match=r"the cache in .*/b holds rows of up to max_length=32 tokens"):
        opened(folders, tokenizer=byte_level(), max_length=64)
    with pytest.raises(GKDTeacherError, match=r"the cache in .*/b was made with another train_on"):
        CachedTeacher(folders).check_options(GKDArguments(lmbda=0.0))
    write_manifest(folders[1], read_manifest(folders[1]).model_copy(update={"is_complete": False}))
    cached = opened(folders, tokenizer=byte_level(), max_length=32)
    assert f"The cache in {folders[1]} is not complete: it holds 5 rows so far." in caplog.text
    with pytest.raises(GKDDataError, match=rf"a row is not in the cache in {folders[0]}, {folders[1]} \("):
        cached.score(batch_of([([40, 41, 42], [-100, 41, 42])]))
