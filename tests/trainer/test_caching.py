"""A run from a cache is the run with the live teacher, without it."""

import pytest
import torch
from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from gkd_trainer import CachedTeacher, FrozenTeacher, GKDConfig, OtherTokenizerTeacher, RoutedTeachers, SelfTeacher
from gkd_trainer.errors import GKDConfigError, GKDDataError, GKDTeacherError
from gkd_trainer.teachers.cache import read_manifest
from gkd_trainer.types import TokenBatch
from tests.trainer.conftest import make_rows


def curve_of(trainer):
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])


# Plain descent: Adam enlarges rounding where a gradient is almost zero.
RUN = {"max_steps": 6, "learning_rate": 0.02, "optim": "sgd", "seed": 3}


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_loss_curve_from_a_cache_is_the_live_teachers(make_trainer, cached, beta):
    live, live_weights = curve_of(make_trainer(**RUN, beta=beta))
    losses, weights = curve_of(make_trainer(**RUN, beta=beta, trainer_args={"teacher": CachedTeacher(cached())}))
    assert losses == pytest.approx(live, rel=1e-4)
    assert torch.allclose(weights, live_weights, atol=2e-4)
    assert losses[-1] < losses[0]


def test_a_run_by_options_needs_no_teacher_and_any_data_loader_order(make_trainer, cached, tiny_model, byte_level):
    live, _ = curve_of(make_trainer(**RUN))
    options = {"teacher_cache_dir": cached(shard_mb=0.01, batch_size=3), "dataloader_num_workers": 1}
    trainer = make_trainer(**RUN, **options, trainer_args={"teacher_model": None, "model": tiny_model()})
    losses, _ = curve_of(trainer)
    assert losses == pytest.approx(live, rel=1e-4)
    assert trainer.teacher_model is None
    assert "seconds_teacher" in trainer.state.log_history[0]


