"""A teacher behind one or more vLLM servers.

Shapes: B batch, L length, N tokens trained on, V vocabulary, K top tokens, P scored positions of one sequence.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gkd_trainer.errors import GKDConfigError, GKDServerError, GKDTeacherError
from gkd_trainer.signals import TopKSignal
from gkd_trainer.teachers.base import Teacher
from gkd_trainer.teachers.prompt_scores import (
    TokenSequence,
    TopScores,
    fully_scored,
    parse_scores,
    sequences_of,
    total_variation,
)
from gkd_trainer.types import TokenBatch
from gkd_trainer.vllm_answers import CompletionAnswer, Models, Tokens
from gkd_trainer.vllm_client import VLLMServer, call_each

logger = logging.getLogger(__name__)

_SEQUENCES_AT_ONCE = 4
"""Sequences in one request: few enough for a quick answer, enough for the witness to cost little."""

_WITNESS_TOKENS = 16
"""Number of the probe's tokens that go with every request."""

_NOISE = 0.1
"""The largest mean total variation between two scores of one text that counts as rounding.

For SmolLM2-135M and K = 20, bf16 is 0.02 away from float32, and weights rounded to 4 bits 0.4.
"""

_FLOAT32_NOISE = 0.01
"""The same for a local copy in float32."""

