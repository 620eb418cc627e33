"""A teacher behind one or more vLLM servers that return its final hidden states.

Shapes: N tokens trained on, V vocabulary, H hidden width, P scored positions of one sequence.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gkd_trainer.errors import GKDConfigError, GKDTeacherError
from gkd_trainer.models.checkpoint_head import read_head
from gkd_trainer.models.loading import find_tokenizer
from gkd_trainer.signals import Head, HiddenSignal
from gkd_trainer.teachers.base import Teacher
from gkd_trainer.teachers.prompt_scores import TokenSequence, Witness, sequences_of
from gkd_trainer.teachers.prompt_states import (
    STATE_DTYPES,
    likely_head,
    log_probs,
    mean_total_variation,
    narrowest_dtype,
    parse_states,
    states_request,
    top_scores,
)
from gkd_trainer.teachers.served import TeacherServers
from gkd_trainer.transfer import to_device
from gkd_trainer.types import TokenBatch
from gkd_trainer.vllm_client import RawAnswer, RequestRefusedError, VLLMServer

logger = logging.getLogger(__name__)

_OPTIONS = '--runner pooling --convert embed --pooler-config \'{"task": "token_embed"}\''
"""The options with which vLLM returns the final hidden states of all tokens of a causal LM."""

_WITNESS_TOP = 20
"""How many top tokens of each distribution a cache keeps of the witness."""


class HiddenStateServerTeacher(Teacher):
    """A model served by vLLM; it gives its full distributions, as final hidden states and a head.

    The server sends the hidden states; the head is read from the checkpoint that is served, and takes memory here. The
    server must be started with `--runner pooling --convert embed --pooler-config '{"task": "token_embed"}'`. Its
    tokenizer must be the student's. A server is identified by its states of a fixed text, which goes with every
    request: a server that comes back with another model is noticed at its first answer.

    Args:
        base_url: The URL of a server, such as "http://127.0.0.1:8000", or of several; all must serve the same model,
            and each scores its share of a batch.
        checkpoint: The model served: its name on the hub or its folder, with its head in safetensors, not quantised.
        dtype: The dtype of the states as sent: "auto" is the narrowest dtype that holds them exactly (bfloat16 from a
            server in bfloat16); or "float32", "bfloat16", "float16", "fp8_e4m3", "fp8_e5m2".
        model: The name under which the model is served, such as that of a LoRA adapter; by default the only model that
            the server lists.
        api_token: The key that the servers were started with (`--api-key`), if any.
        server_timeout: Seconds to keep trying to reach a server; after `prepare`, to reach any of several.
        request_timeout: Seconds within which one request must be answered in full.
        checks: Whether `prepare` compares the server's tokenizer with the student's, and its states with those of a
            second request and with `local_copy`'s distributions, and warns if they predict text badly.
        local_copy: The teacher's model in this process, in the server's dtype; `prepare` compares the server with it,
            then drops it. The mean total variation of their distributions may be 0.01 in float32 and 0.1 in other
            dtypes.
        trust_remote_code: Whether Python code that comes with the checkpoint may run.
        init_kwargs: Where the checkpoint is stored: `revision`, `token`, `subfolder`, `cache_dir`, `local_files_only`.

    Raises:
        GKDConfigError: An argument without a meaning.
        GKDTeacherError: The head can't be read, or is not all that turns hidden states into logits.
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        checkpoint: str | os.PathLike[str],
        *,
        dtype: str = "auto",
        model: str | None = None,
        api_token: str | None = None,
        server_timeout: float = 240.0,
        request_timeout: float = 300.0,
        checks: bool = True,
        local_copy: PreTrainedModel | None = None,
        trust_remote_code: bool = False,
        init_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if dtype != "auto" and dtype not in STATE_DTYPES:
            raise GKDConfigError(f"dtype must be 'auto' or one of {', '.join(map(repr, STATE_DTYPES))}; got {dtype!r}")
        if local_copy is not None and not checks:
            raise GKDConfigError("local_copy needs the start-up checks, which checks=False disables: leave one out")
        self._servers = TeacherServers(
            base_url,
            model=model,
            api_token=api_token,
            server_timeout=server_timeout,
            request_timeout=request_timeout,
            unsent=1,  # the last token trained on is predicted by the state before it
        )
        self._checkpoint, self._served_as = os.fspath(checkpoint), model
        self._head = read_head(self._checkpoint, trust_remote_code=trust_remote_code, init_kwargs=init_kwargs)
        self.tokenizer = find_tokenizer(self._checkpoint, trust_remote_code, init_kwargs)
        self._vocabulary: Mapping[str, int] | None = None if self.tokenizer is None else self.tokenizer.get_vocab()
        self._requested_dtype, self._checks, self._local_copy = dtype, checks, local_copy
        self._dtype: str | None = None
        self._witness: _Witness | None = None

    def score(self, batch: TokenBatch) -> HiddenSignal:
        """Return the final hidden states at the batch's scored positions, with the head.

        Packed sequences, whose `position_ids` start again, are scored one by one.

        Raises:
            GKDServerError: A server gave no valid answer after all retries, or now serves another model.
            GKDTeacherError: A sequence is longer than a server takes.
            GKDDataError: A token trained on has no distribution: padding, or the first of a sequence.
        """
        states = self._servers.score_each(sequences_of(batch), self._score)
        hidden_NH = torch.cat(states) if states else torch.empty(0, self._width)
        return HiddenSignal(to_device(hidden_NH, batch.labels_BL.device), self._head)

    @property
    def base_urls(self) -> list[str]:
        """The URLs of its servers."""
        return self._servers.base_urls

    @property
    def checkpoint(self) -> str:
        """The name or folder of the model served, from which its head was read."""
        return self._checkpoint

    @property
    def served_as(self) -> str | None:
        """The name under which the model is served, if one was given."""
        return self._served_as

    @property
    def dtype(self) -> str | None:
        """The dtype in which hidden states are sent; None before `prepare`."""
        return self._dtype

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the teacher predicts over, including those that pad its head."""
        return self._head.weight_VH.shape[0]

    @property
    def top_k(self) -> None:
        """None: it gives full distributions."""

    @property
    def vocabulary(self) -> Mapping[str, int] | None:
        """The id of each token of the checkpoint's tokenizer, or of the one passed to `prepare` if it has none."""
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
        """False: a server started for hidden states does not generate."""
        return False

    def prepare(
        self,
        device: torch.device,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
    ) -> None:
        """Find and check the model that the servers serve, record its states of a fixed text, and move the head.

        Raises:
            GKDServerError: A server can't be reached, or gives no valid answer after all retries.
            GKDTeacherError: A check failed, a server does not take `max_length` or returns no hidden states, or there
                is no tokenizer.
        """
        probe = self._servers.first_contact(tokenizer, max_length)
        self.longest_sequence = self._servers.longest_sequence
        if self._vocabulary is None:
            self._vocabulary = probe.vocabulary
        bias_V = self._head.bias_V
        self._head = replace(
            self._head,
            weight_VH=self._head.weight_VH.to(device),
            bias_V=None if bias_V is None else bias_V.to(device),
        )
        states = {}
        for server in self._servers:
            if self._checks:
                self._servers.check_tokenizer(server, probe)
            states[server] = self._first_states(server, probe.sequence)
        dtype = self._dtype = self._chosen_dtype(list(states.values()))
        count = len(probe.witness.targets_P)
        # Rounded as they will be sent.
        witnesses = {server: each[:count].to(STATE_DTYPES[dtype]).float() for server, each in states.items()}
        first = next(iter(witnesses.values()))
        self._witness = witness = _Witness(probe.witness, likely_head(first, self._head), first)
        unrounded = next(iter(states.values()))[:count]  # so that a cache may be continued with another dtype
        self.witness = Witness(probe.witness.token_ids, top_scores(unrounded, self._head, _WITNESS_TOP))
        for server, states_PH in states.items():
            if self._checks:
                self._check_states(server, probe.sequence, states_PH, dtype)
            self._servers.check_same(server, witness.distance(witnesses[server]))
        self._local_copy = None

    @property
    def _width(self) -> int:
        return self._head.weight_VH.shape[1]

    def _ask(
        self,
        server: VLLMServer,
        asked: Sequence[TokenSequence],
        dtype: str,
        check: Callable[[Sequence[Tensor]], None] = lambda states: None,
    ) -> list[Tensor]:
        def parse(answer: RawAnswer) -> list[Tensor]:
            states = parse_states(answer, asked, dtype)
            check(states)
            return states

        body = {"model": self._servers.name_at(server), **states_request(asked, dtype)}
        return server.post_for_bytes("/pooling", body, parse)

    def _score(self, server: VLLMServer, sequences: Sequence[TokenSequence]) -> list[Tensor]:
        assert self._dtype is not None
        assert self._witness is not None
        witness = self._witness

        def check(states: Sequence[Tensor]) -> None:
            width = states[0].shape[1]
            if width != self._width:
                raise self._servers.another_model(
                    server, f"its hidden states have the width {width}, those at the start {self._width}"
                )
            self._servers.check_witness(server, witness.distance(states[0]))

        _, *states = self._ask(server, [witness.sequence, *sequences], self._dtype, check)
        return states

    def _first_states(self, server: VLLMServer, sequence: TokenSequence) -> Tensor:
        """Return the states of a sequence in float32, after checking that they may be final hidden states."""
        try:
            [states_PH] = self._ask(server, [sequence], "float32")
        except RequestRefusedError as error:
            if "status 400" not in str(error) and "status 404" not in str(error):
                raise
            raise GKDTeacherError(
                f"the vLLM server at {server.base_url} returns no hidden states: start it with {_OPTIONS} ({error})"
            ) from error
        width = states_PH.shape[1]
        if width != self._width:
            raise GKDTeacherError(
                f"the vLLM server at {server.base_url} returns hidden states of width {width}, but the head of "
                f"{self._checkpoint!r} takes {self._width}: name the checkpoint of the model served"
            )
        lengths_P = states_PH.norm(dim=1)
        if torch.allclose(lengths_P, torch.ones_like(lengths_P), atol=1e-3):
            raise GKDTeacherError(
                f"the vLLM server at {server.base_url} returns hidden states normalised to length 1, although "
                "use_activation is false, so their logits are lost: use vLLM 0.32 or newer"
            )
        return states_PH

    def _chosen_dtype(self, states: Sequence[Tensor]) -> str:
        exact = {narrowest_dtype(states_PH) for states_PH in states}
        narrowest = exact.pop() if len(exact) == 1 else "float32"
        if self._requested_dtype == "auto":
            return narrowest
        rounded = [states_PH.to(STATE_DTYPES[self._requested_dtype]).float() for states_PH in states]
        if not all(torch.isfinite(each_PH).all() for each_PH in rounded):
            raise GKDTeacherError(
                f"the teacher's hidden states are too large for {self._requested_dtype}: send them in bfloat16 or "
                "float32 (dtype, or teacher_server_dtype)"
            )
        if not all(map(torch.equal, rounded, states)):
            logger.warning(
                "The teacher's hidden states are %s, and are rounded to %s on the way: a student close to its teacher "
                "then gets a less exact gradient.",
                narrowest,
                self._requested_dtype,
            )
        return self._requested_dtype

    def _check_states(self, server: VLLMServer, sequence: TokenSequence, first_PH: Tensor, dtype: str) -> None:
        """Compare a server's states with those of a second request, with the text, and with the local copy."""
        assert self._witness is not None
        [second_PH] = self._ask(server, [sequence], dtype)
        head = self._witness.head
        rounded_PH = first_PH.to(STATE_DTYPES[dtype]).float()
        distance = mean_total_variation(log_probs(rounded_PH, head), log_probs(second_PH, head))
        self._servers.check_repeated(server, distance)
        log_p_PV = log_probs(first_PH, self._head)
        ids_P = torch.tensor(sequence.token_ids)[torch.from_numpy(sequence.targets_P)].to(log_p_PV.device)
        nats = -float(log_p_PV.gather(1, ids_P[:, None]).mean())
        if nats > math.log(self.vocab_size):
            logger.warning(
                "The teacher predicts a text worse than chance (%.1f nats per token, chance is %.1f): is %s the model "
                "that %s serves, and trained?",
                nats,
                math.log(self.vocab_size),
                self._checkpoint,
                server.base_url,
            )
        if self._local_copy is not None:
            self._compare_with_local_copy(server, sequence, log_p_PV, self._local_copy)

    def _compare_with_local_copy(
        self, server: VLLMServer, sequence: TokenSequence, log_p_PV: Tensor, model: PreTrainedModel
    ) -> None:
        with torch.no_grad():
            logits_PV = model.eval()(input_ids=torch.tensor([sequence.token_ids], device=model.device)).logits[0, :-1]
        if logits_PV.shape[1] != self.vocab_size:
            raise GKDTeacherError(
                f"the local copy of the teacher predicts over {logits_PV.shape[1]} tokens, but the head of "
                f"{self._checkpoint!r} over {self.vocab_size}: pass the model of that checkpoint"
            )
        distance = mean_total_variation(log_p_PV, logits_PV.float().log_softmax(dim=1).to(log_p_PV.device))
        self._servers.check_local_copy(server, distance, model.dtype)


class _Witness:
    """The text that goes with every request, and the distributions over its likely tokens at the start."""

    def __init__(self, sequence: TokenSequence, head: Head, states_PH: Tensor) -> None:
        self.sequence, self.head = sequence, head
        self._log_p_PS = log_probs(states_PH, head)

    def distance(self, states_PH: Tensor) -> float:
        """Return the mean total variation of the distributions of these states and those at the start."""
        return mean_total_variation(self._log_p_PS, log_probs(states_PH, self.head))
