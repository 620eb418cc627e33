"""URLs of servers, checked once and shown without their credentials."""

from __future__ import annotations

import re
from typing import Self
from urllib.parse import unquote, urlsplit

from gkd_trainer.errors import GKDConfigError

_EXAMPLE = "http://127.0.0.1:8000"


class ServerURL(str):
    """The base URL of a server, safe to show, log and save: the credentials before an "@" are kept apart.

    Args:
        text: Such as "http://127.0.0.1:8000", "https://gpu-node/v1" or "http://user:password@gpu-node:8000".
        option: The option or argument that it came from, for the error.

    Raises:
        GKDConfigError: The text is not a URL that a request can be sent to.
    """

    credentials: tuple[str, str] | None
    """User and password, if the URL had them."""

    def __new__(cls, text: str, option: str = "base_url") -> Self:
        """Check the URL, and take its credentials out."""
        if isinstance(text, cls):  # its credentials are no longer in the text
            return text
        problem = _problem(text)
        if problem is not None:
            # Without everything before the last "@": in a malformed URL, a password may stand anywhere there.
            shown = re.sub(r"^([a-z]*://)?.*@", r"\1", text, flags=re.DOTALL | re.IGNORECASE)
            # Where a port belongs, anything else may be a password whose "@host" is missing.
            shown = re.sub(r"(//[^/?#:\[\]]+):(?!\d*(?:[/?#,\s]|$))[^/?#]*", r"\1:<PORT>", shown)
            raise GKDConfigError(
                f"{option} must be a URL that starts with http:// or https:// and names a host, such as {_EXAMPLE} "
                f"({problem}); got {shown!r}"
            )
        url = super().__new__(cls, re.sub(r"(?<=//)[^/]*@", "", text, count=1))
        user, password = urlsplit(text).username, urlsplit(text).password
        url.credentials = None if user is None else (unquote(user), unquote(password or ""))
        return url


def _problem(text: str) -> str | None:
    if not text.lower().startswith(("http://", "https://")):
        return "it starts with neither"
    if re.search(r"[\s\x00-\x1f\x7f]", text):
        return "it has a space or a control character"
    try:
        parts = urlsplit(text)
        port, host = parts.port, (parts.hostname or "").encode("idna").decode()
    except ValueError:
        return "its host or port can't be read; ports are 1 to 65535"
    if not re.fullmatch(r"[\w.-]+|[0-9a-f:.]*:[0-9a-f:.]*(%[\w.-]+)?", host, re.ASCII):
        return "its host is missing, or has characters that no host has"
    if port == 0:
        return "its port is 0; ports are 1 to 65535"
    if "?" in text or "#" in text:
        return "it has a query or a fragment"
    if not parts.path.isascii():
        return "its path is not ASCII"
    return None
