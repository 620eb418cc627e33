"""A prompt of the teacher's own: the same completion tokens are scored behind it, and everything else stays."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from gkd_trainer.batch_keys import IGNORE_INDEX, ROW_KEY, TEACHER_PROMPT_IDS
from gkd_trainer.errors import GKDDataError, GKDTeacherError
from gkd_trainer.models.decoders import with_decoder_inputs
from gkd_trainer.models.heads import find_head
from gkd_trainer.models.loading import base_model
from gkd_trainer.teachers import (
    ContextTeacher,
    FrozenTeacher,
    OtherTokenizerTeacher,
    RoutedTeachers,
    SelfTeacher,
    VLLMServerTeacher,
    describe,
)
from gkd_trainer.teachers.context import longest_context, with_teacher_prompts
from gkd_trainer.teachers.prompt_scores import sequences_of
from gkd_trainer.types import TokenBatch

CPU = torch.device("cpu")


def padded(rows, filling):
    rows = [torch.tensor(row, dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filling)


def batch_of(samples, prompts=None, keys=None, **more):
    """A batch of (prompt, completion) with the teacher's prompt of each."""
    inputs = {
        "input_ids": padded([prompt + completion for prompt, completion in samples], 2),
        "labels": padded([[IGNORE_INDEX] * len(p) + c for p, c in samples], IGNORE_INDEX),
        "attention_mask": padded([[1] * len(p + c) for p, c in samples], 0),
        **more,
    }
    if prompts is not None:
        inputs[TEACHER_PROMPT_IDS] = padded(prompts, IGNORE_INDEX)
    if keys is not None:
        inputs[ROW_KEY] = torch.tensor(keys)
    return TokenBatch.from_inputs(inputs)


SAMPLES = [([10, 11, 12], [20, 21, 2]), ([13], [22, 2]), ([14, 15], [23, 24, 25, 26, 2])]


def frozen(model):
    teacher = FrozenTeacher(model)
    teacher.prepare(CPU)
    return teacher


def logits_NV(signal):
    return signal.head.logits(signal.hidden_NH)


def expected_logits_NV(model, prompts):
    """The logits for each completion of SAMPLES behind its prompt, one sample at a time."""
    rows = []
    for (_, completion), prompt in zip(SAMPLES, prompts, strict=True):
        with torch.no_grad():
            logits_LV = model(torch.tensor([prompt + completion])).logits[0]
        rows.append(logits_LV[len(prompt) - 1 : -1])
    return torch.cat(rows)


def test_completions_are_scored_behind_the_teachers_prompts(tiny_model):
    model = tiny_model()
    prompts = [[30], [], [31, 32, 33, 34, 35, 36]]
    batch = batch_of(SAMPLES, prompts)
    read = with_teacher_prompts(batch)
    assert torch.equal(read.targets_N, batch.targets_N)
    assert torch.equal(read.rows_N, batch.rows_N)
    expected_NV = expected_logits_NV(model, [[30], [13], prompts[2]])
    torch.testing.assert_close(logits_NV(frozen(model).score(read)), expected_NV, atol=1e-4, rtol=1e-4)


def test_the_samples_own_prompts_as_the_teachers_change_nothing(tiny_model):
    batch = batch_of(SAMPLES, [prompt for prompt, _ in SAMPLES])
    read, teacher = with_teacher_prompts(batch), frozen(tiny_model())
    assert torch.equal(logits_NV(teacher.score(read)), logits_NV(teacher.score(batch)))


def test_putting_the_prompts_in_again_changes_nothing():
    once = with_teacher_prompts(batch_of(SAMPLES, [[30], [], [31, 32]]))
    twice = with_teacher_prompts(once)
    for name, tensor in once.model_inputs.items():
        assert torch.equal(twice.model_inputs[name], tensor)
    assert torch.equal(twice.labels_BL, once.labels_BL)


@pytest.mark.parametrize("prompts", [None, [[], [], []]])
def test_without_prompts_the_batch_is_the_same(prompts):
    batch = batch_of(SAMPLES, prompts)
    assert with_teacher_prompts(batch) is batch


def test_the_first_token_of_a_row_without_a_prompt_stays_unscored():
    batch = batch_of([([], [20, 21, 22])], [[30, 31]])
    read = with_teacher_prompts(batch)
    assert batch.targets_N.tolist() == read.targets_N.tolist() == [21, 22]
    assert read.model_inputs["input_ids"].tolist() == [[30, 31, 20, 21, 22]]


def test_untrained_tokens_inside_a_completion_are_read_and_not_scored():
    batch = batch_of([([10], [20, 40, 41, 21])], [[30, 31]])
    batch.labels_BL[0, 2:4] = IGNORE_INDEX  # a tool's
    read = with_teacher_prompts(batch)
    assert read.model_inputs["input_ids"].tolist() == [[30, 31, 20, 40, 41, 21]]
    assert read.targets_N.tolist() == [20, 21]


