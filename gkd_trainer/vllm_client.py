"""The client of vLLM servers: HTTP with time-outs, retries, and one clear error in the end."""

from __future__ import annotations

import base64
import copy
import json
import logging
import socket
import ssl
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

import httpcore
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential, wait_random

from gkd_trainer.errors import GKDConfigError, GKDError, GKDServerError
from gkd_trainer.urls import ServerURL

logger = logging.getLogger(__name__)

T = TypeVar("T")
Item = TypeVar("Item")

_CALLS_AT_ONCE = 256
"""Maximum number of concurrent requests to one server: vLLM's default batch on a GPU."""

_WRONG_ANSWERS = 4
"""How often to ask a server that answers wrongly; one that can't be reached is tried until its time-out."""

_NOT_THERE = (408, 425, 429, 502, 503, 504)
"""Statuses that gateways return while the server behind them restarts or has too many requests."""

_TLS_MISMATCHES = ("WRONG_VERSION_NUMBER", "CERTIFICATE_VERIFY_FAILED")
"""TLS failures that no retry helps: no TLS at all, or a certificate that is not trusted."""

_FIRST_WAIT, _LONGEST_WAIT, _JITTER = 0.2, 5.0, 0.2
_CONNECT_SECONDS = 10.0

_IDLE_SECONDS = 2.0
"""How long an idle connection may be reused: vLLM closes it after 5 s, possibly just as a request is sent."""


class RequestRefusedError(GKDServerError):
    """A request that the server rejects (a 4xx status): asking again would not help."""


class _TransientError(Exception):
    """A failure that may go away when the request is sent again."""


class UnreachableError(_TransientError):
    """A server that can't be reached, or says that it is busy: another may answer, or this one later."""

    def __init__(self, message: str, pause: float = 0.0) -> None:
        """Take how many seconds the server asked to be left alone."""
        super().__init__(message)
        self.pause = pause


@dataclass(frozen=True)
class RawAnswer:
    """The body of an answer, and its headers, with names in lower case."""

    body: bytearray
    headers: Mapping[str, str]


