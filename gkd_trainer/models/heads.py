"""A causal LM split into its final hidden states and the head that turns them into logits.

Shapes: B batch, L length, N tokens trained on, V vocabulary, H hidden width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gkd_trainer.batch_keys import DECODER_INPUT_IDS
from gkd_trainer.models.decoders import is_encoder_decoder
from gkd_trainer.models.device_map import has_own_forward, is_hooked, only_moves_tensors
from gkd_trainer.signals import Head, HiddenSignal, LogitsSignal, StudentSignal
from gkd_trainer.types import TokenBatch

T = TypeVar("T")

_PROBE_LENGTH = 4
_PROBE_LOGIT = 100.0

ROUNDED_LOGITS = ", and rounds them to half precision, which makes the gradient wrong where the models nearly agree"
"""What the log adds about a model that computes full logits, if `rounds_logits`."""

_TAKES_HALVES = "flash"
"""A part of the names of attention implementations that take only half precision."""


@dataclass(frozen=True)
class SeparableHead:
    """A head whose logits were found to be softcap·tanh(scale·(h·Wᵀ + b) / softcap).

    `is_sharded`: FSDP shards its weight over ranks, and gathers it inside the model's forward. `biased`: the model that
    adds its `final_logits_bias` [1, V] after the head, as BART and Marian do; None if there is none.
    """

    module: nn.Linear
    scale: float
    softcap: float | None
    is_sharded: bool = False
    biased: nn.Module | None = None

    def current(self) -> Head:
        """Return the head with its current weights, in the autograd graph if they are trained."""
        bias_V = self.module.bias
        if self.biased is not None:
            final_V: Any = self.biased.final_logits_bias[0].to(self.module.weight.device)  # type: ignore[index]
            bias_V = final_V if bias_V is None else bias_V + final_V
        return Head(self.module.weight, bias_V, self.scale, self.softcap)


@dataclass(frozen=True)
class InseparableHead:
    """A head that can't be split off safely, and why: the model computes its own logits.

    `module` computes them from hidden states, by itself or before further steps; None if it is unknown.
    """

    reason: str
    module: nn.Module | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Context:
    """The longest sequence that a model supports, in tokens, and whether its position embeddings can be scaled."""

    limit: int
    has_rope: bool

    @property
    def remedy(self) -> str:
        """What to do about a longer sequence."""
        scaling = ", or scale its rotary embeddings (rope_parameters in its config)" if self.has_rope else ""
        return f"set max_length to {self.limit} or less{scaling}"


def find_head(
    model: nn.Module, *, is_sharded: bool = False, on_any_device: bool = False
) -> SeparableHead | InseparableHead:
    """Return the head of a language model, checked against the model's own logits by one forward of four tokens.

    The check makes this safe: it reveals anything that an unknown architecture does between hidden states and logits.
    It runs in eval mode and draws no random numbers. `model` must not be wrapped for distribution. Predictions are on
    the head's device: only with `on_any_device` may that be another one than the batch's, where a device map put it.
    """
    module = output_embeddings(model)
    if getattr(model, "_compiled_call_impl", None) is not None:  # model.compile()
        return InseparableHead("its forward is compiled as a whole", module)
    if module is None:
        return InseparableHead("it has no output embeddings")
    # Exactly nn.Linear: adapters, quantised layers and wrappers are other types, and more than their weight.
    if type(module) is not nn.Linear:
        return InseparableHead(f"its head is a {type(module).__name__}, not a plain nn.Linear", module)
    weight_VH = module.weight
    if type(weight_VH) is not nn.Parameter or not weight_VH.is_floating_point():
        return InseparableHead("the weight of its head is quantised or distributed", module)
    if weight_VH.is_meta or weight_VH.numel() == 0:
        return InseparableHead("the weight of its head is offloaded or sharded", module)
    if not has_own_forward(module):
        return InseparableHead("the forward of its head was replaced", module)
    if is_hooked(module) and not (on_any_device and only_moves_tensors(module)):
        hook = "a hook of accelerate does more to its head than move tensors between devices"
        return InseparableHead(hook if on_any_device else "a device map placed it on several devices", module)
    config = _text_config(model)
    softcap = getattr(config, "final_logit_softcapping", None)
    biased = model if isinstance(getattr(model, "final_logits_bias", None), Tensor) else None
    head = SeparableHead(module, _logit_scale(config), None if softcap is None else float(softcap), is_sharded, biased)
    try:
        explains_logits = _explains_logits(model, head)
    except Exception as error:  # a forward that needs more than ids and a mask may raise anything
        reason = f"its forward of only token ids and mask failed with {type(error).__name__}: {error}"
        return InseparableHead(reason, module)
    if not explains_logits:
        return InseparableHead("its logits are not its head applied to the head's input", module)
    return head


def needs_autocast(model: nn.Module) -> bool:
    """Return whether a model runs only under autocast: FlashAttention takes halves, and the weights are float32."""
    implementation = getattr(_text_config(model), "_attn_implementation", None) or ""
    return _TAKES_HALVES in implementation and all(
        weight.dtype == torch.float32 for weight in model.parameters() if weight.is_floating_point()
    )


def predict(
    model: nn.Module, batch: TokenBatch, head: SeparableHead | InseparableHead, **forward_kwargs: Any
) -> tuple[StudentSignal, Any]:
    """Return a model's predictions at the scored positions, and its forward's output; see `compare`."""
    return compare(model, batch, head, lambda signal: signal, **forward_kwargs)


def compare(
    model: nn.Module,
    batch: TokenBatch,
    head: SeparableHead | InseparableHead,
    comparison: Callable[[StudentSignal], T],
    *,
    is_output_hidden: bool = False,
    **forward_kwargs: Any,
) -> tuple[T, Any]:
    """Run a model's forward; return `comparison` of its predictions at the scored positions, and the forward's output.

    `model` may be wrapped (DDP, FSDP): calling its forward runs the hooks. With a separable head the comparison runs
    inside the forward, on the head's device, where its weight is gathered, and the output holds one column of logits;
    with an
    inseparable one it holds all logits [B, L, V], which autocast does not round if the head's weights are float32. With
    `is_output_hidden`, or a sharded head, the column is of the hidden states, and the loss must include `connection` of
    the output.
    """
    if isinstance(head, InseparableHead):
        with _in_full_precision(head.module):
            output = model(**batch.model_inputs, **forward_kwargs)
        return comparison(LogitsSignal(logits_of(output)[batch.rows_N, batch.columns_N])), output

    def compare_hidden(hidden_BLH: Tensor) -> T:
        rows_N, columns_N = (index_N.to(hidden_BLH.device) for index_N in (batch.rows_N, batch.columns_N))
        return comparison(HiddenSignal(hidden_BLH[rows_N, columns_N], head.current()))

    with _in_place_of(head, compare_hidden, is_output_hidden or head.is_sharded) as results:
        output = model(**batch.model_inputs, **forward_kwargs)
    return results[-1], output


def connection(output: Any) -> Tensor:
    """Return a zero that depends on a forward's logits, so that the backward pass reaches them first, as FSDP needs."""
    return logits_of(output)[..., :0].sum()


