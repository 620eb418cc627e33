"""The console command: `gkd-trainer train`.

Only argument parsing is imported here; a command imports the heavy libraries when it runs, so that help is instant.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import shlex
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import Field, dataclass, field, fields, make_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_origin, get_type_hints

from gkd_trainer.errors import GKDConfigError, GKDError
from gkd_trainer.quiet import quiet_imports
from gkd_trainer.redaction import redacted

if TYPE_CHECKING:
    import yaml
    from peft import LoraConfig
    from transformers import HfArgumentParser

    from gkd_trainer.config import GKDConfig
    from gkd_trainer.data.sources import RowSource
    from gkd_trainer.trainer import GKDTrainer

_ALIASES = {"model_name_or_path": "model", "teacher_model_name_or_path": "teacher"}

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command of `gkd-trainer`.

    Args:
        argv: The arguments after the program's name; by default those of the process.

    Raises:
        SystemExit: With status 2 for arguments that can't be parsed, with 1 (and the message of a GKDError on stderr)
            for input that can't be used, with 130 or 143 (and how to resume) after SIGINT or SIGTERM, with 0 after
            help.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="gkd-trainer",
        description="Distil a large language model (the teacher) into a small one (the student).",
        epilog="`gkd-trainer COMMAND --help` lists a command's options.",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    for name, command in _COMMANDS.items():
        commands.add_parser(name, help=command.summary, add_help=False)
    # A command parses its own options: building them takes the libraries that they come from.
    chosen = parser.parse_args(arguments[:1]).command
    try:
        with _terminating_like_an_interrupt():
            _COMMANDS[chosen].run(arguments[1:])
    except GKDError as error:
        print(f"gkd-trainer {chosen}: error: {'. '.join([str(error), *_notes(error)])}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt as stop:
        is_terminated = isinstance(stop, _Terminated)
        what = "terminated" if is_terminated else "interrupted"
        if os.environ.get("RANK", "0") == "0":
            # A progress bar leaves its line open.
            print(f"\ngkd-trainer {chosen}: {': '.join([what, *_notes(stop)])}", file=sys.stderr)
        raise SystemExit(128 + (signal.SIGTERM if is_terminated else signal.SIGINT)) from None


class _Terminated(KeyboardInterrupt):
    """SIGTERM, by which schedulers stop a run."""


@contextmanager
def _terminating_like_an_interrupt() -> Iterator[None]:
    """Raise _Terminated at SIGTERM, where the main thread runs the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def terminate(number: int, _: object) -> None:
        if os.getpid() == process:
            raise _Terminated
        # A forked worker, of a data loader say, dies as it would without this handler.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))


# Not trl.ModelConfig: its dtype, revision, attention and quantisation would be a second place for what GKDConfig's
# model_init_kwargs says, and its dropout of 0.05 has no effect under GKDConfig's disable_dropout.
@dataclass
class StudentOptions:
    """The student and its adapter."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The student: its name on the hub or its folder (required)."},
    )
    use_peft: bool = field(
        default=False, metadata={"help": "Whether to train a LoRA adapter instead of all weights; it is what is saved."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter, which is divided by its rank."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout in front of the adapter; needs --disable_dropout false."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the layers to adapt, or all-linear; by default peft's choice for the architecture."
        },
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Names of layers to train in full and save with the adapter."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Whether to divide lora_alpha by the rank's root."})
    use_dora: bool = field(default=False, metadata={"help": "Whether to train the weights' magnitudes apart (DoRA)."})

    def lora_config(self, disable_dropout: bool) -> LoraConfig | None:
        """Return the adapter to train, or None for all weights; raise GKDConfigError for options without effect."""
        if not self.use_peft:
            unused = [
                option.name
                for option in fields(self)
                if option.name.startswith(("lora_", "use_")) and getattr(self, option.name) != option.default
            ]
            if unused:
                raise GKDConfigError(f"{', '.join(unused)} without effect: set use_peft to train an adapter")
            return None
        if self.lora_dropout > 0 and disable_dropout:
            raise GKDConfigError(
                f"lora_dropout={self.lora_dropout} has no effect while disable_dropout is on: set one of them off"
            )
        from peft import LoraConfig

        targets = self.lora_target_modules
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            modules_to_save=self.lora_modules_to_save,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )


@dataclass
class DataOptions:
    """The data sets to train and to evaluate on."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "The data: a name on the hub, a .json, .jsonl, .parquet or .csv file, or a folder of them "
            "(required). Rows hold messages, prompt and completion, prompt alone, text, or input_ids."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Which configuration of the data sets, such as main of openai/gsm8k."}
    )
    train_split: str = field(
        default="train",
        metadata={"help": "Which split to train on; also a part, such as train[:100]. A file is the split train."},
    )
    eval_dataset: str | None = field(
        default=None,
        metadata={"help": "The data to evaluate on, named as --dataset is; by default --dataset if --eval_split is."},
    )
    eval_split: str | None = field(
        default=None,
        metadata={
            "help": "Which split to evaluate on, or a part of one, such as train[90%%:] beside "
            "--train_split train[:90%%]; by default test, if --eval_dataset is given."
        },
    )
    streaming: bool = field(
        default=False, metadata={"help": "Whether to read the data while training; needs --max_steps."}
    )

    def sources(self) -> tuple[RowSource, RowSource | None]:
        """Return where the rows to train and to evaluate on come from; raise GKDDataError where that is refused."""
        from gkd_trainer.data.sources import RowSource

        names = [name for name in (self.dataset, self.eval_dataset) if name is not None]
        if self.dataset_config is not None and all(Path(name).is_file() for name in names):
            raise GKDConfigError(f"dataset_config={self.dataset_config} has no effect on a file: leave it out")
        train = RowSource("dataset", self.dataset or "", self.train_split, self.dataset_config, self.streaming)
        if self.eval_dataset is None:
            if self.eval_split is None:
                return train, None
            return train, replace(train, option="eval_split", split=self.eval_split)
        evaluation = replace(
            train,
            option="eval_dataset",
            name=self.eval_dataset,
            split=self.eval_split or "test",
            file_splits=("test", "train"),
        )
        return train, evaluation