class VLLMServer:
    """One vLLM server.

    Args:
        base_url: Where it listens, such as "http://127.0.0.1:8000"; a trailing "/v1" is dropped. A user and password in
            it are sent (HTTP basic authentication), and never shown.
        api_token: The key that it was started with (`--api-key`), if any.
        server_timeout: Seconds to keep trying to reach a server, such as one that is restarting.
        request_timeout: Seconds within which one request must be answered in full, from connecting to the last byte;
            looking up the host's name does not count.

    A server that asks for a pause (`Retry-After` in seconds, as with status 429) gets it, within `server_timeout`.

    A call ends within `server_timeout` + `request_timeout` seconds and a pause, with an answer or GKDServerError: the
    last attempt begins within the first time and ends within the second. A call also ends after four wrong answers
    (status 500, incomplete, too late, or refused by `parse`).

    Raises:
        GKDConfigError: A URL that no request can be sent to, or a token that no header can hold.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_token: str | None = None,
        server_timeout: float = 240.0,
        request_timeout: float = 300.0,
    ) -> None:
        url = ServerURL(base_url)
        self.base_url = url.rstrip("/").removesuffix("/v1")
        self._server_timeout, self._request_timeout = server_timeout, request_timeout
        self._waits = True
        parts = urlsplit(self.base_url)
        self._headers = [
            ("Host", _host_header(parts)),
            ("Accept", "application/json, application/octet-stream"),
            ("User-Agent", "gkd-trainer"),
            *_authorization(url, api_token),
        ]
        # A server may repeat these when it refuses a request.
        self._secrets = [
            *filter(None, (api_token, *(url.credentials or ())[1:])),
            *(value.removeprefix("Basic ") for name, value in self._headers if name == "Authorization"),
        ]
        self._pool = httpcore.ConnectionPool(
            max_connections=_CALLS_AT_ONCE, keepalive_expiry=_IDLE_SECONDS, network_backend=_Network()
        )
        weakref.finalize(self, self._pool.close)

    def get(self, path: str, parse: Callable[[Any], T]) -> T:
        """Return `parse(answer)` of a GET; otherwise as `post`."""
        return self._call("GET", path, None, _reading_json(parse))

    def post(self, path: str, body: Any, parse: Callable[[Any], T]) -> T:
        """Return `parse(answer)` of a POST of JSON, where `answer` is the JSON that came back, or None if empty.

        If `parse` raises, the answer counts as wrong; a GKDError is passed on.

        Raises:
            GKDServerError: The call failed; names the server, the call and the last cause.
            GKDConfigError: The body holds values that JSON can't.
        """
        return self._call("POST", path, body, _reading_json(parse))

    def post_for_bytes(self, path: str, body: Any, parse: Callable[[RawAnswer], T]) -> T:
        """Return `parse(answer)` of a POST of JSON that is answered with bytes; otherwise as `post`."""
        return self._call("POST", path, body, parse)

    def post_unread(self, path: str, body: Any, *, is_repeatable: bool = True) -> None:
        """POST JSON as `post` does, but read only the status of the answer, which may not be JSON.

        A request that is not repeatable is sent once: sending it again would have its effect twice.
        """
        self._call("POST", path, body, lambda answer: None, is_repeatable=is_repeatable)

    def without_waiting(self) -> VLLMServer:
        """Return this server, by the same connections, whose calls raise UnreachableError at once if that applies."""
        impatient = copy.copy(self)
        impatient._waits = False
        return impatient

    def close(self) -> None:
        """Close the connections to the server."""
        self._pool.close()

    def _call(
        self, method: str, path: str, body: Any, read: Callable[[RawAnswer], T], *, is_repeatable: bool = True
    ) -> T:
        content = _encoded(body)
        started = time.monotonic()
        call = f"{method} {path}"
        wrong_answers = 0

        def is_spent(state: RetryCallState) -> bool:
            nonlocal wrong_answers
            if not is_repeatable:
                return True
            error = state.outcome.exception() if state.outcome is not None else None
            wrong_answers += isinstance(error, _WrongAnswerError)
            if isinstance(error, UnreachableError) and not self._waits:
                return True
            return wrong_answers >= _WRONG_ANSWERS or time.monotonic() - started >= self._server_timeout

        try:
            retrying = Retrying(
                retry=retry_if_exception_type(_TransientError),
                stop=is_spent,
                wait=lambda state: next_pause(state, self._server_timeout),
                before_sleep=lambda state: self._log(call, state),
                reraise=True,
            )
            return retrying(lambda: self._request(method, path, content, read))
        except _TransientError as error:
            if isinstance(error, UnreachableError) and not self._waits:
                raise
            if not is_repeatable:
                raise GKDServerError(
                    f"the vLLM server at {self.base_url} did not complete {call}, which can't be sent twice: {error}. "
                    "Look at the server's log"
                ) from error
            attempts = retrying.statistics["attempt_number"]
            raise GKDServerError(
                f"the vLLM server at {self.base_url} did not complete {call}: gave up after {attempts} attempts in "
                f"{time.monotonic() - started:.0f} s, the last of which failed with: {error}. Look at the server's "
                "log; if the server is slow to start or to answer, raise vllm_server_timeout or "
                "vllm_request_timeout"
            ) from error

    def _request(self, method: str, path: str, content: bytes | None, read: Callable[[RawAnswer], T]) -> T:
        _deadline.set(time.monotonic() + self._request_timeout)
        has_begun = False
        answer = bytearray()
        try:
            with self._pool.stream(
                method,
                self._url(path),
                headers=[*self._headers, *([] if content is None else [("Content-Type", "application/json")])],
                content=content,
                extensions={
                    "timeout": {
                        **dict.fromkeys(("read", "write", "pool"), self._request_timeout),
                        "connect": min(_CONNECT_SECONDS, self._request_timeout),
                    }
                },
            ) as response:
                has_begun = True
                for chunk in response.iter_stream():
                    answer += chunk
        except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
            cause = error.args[0] if error.args else None  # httpcore drops __cause__
            if isinstance(cause, ssl.SSLError) and cause.reason in _TLS_MISMATCHES:
                raise GKDServerError(
                    f"no TLS connection to the vLLM server at {self.base_url} ({error}): if it speaks plain HTTP, "
                    "give a URL that starts with http://; if its certificate is not trusted, set SSL_CERT_FILE to the "
                    "authority's file"
                ) from error
            raise UnreachableError(f"{type(error).__name__}: {error}") from error
        except httpcore.TimeoutException as error:
            when = "the answer was not complete after" if has_begun else "no answer within"
            raise _WrongAnswerError(f"{when} {self._request_timeout:g} s ({type(error).__name__})") from error
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            kind = _WrongAnswerError if has_begun else UnreachableError
            raise kind(f"{type(error).__name__}: {error}") from error
        if response.status in _NOT_THERE:
            raise UnreachableError(
                f"status {response.status}: {self._excerpt(answer)}", _requested_pause(_headers_of(response))
            )
        if response.status >= 500:
            raise _WrongAnswerError(f"status {response.status}: {self._excerpt(answer)}")
        if response.status >= 300:
            raise RequestRefusedError(
                f"the vLLM server at {self.base_url} refused {method} {path} with status {response.status}: "
                f"{self._excerpt(answer)}"
            )
        try:
            return read(RawAnswer(answer, _headers_of(response)))
        except GKDError:
            raise
        except Exception as error:  # JSON may have any depth, size and type
            cause = f"{type(error).__name__}: {error}"
            raise _WrongAnswerError(
                f"an answer that can't be used ({self._excerpt(cause.encode())}): {self._excerpt(answer)}"
            ) from error

    def _excerpt(self, content: bytes | bytearray, length: int = 300) -> str:
        if b"\0" in content:
            return f"{len(content)} bytes"
        text = content.decode(errors="replace")
        for secret in self._secrets:
            text = text.replace(secret, "<SECRET>")
        return f"{text[:length]}…" if len(text) > length else text or "an empty answer"

    def _url(self, path: str) -> httpcore.URL:
        parts = urlsplit(self.base_url)
        host = (parts.hostname or "").encode("idna")
        return httpcore.URL(scheme=parts.scheme, host=host, port=parts.port, target=parts.path + path)

    def _log(self, call: str, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        logger.warning("Trying %s of the vLLM server at %s again: %s", call, self.base_url, error)


def next_pause(state: RetryCallState, server_timeout: float) -> float:
    """Return the seconds before the next attempt: growing, random, and not less than the server asked for."""
    pause = wait_exponential(multiplier=_FIRST_WAIT, max=_LONGEST_WAIT) + wait_random(0, _JITTER)
    error = state.outcome.exception() if state.outcome is not None else None
    requested = error.pause if isinstance(error, UnreachableError) else 0.0
    return max(pause(state), min(requested, server_timeout - (state.seconds_since_start or 0.0)))


def call_each(
    servers: Sequence[VLLMServer], items: Sequence[Item], call: Callable[[VLLMServer, Item], T], first: int = 0
) -> list[T]:
    """Return `call(server, item)` for each item, in order; calls run in parallel, and items go to the servers in turn.

    `first` is the index of the first item's server. The first call that raises cancels those not yet started.
    """
    if not items:
        return []
    with ThreadPoolExecutor(max_workers=min(len(items), _CALLS_AT_ONCE * len(servers))) as pool:
        futures = [pool.submit(call, servers[(first + index) % len(servers)], item) for index, item in enumerate(items)]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _WrongAnswerError(_TransientError):
    pass


_deadline: ContextVar[float] = ContextVar("_deadline")
"""When this thread's request must be answered."""


