"""GKDTrainer: the stages put together on the hooks of the Hugging Face Trainer.

Shapes: B batch, L length, N tokens trained on, V vocabulary, K summed quantities.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import datasets
import torch
from accelerate.utils import DistributedType
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import EvalLoopOutput
from trl import pack_dataset
from trl.models import unwrap_model_for_generation
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from gkd_trainer.arguments import (
    accepted_by,
    build_teacher,
    completed_args,
    init_parameters,
    refuse_data_parallel,
    refuse_meaningless,
)
from gkd_trainer.batch import Generated, Sampling, TokenBatch
from gkd_trainer.data import RowRules, keeping_labels, prepare_dataset
from gkd_trainer.divergence import TokenDivergence, token_divergence, trl_generalized_jsd_loss
from gkd_trainer.errors import GKDConfigError, GKDDataError, GKDTeacherError
from gkd_trainer.finite import FiniteCheck
from gkd_trainer.heads import InseparableHead, SeparableHead, find_head, predict, vocabulary_rows
from gkd_trainer.report.completions import completion_rows, print_completions, send_completions
from gkd_trainer.report.metrics import EvaluationMeter, TrainingMeter, sums_by_row
from gkd_trainer.rollouts import (
    Draw,
    HFRollouts,
    RolloutEngine,
    complete_greedily,
    has_prompts_alone,
    lmbda_at,
    roll_out_window,
)
from gkd_trainer.student import (
    base_model,
    disable_dropout,
    find_tokenizer,
    load_student,
    name_of,
    refuse_frozen,
    refuse_prompt_learning,
    wrap_in_adapter,
)
from gkd_trainer.teachers import Teacher, shared_vocabulary_size

logger = logging.getLogger(__name__)

# The mixin goes in front of any trainer of the family; type checkers see the one that all derive from.
if TYPE_CHECKING:
    _AnyTrainer = Trainer
else:
    _AnyTrainer = object


class GKDMixin(_AnyTrainer):
    """Generalised knowledge distillation for a trainer of the Hugging Face family.

    Put it in front of the trainer that you extend: `class MySFT(GKDMixin, trl.SFTTrainer)`, with
    `class MyConfig(GKDArguments, trl.SFTConfig)`. For the plain Trainer that is `GKDTrainer`.

    It takes the arguments of `transformers.Trainer`, of which these mean more than there, and some of its own:

    Args:
        model: The student: a model, a PEFT model, or a name or path, which is loaded with `args.model_init_kwargs`
            and in float32 unless they give a dtype.
        args: A configuration with GKDArguments; plain TrainingArguments get the defaults of GKDConfig.
        train_dataset: Rows of `messages`, `prompt` and `completion`, `prompt`, `text`, or `input_ids` and `labels`.
        eval_dataset: The same, or a dictionary of them.
        processing_class: The tokenizer; by default the one beside the student's weights.
        teacher_model: The teacher: a model, a name or a path; or set `args.teacher_model_name_or_path`.
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

    args: Any  # the base's configuration with GKDArguments in front
    model: Any
    train_dataset: Any
    eval_dataset: Any
    _signature_columns: Any

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
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
        teacher_model: PreTrainedModel | str | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[Any], Any] | None = None,
        teacher: Teacher | None = None,
        rollouts: RolloutEngine | None = None,
        **base_kwargs: Any,
    ) -> None:
        base_init: Callable[..., None] = super().__init__
        family = type(self).__mro__
        base_parameters = init_parameters(family[family.index(GKDMixin) + 1 :])
        # A base that takes adapters (TRL's trainers) also loads a student by name; the plain Trainer does neither.
        is_plain_trainer = "peft_config" not in base_parameters
        config: Any = completed_args(args, is_plain_trainer)
        refuse_meaningless(config, compute_loss_func, peft_config)
        if (model is None) == (model_init is None):
            raise GKDConfigError("expected one student: pass model (a model, a name or a path) or model_init")
        trust_remote_code = getattr(config, "trust_remote_code", False)
        teacher = build_teacher(config, teacher, teacher_model, trust_remote_code)
        if teacher.model is not None and teacher.model is model:
            raise GKDTeacherError("teacher and student are the same object: freezing the one would freeze the other")
        if config.seq_kd and not (teacher.model is not None and teacher.model.can_generate()):
            raise GKDTeacherError(
                "seq_kd=True has the teacher generate, which this teacher can't: pass a causal LM that lives in this "
                "process as teacher_model, or set seq_kd=False"
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

        if data_collator is not None and self._prepares_rows:
            data_collator = keeping_labels(data_collator)
        set_seed(config.seed)  # adapters start at random
        if is_plain_trainer:
            if isinstance(model, str):
                model = load_student(model, getattr(config, "model_init_kwargs", None), trust_remote_code)
            if model is not None:
                model = self._adapted(model, config)
            if data_collator is None:
                data_collator = DataCollatorForLanguageModeling(pad_token_id=_pad_token_id(processing_class))
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
        refuse_data_parallel(self.args)
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
        if self.args.disable_dropout:
            disable_dropout(self.model)

        self._meter = TrainingMeter(self.args.device)
        self._eval_meter, self._eval_on_policy_meter = EvaluationMeter(), EvaluationMeter()
        self._row_sums_BK: Tensor | None = None
        self._finite_check = FiniteCheck()
        self._generated: list[Generated] = []
        self._has_trained = False
        self._head_of: tuple[nn.Module, SeparableHead | InseparableHead] | None = None
        self._connect_teacher(teacher)
        self._connect_rollouts(rollouts)
        self._prepare_datasets()

    generalized_jsd_loss = staticmethod(trl_generalized_jsd_loss)

    @property
    def teacher_model(self) -> PreTrainedModel | None:
        """The teacher's model, where it lives in this process."""
        return self.teacher.model

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Return a fresh student from `model_init`, adapted like one that was passed."""
        model = self._adapted(super().call_model_init(trial), self.args)
        if self.args.disable_dropout:
            disable_dropout(model)
        return model

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        # Kept whatever the student's forward is called with: without labels a collator would take all tokens for them.
        columns = self._signature_columns or []
        own = [column for column in ("input_ids", "labels") if column not in columns]
        self._signature_columns = [*columns, *own]

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the loader of an evaluation set, whose rows are prepared if it is given here."""
        # Trainer passes its own set here too, or its name in a dictionary of them: those are prepared.
        is_given = eval_dataset is not None and eval_dataset is not self.eval_dataset
        if is_given and not isinstance(eval_dataset, str):
            eval_dataset = self._prepared(eval_dataset, "eval")
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return the loader of a test set, with its rows prepared."""
        return super().get_test_dataloader(self._prepared(test_dataset, "test"))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """Return the window's batches after their rollouts, and how many tokens are trained on in them.

        The count is over all ranks where `average_tokens_across_devices` is set. It is taken after the rollouts, which
        replace the completions that the data set gave.
        """
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if not batches:
            if not self._has_trained and self.state.global_step == 0:
                raise GKDDataError(
                    "the training set gave no batch: no row of it can be used; the log counts the rows that were "
                    "dropped, by reason"
                )
            return batches, None
        for batch in batches:
            _require_labels(batch)
        if self.args.generates:
            with self._meter.measure("rollout"):
                batches = self._roll_out(batches)
        self._has_trained = True
        self._finite_check.clear()
        return batches, self._count_trained_tokens(batches, device)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward of a micro-batch; at the window's last one, refuse logits that aren't finite."""
        with self._meter.measure("step"):
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

        Args:
            model: The student, wrapped for distribution or not.
            inputs: `input_ids` and `labels` [B, L], and whatever else the forward takes.
            return_outputs: Whether to return the forward's output too, with logits [B, L, V].
            num_items_in_batch: The divisor: the tokens of the window; by default those of this batch.
        """
        _require_labels(inputs)
        batch = TokenBatch.from_inputs(inputs)
        with self._meter.measure("teacher") if model.training else contextlib.nullcontext():
            teacher = self.teacher.score(batch).sliced(self._vocab_size)
        head = self._student_head()
        if return_outputs and isinstance(head, SeparableHead):
            head = InseparableHead("the caller wants logits")
        student, outputs = predict(model, batch, head)
        student = student.sliced(self._vocab_size)
        mixes_ce = self.args.ce_weight > 0 and model.training
        result = token_divergence(
            student,
            teacher,
            beta=self.args.beta,
            temperature=self.args.loss_temperature,
            scale=self.args.divergence_scale,
            labels_N=batch.targets_N if mixes_ce else None,
        )
        rows_N = batch.rows_N
        self._record(batch, rows_N, result, model.training)
        loss_N = result.values_N
        if result.cross_entropy_N is not None:
            # The student's own samples take the divergence alone: their tokens are no targets to reach.
            weight_N = self.args.ce_weight * ~batch.is_on_policy_B[rows_N]
            loss_N = weight_N * result.cross_entropy_N + (1 - weight_N) * loss_N
        loss = loss_N.sum()
        if isinstance(head, SeparableHead):
            # Nothing to train on leaves the sum empty: it stays connected to the weight too, for DDP.
            loss = loss + head.module.weight[:0].sum()
        if num_items_in_batch is None:
            loss = loss / max(1, len(rows_N))
        else:
            loss = loss / torch.as_tensor(num_items_in_batch, device=loss.device).clamp_min(1)
            if self.args.average_tokens_across_devices:
                # DDP averages gradients over ranks, and the divisor is of all ranks already.
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Return the loss of a batch and, unless only that is wanted, full logits [B, L, V] and labels [B, L].

        Rows without a completion are measured on a greedy one of the student.
        """
        inputs = self._prepare_inputs(inputs)
        _require_labels(inputs)
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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does; entries of training get the metrics since the last one."""
        # Trainer calls this on every rank; `learning_rate` tells its own entries from those of a user's callback.
        if "loss" in logs and "learning_rate" in logs:
            logs.update(self._meter.read(lambda sums: self.accelerator.reduce(sums, "sum")))
            self._show_completions()
        super().log(logs, start_time)

    def _connect_teacher(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.teacher.prepare(self.args.device)
        tokenizer = self._tokenizer_or_none
        self._vocab_size = shared_vocabulary_size(
            vocabulary_rows(base_model(self.model)),
            self.teacher.vocab_size,
            None if tokenizer is None else tokenizer.get_vocab(),
            self.teacher.vocabulary,
        )
        self._student_head()  # tells at construction, not in the first step, where full logits are needed

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

    def _prepare_datasets(self) -> None:
        if self.train_dataset is not None:
            self.train_dataset = self._prepared(self.train_dataset, "train", is_training=True)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self._prepared(rows, name) for name, rows in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = self._prepared(self.eval_dataset, "eval")

    def _adapted(self, model: nn.Module, args: Any) -> nn.Module:
        if self._adapter_config is not None:
            model = wrap_in_adapter(model, self._adapter_config)
        if isinstance(model, PeftModel) and args.gradient_checkpointing:
            # Without it no gradient passes a checkpointed layer whose own inputs need none (transformers#42489).
            model.enable_input_require_grads()
        return model

    def _prepared(self, dataset: Any, name: str, is_training: bool = False) -> Any:
        if isinstance(dataset, torch.utils.data.IterableDataset | datasets.IterableDataset):
            # Each rank reads its own share: Accelerate would concatenate batches of unequal length on one rank.
            self.args.accelerator_config.dispatch_batches = False
            self.accelerator.dataloader_config.dispatch_batches = False
        if not self._prepares_rows:
            return dataset
        args = self.args
        rules = RowRules(
            stop_ids=frozenset(self._stop_ids),
            max_length=args.max_length,
            max_new_tokens=args.max_new_tokens,
            train_on=args.train_on,
            is_generating=args.generates or (args.eval_on_policy and not is_training),
            needs_completion=is_training and not (args.is_always_on_policy or args.seq_kd),
            needs_prompt=is_training and args.is_always_on_policy,
            text_field=getattr(args, "dataset_text_field", "text"),
            # Cross-entropy needs its labels among the tokens that are compared.
            vocab_size=(
                self._vocab_size
                if args.ce_weight > 0
                else min(vocabulary_rows(base_model(self.model)), self.teacher.vocab_size)
            ),
        )
        dataset = prepare_dataset(
            dataset,
            self._tokenizer_or_none,
            rules,
            formatting_func=self._formatting_func,
            num_proc=getattr(args, "dataset_num_proc", None),
            name=name,
        )
        if not is_training and self.accelerator.num_processes > 1 and not hasattr(dataset, "__len__"):
            # Without a length, ranks fill up their last batch with samples that would be counted twice.
            dataset = list(dataset)
        packs = getattr(args, "packing", False)
        if not is_training and getattr(args, "eval_packing", None) is not None:
            packs = args.eval_packing
        if packs:
            dataset = pack_dataset(
                dataset.select_columns(["input_ids", "labels"]), args.max_length, args.packing_strategy
            )
        return dataset

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

    def _measure(self, meter: EvaluationMeter, model: nn.Module, inputs: dict[str, Any], **options: bool) -> Any:
        self._row_sums_BK = None
        result = self.compute_loss(model, inputs, **options)
        loss = result[0] if isinstance(result, tuple) else result
        if self._row_sums_BK is not None:  # a subclass may compute a loss of its own: then Trainer's mean stands
            meter.add(self._row_sums_BK, loss, self.accelerator.gather_for_metrics)
        return result

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

    def _completed(self, inputs: dict[str, Any], only_prompts: bool) -> dict[str, Any]:
        if only_prompts and not self._is_true_anywhere(has_prompts_alone(inputs)):
            return inputs
        with self._synced_rollouts() as engine:
            return complete_greedily(inputs, engine, self.args.max_new_tokens, self._pad_token_id, only_prompts)

    def _is_true_anywhere(self, flag: bool) -> bool:
        """Whether the flag is set here or, where ranks have to generate together, on any of them."""
        if not self._is_sharded:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(int(flag), device=self.args.device), "sum") > 0)

    def _count_trained_tokens(self, batches: list[Any], device: torch.device) -> Tensor:
        count = torch.stack([TokenBatch.from_inputs(batch).is_scored_BL.sum() for batch in batches]).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
            # These ranks see the same tokens.
            count = count // (self.get_tp_size() * self.get_cp_size() * self.get_sp_size())
        return count

    def _student_head(self) -> SeparableHead | InseparableHead:
        # Found anew after model_init made another student, and after FSDP wrapped it.
        if self._head_of is None or self._head_of[0] is not self.model:
            if self._is_sharded:
                head: SeparableHead | InseparableHead = InseparableHead("its weights are sharded over ranks")
            elif self.args.torch_compile:
                head = InseparableHead("its forward is compiled as a whole")
            else:
                head = find_head(base_model(self.model))
            if isinstance(head, InseparableHead):
                logger.warning("The student's full logits are built, which takes more memory: %s.", head.reason)
            self._head_of = (self.model, head)
        return self._head_of[1]

    def _record(self, batch: TokenBatch, rows_N: Tensor, result: TokenDivergence, is_training: bool) -> None:
        self._row_sums_BK = sums_by_row(
            rows_N,
            batch.is_on_policy_B,
            divergence_N=result.values_N,
            student_entropy_N=result.student_entropy_N,
            teacher_entropy_N=result.teacher_entropy_N,
            agrees_N=result.agrees_N,
        )
        if is_training:
            self._meter.add_tokens(self._row_sums_BK)
            batch_size = batch.labels_BL.shape[0]
            is_finite_N = result.is_finite_N
            if result.cross_entropy_N is not None:
                is_finite_N = is_finite_N & result.cross_entropy_N.isfinite()
            self._finite_check.add(rows_N, batch_size, result.is_teacher_finite_N, is_finite_N)

    def _show_completions(self) -> None:
        if not (self.args.log_completions and self._generated and self.is_world_process_zero()):
            return
        rows = completion_rows(self._generated[: self.args.num_completions_to_print], self._tokenizer_or_none)
        print_completions(rows, f"Completions at step {self.state.global_step}")
        send_completions(rows, self.state.global_step, self.callback_handler.callbacks)

    def _hf_rollouts(self, stop_ids: list[int], is_sharded: bool) -> HFRollouts:
        tokenizer = self._tokenizer_or_none
        # Heads of equal size are compared with their padding rows, which no token may be sampled from.
        known = self._vocab_size if tokenizer is None else max(tokenizer.get_vocab().values()) + 1
        vocab_size = min(self._vocab_size, known)
        return HFRollouts(stop_ids, self._pad_token_id, vocab_size, self.args.rollout_batch_size, is_sharded)

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
        return _pad_token_id(self.processing_class)


class GKDTrainer(GKDMixin, Trainer):
    """`transformers.Trainer` whose loss is the divergence from a teacher; see GKDMixin for its arguments."""

    def create_model_card(self, *args: Any, dataset_name: str | None = None, **kwargs: Any) -> None:
        """Write the model card as Trainer does; scripts written for TRL call `dataset` `dataset_name`."""
        if dataset_name is not None:
            kwargs["dataset"] = dataset_name
        super().create_model_card(*args, **kwargs)


def _pad_token_id(processing_class: Any) -> int:
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    for name in ("pad_token_id", "eos_token_id"):
        token_id = getattr(tokenizer, name, None)
        if token_id is not None:
            return int(token_id)
    return 0  # masked wherever it stands


def _stop_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """Return every id at which a model's completions end: those of its generation config, and its tokenizer's."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    if getattr(tokenizer, "eos_token_id", None) is not None:
        ids.add(tokenizer.eos_token_id)
    return sorted(ids)


def _require_labels(inputs: Mapping[str, Any]) -> None:
    if "labels" not in inputs or inputs["labels"] is None:
        raise GKDDataError(
            f"the data collator gave no labels, only {', '.join(sorted(inputs))}: return labels [B, L] with the token "
            "ids and -100 where a token is not trained on, or leave data_collator out"
        )
