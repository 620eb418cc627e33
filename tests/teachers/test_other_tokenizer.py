"""A teacher with another tokenizer: what it reads, where it is compared, and what is refused."""

from dataclasses import replace

import pytest
import torch

from gkd_trainer.batch_keys import IGNORE_INDEX, IS_ON_POLICY, TEACHER_COLUMNS, TEACHER_IDS, TEACHER_PROMPT_IDS
from gkd_trainer.divergence import token_divergence
from gkd_trainer.errors import GKDConfigError, GKDDataError, GKDTeacherError
from gkd_trainer.models.heads import find_head, predict
from gkd_trainer.models.token_bytes import token_bytes
from gkd_trainer.signals import MappedSignal, TopKSignal
from gkd_trainer.teachers import (
    FrozenTeacher,
    OtherTokenizerTeacher,
    RoutedTeachers,
    WeightedTeachers,
    comparable,
    describe,
)
from gkd_trainer.types import TokenBatch
from tests.vocabularies import permuted, sentencepiece_backend, sentencepiece_like

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def other():
    return sentencepiece_like(sentencepiece_backend())


@pytest.fixture
def make(tiny_model, other, byte_level):
    """Make a prepared teacher with that tokenizer, for a byte-level student."""

    def make_teacher(*, top_k=None, is_prepared=True, model=None, **options):
        inner = FrozenTeacher(model or tiny_model(hidden=48, vocab=len(other), seed=1), other, top_k=top_k)
        teacher = OtherTokenizerTeacher(inner, **options)
        if is_prepared:
            teacher.prepare(CPU, byte_level())
        return teacher

    return make_teacher


def batch_of(tokenizer, samples, **more):
    """Rows of (prompt, completion), padded on the right."""
    rows = [(tokenizer(prompt)["input_ids"], tokenizer(completion)["input_ids"]) for prompt, completion in samples]
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids, labels, mask = (torch.full((len(rows), length), value) for value in (2, IGNORE_INDEX, 0))
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
        mask[row, :end] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, **more}


SAMPLES = [
    ("<|im_start|>user\nHi<|im_end|>\n", "The capital of France is Paris.<|im_end|>"),
    ("one two", " three four 👍<|im_end|>"),
]


def test_the_signal_is_the_teachers_own_prediction_after_the_same_bytes(make, byte_level, other, tiny_model):
    """Each row scored alone by a plain forward of the teacher's model on text encoded by hand."""
    teacher, student = make(), byte_level()
    inputs = teacher.comparable(batch_of(student, SAMPLES))
    batch = TokenBatch.from_inputs(inputs)
    signal = teacher.score(batch)
    assert isinstance(signal, MappedSignal)
    logits_NW = signal.signal.head.logits(signal.signal.hidden_NH)
    model = tiny_model(hidden=48, vocab=len(other), seed=1)
    mine, theirs = token_bytes(student), token_bytes(other)
    assert len(logits_NW) == batch.n_scored > 10
    for place, (row, column) in enumerate(zip(batch.rows_N.tolist(), batch.columns_N.tolist(), strict=True)):
        before = mine.of(batch.model_inputs["input_ids"][row, : column + 1].tolist())
        ids = inputs[TEACHER_IDS][row].tolist()
        expected_bytes = b"<bos>" + before.replace(b"<|im_end|>", b"<end_of_turn>")
        [end] = [end for end in range(len(ids)) if theirs.of(ids[:end]) == expected_bytes]
        expected_W = model(input_ids=torch.tensor([ids[:end]])).logits[0, -1]
        torch.testing.assert_close(logits_NW[place], expected_W, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["matched", "next_byte", "uld", "gold"])