def without_router_logits(model: nn.Module) -> dict[str, Any]:
    """Return forward arguments that keep a mixture of experts from returning its router's logits; none otherwise."""
    return {"output_router_logits": False} if _router_config(model) is not None else {}


def router_loss_coefficient(model: nn.Module) -> float:
    """Return the coefficient of the router's load-balancing loss in a causal LM's own loss.

    It is 0 if the model is not a mixture of experts, or its config does not set `output_router_logits`.
    """
    config = _router_config(model)
    if config is None or not config.output_router_logits:
        return 0.0
    for owner, name in ((config, "router_aux_loss_coef"), (config, "aux_loss_coef"), (model, "router_aux_loss_coef")):
        coefficient = getattr(owner, name, None)
        if coefficient is not None:
            return float(coefficient)
    return 0.0


def router_loss_of(output: Any) -> Tensor | None:
    """Return the load-balancing loss of a forward, a mean over its tokens; None if the model has none."""
    loss = output.get("aux_loss") if isinstance(output, dict) else getattr(output, "aux_loss", None)
    return loss if isinstance(loss, Tensor) else None


def _router_config(model: nn.Module) -> Any:
    config = _text_config(model)
    is_taken = "output_router_logits" in inspect.signature(model.forward).parameters
    return config if is_taken and hasattr(config, "output_router_logits") else None


