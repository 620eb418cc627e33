"""The part of the trainer that generates: the rollouts of a window, and greedy completions to evaluate on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from trl.models import unwrap_model_for_generation

from gkd_trainer.any_trainer import AnyTrainer, pad_token_id
from gkd_trainer.batch import Generated, Sampling
from gkd_trainer.errors import GKDConfigError, GKDDataError
from gkd_trainer.report.completions import completion_rows, print_completions, send_completions
from gkd_trainer.report.metrics import TrainingMeter
from gkd_trainer.rollouts import (
    Draw,
    HFRollouts,
    RolloutEngine,
    complete_greedily,
    has_prompts_alone,
    lmbda_at,
    roll_out_window,
)
from gkd_trainer.student import base_model
from gkd_trainer.teachers import Teacher


class GenerationMixin(AnyTrainer):
    """Has the student, and under `seq_kd` the teacher, complete prompts."""

    teacher: Teacher
    rollouts: RolloutEngine
    _vocab_size: int
    _meter: TrainingMeter
    _generated: list[Generated]
    _has_trained: bool

    def _connect_rollouts(self, rollouts: RolloutEngine | None) -> None:
        student = base_model(self.model)
        if getattr(getattr(student, "config", None), "is_encoder_decoder", False):
            raise GKDConfigError(f"{type(student).__name__} is an encoder-decoder: use a decoder-only causal LM")
        generates = self.args.generates or self.args.eval_on_policy
        if generates and rollouts is None and not hasattr(student, "generate"):
            option = f"lmbda={self.args.lmbda}" if self.args.generates else "eval_on_policy=True"
            raise GKDConfigError(
                f"{option} has the student generate, which {type(student).__name__} can't: "
                "use a causal LM of transformers, pass rollouts, or switch generation off"
            )
        self._stop_ids = _stop_ids(student, self._tokenizer_or_none)
        self.rollouts = rollouts if rollouts is not None else self._hf_rollouts(self._stop_ids, self._is_sharded)
        self._teacher_rollouts: RolloutEngine | None = None
        if self.args.seq_kd and self.teacher.model is not None:
            stop_ids = {*self._stop_ids, *_stop_ids(base_model(self.teacher.model), None)}
            self._teacher_rollouts = self._hf_rollouts(sorted(stop_ids), is_sharded=False)
            self._teacher_rollouts.sync(base_model(self.teacher.model))

    def _roll_out(self, batches: list[Any]) -> list[dict[str, Any]]:
        args, step = self.args, self.state.global_step
        draw = Draw(
            lmbda=lmbda_at(step, self.state.max_steps, args.lmbda, args.lmbda_end, args.lmbda_schedule),
            granularity=args.lmbda_granularity,
            seed=args.seed,
            step=step,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            batch_size=self._train_batch_size,
        )
        sampling = Sampling(
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
            extra=args.generation_kwargs or {},
        )
        with self._synced_rollouts() as engine:
            window = roll_out_window(batches, draw, sampling, engine, self._teacher_rollouts, self._pad_token_id)
        if window.without_prompt and args.is_always_on_policy and not self._has_trained:
            raise GKDDataError(
                f"lmbda=1 trains on completions alone, but {window.without_prompt} of the first {window.samples} "
                "samples have no prompt to complete (their first token is already trained on): give the prompt labels "
                "of -100, or lower lmbda"
            )
        self._generated = window.generated
        self._meter.add_samples(
            samples=window.samples,
            on_policy_samples=window.on_policy_samples,
            samples_without_prompt=window.without_prompt,
            completions=len(window.generated),
            completion_tokens=sum(len(item.completion.token_ids) for item in window.generated),
            truncated_completions=sum(not item.completion.is_finished for item in window.generated),
        )
        return window.batches

    def _completed(self, inputs: dict[str, Any], only_prompts: bool) -> dict[str, Any]:
        if only_prompts and not self._is_true_anywhere(has_prompts_alone(inputs)):
            return inputs
        with self._synced_rollouts() as engine:
            return complete_greedily(inputs, engine, self.args.max_new_tokens, self._pad_token_id, only_prompts)

    @contextmanager
    def _synced_rollouts(self) -> Iterator[RolloutEngine]:
        # Completions come from the numerics that the loss sees: under autocast, the same rounding.
        with self._gathered_student() as student, self.accelerator.autocast():
            self.rollouts.sync(base_model(student))
            yield self.rollouts

    @contextmanager
    def _gathered_student(self) -> Iterator[nn.Module]:
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED and self._is_sharded:
            with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as student:
                yield student
        else:
            yield self.model

    def _is_true_anywhere(self, flag: bool) -> bool:
        """Whether the flag is set here or, where ranks have to generate together, on any of them."""
        if not self._is_sharded:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(int(flag), device=self.args.device), "sum") > 0)

    def _hf_rollouts(self, stop_ids: list[int], is_sharded: bool) -> HFRollouts:
        tokenizer = self._tokenizer_or_none
        # Heads of equal size are compared with their padding rows, which no token may be sampled from.
        known = self._vocab_size if tokenizer is None else max(tokenizer.get_vocab().values()) + 1
        vocab_size = min(self._vocab_size, known)
        return HFRollouts(stop_ids, self._pad_token_id, vocab_size, self.args.rollout_batch_size, is_sharded)

    def _show_completions(self) -> None:
        if not (self.args.log_completions and self._generated and self.is_world_process_zero()):
            return
        rows = completion_rows(self._generated[: self.args.num_completions_to_print], self._tokenizer_or_none)
        print_completions(rows, f"Completions at step {self.state.global_step}")
        send_completions(rows, self.state.global_step, self.callback_handler.callbacks)

    @property
    def _is_sharded(self) -> bool:
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return bool(self.accelerator.state.deepspeed_plugin.zero_stage == 3)
        return bool(self.is_fsdp_enabled)

    @property
    def _tokenizer_or_none(self) -> Any:
        # A processor of several modalities holds its tokenizer.
        return getattr(self.processing_class, "tokenizer", self.processing_class)

    @property
    def _pad_token_id(self) -> int:
        return pad_token_id(self.processing_class)


def _stop_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """Return every id at which a model's completions end: those of its generation config, and its tokenizer's."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    if getattr(tokenizer, "eos_token_id", None) is not None:
        ids.add(tokenizer.eos_token_id)
    return sorted(ids)
