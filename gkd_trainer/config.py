"""The options of generalised knowledge distillation: GKDArguments, and GKDConfig for the plain Trainer."""

from __future__ import annotations

import dataclasses
import inspect
import json
from dataclasses import dataclass, field
from math import inf
from numbers import Integral, Real
from typing import Any, Self, get_args

from transformers import GenerationConfig, TrainingArguments

from gkd_trainer.errors import GKDConfigError

# What generation_kwargs may not hold, and what to do instead.
_REFUSED_GENERATION_KWARGS = {
    **{
        name: f"set {name} itself, outside generation_kwargs"
        for name in ("temperature", "top_p", "top_k", "min_p", "max_new_tokens", "repetition_penalty")
    },
    **dict.fromkeys(
        ("typical_p", "top_h", "epsilon_cutoff", "eta_cutoff"), "set top_p, top_k or min_p instead, the warpers here"
    ),
    **dict.fromkeys(("max_length", "max_time"), "set max_new_tokens instead"),
    "min_length": "set min_new_tokens instead, which does not count the padding",
    "do_sample": "completions are always sampled; set top_k=1 to take the most probable token",
    **dict.fromkeys(
        ("num_beams", "num_return_sequences", "num_beam_groups", "prompt_lookup_num_tokens", "is_assistant", "use_mtp"),
        "leave it out: each prompt gets one completion, sampled token by token",
    ),
    **dict.fromkeys(
        ("eos_token_id", "stop_strings"),
        "set eos_token_id in the model's generation_config or the tokenizer instead: completions end at any of them",
    ),
    "pad_token_id": "set it in the tokenizer instead",
    "token_healing": "leave it out: the prompt's tokens stay as they are",
    "use_cache": "leave it out: the cache is always on",
    **dict.fromkeys(
        ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states"),
        "leave it out: only token ids are read",
    ),
}

# Fields of vLLM's SamplingParams that are neither options of their own nor fixed by the rollouts.
_VLLM_GENERATION_KWARGS = frozenset({"presence_penalty", "frequency_penalty", "min_tokens", "logit_bias"})

_VLLM_MAX_TEMPERATURE = 2.0

# What a value of each annotated type has to be an instance of, and how an error calls that.
_TYPES: dict[Any, tuple[Any, str]] = {
    float: (Real, "a number"),
    int: (Integral, "a whole number"),
    bool: (bool, "True or False"),
    str: (str, "a string"),
    type(None): (type(None), "None"),
}


def _option(default: Any, help: str, choices: list[str] | None = None, is_secret: bool = False) -> Any:
    metadata: dict[str, Any] = {"help": help}
    if choices is not None:
        metadata["choices"] = choices
    return field(default=default, metadata=metadata, repr=not is_secret)


