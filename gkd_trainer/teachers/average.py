"""The exponential moving average of a LoRA adapter's product, layer by layer.

Shapes: O output and I input features of a layer, r rank of its adapter, R rank of its average.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.utils.integrations import gather_params_ctx
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.functional import linear

from gkd_trainer.errors import GKDTeacherError

KEPT_RANKS = 8
"""The factors of an average are cut to this many times the adapter's rank."""

HELD_RANKS = 12
"""They are cut when they reach this many times the adapter's rank, and so not in every step."""


class AdapterAverage:
    """The average of what an adapter adds to the weights: decay·average + (1−decay)·scaling·B·A after each step.

    This is an average of products, not the product of the averages of B and A, and its rank grows with the steps. Each
    layer keeps two factors of it. They are exact until they have HELD_RANKS times the adapter's rank; then the smallest
    singular values are cut, to KEPT_RANKS times. `error_bound` bounds the sum of all cuts. If the factors would take
    more memory than their product, the layer keeps the product, which is never cut.

    Args:
        student: A model with one active LoRA adapter, on linear layers only.
        decay: The share of the old average that stays in each step, in [0, 1).

    Raises:
        GKDTeacherError: The adapter adds anything but B·A to linear layers.
    """

    def __init__(self, student: PeftModel, decay: float) -> None:
        self._decay = decay
        self._layers = _adapted_layers(student)
        self._products: dict[str, Product] = {}

    def start(self) -> None:
        """Begin at the adapter's current product, unless it has begun; with sharded weights, all ranks call this."""
        if not self._products:
            with self._factors() as factors:
                self._products = {name: new_product(*pair).averaged(*pair, 0.0) for name, pair in factors.items()}

    def update(self) -> None:
        """Take in the adapter's current product; with sharded weights, all ranks call this."""
        self.start()
        with self._factors() as factors:
            for name, (b_Or, a_rI) in factors.items():
                product = self._products[name].to(b_Or.device)
                self._products[name] = product.averaged(b_Or, a_rI, self._decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Add the average to the layers' outputs in the block, where the adapter must be off."""
        self.start()
        with ExitStack() as stack:
            for name, layer in self._layers.items():
                handle = layer.module.register_forward_hook(_adding(self._products[name]))
                stack.callback(handle.remove)
            yield

    def matrices(self) -> dict[str, Tensor]:
        """Return the average of each layer [O, I], by the layer's name."""
        return {name: product.matrix() for name, product in self._products.items()}

    @property
    def error_bound(self) -> float:
        """A bound on the Frobenius norm of what was cut, relative to the average's: the largest of all layers."""
        return max((product.relative_error for product in self._products.values()), default=0.0)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors from which `load_state` continues bit for bit."""
        return {
            f"{name}.{part}": tensor
            for name, product in self._products.items()
            for part, tensor in product.state().items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state`; raise GKDTeacherError if it belongs to an adapter on other layers."""
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            name, _, part = key.rpartition(".")
            parts.setdefault(name, {})[part] = tensor
        if parts.keys() != self._layers.keys():
            differing = min(parts.keys() ^ self._layers.keys())
            raise GKDTeacherError(
                f"the checkpoint has averages of {len(parts)} layers, but the student's adapter is on "
                f"{len(self._layers)}, and only one of the two has {differing}: resume with the adapter that the "
                "checkpoint was trained with"
            )
        self._products = {name: product_of(parts[name]) for name in self._layers}

    @contextmanager
    def _factors(self) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Yield B [O, r] and scaling·A [r, I] of each layer, gathered from all ranks if they are sharded."""
        weights = [weight for layer in self._layers.values() for weight in (layer.up, layer.down)]
        with torch.no_grad(), gather_params_ctx(weights, modifier_rank=None):
            yield {name: (_whole(layer.up), layer.scaling * _whole(layer.down)) for name, layer in self._layers.items()}


class Product(ABC):
    """An average of products B·A, [O, I], and a bound on the Frobenius norm of what was cut from it."""

    @abstractmethod
    def averaged(self, b_Or: Tensor, a_rI: Tensor, decay: float) -> Product:
        """Return decay·self + (1−decay)·B·A."""

    @abstractmethod
    def applied_to(self, x_I: Tensor) -> Tensor:
        """Return the product of inputs [..., I] with the transposed matrix, [..., O]."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """Return the average as a matrix [O, I]."""

    @abstractmethod
    def to(self, device: torch.device) -> Product:
        """Return the average on a device."""

    @property
    @abstractmethod
    def relative_error(self) -> float:
        """The bound, relative to the average's Frobenius norm."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return the tensors from which `product_of` makes it again."""


@dataclass(frozen=True)
class Matrix(Product):
    """An average kept as the matrix itself."""

    matrix_OI: Tensor

    def averaged(self, b_Or: Tensor, a_rI: Tensor, decay: float) -> Matrix:
        """Return decay·self + (1−decay)·B·A."""
        dtype = self.matrix_OI.dtype
        return Matrix(decay * self.matrix_OI + (1 - decay) * (b_Or.to(dtype) @ a_rI.to(dtype)))

    def applied_to(self, x_I: Tensor) -> Tensor:
        """Return the product of inputs [..., I] with the transposed matrix, [..., O]."""
        return linear(x_I.to(self.matrix_OI.dtype), self.matrix_OI)

    def matrix(self) -> Tensor:
        """Return the average as a matrix [O, I]."""
        return self.matrix_OI

    def to(self, device: torch.device) -> Matrix:
        """Return the average on a device."""
        return Matrix(self.matrix_OI.to(device))

    @property
    def relative_error(self) -> float:
        """0: nothing is cut."""
        return 0.0

    def state(self) -> dict[str, Tensor]:
        """Return the matrix."""
        return {"matrix": self.matrix_OI}


@dataclass(frozen=True)
class Factors(Product):
    """An average kept as two factors; `error` bounds what was cut from their product."""

    left_OR: Tensor
    right_RI: Tensor
    error: float = 0.0

    def averaged(self, b_Or: Tensor, a_rI: Tensor, decay: float) -> Factors:
        """Return decay·self + (1−decay)·B·A, cut if its factors are too wide."""
        dtype, rank = self.left_OR.dtype, len(a_rI)
        left_OR = torch.cat([decay * self.left_OR, (1 - decay) * b_Or.to(dtype)], dim=1)
        right_RI = torch.cat([self.right_RI, a_rI.to(dtype)])
        error = decay * self.error
        if len(right_RI) <= HELD_RANKS * rank:
            return Factors(left_OR, right_RI, error)
        # Of the product, by the singular value decomposition of a small matrix between orthonormal ones.
        basis_OR, upper_RR = torch.linalg.qr(left_OR)
        basis_IR, lower_RR = torch.linalg.qr(right_RI.T)
        u_RR, singular_R, v_RR = torch.linalg.svd(upper_RR @ lower_RR.T)
        kept = KEPT_RANKS * rank
        root_R = singular_R[:kept].sqrt()
        left_OR = (basis_OR @ u_RR[:, :kept]) * root_R
        right_RI = root_R[:, None] * (v_RR[:kept] @ basis_IR.T)
        return Factors(left_OR, right_RI, error + float(singular_R[kept:].norm()))

    def applied_to(self, x_I: Tensor) -> Tensor:
        """Return the product of inputs [..., I] with the transposed matrix, [..., O]."""
        return linear(linear(x_I.to(self.right_RI.dtype), self.right_RI), self.left_OR)

    def matrix(self) -> Tensor:
        """Return the average as a matrix [O, I]."""
        return self.left_OR @ self.right_RI

    def to(self, device: torch.device) -> Factors:
        """Return the average on a device."""
        return Factors(self.left_OR.to(device), self.right_RI.to(device), self.error)

    @property
    def relative_error(self) -> float:
        """The bound, relative to the average's Frobenius norm."""
        if self.error == 0.0:
            return 0.0
        squared = ((self.left_OR.T @ self.left_OR) * (self.right_RI @ self.right_RI.T)).sum()
        return self.error / max(float(squared.clamp_min(0).sqrt()), torch.finfo(squared.dtype).tiny)

    def state(self) -> dict[str, Tensor]:
        """Return the factors and the bound."""
        error = torch.tensor(self.error, dtype=torch.float64)
        return {"left": self.left_OR.contiguous(), "right": self.right_RI.contiguous(), "error": error}


def new_product(b_Or: Tensor, a_rI: Tensor) -> Product:
    """Return 0, kept in the form that takes less memory for averages of products of this shape."""
    (outputs, rank), inputs = b_Or.shape, a_rI.shape[1]
    # The steps of an average are too small for half precision.
    options: Any = {"dtype": torch.promote_types(b_Or.dtype, torch.float32), "device": b_Or.device}
    if HELD_RANKS * rank * (outputs + inputs) >= outputs * inputs:
        return Matrix(torch.zeros(outputs, inputs, **options))
    return Factors(torch.zeros(outputs, 0, **options), torch.zeros(0, inputs, **options))


def product_of(state: Mapping[str, Tensor]) -> Product:
    """Return the product with this `state`."""
    if "matrix" in state:
        return Matrix(state["matrix"])
    return Factors(state["left"], state["right"], float(state["error"]))


@dataclass(frozen=True)
class _AdaptedLayer:
    module: Any  # a LoraLayer
    adapter: str

    @property
    def up(self) -> nn.Parameter:
        weight: nn.Parameter = self.module.lora_B[self.adapter].weight
        return weight

    @property
    def down(self) -> nn.Parameter:
        weight: nn.Parameter = self.module.lora_A[self.adapter].weight
        return weight

    @property
    def scaling(self) -> float:
        return float(self.module.scaling[self.adapter])


def _adapted_layers(student: Any) -> dict[str, _AdaptedLayer]:
    adapters = student.active_adapters
    if len(adapters) != 1:
        raise _not_averaged(f"{len(adapters)} adapters are active: activate one")
    [adapter] = adapters
    kind = student.peft_config[adapter].peft_type
    if kind != PeftType.LORA:
        raise _not_averaged(f"the student's adapter {adapter!r} is of the kind {kind.value}")
    layers = {}
    for name, module in student.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise _not_averaged(f"{name} is trained as a whole (modules_to_save or trainable_token_indices)")
        if isinstance(module, LoraLayer) and adapter in _adapters_of(module):
            if not _is_plain(module, adapter):
                raise _not_averaged(f"{name} is adapted in another way ({type(module).__name__})")
            layers[name] = _AdaptedLayer(module, adapter)
    return layers


def _adapters_of(layer: LoraLayer) -> set[str]:
    return {*layer.lora_A, *layer.lora_embedding_A}


def _is_plain(layer: LoraLayer, adapter: str) -> bool:
    """Return whether an adapter adds scaling·B·A to a linear layer's weight, and no more."""
    if adapter not in layer.lora_A or isinstance(layer, ParamWrapper | MultiheadAttention):
        return False
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    return type(down) is nn.Linear and up.bias is None and adapter not in layer.lora_variant


def _not_averaged(problem: str) -> GKDTeacherError:
    return GKDTeacherError(
        f'SelfTeacher("ema") averages scaling·B·A of a LoRA adapter on linear layers, but {problem}. Use such an '
        'adapter, or SelfTeacher("base")'
    )


def _adding(product: Product) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        x_I = inputs[0]
        return output + product.to(x_I.device).applied_to(x_I).to(output.dtype)

    return add


def _whole(weight: Any) -> Tensor:
    """Return a weight, gathered from all ranks if FSDP shards it."""
    whole: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return whole.detach()