def test_a_bf16_teachers_gradients_are_those_of_the_same_batch_bit_for_bit(make_trainer, cached, tiny_model):
    teacher = FrozenTeacher(tiny_model(hidden=48, seed=1).bfloat16())
    rows = sorted(make_rows(4), key=lambda row: len(row["input_ids"]))  # one batch, as the cache scores it
    folder = cached(teacher, rows, batch_size=4)
    gradients = []
    for given in ({"teacher": CachedTeacher(folder)}, {"teacher": teacher}):
        trainer = make_trainer(trainer_args={"train_dataset": rows, **given}, lmbda=0.0)
        trainer.compute_loss(trainer.model, trainer.data_collator(rows)).backward()
        gradients.append([parameter.grad for parameter in trainer.model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize(("kind", "tolerance"), [("hidden_int8", 2e-2), ("topk", 1e-4)])
def test_smaller_kinds_train_alike(make_trainer, cached, tiny_model, kind, tolerance):
    teacher = FrozenTeacher(tiny_model(hidden=48, seed=1), top_k=20 if kind == "topk" else None)
    folder = cached(teacher, kind=kind)
    live, _ = curve_of(make_trainer(**RUN, trainer_args={"teacher": teacher}))
    losses, _ = curve_of(make_trainer(**RUN, trainer_args={"teacher": CachedTeacher(folder)}))
    assert losses == pytest.approx(live, rel=tolerance)


def test_a_cache_alone_refuses_generated_completions(make_trainer, cached):
    folder = cached()
    with pytest.raises(GKDConfigError, match="lmbda above 0 generates completions, for which a cached teacher"):
        make_trainer(lmbda=0.5, trainer_args={"teacher": CachedTeacher(folder)})


def test_generated_completions_are_scored_by_the_fallback(make_trainer, cached, tiny_model):
    options = {"lmbda": 0.5, "seed": 1, "max_steps": 3}
    live, _ = curve_of(make_trainer(**options))
    fallback = FrozenTeacher(tiny_model(hidden=48, seed=1))
    trainer = make_trainer(**options, trainer_args={"teacher": CachedTeacher(cached(), fallback)})
    losses, _ = curve_of(trainer)
    assert losses == pytest.approx(live, rel=1e-3)
    assert "divergence_on_policy" in trainer.state.log_history[0]


def test_a_row_that_is_missing_and_drawn_ends_the_run_with_its_name(make_trainer, cached, token_rows):
    rows = token_rows(16).add_column("row_key", list(range(100, 116)))
    given = {"teacher": CachedTeacher(cached(rows=token_rows(15))), "train_dataset": rows}
    trainer = make_trainer(trainer_args=given, max_steps=10, dataloader_drop_last=True)
    with pytest.raises(GKDDataError, match=r"a row is not in the cache in .*row_key 115"):
        trainer.train()


def test_a_cache_of_another_tokenizer_is_refused(make_trainer, cached, byte_level, token_rows):
    other = byte_level()
    other.add_tokens(["<new>"])
    folder = cached(FrozenTeacher(make_trainer().teacher.model, tokenizer=other), tokenizer=other)
    with pytest.raises(GKDTeacherError, match=r"student and teacher have different tokenizers.*'<new>'"):
        make_trainer(trainer_args={"teacher": CachedTeacher(folder)})


def test_a_cache_of_a_smaller_truncation_is_refused_and_of_a_larger_one_serves(make_trainer, cached):
    with pytest.raises(GKDTeacherError, match="max_length=10 tokens, but this run has max_length=64"):
        make_trainer(trainer_args={"teacher": CachedTeacher(cached(max_length=10, name="short"))})
    losses, _ = curve_of(make_trainer(**RUN, max_length=10, trainer_args={"teacher": CachedTeacher(cached())}))
    assert losses == pytest.approx(curve_of(make_trainer(**RUN, max_length=10))[0], rel=1e-4)


def test_rows_are_prepared_as_for_training_and_the_manifest_says_how(
    cached, make_trainer, tiny_model, byte_level, tmp_path
):
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    rows = [
        {"messages": turns},
        {"messages": [*turns, {"role": "user", "content": "three"}, {"role": "assistant", "content": "four"}]},
    ]
    folder = cached(rows=rows, train_on="last_turn", student=tiny_model())
    source = read_manifest(tmp_path / "cache").source
    assert (source.max_length, source.train_on, source.teacher) == (64, "last_turn", "LlamaForCausalLM")
    options = {**RUN, "train_on": "last_turn"}
    data = {"train_dataset": rows}
    losses, _ = curve_of(make_trainer(**options, trainer_args={"teacher": CachedTeacher(folder), **data}))
    assert losses == pytest.approx(curve_of(make_trainer(**options, trainer_args=data))[0], rel=1e-4)


def test_a_second_run_scores_only_rows_that_are_new(cached, tiny_model, token_rows):
    asked = []

    def recording(teacher):
        score = teacher.score
        teacher.score = lambda batch: asked.append(len(batch.labels_BL)) or score(batch)
        return teacher

    cached(recording(FrozenTeacher(tiny_model(hidden=48, seed=1))), token_rows(10), batch_size=4)
    assert asked == [4, 4, 2]
    asked.clear()
    cached(recording(FrozenTeacher(tiny_model(hidden=48, seed=1))), token_rows(16), batch_size=4)
    assert sum(asked) == 6
    asked.clear()
    cached(recording(FrozenTeacher(tiny_model(hidden=48, seed=1))), token_rows(16))
    assert asked == []


@pytest.mark.parametrize("form", [list, Dataset.from_list, lambda rows: Dataset.from_list(rows).to_iterable_dataset()])
def test_parts_are_read_as_one_cache_of_all_rows(cached, tiny_model, byte_level, form):
    teacher = FrozenTeacher(tiny_model(hidden=48, seed=1).bfloat16())
    for number in (3, 1, 2):
        folder = cached(teacher, form(make_rows(16)), name="parts", part=(number, 3), batch_size=1)
    parts, whole = (CachedTeacher(each) for each in (folder, cached(teacher, batch_size=1)))
    assert [sum(shard.rows for shard in each.shards) for each in parts.manifests.values()] == [6, 5, 5]
    collate = DataCollatorForLanguageModeling(pad_token_id=0)
    batch = TokenBatch.from_inputs(collate(make_rows(16)))
    for each in (parts, whole):
        each.prepare(torch.device("cpu"), byte_level(), 64)
    given, expected = parts.score(batch), whole.score(batch)
    assert torch.equal(given.hidden_NH, expected.hidden_NH)
    assert torch.equal(given.head.weight_VH, expected.head.weight_VH)


def test_a_part_scores_only_its_own_rows_and_is_continued_alone(cached, tiny_model):
    asked = []
    teacher = FrozenTeacher(tiny_model(hidden=48, seed=1))
    score = teacher.score
    teacher.score = lambda batch: asked.append(batch.model_inputs["input_ids"][0].tolist()) or score(batch)
    rows = make_rows(12)
    cached(teacher, rows[:6], part=(2, 4), batch_size=1)
    assert sorted(asked) == sorted(row["input_ids"] for row in (rows[1], rows[5]))
    asked.clear()
    cached(teacher, rows, part=(2, 4), batch_size=1)
    assert asked == [rows[9]["input_ids"]]


def test_rows_that_can_not_be_dealt_out_are_refused(cached):
    with pytest.raises(
        GKDDataError, match=r"train \(part 5/5\): there are only 4 rows: divide them into as many parts"
    ):
        cached(rows=make_rows(4), part=(5, 5))
    with pytest.raises(GKDDataError, match=r"whose rows can be dealt out; got Subset: convert it"):
        cached(rows=torch.utils.data.Subset(make_rows(4), [0, 1]), part=(1, 2))
    with pytest.raises(GKDConfigError, match="part must be I/N, with I from 1 to N, such as 2/4; got 0/2"):
        cached(part=(0, 2))


def test_what_can_not_be_cached_is_refused(cached, tiny_model, byte_level):
    with pytest.raises(GKDConfigError, match="set lmbda=0 and seq_kd=False"):
        cached(lmbda=0.5)
    with pytest.raises(GKDConfigError, match="batch_size must be at least 1; got 0"):
        cached(batch_size=0)
    with pytest.raises(GKDTeacherError, match="is a cache already"):
        cached(CachedTeacher(cached()), name="other")
    with pytest.raises(GKDTeacherError, match="predictions of one teacher; got RoutedTeachers"):
        cached(RoutedTeachers({"own": FrozenTeacher(tiny_model(seed=1))}), name="other")
    other = OtherTokenizerTeacher(FrozenTeacher(tiny_model(seed=1), byte_level()))
    with pytest.raises(GKDTeacherError, match="over the student's tokens, but this teacher reads other tokens"):
        cached(other, name="other")
    with pytest.raises(GKDTeacherError, match="a SelfTeacher is the student, which training changes"):
        cached(SelfTeacher(), student=tiny_model(), name="other")
    with pytest.raises(GKDTeacherError, match="'topk' stores its top tokens"):
        cached(kind="topk", name="other")
    with pytest.raises(GKDDataError, match="none of the 2 rows can be used"):
        cached(rows=[{"input_ids": [5, 6], "labels": [-100, -100]}] * 2, name="empty")


def test_a_default_max_length_gives_way_to_the_shorter_context(cached, tiny_model, tmp_path):
    model = tiny_model(hidden=48, seed=1, max_position_embeddings=32)
    cached(FrozenTeacher(model), max_length=GKDConfig.max_length)
    assert read_manifest(tmp_path / "cache").source.max_length == 32


def test_rows_with_a_prompt_of_the_teachers_own_are_refused(cached):
    rows = [{"prompt": "one", "completion": " two", "teacher_prompt": "one and two"}]
    with pytest.raises(GKDDataError, match="rows of the data to cache have teacher_prompt"):
        cached(rows=rows)


@pytest.mark.parametrize("column", ["teacher_index", "pixel_values"])
def test_rows_whose_predictions_depend_on_more_than_their_tokens_are_refused(cached, token_rows, column):
    rows = token_rows(4).add_column(column, [0, 1, 1, 1])
    with pytest.raises(GKDDataError, match=f"rows of the data to cache have {column}, but a cache holds one teacher"):
        cached(rows=rows)


def test_the_predictions_of_an_encoder_decoder_are_not_cached(cached, tiny_model, tiny_encoder_decoder):
    with pytest.raises(GKDConfigError, match="T5ForConditionalGeneration is an encoder-decoder, but a cache holds"):
        cached(FrozenTeacher(tiny_encoder_decoder()))
    with pytest.raises(GKDConfigError, match="BartForConditionalGeneration is an encoder-decoder, but a cache holds"):
        cached(student=tiny_encoder_decoder("bart"))


def test_a_cache_of_padded_rows_serves_the_rows_without_their_padding(make_trainer, cached):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return [{"input_ids": [2, 2, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1]}][index]

    given = {"teacher": CachedTeacher(cached(rows=Rows())), "train_dataset": [{"input_ids": [5, 6, 7]}] * 4}
    make_trainer(trainer_args=given, max_steps=1).train()


def test_rows_of_several_samples_are_not_cached(cached):
    with pytest.raises(GKDDataError, match="the position_ids of row 0 of the data to cache start again"):
        cached(rows=[{"input_ids": [5, 6, 7, 8], "position_ids": [0, 1, 0, 1]}])
