"""The options of `gkd-trainer train`: the student, the data, and GKDConfig."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from gkd_trainer.cli.config_file import parse_with_config
from gkd_trainer.cli.parser import OptionGroup, build_parser, built, expanded, require
from gkd_trainer.errors import GKDConfigError, GKDError

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import HfArgumentParser

    from gkd_trainer.config import GKDConfig
    from gkd_trainer.data.sources import RowSource


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


# Not trl.ModelConfig: its dtype, revision, attention and quantisation would duplicate GKDConfig's model_init_kwargs,
# and its dropout of 0.05 has no effect under GKDConfig's disable_dropout.
@dataclass
class StudentOptions:
    """The student and its adapter."""

    model_name_or_path: str | None = _option(None, "The student: its name on the hub or its folder (required).")
    use_peft: bool = _option(False, "Train and save a LoRA adapter instead of all weights.")
    lora_r: int = _option(16, "Rank of the adapter.")
    lora_alpha: int = _option(32, "Scale of the adapter: its product is multiplied by lora_alpha / lora_r.")
    lora_dropout: float = _option(0.0, "Dropout before the adapter; needs --disable_dropout false.")
    lora_target_modules: list[str] | None = _option(
        None, "Names of the layers to adapt, or all-linear; by default peft's choice for the architecture."
    )
    lora_modules_to_save: list[str] | None = _option(
        None, "Names of layers to train in full and save with the adapter."
    )
    use_rslora: bool = _option(False, "Whether to divide lora_alpha by the square root of the rank, not by the rank.")
    use_dora: bool = _option(False, "Whether to train the magnitudes of the weights separately (DoRA).")

    def lora_config(self, disable_dropout: bool) -> LoraConfig | None:
        """Return the adapter of a causal LM to train, or None for all weights; refuse options that have no effect."""
        if not self.use_peft:
            unused = [
                option.name
                for option in fields(self)
                if option.name.startswith(("lora_", "use_")) and getattr(self, option.name) != option.default
            ]
            if unused:
                have = "has" if len(unused) == 1 else "have"
                raise GKDConfigError(
                    f"{', '.join(unused)} {have} no effect without use_peft: set use_peft to train an adapter"
                )
            return None
        if self.lora_dropout > 0 and disable_dropout:
            raise GKDConfigError(
                f"lora_dropout={self.lora_dropout} has no effect while disable_dropout is on: switch one of them off"
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
    """The datasets to train and to evaluate on."""

    dataset: str | None = _option(
        None,
        "The data: a name on the hub, a .json, .jsonl, .parquet or .csv file, or a folder of them (required). Rows "
        "hold messages, prompt and completion, only prompt, text, or input_ids.",
    )
    dataset_config: str | None = _option(None, "Configuration of the datasets, such as main for openai/gsm8k.")
    train_split: str = _option(
        "train", "Split to train on, or part of one, such as train[:100]. A file has one split, train."
    )
    eval_dataset: str | None = _option(
        None, "Data to evaluate on, given as for --dataset; by default --dataset, if --eval_split is given."
    )
    eval_split: str | None = _option(
        None,
        "Split to evaluate on, or part of one, such as train[90%%:] with --train_split train[:90%%]; by default test, "
        "if --eval_dataset is given.",
    )
    streaming: bool = _option(False, "Whether to read the data while training; needs --max_steps.")

    def sources(self, config: GKDConfig) -> tuple[RowSource, RowSource | None]:
        """Return the rows to train on and to evaluate on, not loaded yet.

        Raises:
            GKDConfigError: Options that have no effect, or that lack others they need, also in `config`.
            GKDDataError: A file or folder that doesn't exist, or of an unknown kind.
        """
        from gkd_trainer.data.sources import RowSource

        if self.streaming and config.max_steps <= 0:
            raise GKDConfigError("the length of streamed data is unknown: set max_steps")
        names = [name for name in (self.dataset, self.eval_dataset) if name is not None]
        if self.dataset_config is not None and all(Path(name).is_file() for name in names):
            raise GKDConfigError(f"dataset_config={self.dataset_config} has no effect on a file: leave it out")
        train = RowSource("dataset", self.dataset or "", self.train_split, self.dataset_config, self.streaming)
        evaluation = None
        if self.eval_dataset is not None:
            evaluation = replace(
                train,
                option="eval_dataset",
                name=self.eval_dataset,
                split=self.eval_split or "test",
                file_splits=("test", "train"),
            )
        elif self.eval_split is not None:
            evaluation = replace(train, option="eval_split", split=self.eval_split)
        if config.eval_strategy != "no" and evaluation is None:
            raise GKDConfigError(
                "eval_strategy needs data to evaluate on: set eval_dataset or eval_split, or eval_strategy=no"
            )
        return train, evaluation


@dataclass(frozen=True)
class TrainOptions:
    """All options of a run, by subject."""

    student: StudentOptions
    data: DataOptions
    config: GKDConfig


def parse(arguments: Sequence[str]) -> TrainOptions:
    """Return the options of `gkd-trainer train`, from the command line and its YAML file.

    Raises:
        SystemExit: With status 2, for options that are missing or can't be parsed.
        GKDConfigError: Values or combinations that GKDConfig refuses.
    """
    from gkd_trainer.config import GKDConfig
    from gkd_trainer.config_values import parsed_json

    hints = {**get_type_hints(StudentOptions), **get_type_hints(DataOptions), **get_type_hints(GKDConfig)}
    parser = _parser(hints)
    options = parse_with_config(parser, hints, arguments)
    teachers = (
        "teacher_model_name_or_path",
        "teacher_server_base_url",
        "teachers",
        "self_teacher",
        "teacher_cache_dir",
    )
    require(parser, options, (("model_name_or_path",), teachers, ("dataset",)))
    options.teachers = expanded(parsed_json("teachers", options.teachers))
    with refusing_as_configuration():
        config = built(GKDConfig, options)
    return TrainOptions(built(StudentOptions, options), built(DataOptions, options), config)


def _parser(hints: Mapping[str, Any]) -> HfArgumentParser:
    from gkd_trainer.config import GKDArguments, GKDConfig

    # GKDConfig as one group would be a list of 170 options, with ours lost in it.
    distillation = fields(GKDArguments)
    names = {option.name for option in (*fields(StudentOptions), *fields(DataOptions), *distillation)}
    rest = {option.name: option for option in fields(GKDConfig) if option.name not in names}
    loading = [rest.pop(name) for name in ("model_init_kwargs", "trust_remote_code")]
    preparing = [rest.pop(name) for name in ("dataset_num_proc", "dataset_kwargs")]
    name, *adapter = fields(StudentOptions)
    return build_parser(
        prog="gkd-trainer train",
        usage="gkd-trainer train --model STUDENT (--teacher TEACHER | --teachers JSON | --teacher_server_base_url URL "
        "| --self_teacher base | --teacher_cache_dir FOLDER) --dataset DATA [--config FILE] [OPTION ...]",
        description="Distil a teacher into a student, and save the student with its tokenizer in --output_dir.",
        groups=[
            OptionGroup("student", [name, *loading]),
            OptionGroup("data", [*fields(DataOptions), *preparing]),
            OptionGroup("LoRA (the student's adapter)", adapter),
            OptionGroup("distillation (GKDArguments)", distillation),
            OptionGroup("training (transformers.TrainingArguments)", [*rest.values()]),
        ],
        hints=hints,
    )


@contextmanager
def refusing_as_configuration() -> Iterator[None]:
    """Turn transformers' errors for options and folders that it can't use into GKDConfigError."""
    try:
        yield
    except GKDError:
        raise
    except (OSError, ValueError) as error:
        raise GKDConfigError(str(error)) from error
