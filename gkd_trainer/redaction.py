"""Values without their secrets, to be printed, logged, serialised or saved."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_SECRET_NAME = re.compile(
    r"(^|_)(token|password|passwd|pwd|pass|passphrase|secret|credentials?|auth|authorization|cookie|jwt"
    r"|connection_string|(hf|hub|api|access|auth|refresh|bearer)_?tokens?|passwords|secrets"
    r"|(api|access|account|auth|private|secret|ssh|encryption)_?keys?(_id)?)$"
)
_SPECIAL_TOKEN = re.compile(r"^(bos|eos|pad|unk|sep|cls|mask|image|audio|video|boi|eoi|decoder_start)_token$")

_SECRETS_IN_TEXT = (
    # user:password@ before a URL's host, a parameter of its query, and the header of an HTTP request
    (re.compile(r"\b([a-z][a-z0-9+.-]*://)[^\s/?#]*@", re.IGNORECASE), r"\1<CREDENTIALS>@"),
    (
        re.compile(r"([?&#][\w-]*(?:token|password|passwd|pwd|secret|key|sig|signature)=)[^&#\s'\"]+", re.IGNORECASE),
        r"\1<SECRET>",
    ),
    (re.compile(r"\b(Bearer) [\w.~+/=-]{8,}"), r"\1 <SECRET>"),
    # Not in "Basic authentication": a plain word is not base64.
    (re.compile(r"\b(Basic) (?![A-Z]?[a-z]+\b(?!=))[\w+/-]{8,}={0,2}"), r"\1 <SECRET>"),
    # A token of the hub, but not a name such as hf_quantizer.
    (re.compile(r"\bhf_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{6,}"), "<HF_TOKEN>"),
)

_drops_secrets: ContextVar[bool] = ContextVar("drops_secrets", default=False)


def is_secret(name: str) -> bool:
    """Return whether an option of this name holds a secret: `hub_token`, `apiKey`, `X-Auth-Token`, `password`."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|-", "_", name).lower()
    return _SECRET_NAME.search(words) is not None and _SPECIAL_TOKEN.match(words) is None


def redacted(value: Any, name: str = "") -> Any:
    """Return a copy of an option's value with each secret replaced by its name in capitals, as transformers does.

    Secrets are values under a name that indicates one, at any depth, and credentials inside a text. None, True and
    False are kept, since `token=True` holds no secret.
    """
    return _replaced(value, name, lambda secret: f"<{secret.upper()}>")


def without_secrets(value: Any, name: str = "") -> Any:
    """Return a copy of an option's value with secrets set to None: code that loads it falls back to a login, if any."""
    return _replaced(value, name, lambda _: None)


def redacted_source(text: str) -> str:
    """Return a text that could not be parsed, in quotes, or only its length if it names a secret."""
    if any(map(is_secret, re.findall(r"[\w-]+", text))):
        return f"{len(text)} characters, not shown since they may hold a secret"
    return repr(redacted(text))


@contextmanager
def dropping_secrets() -> Iterator[None]:
    """Leave secrets out of every `HidesSecrets` pickled inside the block."""
    token = _drops_secrets.set(True)
    try:
        yield
    finally:
        _drops_secrets.reset(token)


class HidesSecrets:
    """A dataclass whose `repr` shows no secrets, and whose pickles hold none inside `dropping_secrets`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep @dataclass from generating a `repr` that shows secrets."""
        super().__init_subclass__(**kwargs)
        if "__repr__" not in vars(cls):
            cls.__repr__ = HidesSecrets.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        """Return all fields and their values, one per line, without secrets."""
        values = {name: getattr(self, name, None) for name in self._field_names()}
        lines = [f"{name}={redacted(value, name)!r},\n" for name, value in sorted(values.items())]
        return f"{type(self).__name__}(\n{''.join(lines)})"

    __str__ = __repr__

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: everything, or inside `dropping_secrets` everything but secrets."""
        state = vars(self).copy()
        if _drops_secrets.get():
            state |= {name: without_secrets(state[name], name) for name in self._field_names() & state.keys()}
        return state

    def _field_names(self) -> set[str]:
        return {field.name for field in dataclasses.fields(self)}  # type: ignore[arg-type]


def _replaced(value: Any, name: str, replacement: Callable[[str], Any]) -> Any:
    if name and is_secret(name) and value is not None and not isinstance(value, bool):
        return replacement(name)
    if isinstance(value, str) and hasattr(value, "credentials"):  # a ServerURL, whose text holds no credentials
        return str(value)
    if type(value) is str:  # an enum of transformers is a str too
        for pattern, hidden in _SECRETS_IN_TEXT:
            value = pattern.sub(hidden, value)
        return value
    if isinstance(value, Mapping):
        return {key: _replaced(item, key if isinstance(key, str) else "", replacement) for key, item in value.items()}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(_replaced(item, "", replacement) for item in value)
    return value