def _train(arguments: Sequence[str]) -> None:
    with quiet_imports():
        importlib.import_module("gkd_trainer.config")
        importlib.import_module("peft")
    student, data, config = _parse_train(arguments)
    peft_config = student.lora_config(config.disable_dropout)
    if data.streaming and config.max_steps <= 0:
        raise GKDConfigError("streaming data have no length that is known beforehand: set max_steps")
    train_source, eval_source = data.sources()
    if config.eval_strategy != "no" and eval_source is None:
        raise GKDConfigError("eval_strategy needs data to evaluate on: set eval_dataset or eval_split, or leave it out")
    resumed_from = _checkpoint(config)
    for option, name, init_kwargs in (
        ("model_name_or_path", student.model_name_or_path, config.model_init_kwargs),
        ("teacher_model_name_or_path", config.teacher_model_name_or_path, config.teacher_model_init_kwargs),
    ):
        if name is not None:  # the teacher may be behind a server
            _require_model(option, name, init_kwargs, config.trust_remote_code)
    train_rows = train_source.load()
    eval_rows = None if eval_source is None else eval_source.load()
    if eval_source is not None and train_source.overlaps(train_rows, eval_source):
        logger.warning(
            "%s: %s and %s overlap, so that rows which are trained on are evaluated on too",
            redacted(train_source.name),
            train_source.split,
            eval_source.split,
        )

    from gkd_trainer.data.sources import naming_broken_lines
    from gkd_trainer.trainer import GKDTrainer

    with _refusing_as_configuration(), naming_broken_lines(train_source, eval_source):
        trainer = GKDTrainer(
            student.model_name_or_path,
            config,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            peft_config=peft_config,
        )
    with naming_broken_lines(train_source, eval_source):
        with _noting_how_to_resume(trainer):
            metrics = trainer.train(resume_from_checkpoint=resumed_from).metrics
        trainer.save_model(_internal_call=True)  # pushed below, with the name of the data
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
        if eval_rows is not None:
            metrics = trainer.evaluate()
            trainer.log_metrics("eval", metrics)
            trainer.save_metrics("eval", metrics)
    trainer.create_model_card(dataset=train_source.name)
    if config.push_to_hub:
        trainer.push_to_hub(dataset=train_source.name)
    trainer.rollouts.close()
    trainer.accelerator.end_training()


@contextmanager
def _refusing_as_configuration() -> Iterator[None]:
    """Raise what transformers raises for options and folders that it can't use as GKDConfigError."""
    try:
        yield
    except GKDError:
        raise
    except (OSError, ValueError) as error:
        raise GKDConfigError(str(error)) from error


@contextmanager
def _noting_how_to_resume(trainer: GKDTrainer) -> Iterator[None]:
    """Add to what stops a run how to go on from the last checkpoint."""
    from transformers import ProgressCallback

    from gkd_trainer.trainer.checkpoints import find_last_whole

    try:
        yield
    except (KeyboardInterrupt, GKDError) as stop:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback):  # or the bars are drawn once more, below the message
                for bar in (callback.training_bar, callback.prediction_bar):
                    if bar is not None:
                        bar.close()
        last, output_dir = trainer.last_checkpoint, str(trainer.args.output_dir)
        if last is not None:
            source = "true" if find_last_whole(output_dir)[0] == last else shlex.quote(str(last))
            stop.add_note(f"{last} is saved: to go on from it, add --resume_from_checkpoint {source}")
        elif isinstance(stop, KeyboardInterrupt):
            stop.add_note(f"no checkpoint was saved in {output_dir} yet (--save_steps says how often)")
        raise


