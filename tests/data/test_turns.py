"""Turns: exactly what the assistant says, and the stop token, is trained on."""

import dataclasses

import pytest

from gkd_trainer.batch_keys import IGNORE_INDEX
from gkd_trainer.data import prepare_dataset
from gkd_trainer.data.rows import RowPreparer
from gkd_trainer.data.turns import encode_spans, turn_labels
from gkd_trainer.errors import GKDDataError
from gkd_trainer.types import prompt_length
from tests.conftest import CHATML
from tests.data.templates import trl_template
from tests.versions import TRL

MARKED = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_WITHOUT_STOP = MARKED.replace(
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
    "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}",
)
# Earlier assistant turns lose their content, as templates do that strip earlier reasoning.
REWRITING = (
    "{% for message in messages %}"
    "{% set is_earlier = message['role'] == 'assistant' and not loop.last %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + ('...' if is_earlier else message['content']) + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNFAITHFUL_PROMPT = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)

CONVERSATION = [
    {"role": "system", "content": "You are helpful."},
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "hello, how are you?"},
    {"role": "user", "content": "I am fine. What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
]


def prepare_one(row, tokenizer, rules):
    prepared = prepare_dataset([row], tokenizer, rules)
    return prepared[0]["input_ids"], prepared[0]["labels"]


def trained_runs(tokenizer, labels):
    """Decode each run of trained labels."""
    runs, run = [], []
    for label in [*labels, IGNORE_INDEX]:
        if label != IGNORE_INDEX:
            run.append(label)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


@pytest.fixture(params=["prefixes", "markers"])
def tokenizer(request, byte_level):
    return byte_level() if request.param == "prefixes" else byte_level(MARKED)


def test_every_assistant_turn_is_trained_up_to_its_stop_token(tokenizer, rules):
    ids, labels = prepare_one({"messages": CONVERSATION}, tokenizer, rules())
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert trained_runs(tokenizer, labels) == ["hello, how are you?<|im_end|>", "Paris.<|im_end|>"]


def test_labels_are_the_ids_at_their_own_positions(tokenizer, rules):
    ids, labels = prepare_one({"messages": CONVERSATION}, tokenizer, rules())
    assert all(label in (IGNORE_INDEX, token_id) for label, token_id in zip(labels, ids, strict=True))


def test_the_newline_after_the_stop_token_is_not_trained_on(tokenizer, rules):
    ids, labels = prepare_one({"messages": CONVERSATION}, tokenizer, rules())
    assert tokenizer.decode(ids[-2:]) == "<|im_end|>\n"
    assert labels[-2:] == [tokenizer.eos_token_id, IGNORE_INDEX]


def test_last_turn_trains_only_on_the_last_assistant_turn(tokenizer, rules):
    _, labels = prepare_one({"messages": CONVERSATION}, tokenizer, rules(train_on="last_turn"))
    assert trained_runs(tokenizer, labels) == ["Paris.<|im_end|>"]


def test_the_prompt_is_the_one_at_inference_for_the_last_turn(tokenizer, rules):
    ids, labels = prepare_one({"messages": CONVERSATION}, tokenizer, rules())
    prompt = tokenizer.apply_chat_template(CONVERSATION[:-1], add_generation_prompt=True)["input_ids"]
    assert ids[: prompt_length(labels)] == prompt


def test_content_that_starts_with_newlines_does_not_leak_into_the_prompt(tokenizer, rules):
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "\n\nhello"}]
    ids, labels = prepare_one({"messages": messages}, tokenizer, rules())
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert ids[: prompt_length(labels)] == prompt
    assert trained_runs(tokenizer, labels) == ["\n\nhello<|im_end|>"]
    # Read as a whole, the text has a token across the border: the case is one.
    whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]
    assert whole[: len(prompt)] != prompt


def test_a_user_turn_at_the_end_is_only_context(tokenizer, rules):
    messages = [*CONVERSATION, {"role": "user", "content": "thank you"}]
    ids, labels = prepare_one({"messages": messages}, tokenizer, rules())
    assert trained_runs(tokenizer, labels) == ["hello, how are you?<|im_end|>", "Paris.<|im_end|>"]
    assert tokenizer.decode(ids).endswith("thank you<|im_end|>\n")


