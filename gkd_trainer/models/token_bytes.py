"""The bytes that each token of a tokenizer stands for, from the kind of its decoder.

Offsets into a text don't give them: a byte-level token may be part of a character. Shapes: V tokens of a tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from gkd_trainer.errors import GKDTeacherError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

_IGNORED_DECODERS = frozenset({"Fuse", "Strip"})
"""Decoders that join tokens, or drop the space that the tokenizer put before a text; both leave a token's bytes."""


@dataclass(frozen=True)
class TokenBytes:
    """The bytes of each token of a tokenizer, and text encoded so that they are known.

    The bytes of `encoded(text)` are those of the text, unless a normalizer changes it or a character is unknown.

    Attributes:
        bytes_V: what each id stands for, empty for an id without a token; of a special token, its name.
        name_V: each id's token as the tokenizer writes it.
        length_V: their lengths, int64 [V].
        is_special_V: which ids are special tokens, such as an end of turn: they stand for no text. bool [V].
        prepends_space: whether the tokenizer puts a space before a text.
    """

    bytes_V: Sequence[bytes]
    name_V: Sequence[str]
    length_V: npt.NDArray[np.int64]
    is_special_V: npt.NDArray[np.bool_]
    prepends_space: bool
    _backend: Tokenizer

    @property
    def size(self) -> int:
        """V, one more than the largest id."""
        return len(self.bytes_V)

    def of(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of consecutive tokens; an id beyond the tokenizer's has none."""
        ids = list(ids)
        try:
            return b"".join(map(self.bytes_V.__getitem__, ids))
        except IndexError:
            return b"".join([self.bytes_V[each] for each in ids if each < self.size])

    def encoded(self, text: str) -> list[int]:
        """Return a text's tokens, without special ones or a space before it; names of special tokens are plain text."""
        # Unlike `encode`, this does not track offsets, which costs a quarter of the time.
        [encoded] = self._backend.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoded.ids
        return ids

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Return the first character of each token of `encoded(text)`, and the one after its last.

        They don't tell bytes: several tokens may share a character.
        """
        offsets: list[tuple[int, int]] = self._backend.encode(text, add_special_tokens=False).offsets
        return offsets

    @cached_property
    def by_bytes(self) -> Mapping[bytes, Sequence[int]]:
        """The ids that stand for some text, by their bytes: by name if there are several, <0xNN> last."""
        found: dict[bytes, list[int]] = {}
        for token_id in np.flatnonzero((self.length_V > 0) & ~self.is_special_V).tolist():
            found.setdefault(self.bytes_V[token_id], []).append(token_id)
        for ids in found.values():
            ids.sort(key=lambda each: (_BYTE_TOKEN.fullmatch(self.name_V[each]) is not None, self.name_V[each]))
        return found


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
    """Return the bytes of a tokenizer's tokens.

    A byte-level decoder maps each character of a token to a byte (GPT-2's alphabet). A SentencePiece-like one writes
    spaces as ▁, and bytes that no token holds as <0xNN>. Added tokens are literal.

    Raises:
        GKDTeacherError: The bytes of its tokens can't be known: it is not one of the tokenizers library, or it has
            another decoder, such as WordPiece's, which drops spaces.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise _unknown(tokenizer, "it is not one of the tokenizers library (a fast tokenizer)")
    state = json.loads(backend.to_str())
    decode = _decoder_of(tokenizer, state["decoder"])
    size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    bytes_V, name_V, is_special_V = [b""] * size, [""] * size, np.zeros(size, dtype=bool)
    for token, token_id in backend.get_vocab(with_added_tokens=False).items():
        bytes_V[token_id], name_V[token_id] = decode(token), token
    for token_id, added in tokenizer.added_tokens_decoder.items():
        # SentencePiece-like vocabularies list runs of spaces, ▁▁, as added tokens.
        is_literal = added.special or decode is _of_byte_level
        bytes_V[token_id] = added.content.encode() if is_literal else decode(added.content)
        name_V[token_id], is_special_V[token_id] = added.content, added.special
    unknown = state["model"].get("unk_token")
    if unknown is not None and (unknown_id := backend.token_to_id(unknown)) is not None:
        is_special_V[unknown_id] = True
    length_V = np.fromiter(map(len, bytes_V), dtype=np.int64, count=size)
    return TokenBytes(bytes_V, name_V, length_V, is_special_V, _prepends_space(state), _plain_backend(state))


def _decoder_of(tokenizer: PreTrainedTokenizerBase, decoder: Mapping[str, Any] | None) -> Callable[[str], bytes]:
    steps = list(_flat(decoder, "decoders"))
    kinds = {step["type"] for step in steps}
    spaces = [step["replacement"] for step in steps if step["type"] == "Metaspace"]
    for step in steps:
        if step["type"] == "Replace":
            if step["content"] != " " or "String" not in step["pattern"]:
                raise _unknown(tokenizer, f"its decoder replaces {step['pattern']} by {step['content']!r}")
            spaces.append(step["pattern"]["String"])
    others = kinds - _IGNORED_DECODERS - {"Metaspace", "Replace", "ByteFallback", "ByteLevel"}
    if others or not kinds & {"ByteLevel", "Metaspace", "Replace", "ByteFallback"}:
        raise _unknown(tokenizer, f"its decoder is {', '.join(sorted(others or kinds)) or 'missing'}")
    if "ByteLevel" in kinds:
        if spaces or "ByteFallback" in kinds:
            raise _unknown(tokenizer, f"its decoder mixes {', '.join(sorted(kinds))}")
        return _of_byte_level
    has_byte_tokens = "ByteFallback" in kinds

    def of_sentencepiece(token: str) -> bytes:
        if has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for space in spaces:
            token = token.replace(space, " ")
        return token.encode()

    return of_sentencepiece


def byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level token stands for (GPT-2's `bytes_to_unicode`, inverted)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_ALPHABET = byte_alphabet()


def _of_byte_level(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[character] for character in token])
    except KeyError:  # the decoder takes such a token literally
        return token.encode()


def _flat(component: Mapping[str, Any] | None, key: str) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a decoder, a normalizer or a pre-tokenizer, whose sequences list theirs under `key`."""
    if component is None:
        return
    if component["type"] != "Sequence":
        yield component
        return
    for step in component[key]:
        yield from _flat(step, key)


def _prepends_space(state: Mapping[str, Any]) -> bool:
    normalizers = _flat(state["normalizer"], "normalizers")
    pre_tokenizers = _flat(state["pre_tokenizer"], "pretokenizers")
    return any(step["type"] == "Prepend" for step in normalizers) or any(
        step.get("add_prefix_space") or step.get("prepend_scheme", "never") != "never" for step in pre_tokenizers
    )


def _plain_backend(state: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer without what it adds to a text or drops from it: a space before it, special tokens."""
    plain = {**state, "post_processor": None, "truncation": None, "padding": None}
    # A special token's name in a text is not that token: a row's special tokens are known by their ids.
    plain["added_tokens"] = [{**added, "lstrip": False, "rstrip": False} for added in state["added_tokens"]]
    plain["normalizer"] = _without_prefix(state["normalizer"], "normalizers")
    plain["pre_tokenizer"] = _without_prefix(state["pre_tokenizer"], "pretokenizers")
    backend = Tokenizer.from_str(json.dumps(plain))
    backend.encode_special_tokens = True
    return backend


def _without_prefix(component: Mapping[str, Any] | None, key: str) -> Mapping[str, Any] | None:
    if component is None or component["type"] == "Prepend":
        return None
    if component["type"] == "Sequence":
        steps = [_without_prefix(step, key) for step in component[key]]
        return {**component, key: [step for step in steps if step is not None]}
    changed = dict(component)
    if "add_prefix_space" in changed:
        changed["add_prefix_space"] = False
    if "prepend_scheme" in changed:
        changed["prepend_scheme"] = "never"
    return changed


def _unknown(tokenizer: PreTrainedTokenizerBase, reason: str) -> GKDTeacherError:
    name = getattr(tokenizer, "name_or_path", "") or "without a name"
    return GKDTeacherError(
        f"the bytes of the tokens of {type(tokenizer).__name__} ({name}) can't be known, since {reason}: comparing "
        "other vocabularies needs a byte-level or SentencePiece-like tokenizer; use a model with one"
    )
