"""The text of each token."""

import pytest

from gkd_trainer.report.pieces import readable, text_pieces, token_text, whole_text
from tests.vocabularies import sentencepiece_backend, sentencepiece_like, unigram_backend


@pytest.mark.parametrize(
    "text",
    ["What is the capital of France?", "  two spaces\n\nlines\t", "no space", "<|im_end|>\n<script>", ""],
)
def test_pieces_of_plain_text_join_to_the_text(text, byte_level):
    tokenizer = byte_level()
    ids = tokenizer(text)["input_ids"]
    pieces = text_pieces(ids, tokenizer)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


@pytest.mark.parametrize("text", ["😀", "a 😀!", "مرحبا", "日本語", "é"])
def test_a_character_of_several_tokens_is_the_last_ones(text, byte_level):
    tokenizer = byte_level()
    ids = tokenizer(text)["input_ids"]
    pieces = text_pieces(ids, tokenizer)
    assert len(pieces) == len(ids) > len(text)
    assert "".join(pieces).replace("\ufffd", "") == text
    assert pieces.count("\ufffd") == len(ids) - len(text)


def test_bytes_that_are_no_utf8_are_shown_once_each(byte_level):
    tokenizer = byte_level()
    first, *_ = tokenizer("😀")["input_ids"]
    [letter] = tokenizer("A")["input_ids"]
    assert text_pieces([first, letter, letter], tokenizer) == ["\ufffd", "A", "A"]
    assert text_pieces([first] * 9, tokenizer) == ["\ufffd"] * 9


def test_without_a_tokenizer_ids_are_shown():
    assert text_pieces([7, 12], None) == [" 7", " 12"]
    assert token_text(7, None) == "7"
    assert whole_text([7, 12], None) == "7 12"


def test_control_characters_and_surrogates_become_visible_and_encodable():
    assert readable("a\x00\x1b\x7f\x85\ud800b\n\t") == "a␀␛␡\ufffd\ufffdb\n\t"
    readable("".join(map(chr, range(0x3000)))).encode()


def test_text_can_not_turn_the_direction_of_what_follows_it():
    assert readable("a\u202eb\u2066c\u2069") == "a\ufffdb\ufffdc\ufffd"
    assert readable("مرحبا\u200f") == "مرحبا\u200f"


def test_special_tokens_are_shown(byte_level):
    tokenizer = byte_level()
    assert token_text(tokenizer.eos_token_id, tokenizer) == "<|im_end|>"
    assert whole_text([tokenizer.eos_token_id], tokenizer) == "<|im_end|>"


def sentencepiece(prepends_space):
    return sentencepiece_like(sentencepiece_backend(prepends_space=prepends_space))


@pytest.mark.parametrize(
    "make", [lambda: sentencepiece(False), lambda: sentencepiece(True), lambda: sentencepiece_like(unigram_backend())]
)
def test_a_tokens_leading_space_is_shown_though_decoders_drop_it(make):
    tokenizer = make()
    vocabulary = tokenizer.get_vocab()
    words = [token for token in vocabulary if token.startswith("▁") and token[1:] in vocabulary]
    assert len(words) > 3
    for word in words:
        assert token_text(vocabulary[word], tokenizer) == word.replace("▁", " ")
        assert token_text(vocabulary[word[1:]], tokenizer) == word[1:]
    assert token_text(vocabulary["<0xC3>"], tokenizer) == "\ufffd"
    assert token_text(vocabulary["<eos>"], tokenizer) == "<eos>"


def test_every_token_of_a_byte_level_vocabulary_is_shown_as_its_own_bytes(byte_level):
    tokenizer = byte_level()
    for token_id in range(len(tokenizer)):
        assert token_text(token_id, tokenizer) == readable(tokenizer.decode([token_id]))
