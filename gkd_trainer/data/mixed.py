"""Columns whose rows differ in type: `datasets` stores them as JSON, and takes texts that are JSON for their values."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from datasets import Dataset, Features, Json, LargeList, List

from gkd_trainer.errors import GKDDataError


def dataset_of(rows: list[Any], name: str) -> Dataset:
    """Return a list of rows as a Dataset that gives each text back as it is, also where other rows have no text.

    Raises GKDDataError, which calls the rows `name`, if they are not mappings.
    """
    if not all(isinstance(row, Mapping) for row in rows):
        kind = next(type(row).__name__ for row in rows if not isinstance(row, Mapping))
        raise GKDDataError(f'{name}: expected a list of dicts, such as {{"messages": [...]}}; it holds {kind}')
    # `from_list` takes only the columns of the first row.
    columns = dict.fromkeys(column for row in rows for column in row)
    full_rows = [{column: row.get(column) for column in columns} for row in rows]
    dataset = Dataset.from_list(full_rows, on_mixed_types="use_json")
    features = dataset.features
    if not any(True for _ in _places(features, "")):
        return dataset
    return Dataset.from_list([_with_texts_as_json(row, features) for row in full_rows], features=features)


def parsed_texts(features: Features | None, columns: Collection[str]) -> list[str]:
    """Return the places in some columns of a dataset where texts may have been parsed as JSON when it was made.

    Arguments of tool calls are not among them: their JSON means the same as the object.
    """
    held = {column: feature for column, feature in (features or {}).items() if column in columns}
    places = [place for column, feature in held.items() for place in _places(feature, column)]
    return [place for place in places if not place.endswith(("[]", ".arguments"))]


def _places(feature: Any, path: str) -> Iterator[str]:
    """Return the paths of a feature's JSON; `[]` is an item of a list."""
    if isinstance(feature, Json):
        yield path
    elif isinstance(feature, List | LargeList):
        yield from _places(feature.feature, f"{path}[]")
    elif isinstance(feature, Mapping):
        for name, inner in feature.items():
            yield from _places(inner, f"{path}.{name}")


def _with_texts_as_json(value: Any, feature: Any) -> Any:
    """Return a value with each text that is stored as JSON encoded: a text that is JSON would be stored as it is."""
    if isinstance(feature, Json):
        return json.dumps(value) if isinstance(value, str) else value
    if isinstance(feature, List | LargeList) and isinstance(value, list | tuple):
        return [_with_texts_as_json(item, feature.feature) for item in value]
    if isinstance(feature, Mapping) and isinstance(value, Mapping):
        return {name: _with_texts_as_json(item, feature.get(name)) for name, item in value.items()}
    return value
