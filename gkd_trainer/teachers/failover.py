"""Calls that any of several servers can answer: one that can't be reached is left out for a while."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay

from gkd_trainer.errors import GKDServerError
from gkd_trainer.vllm_client import UnreachableError, VLLMServer, next_pause

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_REST, _LONGEST_REST = 2.0, 60.0
"""How many seconds a server that could not be reached is left out: short after one lost connection, and longer each
time, since it takes seconds to find that a machine is gone."""


class Failover:
    """Servers that give the same answers; threads may share it.

    Args:
        servers: The servers, at least one.
        server_timeout: Seconds to keep trying if none of them can be reached.
    """

    def __init__(self, servers: Sequence[VLLMServer], server_timeout: float) -> None:
        self._servers, self._server_timeout = list(servers), server_timeout
        self._rests: dict[VLLMServer, _Rest] = {}
        self._lock = threading.Lock()

    def available(self) -> list[VLLMServer]:
        """Return the servers that were not found unreachable a moment ago; all of them if none is left."""
        now = time.monotonic()
        with self._lock:
            found = [server for server in self._servers if server not in self._rests or self._rests[server].end <= now]
        return found or self._servers

    def call(self, preferred: VLLMServer, call: Callable[[VLLMServer], T]) -> T:
        """Return `call(server)` for the preferred server or, if that can't be reached, the next one that can.

        Raises:
            GKDServerError: None could be reached in time, or one gave no valid answer after all retries.
        """
        if len(self._servers) == 1:
            return call(preferred)
        retrying = Retrying(
            retry=retry_if_exception_type(UnreachableError),
            stop=stop_after_delay(self._server_timeout),
            wait=lambda state: next_pause(state, self._server_timeout),
            before_sleep=self._log,
            reraise=True,
        )
        try:
            return retrying(lambda: self._once(preferred, call))
        except UnreachableError as error:
            raise GKDServerError(
                f"none of {self._named()} could be reached for {self._server_timeout:g} s; one of them last failed "
                f"with: {error}. Look at the servers' logs; if they are slow to start, raise vllm_server_timeout"
            ) from error

    def _once(self, preferred: VLLMServer, call: Callable[[VLLMServer], T]) -> T:
        """Ask the servers in order until one can be reached; else raise the error of the first that may be asked."""
        available = self.available()
        errors = []
        for server in sorted(self._servers, key=lambda server: (server not in available, server is not preferred)):
            try:
                answer = call(server.without_waiting())
            except UnreachableError as error:
                self._leave_out(server, error)
                errors.append(error)
            else:
                self._take_back(server)
                return answer
        raise min(errors, key=lambda error: error.pause)

    def _leave_out(self, server: VLLMServer, error: UnreachableError) -> None:
        now = time.monotonic()
        with self._lock:
            last = self._rests.get(server)
            if last is None or last.end <= now:  # or another call has found out at the same time
                seconds = _FIRST_REST if last is None else min(2 * last.seconds, _LONGEST_REST)
                self._rests[server] = _Rest(seconds, now + max(seconds, error.pause))
        if last is None:
            logger.warning(
                "The vLLM server at %s can't be reached (%s): the others take its share until it answers again.",
                server.base_url,
                error,
            )

    def _take_back(self, server: VLLMServer) -> None:
        with self._lock:
            was_left_out = self._rests.pop(server, None) is not None
        if was_left_out:
            logger.warning("The vLLM server at %s answers again.", server.base_url)

    def _log(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        logger.warning("Trying %s again, none of which could be reached: %s", self._named(), error)

    def _named(self) -> str:
        return f"the vLLM servers at {', '.join(server.base_url for server in self._servers)}"


@dataclass(frozen=True)
class _Rest:
    """How long a server is left out, and until when."""

    seconds: float
    end: float
