"""Completions to read: printed as they are, and sent to the active trackers."""

import html
import io
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback

from gkd_trainer.report.completions import CompletionRow, completion_rows, print_completions, send_completions
from gkd_trainer.types import Completion, Generated

ROWS = [
    CompletionRow("student", "What is [i][0], [1]?", "It is [bold]1[/bold], or [/red] so.", True),
    CompletionRow("teacher", "a|b\nc", "one | two", False),
]


def printed(rows, title="Completions at step 7", width=100):
    console = Console(record=True, width=width, file=io.StringIO())
    print_completions(rows, title, console)
    return console.export_text()


def test_rows_are_decoded_with_their_special_tokens(byte_level):
    tokenizer = byte_level()
    prompt = tokenizer("<|im_start|>user\nhello there<|im_end|>\n")["input_ids"]
    completion = tokenizer("I am fine<|im_end|>")["input_ids"]
    generated = [
        Generated(prompt, Completion(completion, True), True),
        Generated(prompt, Completion(completion[:-1], False), False),
    ]
    assert completion_rows(generated, tokenizer) == [
        CompletionRow("student", "<|im_start|>user\nhello there<|im_end|>\n", "I am fine<|im_end|>", True),
        CompletionRow("teacher", "<|im_start|>user\nhello there<|im_end|>\n", "I am fine", False),
    ]


def test_without_a_tokenizer_rows_are_token_ids():
    [row] = completion_rows([Generated([5, 6], Completion([7, 2], True), True)], None)
    assert (row.prompt, row.completion) == ("5 6", "7 2")


def test_the_table_has_its_title_and_says_who_generated_what_and_how_it_ended():
    text = printed(ROWS)
    assert "Completions at step 7" in text
    student, teacher = (next(line for line in text.splitlines() if who in line) for who in ("student", "teacher"))
    assert "yes" in student
    assert "cut off" in teacher


def test_brackets_in_a_completion_are_printed_not_read_as_markup():
    text = printed(ROWS)
    assert "What is [i][0], [1]?" in text
    assert "It is [bold]1[/bold], or [/red] so." in text


def test_a_long_completion_is_folded_not_cut():
    text = printed([CompletionRow("student", "p", "x" * 500, True)])
    assert text.count("x") == 500


class Writer:
    def __init__(self):
        self.texts = []

    def add_text(self, *args):
        self.texts.append(args)


def tensorboard_callback(writer):
    callback = TensorBoardCallback.__new__(TensorBoardCallback)  # its __init__ needs tensorboard installed
    callback.tb_writer = writer
    return callback


def test_tensorboard_gets_a_markdown_table_whose_cells_stay_cells():
    writer = Writer()
    send_completions(ROWS, 7, [TrainerCallback(), tensorboard_callback(writer)])
    [(tag, text, step)] = writer.texts
    assert (tag, step) == ("completions", 7)
    lines = text.split("\n")
    assert lines[0] == "| generated_by | prompt | completion | is_finished |"
    assert lines[1] == "| --- | --- | --- | --- |"
    assert html.unescape(lines[2]) == "| student | What is [i][0], [1]? | It is [bold]1[/bold], or [/red] so. | True |"
    assert "[" not in lines[2]
    assert lines[3] == "| teacher | a&#124;b<br>c | one &#124; two | False |"
    assert len(lines) == 4


def test_a_completion_is_text_in_tensorboard_whatever_markdown_it_holds():
    writer = Writer()
    prompt = "![x](http://evil/p.png)\r\n`one` 2*3*4 __init__"
    completion = "<img src=x>\ra \\|x\\| `b`\x1b[2J"
    send_completions([CompletionRow("student", prompt, completion, True)], 7, [tensorboard_callback(writer)])
    [(_, text, _)] = writer.texts
    cells = text.split("\n")[2].split(" | ")
    assert len(cells) == 4
    for cell, written in zip(cells[1:3], (prompt, completion), strict=True):
        assert not set("![]`*_<>\\~") & set(cell.replace("<br>", ""))
        expected = written.replace("\r\n", "\n").replace("\r", "\n").replace("\x1b", "\u241b")
        assert html.unescape(cell.replace("<br>", "\n")) == expected


def test_tensorboard_without_a_writer_yet_gets_nothing():
    send_completions(ROWS, 7, [tensorboard_callback(None)])


@pytest.mark.parametrize("is_running", [True, False])
def test_wandb_gets_a_table_only_while_a_run_is_active(monkeypatch, is_running):
    logged = []
    fake = SimpleNamespace(
        run=object() if is_running else None,
        Table=lambda columns, data: (columns, data),
        log=lambda values, commit: logged.append((values, commit)),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    send_completions(ROWS, 7, [])
    columns = ["generated_by", "prompt", "completion", "is_finished"]
    data = [[row.generated_by, row.prompt, row.completion, row.is_finished] for row in ROWS]
    # Not committed: the metrics of the same step follow.
    assert logged == ([({"completions": (columns, data)}, False)] if is_running else [])


def test_wandb_is_not_imported_for_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    send_completions(ROWS, 7, [])
    assert "wandb" not in sys.modules


def test_a_completion_can_not_control_the_terminal():
    console = Console(file=io.StringIO(), width=80)
    print_completions([CompletionRow("student", "\x1b[2Jprompt", "\x1b]0;title\x07", True)], console=console)
    text = console.file.getvalue()
    assert "\x1b" not in text
    assert "␛[2Jprompt" in text
