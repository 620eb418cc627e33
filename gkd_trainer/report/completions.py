"""Completions to read: a table in the terminal, and the same table in the active trackers."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback

from gkd_trainer.report.pieces import readable
from gkd_trainer.types import Generated


@dataclass(frozen=True)
class CompletionRow:
    """One line of the table; `is_finished` means that the completion ended with a stop token."""

    generated_by: str
    prompt: str
    completion: str
    is_finished: bool


def completion_rows(generated: Sequence[Generated], tokenizer: PreTrainedTokenizerBase | None) -> list[CompletionRow]:
    """Return the lines of the table as text, or as token ids without a tokenizer."""

    def text(token_ids: Sequence[int]) -> str:
        return " ".join(map(str, token_ids)) if tokenizer is None else str(tokenizer.decode(list(token_ids)))

    return [
        CompletionRow(
            "student" if item.is_on_policy else "teacher",
            text(item.prompt),
            text(item.completion.token_ids),
            item.completion.is_finished,
        )
        for item in generated
    ]


def print_completions(rows: Sequence[CompletionRow], title: str | None = None, console: Console | None = None) -> None:
    """Print the table, to a new console if none is given."""
    table = Table(title=title, show_lines=True, expand=True)
    for name, ratio in (("by", None), ("prompt", 1), ("completion", 1), ("ended", None)):
        table.add_column(name, ratio=ratio, overflow="fold")
    for row in rows:
        # Text, not str: brackets in a completion are not markup.
        # Readable: a terminal would obey their control characters.
        prompt, completion = Text(readable(row.prompt)), Text(readable(row.completion))
        table.add_row(row.generated_by, prompt, completion, "yes" if row.is_finished else "cut off")
    (console or Console()).print(table)


def send_completions(rows: Sequence[CompletionRow], step: int, callbacks: Iterable[TrainerCallback]) -> None:
    """Send the completions to the active trackers: to TensorBoard as text, to Weights & Biases as a table."""
    columns = [field.name for field in fields(CompletionRow)]
    for callback in callbacks:
        writer = getattr(callback, "tb_writer", None) if isinstance(callback, TensorBoardCallback) else None
        if writer is not None:
            lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
            lines += [" | ".join(_cell(value) for value in astuple(row)) for row in rows]
            writer.add_text("completions", "\n".join(f"| {line} |" for line in lines), step)
    # The module is loaded only if the user's run imported it.
    wandb = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        table = wandb.Table(columns=columns, data=[list(astuple(row)) for row in rows])
        wandb.log({"completions": table}, commit=False)


# Whatever Markdown or HTML reads as more than itself, as numeric entities: a completion must not load an image.
_ENTITIES = {ord(character): f"&#{ord(character)};" for character in "\\`*_[]<>&!|~#"}


def _cell(value: object) -> str:
    lines = str(value).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "<br>".join(readable(line).translate(_ENTITIES) for line in lines)