def vocabulary_size(model: nn.Module) -> int:
    """Return how many tokens a causal LM predicts over, including those that pad its head."""
    module = output_embeddings(model)
    weight = getattr(module, "weight", None)
    # A quantised weight is packed: its shape is not [V, H].
    if type(module) is nn.Linear and isinstance(weight, Tensor) and weight.dim() == 2:
        return int(weight.shape[0])
    return int(_text_config(model).vocab_size)


def find_context(model: nn.Module) -> Context | None:
    """Return the context of a model from its config; None if unstated or unlimited."""
    return context_of(getattr(model, "config", None))


def context_of(config: Any) -> Context | None:
    """Return the context of the models of a config; None if unstated or unlimited.

    RoPE scaling raises it. ALiBi, a recurrent state, and sliding attention in every layer have no limit.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    stated = getattr(config, "max_position_embeddings", None)  # also reads GPT-2's n_positions
    if not isinstance(stated, int) or stated <= 0:
        return None
    if getattr(config, "alibi", False) or getattr(config, "model_type", None) == "rwkv":
        return None
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None and getattr(config, "sliding_window", None) is not None:
        return None
    if layer_types and set(layer_types) <= {"sliding_attention", "linear_attention"}:
        return None
    scalings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    limit = stated
    # Gemma 3 has one scaling per type of layer.
    for scaling in [each for each in scalings.values() if isinstance(each, Mapping)] or [scalings]:
        factor = scaling.get("factor")
        if factor is not None:
            limit = max(limit, int((scaling.get("original_max_position_embeddings") or stated) * factor))
    return Context(limit, has_rope=bool(scalings) or hasattr(config, "rope_theta"))


def rounds_logits(model: nn.Module, *, is_autocast: bool) -> bool:
    """Return whether the logits of a model with an inseparable head are rounded to half precision."""
    module = output_embeddings(model)
    if module is None:
        return is_autocast or not _is_float32(model)
    return not _is_float32(module)


@contextmanager
def _in_full_precision(module: nn.Module | None) -> Iterator[None]:
    """Keep autocast in the block from rounding what a module of float32 weights computes: the logits."""
    if module is None:
        yield
        return
    replaced, forward = vars(module).get("forward"), module.forward

    def without_autocast(hidden_BLH: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Asked here: FSDP and DeepSpeed may cast the weights for the forward. An embedding that serves as the head is
        # also called with token ids.
        if not hidden_BLH.is_floating_point() or not _is_float32(module):
            return forward(hidden_BLH, *args, **kwargs)
        with torch.autocast(hidden_BLH.device.type, enabled=False):
            return forward(hidden_BLH.float(), *args, **kwargs)

    # The compiler traces it like any forward, and does not compile again for the next one with the same code.
    module.forward = without_autocast
    try:
        yield
    finally:
        del module.forward
        if replaced is not None:
            module.forward = replaced


def _is_float32(module: nn.Module) -> bool:
    return {weight.dtype for weight in module.parameters()} == {torch.float32}


@contextmanager
def _in_place_of(head: SeparableHead, call: Callable[[Tensor], T], is_output_hidden: bool) -> Iterator[list[T]]:
    module, biased, results = head.module, head.biased, list[T]()
    replaced = vars(module).get("forward")
    final_bias_1V: Any = None if biased is None else biased.final_logits_bias

    def first_column(hidden_BLH: Tensor) -> Tensor:
        hidden_BLH = hidden_BLH.to(module.weight.device)  # as the hook on a module of a device map does
        results.append(call(hidden_BLH))
        if biased is not None:  # it would broadcast the column to [B, L, V]
            biased.final_logits_bias = final_bias_1V[:, :1]
        if is_output_hidden:
            # The loss depends on this output: a column of logits would add a second gradient of the weight.
            return hidden_BLH[..., :1]
        bias = None if module.bias is None else module.bias[:1]
        # Not a slice of the hidden states: the head's weight would be missing from DDP's graph.
        return nn.functional.linear(hidden_BLH, module.weight[:1], bias)

    module.forward = first_column  # type: ignore[method-assign,assignment]
    try:
        yield results
    finally:
        del module.forward
        if replaced is not None:
            module.forward = replaced  # type: ignore[method-assign]
        if biased is not None:
            biased.final_logits_bias = final_bias_1V


def _explains_logits(model: nn.Module, head: SeparableHead) -> bool:
    hidden: list[Tensor] = []

    def rescale(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        hidden_BLH = args[0].to(head.module.weight.device)
        if hidden_BLH.shape[:-1] == (1, _PROBE_LENGTH):
            # Small logits, as of an untrained model, hide a soft-cap, and large ones an offset: so make the first
            # position 0 and the last one large.
            logits_BLV = nn.functional.linear(hidden_BLH, head.module.weight, head.module.bias)
            scale_L1 = torch.ones_like(hidden_BLH[0, :, :1])
            scale_L1[0], scale_L1[-1] = 0.0, _PROBE_LOGIT / logits_BLV.abs().max().clamp_min(1e-6)
            hidden_BLH = hidden_BLH * scale_L1
        hidden.append(hidden_BLH)
        return (hidden_BLH,)

    dtype, device = head.module.weight.dtype, head.module.weight.device
    autocast: AbstractContextManager[Any] = nullcontext()
    if needs_autocast(model):
        dtype = torch.bfloat16
        autocast = torch.autocast(device.type, dtype)
    hook = head.module.register_forward_pre_hook(rescale)
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), autocast:
            ids_BL = torch.arange(_PROBE_LENGTH, device=device)[None]
            ids_BL = ids_BL % head.module.weight.shape[0]
            decoder = {DECODER_INPUT_IDS: ids_BL} if is_encoder_decoder(model) else {}
            logits_BLV = logits_of(model(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL), **decoder))
            if len(hidden) != 1 or hidden[0].shape[:-1] != (1, _PROBE_LENGTH):
                return False
            expected_BLV = head.current().logits(hidden[0])
            logits_BLV = logits_BLV.to(expected_BLV.device)
    finally:
        hook.remove()
        for module in in_training:
            module.training = True
    if logits_BLV.shape != expected_BLV.shape:
        return False
    # With bf16 weights (eps 0.008) the two round differently; a missing scale or soft-cap is far outside that.
    tolerance = max(4 * torch.finfo(dtype).eps, 1e-3)
    error_BL, largest_BL = (logits_BLV - expected_BLV).abs().amax(dim=-1), expected_BLV.abs().amax(dim=-1)
    return bool((error_BL <= tolerance * largest_BL).all())


def logits_of(output: Any) -> Tensor:
    """Return the logits of a forward's output."""
    logits: Tensor = output["logits"] if isinstance(output, dict) else output.logits
    return logits


def set_logits(output: Any, logits: Tensor) -> None:
    """Replace the logits of a forward's output."""
    if isinstance(output, dict):
        output["logits"] = logits
    else:
        output.logits = logits


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the module that turns hidden states into logits, or None if the model names none."""
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    if get_output_embeddings is None:
        return None
    module: nn.Module | None = get_output_embeddings()
    return module


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the module that embeds token ids, or None if the model names none."""
    get_input_embeddings = getattr(model, "get_input_embeddings", None)
    if get_input_embeddings is None:
        return None
    try:
        module: nn.Module | None = get_input_embeddings()
    except NotImplementedError:  # transformers' own, for a model that names none
        return None
    return module


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _logit_scale(config: Any) -> float:
    scale = getattr(config, "logit_scale", None)  # Cohere multiplies by it
    if scale is not None:
        return float(scale)
    scaling = getattr(config, "logits_scaling", None)  # Granite divides by it
    return 1.0 if scaling is None else 1.0 / float(scaling)