@dataclass
class GKDArguments:
    """The options that distillation adds to a training configuration.

    Put it in front of the configuration of the trainer that you extend:
    `class MyConfig(GKDArguments, trl.SFTConfig)`. For the plain Trainer that is `GKDConfig`.

    Raises GKDConfigError for values out of range and for combinations that have no meaning.
    """

    lmbda: float = _option(
        0.5,
        "Share λ of the samples that are on-policy, in [0, 1]: 0 trains on the data alone, 1 on the student's own "
        "completions.",
    )
    lmbda_end: float | None = _option(None, "λ at the last step, for lmbda_schedule='linear', in [0, 1].")
    lmbda_schedule: str = _option(
        "constant", "How λ moves from lmbda to lmbda_end over the run.", ["constant", "linear"]
    )
    lmbda_granularity: str = _option(
        "sample",
        "Whether each sample is drawn on-policy by itself, or all samples of an optimizer step together "
        "(Agarwal et al. 2023, algorithm 1).",
        ["sample", "batch"],
    )
    beta: float = _option(
        0.5,
        "Divergence, in [0, 1]: 0 is forward KL(teacher‖student), 1 is reverse KL(student‖teacher), between "
        "is the generalised JSD.",
    )
    divergence: str = _option(
        "jsd",
        "The divergence: 'jsd' is that of beta, the others have no beta: skewed KLs (DistiLLM), total variation, α-β "
        "divergence (ABKD), adaptive KL (AKL).",
        ["jsd", "skew_kl", "skew_reverse_kl", "total_variation", "alpha_beta", "adaptive_kl"],
    )
    divergence_options: dict[str, Any] | str | None = _option(
        None,
        'Options of the divergence where not its defaults, such as {"alpha": 0.1} of the skewed KLs, as a dictionary '
        "or JSON.",
    )
    loss_workspace_mb: float | None = _option(
        None,
        "Memory in MiB (at least 1) that the divergence may take besides hidden states and gradients; by default 256 "
        "on the CPU and 1024 elsewhere.",
    )
    divergence_scale: str = _option(
        "paper",
        "'paper' takes the JSD as published, whose gradient vanishes towards both ends; 'continuous' divides it by "
        "β(1−β) inside (0, 1), with the two KLs as its limits.",
        ["paper", "continuous"],
    )
    loss_temperature: float = _option(
        1.0, "Temperature (> 0) that divides the logits of both models in the divergence."
    )
    ce_weight: float = _option(
        0.0,
        "Weight w in [0, 1] of the cross-entropy of the data's own tokens: w·CE + (1−w)·divergence. On-policy "
        "samples take the divergence alone.",
    )
    seq_kd: bool = _option(
        False,
        "Whether the samples that are not on-policy are generated by the teacher instead of taken from the data.",
    )
    temperature: float = _option(
        1.0, "Sampling temperature (> 0) of the completions; 1 samples the student's own distribution."
    )
    top_p: float = _option(1.0, "Nucleus sampling: keep the most probable tokens up to this mass, in (0, 1].")
    top_k: int = _option(0, "Keep this many of the most probable tokens when sampling; 0 keeps all.")
    min_p: float | None = _option(
        None, "Keep tokens with at least this share of the top token's probability, in [0, 1]."
    )
    repetition_penalty: float = _option(1.0, "Penalty (> 0) on tokens that occurred before; 1 is none.")
    max_new_tokens: int = _option(128, "Longest completion that is generated, in tokens.")
    generation_kwargs: dict[str, Any] | str | None = _option(
        None,
        "Further options of transformers.GenerationConfig for the rollouts (of vLLM's SamplingParams under use_vllm), "
        "as a dictionary or JSON.",
    )
    rollout_batch_size: int | None = _option(
        None,
        "Most prompts that transformers generates for at once; by default all of a call's on this rank. vLLM batches "
        "by itself.",
    )
    rollout_steps: int = _option(
        1,
        "For how many optimizer steps completions are generated at once; those of the last are then rollout_steps − 1 "
        "steps old.",
    )
    rollout_overlap: bool = _option(
        False,
        "Whether the next completions are generated while these are trained on, one call of rollouts older; needs "
        "vllm_mode='server'.",
    )
    use_vllm: bool = _option(False, "Whether vLLM generates the student's completions, instead of transformers.")
    vllm_mode: str = _option(
        "colocate",
        "Whether vLLM runs in the trainer's process, or as one or several servers started by you.",
        ["colocate", "server"],
    )
    vllm_server_base_url: list[str] | str | None = _option(
        None,
        "Where the rollout servers listen, such as http://127.0.0.1:8000; a list, or separated by commas. Prompts are "
        "spread over them.",
    )
    vllm_server_api_token: str | None = _option(
        None, "The API key that the rollout servers were started with.", is_secret=True
    )
    vllm_server_timeout: float = _option(
        240.0,
        "Seconds (> 0) for which a server that can't be reached is tried again, as while it restarts; a teacher's too.",
    )
    vllm_request_timeout: float = _option(
        300.0,
        "Seconds (> 0) within which a server must have answered one request, such as one completion; a teacher's too.",
    )
    vllm_weight_sync: str = _option(
        "auto",
        "How vLLM gets the student's weights: 'full' sends all, adapters merged in; 'adapter' a LoRA adapter alone; "
        "'nccl' all, from GPU to GPU, to a server; 'auto' is 'adapter' for a LoRA student beside its engine on CUDA, "
        "else 'full'.",
        ["auto", "full", "adapter", "nccl"],
    )
    vllm_sync_dir: str | None = _option(
        None,
        "A folder that the trainer and the rollout servers both see, through which weights pass; by default one in "
        "memory (/dev/shm) where all servers are on this machine.",
    )
    vllm_gpu_memory_utilization: float = _option(
        0.3, "Share of a GPU's memory, in (0, 1], for the weights and the KV cache of vllm_mode='colocate'."
    )
    vllm_max_model_length: int | None = _option(
        None, "Most tokens of a prompt and its completion in vllm_mode='colocate'; by default max_length."
    )
    vllm_tensor_parallel_size: int = _option(1, "Over how many ranks one engine of vllm_mode='colocate' is spread.")
    vllm_enable_sleep_mode: bool = _option(
        False, "Whether the engine of vllm_mode='colocate' frees the GPU's memory while the student trains."
    )
    vllm_engine_kwargs: dict[str, Any] | str | None = _option(
        None, "Further arguments of vllm.LLM for vllm_mode='colocate', as a dictionary or JSON."
    )
    max_length: int | None = _option(
        1024,
        "Most tokens of a sequence, prompt and completion together; None is no limit. Longer data completions are cut "
        "at the end; prompts longer than max_length − max_new_tokens are dropped where completions are generated.",
    )
    train_on: str = _option(
        "all_turns",
        "Which assistant turns of a conversation are trained on.",
        ["all_turns", "last_turn"],
    )
    disable_dropout: bool = _option(True, "Whether to switch dropout off in the student.")
    teacher_model_name_or_path: str | None = _option(
        None, "The teacher's name on the hub or its folder, where no teacher is passed to the trainer."
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = _option(
        None,
        "Options of AutoModelForCausalLM.from_pretrained for a teacher given by name, as a dictionary or JSON; "
        "its dtype is the checkpoint's unless given here.",
    )
    teacher_top_k: int | None = _option(
        None,
        "Compare over the teacher's most probable tokens (this many) and one bucket for all others. By default over "
        "the whole vocabulary, and 64 for a teacher behind a server.",
    )
    teacher_tail: str = _option(
        "bucket",
        "What becomes of the tokens outside teacher_top_k: 'bucket' compares their summed probability, 'renormalize' "
        "leaves them out on both sides.",
        ["bucket", "renormalize"],
    )
    teacher_server_base_url: list[str] | str | None = _option(
        None,
        "Where ordinary vLLM servers with the teacher listen, such as http://127.0.0.1:8001; a list, or separated by "
        "commas. Takes the place of a teacher model.",
    )
    teacher_server_api_token: str | None = _option(
        None, "The API key that the teacher's servers were started with.", is_secret=True
    )
    teacher_server_checks: bool = _option(
        True, "Whether the teacher's servers are checked at first contact: tokenizer, scores, reproducibility."
    )
    eval_on_policy: bool = _option(
        False, "Whether evaluate also measures the divergence on fresh greedy completions of the student."
    )
    log_completions: bool = _option(
        False,
        "Whether to print generated completions when logging, and send them to the trackers that are on.",
    )
    num_completions_to_print: int = _option(4, "How many completions log_completions shows.")

    def __post_init__(self) -> None:
        """Parse the JSON fields, check every value and combination, then let the base class do its part."""
        for name in self._json_fields():
            setattr(self, name, _parsed(name, getattr(self, name)))
        for name in self._url_fields():
            setattr(self, name, _listed(name, getattr(self, name)))
        self._check_types()
        self._check_ranges()
        self._check_combinations()
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()

    @property
    def generates(self) -> bool:
        """Whether any sample may be generated during training, by the student or by the teacher."""
        return self.seq_kd or max(self.lmbda, self._last_lmbda) > 0

    @property
    def is_always_on_policy(self) -> bool:
        """Whether every sample of the run is on-policy."""
        return min(self.lmbda, self._last_lmbda) == 1

    @property
    def _last_lmbda(self) -> float:
        return self.lmbda if self.lmbda_end is None else self.lmbda_end

    @classmethod
    def _json_fields(cls) -> tuple[str, ...]:
        return ("divergence_options", "generation_kwargs", "vllm_engine_kwargs", "teacher_model_init_kwargs")

    @staticmethod
    def _url_fields() -> tuple[str, ...]:
        return ("vllm_server_base_url", "teacher_server_base_url")

    def _check_types(self) -> None:
        # The base class checks its own fields, or leaves them to Python.
        for owner in (GKDArguments, GKDConfig):
            hints = inspect.get_annotations(owner, eval_str=True) if isinstance(self, owner) else {}
            for name in hints.keys() - {*self._json_fields(), *self._url_fields()}:
                expected = [_TYPES[hint] for hint in get_args(hints[name]) or (hints[name],)]
                value = getattr(self, name)
                is_valid = any(
                    isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) for kind, _ in expected
                )
                _check(name, repr(value), is_valid, " or ".join(words for _, words in expected))

    def _check_ranges(self) -> None:
        in_unit = "in [0, 1]"
        _check("beta", self.beta, 0 <= self.beta <= 1, f"{in_unit} (0 is forward KL, 1 is reverse KL)")
        _check("lmbda", self.lmbda, 0 <= self.lmbda <= 1, f"{in_unit} (0 is all data, 1 is all student)")
        if self.lmbda_end is not None:
            _check("lmbda_end", self.lmbda_end, 0 <= self.lmbda_end <= 1, in_unit)
        _check("ce_weight", self.ce_weight, 0 <= self.ce_weight <= 1, in_unit)
        finite = "above 0 and finite"
        _check(
            "temperature", self.temperature, 0 < self.temperature < inf, f"{finite} (1 samples the student as it is)"
        )
        _check("loss_temperature", self.loss_temperature, 0 < self.loss_temperature < inf, finite)
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1] (1 keeps every token)")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (keeps every token) or more")
        if self.min_p is not None:
            _check("min_p", self.min_p, 0 <= self.min_p <= 1, in_unit)
        _check(
            "repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < inf, f"{finite} (1 is none)"
        )
        _check("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1")
        if self.rollout_batch_size is not None:
            _check("rollout_batch_size", self.rollout_batch_size, self.rollout_batch_size >= 1, "at least 1")
        if self.loss_workspace_mb is not None:
            _check("loss_workspace_mb", self.loss_workspace_mb, 1 <= self.loss_workspace_mb < inf, "at least 1")
        _check("rollout_steps", self.rollout_steps, self.rollout_steps >= 1, "at least 1")
        for name in ("vllm_server_timeout", "vllm_request_timeout"):
            _check(name, getattr(self, name), 0 < getattr(self, name) < inf, finite)
        _check(
            "vllm_gpu_memory_utilization",
            self.vllm_gpu_memory_utilization,
            0 < self.vllm_gpu_memory_utilization <= 1,
            "in (0, 1]",
        )
        for name in ("vllm_max_model_length", "vllm_tensor_parallel_size", "teacher_top_k"):
            value = getattr(self, name)
            _check(name, value, value is None or value >= 1, "at least 1")
        if self.max_length is not None:
            _check("max_length", self.max_length, self.max_length >= 2, "at least 2 (a prompt and a completion)")
        _check(
            "num_completions_to_print",
            self.num_completions_to_print,
            self.num_completions_to_print >= 1,
            "at least 1",
        )
        for option in dataclasses.fields(GKDArguments):
            choices = option.metadata.get("choices")
            if choices is not None:
                value = getattr(self, option.name)
                _check(option.name, repr(value), value in choices, "one of " + ", ".join(map(repr, choices)))

    def _check_combinations(self) -> None:
        if self.lmbda_schedule == "linear" and self.lmbda_end is None:
            raise GKDConfigError("lmbda_schedule='linear' needs lmbda_end, the λ of the last step; got None")
        if self.lmbda_schedule == "constant" and self.lmbda_end not in (None, self.lmbda):
            raise GKDConfigError(
                f"lmbda_end={self.lmbda_end} has no effect under lmbda_schedule='constant': "
                "set lmbda_schedule='linear', or leave lmbda_end out"
            )
        generates = self.generates or self.eval_on_policy
        if generates and self.max_length is not None and self.max_length <= self.max_new_tokens:
            raise GKDConfigError(
                f"max_length ({self.max_length}) must exceed max_new_tokens ({self.max_new_tokens}), or no prompt "
                "fits: raise max_length or lower max_new_tokens"
            )
        self._check_generation_kwargs()
        self._check_servers()
        # Fields of trl.SFTConfig, where that is the base.
        for name in ("packing", "padding_free", "eval_packing"):
            if generates and getattr(self, name, False):
                raise GKDConfigError(
                    f"{name}=True joins samples into one sequence, from which no completion can be sampled: "
                    f"set {name}=False, or lmbda=0, seq_kd=False and eval_on_policy=False"
                )
        packs = getattr(self, "packing", False) or getattr(self, "eval_packing", False)
        if packs and self.max_length is None:
            raise GKDConfigError("packing fills sequences up to max_length, which is None: set max_length")
        if self.generates and getattr(self, "train_sampling_strategy", None) == "batch_rebalance":
            raise GKDConfigError(
                "train_sampling_strategy='batch_rebalance' makes batches of unequal size, in which a sample has no "
                "fixed position to draw its completion by: use another strategy, or lmbda=0 and seq_kd=False"
            )
        if getattr(self, "completion_only_loss", None) is False:
            raise GKDConfigError(
                "completion_only_loss=False would compare the models on prompts: leave it out, or give rows of `text`, "
                "which are trained on as a whole"
            )

    def _check_servers(self) -> None:
        is_server_mode = self.use_vllm and self.vllm_mode == "server"
        if is_server_mode and not self.vllm_server_base_url:
            raise GKDConfigError(
                "vllm_mode='server' needs vllm_server_base_url, where your vLLM servers listen, such as "
                "http://127.0.0.1:8000; got None (docs/vllm.md says how to start one)"
            )
        if self.vllm_server_base_url and not is_server_mode:
            raise GKDConfigError(
                "vllm_server_base_url has no effect without use_vllm=True and vllm_mode='server': set them, or leave "
                "it out"
            )
        if self.use_vllm and self.temperature > _VLLM_MAX_TEMPERATURE:
            raise GKDConfigError(
                f"temperature must be at most {_VLLM_MAX_TEMPERATURE} where vLLM samples; got {self.temperature}"
            )
        if self.rollout_overlap and not is_server_mode:
            raise GKDConfigError(
                "rollout_overlap=True generates while the student trains, which takes another process: set "
                "use_vllm=True and vllm_mode='server', or leave it out"
            )
        if self.vllm_weight_sync == "nccl" and not is_server_mode:
            raise GKDConfigError(
                "vllm_weight_sync='nccl' sends weights to a server: set vllm_mode='server', or use 'full'"
            )
        if self.teacher_server_base_url and self.teacher_model_name_or_path is not None:
            raise GKDConfigError(
                "got both teacher_server_base_url and teacher_model_name_or_path: the teacher is in one place, set one"
            )
        if self.loss_temperature != 1 and (self.teacher_server_base_url or self.teacher_top_k is not None):
            raise GKDConfigError(
                f"loss_temperature={self.loss_temperature} can't be applied to a teacher's top tokens: their log-probs "
                "are at temperature 1, and how the rest of its distribution would change is not known. Set it to 1, or "
                "use a teacher in this process without teacher_top_k"
            )

    def _check_generation_kwargs(self) -> None:
        assert not isinstance(self.generation_kwargs, str)  # parsed before
        if self.use_vllm:
            for name in self.generation_kwargs or {}:
                if name not in _VLLM_GENERATION_KWARGS:
                    raise GKDConfigError(
                        f"generation_kwargs can't hold {name!r} under use_vllm: it takes "
                        f"{', '.join(sorted(_VLLM_GENERATION_KWARGS))}; what else vLLM samples by are options of their "
                        "own"
                    )
            return
        known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
        for name in self.generation_kwargs or {}:
            if name in _REFUSED_GENERATION_KWARGS:
                raise GKDConfigError(f"generation_kwargs can't hold {name!r}: {_REFUSED_GENERATION_KWARGS[name]}")
            if name not in known:
                raise GKDConfigError(
                    f"generation_kwargs holds {name!r}, which is no option of transformers.GenerationConfig: "
                    "correct its name or leave it out"
                )
        try:
            GenerationConfig(**(self.generation_kwargs or {}))
        except (TypeError, ValueError) as error:
            raise GKDConfigError(f"generation_kwargs is not taken by transformers.GenerationConfig: {error}") from error


