"""Values without their secrets: for what is printed, logged, serialised or saved."""

from __future__ import annotations

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
    # user:password@ in front of a URL's host, a parameter of its query, and the header of an HTTP request
    (re.compile(r"\b([a-z][a-z0-9+.-]*://)[^\s/?#]*@", re.IGNORECASE), r"\1<CREDENTIALS>@"),
    (
        re.compile(r"([?&#][\w-]*(?:token|password|passwd|pwd|secret|key|sig|signature)=)[^&#\s'\"]+", re.IGNORECASE),
        r"\1<SECRET>",
    ),
    (re.compile(r"\b(Bearer) [\w.~+/=-]{8,}"), r"\1 <SECRET>"),
    # Not in "Basic authentication": a plain word is no base64.
    (re.compile(r"\b(Basic) (?![A-Z]?[a-z]+\b(?!=))[\w+/-]{8,}={0,2}"), r"\1 <SECRET>"),
    # A token of the hub, and not a name such as hf_quantizer.
    (re.compile(r"\bhf_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{6,}"), "<HF_TOKEN>"),
)

_drops_secrets: ContextVar[bool] = ContextVar("drops_secrets", default=False)


def is_secret(name: str) -> bool:
    """Return whether an option of this name holds a secret: `hub_token`, `apiKey`, `X-Auth-Token`, `password`."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|-", "_", name).lower()
    return _SECRET_NAME.search(words) is not None and _SPECIAL_TOKEN.match(words) is None


def redacted(value: Any, name: str = "") -> Any:
    """Return a copy of an option's value in which each secret is its name in capitals, as transformers prints tokens.

    Secrets are what stands under a name that says so, at any depth, and credentials inside a text. None, True and False
    stay: `token=True` names none.
    """
    return _replaced(value, name, lambda secret: f"<{secret.upper()}>")


def without_secrets(value: Any, name: str = "") -> Any:
    """Return a copy of an option's value in which secrets are None: who loads it falls back to a login, if any."""
    return _replaced(value, name, lambda _: None)


def redacted_source(text: str) -> str:
    """Return a text that could not be parsed, in quotes; where it names a secret, its length alone."""
    if any(map(is_secret, re.findall(r"[\w-]+", text))):
        return f"{len(text)} characters, not shown since they may hold a secret"
    return repr(redacted(text))


@contextmanager
def dropping_secrets() -> Iterator[None]:
    """Have configurations that are pickled inside leave their secrets out."""
    token = _drops_secrets.set(True)
    try:
        yield
    finally:
        _drops_secrets.reset(token)


def drops_secrets() -> bool:
    """Return whether a configuration that is pickled now has to leave its secrets out."""
    return _drops_secrets.get()


def _replaced(value: Any, name: str, replacement: Callable[[str], Any]) -> Any:
    if name and is_secret(name) and value is not None and not isinstance(value, bool):
        return replacement(name)
    if isinstance(value, str) and hasattr(value, "credentials"):  # the URL of a server, which shows none
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
