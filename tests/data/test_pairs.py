"""Rows for encoder-decoders: what the encoder reads, and the labels."""

import pytest
from tokenizers import processors

from gkd_trainer.batch_keys import IGNORE_INDEX, PROMPT_IDS
from gkd_trainer.data import EncoderDecoderCollator, prepare_dataset
from gkd_trainer.data.pairs import held_pair, text_pair, turn_pair
from gkd_trainer.data.rows import RowPreparer
from gkd_trainer.data.tokens import RowDropped, RowTokens
from gkd_trainer.errors import GKDDataError

X = IGNORE_INDEX
QUESTION = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "I am fine"}


@pytest.fixture
def pairs(rules):
    """Make rules of an encoder-decoder, off-policy and unbounded, but for the changes given."""
    return lambda **changes: rules(is_encoder_decoder=True, **changes)


def prepare(row, tokenizer, rules):
    return RowPreparer.create(tokenizer, rules, None).prepare(row)


def reason(row, tokenizer, rules):
    with pytest.raises(RowDropped) as dropped:
        prepare(row, tokenizer, rules)
    return dropped.value.reason


@pytest.fixture
def framing(byte_level):
    """A tokenizer that frames each text with special tokens, as BART's does."""
    tokenizer = byte_level(has_bos=True)
    bos, eos = (tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "<|im_end|>"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|im_end|>", special_tokens=[("<s>", bos), ("<|im_end|>", eos)]
    )
    return tokenizer


def test_both_texts_get_the_tokenizers_special_tokens(framing, pairs):
    row = prepare({"prompt": "hello", "completion": "one two"}, framing, pairs())
    assert framing.decode(row.input_ids) == "<s>hello<|im_end|>"
    assert framing.decode(row.labels) == "<s>one two<|im_end|>"  # all of them are trained on
    assert row.n_prompt == len(row.input_ids)
    assert row.prompt_ids == []


def test_the_eos_is_appended_to_a_target_that_has_no_stop_token(byte_level):
    tokenizer = byte_level()
    eos = tokenizer.eos_token_id
    bare = tokenizer("one two")["input_ids"]
    assert text_pair(tokenizer, "hello", "one two", {eos}).labels == [*bare, eos]
    assert text_pair(tokenizer, "hello", "one two<|im_end|>", {eos}).labels == [*bare, eos]
    assert text_pair(tokenizer, "hello", "one two<|endoftext|>", {eos, 0}).labels == [*bare, 0]


def test_a_prompt_alone_has_no_labels(byte_level, pairs):
    tokenizer, on_policy = byte_level(), pairs(needs_completion=False, is_generating=True, needs_prompt=True)
    for row in ({"prompt": "hello"}, {"prompt": [QUESTION]}, {"messages": [QUESTION]}, {"input_ids": [5, 6]}):
        prepared = prepare(row, tokenizer, on_policy)
        assert prepared.labels == []
        assert prepared.n_prompt == len(prepared.input_ids) > 0


