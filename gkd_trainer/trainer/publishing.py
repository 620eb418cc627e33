"""The part of the trainer that describes its student for others."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftModel
from transformers.modelcard import TrainingSummary

from gkd_trainer.models.loading import base_model, name_of
from gkd_trainer.report.model_card import CARD_TAGS, distillation_card, is_on_hub, with_adapter
from gkd_trainer.teachers import Teacher, VLLMServerTeacher
from gkd_trainer.trainer.any_trainer import AnyTrainer

logger = logging.getLogger(__name__)


class PublishingMixin(AnyTrainer):
    """Writes the model card."""

    teacher: Teacher

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with _keeping_own(Path(output_dir or self.args.output_dir) / "README.md"):
            super()._save(output_dir, state_dict)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        *,
        dataset_name: str | list[str] | None = None,
    ) -> None:
        """Write README.md: what the student was distilled from, on what, and how; one that somebody wrote stays.

        The arguments are Trainer's; `dataset_name` is what TRL calls `dataset`. Paths of this machine are told by their
        last part alone.
        """
        if not self.is_world_process_zero():
            return
        model = self.accelerator.unwrap_model(self.model)
        served = self.teacher if isinstance(self.teacher, VLLMServerTeacher) else None
        student = name_of(base_model(model))
        teacher = name_of(self.teacher.model) if served is None else served.model_name
        path = Path(self.args.output_dir) / "README.md"
        earlier = _generated_tags(path)
        if earlier is None:
            logger.warning("%s is not replaced by a model card: somebody wrote it, or it can't be read", path)
            return
        earlier = [tag for tag in earlier if not tag.startswith("base_model:")]  # which PEFT gives again
        given = [tags] if isinstance(tags, str) else list(tags or [])
        names = dataset if dataset is not None else dataset_name
        if dataset_tags is None:
            listed = [names] if isinstance(names, str) else list(names or [])
            # Trainer would take the name of what built the data set: none for one that was made in memory.
            dataset_tags = [name for name in listed if "/" in name and is_on_hub(name)]
        summary = TrainingSummary.from_trainer(
            self,
            language=language,
            license=license,
            tags=list(dict.fromkeys([*given, *earlier, *getattr(self, "_tag_names", []), *CARD_TAGS])),
            model_name=model_name,
            finetuned_from=finetuned_from or (student if is_on_hub(student) else ""),
            tasks=tasks,
            dataset_tags=dataset_tags,
            dataset=names,
            dataset_args=dataset_args,
        )
        adapter = model.active_peft_config if isinstance(model, PeftModel) else None
        card = distillation_card(
            summary,
            args=self.args,
            student=student or type(base_model(model)).__name__,
            teacher=teacher or type(self.teacher.model or self.teacher).__name__,
            teacher_urls=() if served is None else served.base_urls,
            teacher_top_k=self.teacher.top_k,
            adapter=adapter,
            n_rows=len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None,
        )
        if adapter is not None:
            card = with_adapter(card, model, self.args.output_dir)
        card.save(path)


def _generated_tags(path: Path) -> list[str] | None:
    """Return the tags of a model card that a trainer or PEFT wrote, none where there is no card; None of any other."""
    if not path.exists():
        return []
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data
    except Exception:  # what broken front matter makes YAML raise, and other bytes than text
        return None
    tags = data.tags or []
    is_generated = data.get("library_name") == "peft" or "generated_from_trainer" in tags
    return list(tags) if is_generated else None


@contextmanager
def _keeping_own(path: Path) -> Iterator[None]:
    """Have a model card that somebody wrote lie aside in the block: PEFT would rewrite it, or fail to read it."""
    if _generated_tags(path) is not None:
        yield
        return
    aside = path.with_name(f"{path.name}.own")
    path.rename(aside)
    try:
        yield
    finally:
        aside.replace(path)
