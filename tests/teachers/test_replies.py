"""Replies in the teacher's tokens: they begin as the teacher's own chat template and tokenizer write them."""

import copy
import json

import pytest
from tokenizers import Tokenizer

from gkd_trainer.data.rendered_prompts import RenderedPrompts
from gkd_trainer.models.prompts import prompt_ids
from gkd_trainer.teachers.alignment import Aligner, turn_end_id
from tests.vocabularies import TEXTS, sentencepiece_backend, sentencepiece_like

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<start_of_turn>' + '\n' + m['content'] + '<end_of_turn>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>' + '\n' }}{% endif %}"
)
QWEN_3 = CHATML.replace(
    "m['content']", "('<think>\n\n</think>\n\n' if m['role'] == 'assistant' else '') + m['content']"
)

USER, MARK = {"role": "user", "content": "hello there"}, "Paris is fine"
REPLY = {"role": "assistant", "content": MARK}


def with_stripping_special_tokens(backend):
    """As Phi-3's: the newline after a special token is not read, and a ▁ follows instead."""
    state = json.loads(backend.to_str())
    for added in state["added_tokens"]:
        added["rstrip"] = True
    return Tokenizer.from_str(json.dumps(state))


@pytest.fixture(scope="module")
def tokenizers(byte_level):
    texts = [*TEXTS, "[INST] hello there [/INST] Paris is fine"]
    plain, prepending = (sentencepiece_backend(prepends_space=each, texts=texts) for each in (False, True))
    stripping = with_stripping_special_tokens(copy.deepcopy(prepending))
    return {
        "ChatML": byte_level(CHATML),
        "Llama 2": sentencepiece_like(prepending, LLAMA_2),
        "Llama 2 without a space before a text": sentencepiece_like(plain, LLAMA_2),
        "byte-level Mistral": byte_level(MISTRAL.replace("bos_token", "''")),
        "Mistral": sentencepiece_like(plain, MISTRAL),
        "Phi-3": sentencepiece_like(stripping, PHI_3),
        "Gemma": sentencepiece_like(plain),
    }


NAMES = [
    "ChatML",
    "Llama 2",
    "Llama 2 without a space before a text",
    "byte-level Mistral",
    "Mistral",
    "Phi-3",
    "Gemma",
]


def row_of(student, reply=REPLY):
    """A student's prompt, and its tokens for a reply up to its last word."""
    prompt = prompt_ids(student, [USER])
    text = student.apply_chat_template([USER, reply], tokenize=False)
    text = text[: text.rindex(reply["content"]) + len(reply["content"])]
    whole = student(text, add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt)] == prompt
    return prompt, whole[len(prompt) :]


@pytest.mark.parametrize("teacher_name", NAMES)
@pytest.mark.parametrize("student_name", NAMES)
def test_the_teacher_reads_what_its_own_template_gives(tokenizers, student_name, teacher_name):
    student, teacher = tokenizers[student_name], tokenizers[teacher_name]
    aligner = Aligner(student, teacher)
    prompt, completion = row_of(student)
    own_prompt = RenderedPrompts(teacher).of({"messages": [USER, REPLY]})
    row = aligner.aligned([*prompt, *completion], [len(prompt)], start=len(prompt), prompt_ids=own_prompt)
    expected_prompt, expected = row_of(teacher)
    assert row.teacher_ids == [*expected_prompt, *expected]
    # A first token that holds a space which the other's does not is not compared: it predicts another text.
    leads = {tokens.of(ids).removesuffix(MARK.encode()) for tokens, ids in sides(aligner, completion, expected)}
    first_of_both = (len(prompt), len(own_prompt))
    assert ((row.student_A[0], row.teacher_A[0]) == first_of_both) is (len(leads) == 1)
    assert len(row.student_A) > 1
    for mine, theirs in zip(row.student_A.tolist(), row.teacher_A.tolist(), strict=True):
        ahead = completion[mine - len(prompt) :], expected[theirs - len(own_prompt) :]
        assert len({tokens.of(ids) for tokens, ids in sides(aligner, *ahead)}) == 1


def sides(aligner, student_ids, teacher_ids):
    return (aligner.student, student_ids), (aligner.teacher, teacher_ids)


@pytest.fixture
def read(tokenizers):
    """Return what a teacher reads after its prompt, and whether the first of its tokens is compared."""

    def read(student, teacher, reply, own_prompt=None, asked=(USER,)):
        aligner = Aligner(tokenizers.get(student, student), tokenizers.get(teacher, teacher))
        prompt = prompt_ids(tokenizers.get(student, student), asked)
        own_prompt = own_prompt or prompt_ids(tokenizers.get(teacher, teacher), asked)
        ids = [*prompt, *aligner.student.encoded(reply)]
        row = aligner.aligned(ids, [len(prompt)], start=len(prompt), prompt_ids=own_prompt)
        return aligner.teacher.of(row.teacher_ids[len(own_prompt) :]), len(own_prompt) in row.teacher_A

    return read


