"""The files of a cache: a manifest of what was cached, the teacher's vocabulary, its head, and shards of rows.

A file is written under another name, synced to disk and renamed, so that a name stands for complete contents. The
manifest is written last: files that it does not list are leftovers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gkd_trainer.errors import GKDTeacherError
from gkd_trainer.models.loading import name_of
from gkd_trainer.teachers.base import Teacher
from gkd_trainer.teachers.prompt_scores import TopScores, Witness, total_variation
from gkd_trainer.teachers.served import NOISE

MANIFEST = "manifest.json"
VOCABULARY = "vocabulary.json"
HEAD = "head.safetensors"
PARTIAL = ".partial"
"""The ending of a file that is being written."""

Kind = Literal["hidden", "hidden_int8", "topk"]
"""What is stored at a position: the final hidden state in 16 bits or in 8, or the top tokens."""


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StoredWitness(_Fields):
    """A teacher's `witness`: its tokens, and the ids and probabilities of the top tokens [P, K]."""

    token_ids: tuple[int, ...]
    top_ids: tuple[tuple[int, ...], ...]
    probabilities: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, witness: Witness | None) -> StoredWitness | None:
        """Return the witness of a teacher, if it has one."""
        if witness is None:
            return None
        ids_PK, p_PK = witness.scores.ids_PK, np.exp(witness.scores.log_p_PK).round(6)
        return cls(
            token_ids=tuple(witness.token_ids),
            top_ids=tuple(map(tuple, ids_PK.tolist())),
            probabilities=tuple(map(tuple, p_PK.tolist())),
        )

    @property
    def scores(self) -> TopScores:
        """The scores of the tokens."""
        with np.errstate(divide="ignore"):
            return TopScores(np.array(self.top_ids), np.log(np.array(self.probabilities)))


class CacheSource(_Fields):
    """What a cache was made from; None if unknown.

    `weights`, `tokenizer` and `chat_template` are SHA-256 digests of the teacher's weights, the tokenizer's map from
    tokens to ids, and its chat template. `vocab_size` counts the tokens that the teacher predicts over. `max_length`
    and `train_on` are the options that the rows were prepared with. `witness` stands in for the weights of a teacher
    behind a server.
    """

    teacher: str
    weights: str | None = None
    dtype: str | None = None
    vocab_size: int | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    max_length: int | None = None
    train_on: str | None = None
    witness: StoredWitness | None = None

    def differences(self, other: CacheSource) -> list[str]:
        """Return the names of the fields in which both differ, other than `witness`, for which see below.

        Known weights count, not the name: the same model may be in another folder.
        """
        are_weights_known = None not in (self.weights, other.weights)
        apart = {"witness", "teacher"} if are_weights_known else {"witness"}
        fields = [name for name in CacheSource.model_fields if name not in apart]
        return [name for name in fields if getattr(self, name) != getattr(other, name)]

    def witness_distance(self, other: CacheSource) -> float:
        """Return the mean total variation between both teachers' scores of one text; 0 if there is no such text."""
        one, another = self.witness, other.witness
        if one is None or another is None or one.token_ids != another.token_ids:
            return 0.0
        return total_variation(one.scores, another.scores)


class ShardEntry(_Fields):
    """A file of rows.

    `checksum` is the SHA-256 digest of its header and of its table, which holds a checksum of each row.
    """

    file: str
    rows: int
    positions: int
    size: int
    checksum: str


class Manifest(_Fields):
    """The contents of a cache.

    `dtype` is that of the hidden states or log-probs that are read from it, and `width` their number per position: H,
    or K top tokens. `files` has the SHA-256 digests of the other files.
    """

    version: Literal[1] = 1
    source: CacheSource
    kind: Kind
    dtype: str
    width: int
    compression: Literal["none", "zstd"]
    head_scale: float = 1.0
    head_softcap: float | None = None
    files: dict[str, str]
    shards: tuple[ShardEntry, ...] = ()
    is_complete: bool = False

    @property
    def top_k(self) -> int | None:
        """How many top tokens each position has; None for full distributions."""
        return self.width if self.kind == "topk" else None


