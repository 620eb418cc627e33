"""Student and teacher are paired over the tokens and within the context of both, alike on all ranks."""

import copy
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gkd_trainer import FrozenTeacher, GKDArguments, GKDConfigError, GKDTeacherError, OtherTokenizerTeacher
from gkd_trainer.models.heads import Context, InseparableHead, SeparableHead
from gkd_trainer.trainer.pairing import OwnedContext, fitted_into, pair, shorter_context
from gkd_trainer.trainer.ranks import Ranks


@pytest.fixture
def make_teacher(tiny_model, byte_level):
    def make(family="llama", **config):
        return FrozenTeacher(tiny_model(family, seed=1, **config), tokenizer=byte_level())

    return make


def sharded(ranks, name):
    """The same ranks under a sharding."""
    return type("Sharded", (Ranks,), {"sharding": name})(ranks.accelerator)


def test_heads_of_equal_size_are_compared_in_full_and_others_over_the_tokenizers_tokens(
    tiny_model, byte_level, make_teacher, ranks
):
    student, tokenizer = tiny_model(vocab=384), byte_level()
    assert len(tokenizer) == 365
    assert pair(student, make_teacher(vocab=384), tokenizer, ranks).vocab_size == 384
    assert pair(student, make_teacher(vocab=400), tokenizer, ranks).vocab_size == 365
    with pytest.raises(GKDTeacherError, match=r"384 tokens and the teacher over 400.*student's tokenizer"):
        pair(student, make_teacher(vocab=400), None, ranks)


def test_a_plain_head_is_split_off_and_nothing_is_logged(tiny_model, byte_level, make_teacher, ranks, caplog):
    student = tiny_model("gemma2")
    pairing = pair(student, make_teacher(), byte_level(), ranks)
    assert pairing.head == SeparableHead(student.lm_head, 1.0, 3.0, is_sharded=False)
    assert pairing.head_module is student.lm_head
    assert not caplog.records


def test_a_student_that_is_known_keeps_its_pairing_also_within_wrappers(tiny_model, byte_level, make_teacher, ranks):
    student = tiny_model()
    pairing = pair(student, make_teacher(), byte_level(), ranks)
    assert pairing.with_student(student, ranks) is pairing
    assert pairing.with_student(get_peft_model(student, LoraConfig(target_modules=["q_proj"])), ranks) is pairing


def test_another_student_of_the_same_teacher_gets_its_own_head(tiny_model, byte_level, make_teacher, ranks):
    pairing = pair(tiny_model(vocab=384), make_teacher(vocab=400), byte_level(), ranks)
    other = tiny_model("granite", vocab=384)
    changed = pairing.with_student(other, ranks)
    assert changed.head == SeparableHead(other.lm_head, 0.25, None)
    assert changed.head_module is other.lm_head
    assert changed.vocab_size == pairing.vocab_size == 365
    assert changed.with_student(other, ranks) is changed


def test_a_compiled_student_is_inseparable_and_so_is_the_next_one(tiny_model, byte_level, make_teacher, ranks, caplog):
    pairing = pair(tiny_model(), make_teacher(), byte_level(), ranks, is_compiled=True)
    other = pairing.with_student(tiny_model(seed=2), ranks)
    assert pairing.head == other.head == InseparableHead("its forward is compiled as a whole")
    assert caplog.text.count("The student computes full logits") == 2
    assert "half precision" not in caplog.text
    assert "compiled as a whole" in caplog.text


def test_a_student_cut_by_zero3_is_inseparable_and_one_of_fsdp_marked_as_sharded(
    tiny_model, byte_level, make_teacher, ranks
):
    student, teacher = tiny_model(), make_teacher()
    zero3 = pair(student, teacher, byte_level(), sharded(ranks, "zero3"))
    assert zero3.head == InseparableHead("its weights are sharded over ranks")
    assert pair(student, teacher, byte_level(), sharded(ranks, "fsdp2")).head.is_sharded


@pytest.mark.parametrize(("sharding", "is_rounded"), [("zero3", True), (None, False)])
def test_the_log_says_if_full_logits_are_rounded_under_mixed_precision(
    tiny_model, byte_level, make_teacher, ranks, sharding, is_rounded, monkeypatch, caplog
):
    monkeypatch.setattr(type(ranks.accelerator), "mixed_precision", "bf16")
    pair(tiny_model(), make_teacher(), byte_level(), sharded(ranks, sharding), is_compiled=True)
    assert ("rounds them to half precision" in caplog.text) == is_rounded


def test_a_teacher_with_full_logits_of_halves_says_that_they_are_rounded(tiny_model, caplog):
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model().to(dtype)
        model.lm_head.forward = model.lm_head.forward  # replaced, so that the model computes its own logits
        FrozenTeacher(model).prepare(torch.device("cpu"))
    first, second = (record.message for record in caplog.records)
    assert "half precision" not in first
    assert "takes more memory, and rounds them to half precision" in second


