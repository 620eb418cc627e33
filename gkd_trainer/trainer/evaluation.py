"""The part of the trainer that evaluates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from gkd_trainer.report.metrics import EvaluationMeter
from gkd_trainer.trainer.any_trainer import require_labels
from gkd_trainer.trainer.rollout_queue import GenerationMixin


class EvaluationMixin(GenerationMixin):
    """Measures the divergence on evaluation sets, each token with the same weight."""

    _eval_meter: EvaluationMeter
    _eval_on_policy_meter: EvaluationMeter
    _row_sums_BK: Tensor | None

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Return the loss of a batch and, unless only that is wanted, full logits [B, L, V] and labels [B, L].

        Both are in the collator's columns, as the inputs are that Trainer may hand to `compute_metrics` beside them.
        Rows without a completion are measured on a greedy one of the student.
        """
        inputs = self._prepare_inputs(inputs)
        require_labels(inputs)
        inputs = self._completed(inputs, only_prompts=True)
        logits = labels = None
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                loss = self._measure(self._eval_meter, model, inputs)
            else:
                loss, outputs = self._measure(self._eval_meter, model, inputs, return_outputs=True)
                logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
                labels = inputs["labels"]
            if self.args.eval_on_policy:
                self._measure(self._eval_on_policy_meter, model, self._completed(inputs, only_prompts=False))
        return loss, logits, labels

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as Trainer does, with the loss and our metrics weighted by tokens over all ranks."""
        self._eval_meter, self._eval_on_policy_meter = EvaluationMeter(), EvaluationMeter()
        self._note_random_states()
        with self._saving_before_it_fails():
            output: EvalLoopOutput = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        if not self.is_in_train and self.accelerator.num_processes > 1 and self.model_wrapped is self.model:
            # Evaluation marks the model as prepared, and training would then leave it without DDP: ranks drift apart.
            self.model._is_accelerate_prepared = False  # type: ignore[assignment]
        metrics = self._eval_meter.read()
        metrics.update({f"on_policy_{name}": metric for name, metric in self._eval_on_policy_meter.read().items()})
        (output.metrics or {}).update({f"{metric_key_prefix}_{name}": metric for name, metric in metrics.items()})
        return output

    def _measure(self, meter: EvaluationMeter, model: nn.Module, inputs: dict[str, Any], **options: bool) -> Any:
        self._row_sums_BK = None
        result = self.compute_loss(model, inputs, **options)
        loss = result[0] if isinstance(result, tuple) else result
        if self._row_sums_BK is not None:  # a subclass may compute a loss of its own: then Trainer's mean stands
            meter.add(self._row_sums_BK, loss, self.accelerator.gather_for_metrics)
        return result