def test_a_student_that_is_the_teacher_with_other_ids_has_no_divergence_but_one_position_later_it_has(
    tiny_model, byte_level, mode
):
    """An alignment that is off by one would show."""
    tokenizer = byte_level()
    size = len(tokenizer)
    new_ids = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    student, theirs = tiny_model(vocab=size), tiny_model(vocab=size)
    for embeddings in (theirs.get_input_embeddings(), theirs.get_output_embeddings()):
        embeddings.weight.data[new_ids] = embeddings.weight.data.clone()
    inner = FrozenTeacher(theirs, permuted(tokenizer, new_ids.tolist()))
    teacher = OtherTokenizerTeacher(inner, mode=mode)
    teacher.prepare(CPU, tokenizer)
    inputs = batch_of(tokenizer, SAMPLES)
    whole = TokenBatch.from_inputs(inputs)
    batch = TokenBatch.from_inputs(teacher.comparable(inputs))
    assert batch.n_scored == whole.n_scored  # every position is shared
    with torch.no_grad():
        predictions, _ = predict(student, batch, find_head(student))
        signal = teacher.score(batch)
        right = token_divergence(predictions.sliced(size), signal)
        shifted = torch.roll(signal.signal.hidden_NH, 1, dims=0)
        wrong = token_divergence(
            predictions.sliced(size), MappedSignal(type(signal.signal)(shifted, signal.signal.head), signal.mapping)
        )
    assert right.values_N.abs().max() < 1e-5
    assert wrong.values_N.mean() > 0.05
    assert right.agrees_N.all()


def test_a_batch_that_was_made_comparable_stays_as_it_is(make, byte_level):
    teacher = make()
    inputs = teacher.comparable(batch_of(byte_level(), SAMPLES))
    assert teacher.comparable(inputs) is inputs
    assert comparable(teacher, inputs) is inputs


def test_other_teachers_compare_every_position(tiny_model, byte_level):
    inputs = batch_of(byte_level(), SAMPLES)
    assert comparable(FrozenTeacher(tiny_model(), byte_level()), inputs) is inputs


def test_labels_are_left_out_only_where_no_token_of_both_begins(make, byte_level):
    teacher, student = make(), byte_level()
    inputs = batch_of(student, SAMPLES)
    labels = teacher.comparable(inputs)["labels"]
    lost = (labels != inputs["labels"]).nonzero().tolist()
    assert (labels[labels != inputs["labels"]] == IGNORE_INDEX).all()
    assert 0 < len(lost) < (inputs["labels"] != IGNORE_INDEX).sum()
    # The first token of each completion, and its end, are always compared.
    for row, (prompt, _) in enumerate(SAMPLES):
        assert labels[row, len(student(prompt)["input_ids"])] != IGNORE_INDEX
        assert labels[row, int(inputs["attention_mask"][row].sum()) - 1] == student.eos_token_id


def test_padding_on_the_left_changes_nothing(make, byte_level):
    teacher = make()
    right = batch_of(byte_level(), SAMPLES)
    left = {name: value.clone() for name, value in right.items()}
    for row, length in enumerate(right["attention_mask"].sum(dim=1).tolist()):
        for value in left.values():
            value[row] = value[row].roll(value.shape[1] - length)
    batches = [TokenBatch.from_inputs(teacher.comparable(each)) for each in (right, left)]
    for name in (TEACHER_IDS, TEACHER_COLUMNS):
        assert torch.equal(batches[0].side[name], batches[1].side[name])
    assert torch.equal(batches[0].targets_N, batches[1].targets_N)


def test_with_a_prompt_of_its_own_the_teacher_reads_that_and_is_compared_on_the_last_turn(make, byte_level, other):
    teacher, student = make(), byte_level()
    own = other.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)["input_ids"]
    prompts = torch.tensor([own, [IGNORE_INDEX] * len(own)])
    inputs = batch_of(student, SAMPLES, **{TEACHER_PROMPT_IDS: prompts})
    first = int((inputs["labels"][0] != IGNORE_INDEX).nonzero()[0])
    inputs["labels"][0, 1] = inputs["input_ids"][0, 1]  # an earlier turn
    found = teacher.comparable(inputs)
    ids = found[TEACHER_IDS][0]
    assert other.decode(ids[ids != IGNORE_INDEX]).startswith(
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nThe"
    )
    assert found[TEACHER_COLUMNS][0, 0] == len(own)
    assert (found["labels"][0, :first] == IGNORE_INDEX).all()
    without = teacher.comparable(batch_of(student, SAMPLES))
    assert torch.equal(
        found[TEACHER_IDS][1][found[TEACHER_IDS][1] >= 0], without[TEACHER_IDS][1][without[TEACHER_IDS][1] >= 0]
    )


