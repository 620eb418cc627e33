"""The parser of a command: groups, aliases, one spelling in help, misspelt options."""

from dataclasses import dataclass, field, fields
from typing import get_type_hints

import pytest

from gkd_trainer.cli.parser import OptionGroup, build_parser, built, with_suggestions
from tests.cli.command import exit_of


@dataclass
class Options:
    """Options of a command."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "The student."})
    is_fast: bool = field(default=False, metadata={"help": "Whether to hurry."})
    rank: int = field(default=4, metadata={"help": "How many."})
    limit: int | None = field(default=7, metadata={"help": "At most; None is no limit."})
    is_careful: bool = field(default=True, metadata={"help": "Whether to look twice."})
    kind: str = field(default="a", metadata={"help": "Which.", "choices": list("abcdef")})
    derived: int = field(default=0, init=False)


HINTS = get_type_hints(Options)


@pytest.fixture
def parser():
    own = fields(Options)
    groups = [OptionGroup("model", own[:1]), OptionGroup("others", own[1:])]
    return build_parser("gkd-trainer test", "gkd-trainer test [OPTION ...]", "Test.", groups, HINTS)


@pytest.mark.parametrize(
    ("argv", "suggestion"),
    [
        (["--betta", "1"], "--betta (did you mean --beta?)"),
        (["--lambda=1"], "--lambda (did you mean --lmbda?)"),
        (["--learning-rat", "1"], "--learning-rat (did you mean --learning_rate?)"),
        (["--studnet", "x", "--qqqqqq", "y"], "arguments: --studnet, --qqqqqq\n"),
        (["x"], "unrecognized arguments: x\n"),
    ],
)
def test_a_misspelt_option_is_named_with_the_one_probably_meant(argv, suggestion, capsys):
    code, error = exit_of(["train", *argv], capsys)
    assert code == 2
    assert suggestion in error


@pytest.mark.parametrize(
    "options",
    [
        ["--teacher_server_api_tokn=hidden-31337"],
        ["--beta", "https://user:hidden-31337@host"],
        ["--model", "https://user:hidden-31337@host/model"],
        ["--teacher", "https://user:hidden-31337@host/model"],
        ["--dataset", "https://user:hidden-31337@host/rows.jsonl"],
        ["--dataset", "https://host/rows.jsonl?sig=hidden-31337&token=hidden-31337"],
        ["--model_init_kwargs", '["hf_hidden31337"]'],
    ],
)
def test_an_error_of_the_command_line_shows_no_secret(options, pair, data, capsys):
    code, error = exit_of(["train", *pair, *data, *options], capsys)
    assert code in (1, 2)
    assert "error: " in error
    assert "hidden" not in error


def test_help_lists_options_by_group_in_one_spelling_with_kind_and_default(parser):
    text = parser.format_help()
    assert text.index("\nmodel:") < text.index("--model_name_or_path, --model TEXT") < text.index("\nothers:")
    assert "  --is_fast [BOOL]" in text
    assert "  --rank INT" in text
    assert "How many. (default: 4)" in text
    assert "--is-fast" not in text
    assert "(default: None)" not in text
    assert "derived" not in text


def test_help_names_many_choices_in_the_text(parser):
    text = " ".join(parser.format_help().split())
    assert "--kind NAME Which. (default: a) One of a, b, c, d, e, f." in text


@pytest.mark.parametrize("spelling", ["--model", "--model_name_or_path", "--model-name-or-path"])
def test_an_option_has_an_alias_and_may_be_written_with_hyphens(parser, spelling):
    options = built(Options, parser.parse_args([spelling, "student", "--is-fast", "--rank", "2"]))
    assert options == Options("student", is_fast=True, rank=2)


@pytest.mark.parametrize("text", ["none", "None", "null"])
def test_a_number_that_may_be_unset_is_unset_by_none(parser, text, capsys):
    assert parser.parse_args(["--limit", text]).limit is None
    assert parser.parse_args(["--limit", "3"]).limit == 3
    with pytest.raises(SystemExit):
        parser.parse_args(["--limit", "x"])
    with pytest.raises(SystemExit):
        parser.parse_args(["--rank", text])
    errors = capsys.readouterr().err
    assert "argument --limit: invalid int value: 'x'" in errors
    assert f"argument --rank: invalid int value: '{text}'" in errors
    assert "--limit INT" in parser.format_help()
    assert "Numeric options that may be unset also take `none`." in " ".join(parser.format_help().split())


def test_the_short_form_of_an_option_that_is_on_says_that_it_switches_it_off(parser):
    text = " ".join(parser.format_help().split())
    assert "--no_is_careful Short for --is_careful false." in text
    assert "--is_careful [BOOL] Whether to look twice. (default: True)" in text
    assert not parser.parse_args(["--no-is-careful"]).is_careful


def test_an_abbreviation_is_not_an_option(parser, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(["--ran", "2"])
    assert "unrecognized arguments: --ran 2" in capsys.readouterr().err


def test_a_suggestion_shows_no_value():
    assert with_suggestions(["--rnak=secret"], HINTS, "--") == "--rnak (did you mean --rank?)"
    assert with_suggestions(["zzz"], HINTS) == "zzz"