def source_of(
    teacher: Teacher,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    name: str | None = None,
    max_length: int | None = None,
    train_on: str | None = None,
) -> CacheSource:
    """Return what a cache of a teacher's predictions is made from.

    Args:
        teacher: The teacher, prepared.
        tokenizer: The tokenizer of the rows.
        name: The teacher's name; by default its model's.
        max_length: The option that the rows were prepared with.
        train_on: The same.
    """
    model = teacher.model
    vocabulary = teacher.vocabulary if tokenizer is None else tokenizer.get_vocab()
    return CacheSource(
        teacher=name or name_of(model) or type(model or teacher).__name__,
        weights=None if model is None else weights_digest(model),
        dtype=None if model is None else dtype_name(model.dtype),
        vocab_size=teacher.vocab_size,
        tokenizer=None if vocabulary is None else vocabulary_digest(vocabulary),
        chat_template=template_digest(tokenizer),
        max_length=max_length,
        train_on=train_on,
        witness=StoredWitness.of(teacher.witness),
    )


def refuse_another_served(folder: Path, cached: CacheSource, given: CacheSource) -> None:
    """Raise GKDTeacherError if a server's scores of a fixed text show another model than the one that was cached."""
    distance = cached.witness_distance(given)
    if not distance <= NOISE:
        raise GKDTeacherError(
            f"the cache in {folder} was made with another model: the scores that {given.teacher!r} now gives a fixed "
            f"text differ by {distance:.2f} (mean total variation; rounding explains at most {NOISE}). Serve the model "
            "that was cached, or choose another folder"
        )


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a cache; raise GKDTeacherError if there is none, or if it was changed."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        written, checksum = content["manifest"], content["checksum"]
        if digest(_canonical(written)) != checksum:
            raise ValueError("its checksum does not match its contents")
        return Manifest.model_validate_json(json.dumps(written))
    except FileNotFoundError:
        raise GKDTeacherError(
            f"expected a cache of a teacher's predictions in {folder}; it has no {MANIFEST}: make one with "
            "`gkd-trainer cache`"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = _first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise damaged(path, f"it can't be read ({reason})") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a cache, complete or not at all."""
    content = manifest.model_dump(mode="json")
    text = json.dumps({"manifest": content, "checksum": digest(_canonical(content))}, indent=1)
    write_aside(folder / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` write a file under another name, sync it to disk, and rename it to `path`."""
    partial = path.with_name(path.name + PARTIAL)
    write(partial)
    _sync(partial)
    os.replace(partial, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damaged(path: Path, what: str) -> GKDTeacherError:
    """Return the error for a file of a cache that was damaged or changed."""
    return GKDTeacherError(
        f"{path} is damaged: {what}. Run the `gkd-trainer cache` command that made it again: it keeps the shards that "
        "are intact, and scores the other rows again; if that refuses the cache too, delete the folder first"
    )


def digest(content: bytes) -> str:
    """Return the SHA-256 digest of bytes."""
    return hashlib.sha256(content).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def vocabulary_digest(vocabulary: Mapping[str, int]) -> str:
    """Return a digest of a tokenizer's map from tokens to ids."""
    return digest(_canonical(dict(vocabulary)))


def template_digest(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """Return a digest of a tokenizer's chat template; None if it has none."""
    template = getattr(tokenizer, "chat_template", None)
    return None if template is None else digest(_canonical(template))


def weights_digest(model: nn.Module) -> str | None:
    """Return a digest of all weights of a model, with their names, dtypes and shapes; None if some are not loaded."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor):
            found.update(f"{name}={value!r}\n".encode())
        elif value.is_meta:
            return None
        else:
            found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            found.update(tensor_bytes(value))
    return found.hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """Return a digest of the values and the dtype of a tensor."""
    return digest(dtype_name(tensor.dtype).encode() + tensor_bytes(tensor))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, in its dtype."""
    flat: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
