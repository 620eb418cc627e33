"""Which checkpoints of a run are whole: a process that is killed while it saves leaves one that is not."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME

from gkd_trainer.errors import GKDConfigError

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")

# What Trainer and the rollouts write, and how it tells that it was cut off; of files of others nothing is known.
_SAFETENSORS = ("model*.safetensors", "adapter_model*.safetensors")
_JSON = (TRAINER_STATE_NAME, "rollouts-rank*.json")
_ARCHIVES = (
    "adapter_model.bin",
    "optimizer.pt",
    "pytorch_model*.bin",
    "rng_state*.pth",
    "scaler.pt",
    "scheduler.pt",
    "training_args.bin",
)


def damage(checkpoint: Path) -> str | None:
    """Return what a checkpoint lacks or which of its files was cut off; None where it is whole.

    Trainer's state is written last, once all ranks have written what is theirs (see `GKDMixin._save_rng_state`). No
    weights are loaded.
    """
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        return f"it has no {TRAINER_STATE_NAME}, which is written last"
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        problem = _damage_of(file)
        if problem is not None:
            return f"{file.relative_to(checkpoint)} {problem}"
    return None


def find_last_whole(output_dir: str | Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint of a run that is whole, or None, and what each newer one lacks."""
    damaged: list[str] = []
    for checkpoint in _checkpoints_in(Path(output_dir)):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint, damaged
        damaged.append(f"{checkpoint.name}: {problem}")
    return None, damaged


def last_whole_checkpoint(output_dir: str | Path) -> Path:
    """Return the newest checkpoint of a run that is whole; log a warning for newer ones that are not.

    Raises:
        GKDConfigError: There is none.
    """
    checkpoint, damaged = find_last_whole(output_dir)
    listed = "; ".join(damaged)
    if checkpoint is None:
        found = listed or f"no folder of the form checkpoint-STEP in {output_dir}"
        raise GKDConfigError(
            f"resume_from_checkpoint=True needs a whole checkpoint in output_dir; found {found}. Leave "
            "resume_from_checkpoint out to start from the beginning, or set output_dir to that of the run to resume"
        )
    if damaged:
        logger.warning(
            "Resuming from %s, the last whole checkpoint. The run ended while it saved %s", checkpoint, listed
        )
    return checkpoint


def required_whole(checkpoint: str | Path) -> Path:
    """Return a checkpoint that was named.

    Raises:
        GKDConfigError: It is not there, or not whole.
    """
    path = Path(checkpoint)
    problem = damage(path) if path.is_dir() else "there is no such folder"
    if problem is None:
        return path
    others = [other for other in _checkpoints_in(path.parent) if other != path and damage(other) is None]
    remedy = f"resume from {others[0]}" if others else "start from the beginning"
    raise GKDConfigError(f"can't resume from the checkpoint {path}: {problem}. Use True for the last one, or {remedy}")


def checkpoint_to_resume(resume_from_checkpoint: str | Path | bool | None, output_dir: str | Path) -> str | None:
    """Return the checkpoint that Trainer is to resume from: a whole one; None for none.

    Args:
        resume_from_checkpoint: True for the last whole one in `output_dir`, a folder, or None or False for none.
        output_dir: Where the run saves its checkpoints.

    Raises:
        GKDConfigError: There is none, or the one that was named is not whole.
    """
    if resume_from_checkpoint is True:
        return str(last_whole_checkpoint(output_dir))
    return str(required_whole(resume_from_checkpoint)) if resume_from_checkpoint else None


def save_rollouts(checkpoint: str | Path, rank: int, states: list[dict[str, Any]]) -> None:
    """Keep in a checkpoint the completions of a rank that are not trained on yet."""
    file = _rollouts_file(checkpoint, rank)
    if states:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(states))
    else:  # that of an older run in the same folder
        file.unlink(missing_ok=True)


def load_rollouts(checkpoint: str | Path | None, rank: int) -> list[dict[str, Any]]:
    """Return what `save_rollouts` kept, if there is a checkpoint and it kept anything."""
    file = None if checkpoint is None else _rollouts_file(checkpoint, rank)
    states: list[dict[str, Any]] = json.loads(file.read_text()) if file is not None and file.exists() else []
    return states


def _rollouts_file(checkpoint: str | Path, rank: int) -> Path:
    return Path(checkpoint) / f"rollouts-rank{rank}.json"


def _checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest first."""
    if not folder.is_dir():
        return []
    steps = {path: _CHECKPOINT.fullmatch(path.name) for path in folder.iterdir() if path.is_dir()}
    return sorted((path for path in steps if steps[path]), key=lambda path: -int(path.name.rpartition("-")[2]))


def _damage_of(file: Path) -> str | None:
    try:
        if any(file.match(pattern) for pattern in _SAFETENSORS):
            with safe_open(file, framework="numpy"):  # compares the file's length with its header
                return None
        if file.name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
            shards = set(json.loads(file.read_bytes())["weight_map"].values())
            missing = sorted(shard for shard in shards if not (file.parent / shard).is_file())
            return f"names {', '.join(missing)}, which is not there" if missing else None
        if any(file.match(pattern) for pattern in _JSON):
            json.loads(file.read_bytes())
        if any(file.match(pattern) for pattern in _ARCHIVES) and not zipfile.is_zipfile(file):
            return "is not whole"
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"can't be read ({error})"
    return None
