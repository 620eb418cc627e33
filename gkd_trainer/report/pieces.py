"""The text of each token of a sequence."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"


def text_pieces(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Return the text that each token adds to the text of those before it; token ids without a tokenizer.

    A character made of several tokens belongs to the last one; the others get U+FFFD, as do bytes that are not UTF-8.
    Special tokens are shown.
    """
    if tokenizer is None:
        return [f" {token_id}" for token_id in token_ids]
    pieces: list[str] = []
    # Decoded in a moving window, as servers stream text: one token alone may lose the space before it.
    start, read, waiting = 0, 0, 0
    before = ""
    for end in range(1, len(token_ids) + 1):
        text = _decoded(tokenizer, token_ids[start:end])
        if text.endswith(_REPLACEMENT) and end - read < 4:
            # Four bytes at most make a character, so further tokens can't complete it.
            pieces.append(_REPLACEMENT)
            waiting += 1
            continue
        new = text[len(before) :] if text.startswith(before) else _decoded(tokenizer, token_ids[read:end])
        # Bytes that began no character are shown at their own tokens already.
        shown = min(waiting, len(new) - len(new.lstrip(_REPLACEMENT)))
        pieces.append(new[shown:])
        start, read, waiting = read, end, 0
        before = _decoded(tokenizer, token_ids[start:read])
    return [readable(piece) for piece in pieces]


def whole_text(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return the text of a sequence, special tokens shown; token ids without a tokenizer."""
    return " ".join(map(str, token_ids)) if tokenizer is None else readable(_decoded(tokenizer, token_ids))


def token_text(token_id: int, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return a single token's text inside a text, with spaces at its ends; its id without a tokenizer."""
    if tokenizer is None:
        return str(token_id)
    # Decoders of SentencePiece drop the space at a text's start; bytes of a character would join to one.
    first, both = (_decoded(tokenizer, [token_id] * count) for count in (1, 2))
    is_whole = both.startswith(first) and _REPLACEMENT not in both
    return readable(both[len(first) :] if is_whole else first)


def readable(text: str) -> str:
    """Return text that HTML and UTF-8 can hold, and that does not rearrange what follows it.

    Control characters become their pictures; lone surrogates and controls of the text's direction U+FFFD.
    """
    return "".join(_readable_character(character) for character in text)


def _readable_character(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or 0x20 <= code < 0x7F:
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    is_directing = 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069
    return _REPLACEMENT if is_directing or 0x80 <= code < 0xA0 or 0xD800 <= code < 0xE000 else character


def _decoded(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False))
