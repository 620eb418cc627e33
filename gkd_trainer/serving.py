"""The client of vLLM servers: JSON over HTTP with time-outs, retries, and one clear error after the last one."""

from __future__ import annotations

import json
import logging
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, overload

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential, wait_random

from gkd_trainer.errors import GKDConfigError, GKDServerError
from gkd_trainer.redaction import redacted

logger = logging.getLogger(__name__)

T = TypeVar("T")
Item = TypeVar("Item")

_CALLS_AT_ONCE = 256
"""Most requests under way to one server: what vLLM batches by default on a GPU."""

_WRONG_ANSWERS = 4
"""A server that answers, but wrongly, is asked this often; one that can't be reached as long as its time-out allows."""

_NOT_THERE = (502, 503, 504)
"""What gateways answer while the server behind them restarts."""

_FIRST_WAIT, _LONGEST_WAIT, _JITTER = 0.2, 5.0, 0.2
_CONNECT_SECONDS = 10.0


class RequestRefusedError(GKDServerError):
    """A request that the server takes for wrong (a 4xx status): asking again would not help."""


class VLLMServer:
    """One vLLM server.

    Args:
        base_url: Where it listens, such as "http://127.0.0.1:8000"; a trailing "/v1" is dropped.
        api_token: The key that it was started with (`--api-key`), if any.
        server_timeout: Seconds for which a server that can't be reached is tried again, as while it restarts.
        request_timeout: Seconds within which one request must be answered in full.

    A call ends within `server_timeout` + 2 · `request_timeout` seconds and a pause, with an answer or with
    GKDServerError: the last attempt begins within the first, and a server that stops in the middle of its answer is
    waited for once more. One that is answered wrongly (status 500, half an answer, too late, one that `parse` refuses)
    four times ends then.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_token: str | None = None,
        server_timeout: float = 240.0,
        request_timeout: float = 300.0,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise GKDConfigError(f"a server's base URL must start with http:// or https://; got {base_url!r}")
        base_url = base_url.rstrip("/").removesuffix("/v1")
        self.base_url = redacted(base_url)
        """Where it listens, for messages: without a user's name and password."""
        self.interruptions = 0
        """How many connections failed so far: where it has grown, the server may have been started anew."""
        self._server_timeout, self._request_timeout = server_timeout, request_timeout
        self._client = httpx.Client(
            base_url=base_url,
            headers={"Authorization": f"Bearer {api_token}"} if api_token else {},
            limits=httpx.Limits(max_connections=_CALLS_AT_ONCE),
            trust_env=False,  # no proxy that the user did not name
        )
        weakref.finalize(self, self._client.close)

    def get(self, path: str, parse: Callable[[Any], T]) -> T:
        """Return `parse(answer)` of a GET; the rest is as in `post`."""
        return self._call("GET", path, None, parse)

    def post(self, path: str, body: Any, parse: Callable[[Any], T]) -> T:
        """Return `parse(answer)` of a POST of JSON, where `answer` is the JSON that came back, or None for none.

        `parse` raises ValueError, KeyError, TypeError or IndexError for an answer that is not as it must be.

        Raises:
            GKDServerError: It names the server, the call and the last cause.
        """
        return self._call("POST", path, body, parse)

    def tell(self, path: str, body: Any) -> None:
        """POST JSON to an endpoint whose answer says nothing beyond its status, and may be no JSON; else as `post`."""
        self._call("POST", path, body, None)

    @overload
    def _call(self, method: str, path: str, body: Any, parse: Callable[[Any], T]) -> T: ...
    @overload
    def _call(self, method: str, path: str, body: Any, parse: None) -> None: ...
    def _call(self, method: str, path: str, body: Any, parse: Callable[[Any], T] | None) -> T | None:
        started = time.monotonic()
        call = f"{method} {path}"
        wrong_answers = 0

        def is_spent(state: RetryCallState) -> bool:
            nonlocal wrong_answers
            error = state.outcome.exception() if state.outcome is not None else None
            wrong_answers += isinstance(error, _WrongAnswerError)
            return wrong_answers >= _WRONG_ANSWERS or time.monotonic() - started >= self._server_timeout

        try:
            retrying = Retrying(
                retry=retry_if_exception_type(_TransientError),
                stop=is_spent,
                wait=wait_exponential(multiplier=_FIRST_WAIT, max=_LONGEST_WAIT) + wait_random(0, _JITTER),
                before_sleep=lambda state: self._log(call, state),
                reraise=True,
            )
            return retrying(lambda: self._request(method, path, body, parse))
        except _TransientError as error:
            attempts = retrying.statistics["attempt_number"]
            raise GKDServerError(
                f"the vLLM server at {self.base_url} did not complete {call}: gave up after {attempts} attempts in "
                f"{time.monotonic() - started:.0f} s, the last of which failed with: {error}. Look at the server's "
                "log; a server that is slow to start or to answer needs a longer vllm_server_timeout or "
                "vllm_request_timeout"
            ) from error

    def _request(self, method: str, path: str, body: Any, parse: Callable[[Any], T] | None) -> T | None:
        deadline = time.monotonic() + self._request_timeout
        timeout = httpx.Timeout(self._request_timeout, connect=min(_CONNECT_SECONDS, self._request_timeout))
        has_begun = False
        try:
            with self._client.stream(method, path, json=body, timeout=timeout) as response:
                has_begun = True
                content = bytearray()
                for chunk in response.iter_bytes():
                    content += chunk
                    if time.monotonic() > deadline:
                        raise _WrongAnswerError(f"the answer was not complete after {self._request_timeout:g} s")
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            self.interruptions += 1
            raise _UnreachableError(f"{type(error).__name__}: {error}") from error
        except httpx.TimeoutException as error:
            raise _WrongAnswerError(f"no answer within {self._request_timeout:g} s ({type(error).__name__})") from error
        except httpx.RequestError as error:
            self.interruptions += 1
            kind = _WrongAnswerError if has_begun else _UnreachableError
            raise kind(f"{type(error).__name__}: {error}") from error
        if response.status_code in _NOT_THERE:
            self.interruptions += 1
            raise _UnreachableError(f"status {response.status_code}: {_excerpt(content)}")
        if response.status_code >= 500 or response.status_code in (408, 425, 429):
            raise _WrongAnswerError(f"status {response.status_code}: {_excerpt(content)}")
        if response.status_code >= 300:
            raise RequestRefusedError(
                f"the vLLM server at {self.base_url} refused {method} {path} with status {response.status_code}: "
                f"{_excerpt(content)}"
            )
        if parse is None:
            return None
        try:
            return parse(json.loads(content) if content else None)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise _WrongAnswerError(
                f"an answer that can't be used ({type(error).__name__}: {error}): {_excerpt(content)}"
            ) from error

    def _log(self, call: str, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        logger.warning("%s of the vLLM server at %s is tried again: %s", call, self.base_url, error)


def spread(
    servers: Sequence[VLLMServer], items: Sequence[Item], call: Callable[[VLLMServer, Item], T], first: int = 0
) -> list[T]:
    """Return `call(server, item)` for each item, in their order; the calls run at once, over the servers in turn.

    `first` is the server of the first item. The first call that raises ends the rest that has not started.
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


class _TransientError(Exception):
    """What may go away by asking again."""


class _UnreachableError(_TransientError):
    pass


class _WrongAnswerError(_TransientError):
    pass


def _excerpt(content: bytes | bytearray, length: int = 300) -> str:
    text = bytes(content[: length + 1]).decode(errors="replace")
    return f"{text[:length]}…" if len(text) > length else text or "an empty answer"