def _parse_train(arguments: Sequence[str]) -> tuple[StudentOptions, DataOptions, GKDConfig]:
    from gkd_trainer.config import GKDArguments, GKDConfig

    hints = {
        **get_type_hints(StudentOptions),
        **get_type_hints(DataOptions),
        **get_type_hints(GKDConfig),
    }
    parser = _train_parser(GKDArguments, GKDConfig, hints)
    options = _parse_with_config(parser, hints, arguments)
    teachers = ("teacher_model_name_or_path", "teacher_server_base_url")
    missing = [
        " or ".join(f"--{name}" for name in names)
        for names in (("model_name_or_path",), teachers, ("dataset",))
        if all(getattr(options, name) is None for name in names)
    ]
    if missing:
        parser.error(f"the following options are required: {', '.join(missing)}")
    with _refusing_as_configuration():
        config = _build(GKDConfig, options)
    return _build(StudentOptions, options), _build(DataOptions, options), config


def _train_parser(arguments_class: type, config_class: type, hints: Mapping[str, Any]) -> HfArgumentParser:
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            super().error(redacted(message))

    # GKDConfig alone would be one list of 170 options with ours lost in it.
    distillation = fields(arguments_class)
    names = {option.name for option in (*fields(StudentOptions), *fields(DataOptions), *distillation)}
    rest = {option.name: option for option in fields(config_class) if option.name not in names}
    loading = [rest.pop(name) for name in ("model_init_kwargs", "trust_remote_code")]
    preparing = [rest.pop(name) for name in ("dataset_num_proc", "dataset_kwargs")]
    parser = Parser(
        [
            _option_group("student", [*fields(StudentOptions)[:1], *loading], hints),
            _option_group("data", [*fields(DataOptions), *preparing], hints),
            _option_group("LoRA (the student's adapter)", fields(StudentOptions)[1:], hints),
            _option_group("distillation (GKDArguments)", distillation, hints),
            _option_group("training (transformers.TrainingArguments)", rest.values(), hints),
        ],
        prog="gkd-trainer train",
        usage="gkd-trainer train --model STUDENT (--teacher TEACHER | --teacher_server_base_url URL) --dataset DATA "
        "[--config FILE] [OPTION ...]",
        description="Distil a teacher into a student, and save the student with its tokenizer in --output_dir.",
        epilog="An option may be written with - in place of _.",
        formatter_class=_TrainHelp,
        allow_abbrev=False,  # a misspelt option must not pass for another
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with options by name; those on the command line win. A null unsets an option that may be unset",
    )
    return parser


def _parse_with_config(
    parser: HfArgumentParser, hints: Mapping[str, Any], arguments: Sequence[str]
) -> argparse.Namespace:
    # Not trl.TrlParser: it takes a file's values as defaults, unchecked, and raises ValueError for unknown ones.
    finder = argparse.ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(arguments)[0].config
    from_file = [] if path is None else _arguments_of_file(parser, hints, path)
    options, unknown = parser.parse_known_args([*from_file, *arguments])
    misspelt = [text for text in unknown if text.startswith("--")]
    if unknown:
        parser.error(f"unrecognized arguments: {_with_suggestions(misspelt or unknown, hints, '--')}")
    return options


def _arguments_of_file(parser: HfArgumentParser, hints: Mapping[str, Any], path: str) -> list[str]:
    """Return a YAML file's options as a command line has them; those that have no such form become defaults."""
    options = _yaml_options(parser, path)
    unknown = options.keys() - hints.keys()
    if unknown:
        names = _with_suggestions(sorted(unknown), hints)
        parser.error(f"{path}: unknown options: {names}; `gkd-trainer train --help` lists all")
    arguments = []
    for name, (text, value) in options.items():
        if text is not None and value is not None:
            # As written: YAML 1.1 would make `no` a boolean, 1:30 a number, 2024-01-01 a date. The command line's
            # parser knows each option's type, and what it may be; it only lacks YAML's on and off.
            is_switch = bool in (hints[name], *get_args(hints[name])) and isinstance(value, bool)
            arguments.append(f"--{name}={str(value).lower() if is_switch else text}")
        elif _takes(hints[name], value):
            parser.set_defaults(**{name: value})
        else:
            parser.error(f"{path}: {name} can't be {redacted(value, name)!r}")
    return arguments