def test_the_last_turn_of_a_conversation_is_what_the_decoder_writes(byte_level, pairs):
    tokenizer = byte_level()
    conversation = [QUESTION, ANSWER, {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    for row in ({"messages": conversation}, {"prompt": conversation[:3], "completion": conversation[3:]}):
        prepared = prepare(row, tokenizer, pairs())
        prompt = tokenizer.apply_chat_template(conversation[:3], add_generation_prompt=True, return_dict=False)
        assert prepared.input_ids == prompt
        assert tokenizer.decode(prepared.labels) == "two<|im_end|>"


def test_messages_need_a_chat_template(byte_level, pairs):
    with pytest.raises(GKDDataError, match="expected a tokenizer with a chat template"):
        prepare({"messages": [QUESTION, ANSWER]}, byte_level(None), pairs())


def test_the_prompt_of_inference_wins_over_the_text_before_the_turn():
    tokens = RowTokens([3, 4, 5, 6, 7], [X, X, 5, 6, X], prompt_ids=[3, 9])
    pair = turn_pair(tokens)
    assert (pair.ids, pair.labels) == ([3, 9], [5, 6])
    assert turn_pair(RowTokens([3, 4, 5], [X, X, 5])).ids == [3, 4]


def test_tokens_are_taken_without_their_padding():
    row = {"input_ids": [5, 6, 1, 1], "attention_mask": [1, 1, 0, 0], "labels": [7, X, 2, X, X], PROMPT_IDS: [9]}
    pair = held_pair(row)
    assert (pair.ids, pair.labels, pair.prompt_ids) == ([5, 6], [7, X, 2], [])
    assert pair.per_token == {"attention_mask": [1, 1]}
    assert held_pair({"input_ids": [5, 6], "labels": [X, X]}).labels == []


@pytest.mark.parametrize("column", ["completion_mask", "assistant_masks", "decoder_input_ids", "seq_lengths"])
def test_columns_of_a_causal_lm_and_inputs_of_the_decoder_are_refused(column):
    with pytest.raises(GKDDataError, match=f"have input_ids, attention_mask and labels; got {column}"):
        held_pair({"input_ids": [5, 6], "labels": [7], column: [1, 1]})


def test_rows_that_cant_be_used_say_why(byte_level, pairs):
    tokenizer = byte_level()
    assert reason({"prompt": "", "completion": "one"}, tokenizer, pairs()) == "empty prompt"
    assert reason({"prompt": "one", "completion": ""}, tokenizer, pairs()) == "empty completion"
    assert reason({"prompt": "one", "completion": [ANSWER]}, tokenizer, pairs()) == (
        "prompt is a text but completion is not"
    )
    assert reason({"input_ids": [], "labels": [5]}, None, pairs()) == "no tokens"
    assert reason({"input_ids": [5], "labels": [X]}, None, pairs()) == "no token is trained on"
    assert reason({"input_ids": [5], "labels": "five"}, None, pairs()) == "labels is not a list of token ids"
    assert reason({"input_ids": [5], "labels": [-1, 5]}, None, pairs()).startswith("a negative label other than -100")
    for row in ({"input_ids": [9], "labels": [5]}, {"input_ids": [5], "labels": [9]}):
        assert reason(row, None, pairs(vocab_size=9)) == "a token id beyond the models' 9 tokens"


def test_the_bound_holds_for_what_is_read_and_for_what_is_written(pairs):
    bound = pairs(max_length=3, is_generating=True)
    prepared = prepare({"input_ids": [5, 6, 7], "labels": [8, 9, 10, 2]}, None, bound)
    assert (prepared.input_ids, prepared.labels) == ([5, 6, 7], [8, 9, 10])
    assert reason({"input_ids": [5] * 4, "labels": [8]}, None, bound) == "prompt longer than max_length (3)"
    assert reason({"input_ids": [5], "labels": [X, X, X, 8]}, None, bound) == "no token is trained on"


def test_the_error_of_a_data_set_names_the_length_that_would_help(pairs):
    rows = [{"input_ids": [5] * 4, "labels": [8]}, {"input_ids": [5] * 6, "labels": [8]}]
    with pytest.raises(GKDDataError, match=r"prompt longer than max_length \(3\). Set max_length to 4 or more"):
        prepare_dataset(rows, None, pairs(max_length=3, is_generating=True))


def test_prepared_rows_have_no_prompt_of_their_own_and_are_collated(byte_level, pairs):
    rows = [{"prompt": "hello", "completion": "one two three"}, {"prompt": "hello there", "completion": None}]
    dataset = prepare_dataset(rows, byte_level(), pairs(is_generating=True, needs_completion=False))
    assert PROMPT_IDS not in dataset.column_names
    batch = EncoderDecoderCollator(1)(list(dataset))
    [short, long] = [len(ids) for ids in dataset["input_ids"]]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, long)
    assert batch["input_ids"][0, short:].eq(1).all()
    assert batch["attention_mask"].sum(dim=1).tolist() == [short, long]
    assert batch["labels"][0].tolist() == dataset["labels"][0]
    assert batch["labels"][1].eq(X).all()


def test_a_batch_of_prompts_has_one_empty_label():
    batch = EncoderDecoderCollator(1)([{"input_ids": [5, 6], "labels": []}, {"input_ids": [7]}])
    assert batch["labels"].tolist() == [[X], [X]]
