"""Rollouts by vLLM servers, which get the student's weights before they generate."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from gkd_trainer.batch import Completion, Sampling
from gkd_trainer.errors import GKDConfigError, GKDServerError
from gkd_trainer.rollouts.base import RolloutEngine
from gkd_trainer.rollouts.vllm_sampling import check_lengths, parse_completion, sampling_fields
from gkd_trainer.rollouts.vllm_sync import TRIES, AdapterSync, FullSync, WeightSync, shared_folder
from gkd_trainer.serving import RequestRefusedError, VLLMServer, spread

logger = logging.getLogger(__name__)


class VLLMServerRollouts(RolloutEngine):
    """Completions by vLLM's OpenAI-compatible servers, over which prompts are spread.

    Weights pass through a folder that both sides see, and are read by each server whole ("full", which needs
    VLLM_SERVER_DEV_MODE=1 there) or as a LoRA adapter ("adapter", which needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and
    `--enable-lora`), or from GPU to GPU ("nccl": see rollouts/vllm_nccl.py). Each server says before and after it
    generates which weights it holds: one that was restarted gets them again, and completions of other weights are
    thrown away.

    Args:
        base_url: Where the servers listen.
        stop_ids: A completion ends with the first of these tokens.
        vocab_size: Tokens from this id on are never sampled (padding rows of the head).
        api_token: The key that they were started with, if any.
        server_timeout: Seconds for which a server that can't be reached is tried again.
        request_timeout: Seconds within which a request must be answered.
        weight_sync: "full", "adapter" or "nccl"; "auto" is "full".
        sync_dir: The folder that both sides see; None for one in memory where all servers are on this machine.
        max_length: The longest prompt with its completion that is to come, in tokens; None is unknown.
        rank: Which of several ranks this is. Each talks to the servers by itself; rank 0 hands out the weights.

    Raises:
        GKDConfigError: An argument that has no meaning, or a server that was not started for this.
        GKDServerError: A server that can't be reached.
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        stop_ids: Sequence[int],
        vocab_size: int,
        *,
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
        self._vocab_size = vocab_size
        self._rank = rank
        # Before the first contact, which may take long.
        folder = shared_folder(sync_dir, urls) if rank == 0 and weight_sync != "nccl" else None
        served = spread(self._servers, self._servers, lambda server, _: server.get("/v1/models", _served_model))
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
        if weight_sync == "nccl":
            from gkd_trainer.rollouts.vllm_nccl import NCCLSync

            self._sync: WeightSync = NCCLSync(self._servers)
        else:
            self._sync = (AdapterSync if weight_sync == "adapter" else FullSync)(self._servers, folder)

    def sync(self, model: nn.Module) -> None:
        """Hand the servers the weights that the student has now; all ranks have to call it."""
        if self._rank == 0:
            self._sync.send(model)
        else:
            self._sync.follow(model)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Completion]:
        """Return one completion per prompt; see RolloutEngine."""
        check_lengths(prompts, sampling, self._max_model_length)
        if not prompts:
            return []
        # Rows of the head beyond the tokens: the server does not say how many it has, and ignores what it lacks.
        fields = sampling_fields(sampling, self._stop_ids, self._sync.padding_ids(self._vocab_size))
        fields |= {"return_token_ids": True, "add_special_tokens": False, "stream": False}

        def complete(server: VLLMServer, job: tuple[Sequence[int], int]) -> Completion:
            prompt, seed = job
            body = {**fields, "model": self._sync.model_name or self._model_name, "prompt": list(prompt), "seed": seed}
            return server.post(
                "/v1/completions",
                body,
                lambda answer: parse_completion(
                    answer["choices"][0]["token_ids"],
                    answer["choices"][0]["finish_reason"],
                    sampling,
                    self._stop_ids,
                    self._vocab_size,
                ),
            )

        jobs = list(zip(prompts, seeds, strict=True))
        for _ in range(TRIES):
            self._restore_lost()
            interruptions = self._interruptions()
            error: GKDServerError | None = None
            completions: list[Completion] = []
            try:
                completions = spread(self._servers, jobs, complete, first=self._rank)
            except RequestRefusedError as failure:
                error = failure  # as by a server that lost the adapter, whose name it does not know
            lost = [server.base_url for server in self._servers if not self._sync.is_held_by(server)]
            if not lost and error is not None:
                raise error
            # A server that was started anew meanwhile may have been given the weights again by another rank.
            if not lost and self._interruptions() == interruptions:
                return completions
            urls = ", ".join(lost or [server.base_url for server in self._servers])
            logger.warning("%s lost the student's weights; this window is generated again", urls)
        raise GKDServerError(
            f"the vLLM servers {urls} lost the student's weights {TRIES} times while they generated one window: they "
            "restart, or somebody else sends them weights. Look at their logs"
        )

    def _interruptions(self) -> int:
        return sum(server.interruptions for server in self._servers)

    def _restore_lost(self) -> None:
        for server in self._servers:
            if not self._sync.is_held_by(server):
                self._sync.restore(server)


def _served_model(answer: Any) -> tuple[str, int]:
    card = answer["data"][0]
    return str(card["id"]), int(card["max_model_len"])
