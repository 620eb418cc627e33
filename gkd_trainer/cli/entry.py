"""The entry of `gkd-trainer`: it runs a command, and turns its end into a message and an exit status."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from gkd_trainer import __version__
from gkd_trainer.cli import cache, compare, report, train
from gkd_trainer.errors import GKDError


class Command(Protocol):
    """A module of this package that implements one command."""

    SUMMARY: str
    """One line for the list of commands."""

    def run(self, arguments: Sequence[str]) -> None:
        """Parse the arguments after the command's name and run the command; heavy imports belong inside."""


COMMANDS: Mapping[str, Command] = {"train": train, "cache": cache, "report": report, "compare": compare}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command of `gkd-trainer`.

    Args:
        argv: The arguments after the program's name; by default those of the process.

    Raises:
        SystemExit: With status 2 for arguments that can't be parsed; 1 after a GKDError, whose message goes to stderr;
            130 or 143 after SIGINT or SIGTERM, with instructions to resume on stderr; 0 after help.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    # A command parses its own options: building them needs the libraries that define them.
    chosen = _command_parser().parse_args(arguments[:1]).command
    try:
        with _terminating_like_an_interrupt():
            COMMANDS[chosen].run(arguments[1:])
    except GKDError as error:
        print(f"gkd-trainer {chosen}: error: {'. '.join([str(error), *_notes(error)])}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt as stop:
        is_terminated = isinstance(stop, _Terminated)
        what = "terminated" if is_terminated else "interrupted"
        if os.environ.get("RANK", "0") == "0":
            # A progress bar leaves its line open.
            print(f"\ngkd-trainer {chosen}: {': '.join([what, *_notes(stop)])}", file=sys.stderr)
        raise SystemExit(128 + (signal.SIGTERM if is_terminated else signal.SIGINT)) from None


def _command_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gkd-trainer",
        description="Distil a large language model (the teacher) into a small one (the student).",
        epilog="`gkd-trainer COMMAND --help` lists a command's options.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.SUMMARY, add_help=False)
    return parser


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers send to stop a run."""


@contextmanager
def _terminating_like_an_interrupt() -> Iterator[None]:
    """Raise _Terminated on SIGTERM if the block runs in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def terminate(number: int, _: object) -> None:
        if os.getpid() == process:
            raise _Terminated
        # A forked worker, such as a data loader's, dies as it would without this handler.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))
