"""What teachers behind vLLM servers share: finding and checking the servers, and asking them in turn."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from gkd_trainer.errors import GKDConfigError, GKDServerError, GKDTeacherError
from gkd_trainer.teachers.failover import Failover
from gkd_trainer.teachers.prompt_scores import TokenSequence, fully_scored
from gkd_trainer.vllm_answers import Models, Tokens
from gkd_trainer.vllm_client import VLLMServer, call_each

logger = logging.getLogger(__name__)

Scores = TypeVar("Scores")

_SEQUENCES_AT_ONCE = 4
"""Sequences in one request: few enough for a quick answer, enough for the witness to cost little."""

_WITNESS_TOKENS = 16
"""Number of the probe's tokens that go with every request."""

NOISE = 0.1
"""The largest mean total variation between two scores of one text that counts as rounding.

For SmolLM2-135M and K = 20, bf16 is 0.02 away from float32, and weights rounded to 4 bits 0.4.
"""

_FLOAT32_NOISE = 0.01
"""The same for a local copy in float32."""

_PROBE = (
    "Hello, world! It's 3.14159 + 2024 = ?\n\n\tdef f(x_1):  return x_1**2  # naïve café, Größe\n"
    "你好，世界 · Привет 😀 <p>{}</p>"
)


@dataclass(frozen=True)
class Probe:
    """A fixed text and its token ids by the student's `vocabulary`; `sequence` is as many of them as all servers take.

    The `witness` is the sequence's beginning. It goes with every request: its scores show which model is served.
    """

    vocabulary: Mapping[str, int]
    text: str
    token_ids: list[int]
    sequence: TokenSequence
    witness: TokenSequence


