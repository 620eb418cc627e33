"""`gkd-trainer compare` as users call it."""

import json

import pytest

from gkd_trainer.cli import main
from tests.cli.command import ROWS, exit_of, write_rows
from tests.report.test_page import data_of


@pytest.fixture
def command(tmp_path, pair, rows_file, monkeypatch):
    """The command that compares the student and the teacher with the teacher, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    models = [str(tmp_path / name) for name in ("student", "teacher")]
    options = ["--teacher", models[1], "--dataset", str(rows_file), "--max-new-tokens", "4", "--use-cpu"]
    return ["compare", *models, *options]


def test_students_are_printed_and_drawn(command, tmp_path, capsys):
    main([*command, "--samples", "2", "--rows", "3"])
    out = capsys.readouterr().out
    assert "Compared with teacher on 3 rows" in out
    [line] = [line for line in out.splitlines() if "forward KL, data's text" in line]
    student, teacher = (float(cell) for cell in line.split("│")[2:4])
    assert teacher == 0
    assert student > 0
    assert "one and one is" in out
    page = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert set(data_of(page)["sides"]) == {"0-0", "0-1", "1-0", "1-1"}


def test_the_task_is_scored_on_gsm8ks_rows(command, tmp_path, capsys):
    rows = [{"question": f"{n} + 1?", "answer": f"It is #### {n + 1}"} for n in range(2)]
    path = write_rows(tmp_path / "gsm8k.jsonl", rows)
    main([*command, "--dataset", str(path), "--samples", "0", "--output_file", "page.html"])
    assert "task score (share of completions)" in capsys.readouterr().out
    assert (tmp_path / "page.html").exists()


def test_rows_that_do_not_fit_the_shortest_context_are_left_out_for_all_students(command, tmp_path, tiny_model, capsys):
    tiny_model(max_position_embeddings=24).save_pretrained(tmp_path / "student")
    rows = [*ROWS, {"prompt": "a " * 30, "completion": " b"}, {"prompt": "a", "completion": " b" * 30}]
    path = write_rows(tmp_path / "long.jsonl", [rows[4], *ROWS, rows[5]])
    models = [command[2], command[1]]  # the shorter context is the second's
    main(["compare", *models, *command[3:], "--dataset", str(path), "--samples", "1"])
    note = "Left out: 2 rows that exceed the shortest context (24 tokens), either as they are or as a prompt with 4 new"
    note += " tokens."
    out = capsys.readouterr().out
    assert "Compared with teacher on 4 rows" in out
    assert note in " ".join(out.split())
    assert "one and one is" in out
    assert f"4 rows of the data. {note}" in (tmp_path / "comparison.html").read_text(encoding="utf-8")


def test_rows_of_which_none_fits_are_refused(command, capsys):
    code, error = exit_of([*command, "--max_new_tokens", "100000"], capsys)
    assert code == 1
    assert "expected rows that fit the shortest context of the models" in error
    assert "lower max_new_tokens" in error


def test_folders_of_one_name_are_told_apart(command, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "student").rename(tmp_path / "run" / "teacher")
    main(["compare", str(tmp_path / "run" / "teacher"), *command[2:], "--rows", "1"])
    out = capsys.readouterr().out
    assert "run/teacher" in out
    assert f"{tmp_path.name}/teacher" in out.replace("\n", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "0"], "--rows must be at least 1; got 0"),
        (["--batch_size", "0"], "--batch_size must be at least 1; got 0"),
        (["--max_new_tokens", "-1"], "--max_new_tokens must be at least 1; got -1"),
        (["--samples", "-1"], "--samples must be 0 or more; got -1"),
        (["--teacher", "no/such"], "could not load the teacher from 'no/such'"),
        (["--dataset", "none.jsonl"], "there is no file none.jsonl"),
        (["--output_file", "none/page.html"], "--output_file: expected a file in a folder that exists"),
    ],
    ids=str,
)
def test_bad_input_is_refused(command, options, message, capsys):
    code, error = exit_of([*command, *options], capsys)
    assert code == 1
    assert message in error


def test_a_student_that_can_not_be_loaded_is_named(command, capsys):
    code, error = exit_of(["compare", "no/such", *command[2:]], capsys)
    assert (code, "could not load the student from 'no/such'" in error) == (1, True)


def test_missing_options_are_named(command, capsys):
    code, error = exit_of(["compare", "model"], capsys)
    assert code == 2
    assert "the following options are required: --teacher, --dataset" in error


def test_a_misspelt_option_is_named_with_the_one_probably_meant(capsys):
    code, error = exit_of(["compare", "model", "--techer", "x", "--max-new-token=3"], capsys)
    assert code == 2
    assert "--techer (did you mean --teacher?), --max-new-token (did you mean --max_new_tokens?)" in error


def test_help_is_like_that_of_the_other_commands(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    text = capsys.readouterr().out
    assert "  --max_new_tokens INT" in text
    assert "--max-new-tokens" not in text
    assert "\n  MODEL " in text
    assert "(default: None)" not in text
    assert "(default: 8)" in text
    assert "Options may be written with - instead of _." in text


def test_a_broken_line_of_the_data_is_named(command, tmp_path, capsys):
    (tmp_path / "broken.jsonl").write_text(json.dumps({"prompt": "a"}) + '\n{"prompt": \n')
    code, error = exit_of([*command, "--dataset", str(tmp_path / "broken.jsonl")], capsys)
    assert code == 1
    assert "broken.jsonl, line 2" in error
