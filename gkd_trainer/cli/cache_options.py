"""The options of `gkd-trainer cache`: the cache, the data, and those of GKDConfig that decide what the teacher says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import Field, dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_type_hints

from gkd_trainer.cli.config_file import parse_with_config
from gkd_trainer.cli.parser import OptionGroup, build_parser, built, require
from gkd_trainer.cli.train_options import refusing_as_configuration
from gkd_trainer.errors import GKDConfigError

if TYPE_CHECKING:
    from transformers import HfArgumentParser

    from gkd_trainer.config import GKDConfig
    from gkd_trainer.data.sources import RowSource
    from gkd_trainer.teachers.cache import Part

_TEACHER = (
    "teacher_model_name_or_path",
    "teacher_model_init_kwargs",
    "teacher_top_k",
    "teacher_server_base_url",
    "teacher_server_model",
    "teacher_server_api_token",
    "teacher_server_checks",
    "vllm_server_timeout",
    "vllm_request_timeout",
    "trust_remote_code",
    "use_cpu",
)
_ROWS = ("max_length", "train_on", "dataset_num_proc", "model_init_kwargs")

_TOP_K = 64
"""How many top tokens kind='topk' takes from a teacher in this process."""

_HELP = {
    "teacher_top_k": "Number of the teacher's most probable tokens to store, for --kind topk; by default "
    f"{_TOP_K}, or 20 from a server."
}
"""The help of options of GKDConfig that mean something narrower here."""


def _option(default: Any, help: str, choices: list[str] | None = None) -> Any:
    return field(default=default, metadata={"help": help} | ({} if choices is None else {"choices": choices}))


@dataclass
class CacheOptions:
    """The folder to write, and what to store."""

    output_dir: str | None = _option(
        None, "Folder of the cache; a cache that has some of the rows is continued (required)."
    )
    kind: str | None = _option(
        None,
        "What to store of each prediction: hidden is the final hidden state (2 bytes per channel), hidden_int8 the "
        "same in 1 byte, topk the --teacher_top_k most probable tokens. By default topk if --teacher_top_k or a server "
        "is given, else hidden.",
        ["hidden", "hidden_int8", "topk"],
    )
    compression: str = _option(
        "auto",
        "Whether to compress rows without loss; auto does so for hidden states in bfloat16 and float16, if "
        "zstandard is installed.",
        ["auto", "none", "zstd"],
    )
    shard_mb: float = _option(256.0, "Size of a file in MiB, before compression.")
    batch_size: int = _option(8, "Number of rows that the teacher scores at once.")
    part: str | None = _option(
        None,
        "I/N: score every N-th row, starting at row I, and write these to part-I-of-N in --output_dir, as one of N "
        "processes; `train` reads all parts by --teacher_cache_dir. By default all rows; under `accelerate launch` or "
        "torchrun, each process takes a part.",
    )


@dataclass
class RowOptions:
    """The data to cache, and the student for which it is prepared."""

    dataset: str | None = _option(
        None,
        "The data: a name on the hub, a .json, .jsonl, .parquet or .csv file, or a folder of them (required).",
    )
    dataset_config: str | None = _option(None, "Configuration of the dataset, such as main for openai/gsm8k.")
    train_split: str = _option("train", "Split to cache, or part of one, such as train[:100].")
    model_name_or_path: str | None = _option(
        None,
        "The student: its tokenizer, context and stop tokens are used to prepare the rows; by default the teacher's. "
        "Required for a teacher behind a server.",
    )

    def source(self) -> RowSource:
        """Return the rows, not loaded yet; raise GKDDataError for a file that doesn't exist, or of an unknown kind."""
        from gkd_trainer.data.sources import RowSource

        return RowSource("dataset", self.dataset or "", self.train_split, self.dataset_config)


@dataclass(frozen=True)
class CacheRun:
    """All options of a run, by subject."""

    cache: CacheOptions
    rows: RowOptions
    config: GKDConfig
    part: Part | None


def parse(arguments: Sequence[str]) -> CacheRun:
    """Return the options of `gkd-trainer cache`, from the command line and its YAML file.

    Raises:
        SystemExit: With status 2, for options that are missing or can't be parsed.
        GKDConfigError: Values or combinations that have no meaning.
    """
    from gkd_trainer.config import GKDConfig

    hints = {**get_type_hints(RowOptions), **get_type_hints(CacheOptions)}
    hints.update({name: hint for name, hint in get_type_hints(GKDConfig).items() if name in (*_TEACHER, *_ROWS)})
    parser = _parser(hints)
    options = parse_with_config(parser, hints, arguments)
    teachers = ("teacher_model_name_or_path", "teacher_server_base_url")
    require(parser, options, (teachers, ("dataset",), ("output_dir",)))
    cache, rows = built(CacheOptions, options), built(RowOptions, options)
    has_server = options.teacher_server_base_url is not None
    if cache.kind == "topk" and options.teacher_top_k is None and not has_server:
        options.teacher_top_k = _TOP_K
    if cache.kind in ("hidden", "hidden_int8") and options.teacher_top_k is not None:
        raise GKDConfigError(
            f"teacher_top_k={options.teacher_top_k} has no effect on kind={cache.kind!r}: leave one of them out"
        )
    if has_server and rows.model_name_or_path is None:
        raise GKDConfigError("with a teacher behind a server, the rows are prepared for the student: set --model")
    given = {name: getattr(options, name) for name in (*_TEACHER, *_ROWS)}
    with refusing_as_configuration():
        config = GKDConfig(output_dir=cache.output_dir, lmbda=0.0, report_to="none", **given)
    return CacheRun(cache, rows, config, _part(cache.part, config))


def _part(given: str | None, config: GKDConfig) -> Part | None:
    """Return the part of the rows that this process takes; None for all."""
    from gkd_trainer.teachers.cache import Part

    if config.world_size == 1:
        return None if given is None else Part.parsed(given)
    if given is not None:
        raise GKDConfigError(
            f"each of the {config.world_size} processes that were launched takes a part of the rows by itself: leave "
            f"part={given} out, or start one process"
        )
    return Part(number=config.process_index + 1, count=config.world_size)


def _parser(hints: Mapping[str, Any]) -> HfArgumentParser:
    from gkd_trainer.config import GKDConfig

    of_config = {option.name: option for option in fields(GKDConfig)}
    return build_parser(
        prog="gkd-trainer cache",
        usage="gkd-trainer cache (--teacher TEACHER | --teacher_server_base_url URL) --dataset DATA --output_dir CACHE "
        "[--config FILE] [OPTION ...]",
        description="Have a teacher score a dataset once, and write its predictions to a folder for `gkd-trainer "
        "train --teacher_cache_dir CACHE`, with the same options for the rows.",
        groups=[
            OptionGroup("cache", fields(CacheOptions)),
            OptionGroup("data", [*fields(RowOptions), *(of_config[name] for name in _ROWS)]),
            OptionGroup("teacher", [_with_own_help(of_config[name]) for name in _TEACHER]),
        ],
        hints=hints,
    )


def _with_own_help(option: Field[Any]) -> Field[Any]:
    own = copy(option)
    if option.name in _HELP:
        own.metadata = MappingProxyType({**option.metadata, "help": _HELP[option.name]})
    return own