@pytest.mark.parametrize("other", [0, 1])
def test_a_head_is_split_off_only_if_every_rank_can(tiny_model, byte_level, make_teacher, two_ranks, other):
    teacher = make_teacher()
    ranks = two_ranks(magnitude(teacher), other)
    head = pair(tiny_model(), teacher, byte_level(), ranks).head
    assert isinstance(head, InseparableHead if other else SeparableHead)
    assert not other or "another rank" in head.reason
    assert ranks.said[1] == 0
    assert ranks.other_says == []


def magnitude(teacher):
    return next(teacher.model.parameters()).abs().sum().item()


@pytest.mark.parametrize(("factor", "is_refused"), [(1.0005, False), (1.01, True), (0.0, True)])
def test_a_teacher_whose_weights_differ_between_ranks_is_refused(
    tiny_model, byte_level, make_teacher, two_ranks, factor, is_refused
):
    teacher = make_teacher()
    ranks = two_ranks(factor * magnitude(teacher), 0)
    if not is_refused:
        pair(tiny_model(), teacher, byte_level(), ranks)
        return
    with pytest.raises(GKDTeacherError, match=r"the same on every rank.*cpu_ram_efficient_loading"):
        pair(tiny_model(), teacher, byte_level(), ranks)


def test_weights_without_a_magnitude_are_passed_over_between_ranks(tiny_model, byte_level, make_teacher, two_ranks):
    teacher = make_teacher(layers=1)
    names = [name for name, _ in teacher.model.named_parameters()]
    teacher.model.model.embed_tokens.to("meta")
    assert names[0] == "model.embed_tokens.weight"
    second = teacher.model.get_parameter(names[1])
    ranks = two_ranks(second.abs().sum().item(), 0)
    pair(tiny_model(), teacher, byte_level(), ranks)
    assert ranks.said[0] == second.abs().sum()


def test_a_teacher_sharded_by_zero3_is_refused(tiny_model, byte_level, make_teacher, ranks):
    teacher = make_teacher()
    list(teacher.model.parameters())[-1].ds_id = 0
    with pytest.raises(GKDTeacherError, match=r"must have all of the teacher's weights.*pass the teacher by name"):
        pair(tiny_model(), teacher, byte_level(), ranks)


def test_a_teacher_that_shares_weights_may_be_in_parts_as_its_student_is(tiny_model, byte_level, two_ranks):
    class Sharing(FrozenTeacher):
        shares_weights = True

    student = tiny_model()
    teacher = Sharing(student)
    teacher.prepare(torch.device("cpu"))
    list(student.parameters())[-1].ds_id = 0
    assert pair(student, teacher, byte_level(), two_ranks(0)).vocab_size == 368


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ("gpt2", "llama", ("student", 64)),
        ("llama", "gpt2", ("teacher", 64)),
        ("gpt2", "gpt2", ("student", 64)),
        ("rwkv", "gpt2", ("teacher", 64)),
        ("rwkv", "mamba", None),
    ],
)
def test_the_shorter_context_is_returned_with_its_owner(tiny_model, make_teacher, student, teacher, expected):
    shorter = shorter_context(tiny_model(student), make_teacher(teacher))
    assert (shorter and (shorter.owner, shorter.context.limit)) == expected


def test_the_context_of_a_teacher_with_another_tokenizer_is_in_other_tokens(tiny_model, make_teacher):
    other = OtherTokenizerTeacher(make_teacher("gpt2"))
    assert shorter_context(tiny_model("rwkv"), other) is None


SHORTER = OwnedContext("teacher", Context(64, has_rope=True))


def test_the_default_of_max_length_gives_way_in_a_copy_with_a_warning(caplog):
    args = GKDArguments(max_new_tokens=20)
    before = copy.copy(args)
    fitted = fitted_into(SHORTER, args)
    assert (fitted.max_length, fitted.max_new_tokens) == (64, 20)
    assert args == before
    assert args.max_length == GKDArguments.max_length
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (logging.WARNING, "max_length is 64, the teacher's context, instead of its default of 1024.")
    ]


@pytest.mark.parametrize(("shorter", "max_length"), [(None, 1024), (SHORTER, None), (SHORTER, 64), (SHORTER, 30)])
def test_options_that_fit_are_given_back_as_they_are(shorter, max_length, caplog):
    args = GKDArguments(max_length=max_length, max_new_tokens=8)
    assert fitted_into(shorter, args) is args
    assert not caplog.records


def test_a_max_length_that_was_chosen_too_long_is_refused():
    with pytest.raises(GKDConfigError) as raised:
        fitted_into(SHORTER, GKDArguments(max_length=65, max_new_tokens=8))
    assert str(raised.value) == (
        "max_length=65 is more than the teacher's context, 64 tokens: set max_length to 64 or less, or scale its "
        "rotary embeddings (rope_parameters in its config)"
    )
