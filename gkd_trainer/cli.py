"""The console command: `gkd-trainer train`.

Only argument parsing is imported here; a command imports the heavy libraries when it runs, so that help is instant.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from gkd_trainer.errors import GKDConfigError, GKDDataError, GKDError

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import HfArgumentParser

    from gkd_trainer.config import GKDConfig

_ALIASES = {"model_name_or_path": "model", "teacher_model_name_or_path": "teacher"}
_FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command of `gkd-trainer`.

    Args:
        argv: The arguments after the program's name; by default those of the process.

    Raises:
        SystemExit: With status 2 for arguments that can't be parsed, with 1 (and the message of a GKDError on stderr)
            for input that can't be used, with 0 after help.
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
        _COMMANDS[chosen].run(arguments[1:])
    except GKDError as error:
        print(f"gkd-trainer {chosen}: error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


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
        default="train", metadata={"help": "Which split to train on; also a part, such as train[:100]."}
    )
    eval_dataset: str | None = field(
        default=None,
        metadata={"help": "The data to evaluate on, named as --dataset is; by default --dataset if --eval_split is."},
    )
    eval_split: str | None = field(
        default=None, metadata={"help": "Which split to evaluate on; by default test, if --eval_dataset is given."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Whether to read the data while training; needs --max_steps."}
    )

    @property
    def has_evaluation(self) -> bool:
        """Whether there is something to evaluate on."""
        return self.eval_dataset is not None or self.eval_split is not None

    def load_train(self) -> Any:
        """Return the rows to train on."""
        return self._load("dataset", self.dataset or "", self.train_split)

    def load_eval(self) -> Any:
        """Return the rows to evaluate on, or None."""
        if not self.has_evaluation:
            return None
        option = "dataset" if self.eval_dataset is None else "eval_dataset"
        return self._load(option, self.eval_dataset or self.dataset or "", self.eval_split or "test")

    def _load(self, option: str, source: str, split: str) -> Any:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        path = Path(source)
        options: dict[str, Any] = {"name": self.dataset_config, "split": split, "streaming": self.streaming}
        if path.is_file():
            if path.suffix not in _FILE_FORMATS:
                raise GKDDataError(f"--{option}: expected a file that ends in {', '.join(_FILE_FORMATS)}; got {source}")
            # A file has no splits: it is the one that is asked for, of which a part may be taken.
            options |= {"data_files": {split.partition("[")[0]: source}, "name": None}
            source = _FILE_FORMATS[path.suffix]
        elif path.suffix in _FILE_FORMATS:
            raise GKDDataError(f"--{option}: there is no file {source}")
        try:
            return load_dataset(source, **options)
        except (OSError, ValueError, DatasetsError) as error:
            raise GKDDataError(
                f"--{option}: could not load the split {split!r} of {path} ({type(error).__name__}: {error}). "
                "Expected a name on the hub, a .json, .jsonl, .parquet or .csv file, or a folder of them"
            ) from error


def _train(arguments: Sequence[str]) -> None:
    student, data, config = _parse_train(arguments)
    peft_config = student.lora_config(config.disable_dropout)
    if data.streaming and config.max_steps <= 0:
        raise GKDConfigError("streaming data have no length that is known beforehand: set max_steps")
    if config.eval_strategy != "no" and not data.has_evaluation:
        raise GKDConfigError("eval_strategy needs data to evaluate on: set eval_dataset or eval_split, or leave it out")
    resumed_from = _checkpoint(config)
    for option, name, init_kwargs in (
        ("model_name_or_path", student.model_name_or_path, config.model_init_kwargs),
        ("teacher_model_name_or_path", config.teacher_model_name_or_path, config.teacher_model_init_kwargs),
    ):
        if name is not None:  # the teacher may be behind a server
            _require_model(option, name, init_kwargs, config.trust_remote_code)
    train_rows, eval_rows = data.load_train(), data.load_eval()

    from gkd_trainer.trainer import GKDTrainer

    trainer = GKDTrainer(
        student.model_name_or_path,
        config,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        peft_config=peft_config,
    )
    metrics = trainer.train(resume_from_checkpoint=resumed_from).metrics
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    if eval_rows is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if config.push_to_hub:
        trainer.push_to_hub()
    trainer.rollouts.close()
    trainer.accelerator.end_training()


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
    try:
        config = _build(GKDConfig, options)
    except GKDError:
        raise
    except ValueError as error:  # what TrainingArguments raises for combinations without meaning
        raise GKDConfigError(str(error)) from error
    return _build(StudentOptions, options), _build(DataOptions, options), config


def _train_parser(arguments_class: type, config_class: type, hints: Mapping[str, Any]) -> HfArgumentParser:
    from transformers import HfArgumentParser

    # GKDConfig alone would be one list of 170 options with ours lost in it.
    distillation = fields(arguments_class)
    names = {option.name for option in (*fields(StudentOptions), *fields(DataOptions), *distillation)}
    rest = {option.name: option for option in fields(config_class) if option.name not in names}
    loading = [rest.pop(name) for name in ("model_init_kwargs", "trust_remote_code")]
    preparing = [rest.pop(name) for name in ("dataset_num_proc", "dataset_kwargs")]
    parser = HfArgumentParser(
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
    if path is None:
        return parser.parse_args(arguments)
    canonical = {alias: name for name, alias in _ALIASES.items()}
    values = {canonical.get(str(key), str(key)): value for key, value in _read_yaml(parser, path).items()}
    unknown = values.keys() - hints.keys()
    if unknown:
        parser.error(f"{path}: unknown options: {', '.join(sorted(unknown))}; `gkd-trainer train --help` lists all")
    from_file = []
    for name, value in values.items():
        if value is False and not _takes(hints[name], value):
            value = "no"  # YAML 1.1 reads a bare `no`, as in `save_strategy: no`, so
        # Plain values are parsed and checked like the command line's; lists, mappings and null have no such form.
        if isinstance(value, str | int | float):
            from_file.append(f"--{name}={value}")
        elif _takes(hints[name], value):
            parser.set_defaults(**{name: value})
        else:
            parser.error(f"{path}: {name} can't be {value!r}")
    return parser.parse_args([*from_file, *arguments])


def _read_yaml(parser: HfArgumentParser, path: str) -> dict[Any, Any]:
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"--config: could not read {path}: {error}")
    if values is None:
        return {}
    if not isinstance(values, dict):
        parser.error(f"--config: expected options by name in {path}, such as `beta: 0.5`; got {values!r}")
    return values


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
    except (OSError, ValueError) as error:
        raise GKDConfigError(
            f"--{option}: expected a folder with a model, or the name of one on the hub; got {name!r}: {error}"
        ) from error


def _checkpoint(config: GKDConfig) -> str | None:
    """Return the folder to resume from; `true` is the last one of output_dir."""
    from transformers.trainer_utils import get_last_checkpoint

    wanted = config.resume_from_checkpoint
    if wanted is None or wanted.lower() == "false":
        return None
    output_dir = str(config.output_dir)
    if wanted.lower() == "true":
        last: str | None = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
        if last is None:
            raise GKDConfigError(f"resume_from_checkpoint: there is no checkpoint in {output_dir}: leave it out")
        return last
    if not Path(wanted).is_dir():
        raise GKDConfigError(
            f"resume_from_checkpoint: expected a checkpoint's folder, or true for the last one; got {wanted!r}"
        )
    return wanted


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


if __name__ == "__main__":  # for `accelerate launch -m gkd_trainer.cli train ...`
    main()