def test_an_assistant_turn_that_opens_the_conversation_is_trained_on(tokenizer, rules):
    _, labels = prepare_one({"messages": CONVERSATION[2:]}, tokenizer, rules())
    assert trained_runs(tokenizer, labels) == ["hello, how are you?<|im_end|>", "Paris.<|im_end|>"]


def test_only_assistant_turns_of_the_completion_are_trained_on(tokenizer, rules):
    completion = [
        {"role": "assistant", "content": "one"},
        {"role": "tool", "content": "two"},
        {"role": "assistant", "content": "three"},
    ]
    row = {"prompt": CONVERSATION[:4], "completion": completion}
    _, labels = prepare_one(row, tokenizer, rules())
    assert trained_runs(tokenizer, labels) == ["one<|im_end|>", "three<|im_end|>"]
    _, labels = prepare_one(row, tokenizer, rules(train_on="last_turn"))
    assert trained_runs(tokenizer, labels) == ["three<|im_end|>"]


@pytest.mark.parametrize("train_on", ["all_turns", "last_turn"])
def test_markers_and_prefixes_give_the_same_ids_and_labels(byte_level, rules, train_on):
    rows = [
        {"messages": CONVERSATION},
        {"messages": [*CONVERSATION, {"role": "user", "content": "\nthank you"}]},
        {"prompt": CONVERSATION[:4], "completion": [{"role": "assistant", "content": "\n\nParis"}]},
    ]
    by_prefixes = prepare_dataset(rows, byte_level(), rules(train_on=train_on))
    for template in (MARKED, MARKED_WITHOUT_STOP):
        by_markers = prepare_dataset(rows, byte_level(template), rules(train_on=train_on))
        assert by_markers["input_ids"][:] == by_prefixes["input_ids"][:]
        assert by_markers["labels"][:] == by_prefixes["labels"][:]


def test_a_template_that_trl_can_patch_is_patched(byte_level, rules):
    tokenizer = byte_level(trl_template("qwen3"))
    _, labels = prepare_one({"messages": CONVERSATION}, tokenizer, rules())
    # The original leaves the reasoning of earlier turns out, and so does not preserve prefixes.
    think = "<think>\n\n</think>\n\n"
    assert trained_runs(tokenizer, labels) == [
        f"{think}hello, how are you?<|im_end|>",
        f"{think}Paris.<|im_end|>",
    ]


@pytest.mark.parametrize(
    ("template", "header", "completion"),
    [
        ("qwen2_5", "<|im_start|>assistant\n", "Paris.<|im_end|>"),
        ("gptoss", "<|start|>assistant", "<|channel|>final<|message|>Paris.<|return|>"),
        # The generation prompt goes on with "<think>", which this conversation does not have.
        ("deepseek_r1_distill", "<｜Assistant｜>", "Paris.<｜end▁of▁sentence｜>"),
    ],
    ids=["qwen2.5", "gpt-oss", "deepseek-r1"],
)
def test_a_marked_generation_prompt_belongs_to_the_prompt(byte_level, rules, template, header, completion):
    if not trl_template(template):
        pytest.skip(f"TRL {TRL} has no template {template}")
    tokenizer = byte_level(trl_template(template))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<｜Assistant｜>", "<think>"]})
    ids, labels = prepare_one({"messages": CONVERSATION}, tokenizer, rules())
    assert tokenizer.decode(ids[: prompt_length(labels)]).endswith(header)
    assert trained_runs(tokenizer, labels)[-1] == completion


def test_a_template_that_rewrites_earlier_turns_is_refused(byte_level, rules):
    with pytest.raises(GKDDataError, match=r"preserves prefixes.*generation.*markers.*last_turn"):
        prepare_dataset([{"messages": CONVERSATION}], byte_level(REWRITING), rules())


def test_a_template_that_rewrites_earlier_turns_suffices_for_the_last_turn(byte_level, rules):
    tokenizer = byte_level(REWRITING)
    ids, labels = prepare_one({"messages": CONVERSATION}, tokenizer, rules(train_on="last_turn"))
    assert trained_runs(tokenizer, labels) == ["Paris.<|im_end|>"]
    assert "..." in tokenizer.decode(ids)


def test_last_turn_is_not_suggested_if_it_would_not_suffice(byte_level, rules):
    for train_on in ("all_turns", "last_turn"):
        with pytest.raises(GKDDataError, match="preserves prefixes") as refusal:
            prepare_dataset([{"messages": CONVERSATION}], byte_level(UNFAITHFUL_PROMPT), rules(train_on=train_on))
        assert "last_turn" not in str(refusal.value)