def test_a_template_that_writes_more_than_a_space_before_a_reply_adds_none(read, byte_level):
    thinking = byte_level(QWEN_3)
    assert read(thinking, "Llama 2", "Paris") == (b" Paris", False)
    assert read("Llama 2", thinking, " Paris") == (b"Paris", False)


def test_a_reply_without_the_space_that_its_template_has_stays_without(read):
    assert read("Llama 2", "Mistral", "Paris") == (b"Paris", True)
    assert read("Llama 2", "ChatML", "Paris") == (b"Paris", True)


def test_a_space_of_the_replys_own_stays(read):
    assert read("ChatML", "Gemma", " Paris") == (b" Paris", True)
    assert read("Llama 2", "ChatML", "  Paris")[0] == b" Paris"


def test_an_empty_reply_is_only_the_end_of_the_turn(tokenizers):
    student, teacher = tokenizers["ChatML"], tokenizers["Llama 2"]
    prompt, own_prompt = prompt_ids(student, [USER]), prompt_ids(teacher, [USER])
    ids = [*prompt, student.eos_token_id]
    row = Aligner(student, teacher).aligned(ids, start=len(prompt), prompt_ids=own_prompt)
    assert row.teacher_ids == [*own_prompt, teacher.eos_token_id]
    assert (row.student_A.tolist(), row.teacher_A.tolist()) == ([len(prompt)], [len(own_prompt)])


def test_after_a_prompt_that_is_not_the_templates_the_students_text_is_read_as_it_is(read, tokenizers):
    own_prompt = tokenizers["Llama 2"]("The capital of France is")["input_ids"]
    assert read("ChatML", "Llama 2", "Paris", own_prompt) == (b"Paris", True)
    assert read("Mistral", "Llama 2", " Paris", own_prompt) == (b" Paris", True)


MISTRAL_WITH_TOOLS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
    "{% elif m.tool_calls is defined %}{{ '[TOOL_CALLS]' + m.tool_calls[0].function | tojson + eos_token }}"
    "{% elif m['role'] == 'tool' %}"
    "{% if m.tool_call_id | length != 9 %}{{ raise_exception('an id of 9 characters') }}{% endif %}"
    "{{ '[TOOL_RESULTS]' + m['content'] + ', ' + m.tool_call_id + '[/TOOL_RESULTS]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
CHATML_WITH_TOOLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
    "{% if m.tool_calls is defined %}{{ m.tool_calls[0].function | tojson }}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CALL = {"id": "123456789", "type": "function", "function": {"name": "look", "arguments": {}}}
ASKED_BY_A_TOOL = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "123456789", "content": "one"},
]


def test_a_reply_to_a_tool_begins_as_the_template_writes_it(read, byte_level):
    mistral, chatml = byte_level(MISTRAL_WITH_TOOLS), byte_level(CHATML_WITH_TOOLS)
    for asked in ([USER], ASKED_BY_A_TOOL):
        assert read(chatml, mistral, "Paris", asked=asked) == (b" Paris", False)
        assert read(mistral, chatml, " Paris", asked=asked)[0] == b"Paris"


@pytest.fixture
def ended(tokenizers):
    """Return a student's tokens for a reply as its template ends it, and the pairs that are compared with a teacher."""

    def ended(student_name, teacher_name, reply):
        student, teacher = tokenizers[student_name], tokenizers[teacher_name]
        aligner = Aligner(student, teacher)
        prompt, own_prompt = prompt_ids(student, [USER]), prompt_ids(teacher, [USER])
        completion = [*aligner.student.encoded(reply), turn_end_id(student)]
        row = aligner.aligned([*prompt, *completion], [len(prompt)], start=len(prompt), prompt_ids=own_prompt)
        read = row.teacher_ids[len(own_prompt) :]
        pairs = zip((row.student_A - len(prompt)).tolist(), (row.teacher_A - len(own_prompt)).tolist(), strict=True)
        return (
            completion,
            aligner.teacher.of(read),
            [(mine, aligner.teacher.of([read[theirs]])) for mine, theirs in pairs],
        )

    return ended


def test_the_space_that_a_template_writes_after_a_reply_is_not_read_by_a_teacher_without_it(ended):
    completion, read, compared = ended("Llama 2", "ChatML", " Paris is fine ")
    assert read == b"Paris is fine<|im_end|>"
    # Both have read "fine": the teacher ends the turn where the student writes the space.
    assert compared[-1] == (len(completion) - 2, b"<|im_end|>")


def test_a_space_after_a_reply_is_read_if_both_templates_write_it_or_the_students_does_not(ended):
    for student, teacher in (("Llama 2", "Llama 2 without a space before a text"), ("ChatML", "Llama 2")):
        completion, read, compared = ended(student, teacher, "Paris is fine ")
        assert read.removeprefix(b" ") == b"Paris is fine <eos>"
        assert compared[-1] == (len(completion) - 1, b"<eos>")


def test_a_teacher_whose_template_writes_a_space_after_a_reply_reads_none_that_the_student_does_not_write(ended):
    completion, read, compared = ended("ChatML", "Llama 2", "Paris is fine")
    assert read == b" Paris is fine<eos>"
    assert compared[-1] == (len(completion) - 1, b"<eos>")