class TeacherServers:
    """The vLLM servers of one teacher, in turn; iterating over it yields them.

    Args:
        base_url: The URL of a server, or of several.
        model: The name under which the model is served; None for the only model that each server lists.
        api_token: The key that the servers were started with, if any.
        server_timeout: Seconds to keep trying to reach a server; while scoring, to reach any of them.
        request_timeout: Seconds within which one request must be answered in full.
        unsent: How many of a sequence's tokens need no room in the server's context, or -1 if one more does.

    Raises:
        GKDConfigError: There is no URL, or one that no request can be sent to.
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        *,
        model: str | None,
        api_token: str | None,
        server_timeout: float,
        request_timeout: float,
        unsent: int,
    ) -> None:
        urls = [base_url] if isinstance(base_url, str) else list(base_url)
        if not urls:
            raise GKDConfigError("a teacher behind servers needs the base URL of at least one server; got none")
        self._servers = [
            VLLMServer(url, api_token=api_token, server_timeout=server_timeout, request_timeout=request_timeout)
            for url in urls
        ]
        self._model_name, self._unsent = model, unsent
        self._failover = Failover(self._servers, server_timeout)
        self._served: dict[str, _Served] = {}  # by URL
        self._turn = 0

    def __iter__(self) -> Iterator[VLLMServer]:
        return iter(self._servers)

    @property
    def base_urls(self) -> list[str]:
        """The URLs of the servers."""
        return [server.base_url for server in self._servers]

    @property
    def model_name(self) -> str | None:
        """The name under which the model is served; None if not given and before `first_contact`."""
        if self._model_name is not None:
            return self._model_name
        return next((served.name for served in self._served.values()), None)

    @property
    def longest_sequence(self) -> int | None:
        """How many tokens of a sequence all servers score; None before `first_contact`."""
        return min((served.max_model_len + self._unsent for served in self._served.values()), default=None)

    def name_at(self, server: VLLMServer) -> str:
        """Return the name under which a server serves the model."""
        return self._served_by(server).name

    def first_contact(self, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None) -> Probe:
        """Find the model at each server, and return the text to check them with.

        Raises:
            GKDServerError: A server can't be reached, or gives no valid answer after all retries.
            GKDTeacherError: A server lacks the model or takes no `max_length` tokens, or there is no tokenizer.
        """
        if tokenizer is None:
            raise GKDTeacherError(
                "a teacher behind a server must have the student's tokenizer, which is unknown: pass "
                "processing_class to the trainer"
            )
        self._served = {server.base_url: self._find_model(server) for server in self._servers}
        self._refuse_longer(max_length or 0)
        # Ranks work in step: from the same server on, small batches would all go to the same few.
        self._turn = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        text = _PROBE + "".join(tokenizer.all_special_tokens)
        token_ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        room = min(served.max_model_len for served in self._served.values()) - 2
        sequence = fully_scored(token_ids[:room])
        witness = fully_scored(sequence.token_ids[:_WITNESS_TOKENS])
        return Probe(tokenizer.get_vocab(), text, token_ids, sequence, witness)

    def score_each(
        self,
        sequences: Sequence[TokenSequence],
        score: Callable[[VLLMServer, Sequence[TokenSequence]], list[Scores]],
    ) -> list[Scores]:
        """Return the scores of each sequence, in order; the servers get groups of them in turn, in parallel.

        If a server can't be reached, the others get its groups.

        Raises:
            GKDServerError: No server could be reached in time, or one gave no valid answer after all retries.
            GKDTeacherError: A sequence is longer than a server takes.
        """
        self._refuse_longer(max((len(sequence.token_ids) for sequence in sequences), default=0))
        servers = self._failover.available()
        size = min(_SEQUENCES_AT_ONCE, -(-len(sequences) // len(servers)))
        groups = [sequences[start : start + size] for start in range(0, len(sequences), size or 1)]

        def score_group(server: VLLMServer, group: Sequence[TokenSequence]) -> list[Scores]:
            return self._failover.call(server, lambda reached: score(reached, group))

        answers = call_each(servers, groups, score_group, first=self._turn)
        self._turn += len(groups)
        return list(chain.from_iterable(answers))

    def check_tokenizer(self, server: VLLMServer, probe: Probe) -> None:
        """Raise GKDTeacherError if a server's tokenizer does not give the probe's token ids."""
        body = {"model": self.name_at(server), "prompt": probe.text, "add_special_tokens": False}
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
        ids = probe.token_ids
        if served_ids != ids:
            index = next(i for i in range(len(ids) + 1) if served_ids[i : i + 1] != ids[i : i + 1])
            raise GKDTeacherError(
                f"the tokenizer of the vLLM server at {server.base_url} is not the student's: the text {probe.text!r} "
                f"becomes {len(served_ids)} tokens there and {len(ids)} here, which differ from token {index} on "
                f"({_some(served_ids, index)} and {_some(ids, index)}). Serve a teacher with the student's tokenizer"
            )

    def check_repeated(self, server: VLLMServer, distance: float) -> None:
        """Raise GKDTeacherError if a server's two scores of one text are this mean total variation apart."""
        if not distance <= NOISE:
            raise GKDTeacherError(
                f"the vLLM server at {server.base_url} scored one text differently the second time: mean total "
                f"variation {distance:.2f}, of which rounding explains at most {NOISE}. Look for an option of the "
                "server that makes its scores random or dependent on other requests"
            )
        logger.info("The vLLM server at %s scores a text the same twice, within %.1e.", server.base_url, distance)

    def check_local_copy(self, server: VLLMServer, distance: float, dtype: torch.dtype) -> None:
        """Raise GKDTeacherError if a server and a local copy of its model in `dtype` are this far apart."""
        tolerance = _FLOAT32_NOISE if dtype == torch.float32 else NOISE
        if not distance <= tolerance:
            raise GKDTeacherError(
                f"the vLLM server at {server.base_url} and the local copy of the teacher disagree about one text: mean "
                f"total variation {distance:.3f}, at most {tolerance} expected in {dtype}. Serve the local copy's "
                "weights, revision and dtype"
            )

    def check_same(self, server: VLLMServer, distance: float) -> None:
        """Raise GKDTeacherError if the scores of a server and of the first one are this far apart."""
        if not distance <= NOISE:
            raise GKDTeacherError(
                f"the vLLM servers at {self._servers[0].base_url} and {server.base_url} score one text differently "
                f"(mean total variation {distance:.2f}; rounding explains at most {NOISE}): start all of them with "
                "the same model"
            )

    def check_witness(self, server: VLLMServer, distance: float) -> None:
        """Raise GKDServerError if a server's scores of the witness moved this far from those of the start."""
        if not distance <= NOISE:
            raise self.another_model(
                server,
                f"its scores of a fixed text changed by {distance:.2f} (mean total variation; rounding explains at "
                f"most {NOISE})",
            )

    def another_model(self, server: VLLMServer, reason: str) -> GKDServerError:
        """Return the error for a server that no longer serves the model that it had at the start."""
        # Not a ValueError: a retry would only hide that earlier answers came from another model.
        return GKDServerError(
            f"the vLLM server at {server.base_url} serves another model than at the start: {reason}. Restart it with "
            f"the original {self.name_at(server)!r}, and resume from the last checkpoint"
        )

    def _served_by(self, server: VLLMServer) -> _Served:
        if server.base_url not in self._served:
            raise RuntimeError("the teacher's score was called before prepare(device, tokenizer)")
        return self._served[server.base_url]

    def _refuse_longer(self, length: int) -> None:
        for server in self._servers:
            limit = self._served_by(server).max_model_len
            longest = limit + self._unsent
            if length > longest:
                raise GKDTeacherError(
                    f"with --max-model-len {limit}, the vLLM server at {server.base_url} scores at most {longest} "
                    f"tokens, but sequences to score have up to {length}: start it with --max-model-len "
                    f"{length - self._unsent} or more, or train with max_length={longest} or less"
                )

    def _find_model(self, server: VLLMServer) -> _Served:
        lengths, is_one_model = server.get("/v1/models", _names_and_lengths)
        served = f"the vLLM server at {server.base_url} serves {', '.join(map(repr, lengths))}"
        name = self._model_name
        if name is None and not is_one_model:
            raise GKDTeacherError(
                f"{served}, which are not names of one model: pass the teacher's as model (teacher_server_model)"
            )
        if name is None:
            name = next(iter(lengths))
        if name not in lengths:
            raise GKDTeacherError(
                f"{served}, but the teacher is {name!r}: pass one of those as model (teacher_server_model), or start "
                f"the server with --served-model-name {name}"
            )
        return _Served(name, lengths[name])


@dataclass(frozen=True)
class _Served:
    """A model in a server's list."""

    name: str
    max_model_len: int


def _names_and_lengths(answer: Any) -> tuple[dict[str, int], bool]:
    models = Models.parse(answer)
    return models.lengths(), models.is_one_model()


def _some(ids: Sequence[int], start: int, count: int = 5) -> str:
    return f"{list(ids[start : start + count])}…"