def test_a_sample_without_trained_tokens_gives_no_scores():
    batch = batch_of([([10, 11], []), ([12], [20])], [[30], [31, 32]])
    read = with_teacher_prompts(batch)
    assert read.targets_N.tolist() == [20]
    assert read.rows_N.tolist() == [1]


def test_a_batch_without_a_mask_gets_one():
    inputs = {"input_ids": torch.tensor([[10, 20, 21]]), "labels": torch.tensor([[-100, 20, 21]])}
    read = with_teacher_prompts(TokenBatch.from_inputs({**inputs, TEACHER_PROMPT_IDS: torch.tensor([[30, 31]])}))
    assert read.model_inputs["input_ids"].tolist() == [[30, 31, 20, 21]]
    assert read.model_inputs["attention_mask"].tolist() == [[1, 1, 1, 1]]


def test_values_that_belong_to_the_samples_own_tokens_are_refused():
    batch = batch_of(SAMPLES, [[30], [], []], pixel_values=torch.zeros(1, 3, 4, 4))
    with pytest.raises(GKDDataError, match="also holds pixel_values, which belong to those"):
        with_teacher_prompts(batch)


def decoded_batch(model, prompts):
    """A batch of an encoder-decoder: two samples, the second one shorter."""
    inputs = {
        "input_ids": padded([[10, 11, 12], [13]], 2),
        "attention_mask": padded([[1, 1, 1], [1]], 0),
        "labels": padded([[20, 21, 2], [22, 2]], IGNORE_INDEX),
        TEACHER_PROMPT_IDS: padded(prompts, IGNORE_INDEX),
    }
    return TokenBatch.from_inputs(with_decoder_inputs(model, inputs))


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_reads_the_teachers_prompts(tiny_encoder_decoder, family):
    model = tiny_encoder_decoder(family)
    batch = decoded_batch(model, [[30, 31, 32, 33, 34], []])
    read = with_teacher_prompts(batch)
    assert torch.equal(read.targets_N, batch.targets_N)
    with torch.no_grad():
        expected_NV = torch.cat(
            [
                model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).logits[0]
                for ids, labels in (([30, 31, 32, 33, 34], [20, 21, 2]), ([13], [22, 2]))
            ]
        )
    actual_NV = logits_NV(frozen(model).score(read))
    torch.testing.assert_close(actual_NV, expected_NV, atol=1e-4, rtol=1e-4)
    assert (logits_NV(frozen(model).score(batch)) - expected_NV).abs().max() > 1e-3


def test_a_batch_without_samples_stays_as_it_is(tiny_model, byte_level):
    batch = batch_of(SAMPLES, [[30], [], []], KEYS).of_samples([])
    assert with_teacher_prompts(batch) is batch
    in_context(tiny_model(), lambda row, completion: "unseen", byte_level()).score(batch)


ROWS = [{ROW_KEY: 7, "hint": "one"}, {ROW_KEY: 5, "hint": "two"}, {ROW_KEY: -3, "hint": "three"}]
KEYS = [5, -3, 7]


def in_context(model, prompt, tokenizer, *, rows=ROWS, max_length=None):
    teacher = ContextTeacher(FrozenTeacher(model), prompt, rows)
    teacher.prepare(CPU, tokenizer, max_length)
    return teacher


@pytest.mark.parametrize("rows", [ROWS, Dataset.from_list(ROWS)], ids=["list", "Dataset"])
def test_the_function_gets_the_row_of_the_key_and_the_completions_text(tiny_model, byte_level, rows):
    tokenizer, seen = byte_level(), []
    completions = [tokenizer("hello")["input_ids"], tokenizer(" there")["input_ids"], tokenizer("Paris")["input_ids"]]
    samples = [([10], [*ids, tokenizer.eos_token_id]) for ids in completions]

    def prompt(row, completion):
        seen.append((row["hint"], completion))

    teacher = in_context(tiny_model(), prompt, tokenizer, rows=rows)
    batch = batch_of(samples, keys=KEYS)
    assert torch.equal(logits_NV(teacher.score(batch)), logits_NV(frozen(tiny_model()).score(batch)))
    assert seen == [("two", "hello"), ("three", " there"), ("one", "Paris")]


