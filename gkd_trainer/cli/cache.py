"""`gkd-trainer cache`: have a teacher score a dataset once, for runs that read its predictions from disk."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from gkd_trainer.cli.cache_options import parse
from gkd_trainer.cli.train_options import refusing_as_configuration
from gkd_trainer.quiet import quiet_imports

SUMMARY = "write a teacher's predictions to disk, to train from"


def run(arguments: Sequence[str]) -> None:
    """Write the cache, or continue it, and print its size.

    Raises:
        SystemExit: With status 2, for options that can't be parsed; with status 0, after help.
        GKDError: Input that can't be used, or a failed teacher or disk; running the command again continues the cache.
    """
    with quiet_imports():
        importlib.import_module("gkd_trainer.config")
        importlib.import_module("peft")
    options = parse(arguments)
    config, cache, part = options.config, options.cache, options.part
    source = options.rows.source()

    from gkd_trainer.data.sources import in_format, naming_broken_lines
    from gkd_trainer.models.loading import find_processing_class, outline
    from gkd_trainer.teachers import build_teacher
    from gkd_trainer.teachers.cache.parts import folder_to_write, progress
    from gkd_trainer.trainer.caching import cache_predictions

    trusts, name = config.trust_remote_code, options.rows.model_name_or_path
    init_kwargs = cast("dict[str, Any] | None", config.model_init_kwargs)  # JSON is parsed already
    student = None if name is None else outline(name, init_kwargs, trusts)
    if name is None:
        name = config.teacher_model_name_or_path or ""
        init_kwargs = cast("dict[str, Any] | None", config.teacher_model_init_kwargs)
    output_dir = Path(cache.output_dir or "")
    folder = folder_to_write(output_dir, part)  # refused before the teacher is loaded
    rows = in_format(source, source.load())
    with refusing_as_configuration(), naming_broken_lines(source):
        manifest = cache_predictions(
            build_teacher(config, trust_remote_code=trusts),
            rows,
            output_dir,
            config,
            student=student,
            processing_class=find_processing_class(name, trusts, init_kwargs),
            kind=cast(Any, cache.kind),
            compression=cast(Any, cache.compression),
            shard_mb=cache.shard_mb,
            batch_size=cache.batch_size,
            part=None if part is None else (part.number, part.count),
        )
    n_rows, n_positions, size = (
        sum(getattr(shard, name) for shard in manifest.shards) for name in ("rows", "positions", "size")
    )
    print(f"{folder}: {n_rows} rows, {n_positions} tokens, {size / 1e6:.1f} MB ({manifest.kind})")
    if part is not None:
        print(progress(output_dir, part.count))