_PROBE = (
    "Hello, world! It's 3.14159 + 2024 = ?\n\n\tdef f(x_1):  return x_1**2  # naïve café, Größe\n"
    "你好，世界 · Привет 😀 <p>{}</p>"
)

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

    Its tokenizer must be the student's. A server is recognised by its scores of a fixed text, which goes with every
    request: a server that returns with another model is noticed at its first answer.

    Args:
        base_url: The URL of a server, such as "http://127.0.0.1:8000", or of several; all must serve the same model,
            and each scores its share of a batch.
        top_k: How many tokens of each distribution to ask for. vLLM gives up to 20 unless it was started with a
            larger `--max-logprobs`.
        model: The name under which the model is served; by default the first that the server lists.
        api_token: The key that the servers were started with (`--api-key`), if any.
        server_timeout: Seconds to keep trying to reach a server.
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
        urls = [base_url] if isinstance(base_url, str) else list(base_url)
        if not urls:
            raise GKDConfigError("a VLLMServerTeacher needs the base URL of at least one server; got none")
        if local_copy is not None and not checks:
            raise GKDConfigError("local_copy needs the start-up checks, which checks=False disables: leave one out")
        self._servers = [
            VLLMServer(url, api_token=api_token, server_timeout=server_timeout, request_timeout=request_timeout)
            for url in urls
        ]
        self._top_k, self._model_name, self._checks, self._local_copy = top_k, model, checks, local_copy
        self._served: dict[VLLMServer, _Served] = {}
        self._vocabulary: Mapping[str, int] | None = None
        self._witness: TokenSequence | None = None
        self._record: TopScores | None = None
        self._turn = 0

    def score(self, batch: TokenBatch) -> TopKSignal:
        """Return the top tokens at the batch's scored positions, most probable first.

        Packed sequences, whose `position_ids` start again, are scored one by one.

        Raises:
            GKDServerError: A server gave no valid answer after all retries, or now serves another model.
            GKDTeacherError: A sequence is longer than a server takes.
            GKDDataError: A token trained on has no distribution: padding, or the first of a sequence.
        """
        sequences = sequences_of(batch)
        self._refuse_longer(max((len(sequence.token_ids) for sequence in sequences), default=0))
        size = min(_SEQUENCES_AT_ONCE, -(-len(sequences) // len(self._servers)))
        groups = [sequences[start : start + size] for start in range(0, len(sequences), size or 1)]
        if self._vocabulary is None:
            raise RuntimeError("VLLMServerTeacher.score was called before prepare(device, tokenizer)")
        answers = call_each(self._servers, groups, self._score, first=self._turn)
        self._turn = (self._turn + len(groups)) % len(self._servers)
        nothing = TopScores(np.empty((0, self._top_k), np.int64), np.empty((0, self._top_k)))
        scores = [nothing, *chain.from_iterable(answers)]
        device = batch.labels_BL.device
        ids_NK = np.concatenate([each.ids_PK for each in scores])
        known = max(self._vocabulary.values())
        return TopKSignal(
            ids_NK=torch.from_numpy(ids_NK).to(device),
            log_p_NK=torch.from_numpy(np.concatenate([each.log_p_PK for each in scores])).to(device, torch.float32),
            vocab_size=int(ids_NK.max(initial=known)) + 1,
        )

    @property
    def base_urls(self) -> list[str]:
        """The URLs of its servers."""
        return [server.base_url for server in self._servers]

    @property
    def model_name(self) -> str | None:
        """The name under which the model is served; None if not given and before `prepare`."""
        return self._model_name or next((served.name for served in self._served.values()), None)

    @property
    def max_length(self) -> int | None:
        """The longest sequence that all servers take, in tokens; None before `prepare`."""
        return min((served.max_model_len - 1 for served in self._served.values()), default=None)

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
        """False: a server may fail for one rank alone."""
        return False

    @property
    def can_generate(self) -> bool:
        """False: it is asked for scores alone."""
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
        if tokenizer is None:
            raise GKDTeacherError(
                "a teacher behind a server must have the student's tokenizer, which is unknown: pass "
                "processing_class to the trainer"
            )
        self._vocabulary = tokenizer.get_vocab()
        self._top_k = min(self._top_k, max(self._vocabulary.values()) + 1)
        self._served = {server: self._find_model(server) for server in self._servers}
        self._refuse_longer(max_length or 0)
        text = _PROBE + "".join(tokenizer.all_special_tokens)
        probe_ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        room = min(served.max_model_len for served in self._served.values()) - 2
        probe = fully_scored(probe_ids[:room])
        self._witness = fully_scored(probe.token_ids[:_WITNESS_TOKENS])
        self._record = None
        for server in self._servers:
            if self._checks:
                self._check_tokenizer(server, text, probe_ids)
            scores = self._check_scores(server, probe) if self._checks else self._first_scores(server, probe)[0]
            seen = scores.first(len(self._witness.targets_P))
            self._record = self._record or seen
            if total_variation(self._record, seen) > _NOISE:
                raise GKDTeacherError(
                    f"the vLLM servers at {self._servers[0].base_url} and {server.base_url} score one text "
                    f"differently (mean total variation {total_variation(self._record, seen):.2f}; rounding explains "
                    f"at most {_NOISE}): start all of them with the same model"
                )
        self._local_copy = None

    def _served_by(self, server: VLLMServer) -> _Served:
        if server not in self._served:
            raise RuntimeError("VLLMServerTeacher.score was called before prepare(device, tokenizer)")
        return self._served[server]

    def _refuse_longer(self, length: int) -> None:
        for server in self._servers:
            limit = self._served_by(server).max_model_len
            if length >= limit:
                raise GKDTeacherError(
                    f"the vLLM server at {server.base_url} takes at most {limit - 1} tokens and generates one more, "
                    f"but sequences to score have up to {length}: start the server with --max-model-len {length + 1} "
                    f"or more, or train with max_length={limit - 1} or less"
                )

    def _find_model(self, server: VLLMServer) -> _Served:
        models = server.get("/v1/models", lambda answer: Models.parse(answer).lengths())
        name = self._model_name or next(iter(models))
        if name not in models:
            raise GKDTeacherError(
                f"the vLLM server at {server.base_url} serves {', '.join(map(repr, models))}, but the teacher is "
                f"{name!r}: pass one of those as model, or start the server with --served-model-name {name}"
            )
        return _Served(name, models[name])

    def _body(self, server: VLLMServer, sequences: Sequence[TokenSequence]) -> dict[str, Any]:
        return {
            "model": self._served_by(server).name,
            "prompt": [sequence.token_ids for sequence in sequences],
            "prompt_logprobs": self._top_k,
            **_NEUTRAL_GREEDY,
        }

    def _score(self, server: VLLMServer, sequences: Sequence[TokenSequence]) -> list[TopScores]:
        assert self._witness is not None
        asked = [self._witness, *sequences]

        def parse(answer: Any) -> list[TopScores]:
            seen, *scores = parse_scores(answer, asked, self._top_k)
            self._compare_with_record(server, seen)
            return scores

        return server.post("/v1/completions", self._body(server, asked), parse)

    def _compare_with_record(self, server: VLLMServer, seen: TopScores) -> None:
        assert self._record is not None
        distance = total_variation(self._record, seen)
        if distance > _NOISE:
            # Not a ValueError: a retry would only hide that earlier answers came from another model.
            raise GKDServerError(
                f"the vLLM server at {server.base_url} serves another model than at the start: its scores of a fixed "
                f"text changed by {distance:.2f} (mean total variation; rounding explains at most {_NOISE}). Restart "
                f"it with the original {self._served_by(server).name!r}, and resume from the last checkpoint"
            )

    def _first_scores(self, server: VLLMServer, probe: TokenSequence) -> tuple[TopScores, int]:
        """Return the scores of the probe, and the token that the server generates after it."""

        def parse(answer: Any) -> tuple[TopScores, int]:
            [scores] = parse_scores(answer, [probe], self._top_k)
            [token] = CompletionAnswer.parse(answer).choices[0].token_ids
            return scores, token

        try:
            return server.post("/v1/completions", {**self._body(server, [probe]), "return_token_ids": True}, parse)
        except GKDServerError as error:
            if "status 400" in str(error) and "logprobs" in str(error):
                raise GKDTeacherError(
                    f"the teacher must give its {self._top_k} most probable tokens, but the vLLM server at "
                    f"{server.base_url} allows fewer: start it with --max-logprobs {self._top_k}, or lower top_k "
                    f"({error})"
                ) from error
            raise

    def _check_tokenizer(self, server: VLLMServer, text: str, ids: Sequence[int]) -> None:
        body = {"model": self._served_by(server).name, "prompt": text, "add_special_tokens": False}
        try:
            served_ids = server.post("/tokenize", body, Tokens.parse).tokens
        except GKDServerError as error:
            if "skip_tokenizer_init" not in str(error):
                raise
            logger.warning(
                "The vLLM server at %s runs without a tokenizer: can't check that its model uses the student's token "
                "ids.",
                server.base_url,
            )
            return
        if served_ids != ids:
            index = next(i for i in range(len(ids) + 1) if served_ids[i : i + 1] != list(ids[i : i + 1]))
            raise GKDTeacherError(
                f"the tokenizer of the vLLM server at {server.base_url} is not the student's: the text {text!r} "
                f"becomes {len(served_ids)} tokens there and {len(ids)} here, which differ from token {index} on "
                f"({_some(served_ids, index)} and {_some(ids, index)}). Serve a teacher with the student's tokenizer"
            )

    def _check_scores(self, server: VLLMServer, probe: TokenSequence) -> TopScores:
        """Return the scores of the probe, after comparing a second request, the greedy token and the local copy."""
        first, token = self._first_scores(server, probe)
        longer = fully_scored([*probe.token_ids, token])
        parse = partial(parse_scores, asked=[longer], top_k=self._top_k)
        [second] = server.post("/v1/completions", self._body(server, [longer]), parse)
        distance = total_variation(first, second.first(len(first.ids_PK)))
        if distance > _NOISE:
            raise GKDTeacherError(
                f"the vLLM server at {server.base_url} scored one text differently the second time: mean total "
                f"variation {distance:.2f}, of which rounding explains at most {_NOISE}. Look for an option of the "
                "server that makes its scores random or dependent on other requests"
            )
        best, p_K = int(second.ids_PK[-1, 0]), np.exp(second.log_p_PK[-1])
        p_token = p_K[second.ids_PK[-1] == token].sum() or p_K[-1]
        if p_K[0] - p_token > _NOISE:
            raise GKDTeacherError(
                f"the vLLM server at {server.base_url} does not generate the token that it scores highest: its greedy "
                f"token is {token} ({p_token:.2f} at most), but its most probable one is {best} ({p_K[0]:.2f}). "
                "Start it without options that change the distribution, such as --logits-processors"
            )
        logger.info("The vLLM server at %s scores a text the same twice, within %.1e.", server.base_url, distance)
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
        tolerance = _FLOAT32_NOISE if model.dtype == torch.float32 else _NOISE
        if not distance <= tolerance:
            raise GKDTeacherError(
                f"the vLLM server at {server.base_url} and the local copy of the teacher disagree about one text: mean "
                f"total variation {distance:.3f}, at most {tolerance} expected in {model.dtype}. Serve the local "
                "copy's weights, revision and dtype"
            )


@dataclass(frozen=True)
class _Served:
    """A model in a server's list."""

    name: str
    max_model_len: int


def _some(ids: Sequence[int], start: int, count: int = 5) -> str:
    return f"{list(ids[start : start + count])}…"
