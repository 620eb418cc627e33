"""Options from a YAML file: they mean the same as on the command line, which overrides them."""

from __future__ import annotations

import argparse
import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

from gkd_trainer.cli.parser import ALIASES, expanded, names_of, parse_known, with_suggestions
from gkd_trainer.redaction import redacted

if TYPE_CHECKING:
    import yaml
    from transformers import HfArgumentParser


def parse_with_config(
    parser: HfArgumentParser, hints: Mapping[str, Any], arguments: Sequence[str]
) -> argparse.Namespace:
    """Return the options from the command line and the --config file.

    Args:
        parser: From `build_parser`.
        hints: The type of each option by name.
        arguments: The arguments after the command's name.

    Raises:
        SystemExit: With status 2, for options that can't be parsed and for a file that can't be used.
    """
    # Not trl.TrlParser: it takes a file's values as defaults, unchecked, and raises ValueError for unknown ones.
    finder = argparse.ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = expanded(finder.parse_known_args(arguments)[0].config)
    from_file = [] if path is None else _arguments_of_file(parser, hints, path)
    return parse_known(parser, [*from_file, *arguments], names_of(hints))


def _arguments_of_file(parser: HfArgumentParser, hints: Mapping[str, Any], path: str) -> list[str]:
    """Return a YAML file's options as command-line arguments; values without such a form become defaults."""
    options = _options_by_name(parser, path)
    unknown = options.keys() - hints.keys()
    if unknown:
        names = with_suggestions(sorted(unknown), names_of(hints))
        parser.error(f"{path}: unknown options: {names}; `{parser.prog} --help` lists all")
    arguments = []
    for name, (text, value) in options.items():
        if text is not None and value is not None:
            # As written: YAML 1.1 would make `no` a boolean, 1:30 a number, 2024-01-01 a date. The command line's
            # parser knows each option's type and range; it only lacks YAML's on and off.
            is_switch = bool in (hints[name], *get_args(hints[name])) and isinstance(value, bool)
            arguments.append(f"--{name}={str(value).lower() if is_switch else text}")
        elif _takes(hints[name], value):
            parser.set_defaults(**{name: value})
        else:
            parser.error(f"{path}: {_refusal(name, hints[name], value, parser.get_default(name))}")
    return arguments


def _options_by_name(parser: HfArgumentParser, path: str) -> dict[str, tuple[str | None, Any]]:
    """Return a file's options by name: the text of a plain value as written (None for others), and the value."""
    import yaml

    try:
        loader = _loader_class()(Path(path).read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            value = loader.construct_document(root)
            parser.error(f"--config: expected options by name in {path}, such as `beta: 0.5`; got {redacted(value)!r}")
        names = Counter(_name_of(key) for key, _ in root.value)
        repeated = [name for name, count in names.items() if count > 1]
        if repeated:
            parser.error(f"{path}: given more than once: {', '.join(repeated)}")
        loader.flatten_mapping(root)  # resolves `<<: *base`, whose options come first
        return {_name_of(key): _text_and_value(loader, node) for key, node in root.value}
    except yaml.MarkedYAMLError as error:  # its text quotes the line, which may hold a secret
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        parser.error(f"--config: could not read {path}{line}: {error.problem}")
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(f"--config: could not read {path}: {error}")


@functools.cache
def _loader_class() -> type[yaml.SafeLoader]:
    """Return a loader that reads 1e-6 as a number, as JSON and YAML 1.2 do; PyYAML takes it for text."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return Loader


def _name_of(key: yaml.Node) -> str:
    name = str(key.value).replace("-", "_")
    return next((option for option, alias in ALIASES.items() if alias == name), name)


def _text_and_value(loader: yaml.SafeLoader, node: yaml.Node) -> tuple[str | None, Any]:
    """Return the text of a plain value as written (None for other values), and the value that it stands for."""
    import yaml

    if isinstance(node, yaml.ScalarNode):
        is_special = node.tag.rpartition(":")[2] in ("null", "bool")
        return node.value, loader.construct_object(node) if is_special else node.value
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return None, [item.value for item in node.value]
    return None, loader.construct_object(node, deep=True)


def _takes(hint: Any, value: object) -> bool:
    return type(value) in _kinds(hint)


def _kinds(hint: Any) -> set[Any]:
    return {get_origin(kind) or kind for kind in (hint, *get_args(hint))}


def _refusal(name: str, hint: Any, value: object, default: object) -> str:
    """Return what an option takes that can't have a value; the value may be a secret."""
    if value is None:
        return f"{name} can't be unset; leave the line out for its default ({default})"
    taken = [text for kind, text in ((list, "a list"), (dict, "a mapping")) if kind in _kinds(hint)]
    came = f"a list of {len(value)}" if isinstance(value, list) else "a mapping"
    return f"{name} takes {' or '.join(taken or ['one value'])}; got {came}"