def test_a_generated_completion_is_read_whole_with_what_a_tool_wrote_inside(make, byte_level, other):
    teacher, student = make(), byte_level()
    own = other.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)["input_ids"]
    inputs = batch_of(student, [("one two", " three four five six")])
    first = int((inputs["labels"][0] != IGNORE_INDEX).nonzero()[0])
    inputs["labels"][0, first + 1] = IGNORE_INDEX  # a tool wrote this token
    more = {TEACHER_PROMPT_IDS: torch.tensor([own])}
    generated = teacher.comparable({**inputs, **more, IS_ON_POLICY: torch.tensor([True])})
    assert other.decode(generated[TEACHER_IDS][0]).endswith("model\n three four five six")
    assert generated["labels"][0, first] != IGNORE_INDEX
    assert generated["labels"][0, first + 1] == IGNORE_INDEX
    given = teacher.comparable({**inputs, **more, IS_ON_POLICY: torch.tensor([False])})
    assert (given["labels"][0, : first + 2] == IGNORE_INDEX).all()


def test_a_bare_prompt_has_nothing_to_compare(make, byte_level):
    teacher = make()
    inputs = batch_of(byte_level(), [("one two", ""), SAMPLES[1]])
    batch = TokenBatch.from_inputs(teacher.comparable(inputs))
    assert 0 not in batch.rows_N
    assert len(teacher.score(batch).signal.hidden_NH) == batch.n_scored
    nothing = TokenBatch.from_inputs(teacher.comparable(batch_of(byte_level(), [("one two", "")])))
    assert len(teacher.score(nothing).signal.hidden_NH) == 0


def test_rows_longer_than_the_teachers_context_are_cut(make, byte_level, tiny_model, other):
    teacher = make(model=tiny_model(hidden=48, vocab=len(other), seed=1, max_position_embeddings=20))
    inputs = teacher.comparable(batch_of(byte_level(), [("one", " two three four five six seven" * 4)]))
    assert inputs[TEACHER_IDS].shape[1] == 20
    assert inputs[TEACHER_COLUMNS].max() < 20
    teacher.score(TokenBatch.from_inputs(inputs))


def test_top_tokens_are_given_as_the_students(make, byte_level):
    teacher = make(top_k=5)
    batch = TokenBatch.from_inputs(teacher.comparable(batch_of(byte_level(), SAMPLES)))
    signal = teacher.score(batch)
    assert isinstance(signal, TopKSignal)
    assert signal.ids_NK.shape == (batch.n_scored, 5)
    assert signal.vocab_size == teacher.vocab_size == len(byte_level())


def test_its_properties_are_those_of_the_teacher_inside_and_of_the_students_tokens(make, byte_level, other):
    teacher = make(top_k=5)
    assert (teacher.vocabulary, teacher.vocab_size) == (byte_level().get_vocab(), len(byte_level()))
    assert (teacher.top_k, teacher.is_local, teacher.can_generate) == (5, True, False)
    assert teacher.model is teacher.teachers[0].model
    assert teacher.tokenizer is other
    assert describe(teacher) == replace(describe(teacher.teachers[0]), vocabulary_mode="matched")


