"""The answers of vLLM's endpoints, checked on arrival against models of the fields that we read."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

_Count = Annotated[int, Field(ge=1, le=2**40)]


class Answer(BaseModel):
    """The fields read from an endpoint's JSON, in exactly these types; others are ignored."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    @classmethod
    def parse(cls, answer: Any) -> Self:
        """Return the JSON's values as this model; ValueError names the first field that is not as expected."""
        try:
            return cls.model_validate(answer)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"])) or "the answer"
            raise ValueError(f"{place}: {first['msg']}") from None


class ServedModel(Answer):
    """One entry of /v1/models: a model, or an adapter, whose `root` is its folder and whose `parent` is a model."""

    id: str
    root: str | None = None
    parent: str | None = None
    max_model_len: _Count | None = None


class Models(Answer):
    """GET /v1/models: the base model under each of its names, then adapters."""

    data: Annotated[list[ServedModel], Field(min_length=1)]

    def lengths(self) -> dict[str, int]:
        """Return the maximum number of tokens of each model by name; adapters, listed without one, get the model's."""
        longest = next((model.max_model_len for model in self.data if model.max_model_len), None)
        if longest is None:
            raise ValueError("no model has a max_model_len, which vLLM always gives")
        return {model.id: model.max_model_len or longest for model in self.data}

    def is_one_model(self) -> bool:
        """Return whether there is one entry, or all of them are names of one model, without adapters."""
        roots = {model.root for model in self.data}
        return len(self.data) == 1 or (
            len(roots) == 1 and None not in roots and all(model.parent is None for model in self.data)
        )


class TokenLogProbs(Answer):
    """The log-probabilities of generated tokens, None for one without."""

    token_logprobs: list[float | None]


class GeneratedChoice(Answer):
    """A completion, asked for with `return_token_ids`, and perhaps with `logprobs`."""

    token_ids: list[int]
    finish_reason: str | None
    logprobs: TokenLogProbs | None = None


class CompletionAnswer(Answer):
    """POST /v1/completions, for what it generated."""

    choices: Annotated[list[GeneratedChoice], Field(min_length=1)]


class ScoredChoice(Answer):
    """A prompt's scores: one entry per token; `teachers/prompt_scores.py` checks their content in bulk."""

    index: int
    prompt_logprobs: list[Any]


class ScoreAnswer(Answer):
    """POST /v1/completions, for the scores of its prompts."""

    choices: list[ScoredChoice]


class PooledInput(Answer):
    """The place and form of one input's values in the body of an answer of bytes."""

    index: int
    embed_dtype: str
    endianness: str
    start: int
    end: int
    shape: list[int]


class PooledInputs(Answer):
    """The header `metadata` of POST /pooling with `encoding_format` "bytes"."""

    data: list[PooledInput]


class Tokens(Answer):
    """POST /tokenize."""

    tokens: list[int]


class WeightInfo(Answer):
    """GET /weight_info."""

    weight_version: str


class RPCResults(Answer):
    """POST /collective_rpc: what the method returned in each worker."""

    results: list[Any]


class Success(Answer):
    """POST /reset_prefix_cache and /update_weight_version."""

    success: bool = True


class WorldSize(Answer):
    """GET /get_world_size."""

    world_size: _Count


class _Device(Answer):
    device: str | None = None


class _Model(Answer):
    hf_overrides: Any = None


class _WeightTransfer(Answer):
    backend: str | None = None


class _VLLMConfig(Answer):
    device: _Device = Field(alias="device_config")
    model: _Model = Field(alias="model_config")
    weight_transfer: _WeightTransfer | None = Field(None, alias="weight_transfer_config")


class _Environment(Answer):
    uses_runner_v2: bool | None = Field(None, alias="VLLM_USE_V2_MODEL_RUNNER")


class ServerInfo(Answer):
    """GET /server_info?config_format=json; without a choice in its environment, vLLM does not name its model runner."""

    vllm_config: _VLLMConfig
    environment: _Environment | None = Field(None, alias="vllm_env")
