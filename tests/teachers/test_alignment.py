"""A row in two tokenizers' tokens: the positions at which both begin a token, against a plain loop over bytes."""

import random
import unicodedata
from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from gkd_trainer.models.token_bytes import token_bytes
from gkd_trainer.teachers.alignment import Aligner, matched_ids, turn_end_id
from tests.models.test_token_bytes import PROPERTY, TEXTS
from tests.vocabularies import permuted, sentencepiece_backend, sentencepiece_like, unigram_backend


@pytest.fixture(scope="module")
def pair(byte_level):
    """A byte-level student and a SentencePiece-like teacher."""
    return byte_level(), sentencepiece_like(sentencepiece_backend())


@pytest.fixture(scope="module")
def aligner(pair):
    return Aligner(*pair)


def pieces(tokens, ids):
    return [tokens.bytes_V[each] for each in ids]


def shared_by_a_loop(student, teacher):
    """The pairs of columns whose prefixes have the same bytes, of two lists of non-empty pieces."""
    ends = {sum(map(len, teacher[:column])): column for column in range(len(teacher))}
    return [
        (column, ends[length]) for column in range(len(student)) if (length := sum(map(len, student[:column]))) in ends
    ]


@PROPERTY
@given(text=TEXTS)
def test_columns_are_those_with_the_same_bytes_before_them(pair, aligner, text):
    text = text.replace("▁", "_")
    ids = aligner.student.encoded(text)
    row = aligner.aligned(ids, prompt_ids=[2])
    assert row.teacher_ids[0] == 2
    student, teacher = pieces(aligner.student, ids), pieces(aligner.teacher, row.teacher_ids[1:])
    assert b"".join(student) == b"".join(teacher) == text.encode()
    found = [(mine, theirs - 1) for mine, theirs in zip(row.student_A.tolist(), row.teacher_A.tolist(), strict=True)]
    assert found == shared_by_a_loop(student, teacher)


@PROPERTY
@given(data=st.lists(st.integers(0, 255), max_size=12).map(bytes))
def test_bytes_that_are_no_text_are_written_as_they_are(pair, aligner, data):
    """As a student may sample them, or be cut off inside of a character."""
    ids = [aligner.student.by_bytes[bytes([byte])][0] for byte in data]
    row = aligner.aligned(ids, prompt_ids=[2])
    teacher = pieces(aligner.teacher, row.teacher_ids[1:])
    if "▁" not in data.decode(errors="replace"):
        assert b"".join(teacher) == data
        found = list(zip(row.student_A.tolist(), (row.teacher_A - 1).tolist(), strict=True))
        assert found == shared_by_a_loop([bytes([byte]) for byte in data], teacher)


def test_an_alignment_that_is_off_by_one_would_show(aligner):
    """Written out by hand: each pair of tokens begins after the same text."""
    ids = aligner.student.encoded("Paris, hello")
    row = aligner.aligned(ids, prompt_ids=[2])
    student, teacher = pieces(aligner.student, ids), pieces(aligner.teacher, row.teacher_ids)
    for mine, theirs in zip(row.student_A, row.teacher_A, strict=True):
        assert b"".join(student[:mine]) == b"".join(teacher[1:theirs])
        assert not mine or b"".join(student[: mine - 1]) != b"".join(teacher[1:theirs])
    assert 0 < len(row.student_A) < len(ids)


def test_a_conversation_gets_the_teachers_bos_and_end_of_turn(pair, aligner):
    student, teacher = pair
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nParis<|im_end|>"
    ids = student(text)["input_ids"]
    row = aligner.aligned(ids)
    names = teacher.convert_ids_to_tokens(row.teacher_ids)
    assert names[0] == "<bos>"
    assert names.count("<end_of_turn>") == 2
    assert teacher.decode(row.teacher_ids[1:]) == text.replace("<|im_end|>", "<end_of_turn>")
    last = dict(zip(row.student_A.tolist(), row.teacher_A.tolist(), strict=True))[len(ids) - 1]
    assert names[last] == "<end_of_turn>"


def test_a_completion_begins_with_a_token_of_both_wherever_its_prompt_ends(pair, aligner):
    ids = pair[0]("one two three")["input_ids"]
    for place in range(1, len(ids)):
        row = aligner.aligned(ids, breaks=[place])
        assert place in row.student_A


def test_a_prompt_of_the_teachers_own_replaces_the_students(pair, aligner):
    student, teacher = pair
    prompt = student("<|im_start|>user\nHi<|im_end|>\n")["input_ids"]
    own = teacher.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)["input_ids"]
    ids = prompt + student("Paris")["input_ids"] + [student.eos_token_id]
    row = aligner.aligned(ids, start=len(prompt), prompt_ids=own)
    assert (
        teacher.decode(row.teacher_ids)
        == "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nParis<end_of_turn>"
    )
    assert (row.student_A[0], row.teacher_A[0]) == (len(prompt), len(own))
    assert (row.student_A[-1], row.teacher_A[-1]) == (len(ids) - 1, len(row.teacher_ids) - 1)