def test_the_function_returns_text_messages_or_none(tiny_model, byte_level):
    tokenizer, model = byte_level(has_bos=True), tiny_model()
    messages = [{"role": "user", "content": "How are you?"}]
    returned = {"two": "hello there", "three": None, "one": messages}
    teacher = in_context(model, lambda row, completion: returned[row["hint"]], tokenizer)
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompts = [
        tokenizer("hello there")["input_ids"],  # behind the bos
        SAMPLES[1][0],
        tokenizer(rendered, add_special_tokens=False)["input_ids"],
    ]
    assert prompts[0][0] == tokenizer.bos_token_id
    actual_NV = logits_NV(teacher.score(batch_of(SAMPLES, keys=KEYS)))
    torch.testing.assert_close(actual_NV, expected_logits_NV(model, prompts), atol=1e-4, rtol=1e-4)


def test_messages_are_rendered_by_the_teachers_template(tiny_model, byte_level):
    model = tiny_model()
    inner = FrozenTeacher(model, byte_level("{% for m in messages %}Q: {{ m['content'] }}{% endfor %} A:"))
    teacher = ContextTeacher(inner, lambda row, completion: [{"role": "user", "content": "one"}], ROWS)
    teacher.prepare(CPU, byte_level())
    prompt = byte_level()("Q: one A:")["input_ids"]
    actual_NV = logits_NV(teacher.score(batch_of(SAMPLES, keys=KEYS)))
    torch.testing.assert_close(actual_NV, expected_logits_NV(model, [prompt] * 3), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("prompt", "is_warned"), [([{"role": "user", "content": "one"}], True), ("one", False), (None, False)]
)
def test_a_template_that_writes_todays_date_into_its_prompts_is_warned_of_once(
    tiny_model, byte_level, caplog, prompt, is_warned
):
    inner = FrozenTeacher(tiny_model(), byte_level("{{ strftime_now('%d %b %Y') + messages[0].content }}"))
    teacher = ContextTeacher(inner, lambda row, completion: prompt, ROWS)
    teacher.prepare(CPU, byte_level())
    for _ in range(2):
        teacher.score(batch_of(SAMPLES, keys=KEYS))
    assert [record.message[:69] for record in caplog.records] == [
        "The chat template writes today's date into the teacher's prompts, so "
    ] * is_warned


def test_a_rows_own_prompt_comes_first(tiny_model, byte_level):
    model, tokenizer = tiny_model(), byte_level()
    teacher = in_context(model, lambda row, completion: "hello", tokenizer)
    hello = tokenizer("hello")["input_ids"]
    actual_NV = logits_NV(teacher.score(batch_of(SAMPLES, [[], [40, 41], []], KEYS)))
    torch.testing.assert_close(actual_NV, expected_logits_NV(model, [hello, [40, 41], hello]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("context", "max_length"), [(8, None), (8, 1000), (None, 8)])
def test_a_prompt_that_is_too_long_gives_way_to_the_samples_own(tiny_model, byte_level, caplog, context, max_length):
    model = tiny_model("llama" if context else "mamba", **({"max_position_embeddings": context} if context else {}))
    # With 5 tokens of a prompt, the completions of 3 and 2 tokens fit, and that of 5 does not.
    teacher = in_context(model, lambda row, completion: "?????", byte_level(), max_length=max_length)
    own = byte_level()("?????")["input_ids"]
    assert len(own) == 5
    actual_NV = logits_NV(teacher.score(batch_of(SAMPLES, keys=KEYS)))
    expected_NV = expected_logits_NV(model, [own, own, SAMPLES[2][0]])
    torch.testing.assert_close(actual_NV, expected_NV, atol=1e-4, rtol=1e-4)
    assert "1 of the teacher's prompts were too long so far" in caplog.text
    assert "that of row_key 7 needs 10 tokens, and the teacher takes 8" in caplog.text


def test_a_teacher_that_reads_other_tokens_is_refused(tiny_model, byte_level):
    other = OtherTokenizerTeacher(FrozenTeacher(tiny_model(), byte_level()))
    with pytest.raises(GKDTeacherError, match="reads other tokens: give its rows a column teacher_prompt instead"):
        ContextTeacher(other, lambda row, completion: None, [{ROW_KEY: 0}])


def test_samples_without_a_known_key_are_refused(tiny_model, byte_level):
    teacher = in_context(tiny_model(), lambda row, completion: None, byte_level())
    with pytest.raises(GKDDataError, match="finds a sample's row by its row_key; got 8, which none of its 3 rows has"):
        teacher.score(batch_of(SAMPLES, keys=[5, 8, 7]))
    with pytest.raises(GKDDataError, match="got None"):
        teacher.score(batch_of(SAMPLES))


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"hint": "one"}], "its rows have none: number them"),
        ([], "its rows have none"),
        (Dataset.from_dict({"hint": ["one"]}), "its rows have none"),
        ([{ROW_KEY: 1}, {ROW_KEY: 1}], "its 2 rows have only 1 different ones"),
    ],
)
def test_rows_that_keys_do_not_tell_apart_are_refused(tiny_model, rows, problem):
    with pytest.raises(GKDTeacherError, match=problem):
        ContextTeacher(FrozenTeacher(tiny_model()), lambda row, completion: None, rows)


