"""`gkd-trainer report` as users call it."""

import pytest

from gkd_trainer.cli import main
from gkd_trainer.cli.report import distinct_names
from tests.cli.command import exit_of
from tests.report.samples import record, write_records, write_state
from tests.report.test_page import data_of


def test_a_run_of_the_command_has_a_report(pair, data, tmp_path, capsys):
    main(["train", *pair, *data, "--report_samples", "1", "--logging_steps", "1", "--use_cpu"])
    capsys.readouterr()
    main(["report", str(tmp_path / "output")])
    path = tmp_path / "output" / "_report.html"
    assert capsys.readouterr().out == f"{path}: {path.stat().st_size / 1e6:.2f} MB\n"
    page = path.read_text(encoding="utf-8")
    assert [entry["step"] for entry in data_of(page)["entries"]] == [1, 2]
    assert "not finished" not in page
    assert "student" in page


def test_several_folders_make_one_file_in_the_last(tmp_path, capsys):
    for name in ("first", "second"):
        write_state(tmp_path / name / "trainer_state.json", (10, 40), divergence_off_policy=1.0)
    main(["report", str(tmp_path / "first"), str(tmp_path / "second")])
    page = (tmp_path / "second" / "_report.html").read_text()
    assert "first → second" in page
    assert not (tmp_path / "first" / "_report.html").exists()


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_state(tmp_path / "run" / "trainer_state.json", (10, 40), divergence_off_policy=1.0)
    main(["report", "~/run", "--output_file=~/page.html"])
    assert (tmp_path / "page.html").is_file()


def test_folders_of_one_name_are_told_apart(tmp_path):
    for name in ("first", "second"):
        write_state(tmp_path / name / "out" / "trainer_state.json", (10, 40), divergence_off_policy=1.0)
    main(["report", str(tmp_path / "first" / "out"), str(tmp_path / "second" / "out")])
    page = (tmp_path / "second" / "out" / "_report.html").read_text()
    assert "<h1>first/out → second/out</h1>" in page
    assert '<th scope="col">first/out</th><th scope="col">second/out</th>' in page


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (["/a/run/checkpoint-1", "/b/run/checkpoint-1"], ["a/run/checkpoint-1", "b/run/checkpoint-1"]),
        (["/a/x", "/b/x", "/c/y"], ["a/x", "b/x", "y"]),
        (["/x", "/a/x"], ["/x", "a/x"]),
        (["/a/x", "/a/x/", "/b/x"], ["a/x (1)", "a/x (2)", "b/x"]),
        (["/a/x", "/a/x"], ["x (1)", "x (2)"]),
        (["org/model", "org/other"], ["org/model", "org/other"]),
        (["org/model", "org/model"], ["org/model (1)", "org/model (2)"]),
        (["gpt2", "/a/gpt2"], ["gpt2", "a/gpt2"]),
    ],
)
def test_every_model_or_folder_has_a_name_of_its_own(models, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert distinct_names(models) == names


def test_a_misspelt_option_is_named_with_the_one_probably_meant(capsys):
    code, error = exit_of(["report", "folder", "--output-fil", "x"], capsys)
    assert (code, "--output-fil (did you mean --output_file?)" in error) == (2, True)


def test_the_file_may_be_named(tmp_path):
    write_records(tmp_path, [record(1)])
    main(["report", str(tmp_path), "--output-file", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["report"], 2, "the following arguments are required: OUTPUT_DIR"),
        (["report", "no/such"], 1, "gkd-trainer report: error: expected the output_dir of a run; there is no folder"),
        (["report", "."], 1, "has no log entries"),
        (
            ["report", "run", "--output_file", "none/page.html"],
            1,
            "--output_file: expected a file in a folder",
        ),
        (["report", "run", "--output", "page.html"], 2, "unrecognized arguments: --output"),
    ],
    ids=str,
)
def test_bad_input_is_refused(arguments, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_state(tmp_path / "run" / "trainer_state.json", (40,))
    found, error = exit_of(arguments, capsys)
    assert found == code
    assert message in error