@pytest.mark.parametrize("is_student", [True, False])
@pytest.mark.parametrize("make", [unigram_backend, lambda: sentencepiece_backend(prepends_space=True)])
def test_a_space_that_a_tokenizer_puts_before_a_text_is_not_the_texts(byte_level, make, is_student):
    pair = [byte_level(), sentencepiece_like(make(), has_bos=False)]
    student, teacher = pair[::-1] if is_student else pair
    aligner = Aligner(student, teacher)
    ids = student("the one two three")["input_ids"]
    row = aligner.aligned(ids)
    assert row.teacher_ids == teacher("the one two three")["input_ids"]
    mine, theirs = (
        [b"".join(pieces(tokens, each)) for each in prefixes]
        for tokens, prefixes in (
            (aligner.student, [ids[:column] for column in row.student_A]),
            (aligner.teacher, [row.teacher_ids[:column] for column in row.teacher_A]),
        )
    )
    assert [each.lstrip() for each in mine] == [each.lstrip() for each in theirs]
    assert len(mine) > 2
    assert b"" not in mine  # only one of the first tokens holds a space


def test_characters_that_the_teacher_changes_have_no_boundary_inside(byte_level, byte_level_backend):
    backend = Tokenizer.from_str(byte_level_backend.to_str())
    backend.normalizer = normalizers.NFKC()
    teacher = PreTrainedTokenizerFast(tokenizer_object=backend)
    aligner = Aligner(byte_level(), teacher)
    text = "a ﬁ b e\u0301 c"
    ids = aligner.student.encoded(text)
    row = aligner.aligned(ids, prompt_ids=[0])
    before = [aligner.student.of(ids[:column]).decode() for column in row.student_A]
    theirs = [aligner.teacher.of(row.teacher_ids[1:column]).decode() for column in row.teacher_A]
    assert [unicodedata.normalize("NFKC", each) for each in before] == theirs
    assert {"", "a", "a ﬁ b"} <= {*before}


def test_a_row_longer_than_the_teacher_takes_is_cut(aligner):
    ids = aligner.student.encoded("one two three four five six seven")
    whole = aligner.aligned(ids, prompt_ids=[2])
    cut = aligner.aligned(ids, prompt_ids=[2], limit=6)
    assert cut.teacher_ids == whole.teacher_ids[:6]
    kept = whole.teacher_A < 6
    assert cut.student_A.tolist() == whole.student_A[kept].tolist()
    assert cut.teacher_A.tolist() == whole.teacher_A[kept].tolist()


def test_tokens_match_by_bytes_and_ends_of_turns_by_their_role(pair, aligner):
    student, teacher = pair
    pairs = matched_ids(aligner)
    assert len({mine for mine, _ in pairs}) == len({theirs for _, theirs in pairs}) == len(pairs)
    by_student = dict(pairs)
    assert by_student[student.convert_tokens_to_ids("<|im_end|>")] == teacher.convert_tokens_to_ids("<end_of_turn>")
    for mine, theirs in pairs:
        if not aligner.student.is_special_V[mine]:
            assert aligner.student.bytes_V[mine] == aligner.teacher.bytes_V[theirs]
    assert by_student[student.convert_tokens_to_ids("Ġcapital")] == teacher.convert_tokens_to_ids("▁capital")


@pytest.mark.parametrize("kind", [0, 1])
def test_a_tokenizer_with_permuted_ids_matches_every_token(pair, kind):
    tokenizer = pair[kind]
    new_ids = random.Random(0).sample(range(len(tokenizer)), len(tokenizer))
    aligner = Aligner(tokenizer, permuted(tokenizer, new_ids))
    assert matched_ids(aligner) == sorted(enumerate(new_ids))


def test_the_end_of_a_turn_is_the_templates_or_else_eos(pair, byte_level):
    assert turn_end_id(pair[1]) == pair[1].convert_tokens_to_ids("<end_of_turn>")
    assert turn_end_id(sentencepiece_like(sentencepiece_backend(), chat_template=None)) == pair[1].eos_token_id
    assert turn_end_id(byte_level("{{ raise_exception('no') }}")) == byte_level().eos_token_id


def test_ids_beyond_the_tokenizer_stand_for_nothing(aligner):
    row = aligner.aligned([aligner.student.size + 3, *aligner.student.encoded("one")], prompt_ids=[2])
    assert aligner.teacher.of(row.teacher_ids[1:]) == b"one"


def test_a_token_takes_microseconds(aligner):
    """Of the alignment and of the teacher's tokenizer; the bound is for a busy machine."""
    text = "Natalia sold 48 clips in April, and half as many in May. " * 40
    ids = aligner.student.encoded(text)
    aligner.aligned(ids)
    began = perf_counter()
    for _ in range(5):
        aligner.aligned(ids)
    assert (perf_counter() - began) / (5 * len(ids)) < 20e-6


def test_both_sides_know_the_bytes_of_their_tokens(pair, aligner):
    assert aligner.student.bytes_V == token_bytes(pair[0]).bytes_V
