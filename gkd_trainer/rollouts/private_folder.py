"""Folders through which weights pass to an engine, removed however the process ends."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, which vLLM does not run on
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_PREFIX = "gkd-trainer-"

_LOCK = ".lock"
"""The file in a folder on which its owner holds a lock while it lives, and which names the owner's machine."""

_REMOVER = 'read -r _; exec rm -rf -- "$1"'
"""Waits for a line, or the end of its input, which comes with the end of the process that holds the pipe."""


class PrivateFolder:
    """A new folder with an unpredictable name that only this user can enter.

    It is removed by `close`, with this object, and when this process ends, in whatever way: a small shell process waits
    for that. No signal handler is involved, so that those of the user and of frameworks stay as they are. Where the
    shell was killed too, as with a whole container, the next folder that is made beside it on this machine removes it.

    Args:
        parent: The folder to make it in; None for the system's folder of temporary files.
    """

    def __init__(self, parent: str | None = None) -> None:
        remove_dead(Path(parent or tempfile.gettempdir()))
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        lock = _locked(self.path)
        remover = _start_remover(self.path)
        self._close = weakref.finalize(self, _remove, self.path, lock, remover, os.getpid())

    def close(self) -> None:
        """Remove the folder; a second call does nothing."""
        self._close()


def remove_dead(parent: Path) -> None:
    """Remove the folders in `parent` whose owners have ended: this user's, made on this machine since it started.

    A folder on a file system that several machines share says which made it, since not all such file systems show a
    lock to other machines.
    """
    if fcntl is None:
        return
    for folder in parent.glob(f"{_PREFIX}*"):
        # It may vanish meanwhile, or not be ours.
        with contextlib.suppress(OSError), _dead(folder) as is_dead:
            if is_dead:
                logger.info("Removing %s, whose owner has ended.", folder)
                # The lock last, so that what a second failure leaves is found again.
                for path in folder.iterdir():
                    if path.name != _LOCK:
                        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                shutil.rmtree(folder)


@contextlib.contextmanager
def _dead(folder: Path) -> Iterator[bool]:
    """Yield whether nobody holds the lock of a folder of this user and machine, and hold it meanwhile."""
    status = folder.lstat()
    machine = _machine()
    if machine is None or folder.is_symlink() or status.st_uid != os.geteuid():
        yield False
        return
    with os.fdopen(os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW), "r+b") as lock:
        if lock.read() != machine:
            yield False
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _locked(folder: Path) -> BinaryIO | None:
    machine = _machine()
    if fcntl is None or machine is None:
        return None
    # Under another name until it is locked: without a lock, the folder would seem dead for a moment.
    new = folder / f"{_LOCK}.new"
    lock = new.open("w+b")
    try:
        lock.write(machine)
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        new.rename(folder / _LOCK)
    except OSError as error:  # a file system without locks
        logger.debug("%s has no lock: %s", folder, error)
        lock.close()
        new.unlink(missing_ok=True)
        return None
    return lock


def _machine() -> bytes | None:
    """Return an id that all processes on this machine share, in containers too, until it restarts."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        return None


def _start_remover(folder: Path) -> subprocess.Popen[bytes] | None:
    if fcntl is None:
        return None
    # Signals blocked here stay blocked in the new process: those that end all processes of a job must not end it.
    numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        return subprocess.Popen(
            ["/bin/sh", "-c", _REMOVER, "sh", str(folder.absolute())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        logger.debug("Nothing waits to remove %s: %s", folder, error)
        return None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _remove(folder: Path, lock: BinaryIO | None, remover: subprocess.Popen[bytes] | None, owner: int) -> None:
    if os.getpid() != owner:  # a fork, which ends before its parent
        return
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        lock.close()
    if remover is not None:
        # A line: forks, such as a data loader's workers, may hold the pipe open for longer.
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            remover.communicate(b"\n", timeout=10)
