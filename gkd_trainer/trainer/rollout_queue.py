"""The part of the trainer that generates: the rollouts of a window, and greedy completions to evaluate on."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers.trainer_utils import has_length
from trl.models import unwrap_model_for_generation

from gkd_trainer.errors import GKDConfigError, GKDDataError, GKDRolloutError
from gkd_trainer.models.loading import base_model, media_token_ids
from gkd_trainer.report.completions import completion_rows, print_completions, send_completions
from gkd_trainer.report.metrics import TrainingMeter
from gkd_trainer.rollouts import (
    Block,
    Completions,
    Draw,
    HFRollouts,
    RolloutEngine,
    VLLMColocateRollouts,
    VLLMServerRollouts,
    WindowPlan,
    complete_greedily,
    done,
    generate_jobs,
    has_prompts_alone,
    lmbda_at,
    plan_window,
    transformers_options,
)
from gkd_trainer.teachers import Teacher
from gkd_trainer.trainer.any_trainer import pad_token_id, require_labels
from gkd_trainer.trainer.checkpoints import rollouts_file
from gkd_trainer.trainer.recovery import RecoveryMixin
from gkd_trainer.types import Generated, Sampling

logger = logging.getLogger(__name__)


class GenerationMixin(RecoveryMixin):
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
        needs_generate = self.args.generates_anywhere and rollouts is None and not self.args.use_vllm
        if needs_generate and not hasattr(student, "generate"):
            option = f"lmbda={self.args.lmbda}" if self.args.generates else "eval_on_policy=True"
            raise GKDConfigError(
                f"{option} has the student generate, which {type(student).__name__} can't: "
                "use a causal LM of transformers, pass rollouts, or switch generation off"
            )
        self._stop_ids = _stop_ids(student, self._tokenizer_or_none)
        self._media_ids = media_token_ids(student)
        self.rollouts = rollouts if rollouts is not None else self._student_rollouts()
        self._synced_version: tuple[int, ...] | None = None
        self._epoch_iterator: Iterator[Any] | None = None
        self._ended_iterator: Iterator[Any] | None = None
        self._has_warned_of_shards = False
        self._block: Block | None = None
        self._ahead: Block | None = None
        self._saved_blocks: list[dict[str, Any]] = []
        self._background = ThreadPoolExecutor(1, "rollouts") if self.args.rollout_overlap else None
        self._teacher_rollouts: RolloutEngine | None = None
        if self.args.seq_kd and self.teacher.model is not None:
            stop_ids = {*self._stop_ids, *_stop_ids(base_model(self.teacher.model), None)}
            self._teacher_rollouts = self._hf_rollouts(sorted(stop_ids), is_sharded=False)
            self._teacher_rollouts.sync(base_model(self.teacher.model))

    def _next_window(self, epoch_iterator: Iterator[Any], num_batches: int) -> list[dict[str, Any]]:
        """Return the next window after its rollouts; empty at the end of the epoch."""
        step = self.state.global_step
        if epoch_iterator is not self._epoch_iterator:  # what is left of an epoch that was stopped is dropped
            self._epoch_iterator = epoch_iterator
            self._drop_blocks()
            self._restore_blocks(epoch_iterator, num_batches)
        if self._block is None or not self._block.holds(step):
            self._block, self._ahead = self._ahead, None
        if self._block is None:
            self._block = self._generated_block(self._plan_windows(epoch_iterator, num_batches, step))
        block = self._block
        if block is None:
            return []
        self._raise_failure(block.of_student.exception())
        if self._background is not None and self._ahead is None:
            plans = self._plan_windows(epoch_iterator, self.args.gradient_accumulation_steps, block.next_step)
            self._ahead = self._generated_block(plans, self._background)
        with self._failing_together(GKDRolloutError, "putting completions into the batches of a step"):
            window = block.window(step, self._pad_token_id)
            if window.without_prompt and self.args.is_always_on_policy and not self._has_trained:
                raise GKDDataError(
                    f"lmbda=1 trains on completions alone, but {window.without_prompt} of the first {window.samples} "
                    "samples have no prompt to complete (their first token is already trained on): give the prompt "
                    "labels of -100, or lower lmbda"
                )
        self._generated = window.generated
        self._meter.add_samples(
            samples=window.samples,
            on_policy_samples=window.on_policy_samples,
            samples_without_prompt=window.without_prompt,
            completions=len(window.generated),
            completion_tokens=sum(len(item.completion.token_ids) for item in window.generated),
            truncated_completions=sum(not item.completion.is_finished for item in window.generated),
            stale_steps=(step - block.weights_step) * window.on_policy_samples,
        )
        return window.batches

    def _generated_block(self, plans: list[WindowPlan], background: ThreadPoolExecutor | None = None) -> Block | None:
        """Return windows with their completions, by the weights of now: generated at once, or in the background."""
        if not plans:
            return None
        args = self.args
        sampling = Sampling(
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
            extra=args.generation_kwargs or {},
        )
        student_jobs = [plan.student_jobs for plan in plans]
        with self._synced_rollouts() as engine:
            if background is not None:
                of_student = background.submit(generate_jobs, student_jobs, sampling, engine)
            else:
                of_student = done(generate_jobs(student_jobs, sampling, engine))
            of_teacher: Completions = [[] for _ in plans]
            if self._teacher_rollouts is not None:
                # It generates by transformers, also where vLLM does for the student.
                extra = transformers_options(sampling.extra) if args.use_vllm else sampling.extra
                teacher_jobs = [plan.teacher_jobs for plan in plans]
                of_teacher = generate_jobs(teacher_jobs, replace(sampling, extra=extra), self._teacher_rollouts)
        return Block(plans, of_student, of_teacher, self.state.global_step)

    def _plan_windows(
        self, epoch_iterator: Iterator[Any], num_batches: int, first_step: int, windows: int | None = None
    ) -> list[WindowPlan]:
        args, plans = self.args, []
        end = first_step + (windows or args.rollout_steps)
        for step in range(first_step, min(end, self.state.max_steps)):
            batches = self._take_window(epoch_iterator, num_batches)
            if not batches:
                break
            draw = Draw(
                lmbda=lmbda_at(step, self.state.max_steps, args.lmbda, args.lmbda_end, args.lmbda_schedule),
                granularity=args.lmbda_granularity,
                seed=args.seed,
                step=step,
                rank=self.accelerator.process_index,
                world_size=self.accelerator.num_processes,
                batch_size=self._train_batch_size,
            )
            with self._failing_together(GKDRolloutError, "planning the completions of a step"):
                for batch in batches:
                    require_labels(batch)
                plans.append(plan_window(batches, draw, self._teacher_rollouts is not None, self._media_ids))
            # The last window of an epoch is smaller only where the iterator ends.
            num_batches = args.gradient_accumulation_steps
        return plans

    def _take_window(self, epoch_iterator: Iterator[Any], num_batches: int) -> list[Any]:
        """Return the next batches of an epoch; none at its end, which comes on all ranks at once.

        Streams have no length, so that ranks may run out of data at different steps, and wait for one another for ever.
        Their epoch ends with the first window that any rank can't fill: Trainer takes no optimizer step for a smaller
        one, since it does not know that it is the last.
        """
        if epoch_iterator is self._ended_iterator:
            return []
        self._ended_iterator = None
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if has_length(self.callback_handler.train_dataloader):
            return batches
        ranks = self.accelerator.num_processes
        lacking = self._count_ranks(len(batches) < num_batches)
        if lacking == 0:
            return batches
        if not self._has_trained and self.state.global_step == 0:
            raise GKDDataError(
                f"the training set gave less than one step: {lacking} of {ranks} ranks had fewer than {num_batches} "
                "batches (gradient_accumulation_steps). Give it more rows, or use fewer ranks or smaller batches; the "
                "log counts the rows that were dropped, by reason"
            )
        self._ended_iterator = epoch_iterator
        if lacking < ranks and not self._has_warned_of_shards:
            self._has_warned_of_shards = True
            logger.warning(
                "The ranks' shards of the training stream differ in length: an epoch ends with the shortest, and what "
                "is left of the others is not trained on in it."
            )
        return []

    def _wait_for_rollouts(self) -> None:
        """Wait until no rollouts are under way: weights must not change below them."""
        self._raise_failure(next(filter(None, [block.of_student.exception() for block in self._blocks]), None))

    def _raise_failure(self, error: BaseException | None) -> None:
        if self._is_anywhere(error is not None):
            self._drop_blocks()  # a trainer that goes on afterwards generates anew
        self._raise_together(error, GKDRolloutError, "generating completions")

    def _drop_blocks(self) -> None:
        for block in self._blocks:
            block.of_student.exception()  # waits
        self._block = self._ahead = None
        self._synced_version = None

    @property
    def _blocks(self) -> list[Block]:
        return [block for block in (self._block, self._ahead) if block is not None]

    def _blocks_state(self) -> list[dict[str, Any]]:
        """Return what a checkpoint has to keep of completions that are not yet trained on."""
        failed = any(block.of_student.exception() is not None for block in self._blocks)
        if self._is_anywhere(failed):  # they are generated anew after resuming
            return []
        states = [block.state(self.state.global_step) for block in self._blocks]
        return [state for state in states if state["windows"]]

    def _restore_blocks(self, epoch_iterator: Iterator[Any], num_batches: int) -> None:
        states, self._saved_blocks = self._saved_blocks, []
        step = self.state.global_step
        if self._is_anywhere(not states or states[0]["windows"][0]["step"] != step):
            return
        blocks: list[Block | None] = []
        for state in states:
            plans = self._plan_windows(epoch_iterator, num_batches, step, len(state["windows"]))
            blocks.append(Block.restored(state, plans))
            step, num_batches = step + len(plans), self.args.gradient_accumulation_steps
            if self._is_anywhere(blocks[-1] is None):
                logger.warning(
                    "The checkpoint holds completions of other prompts or steps than this run has: they are generated "
                    "anew. A run resumes exactly with the data, seed, batch sizes and steps of the one that saved it."
                )
                blocks[-1] = self._generated_block(plans)
        self._block, self._ahead = blocks[0], blocks[1] if len(blocks) > 1 else None

    def _completed(self, inputs: dict[str, Any], only_prompts: bool) -> dict[str, Any]:
        if only_prompts and not self._is_anywhere(has_prompts_alone(inputs)):
            return inputs
        with self._synced_rollouts(is_training=False) as engine:
            return complete_greedily(
                inputs, engine, self.args.max_new_tokens, self._pad_token_id, only_prompts, self._media_ids
            )

    @contextmanager
    def _synced_rollouts(self, is_training: bool = True) -> Iterator[RolloutEngine]:
        self._wait_for_rollouts()
        # Completions come from the numerics that the loss sees: under autocast, the same rounding.
        with self._gathered_student() as student, self.accelerator.autocast():
            version = self._weights_version(student)
            if version != self._synced_version:
                with (
                    self._meter.measure("sync") if is_training else nullcontext(),
                    self._failing_together(GKDRolloutError, "handing the student's weights to the rollout engine"),
                ):
                    self.rollouts.sync(student)
                self._synced_version = version
            with self._failing_together(GKDRolloutError, "generating completions"):
                yield self.rollouts

    def _weights_version(self, student: nn.Module) -> tuple[int, ...]:
        """Return what differs once the weights do: optimizer steps, and whatever else writes to them in place."""
        return self.state.global_step, id(student), sum(parameter._version for parameter in student.parameters())

    @contextmanager
    def _gathered_student(self) -> Iterator[nn.Module]:
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED and self._is_sharded:
            with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as student:
                yield student
        else:
            yield self.model

    def _student_rollouts(self) -> RolloutEngine:
        args = self.args
        if not args.use_vllm:
            return self._hf_rollouts(self._stop_ids, self._is_sharded)
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 1:
            raise GKDConfigError(
                "use_vllm=True takes the weights one by one, which FSDP version 1 keeps in flat blocks: set "
                "fsdp_version: 2"
            )
        if args.vllm_mode == "server":
            return VLLMServerRollouts(
                args.vllm_server_base_url,
                self._stop_ids,
                self._sampled_vocab_size,
                api_token=args.vllm_server_api_token,
                server_timeout=args.vllm_server_timeout,
                request_timeout=args.vllm_request_timeout,
                weight_sync=args.vllm_weight_sync,
                sync_dir=args.vllm_sync_dir,
                max_length=args.max_length,
                rank=self.accelerator.process_index,
            )
        return VLLMColocateRollouts(
            self.model,
            self._stop_ids,
            self._sampled_vocab_size,
            # The numerics that the loss sees.
            dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
            max_model_length=args.vllm_max_model_length or args.max_length,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            enable_sleep_mode=args.vllm_enable_sleep_mode,
            # An adapter that is sharded would have to be gathered first, as the full weights are.
            weight_sync="full" if args.vllm_weight_sync == "auto" and self._is_sharded else args.vllm_weight_sync,
            trust_remote_code=getattr(args, "trust_remote_code", False),
            engine_kwargs=args.vllm_engine_kwargs,
        )

    @property
    def _sampled_vocab_size(self) -> int:
        tokenizer = self._tokenizer_or_none
        # Heads of equal size are compared with their padding rows, which no token may be sampled from.
        known = self._vocab_size if tokenizer is None else max(tokenizer.get_vocab().values()) + 1
        return min(self._vocab_size, known)

    def _hf_rollouts(self, stop_ids: list[int], is_sharded: bool) -> HFRollouts:
        return HFRollouts(
            stop_ids, self._pad_token_id, self._sampled_vocab_size, self.args.rollout_batch_size, is_sharded
        )

    def _save_rng_state(self, output_dir: str) -> None:
        file, states = rollouts_file(output_dir, self.accelerator.process_index), self._blocks_state()
        if states:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(states))
        else:  # that of an older run in the same folder
            file.unlink(missing_ok=True)
        super()._save_rng_state(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._saved_blocks = []
        if checkpoint is not None:
            file = rollouts_file(checkpoint, self.accelerator.process_index)
            if file.exists():
                self._saved_blocks = json.loads(file.read_text())

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