def _yaml_options(parser: HfArgumentParser, path: str) -> dict[str, tuple[str | None, Any]]:
    """Return the options of a file by name: the text of a plain value as it is written (None for others), its value."""
    import yaml

    canonical = {alias: name for name, alias in _ALIASES.items()}

    def name_of(key: yaml.Node) -> str:
        name = str(key.value).replace("-", "_")
        return canonical.get(name, name)

    try:
        loader = yaml.SafeLoader(Path(path).read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            value = loader.construct_document(root)
            parser.error(f"--config: expected options by name in {path}, such as `beta: 0.5`; got {redacted(value)!r}")
        names = Counter(name_of(key) for key, _ in root.value)
        repeated = [name for name, count in names.items() if count > 1]
        if repeated:
            parser.error(f"{path}: given more than once: {', '.join(repeated)}")
        loader.flatten_mapping(root)  # `<<: *base`, whose options come first
        return {name_of(key): _yaml_value(loader, node) for key, node in root.value}
    except yaml.MarkedYAMLError as error:  # its text quotes the line, in which a secret may stand
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        parser.error(f"--config: could not read {path}{line}: {error.problem}")
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(f"--config: could not read {path}: {error}")


def _yaml_value(loader: yaml.SafeLoader, node: yaml.Node) -> tuple[str | None, Any]:
    """Return the text of a plain value as it is written, None for others, and the value that it stands for."""
    import yaml

    if isinstance(node, yaml.ScalarNode):
        is_special = node.tag.rpartition(":")[2] in ("null", "bool")
        return node.value, loader.construct_object(node) if is_special else node.value
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return None, [item.value for item in node.value]
    return None, loader.construct_object(node, deep=True)


def _with_suggestions(names: Iterable[str], hints: Mapping[str, Any], prefix: str = "") -> str:
    """Return names of options that don't exist, each with the one that it may stand for."""
    known = [name for name in (*hints, *_ALIASES.values(), "config") if not name.startswith("_")]
    told = []
    for name in names:
        name = name.partition("=")[0]  # the value may be a secret
        stem = name.removeprefix(prefix).replace("-", "_")
        similar = get_close_matches(stem, known, n=1)
        told.append(f"{name} (did you mean {prefix}{similar[0]}?)" if similar else name)
    return ", ".join(told)


def _takes(hint: Any, value: object) -> bool:
    return type(value) in {get_origin(kind) or kind for kind in (hint, *get_args(hint))}


def _option_group(title: str, options: Iterable[Field[Any]], hints: Mapping[str, Any]) -> Any:
    """Return a dataclass of some options, which HfArgumentParser shows under a title of their own."""
    copies = []
    for option in options:
        if option.init:
            aliases = [f"--{_ALIASES[option.name]}"] if option.name in _ALIASES else []
            copy = field(
                default=option.default,
                default_factory=option.default_factory,
                metadata={**option.metadata, "aliases": aliases},
            )
            copies.append((option.name, hints[option.name], copy))
    group: Any = make_dataclass("Options", copies)
    group._argument_group_name = title
    return group


def _build(options_class: type, options: argparse.Namespace) -> Any:
    return options_class(
        **{option.name: getattr(options, option.name) for option in fields(options_class) if option.init}
    )


def _require_model(option: str, name: str, init_kwargs: Any, trust_remote_code: bool) -> None:
    """Raise GKDConfigError where there is no model of a name, before any data or weights are loaded."""
    from transformers import AutoConfig

    if (Path(name) / "adapter_config.json").is_file():
        return  # it names the model that it belongs to
    where = ("revision", "subfolder", "gguf_file", "cache_dir", "token", "trust_remote_code")
    given = {key: value for key, value in (init_kwargs or {}).items() if key in where}
    try:
        AutoConfig.from_pretrained(name, **{"trust_remote_code": trust_remote_code, **given})
    except Exception as error:  # a config that is no config fails in any way
        raise GKDConfigError(
            f"--{option}: expected a folder with a model, or the name of one on the hub; got {name!r}: {error}"
        ) from error


def _checkpoint(config: GKDConfig) -> str | None:
    """Return the folder to resume from; `true` is the last whole one of output_dir."""
    from gkd_trainer.trainer.checkpoints import last_whole_checkpoint, required_whole

    wanted = config.resume_from_checkpoint
    if wanted is None or wanted.lower() in ("false", "no", "off"):
        return None
    if wanted.lower() in ("true", "yes", "on"):
        return str(last_whole_checkpoint(config.output_dir or ""))
    return str(required_whole(wanted))


class _TrainHelp(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling of each option with the kind of its value; long choices in the text; the default if there is one."""

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


def _version() -> str:
    from gkd_trainer import __version__

    return __version__


@dataclass(frozen=True)
class _Command:
    summary: str
    run: Callable[[Sequence[str]], None]


_COMMANDS = {"train": _Command("distil a teacher into a student", _train)}


if __name__ == "__main__":
    main()
