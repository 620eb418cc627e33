"""Private folders: removed when closed, when their process ends in any way, or by the next one."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from gkd_trainer.rollouts import private_folder as folders
from gkd_trainer.rollouts.private_folder import PrivateFolder, remove_dead

# The module is imported by its file: with its package would come torch, which takes seconds.
OWNER = """
import importlib.util, signal, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("private_folder", {file!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
PrivateFolder = module.PrivateFolder

{before}
folder = PrivateFolder(sys.argv[1])
(folder.path / "weights").mkdir()
(folder.path / "weights" / "model.safetensors").write_bytes(b"weights")
{after}
print(folder.path, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def owner(tmp_path):
    """Start a process that owns a folder, and return it with the folder's path."""
    started = []

    def start(before="", after=""):
        code = OWNER.format(file=folders.__file__, before=before, after=after)
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        path = Path(process.stdout.readline().strip())
        assert (path / "weights" / "model.safetensors").exists()
        return process, path

    yield start
    for process in started:
        process.kill()
        process.communicate()


def is_gone(path, seconds=10.0):
    deadline = time.monotonic() + seconds
    while path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not path.exists()


def remover_of(path):
    """The shell that waits to remove a folder."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for entry in Path("/proc").iterdir():
            try:
                arguments = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
            except OSError:
                continue
            if arguments[:1] == [b"/bin/sh"] and str(path).encode() in arguments:
                return int(entry.name)
    raise AssertionError(f"no process waits to remove {path}")


def has_ended(pid):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if not Path(f"/proc/{pid}/cmdline").read_bytes():  # nobody has asked for its status yet
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


SIGNALS = [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, signal.SIGQUIT, signal.SIGABRT]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_process_that_a_signal_ends_leaves_no_folder_and_ends_by_that_signal(owner, number):
    process, path = owner(before="import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))")
    remover = remover_of(path)
    process.send_signal(number)
    assert process.wait(timeout=60) == -number
    assert is_gone(path)
    assert has_ended(remover)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_to_all_processes_of_a_job_leaves_no_folder(owner, number):
    process, path = owner()
    os.kill(remover_of(path), number)
    process.send_signal(number)
    process.wait(timeout=60)
    assert is_gone(path)


@pytest.mark.parametrize("place", ["before", "after"])
def test_the_users_own_handler_is_called_and_decides(owner, place):
    # Not printed: the signal may come while the process is printing.
    handler = "import os; signal.signal(signal.SIGTERM, lambda *_: os.write(1, b'%d\\n' % folder.path.exists()))"
    process, path = owner(**{place: handler})
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "1\n"
    process.communicate("\n", timeout=60)
    assert process.returncode == 0
    assert is_gone(path)


def test_handlers_are_as_they_were(tmp_path):
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    folder = PrivateFolder(str(tmp_path))
    assert [signal.getsignal(number) for number in numbers] == before
    folder.close()


def test_an_ignored_signal_is_still_ignored(owner):
    process, path = owner(before="signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.3)
    assert (path / "weights" / "model.safetensors").exists()


def test_a_folder_is_private_to_the_user_and_removed_when_closed(tmp_path):
    folder = PrivateFolder(str(tmp_path))
    assert folder.path.parent == tmp_path
    assert folder.path.stat().st_mode & 0o777 == 0o700
    remover = remover_of(folder.path)
    (folder.path / "a").write_text("a")
    folder.close()
    assert list(tmp_path.iterdir()) == []
    assert has_ended(remover)
    folder.close()


def test_closing_does_not_wait_for_forks_that_hold_the_pipe(tmp_path):
    folder = PrivateFolder(str(tmp_path))
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        started = time.monotonic()
        folder.close()
        assert time.monotonic() - started < 2
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not folder.path.exists()


def test_a_fork_that_ends_takes_no_folder_with_it(tmp_path):
    code = """
import os, sys
from gkd_trainer.rollouts.private_folder import PrivateFolder
folder = PrivateFolder(sys.argv[1])
child = os.fork()
if child == 0:
    sys.exit()  # with all that Python does at an end
os.waitpid(child, 0)
assert folder.path.exists()
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
    assert list(tmp_path.iterdir()) == []


# What was left nevertheless


@pytest.fixture
def left(owner):
    """A folder whose owner was killed together with what was to remove it."""
    process, path = owner()
    remover = remover_of(path)
    os.kill(remover, signal.SIGKILL)
    process.kill()
    process.wait()
    assert (path / "weights" / "model.safetensors").exists()
    return path


def test_a_folder_whose_owner_and_remover_were_killed_is_removed_with_the_next_one(left, tmp_path):
    folder = PrivateFolder(str(tmp_path))
    assert not left.exists()
    assert list(tmp_path.iterdir()) == [folder.path]
    folder.close()


def test_a_folder_of_a_living_owner_stays(owner, tmp_path):
    _, path = owner()
    with closing(PrivateFolder(str(tmp_path))):
        assert (path / "weights" / "model.safetensors").exists()


def test_a_folder_of_another_machine_stays(left, tmp_path):
    (left / ".lock").write_text("the boot of another machine")
    remove_dead(tmp_path)
    assert (left / "weights" / "model.safetensors").exists()


def test_a_folder_without_a_lock_stays(left, tmp_path):
    """Such as one that is being made."""
    (left / ".lock").unlink()
    remove_dead(tmp_path)
    assert (left / "weights" / "model.safetensors").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user, which root alone may")
def test_a_folder_of_another_user_stays(left, tmp_path):
    os.chown(left, 12345, 12345)
    remove_dead(tmp_path)
    assert (left / "weights" / "model.safetensors").exists()


def test_links_are_not_followed(left, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    (left / "link").symlink_to(outside)
    (tmp_path / "gkd-trainer-link").symlink_to(outside)
    shutil.copy(left / ".lock", outside / ".lock")
    remove_dead(tmp_path)
    assert not left.exists()
    assert (outside / "precious").exists()


def test_a_lock_is_held_from_the_moment_that_its_file_is_there(tmp_path, monkeypatch):
    """Else the folder would seem dead for a moment."""
    seen = []
    rename = Path.rename

    def watched(self, target):
        rename(self, target)
        with open(target, "r+b") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen.append(target)

    monkeypatch.setattr(Path, "rename", watched)
    folder = PrivateFolder(str(tmp_path))
    assert seen == [folder.path / folders._LOCK]
    folder.close()