@pytest.mark.parametrize("returned", [5, "", [], ["hello"], {"role": "user", "content": "hello"}])
def test_what_is_no_prompt_is_refused(tiny_model, byte_level, returned):
    teacher = in_context(tiny_model(), lambda row, completion: returned, byte_level())
    with pytest.raises(GKDTeacherError, match=r"a text, a list of messages, or None.*row_key 5 it returned"):
        teacher.score(batch_of(SAMPLES, keys=KEYS))


def test_messages_that_the_template_refuses_are_an_error_that_names_the_row(tiny_model, byte_level):
    tokenizer = byte_level("{{ raise_exception('no system messages') }}")
    teacher = in_context(tiny_model(), lambda row, completion: [{"role": "system", "content": "x"}], tokenizer)
    with pytest.raises(GKDTeacherError, match=r"row_key 5 was refused by the chat template .*no system messages"):
        teacher.score(batch_of(SAMPLES, keys=KEYS))


def test_completions_can_not_be_read_without_a_tokenizer(tiny_model):
    teacher = ContextTeacher(FrozenTeacher(tiny_model()), lambda row, completion: None, ROWS)
    with pytest.raises(GKDTeacherError, match="needs the student's tokenizer"):
        teacher.prepare(CPU)
    with pytest.raises(RuntimeError, match="called before prepare"):
        teacher.score(batch_of(SAMPLES, keys=KEYS))


def test_its_contract_is_the_inner_teachers(tiny_model):
    inner = FrozenTeacher(tiny_model(), top_k=3)
    teacher = ContextTeacher(inner, lambda row, completion: None, ROWS)
    for name in ("vocab_size", "top_k", "vocabulary", "model", "is_local", "can_generate", "tokenizer"):
        assert getattr(teacher, name) == getattr(inner, name)
    assert teacher.teachers == (inner,)
    assert describe(teacher) == describe(inner)


def test_servers_are_sent_the_teachers_prompts_and_the_same_completions():
    read = with_teacher_prompts(batch_of(SAMPLES, [[30], [], [31, 32]]))
    sent = [(each.token_ids, each.targets_P.tolist()) for each in sequences_of(read)]
    assert sent == [
        ([30, 20, 21, 2], [1, 2, 3]),
        ([13, 22, 2], [1, 2]),
        ([31, 32, 23, 24, 25, 26, 2], [2, 3, 4, 5, 6]),
    ]


def test_the_context_of_servers_is_what_they_state(tiny_model):
    served = VLLMServerTeacher("http://127.0.0.1:9")
    assert longest_context(served, 70) == 70
    served.longest_sequence = 90
    assert longest_context(ContextTeacher(served, lambda row, completion: None, ROWS), 70) == 90
    assert longest_context(RoutedTeachers({"a": served, "b": frozen(tiny_model(max_position_embeddings=60))}), 70) == 60


def test_it_shares_weights_with_the_student_if_the_inner_one_does(tiny_model):
    for inner, shares in ((SelfTeacher(), True), (FrozenTeacher(tiny_model()), False)):
        assert ContextTeacher(inner, lambda row, completion: None, ROWS).shares_weights is shares


def test_the_context_is_the_shortest_of_all_models(tiny_model):
    inner = FrozenTeacher(tiny_model(max_position_embeddings=50))
    assert longest_context(inner, 70) == longest_context(inner, None) == 50
    assert longest_context(ContextTeacher(inner, lambda row, completion: None, ROWS), 70) == 50
    assert longest_context(FrozenTeacher(tiny_model("mamba")), 70) == 70
    own = SelfTeacher()
    own.attach(get_peft_model(tiny_model(max_position_embeddings=40), LoraConfig(target_modules=["q_proj"])))
    assert longest_context(own, None) == 40


def test_a_student_reads_more_as_its_own_teacher(tiny_model, byte_level):
    """Self-distillation from feedback: the same model, behind another prompt."""
    student = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).train()
    own = SelfTeacher()
    teacher = ContextTeacher(own, lambda row, completion: row["hint"], ROWS)
    own.attach(student, find_head(base_model(student)))
    teacher.prepare(CPU, byte_level())
    prompts = [byte_level()(hint)["input_ids"] for hint in ("two", "three", "one")]
    actual_NV = logits_NV(teacher.score(batch_of(SAMPLES, keys=KEYS)))
    torch.testing.assert_close(actual_NV, expected_logits_NV(tiny_model(), prompts), atol=1e-4, rtol=1e-4)
