"""The model card beside the student's weights; it never replaces one that the user wrote."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftModel
from torch import nn
from transformers.modelcard import TrainingSummary

from gkd_trainer.config import GKDArguments
from gkd_trainer.models.loading import base_model, name_of, reads_images
from gkd_trainer.report.model_card import CARD_TAGS, distillation_card, is_on_hub, public_name, with_adapter
from gkd_trainer.teachers import Teacher
from gkd_trainer.teachers.description import describe

logger = logging.getLogger(__name__)


def card_tags(path: Path, tags: str | Iterable[str] | None, own_tags: Iterable[str] = ()) -> list[str] | None:
    """Return the tags of a card to write: those given, those it already has, a trainer's own, and ours.

    Returns None, with a warning, if the user wrote that card or it can't be read: it must not be replaced.
    """
    earlier = _generated_tags(path)
    if earlier is None:
        logger.warning("Not overwriting %s with a model card: it was not generated, or can't be read", path)
        return None
    earlier = [tag for tag in earlier if not tag.startswith("base_model:")]  # PEFT adds them again
    given = [tags] if isinstance(tags, str) else list(tags or [])
    return list(dict.fromkeys([*given, *earlier, *own_tags, *CARD_TAGS]))


def tags_of_datasets(names: str | Iterable[str] | None) -> list[str]:
    """Return the names of datasets that are on the hub.

    Trainer would take the name of the dataset's builder, which one made in memory lacks.
    """
    listed = [names] if isinstance(names, str) else list(names or [])
    return [name for name in listed if "/" in name and is_on_hub(name)]


def source_on_hub(model: nn.Module) -> str:
    """Return the hub name from which a student was loaded; empty if it was not."""
    name = name_of(base_model(model))
    return name if is_on_hub(name) else ""


def public_names(model: nn.Module, teacher: Teacher) -> tuple[str, str]:
    """Return the names of student and teacher, local folders shortened to their last part."""
    names = describe(teacher).name
    by_label = {"": names} if isinstance(names, str) else names
    of_teachers = [": ".join(filter(None, (label, public_name(name)))) for label, name in by_label.items()]
    student = base_model(model)
    return public_name(name_of(student)) or type(student).__name__, "; ".join(of_teachers)


def write_card(
    path: Path, summary: TrainingSummary, *, args: GKDArguments, model: nn.Module, teacher: Teacher, dataset: Any
) -> None:
    """Write the card of a student.

    Args:
        path: The file, in the folder of the student's weights.
        summary: transformers' summary of the run.
        args: The run's options.
        model: The student, wrapped by PEFT if it has an adapter.
        teacher: Its teacher.
        dataset: The training set, if any.
    """
    described = describe(teacher)
    card = distillation_card(
        summary,
        args=args,
        student=name_of(base_model(model)) or type(base_model(model)).__name__,
        teacher=described.name,
        teacher_urls=described.base_urls,
        teacher_top_k=described.top_k,
        vocabulary_mode=described.vocabulary_mode,
        adapter=model.active_peft_config if isinstance(model, PeftModel) else None,
        n_rows=len(dataset) if hasattr(dataset, "__len__") else None,
        task="image-text-to-text" if reads_images(model) else "text-generation",
    )
    if isinstance(model, PeftModel):
        card = with_adapter(card, model, str(path.parent))
    card.save(path)


@contextmanager
def keeping_own(path: Path) -> Iterator[None]:
    """Move a model card that the user wrote aside during the block: PEFT would rewrite it, or fail to read it."""
    if _generated_tags(path) is not None:
        yield
        return
    aside = path.with_name(f"{path.name}.own")
    path.rename(aside)
    try:
        yield
    finally:
        aside.replace(path)


def _generated_tags(path: Path) -> list[str] | None:
    """Return the tags of a model card by a trainer or PEFT, or none if there is no card; None for any other card."""
    if not path.exists():
        return []
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data
    except Exception:  # broken front matter or bytes that are not text may raise anything
        return None
    tags = data.tags or []
    is_generated = data.get("library_name") == "peft" or "generated_from_trainer" in tags
    return list(tags) if is_generated else None
