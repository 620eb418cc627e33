"""GSM8K (grade-school mathematics): rows as conversations, and the score of a completion's final number."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, load_dataset

from gkd_trainer.errors import GKDDataError

INSTRUCTION = 'Reason step by step, and end with "#### " and the number that is the answer.'
"""Added to a question, it makes an untrained model write its answer where `final_number` looks for it."""

Form = Literal["prompt", "conversation"]

_ANSWER_MARK = "####"
_ANSWER_PHRASE = re.compile(r"answer\s+is", re.IGNORECASE)
# A minus after a digit, a letter or a bracket subtracts: "16-3" ends with 3, "x = -3" with -3.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]])[-\u2212])?\$?(?P<inner_sign>(?<=\$)[-\u2212])?"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
)


def load(
    source: str | Path = "openai/gsm8k",
    split: str = "train",
    form: Form = "conversation",
    limit: int | None = None,
    instruction: str | None = None,
) -> Any:
    """Load GSM8K as a `datasets.Dataset` of conversations.

    Args:
        source: the hub's name, a folder with `<split>.jsonl`, or a JSON-lines file (`split` is ignored).
        split: "train" or "test".
        form: "prompt" for `to_prompt` (on-policy), "conversation" for `to_conversation` (off-policy).
        limit: how many rows to take from the start; None takes all.
        instruction: text to add to each question, such as `INSTRUCTION`; None adds nothing.

    Raises:
        GKDDataError: `form` is unknown, or the folder has no such split.

    """
    if form not in ("prompt", "conversation"):
        raise GKDDataError(f'form must be "prompt" or "conversation"; got {form!r}')
    rows = _load_rows(source, split)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    convert = to_prompt if form == "prompt" else to_conversation
    return rows.map(convert, fn_kwargs={"instruction": instruction}, remove_columns=rows.column_names)


def to_prompt(row: Mapping[str, Any], instruction: str | None = None) -> dict[str, Any]:
    """Return a question as a prompt without a completion, with the answer's number as `ground_truth`."""
    return {"prompt": [_question(row, instruction)], "ground_truth": ground_truth(row["answer"])}


def to_conversation(row: Mapping[str, Any], instruction: str | None = None) -> dict[str, Any]:
    """Return a question and its answer as a conversation, with the answer's number as `ground_truth`."""
    answer = {"role": "assistant", "content": row["answer"]}
    return {"messages": [_question(row, instruction), answer], "ground_truth": ground_truth(row["answer"])}


def is_problem(row: Mapping[str, Any]) -> bool:
    """Return whether a row has GSM8K's columns, and an answer that ends with a number after `####`."""
    question, answer = row.get("question"), row.get("answer")
    return isinstance(question, str) and isinstance(answer, str) and _marked_number(answer) is not None


def ground_truth(answer: str) -> str:
    """Return the number after the last `####` of an answer, as plain digits: "$1,234.50" is "1234.5".

    Raises:
        GKDDataError: there is none.

    """
    number = _marked_number(answer)
    if number is None:
        raise GKDDataError(f'expected an answer that ends with "#### <number>"; got {answer[-80:]!r}')
    return _plain(number)


def final_number(text: str) -> Decimal | None:
    """Return the number that a completion ends with, or None if it has none.

    That is the number after the last `####`, else the one after the last "answer is", else the last number.
    """
    marks = [match.end() for match in re.finditer(_ANSWER_MARK, text)]
    phrases = [match.end() for match in _ANSWER_PHRASE.finditer(text)]
    for position in [*reversed(marks), *reversed(phrases)]:
        number = _first_number(text[position:])
        if number is not None:
            return number
    numbers = list(_NUMBER.finditer(text))
    return _decimal(numbers[-1]) if numbers else None


def is_number(text: str) -> bool:
    """Return whether a text is one number and nothing else, so that `is_correct` can compare with it."""
    return _NUMBER.fullmatch(text.strip()) is not None


def is_correct(completion: str, ground_truth: str) -> bool:
    """Return whether a completion's final number equals `ground_truth` (as `to_prompt` gives it)."""
    number = final_number(completion)
    return number is not None and number == final_number(ground_truth)


def _question(row: Mapping[str, Any], instruction: str | None) -> dict[str, str]:
    question = row["question"] if instruction is None else f"{row['question']}\n\n{instruction}"
    return {"role": "user", "content": question}


def _load_rows(source: str | Path, split: str) -> Any:
    path = Path(source)
    if path.is_dir():
        path = path / f"{split}.jsonl"
        if not path.is_file():
            raise GKDDataError(f"expected {split}.jsonl in {source}; there is none: give another folder or split")
    if path.is_file():
        return Dataset.from_json(str(path))
    return load_dataset(str(source), "main", split=split)


def _marked_number(answer: str) -> Decimal | None:
    return _first_number(answer.rpartition(_ANSWER_MARK)[2]) if _ANSWER_MARK in answer else None


def _first_number(text: str) -> Decimal | None:
    match = _NUMBER.search(text)
    return None if match is None else _decimal(match)


def _decimal(match: re.Match[str]) -> Decimal:
    number = Decimal(match["digits"].replace(",", ""))
    return -number if match["sign"] or match["inner_sign"] else number


def _plain(number: Decimal) -> str:
    return format(number.normalize() if number else Decimal(0), "f")
