"""Whether two models use the same tokens, and over how many they are compared."""

import logging
from types import SimpleNamespace

import pytest

from gkd_trainer.errors import GKDTeacherError
from gkd_trainer.teachers import pad_tokens_of, shared_vocabulary_size

VOCABULARY = {"a": 0, "b": 1, "c": 2, "d": 3, "<end>": 9}


def test_equal_heads_are_compared_in_full(caplog):
    assert shared_vocabulary_size(12, 12, VOCABULARY, dict(VOCABULARY)) == 12
    assert not caplog.records


@pytest.mark.parametrize(
    ("student_size", "teacher_size", "size"),
    [
        (12, 16, 10),  # the ids that the tokenizer uses end at 9
        (16, 12, 10),
        (10, 16, 10),
        (16, 8, 8),  # a head may be smaller than its tokenizer
        (8, 16, 8),
    ],
)
def test_heads_padded_to_different_sizes_are_cut_to_the_tokens_both_use(student_size, teacher_size, size):
    assert shared_vocabulary_size(student_size, teacher_size, VOCABULARY, dict(VOCABULARY)) == size


def test_equal_sizes_do_not_hide_tokens_with_other_ids():
    with pytest.raises(GKDTeacherError) as raised:
        shared_vocabulary_size(12, 12, VOCABULARY, {**VOCABULARY, "a": 1, "b": 0})
    message = str(raised.value)
    assert "2 tokens have different ids in student and teacher, such as 'a' (0 and 1), 'b' (1 and 0)" in message
    assert "alone" not in message
    assert "Use a teacher with the student's tokenizer" in message
    assert isinstance(raised.value, ValueError)


def test_tokens_of_only_one_side_are_named_with_their_owner():
    student, teacher = {**VOCABULARY, "mine": 10}, {**VOCABULARY, "thine": 10, "too": 11}
    with pytest.raises(GKDTeacherError) as raised:
        shared_vocabulary_size(12, 12, student, teacher)
    message = str(raised.value)
    assert "1 tokens are only the student's, such as 'mine'" in message
    assert "2 tokens are only the teacher's, such as 'thine', 'too'" in message
    assert "other ids" not in message


@pytest.mark.parametrize("owner", ["student", "teacher"])
def test_a_pad_token_that_was_added_to_one_tokenizer_is_named_with_its_remedy(owner):
    sides = {"student": VOCABULARY, "teacher": VOCABULARY, owner: {**VOCABULARY, "[PAD]": 10}}
    expected = (
        rf"differ only by an added pad token: 1 tokens are only the {owner}'s, such as '\[PAD\]'\. .*= tokenizer\.eos"
    )
    with pytest.raises(GKDTeacherError, match=expected):
        shared_vocabulary_size(12, 12, sides["student"], sides["teacher"], {"[PAD]"})
    sides[owner]["more"] = 11
    with pytest.raises(GKDTeacherError, match="Use a teacher with the student's tokenizer"):
        shared_vocabulary_size(12, 12, sides["student"], sides["teacher"], {"[PAD]"})
    with pytest.raises(GKDTeacherError, match="Use a teacher with the student's tokenizer"):
        shared_vocabulary_size(12, 12, {"a": 0, "[PAD]": 1}, {"a": 0, "[PAD]": 2}, {"[PAD]"})


def test_tokens_only_for_padding_are_not_those_that_end_texts():
    both, added = (
        SimpleNamespace(pad_token="<end>", eos_token="<end>"),
        SimpleNamespace(pad_token="[PAD]", eos_token="<e>"),
    )
    assert pad_tokens_of(both, None, SimpleNamespace(pad_token=None, eos_token="<end>"), added) == {"[PAD]"}


def test_a_long_difference_is_shortened_to_five_examples():
    student = {f"s{i}": i for i in range(100)}
    with pytest.raises(GKDTeacherError) as raised:
        shared_vocabulary_size(100, 100, student, {f"t{i}": i for i in range(100)})
    message = str(raised.value)
    assert "100 tokens are only the student's, such as 's0', 's1', 's10', 's11', 's12'; 100 tokens" in message


@pytest.mark.parametrize("missing", ["student", "teacher"])
def test_without_a_tokenizer_equal_sizes_are_trusted_with_one_warning(caplog, missing):
    vocabularies = [None, VOCABULARY] if missing == "student" else [VOCABULARY, None]
    with caplog.at_level(logging.WARNING):
        assert shared_vocabulary_size(12, 12, *vocabularies) == 12
    [record] = caplog.records
    assert f"No tokenizer of the {missing} was found" in record.getMessage()
    assert "(12)" in record.getMessage()


@pytest.mark.parametrize("missing", ["student", "teacher"])
def test_without_a_tokenizer_unequal_sizes_are_refused(missing):
    vocabularies = [None, VOCABULARY] if missing == "student" else [VOCABULARY, None]
    with pytest.raises(GKDTeacherError) as raised:
        shared_vocabulary_size(12, 16, *vocabularies)
    message = str(raised.value)
    assert "predicts over 12 tokens and the teacher over 16" in message
    assert f"the {missing}'s tokenizer is unknown" in message
    assert "processing_class" in message
    assert "FrozenTeacher(model, tokenizer=...)" in message
