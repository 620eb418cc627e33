"""How the command is called, and how it ends: help, exit statuses, signals, one message without a traceback."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gkd_trainer.cli.entry import COMMANDS, main
from gkd_trainer.errors import GKDConfigError
from tests.cli.command import exit_of


def test_help_imports_neither_torch_nor_transformers():
    script = (
        "import sys; from gkd_trainer.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stopped: assert stopped.code == 0\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'trl'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "distil a teacher into a student" in result.stdout
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("argv", [[], ["trian"], ["train", "--betta", "1"], ["train", "--beta", "much"]])
def test_arguments_that_cannot_be_parsed_exit_2(argv, capsys):
    code, error = exit_of(argv, capsys)
    assert code == 2
    assert "usage: gkd-trainer" in error


@pytest.mark.parametrize("command", [["-m", "gkd_trainer"], ["-m", "gkd_trainer.cli"]])
def test_the_package_is_run_like_the_command(command):
    result = subprocess.run([sys.executable, *command, "train", "--betta", "1"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("gkd-trainer train: error: unrecognized arguments: --betta")


def run_until(argv, is_reached, number):
    """Run the command in a process of its own, send a signal when something is reached; return how it ended."""
    command = [sys.executable, "-m", "gkd_trainer", "train", *argv]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not is_reached() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        _, error = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, error


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_with_one_line_that_says_how_to_resume_it(number, status, pair, data, tmp_path):
    output = tmp_path / "output"
    own = [*pair, *data, "--max_steps", "100000", "--save_steps", "5", "--save_only_model"]
    code, error = run_until(own, lambda: (output / "checkpoint-10" / "trainer_state.json").exists(), number)
    assert code == status
    assert "Traceback" not in error
    last = error.splitlines()[-1]
    assert last.startswith(
        f"gkd-trainer train: {'interrupted' if status == 130 else 'terminated'}: {output}/checkpoint-"
    )
    assert last.endswith(" is saved: to resume from it, add --resume_from_checkpoint true")


def test_a_signal_before_the_first_checkpoint_reports_that_none_was_saved(pair, data, tmp_path):
    own = [*pair, *data, "--max_steps", "100000", "--save_strategy", "no", "--report_to", "tensorboard"]
    code, error = run_until(own, lambda: (tmp_path / "output" / "runs").exists(), signal.SIGINT)
    assert code == 130
    assert "no checkpoint was saved in" in error.splitlines()[-1]


def test_a_user_error_prints_no_traceback(pair, data):
    command = [Path(sys.executable).with_name("gkd-trainer"), "train", *pair, *data, "--temperature", "0"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("gkd-trainer train: error: temperature must be above 0")
    assert "Traceback" not in result.stderr


class Scripted:
    """A command that raises what it is given."""

    SUMMARY = "fail"

    def __init__(self, error):
        self.error = error

    def run(self, arguments):
        self.error.add_note("rank 0 said so")
        raise self.error


def test_an_error_of_any_command_is_printed_with_its_notes_and_the_commands_name(monkeypatch, capsys):
    monkeypatch.setitem(COMMANDS, "fail", Scripted(GKDConfigError("beta is wrong")))
    assert exit_of(["fail"], capsys) == (1, "gkd-trainer fail: error: beta is wrong. rank 0 said so\n")


@pytest.mark.parametrize(("rank", "told"), [("0", "\ngkd-trainer fail: interrupted: rank 0 said so\n"), ("1", "")])
def test_only_the_first_rank_reports_an_interrupt(rank, told, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setitem(COMMANDS, "fail", Scripted(KeyboardInterrupt()))
    assert exit_of(["fail"], capsys) == (130, told)


def test_an_error_that_is_not_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setitem(COMMANDS, "fail", Scripted(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["fail"])


def test_a_command_leaves_the_handler_of_sigterm_as_it_was(monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setitem(COMMANDS, "fail", Scripted(GKDConfigError("beta is wrong")))
    exit_of(["fail"], capsys)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_every_command_with_its_summary(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert f"    {name} " in (text := capsys.readouterr().out)
    assert COMMANDS[name].SUMMARY in text
