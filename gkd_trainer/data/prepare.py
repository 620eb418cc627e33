"""Turn a dataset of any kind into one of token ids and labels, and count its unusable rows."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value

from gkd_trainer.batch_keys import PROMPT_IDS, SIDE_TENSORS, TEACHER_INDEX, TEACHER_PROMPT_IDS
from gkd_trainer.data.images import ImageProcessing
from gkd_trainer.data.keys import checked_key
from gkd_trainer.data.map_cache import code_version, one_process_at_a_time
from gkd_trainer.data.mixed import dataset_of, parsed_texts
from gkd_trainer.data.routing import TeacherRoute
from gkd_trainer.data.rows import RowPreparer
from gkd_trainer.data.rules import RowRules
from gkd_trainer.data.teacher_prompts import TEACHER_PROMPT, TeacherPrompts
from gkd_trainer.data.tokens import SEQ_LENGTHS, RowDropped, lengths_of
from gkd_trainer.errors import GKDDataError

logger = logging.getLogger(__name__)

_PROBLEM = "gkd_problem"
_N_PROMPT = "gkd_n_prompt"
_NEEDED_LENGTH = "gkd_needed_length"
_UNENDED = "gkd_unended"
_IS_CUT = "gkd_is_cut"
_BOOKKEEPING = [_PROBLEM, _N_PROMPT, _NEEDED_LENGTH, _UNENDED, _IS_CUT]

_NEW_FEATURES = {
    "input_ids": List(Value("int32")),
    "labels": List(Value("int32")),
    _PROBLEM: Value("string"),
    _N_PROMPT: Value("int64"),
    _NEEDED_LENGTH: Value("int64"),
    _UNENDED: Value("string"),
    _IS_CUT: Value("bool"),
}

_KEY_COLUMNS = {side.name for side in SIDE_TENSORS.values() if side.is_column and not side.is_list}
"""The columns of integers that a batch carries with its tokens."""

_TABLES = ("arrow", "pandas", "polars")
"""Formats of a Dataset in which a row is a table, which no collator takes."""

_N_REASONS_SHOWN = 8
_N_ROWS_SHOWN = 10


def prepare_dataset(
    dataset: Any,
    tokenizer: Any,
    rules: RowRules,
    *,
    formatting_func: Callable[[Any], Any] | None = None,
    images: ImageProcessing | None = None,
    num_proc: int | None = None,
    name: str = "train",
    route: TeacherRoute | None = None,
    teacher_prompts: TeacherPrompts | None = None,
    needs_all: bool = False,
) -> Any:
    """Turn rows of any of the usual formats into token ids and labels.

    Args:
        dataset: a `datasets.Dataset`, a `datasets.IterableDataset`, a list of dicts, or any other dataset
            whose rows have `input_ids` already (returned untouched).
        tokenizer: holds the vocabulary and the chat template; None suffices for tokenised rows.
        rules: which rows can be used, and which of their tokens are trained on.
        formatting_func: turns a row into a text, a list of messages, or a row in one of the usual formats.
        images: turns the rows' images into tokens; None refuses rows with images.
        num_proc: number of processes for a `Dataset`.
        name: the dataset's name in the log and on the progress bar.
        route: how a row gets one of several teachers; its index becomes the column TEACHER_INDEX.
        teacher_prompts: how a column `teacher_prompt` becomes token ids; by default by the same tokenizer.
        needs_all: raise for rows that can't be used, instead of leaving them out; a stream raises when it reaches one.

    Returns:
        A dataset of the same kind (a list becomes a `Dataset`) with the columns `input_ids` and `labels`
        besides its own. Labels are IGNORE_INDEX for tokens that are not trained on: all tokens of a row that is only a
        prompt. If completions are generated there is also PROMPT_IDS: the prompt of a row's completion if it
        differs from the tokens before the row's last trained run, else empty. A row with a `teacher_prompt` gets
        TEACHER_PROMPT_IDS, and is trained on only in its last run, since that prompt replaces all before it; so is any
        row that may get such a prompt later. Rows that can't be used are left out and counted in the log. Columns of
        SIDE_TENSORS such as ROW_KEY are kept, as int64.

    Raises:
        GKDDataError: the format can't be used with these rules or this tokenizer, no row can be used (or not all of
            them, with `needs_all`), a row's value of a side tensor is not an integer, or a row names no teacher of
            `route`.

    """
    if isinstance(dataset, list):
        dataset = dataset_of(dataset, name)
    elif isinstance(dataset, Dataset | IterableDataset):
        _warn_of_parsed_texts(dataset, rules, name)
    if isinstance(dataset, Dataset | IterableDataset):
        preparer = RowPreparer.create(tokenizer, rules, formatting_func, images=images, teacher_prompts=teacher_prompts)
        prepare = _PrepareRow(preparer, route, True, name)
        if isinstance(dataset, Dataset):
            return _prepare_map_style(dataset, prepare, num_proc, needs_all)
        return _prepare_iterable(dataset, prepare, needs_all)
    if not isinstance(dataset, Mapping) and _is_tokenised(dataset) and formatting_func is None:
        if route is not None and TEACHER_INDEX not in next(iter(dataset)):
            raise GKDDataError(
                f"{name}: a {type(dataset).__name__} is used as is, so its rows must have a {TEACHER_INDEX}, the "
                f"index of one of the teachers {', '.join(route.names)}, from 0: add it, or convert the rows with "
                "datasets.Dataset.from_list(rows)"
            )
        return dataset
    raise GKDDataError(
        f"{name}: expected a datasets.Dataset, a datasets.IterableDataset, a list of dicts, or a dataset "
        f"whose rows have `input_ids`; got {type(dataset).__name__}: convert it with "
        "datasets.Dataset.from_list(rows)" + (", or pick one of its splits" if isinstance(dataset, Mapping) else "")
    )


def first_row(dataset: Any) -> Mapping[str, Any] | None:
    """Return the first row of a dataset; None if it has none, or no mapping, or would lose it."""
    try:
        rows = iter(dataset)  # Also works for a dataset that only has `__getitem__`.
    except TypeError:
        return None
    first = None if rows is dataset else next(rows, None)  # a generator would lose it
    return first if isinstance(first, Mapping) else None


@dataclass(frozen=True)
class _PrepareRow:
    """The function for `map`: it marks unusable rows in a column, since processes share no state.

    `code` is read by the cache of `datasets` alone.
    """

    preparer: RowPreparer
    route: TeacherRoute | None
    is_refusal_raised: bool
    name: str
    has_teacher_prompts: bool = False
    is_drop_raised: bool = False
    has_lengths: bool = False
    code: tuple[str, ...] = field(default_factory=code_version)

    def for_rows_like(self, first: Mapping[str, Any]) -> _PrepareRow:
        """Return the function for a dataset with this first row."""
        return replace(
            self,
            has_teacher_prompts=self.preparer.has_teacher_prompt(first),
            has_lengths=SEQ_LENGTHS in first,
        )

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        # `map` would encode again what is read of its own row: images, and as JSON texts beside other types.
        row = copy(row)
        # Raised in a stream too: a teacher that looks up keys would confuse the rows.
        for name in _KEY_COLUMNS & row.keys():
            checked_key(row[name], f"{self.name}: row {index}", name)
        teacher = {}
        if self.route is not None:
            try:
                teacher = {TEACHER_INDEX: self.route.index_of(row)}
            except GKDDataError as refusal:
                if self.is_refusal_raised:
                    raise GKDDataError(f"{self.name}: row {index}: {refusal}") from refusal
                return {**self._dropped(str(refusal), 0), TEACHER_INDEX: -1}
        prepared = self._with_lengths(self._prepared(row))
        if self.is_drop_raised and prepared[_PROBLEM]:
            raise GKDDataError(_not_all(self.name, [index], prepared[_PROBLEM]))
        return {**prepared, **teacher}

    def _prepared(self, row: Mapping[str, Any]) -> dict[str, Any]:
        try:
            prepared = self.preparer.prepare(row)
        except RowDropped as dropped:
            return self._dropped(dropped.reason, dropped.needed_length)
        except GKDDataError as refusal:
            if self.is_refusal_raised:
                raise
            return self._dropped(str(refusal), 0)
        if prepared.teacher_prompt_ids and not self.has_teacher_prompts:
            return self._dropped(f"{TEACHER_PROMPT}, but the first row has none: give that one too, or None", 0)
        return {
            **prepared.per_token,
            "input_ids": prepared.input_ids,
            "labels": prepared.labels,
            **self._prompts(prepared.prompt_ids, prepared.teacher_prompt_ids),
            _PROBLEM: "",
            _N_PROMPT: prepared.n_prompt,
            _NEEDED_LENGTH: 0,
            _UNENDED: prepared.unended,
            _IS_CUT: prepared.is_cut,
        }

    def _with_lengths(self, prepared: dict[str, Any]) -> dict[str, Any]:
        """Return a row with `position_ids` in the place of `seq_lengths`, and those as the row was cut."""
        if not self.has_lengths:
            return prepared
        positions = prepared.get("position_ids")  # none if it is dropped
        lengths = None if positions is None else lengths_of(positions)
        return {**prepared, "position_ids": positions, SEQ_LENGTHS: lengths}

    def _dropped(self, reason: str, needed_length: int) -> dict[str, Any]:
        return {
            "input_ids": [],
            "labels": [],
            **self._prompts([], []),
            _PROBLEM: reason,
            _N_PROMPT: 0,
            _NEEDED_LENGTH: needed_length,
            _UNENDED: "",
            _IS_CUT: False,
        }

    def _prompts(self, prompt_ids: list[int], teacher_prompt_ids: list[int]) -> dict[str, list[int]]:
        own = {PROMPT_IDS: prompt_ids} if self.preparer.rules.keeps_prompts else {}
        return {**own, TEACHER_PROMPT_IDS: teacher_prompt_ids} if self.has_teacher_prompts else own


@dataclass
class _KeepUsable:
    """The filter of an iterable dataset; logs at the first, tenth, hundredth row why rows are dropped."""

    name: str
    rules: RowRules
    counts: Counter[str] = field(default_factory=Counter)
    is_promptless_seen: bool = False
    is_unended_seen: bool = False
    is_cut_seen: bool = False

    def __call__(self, problem: str, n_prompt: int, unended: str, is_cut: bool) -> bool:
        if problem:
            self.counts[problem] += 1
            n_dropped = self.counts[problem]
            if n_dropped == 10 ** (len(str(n_dropped)) - 1):
                rows = "row" if n_dropped == 1 else "rows"
                logger.warning("%s: %d %s dropped so far: %s", self.name, n_dropped, rows, problem)
            return False
        if n_prompt == 0 and self.rules.is_generating and not self.is_promptless_seen:
            self.is_promptless_seen = True
            logger.warning("%s: rows without a prompt (trained on from the first token) stay off-policy", self.name)
        if unended and not self.is_unended_seen:
            self.is_unended_seen = True
            logger.warning("%s: last assistant turns end with %s", self.name, unended)
        if is_cut and not self.is_cut_seen:
            self.is_cut_seen = True
            logger.warning("%s: rows longer than max_length=%s are cut", self.name, self.rules.max_length)
        return True


def _prepare_map_style(dataset: Any, prepare: _PrepareRow, num_proc: int | None, needs_all: bool) -> Any:
    preparer, name = prepare.preparer, prepare.name
    if len(dataset) == 0:
        raise GKDDataError(f"{name}: expected at least one row; got an empty dataset")
    num_proc = min(num_proc, len(dataset)) if num_proc is not None and num_proc > 1 else None
    if dataset.format["type"] == "custom":
        # A transform would run again over the prepared rows, and replace or miss their columns.
        columns = dataset.column_names
        dataset = dataset.map(dict, remove_columns=columns, num_proc=num_proc, desc=f"Transforming {name}")
        dataset = dataset.with_format(None)
    rows = dataset.with_format(None)  # A format gives arrays or tables in place of messages.
    prepare = prepare.for_rows_like(rows[0])
    _warn_of_date(preparer, rows[0], name)
    features = _features(rows, prepare)
    with one_process_at_a_time(rows, prepare):
        mapped = rows.map(prepare, with_indices=True, features=features, num_proc=num_proc, desc=f"Preparing {name}")
    notes = mapped.with_format(None).select_columns(_BOOKKEEPING)[:]
    counts = Counter(problem for problem in notes[_PROBLEM] if problem)
    usable = [i for i, problem in enumerate(notes[_PROBLEM]) if not problem]
    if not usable:
        raise GKDDataError(_none_left(name, len(dataset), counts, notes[_NEEDED_LENGTH], preparer.rules))
    if counts:
        n_dropped, reasons = counts.total(), _reasons(counts)
        if needs_all:
            unusable = [i for i, problem in enumerate(notes[_PROBLEM]) if problem]
            raise GKDDataError(_not_all(name, unusable, reasons))
        logger.warning("%s: %d of %d rows dropped: %s", name, n_dropped, len(dataset), reasons)
        mapped = mapped.select(usable)
    n_promptless = sum(notes[_N_PROMPT][i] == 0 for i in usable)
    if n_promptless and preparer.rules.is_generating:
        logger.warning(
            "%s: %d of %d rows have no prompt (they are trained on from the first token) and stay off-policy",
            name,
            n_promptless,
            len(usable),
        )
    unended = Counter(end for end in (notes[_UNENDED][i] for i in usable) if end)
    if unended:
        [(end, count)] = unended.most_common(1)
        logger.warning("%s: in %d of %d rows the last assistant turn ends with %s", name, count, len(usable), end)
    n_cut = sum(notes[_IS_CUT][i] for i in usable)
    if n_cut:
        logger.warning("%s: %d of %d rows cut to max_length=%d", name, n_cut, len(usable), preparer.rules.max_length)
    return _with_format_of(dataset, mapped.remove_columns(_BOOKKEEPING))


def _with_format_of(dataset: Any, mapped: Any) -> Any:
    """Return a prepared dataset in the format of the one that it was made from, unless that gives tables for rows.

    Columns that the format hides stay hidden, but for the tokens.
    """
    given = dataset.format
    if given["type"] in _TABLES:
        return mapped
    hidden = set(dataset.column_names) - {*given["columns"], "input_ids", "labels"}
    shown = [column for column in mapped.column_names if column not in hidden]
    is_all = given["output_all_columns"]
    return mapped.with_format(given["type"], columns=shown, output_all_columns=is_all, **given["format_kwargs"])


def _prepare_iterable(dataset: Any, prepare: _PrepareRow, needs_all: bool) -> Any:
    preparer, name = prepare.preparer, prepare.name
    # The first row decides now whether the format can be used; later, during training, rows are only dropped.
    first = next(iter(dataset.take(1)), None)
    if first is None:
        raise GKDDataError(f"{name}: expected at least one row; got an empty dataset")
    prepare = replace(prepare.for_rows_like(first), is_drop_raised=needs_all)
    _warn_of_date(preparer, first, name)
    prepare(first, 0)
    features = None if dataset.features is None else _features(dataset, prepare)
    mapped = dataset.map(replace(prepare, is_refusal_raised=needs_all), with_indices=True, features=features)
    keep = _KeepUsable(name, preparer.rules)
    return mapped.filter(keep, input_columns=[_PROBLEM, _N_PROMPT, _UNENDED, _IS_CUT]).remove_columns(_BOOKKEEPING)


def _warn_of_date(preparer: RowPreparer, row: Mapping[str, Any], name: str) -> None:
    places = {"": preparer.writes_date(row), " into the teacher's prompts": preparer.writes_date_for_teacher(row)}
    for place in (place for place, is_dated in places.items() if is_dated):
        logger.warning(
            "%s: the chat template writes today's date%s, so tomorrow these rows have other tokens: a resumed run "
            "trains on other prompts, and a cache does not find them. Give the date in the column chat_template_kwargs "
            "(to Llama 3.2's template as date_string), or write it into tokenizer.chat_template in place of "
            "strftime_now",
            name,
            place,
        )


def _warn_of_parsed_texts(dataset: Any, rules: RowRules, name: str) -> None:
    columns = {"messages", "conversations", "prompt", "completion", TEACHER_PROMPT, rules.text_field}
    is_prepared = "input_ids" in (dataset.features or ())
    if not is_prepared and (places := parsed_texts(dataset.features, columns)):
        logger.warning(
            '%s: %s holds texts beside values of other types, so `datasets` has read texts that are JSON, such as "4", '
            "as their values. Give all rows one form (contents all as texts, or all as lists of parts), or pass the "
            "rows as a list of dicts",
            name,
            ", ".join(places),
        )


def _features(dataset: Any, prepare: _PrepareRow) -> Features:
    names = [PROMPT_IDS] * prepare.preparer.rules.keeps_prompts + [TEACHER_PROMPT_IDS] * prepare.has_teacher_prompts
    prompts = {name: List(Value("int32")) for name in names}
    keys = {name: Value("int64") for name in _KEY_COLUMNS & dataset.features.keys()}
    if prepare.route is not None:
        keys[TEACHER_INDEX] = Value("int64")
    positions = {"position_ids": List(Value("int32"))} if prepare.has_lengths else {}
    return Features({**positions, **dataset.features, **_NEW_FEATURES, **prompts, **keys})


def _is_tokenised(dataset: Any) -> bool:
    return "input_ids" in (first_row(dataset) or {})


def _reasons(counts: Counter[str]) -> str:
    shown = [f"{n} {reason}" for reason, n in counts.most_common(_N_REASONS_SHOWN)]
    n_others = counts.total() - sum(n for _, n in counts.most_common(_N_REASONS_SHOWN))
    return ", ".join([*shown, f"{n_others} for other reasons"] if n_others else shown)


def _not_all(name: str, unusable: list[int], reasons: str) -> str:
    shown = ", ".join(map(str, unusable[:_N_ROWS_SHOWN])) + (", …" if len(unusable) > _N_ROWS_SHOWN else "")
    return (
        f"{name}: expected that each row can be used, so that predictions line up with them; got {reasons} (row "
        f"{shown}, from 0): correct or remove {'it' if len(unusable) == 1 else 'them'}"
    )


def _none_left(name: str, n_rows: int, counts: Counter[str], needed_lengths: list[int], rules: RowRules) -> str:
    message = f"{name}: none of the {n_rows} rows can be used: {_reasons(counts)}"
    needed = min((length for length in needed_lengths if length), default=None)
    if needed is None:
        return message
    if rules.is_generating and not rules.is_encoder_decoder:
        shortest = needed - rules.max_new_tokens
        return f"{message}. The shortest prompt has {shortest} tokens: set max_length to {needed} or more"
    return f"{message}. Set max_length to {needed} or more for the first of them to fit"