class _Network(httpcore.NetworkBackend):
    """httpcore's sockets with one deadline per request: a time-out applies to each wait, which may be for one byte."""

    def __init__(self) -> None:
        self._sockets = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to the first of a host's addresses that answers."""
        try:
            addresses = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        except OSError as error:
            raise httpcore.ConnectError(f"{host}: {error}") from error
        failure: Exception = httpcore.ConnectError(f"{host} has no address")
        for address in dict.fromkeys(addresses):
            left = _time_left(timeout, httpcore.ConnectTimeout)
            try:
                return _Stream(self._sockets.connect_tcp(address, port, left, local_address, socket_options))
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure


class _Stream(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _time_left(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        # In pieces: the stream's own write starts a new time-out with each piece that is taken.
        sending: socket.socket = self._stream.get_extra_info("socket")
        rest = memoryview(buffer)
        while rest:
            sending.settimeout(_time_left(timeout, httpcore.WriteTimeout))
            try:
                rest = rest[sending.send(rest) :]
            except TimeoutError as error:
                raise httpcore.WriteTimeout(str(error)) from error
            except OSError as error:
                raise httpcore.WriteError(str(error)) from error

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        left = _time_left(timeout, httpcore.ConnectTimeout)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, left))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _time_left(timeout: float | None, timeout_error: type[Exception]) -> float:
    left = _deadline.get() - time.monotonic()
    if left <= 0:
        raise timeout_error("the request's time is up")
    return left if timeout is None else min(left, timeout)


def _host_header(parts: SplitResult) -> str:
    # Not idna of all of netloc, which would take the port for part of the host's last label.
    host = (parts.hostname or "").encode("idna").decode()
    host = f"[{host}]" if ":" in host else host
    return host if parts.port is None else f"{host}:{parts.port}"


def _authorization(url: ServerURL, api_token: str | None) -> list[tuple[str, str]]:
    if url.credentials is not None and api_token:
        raise GKDConfigError(f"{url} came with a user and password and with an API token: give only one of them")
    if api_token:
        if not (api_token.isascii() and api_token.isprintable() and api_token == api_token.strip()):
            raise GKDConfigError(
                f"the API token for {url} must be printable ASCII without spaces around it, since it is sent in a "
                "request's header"
            )
        return [("Authorization", f"Bearer {api_token}")]
    if url.credentials is not None:
        pair = base64.b64encode(":".join(url.credentials).encode()).decode()
        return [("Authorization", f"Basic {pair}")]
    return []


def _headers_of(response: httpcore.Response) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}


def _requested_pause(headers: Mapping[str, str]) -> float:
    """Return the seconds of a Retry-After; 0 without one, or for one that is a date."""
    seconds = headers.get("retry-after", "").strip()
    return float(seconds) if seconds.isdecimal() else 0.0


def _reading_json(parse: Callable[[Any], T]) -> Callable[[RawAnswer], T]:
    return lambda answer: parse(json.loads(answer.body) if answer.body else None)


def _encoded(body: Any) -> bytes | None:
    if body is None:
        return None
    try:
        return json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise GKDConfigError(f"a request to a vLLM server holds a value that JSON can't: {error}") from error
