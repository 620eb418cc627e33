"""What composites of several teachers state about them all, and which sets of teachers are refused."""

import logging

import pytest
import torch

from gkd_trainer.errors import GKDTeacherError
from gkd_trainer.teachers import FrozenTeacher, RoutedTeachers, VLLMServerTeacher, WeightedTeachers, several_in
from gkd_trainer.teachers.base import CompositeTeacher, all_teachers

CPU = torch.device("cpu")


@pytest.fixture
def frozen(tiny_model, byte_level):
    def make(seed=1, **options):
        return FrozenTeacher(tiny_model(seed=seed, **options), byte_level())

    return make


@pytest.mark.parametrize("composite", [RoutedTeachers, WeightedTeachers])
def test_the_properties_are_those_of_all_teachers(composite, frozen, tiny_model, byte_level):
    teacher = composite({"math": frozen(1), "code": frozen(2)})
    assert isinstance(teacher, CompositeTeacher)
    assert teacher.names == ("math", "code")
    assert [each.model.config.vocab_size for each in teacher.teachers] == [368, 368]
    assert teacher.vocab_size == 368
    assert teacher.vocabulary == byte_level().get_vocab()
    assert teacher.top_k is None
    assert teacher.model is None
    assert teacher.is_local
    assert not teacher.can_generate
    assert not teacher.shares_weights
    mixed = composite({"math": FrozenTeacher(tiny_model(), byte_level(), top_k=5), "code": frozen(2)})
    assert mixed.top_k == 5
    served = composite({"math": VLLMServerTeacher("http://127.0.0.1:9", top_k=9), "code": frozen(2)})
    assert not served.is_local
    assert served.top_k == 9
    assert served.vocab_size == 368


def test_heads_of_different_padding_are_compared_over_the_tokenizer_s_ids(frozen, byte_level):
    teacher = RoutedTeachers({"math": frozen(1), "code": frozen(2, vocab=384)})
    teacher.prepare(CPU)
    assert teacher.vocab_size == max(byte_level().get_vocab().values()) + 1


def test_a_chat_template_that_all_share_renders_their_prompts(tiny_model, byte_level):
    def several(*templates):
        tokenizers = [byte_level() for _ in templates]
        for tokenizer, template in zip(tokenizers, templates, strict=True):
            tokenizer.chat_template = template
        return tokenizers, RoutedTeachers(
            {f"teacher {i}": FrozenTeacher(tiny_model(), tokenizer) for i, tokenizer in enumerate(tokenizers)}
        )

    tokenizers, teacher = several("one", "one")
    assert teacher.tokenizer is tokenizers[0]
    assert several("one", "two")[1].tokenizer is None


def test_teachers_with_different_tokenizers_are_refused_by_name(frozen, tiny_model, byte_level):
    other = byte_level()
    other.add_tokens(["<new>"])
    with pytest.raises(GKDTeacherError, match=r"'math' and 'code' have different tokenizers.*teacher code's.*<new>"):
        RoutedTeachers({"math": frozen(1), "code": FrozenTeacher(tiny_model(), other)})


def test_sizes_that_differ_without_a_known_tokenizer_are_refused(tiny_model):
    teacher = RoutedTeachers({"math": FrozenTeacher(tiny_model()), "code": FrozenTeacher(tiny_model(vocab=384))})
    with pytest.raises(GKDTeacherError, match=r"'math': 368, 'code': 384.* tokenizer of math, code is unknown"):
        teacher.prepare(CPU)


def test_an_unknown_tokenizer_among_known_ones_is_told(frozen, tiny_model, caplog):
    teacher = RoutedTeachers({"math": frozen(1), "code": FrozenTeacher(tiny_model())})
    with caplog.at_level(logging.WARNING):
        teacher.prepare(CPU)
    assert "No tokenizer of the teachers code was found" in caplog.text


@pytest.mark.parametrize("teachers", [{}, {"": "teacher"}, {3: "teacher"}])
def test_no_teachers_and_no_names_are_refused(teachers):
    with pytest.raises(GKDTeacherError, match="expected teachers by name"):
        RoutedTeachers(teachers)


def test_anything_but_a_teacher_is_refused_with_what_makes_one(tiny_model):
    with pytest.raises(GKDTeacherError, match=r"a Teacher as 'math'; got LlamaForCausalLM: FrozenTeacher\(model\)"):
        RoutedTeachers({"math": tiny_model()})


def test_the_outermost_composite_is_found(frozen):
    summed = WeightedTeachers({"math": frozen(1), "code": frozen(2)})
    routed = RoutedTeachers({"both": summed, "chat": frozen(3)})
    assert several_in(routed) is routed
    assert several_in(frozen()) is None
    assert len(list(all_teachers(routed))) == 5
