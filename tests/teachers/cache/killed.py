"""A process that writes a cache and kills itself before one of its file operations."""

import os
import signal
import warnings

from gkd_trainer.teachers.cache import read_manifest
from tests.teachers.cache.rows import make_rows, write


def write_and_die(folder, at):
    """Write a shard per row; die before operation number `at`, counting each sync to disk and each rename."""
    count = 0

    def counted(operation):
        def run(*args, **kwargs):
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)

        return run

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    write(folder, make_rows(40), shard_mb=1e-6, batch_size=1)


def death(folder, at):
    """Return the signal that ended such a process, and how many rows its manifest lists."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, from Python 3.12 on: the child needs none
        child = os.fork()
    if child == 0:
        signal.alarm(60)
        write_and_die(folder, at)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    has_manifest = (folder / "manifest.json").exists()
    return os.WTERMSIG(status), len(read_manifest(folder).shards) if has_manifest else 0
