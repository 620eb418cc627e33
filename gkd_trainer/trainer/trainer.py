"""GKDTrainer: connects the parts to the hooks of the Hugging Face Trainer; the only file that overrides any.

Shapes: B batch, L length, N tokens trained on, V vocabulary.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftMixedModel, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.modelcard import TrainingSummary
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, default_compute_objective, has_length
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, DataCollatorForVisionLanguageModeling

from gkd_trainer.batch_keys import PER_LABEL, SIDE_TENSORS, TEACHER_INDEX, has_decoder_inputs
from gkd_trainer.compat import checkpoints_activations, mark_loss_as_scaled
from gkd_trainer.config import Unset
from gkd_trainer.config_effects import unused_options
from gkd_trainer.data import IMAGE_COLUMNS, StackOthers, can_pad, columns_read_by, unwrapped
from gkd_trainer.divergence import TokenDivergence, trl_generalized_jsd_loss
from gkd_trainer.errors import GKDConfigError, GKDTeacherError
from gkd_trainer.models.decoders import in_label_columns, with_decoder_inputs
from gkd_trainer.models.heads import logits_of, set_logits
from gkd_trainer.models.loading import (
    base_model,
    disable_dropout,
    find_tokenizer,
    give_pad_token,
    name_of,
)
from gkd_trainer.models.weights import load_converted
from gkd_trainer.redaction import dropping_secrets
from gkd_trainer.report.completions import completion_rows, print_completions, send_completions
from gkd_trainer.report.interval import tenth_of
from gkd_trainer.report.metrics import TrainingMeter, sums_by_sample
from gkd_trainer.report.notebook import NotebookMetrics, is_in_notebook
from gkd_trainer.report.recorder import Recorder
from gkd_trainer.right_padding import in_columns_of
from gkd_trainer.rollouts import RolloutEngine
from gkd_trainer.teachers import Teacher, comparable, refuse_inference_tensors
from gkd_trainer.teachers.context import with_teacher_prompts
from gkd_trainer.teachers.other_tokenizer import vocabulary_modes
from gkd_trainer.trainer import coverage, publishing
from gkd_trainer.trainer.checkpoints import checkpoint_to_resume, load_rollouts, require_one_step, save_rollouts
from gkd_trainer.trainer.construction import (
    Construction,
    adapted,
    construct,
    default_collator,
    refuse_data_parallel,
    refuse_dropped_deepspeed,
    refuse_for_kind,
    refuse_split_models,
    refuse_split_sequences,
    refuse_student,
    uncompiled_student,
    warn_of_unused,
)
from gkd_trainer.trainer.evaluation import Evaluation, require_equal_batches
from gkd_trainer.trainer.finite import steps_in_backward
from gkd_trainer.trainer.fixed_options import FixedOptions
from gkd_trainer.trainer.loss import Comparison, divided, product_dtype, run_student
from gkd_trainer.trainer.parts import build_parts
from gkd_trainer.trainer.placement import Placement
from gkd_trainer.trainer.preparation import (
    PreparedOnce,
    is_stream,
    keeping_columns,
    pad_token_id,
    refuse_negative_labels,
    require_labels,
    tokenizer_of,
)
from gkd_trainer.trainer.recovery import warn_of_short_exchanges
from gkd_trainer.trainer.rollout_queue import CurrentStudent, sample_counts
from gkd_trainer.trainer.trl_generation import generate_on_policy_outputs, trl_generation_config
from gkd_trainer.trainer.window_checks import WindowChecks
from gkd_trainer.trainer.windows import Epoch, require_equal_epochs
from gkd_trainer.types import Generated, TokenBatch

if TYPE_CHECKING:

    class AnyTrainer(Trainer):
        """Any subclass of Trainer, with the options of distillation in `args`."""

        args: Any
        model: Any
        train_dataset: Any
        eval_dataset: Any
        _signature_columns: Any

        def _reject_skip_prepare_without_labels(self, *args: Any, **kwargs: Any) -> None: ...  # of trl.SFTTrainer
else:
    AnyTrainer = object


class GKDMixin(AnyTrainer):
    """Generalised knowledge distillation for a trainer of the Hugging Face family.

    Put it in front of the trainer that you extend: `class MySFT(GKDMixin, trl.SFTTrainer)`, with
    `class MyConfig(GKDArguments, trl.SFTConfig)`. For the plain Trainer, use `GKDTrainer`.

    It takes the arguments of `transformers.Trainer`, some with more types than there, and some of its own:

    Args:
        model: The student: a model, a PEFT model, or a name or path, which is loaded with `args.model_init_kwargs`
            and in float32 unless they give a dtype. A model from `torch.compile` runs uncompiled unless
            `args.torch_compile` is set.
        args: A configuration with GKDArguments; plain TrainingArguments get the defaults of GKDConfig.
        train_dataset: Rows of `messages`, `prompt` and `completion`, `prompt`, `text`, or `input_ids` and `labels`.
        eval_dataset: The same, or a dictionary of them.
        processing_class: The tokenizer, or the processor of a vision-language model; by default the one stored with the
            student's weights.
        teacher_model: The teacher: a model, a PEFT model, a name or a path; or set `args.teacher_model_name_or_path`.
        peft_config: The adapter to wrap the student in.
        formatting_func: Turns a row into text, a list of messages, or a row in a format above.
        teacher: A Teacher, instead of `teacher_model`.
        rollouts: The engine that generates the student's completions; by default HFRollouts.
        base_kwargs: Further arguments of the extended trainer.

    Raises:
        GKDConfigError: Arguments that have no meaning here, or not together.
        GKDTeacherError: No teacher, or one that does not fit the student.
        GKDDataError: A dataset that can't be used.
    """

    # The loss is divided by all tokens of the window; Trainer must not also divide it by the number of micro-batches.
    loss_is_scaled_for_ga: bool | None = True

    _data_collator: Any = None

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | os.PathLike[str] | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        teacher_model: PreTrainedModel | PeftModel | PeftMixedModel | nn.Module | str | os.PathLike[str] | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[Any], Any] | None = None,
        teacher: Teacher | None = None,
        rollouts: RolloutEngine | None = None,
        **base_kwargs: Any,
    ) -> None:
        family = type(self).__mro__
        arguments = {
            "model": model,
            "args": args,
            "data_collator": data_collator,
            "train_dataset": train_dataset,
            "eval_dataset": eval_dataset,
            "processing_class": processing_class,
            "model_init": model_init,
            "compute_loss_func": compute_loss_func,
            "compute_metrics": compute_metrics,
            "callbacks": callbacks,
            "optimizers": optimizers,
            "optimizer_cls_and_kwargs": optimizer_cls_and_kwargs,
            "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
            **base_kwargs,
        }
        construction = construct(
            arguments,
            family[family.index(GKDMixin) + 1 :],
            type(self).__name__,
            teacher=teacher,
            teacher_model=teacher_model,
            peft_config=peft_config,
            builds_rollouts=rollouts is None,
        )
        # Read by hooks that the base's __init__ calls.
        self._adapter, self._prepares_rows = construction.adapter, construction.prepares_rows
        self._images = construction.images
        base_init: Callable[..., None] = super().__init__
        base_init(**construction.base_arguments)
        if model_init is not None and self.processing_class is None:
            self._find_tokenizer()
        has_own_collator = construction.base_arguments["data_collator"] is not data_collator
        if model_init is not None and has_own_collator and not construction.base.is_trls:
            collator = default_collator(self.model, pad_token_id(self.processing_class))
            self.data_collator = collator if data_collator is None else StackOthers(collator)
        self._refuse_unusable(construction)
        self._make_trainable(self.model)
        if is_in_notebook():
            self.add_callback(NotebookMetrics(self.callback_handler.callbacks))
        self._build_parts(construction.teacher, rollouts, formatting_func)
        self._fixed_options = FixedOptions(replace(construction.run, args=self.args))
        self._prepared_once = PreparedOnce(self._prepared)
        self.train_dataset = self._prepared_once(self.train_dataset, "train", is_training=True)
        self._prepare_evaluation()

    def _build_parts(
        self, teacher: Teacher, rollouts: RolloutEngine | None, formatting_func: Callable[[Any], Any] | None
    ) -> None:
        parts = build_parts(
            self.args,
            self.model,
            teacher,
            self.accelerator,
            processing_class=self.processing_class,
            rollouts=rollouts,
            formatting_func=formatting_func,
            has_eval_rows=self.eval_dataset is not None,
        )
        self.args, self.teacher = parts.args, teacher
        self._ranks, self._recovery, self._windows = parts.ranks, parts.recovery, parts.windows
        self._pairing, self._queue, self._preparation = parts.pairing, parts.queue, parts.preparation
        self._student_teachers = parts.student_teachers
        if (updates := parts.student_teachers.callback()) is not None:
            self.add_callback(updates)
        self._teacher_sums = parts.teacher_sums
        self._meter = TrainingMeter(self.args.device, self._teacher_sums)
        self._checks = WindowChecks(self._ranks, self._recovery, self._queue.drop)
        self._placement = Placement(self.args.device)
        self._window_tokens: Tensor | None = None
        self._is_in_step = self._is_last_of_window = self._is_in_checkpoint = False
        self._evaluation = Evaluation(self._ranks.gather_samples, self._teacher_sums)
        self._step_metrics: dict[str, float] = {}
        self._own_metrics: set[str] = set()
        self._generated: list[Generated] = []
        self._has_trained = False
        self._recorder: Recorder | None = None
        if self.args.report_samples > 0:
            self._recorder = Recorder(
                self.args,
                publishing.public_names(self.model, teacher),
                vocabulary_modes(teacher),
                tokenizer_of(self.processing_class),
                self._ranks.sum,
                is_first=self.is_world_process_zero(),
            )
            self.add_callback(self._recorder)
        # For subclasses written for TRL's trainer; the rollouts here use args.
        self.generation_config = trl_generation_config(self.args, self.model, pad_token_id(self.processing_class))

    def _find_tokenizer(self) -> None:
        """Take the tokenizer stored with the weights that `model_init` loaded."""
        self.processing_class = find_tokenizer(name_of(self.model), getattr(self.args, "trust_remote_code", False))
        self.callback_handler.processing_class = self.processing_class
        collator = unwrapped(self.data_collator)
        if type(collator) is DataCollatorForLanguageModeling:  # made before there was a tokenizer
            collator.pad_token_id = pad_token_id(self.processing_class)

    def _refuse_unusable(self, construction: Construction) -> None:
        refuse_data_parallel(self.args)
        refuse_dropped_deepspeed(self.args, self.is_deepspeed_enabled)
        if self.is_world_process_zero():
            warn_of_unused(unused_options(construction.run), self.args)
            warn_of_short_exchanges(self.args)
        refuse_split_sequences(self.get_cp_size(), self.get_sp_size())
        refuse_split_models(self.model, self.get_tp_size(), self.args)
        refuse_for_kind(self.model, self.args, construction.base)
        refuse_student(self.model, construction.teacher, is_trained=self.train_dataset is not None)

    def _make_trainable(self, model: nn.Module) -> None:
        if getattr(self, "processing_class", None) is not None:  # Trainer calls model_init before it sets that
            give_pad_token(model, pad_token_id(self.processing_class))
        if self.args.disable_dropout:
            disable_dropout(model)

    def _prepared(self, dataset: Any, name: str, *, is_drawn: bool = True, **use: bool) -> Any:
        if is_stream(dataset):
            # Each rank reads its own share: Accelerate would concatenate batches of unequal length on one rank.
            self.args.accelerator_config.dispatch_batches = False
            self.accelerator.dataloader_config.dispatch_batches = False
        rows = None
        if self._prepares_rows:
            dataset = self._preparation.prepared(dataset, name, **use)
            is_quiet = self.args.disable_tqdm or not self.is_world_process_zero()
            rows = coverage.CollatedRows.of(dataset, self.data_collator, self._columns_drawn, is_quiet=is_quiet)
        if rows is not None and use.get("is_training"):
            has_own_loader = coverage.has_own_loader(type(self), known=(GKDMixin, Trainer))
            is_drawn = not has_own_loader and coverage.trains_on_all(self.args, len(rows))
        coverage.check_rows(self.teacher, rows, name, are_all_drawn=is_drawn)
        return dataset

    def _prepare_evaluation(self) -> None:
        """Prepare the trainer's own evaluation set, if it was set since."""
        self.eval_dataset = self._prepared_once(self.eval_dataset, "eval", is_drawn=self.args.eval_strategy != "no")

    def _columns_drawn(self) -> list[str] | None:
        """Return the columns of rows that the collator gets; None for all."""
        if not self.args.remove_unused_columns:
            return None
        self._set_signature_columns_if_needed()
        return list(self._signature_columns or ())

    generalized_jsd_loss = staticmethod(trl_generalized_jsd_loss)
    generate_on_policy_outputs = staticmethod(generate_on_policy_outputs)

    @property
    def teacher_model(self) -> PreTrainedModel | None:
        """The teacher's model, if it is in this process."""
        return self.teacher.model

    @property
    def rollouts(self) -> RolloutEngine:
        """The engine that generates the student's completions."""
        return self._queue.engine

    @rollouts.setter
    def rollouts(self, engine: RolloutEngine) -> None:
        self._queue.drop()
        self._queue.engine = engine

    @property
    def last_checkpoint(self) -> Path | None:
        """The folder of the last checkpoint that this run saved or resumed from."""
        return self._recovery.last_checkpoint

    @property
    def data_collator(self) -> Any:
        """The collator, wrapped to keep values per token and side tensors, also if it is set later."""
        return self._data_collator

    @data_collator.setter
    def data_collator(self, collator: Any) -> None:
        if collator is not None and self._prepares_rows:
            if type(collator) is DataCollatorForVisionLanguageModeling:  # SFTTrainer's own, which reads other columns
                collator = DataCollatorForLanguageModeling(collator.processor.tokenizer.pad_token_id)
            if not can_pad(collator):  # set later: at construction another one has taken its place
                collator = StackOthers(default_collator(self.model, pad_token_id(self.processing_class)))
            collator = keeping_columns(collator, self._images)
        self._data_collator = collator

    def _decoded(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return a collated batch with its decoder's inputs, if the student is an encoder-decoder."""
        return with_decoder_inputs(base_model(self.model), inputs)

    @property
    def _student(self) -> CurrentStudent:
        return CurrentStudent(self.model, self.model_wrapped, self.state.global_step)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        # Keep these whatever the student's forward takes: without labels, a collator would label all tokens.
        columns = self._signature_columns or []
        own = ["input_ids", "labels"]
        if self._prepares_rows:
            own += [side.name for side in SIDE_TENSORS.values() if side.is_column]
            own += sorted(columns_read_by(self.data_collator, base_model(self.model).forward))
            own += [] if self._images is None else IMAGE_COLUMNS
        self._signature_columns = [*columns, *(column for column in own if column not in columns)]

    def _reject_skip_prepare_without_labels(self, *args: Any, **kwargs: Any) -> None:
        # SFTTrainer refuses rows with masks in place of labels, if it does not prepare them. We do.
        if not self._prepares_rows:
            super()._reject_skip_prepare_without_labels(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """Return the loader of the training set; its rows are prepared if it was set since."""
        self.train_dataset = self._prepared_once(self.train_dataset, "train", is_training=True)
        if self._prepares_rows:
            self._fixed_options.require_completions(self.args, self.train_dataset)
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the loader of an evaluation set; the rows of a set passed here, or set since, are prepared."""
        # Trainer also passes its own set, or a key of its dictionary of sets.
        is_given = eval_dataset is not None and eval_dataset is not self.eval_dataset
        if is_given and not isinstance(eval_dataset, str):
            return super().get_eval_dataloader(self._prepared(eval_dataset, "eval"))
        self.eval_dataset = self._prepared_once(self.eval_dataset, "eval")
        return super().get_eval_dataloader(eval_dataset if is_given else None)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return the loader of a test set, with its rows prepared.

        Raises GKDDataError if not all rows can be used: predictions would not line up with them.
        """
        return super().get_test_dataloader(self._prepared(test_dataset, "test", is_test=True))

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Return a fresh student from `model_init`, adapted like one that was passed."""
        model = uncompiled_student(super().call_model_init(trial))
        model = adapted(model, self._adapter, checkpoints_activations(self.args))
        self._make_trainable(model)
        return model

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does; `resume_from_checkpoint=True` takes the last complete checkpoint.

        Raises GKDConfigError if there is none, or if the given one is incomplete.
        """
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        require_one_step(checkpoint, self._ranks)
        return super().train(checkpoint, *args, **kwargs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._fixed_options.require_unchanged(self.args)  # here a hyperparameter search has set the trial's
        self._prepare_evaluation()  # now: a set that can't be used must not end the run at its first evaluation
        # Drop sums left over from an earlier run, after its last log entry or its interruption.
        self._meter.clear()
        self._recovery.last_checkpoint = None  # of an earlier run; loading one sets it again
        mark_loss_as_scaled(self)  # for every run: a hyper-parameter search makes a new accelerator for each
        output: TrainOutput = super()._inner_training_loop(*args, **kwargs)
        return output

    def set_initial_training_values(self, args: Any, dataloader: Any, *sizes: Any) -> tuple[Any, ...]:
        """Return the lengths of the run, the same on all ranks, and log every tenth of it by default."""
        require_equal_epochs(dataloader, self._ranks)
        lengths: tuple[Any, ...] = super().set_initial_training_values(args, dataloader, *sizes)
        if isinstance(args.logging_steps, Unset):  # also if an earlier run set it
            args.logging_steps = Unset(tenth_of(lengths[-1]))
        return lengths

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """Return the window's batches after their rollouts, on the device, and the number of tokens trained on in them.

        With `average_tokens_across_devices`, the count is over all ranks. Tokens are counted after the rollouts, which
        replace completions from the dataset.
        """
        self._recovery.note_random_states()
        self._check_lmbda()
        epoch = Epoch(
            self._windows,
            epoch_iterator,
            has_length=has_length(self.callback_handler.train_dataloader),
            num_batches=num_batches,
            accumulation=self.args.gradient_accumulation_steps,
            batch_size=self._train_batch_size,
            max_steps=self.state.max_steps,
            is_first=not self._has_trained and self.state.global_step == 0,
            completed=self._decoded,
        )
        # Not by the λ of this step, which a callback may have set to 0: the queue has taken later windows already.
        staleness = 0
        if self._fixed_options.generates_in_run:
            batches, staleness = self._rolled_out(epoch)
        else:
            batches = epoch.take(num_batches, is_first=epoch.is_first)
        if not batches:
            return batches, None
        for batch in batches:
            require_labels(batch)
            refuse_negative_labels(batch)
        placed = self._placement.placed(self._comparable(batches))
        self._has_trained = True
        self._checks.begin(has_current_rollouts=staleness == 0)
        self._window_tokens = self._count_trained_tokens(device)
        return placed, self._window_tokens

    def _check_lmbda(self) -> None:
        rows = self.train_dataset if self._prepares_rows else None
        with self._saving_before_it_fails():
            try:
                self._fixed_options.require_usable_rows(self.args, rows)
            except GKDConfigError as error:  # on all ranks: a callback changes λ on all alike
                self._recovery.raise_known(error)

    def _rolled_out(self, epoch: Epoch) -> tuple[list[dict[str, Any]], int]:
        """Return the batches of the next window, and how many steps older the weights are that generated it."""
        with self._meter.measure("rollout"), self._saving_before_it_fails():
            taken = self._queue.next_window(epoch, self._student, self._meter)
        if taken is None:
            return [], 0
        window, staleness = taken
        self._generated = window.generated
        self._meter.add_samples(**sample_counts(window, staleness))
        return window.batches, staleness

    def _comparable(self, batches: list[Any]) -> list[Any]:
        found = [comparable(self.teacher, batch) for batch in batches]
        for before, after in zip(batches, found, strict=True):
            if after is not before:
                scored = [TokenBatch.from_inputs(batch).n_scored for batch in (before, after)]
                self._meter.add_samples(incomparable_tokens=scored[0] - scored[1])
        return found

    def _count_trained_tokens(self, device: torch.device) -> Tensor:
        count = torch.full((), self._placement.scored_tokens, device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self._ranks.gather(count).sum()
            # These ranks see the same tokens.
            count = count // (self.get_tp_size() * self.get_cp_size() * self.get_sp_size())
        return count

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward of a micro-batch; at the window's last, raise if it must not be learned from."""
        self._is_in_step, self._is_last_of_window = True, self.accelerator.sync_gradients
        divisor = self._step_divisor(inputs) if num_items_in_batch is None else num_items_in_batch
        with self._saving_before_it_fails():
            try:
                with self._meter.measure("step"):
                    loss: Tensor = super().training_step(model, inputs, divisor)
            finally:
                self._is_in_step = False
            if self._is_last_of_window:
                self._is_last_of_window = False
                self._require_sound_window()
        return loss

    def _step_divisor(self, inputs: dict[str, Any]) -> Tensor | int | None:
        """Return the divisor of a micro-batch in a training step for which a subclass passes none; None elsewhere."""
        if not (self._is_in_step and self.loss_is_scaled_for_ga):  # else Trainer divides by the number of micro-batches
            return None
        if self._placement.holds(inputs):
            return self._window_tokens
        # A subclass made this batch: as for Trainer, all micro-batches of the window count the same.
        tokens = TokenBatch.from_inputs(comparable(self.teacher, self._decoded(inputs))).n_scored
        return tokens * self.current_gradient_accumulation_steps * self._averaging_ranks

    @property
    def _averaging_ranks(self) -> int:
        # DDP averages gradients over ranks, but with this option the divisor already counts all ranks.
        return self._ranks.size // self.get_tp_size() if self.args.average_tokens_across_devices else 1

    def _require_sound_window(self) -> None:
        self._checks.require_sound(self.state.global_step + 1, self.model, self.args)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Return the divergence of the student from the teacher, summed over the tokens trained on and divided.

        In training, a mixture of experts adds its load-balancing loss, as its own loss does, averaged over the
        micro-batches of the window.

        Args:
            model: The student, wrapped for distribution or not.
            inputs: `input_ids` and `labels` [B, L], and further arguments of the forward. An encoder-decoder's decoder
                inputs are made from the labels unless given.
            return_outputs: Whether to also return the forward's output, with logits [B, L, V] in the columns of
                `inputs` (an encoder-decoder's in those of its labels).
            num_items_in_batch: The divisor: the number of tokens in the window, by default also inside `training_step`;
                elsewhere by default the number in this batch.
        """
        require_labels(inputs)
        if num_items_in_batch is None and model.training:
            num_items_in_batch = self._step_divisor(inputs)
        decoded = inputs if has_decoder_inputs(inputs) else self._decoded(inputs)
        batch = TokenBatch.from_inputs(comparable(self.teacher, decoded))
        batch = self._placement.recognised(inputs, batch)
        self._pairing = pairing = self._pairing.with_student(self.model, self._ranks)
        self._student_teachers.attach(self.model, self._ranks, pairing.head)
        with (
            self._meter.measure("teacher") if model.training else contextlib.nullcontext(),
            self._recovery.failing_together(
                GKDTeacherError,
                "the teacher's scoring of a batch",
                # A remote teacher may fail for only one rank; for a local one, an exchange would slow each micro-batch.
                exchanges=not self.teacher.is_local,
            ),
        ):
            teacher = self.teacher.score(with_teacher_prompts(batch)).sliced(pairing.vocab_size)
            refuse_inference_tensors(teacher, self.teacher)
        products = product_dtype(self.args, self.accelerator.mixed_precision)
        observe = self._recorder.observe if self._recorder is not None and model.training else None
        comparison = Comparison(self.args, batch, teacher, pairing.vocab_size, model.training, products, observe)
        student = run_student(
            model,
            base_model(self.model),
            batch,
            pairing.head,
            comparison,
            keeps_logits=return_outputs,
            is_output_awaited=self._ranks.awaits_outputs,
        )
        self._record(batch, student.tokens, model.training)
        if num_items_in_batch is None:
            loss = divided(student.loss_sum, batch.n_scored)
        else:
            loss = divided(student.loss_sum, num_items_in_batch, self._averaging_ranks)
        if student.router_loss is not None:
            self._meter.add_router_loss(student.router_loss.value)
            micro_batches = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + student.router_loss.weighted(loss.device) / micro_batches
        if not return_outputs:
            return loss
        logits = in_columns_of(decoded, logits_of(student.outputs))
        if has_decoder_inputs(decoded) and not has_decoder_inputs(inputs):
            logits = in_label_columns(inputs, logits)
        set_logits(student.outputs, logits)
        return loss, student.outputs

    def _record(self, batch: TokenBatch, result: TokenDivergence, is_training: bool) -> None:
        sums_BK = sums_by_sample(
            batch.rows_N,
            batch.is_on_policy_B,
            result,
            self._teacher_sums,
            batch.side.get(TEACHER_INDEX),
            batch.sampling_log_probs_N,
        )
        if not is_training:
            self._evaluation.see(sums_BK)
            return
        self._meter.add_tokens(sums_BK)
        self._checks.add(batch, result, sums_BK)
        if self._is_last_of_window:  # before the backward: see FiniteCheck
            self._checks.begin_reading()
            if self.is_deepspeed_enabled or steps_in_backward(self.args.optim):
                self._require_sound_window()

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # Here, where Trainer gathers its loss: a subclass's `log` may go no further on other ranks than the first.
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            self._step_metrics = self._meter.read(self._ranks.sum)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does; training entries get the metrics since the last one."""
        # `learning_rate` distinguishes Trainer's own entries from a user's callback's.
        if "loss" in logs and "learning_rate" in logs:
            logs.update(self._step_metrics)
            if self.args.log_completions and self._generated and self.is_world_process_zero():
                shown = self._generated[: self.args.num_completions_to_print]
                rows = completion_rows(shown, tokenizer_of(self.processing_class))
                print_completions(rows, f"Completions at step {self.state.global_step}")
                send_completions(rows, self.state.global_step, self.callback_handler.callbacks)
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Return the loss of a batch and, unless only that is wanted, full logits [B, L, V] and labels [B, L].

        Both are in the collator's columns, like the inputs that Trainer may pass to `compute_metrics` with them.
        Samples without a completion are measured on the student's greedy one. Under `predict_with_generate`, the tokens
        that Seq2SeqTrainer generates take the place of the logits.
        """
        inputs = self._prepare_inputs(inputs)
        require_labels(inputs)
        given = self._decoded(inputs)
        inputs = self._queue.completed_prompts(given, self._student)
        generates = getattr(self.args, "predict_with_generate", False) and not prediction_loss_only
        logits = labels = None
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only or generates:
                loss: Any = self.compute_loss(model, inputs)
            else:
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
                logits, labels = logits_of(outputs), inputs["labels"]
            self._evaluation.count(loss)
            if self.args.eval_on_policy:
                on_policy_loss: Any = self.compute_loss(model, self._queue.completed(inputs, self._student))
                self._evaluation.count(on_policy_loss, is_on_policy=True)
        if generates:
            return loss, self._generated_tokens(model, given, ignore_keys), given["labels"]
        return loss, logits, labels

    def _generated_tokens(self, model: nn.Module, inputs: dict[str, Any], ignore_keys: list[str] | None) -> Any:
        """Return what Seq2SeqTrainer generates for a batch, from the encoder's inputs: without labels, no loss."""
        model_inputs = TokenBatch.from_inputs(inputs).model_inputs
        encoded = {key: value for key, value in model_inputs.items() if key not in PER_LABEL}
        return super().prediction_step(model, encoded, False, ignore_keys)[1]

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as Trainer does, with the loss and our metrics weighted by tokens over all ranks."""
        is_loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        gathers_outputs = not is_loss_only or "inputs" in self.args.include_for_metrics
        require_equal_batches(dataloader, self._ranks, gathers_outputs=gathers_outputs)
        self._evaluation = Evaluation(self._ranks.gather_samples, self._teacher_sums)
        self._recovery.note_random_states()
        with self._saving_before_it_fails():
            output: EvalLoopOutput = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        if not self.is_in_train and self._ranks.size > 1 and self.model_wrapped is self.model:
            # Evaluation marks the model as prepared, so training would not wrap it in DDP, and ranks would drift apart.
            self.model._is_accelerate_prepared = False  # type: ignore[assignment]
        metrics, measured = output.metrics or {}, self._evaluation.metrics(metric_key_prefix)
        self._own_metrics |= measured.keys() - metrics.keys()
        metrics.update(measured)
        return output

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], Any] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Search as Trainer does; the default objective uses only Trainer's own metrics, not entropies and the like."""
        return super().hyperparameter_search(hp_space, compute_objective or self._default_objective, *args, **kwargs)

    def _default_objective(self, metrics: dict[str, float]) -> float:
        # Trainer's is the sum of all metrics beside the loss, if there are any.
        return default_compute_objective({name: metrics[name] for name in metrics if name not in self._own_metrics})

    def _saving_before_it_fails(self) -> contextlib.AbstractContextManager[None]:
        step = self.state.global_step if self.is_in_train else None
        trial = getattr(self, "_trial", None)
        return self._recovery.saving_before_it_fails(step, lambda: self._save_checkpoint(self.model, trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        checkpoint = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            # Left by an older run in the same folder, it would make a half-written checkpoint seem complete.
            (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
        self._is_in_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_in_checkpoint = False
        self._recovery.last_checkpoint = checkpoint

    def _save_rng_state(self, output_dir: str) -> None:
        save_rollouts(output_dir, self._ranks.index, self._queue.state(self.state.global_step))
        self._student_teachers.save(output_dir, is_writer=self.args.should_save)
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # next, the first rank writes Trainer's state, which vouches for all ranks

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._has_loaded(resume_from_checkpoint, self.model if model is None else model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._has_loaded(self.state.best_model_checkpoint, self.model):
            super()._load_best_model()
        self._student_teachers.load_best(self.state.best_model_checkpoint)

    def _has_loaded(self, checkpoint: str | None, model: nn.Module) -> bool:
        """Load a checkpoint that Trainer can't; return whether it was one."""
        is_sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        return checkpoint is not None and not is_sharded and load_converted(model, checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._recovery.last_checkpoint = None if checkpoint is None else Path(checkpoint)
        self._queue.load(load_rollouts(checkpoint, self._ranks.index))
        self._student_teachers.attach(self.model, self._ranks)  # that of model_init is new
        self._student_teachers.load(checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole student as Trainer does, also if FSDP keeps checkpoints in shards; on all ranks together."""
        with contextlib.nullcontext() if self._is_in_checkpoint else self._ranks.saving_whole():
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        card = Path(output_dir or self.args.output_dir) / "README.md"
        with dropping_secrets(), publishing.keeping_own(card):  # from training_args.bin
            super()._save(output_dir, state_dict)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        with dropping_secrets():
            super()._push_from_checkpoint(checkpoint_folder)

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
        """Write README.md: the student's teacher, data and procedure. A README.md that the user wrote is kept.

        The arguments are Trainer's; `dataset_name` is TRL's name for `dataset`. Local paths are shortened to their last
        part.
        """
        path = Path(self.args.output_dir) / "README.md"
        if not self.is_world_process_zero():
            return
        card_tags = publishing.card_tags(path, tags, getattr(self, "_tag_names", []))
        if card_tags is None:
            return
        model = self.accelerator.unwrap_model(self.model)
        names = dataset if dataset is not None else dataset_name
        summary = TrainingSummary.from_trainer(
            self,
            language=language,
            license=license,
            tags=card_tags,
            model_name=model_name,
            finetuned_from=finetuned_from or publishing.source_on_hub(model),
            tasks=tasks,
            dataset_tags=publishing.tags_of_datasets(names) if dataset_tags is None else dataset_tags,
            dataset=names,
            dataset_args=dataset_args,
        )
        publishing.write_card(
            path, summary, args=self.args, model=model, teacher=self.teacher, dataset=self.train_dataset
        )


def _option_of_args(name: str) -> Any:
    def read(trainer: GKDTrainer) -> Any:
        return getattr(trainer.args, name)

    def write(trainer: GKDTrainer, value: Any) -> None:
        setattr(trainer.args, name, value)

    return property(read, write, doc=f"`args.{name}`, where subclasses of TRL's trainer look for it.")


class GKDTrainer(GKDMixin, Trainer):
    """`transformers.Trainer` whose loss is the divergence from a teacher; see GKDMixin for its arguments."""

    lmbda = _option_of_args("lmbda")
    beta = _option_of_args("beta")
    temperature = _option_of_args("temperature")
    seq_kd = _option_of_args("seq_kd")
