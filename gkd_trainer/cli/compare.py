"""`gkd-trainer compare`: several students of a teacher compared, in the terminal and in an HTML file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gkd_trainer.cli.parser import PlainParser
from gkd_trainer.cli.report import distinct_names, require_folder_of, write_page
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.quiet import quiet_imports

if TYPE_CHECKING:
    from gkd_trainer.report.measuring import MeasuredStudent
    from gkd_trainer.teachers import Teacher

SUMMARY = "compare several students with their teacher"


def run(arguments: Sequence[str]) -> None:
    """Measure each student, print the comparison, and write it to an HTML file.

    Raises:
        SystemExit: With status 2, for options that can't be parsed; with status 0, after help.
        GKDError: A model or the data can't be used, or the file can't be written.
    """
    options = _parser().parsed(arguments, required=("teacher", "dataset"))
    for name in ("rows", "batch_size", "max_new_tokens"):
        if getattr(options, name) < 1:
            raise GKDConfigError(f"--{name} must be at least 1; got {getattr(options, name)}")
    if options.samples < 0:
        raise GKDConfigError(f"--samples must be 0 or more; got {options.samples}")
    require_folder_of(Path(options.output_file))
    with quiet_imports():
        from gkd_trainer.cli.train_options import refusing_as_configuration
        from gkd_trainer.data.sources import RowSource, naming_broken_lines
        from gkd_trainer.models.heads import find_context
        from gkd_trainer.report.comparison import comparison_page, print_comparison
        from gkd_trainer.report.fitting import fitting_rows, reader_of
        from gkd_trainer.report.measuring import usable_rows
        from gkd_trainer.report.model_card import public_name
    from rich.console import Console

    source = RowSource("dataset", options.dataset, options.split, options.dataset_config, file_splits=("test", "train"))
    with refusing_as_configuration(), naming_broken_lines(source):
        loaded = source.load()
        rows = usable_rows(list(loaded.select(range(min(options.rows, len(loaded))))))
        readers = [reader_of(model, options.trust_remote_code) for model in options.models]
        teacher = _teacher(options)
        names = distinct_names(options.models)
        context = None if teacher.model is None else find_context(teacher.model)
        limit = None if context is None else context.limit
        fitting = fitting_rows(rows, readers, limit, options.max_new_tokens)
        students = [
            _measured(model, name, teacher, rows, fitting.kept, options)
            for model, name in zip(options.models, names, strict=True)
        ]
    name = public_name(options.teacher)
    n_rows, note = len(fitting.kept), fitting.note
    print_comparison(students, name, n_rows, Console(), note=note)
    write_page(Path(options.output_file), comparison_page(students, name, n_rows, note=note))


def _teacher(options: argparse.Namespace) -> Teacher:
    from gkd_trainer.teachers import FrozenTeacher

    return FrozenTeacher.from_pretrained(
        options.teacher, trust_remote_code=options.trust_remote_code, dtype=options.dtype
    )


def _measured(
    model: str,
    name: str,
    teacher: Teacher,
    rows: list[dict[str, object]],
    kept: Sequence[int],
    options: argparse.Namespace,
) -> MeasuredStudent:
    """Load one student, and measure it; its memory is free again afterwards."""
    import torch

    from gkd_trainer.models.loading import find_tokenizer, load_student
    from gkd_trainer.report.measuring import measured
    from gkd_trainer.report.pair import pair

    trusts = options.trust_remote_code
    student: torch.nn.Module = load_student(model, {"dtype": options.dtype}, trusts)
    device = None if options.use_cpu else torch.accelerator.current_accelerator(check_available=True)
    student.to(device or "cpu")
    return measured(
        pair(student, teacher, find_tokenizer(model, trusts)),
        name,
        rows,
        kept=kept,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        shown=options.samples,
    )


def _parser() -> PlainParser:
    parser = PlainParser(
        prog="gkd-trainer compare",
        usage="gkd-trainer compare MODEL... --teacher TEACHER --dataset DATA [OPTION ...]",
        description="Compare students with their teacher on the same rows: both KLs, agreement, acceptance, the "
        "accuracy if the rows have a number as ground_truth or are GSM8K's, and completions side by side.",
    )
    parser.add_argument("models", metavar="MODEL", nargs="+", help="a student: its name on the hub or its folder")
    parser.add_argument("--teacher", help="the teacher: its name on the hub or its folder (required)")
    parser.add_argument(
        "--dataset", help="the data: a name on the hub, a file, or a folder of files, as for train (required)"
    )
    parser.add_argument("--dataset_config", help="configuration of the dataset, such as main for openai/gsm8k")
    parser.add_argument("--split", default="test", help="split to compare on, or part of one, such as test[:100]")
    parser.add_argument("--rows", type=int, default=32, help="number of rows to compare on, from the start")
    parser.add_argument("--samples", type=int, default=4, help="number of rows whose completions are shown")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="maximum length of a completion, in tokens")
    parser.add_argument("--batch_size", type=int, default=8, help="number of rows that are scored at once")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="dtype of all models"
    )
    parser.add_argument("--use_cpu", action="store_true", help="compute on the CPU even if there is a GPU")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run Python code that comes with models and tokenizers"
    )
    parser.add_argument("--output_file", default="comparison.html", metavar="FILE", help="the HTML file")
    return parser