def test_a_stop_token_inside_a_turn_ends_it():
    assert turn_labels([5, 6, 9, 7, 9], [(1, 5)], {9}) == [IGNORE_INDEX, 6, 9, IGNORE_INDEX, IGNORE_INDEX]


def test_a_turn_is_extended_by_the_stop_token_right_after_it():
    assert turn_labels([5, 6, 9, 7], [(1, 2)], {9}) == [IGNORE_INDEX, 6, 9, IGNORE_INDEX]
    assert turn_labels([5, 6, 7, 9], [(1, 2)], {9}) == [IGNORE_INDEX, 6, IGNORE_INDEX, IGNORE_INDEX]


def test_any_of_several_stop_ids_ends_a_turn():
    assert turn_labels([6, 8, 9, 6, 9], [(0, 3), (3, 5)], {8, 9}) == [6, 8, IGNORE_INDEX, 6, 9]


def unstopped(byte_level, template):
    """A tokenizer whose eos is not what its template ends turns with."""
    tokenizer = byte_level(template)
    tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "markers"])
def test_a_turn_without_a_stop_token_is_trained_on_up_to_its_end_of_turn(byte_level, rules, template):
    tokenizer = unstopped(byte_level, template)
    row = RowPreparer.create(tokenizer, rules(), None).prepare({"messages": CONVERSATION})
    assert trained_runs(tokenizer, row.labels) == ["hello, how are you?<|im_end|>", "Paris.<|im_end|>"]
    end, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert row.unended == (
        f"'<|im_end|>', at which generation does not end (generation ends at '<|endoftext|>' ({eos})): add its id, "
        f"{end}, to eos_token_id in the student's generation_config"
    )
    assert RowPreparer.create(tokenizer, rules(stop_ids=frozenset({end})), None).prepare(
        {"messages": CONVERSATION}
    ) == dataclasses.replace(row, unended="")


def test_white_space_of_the_content_stays_if_no_special_token_ends_a_turn(byte_level, rules):
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = byte_level(template)
    row = RowPreparer.create(tokenizer, rules(), None).prepare({"messages": CONVERSATION})
    assert trained_runs(tokenizer, row.labels) == ["hello, how are you?\n", "Paris.\n"]
    assert row.unended.startswith("'\\n', which is not a special token, but generation ends at '<|im_end|>'")


def test_white_space_in_front_of_the_end_of_a_turn_is_trained_on(byte_level, rules):
    tokenizer = unstopped(byte_level, CHATML)
    messages = [*CONVERSATION[:-1], {"role": "assistant", "content": "Paris.\n\n"}]
    row = RowPreparer.create(tokenizer, rules(train_on="last_turn"), None).prepare({"messages": messages})
    assert trained_runs(tokenizer, row.labels) == ["Paris.\n\n<|im_end|>"]


def test_a_tokenizer_that_adds_spaces_reads_the_whole_text(space_adding):
    text = "[USER]: hello [BOT]: Paris</s>"
    start = text.index(" Paris")
    ids, [(first, last)] = encode_spans(space_adding, text, [(start, len(text))])
    assert ids == space_adding(text, add_special_tokens=False)["input_ids"]
    assert space_adding.decode(ids[first:last]).strip() == "Paris</s>"
    assert space_adding.decode(ids[:first]) == "[USER]: hello [BOT]:"


def test_a_tokenizer_that_adds_spaces_trains_exactly_the_turns(space_adding, rules):
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "I am fine"},
        {"role": "user", "content": "capital"},
        {"role": "assistant", "content": "Paris"},
    ]
    ids, labels = prepare_one({"messages": messages}, space_adding, rules())
    text = space_adding.apply_chat_template(messages, tokenize=False)
    assert ids == space_adding(text, add_special_tokens=False)["input_ids"]
    assert [run.strip() for run in trained_runs(space_adding, labels)] == ["I am fine</s>", "Paris</s>"]


def test_a_slow_tokenizer_that_adds_spaces_is_refused(space_adding):
    class SlowTokenizer:
        is_fast = False

        def __call__(self, text, **options):
            return space_adding(text, **options)

        def decode(self, ids, **options):
            return space_adding.decode(ids, **options)

    with pytest.raises(GKDDataError, match="slow SlowTokenizer"):
        encode_spans(SlowTokenizer(), "[USER]: hello [BOT]: Paris", [(20, 26)])
