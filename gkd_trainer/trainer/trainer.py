"""GKDTrainer: the stages put together on the hooks of the Hugging Face Trainer.

Shapes: B batch, L length, N tokens trained on, V vocabulary, K summed quantities.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftConfig, PeftMixedModel, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import TrainOutput
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from gkd_trainer.compat import checkpoints_activations, mark_loss_as_scaled
from gkd_trainer.config import Unset
from gkd_trainer.data import unwrapped
from gkd_trainer.divergence import TokenDivergence, token_divergence, trl_generalized_jsd_loss
from gkd_trainer.effects import Run, unused_options
from gkd_trainer.errors import GKDConfigError, GKDDataError, GKDTeacherError
from gkd_trainer.models.heads import (
    InseparableHead,
    SeparableHead,
    compare,
    connection,
    logits_of,
    router_loss_coefficient,
    router_loss_of,
    set_logits,
    without_router_logits,
)
from gkd_trainer.models.loading import (
    base_model,
    disable_dropout,
    find_tokenizer,
    give_pad_token,
    load_student,
    name_of,
    refuse_frozen,
    refuse_prompt_learning,
    uncompiled,
    wrap_in_adapter,
)
from gkd_trainer.redaction import dropping_secrets
from gkd_trainer.report.interval import tenth_of
from gkd_trainer.report.metrics import EvaluationMeter, TrainingMeter, sums_by_row
from gkd_trainer.report.notebook import NotebookMetrics, is_in_notebook
from gkd_trainer.rollouts import RolloutEngine
from gkd_trainer.teachers import Teacher
from gkd_trainer.trainer.any_trainer import pad_token_id, require_labels
from gkd_trainer.trainer.construction import (
    accepted_by,
    build_teacher,
    completed_args,
    init_parameters,
    refuse_data_parallel,
    refuse_dropped_deepspeed,
    refuse_meaningless,
    refuse_trls_order,
    warn_of_unused,
)
from gkd_trainer.trainer.evaluation import EvaluationMixin
from gkd_trainer.trainer.finite import FiniteCheck
from gkd_trainer.trainer.pairing import PairingMixin
from gkd_trainer.trainer.preparation import PreparationMixin
from gkd_trainer.trainer.publishing import PublishingMixin
from gkd_trainer.trainer.trl_generation import generate_on_policy_outputs, trl_generation_config
from gkd_trainer.types import Generated, StudentSignal, TokenBatch, in_columns_of

logger = logging.getLogger(__name__)

_COMPILES = " (torch_compile=True compiles it nevertheless)"


class GKDMixin(PreparationMixin, EvaluationMixin, PairingMixin, PublishingMixin):
    """Generalised knowledge distillation for a trainer of the Hugging Face family.

    Put it in front of the trainer that you extend: `class MySFT(GKDMixin, trl.SFTTrainer)`, with
    `class MyConfig(GKDArguments, trl.SFTConfig)`. For the plain Trainer that is `GKDTrainer`.

    It takes the arguments of `transformers.Trainer`, of which these mean more than there, and some of its own:

    Args:
        model: The student: a model, a PEFT model, or a name or path, which is loaded with `args.model_init_kwargs`
            and in float32 unless they give a dtype. One from `torch.compile` runs uncompiled unless
            `args.torch_compile` is set.
        args: A configuration with GKDArguments; plain TrainingArguments get the defaults of GKDConfig.
        train_dataset: Rows of `messages`, `prompt` and `completion`, `prompt`, `text`, or `input_ids` and `labels`.
        eval_dataset: The same, or a dictionary of them.
        processing_class: The tokenizer; by default the one beside the student's weights.
        teacher_model: The teacher: a model, a PEFT model, a name or a path; or set `args.teacher_model_name_or_path`.
        peft_config: The adapter that the student is wrapped in.
        formatting_func: Turns a row into text, a list of messages, or a row of a format above.
        teacher: A Teacher, in place of `teacher_model`.
        rollouts: The engine that generates the student's completions; by default HFRollouts.
        base_kwargs: Further arguments of the trainer that is extended.

    Raises:
        GKDConfigError: Arguments that have no meaning here, or none together.
        GKDTeacherError: No teacher, or one that does not fit the student.
        GKDDataError: A data set that can't be used.
    """

    # The loss is divided by the tokens of the whole window; Trainer must not divide it again by its micro-batches.
    loss_is_scaled_for_ga: bool | None = True

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
        refuse_trls_order(args, data_collator, type(self).__name__)
        base_init: Callable[..., None] = super().__init__
        family = type(self).__mro__
        base_parameters = init_parameters(family[family.index(GKDMixin) + 1 :])
        # A base that takes adapters (TRL's trainers) also loads a student by name; the plain Trainer does neither.
        is_plain_trainer = "peft_config" not in base_parameters
        config: Any = completed_args(args, is_plain_trainer)
        refuse_meaningless(config, compute_loss_func, peft_config)
        if (model is None) == (model_init is None):
            raise GKDConfigError("expected one student: pass model (a model, a name or a path) or model_init")
        if isinstance(model, os.PathLike):
            model = os.fspath(model)
        elif isinstance(model, nn.Module):
            model = uncompiled(model, "student", _COMPILES)
        trust_remote_code = getattr(config, "trust_remote_code", False)
        teacher = build_teacher(config, teacher, teacher_model, trust_remote_code)
        if teacher.model is not None and teacher.model is model:
            raise GKDTeacherError("teacher and student are the same object: freezing the one would freeze the other")
        if config.seq_kd and not getattr(teacher.model, "can_generate", lambda: False)():
            raise GKDTeacherError(
                "seq_kd=True has the teacher generate, which this teacher can't: pass a causal LM that lives in this "
                "process as teacher_model, or set seq_kd=False"
            )
        run = Run(
            config,
            has_top_tokens=teacher.top_k is not None,
            loads_student=isinstance(model, str),
            builds_rollouts=rollouts is None,
        )
        if processing_class is None:
            name = model if isinstance(model, str) else name_of(model)
            processing_class = find_tokenizer(name, trust_remote_code, getattr(config, "model_init_kwargs", None))

        self._adapter_config = peft_config if is_plain_trainer else None
        self._formatting_func = formatting_func
        dataset_kwargs = getattr(config, "dataset_kwargs", None) or {}
        # TRL's DataCollatorForChatML tokenises by itself, from columns that no model's forward takes.
        reads_messages = hasattr(data_collator, "messages_key")
        self._prepares_rows = not (dataset_kwargs.get("skip_prepare_dataset", False) or reads_messages)
        if reads_messages:
            config.remove_unused_columns = False

        if not torch.accelerator.is_available():  # or each loader warns that it pins no memory
            config.dataloader_pin_memory = False
        set_seed(config.seed)  # adapters start at random
        if is_plain_trainer:
            if isinstance(model, str):
                model = load_student(model, getattr(config, "model_init_kwargs", None), trust_remote_code)
            if model is not None:
                model = self._adapted(model, config)
            if data_collator is None:
                data_collator = DataCollatorForLanguageModeling(pad_token_id=pad_token_id(processing_class))
        else:
            # The rows are prepared below: SFTTrainer would train on the system's and the user's tokens too.
            config.dataset_kwargs = {**dataset_kwargs, "skip_prepare_dataset": True}

        arguments: dict[str, Any] = {
            "model": model,
            "args": config,
            "data_collator": data_collator,
            "train_dataset": train_dataset,
            "eval_dataset": eval_dataset,
            "processing_class": processing_class,
            "model_init": model_init,
            "compute_metrics": compute_metrics,
            "callbacks": callbacks,
            "optimizers": optimizers,
            "optimizer_cls_and_kwargs": optimizer_cls_and_kwargs,
            "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
            **base_kwargs,
        }
        if not is_plain_trainer:
            arguments["peft_config"] = peft_config
        base_init(**accepted_by(base_parameters, arguments, type(self).__name__))
        mark_loss_as_scaled(self)
        if model_init is not None and processing_class is None:
            self._find_tokenizer_of_made_student(trust_remote_code)
        if is_in_notebook():
            self.add_callback(NotebookMetrics(self.callback_handler.callbacks))
        refuse_data_parallel(self.args)
        refuse_dropped_deepspeed(self.args, self.is_deepspeed_enabled)
        if self.is_world_process_zero():
            warn_of_unused(unused_options(run), config)
        if self.get_cp_size() > 1 or self.get_sp_size() > 1:
            raise GKDConfigError(
                "context and sequence parallelism split a sequence over ranks, across which the divergence can't look "
                "for the next token: set cp_size and sp_size to 1"
            )
        refuse_prompt_learning(self.model)
        if teacher.model is not None and not {*map(id, teacher.model.parameters())}.isdisjoint(
            map(id, self.model.parameters())
        ):
            raise GKDTeacherError(
                "the teacher shares weights with the student, which freezing the teacher froze too: load the teacher "
                "separately"
            )
        if self.train_dataset is not None:
            refuse_frozen(self.model)
        self._give_pad_token(self.model)
        if self.args.disable_dropout:
            disable_dropout(self.model)

        self._meter = TrainingMeter(self.args.device)
        self._eval_meter, self._eval_on_policy_meter = EvaluationMeter(), EvaluationMeter()
        self._row_sums_BK: Tensor | None = None
        self._finite_check = FiniteCheck()
        self._generated: list[Generated] = []
        self._has_trained = False
        self._connect_teacher(teacher)
        self._connect_rollouts(rollouts)
        # Read by subclasses that were written for TRL's trainer; the rollouts here sample by args.
        self.generation_config = trl_generation_config(self.args, self.model, self._pad_token_id)
        self._prepare_datasets()

    generalized_jsd_loss = staticmethod(trl_generalized_jsd_loss)
    generate_on_policy_outputs = staticmethod(generate_on_policy_outputs)

    @property
    def teacher_model(self) -> PreTrainedModel | None:
        """The teacher's model, where it lives in this process."""
        return self.teacher.model

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Return a fresh student from `model_init`, adapted like one that was passed."""
        model = self._adapted(uncompiled(super().call_model_init(trial), "student", _COMPILES), self.args)
        self._give_pad_token(model)
        if self.args.disable_dropout:
            disable_dropout(model)
        return model

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        # What is left of another run, after its last log entry or where it was broken off, is not this run's.
        self._meter.clear()
        output: TrainOutput = super()._inner_training_loop(*args, **kwargs)
        return output

    def set_initial_training_values(self, args: Any, dataloader: Any, *sizes: Any) -> tuple[Any, ...]:
        """Return the lengths of the run, and log at every tenth of it where the configuration leaves that open."""
        lengths: tuple[Any, ...] = super().set_initial_training_values(args, dataloader, *sizes)
        if isinstance(args.logging_steps, Unset):  # also that of a run before
            args.logging_steps = Unset(tenth_of(lengths[-1]))
        return lengths

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """Return the window's batches after their rollouts, and how many tokens are trained on in them.

        The count is over all ranks where `average_tokens_across_devices` is set. It is taken after the rollouts, which
        replace the completions that the data set gave.
        """
        if epoch_iterator is self._ended_iterator:  # Trainer asks again for each step that is left of the run
            return [], None
        self._note_random_states()
        if self.args.generates:
            with self._meter.measure("rollout"), self._saving_before_it_fails():
                batches = self._next_window(epoch_iterator, num_batches)
        else:
            batches = self._take_window(epoch_iterator, num_batches)
        if not batches:
            if not self._has_trained and self.state.global_step == 0:
                raise GKDDataError(
                    "the training set gave no batch: no row of it can be used; the log counts the rows that were "
                    "dropped, by reason"
                )
            return batches, None
        for batch in batches:
            require_labels(batch)
        self._has_trained = True
        self._finite_check.clear()
        return batches, self._count_trained_tokens(batches, device)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward of a micro-batch; at the window's last one, refuse logits that aren't finite."""
        with self._meter.measure("step"), self._saving_before_it_fails():
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._finite_check.raise_if_not(
                self.state.global_step + 1,
                self.accelerator.process_index,
                lambda flag: self.accelerator.reduce(flag, "sum"),
            )
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Return the divergence of the student from the teacher, summed over the tokens trained on and divided.

        In training, a mixture of experts adds its load-balancing loss, as its own loss does: a mean over the
        micro-batches of the window.

        Args:
            model: The student, wrapped for distribution or not.
            inputs: `input_ids` and `labels` [B, L], and whatever else the forward takes.
            return_outputs: Whether to return the forward's output too, with logits [B, L, V] in the columns of
                `inputs`.
            num_items_in_batch: The divisor: the tokens of the window; by default those of this batch.
        """
        require_labels(inputs)
        batch = TokenBatch.from_inputs(inputs)
        with (
            self._meter.measure("teacher") if model.training else contextlib.nullcontext(),
            self._failing_together(
                GKDTeacherError,
                "the teacher's scoring of a batch",
                # A teacher elsewhere may fail one rank alone; one that lives here would make each micro-batch wait.
                exchanges=self.teacher.model is None,
            ),
        ):
            teacher = self.teacher.score(batch).sliced(self._vocab_size)
        head = self._student_head()
        if return_outputs and isinstance(head, SeparableHead):
            head = InseparableHead("the caller wants logits")
        rows_N = batch.rows_N
        labels_N = label_weight_N = None
        if self.args.ce_weight > 0 and model.training:
            # The student's own samples take the divergence alone: their tokens are no targets to reach.
            labels_N, label_weight_N = batch.targets_N, self.args.ce_weight * ~batch.is_on_policy_B[rows_N]

        def divergence_of(student: StudentSignal) -> TokenDivergence:
            return token_divergence(
                student.sliced(self._vocab_size),
                teacher,
                beta=self.args.beta,
                divergence=self.args.divergence,
                divergence_options=self.args.divergence_options,
                temperature=self.args.loss_temperature,
                scale=self.args.divergence_scale,
                tail=self.args.teacher_tail,
                labels_N=labels_N,
                label_weight_N=label_weight_N,
                product_dtype=_product_dtype(self.args, self.accelerator.mixed_precision),
                workspace_mb=self.args.loss_workspace_mb,
            )

        student = base_model(self.model)
        coefficient = router_loss_coefficient(student) if model.training else 0.0
        forward_kwargs = {"output_router_logits": True} if coefficient else without_router_logits(student)
        result, outputs = compare(model, batch, head, divergence_of, **forward_kwargs)
        self._record(batch, rows_N, result, model.training)
        loss_N = result.values_N if result.loss_N is None else result.loss_N
        loss = loss_N.sum()
        # Nothing to train on leaves the sum empty: it stays connected to the head too, for DDP.
        if len(rows_N) == 0 or (isinstance(head, SeparableHead) and head.is_sharded):
            loss = loss + connection(outputs)
        if num_items_in_batch is None:
            loss = loss / max(1, len(rows_N))
        else:
            loss = loss / torch.as_tensor(num_items_in_batch, device=loss.device).clamp_min(1)
            if self.args.average_tokens_across_devices:
                # DDP averages gradients over ranks, and the divisor is of all ranks already.
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        router_loss = router_loss_of(outputs) if coefficient else None
        if router_loss is not None:
            self._meter.add_router_loss(router_loss)
            micro_batches = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + coefficient * router_loss.to(loss.device) / micro_batches
        if not return_outputs:
            return loss
        set_logits(outputs, in_columns_of(inputs, logits_of(outputs)))
        return loss, outputs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does; entries of training get the metrics since the last one."""
        # Trainer calls this on every rank; `learning_rate` tells its own entries from those of a user's callback.
        if "loss" in logs and "learning_rate" in logs:
            logs.update(self._meter.read(lambda sums: self.accelerator.reduce(sums, "sum")))
            self._show_completions()
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with dropping_secrets():  # from training_args.bin
            super()._save(output_dir, state_dict)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        with dropping_secrets():
            super()._push_from_checkpoint(checkpoint_folder)

    def _find_tokenizer_of_made_student(self, trust_remote_code: bool) -> None:
        self.processing_class = find_tokenizer(name_of(self.model), trust_remote_code)
        self.callback_handler.processing_class = self.processing_class
        collator = unwrapped(self.data_collator)
        if type(collator) is DataCollatorForLanguageModeling:  # made above, before there was a tokenizer
            collator.pad_token_id = self._pad_token_id

    def _give_pad_token(self, model: nn.Module) -> None:
        if getattr(self, "processing_class", None) is not None:  # Trainer calls model_init before it sets that
            give_pad_token(model, self._pad_token_id)

    def _adapted(self, model: nn.Module, args: Any) -> nn.Module:
        if self._adapter_config is not None:
            model = wrap_in_adapter(model, self._adapter_config)
        if isinstance(model, PeftModel) and checkpoints_activations(args):
            # Without it no gradient passes a checkpointed layer whose own inputs need none (transformers#42489).
            model.enable_input_require_grads()
        return model

    def _count_trained_tokens(self, batches: list[Any], device: torch.device) -> Tensor:
        count = torch.stack([TokenBatch.from_inputs(batch).is_scored_BL.sum() for batch in batches]).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
            # These ranks see the same tokens.
            count = count // (self.get_tp_size() * self.get_cp_size() * self.get_sp_size())
        return count

    def _record(self, batch: TokenBatch, rows_N: Tensor, result: TokenDivergence, is_training: bool) -> None:
        self._row_sums_BK = sums_by_row(
            rows_N,
            batch.is_on_policy_B,
            divergence_N=result.values_N,
            student_entropy_N=result.student_entropy_N,
            teacher_entropy_N=result.teacher_entropy_N,
            agrees_N=result.agrees_N,
            teacher_mass_N=result.teacher_mass_N,
            student_mass_N=result.student_mass_N,
        )
        if is_training:
            self._meter.add_tokens(self._row_sums_BK)
            batch_size = batch.labels_BL.shape[0]
            is_finite_N = result.is_finite_N
            if result.cross_entropy_N is not None:
                is_finite_N = is_finite_N & result.cross_entropy_N.isfinite()
            self._finite_check.add(rows_N, batch_size, result.is_teacher_finite_N, is_finite_N)


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


def _product_dtype(args: Any, mixed_precision: str) -> torch.dtype | None:
    """Return what the divergence's products round to: autocast, which covers the model's forward alone, tells none."""
    name: str = args.loss_product_dtype
    if name == "auto":
        if args.device.type != "cuda":
            return None
        name = {"bf16": "bfloat16", "fp16": "float16"}.get(mixed_precision, name)
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(name)
