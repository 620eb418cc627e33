"""The parser of a command's options: dataclass fields in titled groups, with compact help."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, make_dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_args

from gkd_trainer.redaction import redacted

if TYPE_CHECKING:
    from transformers import HfArgumentParser

ALIASES = {"model_name_or_path": "model", "teacher_model_name_or_path": "teacher"}
"""Short names of options, on the command line and in files."""

_PATHS = frozenset(
    (
        *("models", "model_name_or_path", "teacher", "teacher_model_name_or_path", "teacher_tokenizer_name_or_path"),
        *("dataset", "eval_dataset", "teacher_cache_dir", "vllm_sync_dir", "resume_from_checkpoint"),
        *("deepspeed", "fsdp_config", "accelerator_config", "output_dir", "output_dirs", "output_file"),
    )
)
"""Options of all commands that may be paths: no shell expands their ~ in a file, or after `--name=`."""

_SPELLING = "Options may be written with - instead of _."

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
        epilog=f"{_SPELLING} Numeric options that may be unset also take `none`.",
        formatter_class=_Help,
        allow_abbrev=False,  # a misspelt option must not match another
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of options; the command line overrides it. null unsets an option that may be unset",
    )
    for action in parser._actions:
        if action.type in (int, float) and type(None) in get_args(hints.get(action.dest)):
            action.type = _or_none(action.type)
        if action.dest in _PATHS and list[str] in get_args(hints.get(action.dest)):
            action.nargs = "+"  # of an option that takes a list or a string, transformers' parser takes a string
        if action.nargs == 0 and action.const is False:  # its help is that of the option which it switches off
            action.help = f"Short for --{action.dest} false."
    return parser


class PlainParser(argparse.ArgumentParser):
    """The parser of a command without a file of options; its options and help are like those of `build_parser`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, epilog=_SPELLING, formatter_class=_Help, allow_abbrev=False)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Add an argument; an option may also be written with hyphens."""
        hyphenated = [f"--{name[2:].replace('_', '-')}" for name in names if name.startswith("--") and "_" in name]
        return super().add_argument(*names, *hyphenated, **options)

    def error(self, message: str) -> NoReturn:
        """End with a message that shows no secret."""
        super().error(redacted(message))

    def parsed(self, arguments: Sequence[str], required: Sequence[str] = ()) -> argparse.Namespace:
        """Return the options; end with an error for unknown ones, and for those `required` that are missing."""
        options = parse_known(self, arguments, [action.dest for action in self._actions if action.option_strings])
        require(self, options, [(name,) for name in required])
        return options


def parse_known(parser: argparse.ArgumentParser, arguments: Sequence[str], known: Iterable[str]) -> argparse.Namespace:
    """Return parsed options; end with an error for others, with that of the `known` which was probably meant."""
    options, unknown = parser.parse_known_args(arguments)
    misspelt = [text for text in unknown if text.startswith("--")]
    if unknown:
        parser.error(f"unrecognized arguments: {with_suggestions(misspelt or unknown, known, '--')}")
    given = vars(options)
    given.update({name: expanded(given[name]) for name in _PATHS & given.keys()})
    return options


def expanded(value: Any) -> Any:
    """Return a path, or the paths in a list or dictionary, with the home folder for a ~ at the start."""
    if isinstance(value, list):
        return [expanded(each) for each in value]
    if isinstance(value, dict):
        return {key: expanded(each) for key, each in value.items()}
    return os.path.expanduser(value) if isinstance(value, str) else value


def require(
    parser: argparse.ArgumentParser, options: argparse.Namespace, alternatives: Iterable[Sequence[str]]
) -> None:
    """End with an error if of some alternatives no option is given."""
    missing = [
        " or ".join(f"--{name}" for name in names)
        for names in alternatives
        if all(getattr(options, name) is None for name in names)
    ]
    if missing:
        parser.error(f"the following options are required: {', '.join(missing)}")


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        return None if text.lower() in ("none", "null") else kind(text)

    parse.__name__ = kind.__name__
    return parse


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


def names_of(hints: Iterable[str]) -> list[str]:
    """Return the names of options by which users know those of `build_parser`."""
    return [name for name in (*hints, *ALIASES.values(), "config") if not name.startswith("_")]


def with_suggestions(names: Iterable[str], known: Iterable[str], prefix: str = "") -> str:
    """Return names of options that don't exist, each with the one of the `known` that was probably meant."""
    known = list(known)
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
        if not action.option_strings:
            return super()._format_action_invocation(action)
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