@pytest.mark.parametrize("mode", ["next_byte", "uld", "gold"])
def test_modes_that_need_whole_distributions_are_refused_for_top_tokens(make, mode):
    with pytest.raises(GKDTeacherError, match=rf"mode='{mode}' needs the teacher's full distribution.*top 5 tokens"):
        make(top_k=5, mode=mode)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "union"}, r"mode must be one of 'matched', 'next_byte', 'uld', 'gold'; got 'union'"),
        ({"min_matched_mass": 1.5}, r"min_matched_mass must be in \[0, 1\] .*; got 1.5"),
    ],
)
def test_options_out_of_range_are_refused(make, options, message):
    with pytest.raises(GKDConfigError, match=message):
        make(**options)


def test_a_teacher_whose_tokenizer_is_unknown_is_refused(tiny_model):
    with pytest.raises(GKDTeacherError, match="the tokenizer of this FrozenTeacher is unknown: pass it as tokenizer"):
        OtherTokenizerTeacher(FrozenTeacher(tiny_model()))


@pytest.mark.parametrize("several", [RoutedTeachers, WeightedTeachers])
def test_it_is_refused_among_several_teachers_and_several_inside_of_it(make, tiny_model, byte_level, several):
    with pytest.raises(GKDTeacherError, match=r"the teacher 'b' reads other tokens.*train with only that one"):
        several({"a": FrozenTeacher(tiny_model(), byte_level()), "b": make()})
    inside = several({"a": FrozenTeacher(tiny_model(), byte_level())})
    with pytest.raises(
        GKDTeacherError, match=f"must be a single model of its own; got {several.__name__}: pass a FrozenTeacher"
    ):
        OtherTokenizerTeacher(inside, byte_level())
    with pytest.raises(GKDTeacherError, match="must be a single model of its own; got OtherTokenizerTeacher"):
        OtherTokenizerTeacher(make(), byte_level())


def test_a_teacher_that_is_the_student_is_refused(tiny_model, byte_level):
    class Shared(FrozenTeacher):
        shares_weights = True

    with pytest.raises(GKDTeacherError, match="must be a single model of its own; got Shared"):
        OtherTokenizerTeacher(Shared(tiny_model(), byte_level()))


def test_a_prompt_of_its_own_is_read_once(make, byte_level):
    """What it became are the teacher's tokens; nothing else may put it before the student's."""
    inputs = batch_of(byte_level(), SAMPLES, **{TEACHER_PROMPT_IDS: torch.tensor([[2, 5], [2, IGNORE_INDEX]])})
    found = make().comparable(inputs)
    assert TEACHER_PROMPT_IDS not in found
    assert found[TEACHER_IDS][0, :2].tolist() == [2, 5]


def test_a_student_whose_tokenizer_is_unknown_is_refused(make):
    with pytest.raises(GKDTeacherError, match="needs the student's, which is unknown: pass processing_class"):
        make(is_prepared=False).prepare(CPU)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"position_ids": torch.tensor([[0, 1, 0, 1, 2]])}, "several samples: set packing=False"),
        ({"seq_idx": torch.zeros(1, 5)}, "several samples: set packing=False"),
        ({"pixel_values": torch.zeros(1, 3, 2, 2)}, "reads text only, but the batch holds 'pixel_values'"),
    ],
)
def test_batches_that_it_can_not_read_are_refused(make, more, message):
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with pytest.raises(GKDDataError, match=message):
        make().comparable({"input_ids": ids, "labels": ids, **more})


def test_plain_position_ids_are_no_several_samples(make):
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    make().comparable({"input_ids": ids, "labels": ids, "position_ids": torch.arange(5)[None]})


def test_use_out_of_order_is_refused(make, byte_level):
    inputs = batch_of(byte_level(), SAMPLES)
    with pytest.raises(RuntimeError, match="before prepare"):
        make(is_prepared=False).comparable(inputs)
    teacher = make()
    with pytest.raises(RuntimeError, match="did not come from its `comparable`"):
        teacher.score(TokenBatch.from_inputs(inputs))
    changed = teacher.comparable(inputs)
    changed["labels"][0] = IGNORE_INDEX
    with pytest.raises(RuntimeError, match="its labels were changed"):
        teacher.score(TokenBatch.from_inputs(changed))
