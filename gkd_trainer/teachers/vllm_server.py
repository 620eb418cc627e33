"""A teacher behind one or more vLLM servers.

Shapes: B batch, L length, N tokens trained on, V vocabulary, K top tokens, P scored positions of one sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gkd_trainer.errors import GKDConfigError, GKDServerError, GKDTeacherError
from gkd_trainer.signals import TopKSignal
from gkd_trainer.teachers.base import Teacher
from gkd_trainer.teachers.prompt_scores import (
    NotLogProbsError,
    TokenSequence,
    TopScores,
    Witness,
    check_mass,
    fully_scored,
    parse_scores,
    sequences_of,
    total_variation,
)
from gkd_trainer.teachers.served import NOISE, TeacherServers
from gkd_trainer.transfer import to_device
from gkd_trainer.types import TokenBatch
from gkd_trainer.vllm_answers import CompletionAnswer
from gkd_trainer.vllm_client import VLLMServer

# A missing field would be filled from the served model's generation_config.
_NEUTRAL_GREEDY = {
    "max_tokens": 1,
    "temperature": 0,
    "top_p": 1,
    "top_k": 0,
    "min_p": 0,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}


class VLLMServerTeacher(Teacher):
    """A model served by vLLM; it gives its top tokens at temperature 1, whatever its sampling defaults.

    Its tokenizer must be the student's. A server is identified by its scores of a fixed text, which goes with every
    request: a server that comes back with another model is noticed at its first answer.

    Args:
        base_url: The URL of a server, such as "http://127.0.0.1:8000", or of several; all must serve the same model,
            and each scores its share of a batch.
        top_k: How many tokens of each distribution to ask for. vLLM gives up to 20 unless it was started with a
            larger `--max-logprobs`.
        model: The name under which the model is served, such as that of a LoRA adapter; by default the only model that
            the server lists.
        api_token: The key that the servers were started with (`--api-key`), if any.
        server_timeout: Seconds to keep trying to reach a server; after `prepare`, to reach any of several.
        request_timeout: Seconds within which one request must be answered in full.
        checks: Whether `prepare` compares the server's tokenizer with the student's, its greedy token with its scores,
            and its scores with those of a second request and with `local_copy`'s.
        local_copy: The teacher's model in this process, in the server's dtype; `prepare` compares the server with it,
            then drops it. The mean total variation of their distributions may be 0.01 in float32 and 0.1 in other
            dtypes.

    vLLM decodes the candidates to text, which is not used here. A server started with `--skip-tokenizer-init` skips
    that, but then has no tokenizer to compare.
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        *,
        top_k: int = 20,
        model: str | None = None,
        api_token: str | None = None,
        server_timeout: float = 240.0,
        request_timeout: float = 300.0,
        checks: bool = True,
        local_copy: PreTrainedModel | None = None,
    ) -> None:
        if top_k < 1:
            raise GKDConfigError(f"the teacher's top_k must be at least 1; got {top_k}")
        if local_copy is not None and not checks:
            raise GKDConfigError("local_copy needs the start-up checks, which checks=False disables: leave one out")
        self._servers = TeacherServers(
            base_url,
            model=model,
            api_token=api_token,
            server_timeout=server_timeout,
            request_timeout=request_timeout,
            unsent=-1,  # it must also generate a token
        )
        self._top_k, self._checks, self._local_copy = top_k, checks, local_copy
        self._vocabulary: Mapping[str, int] | None = None
        self._witness: TokenSequence | None = None
        self._record: TopScores | None = None

    def score(self, batch: TokenBatch) -> TopKSignal:
        """Return the top tokens at the batch's scored positions, most probable first.

        Packed sequences, whose `position_ids` start again, are scored one by one.

        Raises:
            GKDServerError: A server gave no valid answer after all retries, or now serves another model.
            GKDTeacherError: A sequence is longer than a server takes.
            GKDDataError: A token trained on has no distribution: padding, or the first of a sequence.
        """
        answers = self._servers.score_each(sequences_of(batch), self._score)
        assert self._vocabulary is not None  # or `score_each` had raised
        nothing = TopScores(np.empty((0, self._top_k), np.int64), np.empty((0, self._top_k)))
        scores = [nothing, *answers]
        device = batch.labels_BL.device
        ids_NK = np.concatenate([each.ids_PK for each in scores])
        known = max(self._vocabulary.values())
        return TopKSignal(
            ids_NK=to_device(torch.from_numpy(ids_NK), device),
            log_p_NK=to_device(torch.from_numpy(np.concatenate([each.log_p_PK for each in scores])).float(), device),
            vocab_size=int(ids_NK.max(initial=known)) + 1,
        )

    @property
    def base_urls(self) -> list[str]:
        """The URLs of its servers."""
        return self._servers.base_urls

    @property
    def model_name(self) -> str | None:
        """The name under which the model is served; None if not given and before `prepare`."""
        return self._servers.model_name

    @property
    def vocab_size(self) -> None:
        """None: a server does not report the size of its head."""

    @property
    def top_k(self) -> int:
        """How many tokens of each distribution to ask for."""
        return self._top_k

    @property
    def vocabulary(self) -> Mapping[str, int] | None:
        """The id of each token of the tokenizer passed to `prepare`; None before."""
        return self._vocabulary

    @property
    def model(self) -> None:
        """None: the teacher is in another process."""

    @property
    def is_local(self) -> bool:
        """False: a server may fail for only one rank."""
        return False

    @property
    def can_generate(self) -> bool:
        """False: it is asked only for scores."""
        return False

    def prepare(
        self,
        device: torch.device,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
    ) -> None:
        """Find and check the model that the servers serve, and record its scores of a fixed text.

        Raises:
            GKDServerError: A server can't be reached, or gives no valid answer after all retries.
            GKDTeacherError: A check failed, a server does not allow `top_k` or `max_length`, or there is no tokenizer.
        """
        probe = self._servers.first_contact(tokenizer, max_length)
        self.longest_sequence = self._servers.longest_sequence
        self._vocabulary = probe.vocabulary
        self._top_k = min(self._top_k, max(probe.vocabulary.values()) + 1)
        self._witness, self._record = probe.witness, None
        for server in self._servers:
            if self._checks:
                self._servers.check_tokenizer(server, probe)
                scores = self._check_scores(server, probe.sequence)
            else:
                scores, _ = self._first_scores(server, probe.sequence)
            seen = scores.first(len(probe.witness.targets_P))
            self._record = self._record or seen
            self._servers.check_same(server, total_variation(self._record, seen))
        assert self._record is not None  # there is a server
        self.witness = Witness(probe.witness.token_ids, self._record)
        self._local_copy = None

    def _body(self, server: VLLMServer, sequences: Sequence[TokenSequence]) -> dict[str, Any]:
        return {
            "model": self._servers.name_at(server),
            "prompt": [sequence.token_ids for sequence in sequences],
            "prompt_logprobs": self._top_k,
            **_NEUTRAL_GREEDY,
        }

    def _score(self, server: VLLMServer, sequences: Sequence[TokenSequence]) -> list[TopScores]:
        assert self._witness is not None
        assert self._record is not None
        asked, record = [self._witness, *sequences], self._record

        def parse(answer: Any) -> list[TopScores]:
            seen, *scores = self._parsed(server, answer, asked)
            self._servers.check_witness(server, total_variation(record, seen))
            return scores

        return server.post("/v1/completions", self._body(server, asked), parse)

    def _parsed(self, server: VLLMServer, answer: Any, asked: Sequence[TokenSequence]) -> list[TopScores]:
        try:
            return parse_scores(answer, asked, self._top_k)
        except NotLogProbsError as error:
            raise self._not_log_probs(server, error) from error

    def _not_log_probs(self, server: VLLMServer, error: NotLogProbsError) -> GKDTeacherError:
        # Not a wrong answer, which the client would ask for again: the server's options make all of its answers so.
        return GKDTeacherError(
            f"the vLLM server at {server.base_url} gives scores that are not log-probs ({error}): start it with "
            "--logprobs-mode raw_logprobs, vLLM's default, not raw_logits or processed_logits"
        )

    def _first_scores(self, server: VLLMServer, probe: TokenSequence) -> tuple[TopScores, int]:
        """Return the scores of the probe, and the token that the server generates after it."""

        def parse(answer: Any) -> tuple[TopScores, int]:
            [scores] = self._parsed(server, answer, [probe])
            [token] = CompletionAnswer.parse(answer).choices[0].token_ids
            return scores, token

        assert self._vocabulary is not None
        try:
            first = server.post("/v1/completions", {**self._body(server, [probe]), "return_token_ids": True}, parse)
            check_mass(first[0], max(self._vocabulary.values()) + 1)
            return first
        except NotLogProbsError as error:
            raise self._not_log_probs(server, error) from error
        except GKDServerError as error:
            if "status 400" in str(error) and "logprobs" in str(error):
                raise GKDTeacherError(
                    f"the teacher must give its {self._top_k} most probable tokens, but the vLLM server at "
                    f"{server.base_url} allows fewer: start it with --max-logprobs {self._top_k}, or lower top_k "
                    f"({error})"
                ) from error
            raise

    def _check_scores(self, server: VLLMServer, probe: TokenSequence) -> TopScores:
        """Return the scores of the probe, after comparing a second request, the greedy token and the local copy."""
        first, token = self._first_scores(server, probe)
        longer = fully_scored([*probe.token_ids, token])
        parse = partial(self._parsed, server, asked=[longer])
        [second] = server.post("/v1/completions", self._body(server, [longer]), parse)
        self._servers.check_repeated(server, total_variation(first, second.first(len(first.ids_PK))))
        best, p_K = int(second.ids_PK[-1, 0]), np.exp(second.log_p_PK[-1])
        p_token = p_K[second.ids_PK[-1] == token].sum() or p_K[-1]
        if p_K[0] - p_token > NOISE:
            raise GKDTeacherError(
                f"the vLLM server at {server.base_url} does not generate the token that it scores highest: its greedy "
                f"token is {token} ({p_token:.2f} at most), but its most probable one is {best} ({p_K[0]:.2f}). "
                "Start it without options that change the distribution, such as --logits-processors"
            )
        if self._local_copy is not None:
            self._compare_with_local_copy(server, probe, first, self._local_copy)
        return first

    def _compare_with_local_copy(
        self, server: VLLMServer, probe: TokenSequence, scores: TopScores, model: PreTrainedModel
    ) -> None:
        with torch.no_grad():
            logits_PV = model.eval()(input_ids=torch.tensor([probe.token_ids], device=model.device)).logits[0, :-1]
        top = logits_PV.double().log_softmax(dim=-1).topk(self._top_k)
        distance = total_variation(scores, TopScores(top.indices.cpu().numpy(), top.values.cpu().numpy()))
        self._servers.check_local_copy(server, distance, model.dtype)
