"""The options of generalised knowledge distillation: GKDArguments, and GKDConfig for the plain Trainer."""

from __future__ import annotations

import dataclasses
import logging
import os
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from transformers import TrainingArguments

from gkd_trainer.config_checks import check_combinations, check_dataset_kwargs, check_room_for_prompts
from gkd_trainer.config_effects import Run
from gkd_trainer.config_values import (
    check_ranges,
    check_types,
    parsed_folders,
    parsed_json,
    parsed_urls,
    set_floats,
)
from gkd_trainer.divergence.objective import DIVERGENCES
from gkd_trainer.divergence.options import PRODUCT_DTYPES, SCALES, TAILS
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.redaction import HidesSecrets, redacted
from gkd_trainer.signals import MODES

logger = logging.getLogger(__name__)


class Unset(int):
    """A default that the user did not choose, so it may give way to a value that fits."""


def _option(default: Any, help: str, choices: list[str] | None = None) -> Any:
    metadata: dict[str, Any] = {"help": help}
    if choices is not None:
        metadata["choices"] = choices
    return field(default=default, metadata=metadata)


@dataclass
class GKDArguments(HidesSecrets):
    """The options that distillation adds to a training configuration.

    Put it before the configuration of the trainer that you extend: `class MyConfig(GKDArguments, trl.SFTConfig)`. For
    the plain Trainer, use `GKDConfig`.

    Raises GKDConfigError for values out of range and for meaningless combinations.
    """

    lmbda: float = _option(
        0.5,
        "Share λ of on-policy samples, in [0, 1]: 0 trains only on the data, 1 only on the student's own completions.",
    )
    lmbda_end: float | None = _option(None, "λ at the last step, in [0, 1], for lmbda_schedule='linear'.")
    lmbda_schedule: str = _option(
        "constant", "How λ changes over the run: 'linear' goes from lmbda to lmbda_end.", ["constant", "linear"]
    )
    lmbda_granularity: str = _option(
        "sample",
        "Whether to draw on- or off-policy for each sample, or once for all samples of an optimizer step (Agarwal et "
        "al. 2023, algorithm 1).",
        ["sample", "batch"],
    )
    beta: float = _option(
        0.5,
        "The β of 'jsd', in [0, 1]: 0 is forward KL(teacher‖student), 1 is reverse KL(student‖teacher), "
        "and values between are generalised JSDs.",
    )
    divergence: str = _option(
        "jsd",
        "The divergence: 'jsd' depends on beta, the others do not: skewed KLs (DistiLLM), total variation, α-β "
        "divergence (ABKD), adaptive KL (AKL).",
        list(DIVERGENCES),
    )
    divergence_options: dict[str, Any] | str | None = _option(
        None,
        'Options of the divergence, such as {"alpha": 0.1} for the skewed KLs, as a dictionary or JSON.',
    )
    loss_workspace_mb: float | None = _option(
        None,
        "Memory in MiB (at least 1) that the divergence may use besides hidden states and gradients; by default 256 "
        "on the CPU, a 24th of the GPU's memory on CUDA (256 to 3072), and 1024 elsewhere.",
    )
    loss_product_dtype: str = _option(
        "auto",
        "Dtype to which the divergence rounds the inputs of its matrix products; logits stay float32. 'auto' is the "
        "dtype of mixed precision or of a half-precision model on CUDA, and 'float32' elsewhere. On a CPU, "
        "'bfloat16' applies only to the products for the gradient. Choose 'float32' for a float32 student late in "
        "training or in self-distillation: rounding makes its gradient wrong where the models nearly agree.",
        ["auto", *PRODUCT_DTYPES],
    )
    divergence_scale: str = _option(
        "paper",
        "'paper' takes the JSD as published, whose gradient vanishes towards both ends of beta; 'continuous' divides "
        "it by β(1−β) inside (0, 1), so that its limits are the two KLs.",
        list(SCALES),
    )
    loss_temperature: float = _option(1.0, "Temperature (> 0) that divides both models' logits in the divergence.")
    ce_weight: float = _option(
        0.0,
        "Weight w in [0, 1] of the cross-entropy on the data's tokens: w·CE + (1−w)·divergence. On-policy samples "
        "use only the divergence.",
    )
    seq_kd: bool = _option(
        False,
        "Whether the teacher generates the completions of off-policy samples, instead of taking them from the data.",
    )
    temperature: float = _option(
        1.0, "Sampling temperature (> 0) of completions; 1 samples the student's own distribution."
    )
    top_p: float = _option(
        1.0, "Nucleus sampling: keep the most probable tokens up to this total probability, in (0, 1]."
    )
    top_k: int = _option(0, "Keep this many of the most probable tokens when sampling; 0 keeps all.")
    min_p: float | None = _option(
        None, "Keep tokens with at least this share of the top token's probability, in [0, 1]."
    )
    repetition_penalty: float = _option(1.0, "Penalty (> 0) on tokens that occurred before; 1 is none.")
    max_new_tokens: int = _option(
        Unset(128),
        "Maximum length of a generated completion, in tokens. If unset, and the default leaves no room for a prompt, "
        "it is half of max_length.",
    )
    generation_kwargs: dict[str, Any] | str | None = _option(
        None,
        "Further options of transformers.GenerationConfig for rollouts (with use_vllm, of vLLM's SamplingParams), as "
        "a dictionary or JSON.",
    )
    rollout_batch_size: int | None = _option(
        None,
        "Maximum number of prompts in one batch of transformers' generation; by default all prompts of a call on "
        "this rank. If padding changes a model's output, only prompts of equal length share a batch. vLLM forms its "
        "own batches.",
    )
    rollout_steps: int = _option(
        1,
        "Number of optimizer steps whose completions are generated in one call; those of the last step are then "
        "rollout_steps − 1 steps old when they are trained on.",
    )
    rollout_overlap: bool = _option(
        False,
        "Whether to generate the next completions while training on the current ones, which makes them one rollout "
        "call older; needs vllm_mode='server'.",
    )
    use_vllm: bool = _option(False, "Whether vLLM generates the student's completions, instead of transformers.")
    vllm_mode: str = _option(
        "colocate",
        "Whether vLLM runs in the trainer's process, or as one or more servers that you start.",
        ["colocate", "server"],
    )
    vllm_server_base_url: list[str] | str | None = _option(
        None,
        "URLs of the rollout servers, such as http://127.0.0.1:8000, as a list or separated by commas. Prompts are "
        "spread over them.",
    )
    vllm_server_api_token: str | None = _option(None, "API key that the rollout servers were started with.")
    vllm_server_timeout: float = _option(
        240.0,
        "Seconds (> 0) to keep trying to reach a rollout or teacher server, such as one that is restarting.",
    )
    vllm_request_timeout: float = _option(
        300.0,
        "Seconds (> 0) that a rollout or teacher server may take to answer one request, such as one completion.",
    )
    vllm_weight_sync: str = _option(
        "auto",
        "How vLLM gets the student's weights: 'full' sends all of them, with adapters merged; 'adapter' sends only a "
        "LoRA adapter; 'nccl' sends all of them to a server, from GPU to GPU; 'auto' is 'adapter' for a LoRA "
        "student with vllm_mode='colocate' on CUDA, else 'full'.",
        ["auto", "full", "adapter", "nccl"],
    )
    vllm_sync_dir: str | None = _option(
        None,
        "Folder through which weights pass, visible to the trainer and the rollout servers; by default one in memory "
        "(/dev/shm), if all servers are on this machine.",
    )
    vllm_gpu_memory_utilization: float = _option(
        0.3, "Share of a GPU's memory, in (0, 1], for the weights and KV cache of vllm_mode='colocate'."
    )
    vllm_max_model_length: int | None = _option(
        None, "Maximum tokens of a prompt and its completion in vllm_mode='colocate'; by default max_length."
    )
    vllm_tensor_parallel_size: int = _option(1, "Number of ranks that share one engine of vllm_mode='colocate'.")
    vllm_enable_sleep_mode: bool = _option(
        False, "Whether the engine of vllm_mode='colocate' frees GPU memory while the student trains."
    )
    vllm_engine_kwargs: dict[str, Any] | str | None = _option(
        None, "Further arguments of vllm.LLM for vllm_mode='colocate', as a dictionary or JSON."
    )
    max_length: int | None = _option(
        1024,
        "Maximum tokens of a sequence, prompt and completion together; None is no limit. Longer completions from the "
        "data are cut at the end; if completions are generated, prompts longer than max_length − max_new_tokens are "
        "dropped. The default is lowered to the context of the student or teacher if that is shorter.",
    )
    train_on: str = _option(
        "all_turns",
        "Which assistant turns of a conversation to train on.",
        ["all_turns", "last_turn"],
    )
    disable_dropout: bool = _option(True, "Whether to switch off dropout in the student.")
    teacher_model_name_or_path: str | None = _option(None, "The teacher: its name on the hub or its folder.")
    self_teacher: str | None = _option(
        None,
        "Use the student itself, which needs an adapter, as the teacher: 'base' is its model with the adapter off, "
        "'ema' the average of the adapter over the optimizer steps, any other name another adapter of the student.",
    )
    self_teacher_ema_decay: float = _option(
        0.99, "Share of the old average, in [0, 1), that each optimizer step keeps under self_teacher='ema'."
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = _option(
        None,
        "Options of from_pretrained for a teacher given by name, as a dictionary or JSON; the "
        "dtype is the checkpoint's unless given here.",
    )
    teacher_top_k: int | None = _option(
        None,
        "Compare over this many of the teacher's most probable tokens, and one bucket for all others. By default "
        "over the whole vocabulary, and over 20 tokens for servers that send top tokens.",
    )
    teacher_tail: str = _option(
        "bucket",
        "What happens to the tokens outside teacher_top_k: 'bucket' compares their summed probability, 'renormalize' "
        "leaves them out on both sides.",
        list(TAILS),
    )
    teachers: dict[str, Any] | str | None = _option(
        None,
        "Several teachers: for each, a name of your own and its name on the hub or its folder, such as "
        '{"math": "my/math", "code": "my/code"}, as a dictionary or JSON. They replace a single teacher.',
    )
    teacher_column: str = _option(
        "teacher", "The column with the name of each row's teacher, one of those in teachers."
    )
    teacher_weights: dict[str, Any] | str | None = _option(
        None,
        'Weights (> 0) of teachers by name, such as {"math": 2, "code": 1}, as a dictionary or JSON. Then all '
        "teachers score every sample, instead of one per row, and their divergences are averaged by weight.",
    )
    teacher_offload: bool = _option(
        False,
        "Keep the teacher's weights in the CPU's memory, pinned on CUDA, except while it scores a batch. Of several "
        "teachers, only the one that scores is on the device.",
    )
    teacher_server_base_url: list[str] | str | None = _option(
        None,
        "URLs of ordinary vLLM servers of the teacher, such as http://127.0.0.1:8001, as a list or separated by "
        "commas. They replace a teacher model.",
    )
    teacher_server_model: str | None = _option(
        None,
        "The name under which the teacher's servers serve it, such as that of a LoRA adapter. Required if they serve "
        "several models; by default the only one.",
    )
    teacher_server_signal: str = _option(
        "top_k",
        "What the teacher's servers send: 'top_k' is the log-probs of its most probable tokens; 'hidden_states' is its "
        "final hidden states. With the head of teacher_model_name_or_path, the checkpoint that is served, these give "
        "the full distribution.",
        ["top_k", "hidden_states"],
    )
    teacher_server_dtype: str = _option(
        "auto",
        "The dtype in which hidden states are sent; 'auto' is the narrowest that holds them exactly.",
        ["auto", "float32", "bfloat16", "float16", "fp8_e4m3", "fp8_e5m2"],
    )
    teacher_server_api_token: str | None = _option(None, "API key that the teacher's servers were started with.")
    teacher_server_checks: bool = _option(
        True, "Whether to check the teacher's servers at first contact: tokenizer, scores, reproducibility."
    )
    teacher_vocabulary_mode: str = _option(
        "same",
        "'same' refuses a teacher with another tokenizer; the others compare it wherever both begin a token at the "
        "same byte: 'matched' over the tokens with the same bytes and one bucket for all others, 'next_byte' over the "
        "next byte, 'uld' and 'gold' over sorted probabilities.",
        ["same", *MODES],
    )
    teacher_min_matched_mass: float = _option(
        0.9,
        "Under teacher_vocabulary_mode='matched': where the teacher gives the tokens with the same bytes less than "
        "this probability, in [0, 1], the next byte is compared instead.",
    )
    teacher_tokenizer_name_or_path: str | None = _option(
        None,
        "The teacher's tokenizer, under a teacher_vocabulary_mode other than 'same'; by default the one stored with "
        "the teacher. Required for a teacher behind a server.",
    )
    teacher_cache_dir: list[str] | str | None = _option(
        None,
        "Folder of the teacher's predictions for the data, from `gkd-trainer cache`, or a list of folders. They "
        "replace a teacher model; unless teacher_cache_miss='teacher', needs lmbda=0, seq_kd=False and "
        "eval_on_policy=False.",
    )
    teacher_cache_miss: str = _option(
        "error",
        "What happens to a row that teacher_cache_dir lacks: 'error' ends the run, 'teacher' has the teacher score "
        "it. The teacher must then be given too.",
        ["error", "teacher"],
    )
    eval_on_policy: bool = _option(
        False, "Whether evaluation also measures the divergence on new greedy completions by the student."
    )
    log_completions: bool = _option(
        False,
        "Whether to print generated completions when logging, and send them to the enabled trackers.",
    )
    num_completions_to_print: int = _option(4, "Number of completions that log_completions shows.")
    report_samples: int = _option(
        0,
        "Number of samples per log entry, with their text, that _report.jsonl in output_dir keeps token by token for "
        "`gkd-trainer report`; 0 keeps nothing.",
    )

    def __post_init__(self) -> None:
        """Parse JSON, URLs and folders, check every value and combination, then run the base class's own checks."""
        for name in ("teacher_model_name_or_path", "teacher_tokenizer_name_or_path", "vllm_sync_dir"):
            if isinstance(path := getattr(self, name), os.PathLike):
                setattr(self, name, os.fspath(path))
        for name in self._json_fields():
            setattr(self, name, parsed_json(name, getattr(self, name)))
        for name in self._url_fields():
            setattr(self, name, parsed_urls(name, getattr(self, name)))
        self.teacher_cache_dir = parsed_folders("teacher_cache_dir", self.teacher_cache_dir)
        # The base class checks its own fields, or leaves them to Python.
        for owner in (GKDArguments, GKDConfig):
            if isinstance(self, owner):
                check_types(self, owner, {*self._json_fields(), *self._url_fields(), "teacher_cache_dir"})
        check_ranges(self, dataclasses.fields(GKDArguments))
        self._fit_max_new_tokens(is_set=not isinstance(self.max_new_tokens, Unset))
        check_combinations(Run(self))
        set_floats(self, GKDArguments)  # after the checks, which show what was given
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()

    def to_dict(self) -> dict[str, Any]:
        """Return all options and their values, without secrets, for JSON and trackers."""
        parent = getattr(super(), "to_dict", None)
        values = vars(self) if parent is None else parent()
        plain = {name: _plain(values[name]) for name in self._json_fields()}
        if isinstance(values.get("logging_steps"), Unset):  # in JSON it would look chosen
            plain["logging_steps"] = None
        return {name: redacted(value, name) for name, value in {**values, **plain}.items()}

    @property
    def generates(self) -> bool:
        """Whether any sample may be generated during training, by the student or by the teacher."""
        return self.seq_kd or max(self.lmbda, self._last_lmbda) > 0

    @property
    def generates_anywhere(self) -> bool:
        """Whether any completion may be generated, in training or for eval_on_policy."""
        return self.generates or self.eval_on_policy

    @property
    def is_always_on_policy(self) -> bool:
        """Whether every sample of the run is on-policy."""
        return min(self.lmbda, self._last_lmbda) == 1

    @property
    def draws_samples(self) -> bool:
        """Whether some samples of the run may be on-policy and others off-policy."""
        return max(self.lmbda, self._last_lmbda) > 0 and not self.is_always_on_policy

    @property
    def uses_vllm_server(self) -> bool:
        """Whether vLLM servers generate the student's completions."""
        return self.use_vllm and self.vllm_mode == "server"

    def shorten(self, max_length: int) -> None:
        """Lower max_length, and with it max_new_tokens if that is at its default and no longer fits.

        Raises GKDConfigError if any other max_new_tokens leaves no room for a prompt.
        """
        self.max_length = max_length
        is_default = self.max_new_tokens == GKDArguments.max_new_tokens
        self._fit_max_new_tokens(is_set=not (is_default or isinstance(self.max_new_tokens, Unset)))
        check_room_for_prompts(self)

    def _fit_max_new_tokens(self, is_set: bool) -> None:
        if is_set:
            return
        default, length = int(GKDArguments.max_new_tokens), self.max_length
        self.max_new_tokens = Unset(default)
        if length is not None and length <= default and self.generates_anywhere:
            self.max_new_tokens = Unset(length // 2)
            logger.warning(
                "max_new_tokens is %d, half of max_length=%d, since its default of %d would leave no room for a "
                "prompt: set max_new_tokens to choose another value.",
                self.max_new_tokens,
                length,
                default,
            )

    @property
    def _last_lmbda(self) -> float:
        return self.lmbda if self.lmbda_end is None else self.lmbda_end

    @classmethod
    def _json_fields(cls) -> tuple[str, ...]:
        return (
            "divergence_options",
            "generation_kwargs",
            "vllm_engine_kwargs",
            "teacher_model_init_kwargs",
            "teachers",
            "teacher_weights",
        )

    @staticmethod
    def _url_fields() -> tuple[str, ...]:
        return ("vllm_server_base_url", "teacher_server_base_url")


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold: a quantisation's configuration as a dictionary, a dtype as its name."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "to_dict"):
        return _plain(value.to_dict())
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


@dataclass
class GKDConfig(GKDArguments, TrainingArguments):
    """The configuration of GKDTrainer: GKDArguments on top of transformers.TrainingArguments."""

    model_init_kwargs: dict[str, Any] | str | None = _option(
        None,
        "Options of from_pretrained for a student given by name, as a dictionary or JSON; the "
        "dtype is float32 unless given here.",
    )
    trust_remote_code: bool = _option(
        False, "Whether models and tokenizers loaded by name may run Python code that comes with them."
    )
    dataset_num_proc: int | None = _option(None, "Number of processes that tokenise the dataset.")
    logging_steps: float = _option(
        Unset(TrainingArguments.logging_steps),
        "Optimizer steps between log entries, or, below 1, their share of the run. By default a tenth of the run, "
        "and at most 500 steps.",
    )
    logging_nan_inf_filter: bool = _option(
        False,
        "Whether Trainer leaves non-finite losses out of its log, for which it waits for the device in every "
        "micro-batch. Divergences that are not finite raise GKDNumericsError in any case.",
    )
    dataset_kwargs: dict[str, Any] | str | None = _option(
        None,
        '{"skip_prepare_dataset": true} leaves the dataset as it is: rows of input_ids, or any for a collator of your '
        "own; a dictionary or JSON.",
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuse options of trl.SFTConfig with a remedy, before Python calls them unexpected."""
        unknown = kwargs.keys() - {option.name for option in dataclasses.fields(cls)}
        if unknown:
            from trl import SFTConfig

            sft_only = sorted(unknown & {option.name for option in dataclasses.fields(SFTConfig)})
            if sft_only:
                raise GKDConfigError(
                    f"{', '.join(sft_only)}: options of trl.SFTConfig, which GKDConfig does not have. To use them, "
                    "derive `class MyConfig(GKDArguments, trl.SFTConfig)` and "
                    "`class MySFT(GKDMixin, trl.SFTTrainer)`"
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check as GKDArguments does, and keep logging_steps unset if the user did not set it, or set it to None."""
        unset = Unset(TrainingArguments.logging_steps)
        is_unset = self.logging_steps is None or isinstance(self.logging_steps, Unset)
        if is_unset:
            self.logging_steps = unset
        super().__post_init__()
        check_dataset_kwargs(self.dataset_kwargs)
        if is_unset:  # TrainingArguments turns it into a plain number
            self.logging_steps = unset

    @classmethod
    def _json_fields(cls) -> tuple[str, ...]:
        return (*super()._json_fields(), "model_init_kwargs", "dataset_kwargs")