@dataclass(repr=False)  # that of TrainingArguments hides every token
class GKDConfig(GKDArguments, TrainingArguments):
    """The configuration of GKDTrainer: GKDArguments on top of transformers.TrainingArguments."""

    model_init_kwargs: dict[str, Any] | str | None = _option(
        None,
        "Options of AutoModelForCausalLM.from_pretrained for a student given by name, as a dictionary or JSON; its "
        "dtype is float32 unless given here.",
    )
    trust_remote_code: bool = _option(
        False, "Whether models and tokenizers loaded by name may run Python code that comes with them."
    )
    dataset_num_proc: int | None = _option(None, "Number of processes that tokenise the data set.")
    dataset_kwargs: dict[str, Any] | str | None = _option(
        None, "{'skip_prepare_dataset': true} leaves the data set as it is, for a collator of your own."
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuse options of trl.SFTConfig that have no meaning here, before Python calls them unexpected."""
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

    @classmethod
    def _json_fields(cls) -> tuple[str, ...]:
        return (*super()._json_fields(), "model_init_kwargs", "dataset_kwargs")


def _check(name: str, value: object, is_valid: bool, expected: str) -> None:
    if not is_valid:
        raise GKDConfigError(f"{name} must be {expected}; got {value}")


def _listed(name: str, value: list[str] | str | None) -> list[str] | None:
    """Return URLs as a list, of which the command line gives one string."""
    urls = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    is_valid = urls is None or (
        isinstance(urls, list)
        and bool(urls)
        and all(isinstance(url, str) and url.startswith(("http://", "https://")) for url in urls)
    )
    _check(name, repr(value), is_valid, "URLs that start with http:// or https://, as a list or separated by commas")
    return urls


def _parsed(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    if value is None or isinstance(value, dict):
        return value
    try:
        parsed = json.loads(value)
    except (TypeError, json.JSONDecodeError) as error:
        raise GKDConfigError(f"{name} must be a dictionary or a JSON object; got {value!r}: {error}") from error
    if not isinstance(parsed, dict):
        raise GKDConfigError(f"{name} must be a dictionary or a JSON object; got {value!r}")
    return parsed
