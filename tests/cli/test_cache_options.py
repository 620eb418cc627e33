"""The options of `gkd-trainer cache`: what is required, and what has no effect."""

import inspect

import pytest

from gkd_trainer import GKDConfig, VLLMServerTeacher
from gkd_trainer.cli import main
from gkd_trainer.cli.cache_options import parse
from gkd_trainer.errors import GKDConfigError
from tests.cli.command import exit_of, write_yaml

REQUIRED = ["--teacher", "t", "--dataset", "d", "--output_dir", "o"]


def test_help_groups_the_options_and_leaves_out_those_of_training(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["cache", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    positions = [text.index(title) for title in ("\ncache:", "\ndata:", "\nteacher:")]
    assert positions == sorted(positions)
    assert "--teacher_model_name_or_path, --teacher TEXT" in text
    assert "--learning_rate" not in text


def test_help_says_how_many_top_tokens_are_stored(capsys):
    with pytest.raises(SystemExit):
        main(["cache", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    of_a_server = inspect.signature(VLLMServerTeacher).parameters["top_k"].default
    assert f"most probable tokens to store, for --kind topk; by default 64, or {of_a_server} from a server" in text
    assert "over the whole vocabulary" not in text


def test_every_required_option_that_is_missing_is_named(capsys):
    code, error = exit_of(["cache", "--kind", "topk"], capsys)
    assert code == 2
    assert "required: --teacher_model_name_or_path or --teacher_server_base_url, --dataset, --output_dir" in error


def test_options_become_a_configuration_without_generated_completions(tmp_path):
    file = write_yaml(
        tmp_path / "a.yaml", max_length=77, kind="hidden_int8", teacher_model_init_kwargs={"dtype": "auto"}
    )
    options = parse([*REQUIRED, "--config", str(file), "--train_on", "last_turn", "--use_cpu"])
    config = options.config
    assert (config.lmbda, config.max_length, config.train_on) == (0.0, 77, "last_turn")
    assert config.teacher_model_init_kwargs == {"dtype": "auto"}
    assert (options.cache.kind, options.cache.batch_size, options.rows.dataset) == ("hidden_int8", 8, "d")


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = write_yaml(tmp_path / "a.yaml", teacher="~/teacher", model="~/student", dataset="~/rows", output_dir="~/out")
    options = parse(["--config", str(file)])
    found = (options.config.teacher_model_name_or_path, options.rows.model_name_or_path, options.rows.dataset)
    assert (*found, options.cache.output_dir) == tuple(
        str(tmp_path / name) for name in ("teacher", "student", "rows", "out")
    )


def test_each_process_that_was_launched_takes_a_part_by_itself(monkeypatch):
    assert parse(REQUIRED).part is None
    assert str(parse([*REQUIRED, "--part", "2/4"]).part) == "2/4"
    monkeypatch.setattr(GKDConfig, "world_size", 8)
    monkeypatch.setattr(GKDConfig, "process_index", 2)
    assert str(parse(REQUIRED).part) == "3/8"
    with pytest.raises(
        GKDConfigError, match=r"each of the 8 processes that were launched takes a part .*: leave part=2/4"
    ):
        parse([*REQUIRED, "--part", "2/4"])


def test_top_tokens_are_64_unless_a_number_is_given():
    assert parse([*REQUIRED, "--kind", "topk"]).config.teacher_top_k == 64
    assert parse([*REQUIRED, "--kind", "topk", "--teacher_top_k", "5"]).config.teacher_top_k == 5
    assert parse(REQUIRED).config.teacher_top_k is None


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ([*REQUIRED, "--kind", "hidden", "--teacher_top_k", "5"], "teacher_top_k=5 has no effect on kind='hidden'"),
        (
            [*REQUIRED[2:], "--teacher_server_base_url", "http://a:1"],
            "with a teacher behind a server, the rows are prepared for the student: set --model",
        ),
        ([*REQUIRED, "--part", "3/2"], "part must be I/N, with I from 1 to N, such as 2/4; got 3/2"),
        ([*REQUIRED, "--max_length", "1"], "max_length must be at least 2"),
    ],
)
def test_options_that_have_no_meaning_together_are_refused(options, problem):
    with pytest.raises(GKDConfigError, match=problem):
        parse(options)
