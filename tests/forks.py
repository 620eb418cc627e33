"""Runs in processes of their own, forked from one that has imported what they need.

The imports of one process take longer than most of these runs. As a program, this is the process that forks.
"""

import atexit
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.serving import free_port

ROOT = Path(__file__).parents[1]
GRACE = 30.0
"""Seconds that ranks have to end by themselves once another has failed."""


def run_ranks(module, *folders, ranks=1, environment=None, timeout=240.0):
    """Call a module's `main` on folders in as many ranks, and return the finished process, as `subprocess.run` does.

    The code is that of the first rank that failed; what the ranks have written is together in `stderr`.
    """
    environment = environment or {}
    server = _server(tuple(sorted(environment.items())))
    with tempfile.NamedTemporaryFile() as output:
        order = {
            "module": module,
            "folders": list(map(str, folders)),
            "output": output.name,
            "ranks": ranks,
            "port": free_port(),
            "timeout": timeout,
            "environment": os.environ | environment,
        }
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        written = output.read().decode(errors="replace")
    if not answer:
        raise RuntimeError(f"the process that forks ranks has ended: {written}")
    return subprocess.CompletedProcess([module, *folders], json.loads(answer), stderr=written)


@functools.cache
def _server(environment):
    """The process that forks ranks in an environment, which decides what its imports find."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.forks"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | dict(environment),
    )
    atexit.register(server.kill)
    return server


def _become_rank(order, rank):
    os.environ.clear()
    os.environ.update(order["environment"])
    if order["ranks"] > 1:
        sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(order["ranks"]))
        indices = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
        os.environ.update(sizes, **indices, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(order["port"]))
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, order["output"], os.O_WRONLY | os.O_APPEND),
        (2, order["output"], os.O_WRONLY | os.O_APPEND),
    ):
        os.dup2(os.open(path, flags), descriptor)


def _code_of(processes, timeout):
    """Wait for all processes, and return the code of the first that failed. Kill those that are late."""
    running, failed, deadline = set(processes), 0, time.monotonic() + timeout
    while running:
        for process in list(running):
            ended, status = os.waitpid(process, os.WNOHANG)
            if not ended:
                continue
            running.remove(process)
            if not failed and status:
                failed, deadline = os.waitstatus_to_exitcode(status), min(deadline, time.monotonic() + GRACE)
        if time.monotonic() > deadline:
            for process in running:
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)
    return failed


def main():
    importlib.import_module("transformers.models.llama.modeling_llama")
    importlib.import_module("tests.trainer.run")

    for line in sys.stdin:
        order, processes = json.loads(line), []
        for rank in range(order["ranks"]):
            process = os.fork()
            if not process:  # the rank, which ends as any program does
                _become_rank(order, rank)
                return importlib.import_module(order["module"]).main(*map(Path, order["folders"]))
            processes.append(process)
        print(_code_of(processes, order["timeout"]), flush=True)


if __name__ == "__main__":
    main()
