"""Rollouts by vLLM servers, which get the student's weights before generating."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import nn

from gkd_trainer.errors import GKDConfigError, GKDServerError
from gkd_trainer.rollouts.base import RolloutEngine
from gkd_trainer.rollouts.media import refuse_media
from gkd_trainer.rollouts.vllm_sampling import (
    ASKED_PROMPTS,
    asking_for_log_probs,
    check_lengths,
    excess_of_biases,
    parse_completion,
    sampling_fields,
)
from gkd_trainer.rollouts.vllm_sync import TRIES, AdapterSync, FullSync, WeightSync, shared_folder
from gkd_trainer.types import Completion, PromptMedia, Sampling
from gkd_trainer.vllm_answers import CompletionAnswer, Models, ServerInfo
from gkd_trainer.vllm_client import RequestRefusedError, VLLMServer, call_each

logger = logging.getLogger(__name__)

# Tokens as ids also among the log-probs, where text would only take time.
_ANSWER_FORM = {
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "add_special_tokens": False,
    "stream": False,
}


class VLLMServerRollouts(RolloutEngine):
    """Completions by vLLM's OpenAI-compatible servers, which share the prompts.

    Weights pass through a folder that both sides see, from which each server loads all of them ("full", needs
    VLLM_SERVER_DEV_MODE=1 there) or a LoRA adapter ("adapter", needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and
    `--enable-lora`), or from GPU to GPU ("nccl": see rollouts/vllm_nccl.py). Before and after generating, each server
    is asked for the version of its weights: one that restarted gets them again, and generates its completions again.

    Args:
        base_url: URLs of the servers.
        stop_ids: A completion ends with the first of these tokens.
        vocab_size: Ids of this value or above, which only pad the head, are never sampled.
        never_sampled: Ids below it that are not either, such as that of an image.
        api_token: The key that they were started with, if any.
        server_timeout: Seconds to keep trying to reach a server.
        request_timeout: Seconds within which a request must be answered.
        weight_sync: "full", "adapter" or "nccl"; "auto" is "full".
        sync_dir: The folder that both sides see; None for one in memory, if all servers are on this machine.
        max_length: The longest prompt with its completion to expect, in tokens; None if unknown.
        rank: The rank of this process. Each rank talks to the servers itself; rank 0 sends the weights.

    Raises:
        GKDConfigError: A meaningless argument, or a server that was not started for this.
        GKDServerError: A server that can't be reached.
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        stop_ids: Sequence[int],
        vocab_size: int,
        *,
        never_sampled: Collection[int] = (),
        api_token: str | None = None,
        server_timeout: float = 240.0,
        request_timeout: float = 300.0,
        weight_sync: str = "auto",
        sync_dir: str | None = None,
        max_length: int | None = None,
        rank: int = 0,
    ) -> None:
        urls = [base_url] if isinstance(base_url, str) else list(base_url)
        self._servers = [
            VLLMServer(url, api_token=api_token, server_timeout=server_timeout, request_timeout=request_timeout)
            for url in urls
        ]
        self._stop_ids = sorted(set(stop_ids))
        self._vocab_size, self._never_sampled = vocab_size, sorted(never_sampled)
        self._rank, self._takes_any_biases = rank, False
        shown = [server.base_url for server in self._servers]
        # Checked before the first contact, which may take long.
        folder = shared_folder(sync_dir, shown) if rank == 0 and weight_sync != "nccl" else None
        served = call_each(self._servers, self._servers, lambda server, _: server.get("/v1/models", _served_model))
        self._model_name = served[0][0]
        if {name for name, _ in served} != {self._model_name}:
            raise GKDConfigError(
                f"the rollout servers must all serve the student under one name; got {', '.join(n for n, _ in served)}"
            )
        self._max_model_length = min(length for _, length in served)
        if max_length is not None and max_length > self._max_model_length:
            raise GKDConfigError(
                f"the rollout servers take at most {self._max_model_length} tokens, but max_length is {max_length}: "
                f"start them with --max-model-len {max_length} or more, or lower max_length"
            )
        self._tells_log_probs = self._are_log_probs_raw()
        if weight_sync == "nccl":
            from gkd_trainer.rollouts.vllm_nccl import NCCLSync

            self._sync: WeightSync = NCCLSync(self._servers)
        else:
            self._sync = (AdapterSync if weight_sync == "adapter" else FullSync)(self._servers, folder)

    def _refuse_or_warn(self, excess: str) -> None:
        """Raise GKDConfigError if a server's model runner does not take so many biases; warn once if that is unknown.

        The runner V1 takes any number.
        """
        if self._takes_any_biases:
            return
        uses_v2 = call_each(self._servers, self._servers, lambda server, _: _uses_runner_v2(server))
        for server, is_v2 in zip(self._servers, uses_v2, strict=True):
            if is_v2:
                raise GKDConfigError(f"{excess}. The server at {server.base_url} has VLLM_USE_V2_MODEL_RUNNER=1")
        if None in uses_v2:
            logger.warning("Unless they use another, the vLLM servers end at the next request: %s.", excess)
        self._takes_any_biases = True

    def sync(self, model: nn.Module) -> None:
        """Send the servers the student's current weights; all ranks must call it."""
        if self._rank == 0:
            self._sync.send(model)
        else:
            self._sync.assist(model)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        media: Sequence[PromptMedia | None] | None = None,
    ) -> list[Completion]:
        """Return one completion per prompt; see RolloutEngine."""
        refuse_media(media)
        check_lengths(prompts, sampling, self._max_model_length)
        if not prompts:
            return []
        # The server must have as many rows in its head as the student's: vLLM refuses a bias for an id that it lacks.
        never_ids = [*self._never_sampled, *self._sync.padding_ids(self._vocab_size)]
        fields = sampling_fields(sampling, self._stop_ids, never_ids)
        if excess := excess_of_biases(len(fields.get("logit_bias", ()))):
            self._refuse_or_warn(excess)
        fields |= _ANSWER_FORM

        def parse(answer: object) -> Completion:
            choice = CompletionAnswer.parse(answer).choices[0]
            log_probs = None if choice.logprobs is None else choice.logprobs.token_logprobs
            return parse_completion(
                choice.token_ids, choice.finish_reason, sampling, self._stop_ids, self._vocab_size, log_probs
            )

        # At least one of each server.
        asked = max(ASKED_PROMPTS, len(self._servers)) if self._tells_log_probs else 0
        asking = asking_for_log_probs(fields)
        bodies = [
            {**(asking if index < asked else fields), "prompt": list(prompt), "seed": seed}
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        completions: dict[int, Completion] = {}
        for _ in range(TRIES):
            missing = [index for index in range(len(bodies)) if index not in completions]
            made, lost = self._complete([bodies[index] for index in missing], parse)
            completions |= {index: each for index, each in zip(missing, made, strict=True) if each is not None}
            if len(completions) == len(bodies):
                return [completions[index] for index in range(len(bodies))]
            again = f"{len(bodies) - len(completions)} of {len(bodies)} completions are generated again"
            logger.warning("%s lost the student's weights; %s", lost, again)
        raise GKDServerError(
            f"the vLLM servers {lost} lost the student's weights {TRIES} times while they generated one window: they "
            "restarted, or another run also sends them weights. Look at their logs"
        )

    def _complete(
        self, bodies: Sequence[dict[str, Any]], parse: Callable[[object], Completion]
    ) -> tuple[list[Completion | None], str]:
        """Return completions by the current weights, None where a server lost them, and the URLs of such servers."""
        versions = {server: self._restored_version(server) for server in self._servers}

        def complete(server: VLLMServer, body: dict[str, Any]) -> tuple[VLLMServer, Completion | None]:
            body = {**body, "model": self._sync.model_name or self._model_name}
            try:
                return server, server.post("/v1/completions", body, parse)
            except RequestRefusedError:
                # A server that lost the adapter does not know its name.
                if self._sync.confirmed_version(server) != versions[server]:
                    return server, None
                # Another rank may have restored it meanwhile: then the request is accepted now.
                return server, server.post("/v1/completions", body, parse)

        answers = call_each(self._servers, bodies, complete, first=self._rank)
        # An unchanged version proves that the server had the weights all the time, even if connections failed.
        changed = {server for server in self._servers if self._sync.confirmed_version(server) != versions[server]}
        made = [None if server in changed else completion for server, completion in answers]
        lost = [server for server in self._servers if server in changed or (server, None) in answers]
        return made, ", ".join(server.base_url for server in lost)

    def close(self) -> None:
        """Remove the weights' folder, and close the connections to the servers."""
        self._sync.close()
        for server in self._servers:
            server.close()

    def _are_log_probs_raw(self) -> bool:
        """Return whether all servers tell the log-probs that their model computes, not those after restrictions.

        `--logprobs-mode` decides, which only servers in development mode would name. So each is asked for the most
        probable token alone: its raw log-prob is below 0 and at least that of a uniform distribution. Restricted to
        that token it is 0, and logits are hardly ever in between.
        """
        restricted = {"max_tokens": 1, "temperature": 1.0, "top_k": 1, "seed": 0, "ignore_eos": True, "logprobs": 0}
        body = {**restricted, **_ANSWER_FORM, "model": self._model_name, "prompt": [0]}

        def is_raw(answer: object) -> bool:
            found = CompletionAnswer.parse(answer).choices[0].logprobs
            values = [] if found is None else found.token_logprobs
            # The server may pad the vocabulary.
            return len(values) == 1 and values[0] is not None and -math.log(2 * self._vocab_size) < values[0] < 0

        def asked(server: VLLMServer, _: object) -> bool:
            try:
                return server.post("/v1/completions", body, is_raw)
            except RequestRefusedError:
                return False

        if all(call_each(self._servers, self._servers, asked)):
            return True
        logger.warning(
            "A vLLM server does not tell the log-probabilities that its model computes (start it without "
            "--logprobs-mode): whether it computes the student is not checked."
        )
        return False

    def _restored_version(self, server: VLLMServer) -> str:
        for _ in range(TRIES):
            version = self._sync.confirmed_version(server)
            if version is not None:
                return version
            self._sync.restore(server)
        raise GKDServerError(
            f"the vLLM server at {server.base_url} lost the student's weights {TRIES} times before it generated: it "
            "restarted, or another run also sends it weights. Look at its log"
        )


def _served_model(answer: object) -> tuple[str, int]:
    lengths = Models.parse(answer).lengths()
    return next(iter(lengths.items()))


def _uses_runner_v2(server: VLLMServer) -> bool | None:
    """Return whether a server was told to use vLLM's model runner V2; None if it does not say."""
    try:
        environment = server.get("/server_info?config_format=json", ServerInfo.parse).environment
    except RequestRefusedError:  # only in its development mode, which adapters do without
        return None
    return None if environment is None else environment.uses_runner_v2
