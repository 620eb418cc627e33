"""Folders for passing weights to an engine, removed however the process ends."""

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
"""The file that a folder's living owner holds a lock on, and that names the owner's machine."""

_REMOVER = 'read -r _; exec rm -rf -- "$1"'
"""Waits for a line, or for the end of its input, when the process that holds the pipe ends."""


class PrivateFolder:
    """A new folder with an unpredictable name that only this user can enter.

    It is removed by `close`, with this object, and when this process ends in any way: a small shell process waits for
    that. There is no signal handler, so those of the user and of frameworks stay in place. If the shell was killed too,
    as when a container is, the folder is removed when the next one is made in the same parent on this machine.

    Args:
        parent: The folder to make it in; None for the system's temporary folder.
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
    """Remove this user's folders in `parent`, made on this machine since it booted, whose owners have ended.

    A folder names its machine, since not all file systems that machines share show a lock to other machines.
    """
    if fcntl is None:
        return
    for folder in parent.glob(f"{_PREFIX}*"):
        # The folder may vanish meanwhile, or not be ours.
        with contextlib.suppress(OSError), _dead(folder) as is_dead:
            if is_dead:
                logger.info("Removing %s, whose owner has ended.", folder)
                # The lock last, so that the next call finds what is left after a failure here.
                for path in folder.iterdir():
                    if path.name != _LOCK:
                        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                shutil.rmtree(folder)


@contextlib.contextmanager
def _dead(folder: Path) -> Iterator[bool]:
    """Yield whether the owner of a folder of this user and machine has ended; hold the folder's lock meanwhile."""
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
    # Under another name until locked: otherwise the folder would seem dead for a moment.
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
    """Return an id that all processes on this machine share, also in containers, until it reboots."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        return None


def _start_remover(folder: Path) -> subprocess.Popen[bytes] | None:
    if fcntl is None:
        return None
    # Signals blocked here stay blocked in the new process: a signal to all processes of a job must not end it.
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
        logger.debug("No process waits to remove %s: %s", folder, error)
        return None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _remove(folder: Path, lock: BinaryIO | None, remover: subprocess.Popen[bytes] | None, owner: int) -> None:
    if os.getpid() != owner:  # a fork, whose parent still uses the folder
        return
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        lock.close()
    if remover is not None:
        # A line, not only the end of input: forks, such as a data loader's workers, may hold the pipe open for longer.
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            remover.communicate(b"\n", timeout=10)
