"""Find the complete checkpoints of a run: a process that is killed while saving leaves an incomplete one."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME

from gkd_trainer.errors import GKDConfigError

if TYPE_CHECKING:
    from gkd_trainer.trainer.ranks import Ranks

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")

# Files that Trainer and the rollouts write, by the check that shows truncation; other files are not checked.
_SAFETENSORS = ("model*.safetensors", "adapter_model*.safetensors", "teacher-*.safetensors")
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
    """Return what a checkpoint lacks, or which file is truncated; None if it is complete.

    Trainer's state is written last, after all ranks have written their files (see `GKDMixin._save_rng_state`). No
    weights are loaded.
    """
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        return f"it has no {TRAINER_STATE_NAME}, which is written last"
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        problem = _damage_of(file)
        if problem is not None:
            return f"{file.relative_to(checkpoint)} {problem}"
    return None


def find_last_complete(output_dir: str | Path) -> tuple[Path | None, list[str]]:
    """Return the newest complete checkpoint of a run, or None, and what each newer one lacks."""
    damaged: list[str] = []
    for checkpoint in _checkpoints_in(Path(output_dir)):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint, damaged
        damaged.append(f"{checkpoint.name}: {problem}")
    return None, damaged


def last_complete_checkpoint(output_dir: str | Path) -> Path:
    """Return the newest complete checkpoint of a run; warn of newer incomplete ones.

    Raises:
        GKDConfigError: There is none.
    """
    checkpoint, damaged = find_last_complete(output_dir)
    listed = "; ".join(damaged)
    if checkpoint is None:
        found = listed or f"no folder of the form checkpoint-STEP in {output_dir}"
        raise GKDConfigError(
            f"resume_from_checkpoint=True needs a complete checkpoint in output_dir; found {found}. Leave "
            "resume_from_checkpoint out to start from the beginning, or set output_dir to that of the run to resume"
        )
    if damaged:
        logger.warning(
            "Resuming from %s, the last complete checkpoint. The run ended while saving %s", checkpoint, listed
        )
    return checkpoint


def required_complete(checkpoint: str | Path) -> Path:
    """Return the path of a checkpoint given by name.

    Raises:
        GKDConfigError: It does not exist, or is incomplete.
    """
    path = Path(checkpoint)
    problem = damage(path) if path.is_dir() else "there is no such folder"
    if problem is None:
        return path
    others = [other for other in _checkpoints_in(path.parent) if other != path and damage(other) is None]
    remedy = f"resume from {others[0]}" if others else "start from the beginning"
    raise GKDConfigError(f"can't resume from the checkpoint {path}: {problem}. Use True for the last one, or {remedy}")


def checkpoint_to_resume(resume_from_checkpoint: str | Path | bool | None, output_dir: str | Path) -> str | None:
    """Return the complete checkpoint from which Trainer must resume; None for none.

    Args:
        resume_from_checkpoint: True for the last complete one in `output_dir`, a folder, or None or False for none.
        output_dir: Where the run saves its checkpoints.

    Raises:
        GKDConfigError: There is none, or the given one is incomplete.
    """
    if resume_from_checkpoint is True:
        return str(last_complete_checkpoint(output_dir))
    return str(required_complete(resume_from_checkpoint)) if resume_from_checkpoint else None


def require_one_step(checkpoint: str | None, ranks: Ranks) -> None:
    """Raise GKDConfigError if the ranks would resume from different steps, as nodes with disks of their own may."""
    if checkpoint is None or ranks.size == 1:
        return
    number = Path(checkpoint).name.rpartition("-")[2]
    own = torch.tensor([int(number) if number.isdecimal() else -1], device=ranks.accelerator.device)
    steps = sorted(set(ranks.gather(own).tolist()))
    if len(steps) > 1:
        raise GKDConfigError(
            f"the nodes' last complete checkpoints are from different steps ({', '.join(map(str, steps))}): pass "
            f"the path of one that all have, such as checkpoint-{steps[0]}"
        )


def save_rollouts(checkpoint: str | Path, rank: int, states: list[dict[str, Any]]) -> None:
    """Save in a checkpoint a rank's completions that are not trained on yet."""
    file = _rollouts_file(checkpoint, rank)
    if states:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(states))
    else:  # it may be there from an older run in the same folder
        file.unlink(missing_ok=True)


def load_rollouts(checkpoint: str | Path | None, rank: int) -> list[dict[str, Any]]:
    """Return the completions from `save_rollouts`; empty without a checkpoint or without completions in it."""
    file = None if checkpoint is None else _rollouts_file(checkpoint, rank)
    states: list[dict[str, Any]] = json.loads(file.read_text()) if file is not None and file.exists() else []
    return states


def _rollouts_file(checkpoint: str | Path, rank: int) -> Path:
    return Path(checkpoint) / f"rollouts-rank{rank}.json"


def _checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, newest first."""
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
            return f"names {', '.join(missing)}, which is missing" if missing else None
        if any(file.match(pattern) for pattern in _JSON):
            json.loads(file.read_bytes())
        if any(file.match(pattern) for pattern in _ARCHIVES) and not zipfile.is_zipfile(file):
            return "is truncated"
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"can't be read ({error})"
    return None
