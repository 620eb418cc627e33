"""The parser of a command's options: dataclass fields in titled groups, with compact help."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, make_dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from gkd_trainer.redaction import redacted

if TYPE_CHECKING:
    from transformers import HfArgumentParser

ALIASES = {"model_name_or_path": "model", "teacher_model_name_or_path": "teacher"}
"""Short names of options, on the command line and in files."""

_Options = TypeVar("_Options")


@dataclass(frozen=True)
class OptionGroup:
    """Options that help lists together: dataclass fields with help and choices in their metadata."""

    title: str
    options: Sequence[Field[Any]]


def build_parser(
    prog: str, usage: str, description: str, groups: Sequence[OptionGroup], hints: Mapping[str, Any]
) -> HfArgumentParser:
    """Return the parser of a command's options, which may be on the command line or in the --config YAML file.

    Args:
        prog: The command, such as "gkd-trainer train".
        usage: The line that shows how it is called.
        description: What it does.
        groups: Its options, in the order of its help.
        hints: The type of each option by name.
    """
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            super().error(redacted(message))

    parser = Parser(
        [_as_dataclass(group, hints) for group in groups],
        prog=prog,
        usage=usage,
        description=description,
        epilog="Options may be written with - instead of _.",
        formatter_class=_Help,
        allow_abbrev=False,  # a misspelt option must not match another
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of options; the command line overrides it. null unsets an option that may be unset",
    )
    return parser


def _as_dataclass(group: OptionGroup, hints: Mapping[str, Any]) -> Any:
    """Return a group as a dataclass that HfArgumentParser shows under the group's title."""
    copies = []
    for option in group.options:
        if option.init:
            aliases = [f"--{ALIASES[option.name]}"] if option.name in ALIASES else []
            copy = field(
                default=option.default,
                default_factory=option.default_factory,
                metadata={**option.metadata, "aliases": aliases},
            )
            copies.append((option.name, hints[option.name], copy))
    as_dataclass: Any = make_dataclass("Options", copies)
    as_dataclass._argument_group_name = group.title
    return as_dataclass


def built(options_class: type[_Options], options: argparse.Namespace) -> _Options:
    """Return a dataclass of the parsed options that are its fields."""
    own = [option.name for option in fields(options_class) if option.init]  # type: ignore[arg-type]
    return options_class(**{name: getattr(options, name) for name in own})


def with_suggestions(names: Iterable[str], hints: Mapping[str, Any], prefix: str = "") -> str:
    """Return names of options that don't exist, each with the option that was probably meant."""
    known = [name for name in (*hints, *ALIASES.values(), "config") if not name.startswith("_")]
    suggestions = []
    for name in names:
        name = name.partition("=")[0]  # the value may be a secret
        stem = name.removeprefix(prefix).replace("-", "_")
        similar = get_close_matches(stem, known, n=1)
        suggestions.append(f"{name} (did you mean {prefix}{similar[0]}?)" if similar else name)
    return ", ".join(suggestions)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows one spelling of each option with its value's type, long lists of choices in the text, and any default."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if "-" not in name[2:]]
        value = "NAME" if _has_many_choices(action) else self._format_args(action, _kind_of_value(action))
        return " ".join([", ".join(names), value]).rstrip()

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if action.default is not None and action.nargs != 0:
            text = super()._get_help_string(action) or ""
        if _has_many_choices(action):
            text += f" One of {', '.join(map(str, action.choices or ()))}."
        return text


def _has_many_choices(action: argparse.Action) -> bool:
    return action.choices is not None and len(list(action.choices)) > 5


def _kind_of_value(action: argparse.Action) -> str:
    kind = getattr(action.type, "__name__", "")
    return {"string_to_bool": "BOOL", "int": "INT", "float": "FLOAT"}.get(kind, "TEXT")
