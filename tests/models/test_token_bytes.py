"""The bytes of tokens, for tokenizers of each kind."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gkd_trainer.errors import GKDTeacherError
from gkd_trainer.models.token_bytes import byte_alphabet, token_bytes
from tests.vocabularies import permuted, sentencepiece_backend, sentencepiece_like, unigram_backend

EMOJI = ["👍", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇫🇷", "e\u0301", "\u200d", "\u200b", "\ufeff"]
CODE = ["def f(x):\n\treturn x[0] + 1\n", "    if (a && b) {\r\n", "\\x00 \\u1234", "a  b   c    ", "<0x41>", "</s>"]
CHINESE = ["你好，世界。", "道可道，非常道", "こんにちは", "안녕"]
PIECES = st.sampled_from([*EMOJI, *CODE, *CHINESE, " ", "\n", "the", " the"])
CHARACTERS = st.text(st.characters(codec="utf-8"))
CONTROL = st.text(st.characters(max_codepoint=0x9F))
TEXTS = st.lists(st.one_of(PIECES, CHARACTERS, CONTROL), max_size=8).map("".join)
PROPERTY = settings(max_examples=100, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def tokenizers(byte_level):
    """A tokenizer of each kind."""
    return {
        "byte-level": byte_level(),
        "sentencepiece": sentencepiece_like(sentencepiece_backend()),
        "prefixed": sentencepiece_like(sentencepiece_backend(prepends_space=True)),
        "unigram": sentencepiece_like(unigram_backend()),
    }


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "prefixed", "unigram"])
@PROPERTY
@given(text=TEXTS)
def test_the_bytes_of_a_texts_tokens_are_the_texts(tokenizers, kind, text):
    if kind != "byte-level":  # which reads a ▁ of the text as a space, and the Unigram model the name of a byte token
        text = text.replace("▁", "_").replace("<0x", "<0_")
    tokens = token_bytes(tokenizers[kind])
    ids = tokens.encoded(text)
    assert tokens.of(ids) == text.encode()


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "prefixed", "unigram"])
def test_a_tokenizers_own_tokens_of_a_text_have_its_bytes_after_the_space_before_it(tokenizers, kind):
    tokenizer = tokenizers[kind]
    tokens = token_bytes(tokenizer)
    assert tokens.prepends_space == (kind in ("prefixed", "unigram"))
    text = "the café 👍"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokens.of(ids) == (b" " if tokens.prepends_space else b"") + text.encode()


def test_the_alphabet_is_transformers():
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert byte_alphabet() == {character: byte for byte, character in bytes_to_unicode().items()}


def test_special_tokens_have_their_names_and_stand_for_no_text(tokenizers):
    tokenizer = tokenizers["sentencepiece"]
    tokens = token_bytes(tokenizer)
    turn_end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert tokens.bytes_V[turn_end] == b"<end_of_turn>"
    assert tokens.is_special_V[turn_end]
    ids = tokens.encoded("<end_of_turn>")
    assert turn_end not in ids  # the text is not the token
    assert tokens.of(ids) == b"<end_of_turn>"


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_other_added_tokens_are_literal(tokenizers, kind):
    tokenizer = permuted(tokenizers[kind], range(len(tokenizers[kind])))
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("Ġé", normalized=False)])
    tokens = token_bytes(tokenizer)
    for name in ("<think>", "Ġé"):
        token_id = tokenizer.convert_tokens_to_ids(name)
        assert tokens.bytes_V[token_id] == name.encode()
        assert not tokens.is_special_V[token_id]
        assert token_id in tokens.encoded(f"a {name} b")
        assert tokens.of(tokens.encoded(f"a {name} b")) == f"a {name} b".encode()


def test_byte_tokens_come_after_a_text_token_of_the_same_bytes(tokenizers):
    tokenizer = tokenizers["sentencepiece"]
    tokens = token_bytes(tokenizer)
    names = [tokenizer.convert_ids_to_tokens(each) for each in tokens.by_bytes[b"a"]]
    assert names == ["a", "<0x61>"]
    assert {bytes([byte]) for byte in range(256)} <= tokens.by_bytes.keys()


def fast(decoder, model=None, **options):
    backend = Tokenizer(model or models.BPE({"a": 0, "##b": 1}, []))
    backend.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


@pytest.mark.parametrize(
    ("decoder", "reason"),
    [
        (decoders.WordPiece(), "its decoder is WordPiece"),
        (decoders.BPEDecoder(), "its decoder is BPEDecoder"),
        (decoders.CTC(), "its decoder is CTC"),
        (decoders.Fuse(), "its decoder is Fuse"),
        (
            decoders.Sequence([decoders.ByteLevel(), decoders.ByteFallback()]),
            "its decoder mixes ByteFallback, ByteLevel",
        ),
        (decoders.Sequence([decoders.Replace("x", "yz")]), "its decoder replaces {'String': 'x'} by 'yz'"),
    ],
)
def test_a_decoder_whose_bytes_are_unknown_is_refused_by_name(decoder, reason):
    tokenizer = fast(decoder, name_or_path="bert-like")
    with pytest.raises(GKDTeacherError) as raised:
        token_bytes(tokenizer)
    assert str(raised.value) == (
        f"the bytes of the tokens of {type(tokenizer).__name__} (bert-like) can't be known, since {reason}: comparing "
        "other vocabularies needs a byte-level or SentencePiece-like tokenizer; use a model with one"
    )


def test_a_tokenizer_without_a_decoder_or_of_another_library_is_refused():
    backend = Tokenizer(models.WordLevel({"a": 0}))
    with pytest.raises(GKDTeacherError, match="its decoder is missing"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend))
    with pytest.raises(GKDTeacherError, match=r"object \(without a name\) .* not one of the tokenizers library"):
        token_bytes(object())


def test_a_normalizer_that_changes_the_text_gives_the_bytes_of_the_changed_text(byte_level_backend):
    backend = Tokenizer.from_str(byte_level_backend.to_str())
    backend.normalizer = normalizers.NFKC()
    tokens = token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert tokens.of(tokens.encoded("e\u0301 ﬁ")) == "é fi".encode()


def test_a_real_tokenizer_round_trips_too(smollm2_dir):
    tokens = token_bytes(AutoTokenizer.from_pretrained(smollm2_dir))
    text = "".join([*EMOJI, *CODE, *CHINESE, "\x00\x01\x7f\x85\u2028"])
    assert tokens.of(tokens.encoded(text)) == text.encode()


def test_the_tokenizer_passed_is_not_changed(tokenizers):
    tokenizer = tokenizers["prefixed"]
    before = json.loads(tokenizer.backend_tokenizer.to_str())
    token_bytes(tokenizer).encoded("a")
    assert json.loads(tokenizer.backend_tokenizer.to_str()) == before
    assert isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.PreTokenizer)
