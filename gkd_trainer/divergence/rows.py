"""Student and teacher compared from rows of logits: values, statistics and, in place, the gradient.

Shapes: R rows (tokens), V vocabulary.
p = teacher, q = student, both softmax(logits / temperature), log_z = the log-normaliser of a side.
A probability that is zero in the computation's dtype counts as zero.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gkd_trainer.divergence.objective import TERMS, Objective, Pair
from gkd_trainer.types import IGNORE_INDEX

logger = logging.getLogger(__name__)

_CPU_TILE_ELEMENTS = 2**19
"""Size of a temporary on the CPU: 2 MiB in float32, so that what is alive at once stays in cache."""

_TILE_ELEMENTS = 2**24
"""The same off the CPU, where many small kernels cost more than 64 MiB a temporary."""

_COMPILED_VOCABULARY = 4096
"""The vocabulary from which fusing pays for the seconds of a compilation."""

_engine: str | None = None
"""Which implementation runs: "eager", "compiled" or "triton" in tests, None for what suits the tensors."""


class RowStatistics(NamedTuple):
    """What is known of each row [R]; the fields are those of `TokenDivergence`."""

    values_R: Tensor
    cross_entropy_R: Tensor | None
    student_entropy_R: Tensor
    teacher_entropy_R: Tensor
    agrees_R: Tensor
    is_teacher_finite_R: Tensor
    is_finite_R: Tensor
    teacher_mass_R: Tensor | None = None
    student_mass_R: Tensor | None = None

    def new_empty(self, R: int) -> RowStatistics:
        """Return statistics of R rows to be filled in, of the same fields and dtypes."""
        return RowStatistics._make(None if field is None else field.new_empty(R) for field in self)

    @classmethod
    def joined(cls, parts: Sequence[RowStatistics]) -> RowStatistics:
        """Join the statistics of consecutive rows."""
        return cls._make(None if field[0] is None else torch.cat(field) for field in zip(*parts, strict=True))


@dataclass(frozen=True)
class RowComparison:
    """How rows of logits are compared: the objective, and the cap that the student's logits went through.

    `temporary` is how many elements a temporary may have, if not one row's; None for a default.
    """

    objective: Objective
    softcap: float | None = None
    temporary: int | None = None

    def __call__(
        self,
        student_RV: Tensor,
        teacher_RV: Tensor,
        labels_R: Tensor | None = None,
        *,
        value_weight_R: Tensor | None = None,
        label_weight_R: Tensor | None = None,
    ) -> RowStatistics:
        """Compare rows of logits, both float32 or both float64, and turn the student's into a gradient.

        Where weights are given, `student_RV` is overwritten by value_weight·∂value/∂logits +
        label_weight·∂cross entropy/∂logits, with respect to the logits before the soft-cap; a row that is not
        finite gets zero. `label_weight_R` comes with `value_weight_R` or not at all.
        """
        numbers = self.objective.numbers(self.softcap)
        variant = _Variant(self.objective.kind, self.objective.temperature != 1, self.softcap is not None)
        compare, largest = _implementation(variant, student_RV)
        if self.temporary is not None and largest != sys.maxsize:
            largest = max(1, min(largest, self.temporary // student_RV.shape[1]))
        if largest == 2:  # of an odd number one is left over, and one row is a shape of its own to the compiler
            largest = 1
        statistics: RowStatistics | None = None
        for rows in tiles(student_RV.shape[0], largest):
            # As plain tensors: of views, the compiler looks at what they are of, whose size changes.
            inputs = (
                None if tensor is None else tensor[rows].data
                for tensor in (student_RV, teacher_RV, labels_R, value_weight_R, label_weight_R)
            )
            tile = compare(*inputs, numbers)
            # Copied: what is kept of each tile would lie in the way of the next one's temporaries, for which the
            # allocator would then take new pages from the system, at half the time of the comparison.
            statistics = statistics or tile.new_empty(student_RV.shape[0])
            for whole_R, part_R in zip(statistics, tile, strict=True):
                if whole_R is not None and part_R is not None:
                    whole_R[rows] = part_R
        assert statistics is not None
        return statistics


def tile_rows(logits_RV: Tensor) -> int:
    """Return how many rows are compared at once."""
    elements = _CPU_TILE_ELEMENTS if logits_RV.device.type == "cpu" else _TILE_ELEMENTS
    return max(1, elements // logits_RV.shape[1])


def tiles(N: int, largest: int) -> Iterator[slice]:
    """Split N rows into tiles of nearly one size; one tile at least, so that of no rows there are empty results."""
    count = max(1, -(-N // largest))
    return (slice(N * index // count, N * (index + 1) // count) for index in range(count))


def is_compiled(logits_RV: Tensor) -> bool:
    """Return whether code on these rows runs fused by the compiler."""
    if _engine is not None:
        return _engine == "compiled"
    # One row is a shape of its own to the compiler.
    return logits_RV.device.type == "cpu" and logits_RV.shape[1] >= _COMPILED_VOCABULARY and logits_RV.shape[0] > 1


def mask_cross_entropy(cross_entropy_R: Tensor, labels_R: Tensor, V: int) -> Tensor:
    """Return +inf where the label is no token of the vocabulary, 0 where it is IGNORE_INDEX, else what was given."""
    is_outside_R = (labels_R < 0) | (labels_R >= V)
    return cross_entropy_R.masked_fill(is_outside_R, math.inf).masked_fill(labels_R == IGNORE_INDEX, 0.0)


class _Variant(NamedTuple):
    """What code is specialised on; everything else is a tensor, so that nothing is compiled again for it."""

    kind: str
    is_tempered: bool
    is_capped: bool


_Compare = Callable[..., RowStatistics]


def _compare(
    student_RV: Tensor,
    teacher_RV: Tensor,
    labels_R: Tensor | None,
    value_weight_R: Tensor | None,
    label_weight_R: Tensor | None,
    parameters: tuple[Tensor, ...],
    variant: _Variant,
) -> RowStatistics:
    per_temperature, per_softcap, factor, first, second = parameters
    student_tempered_RV, teacher_tempered_RV = student_RV, teacher_RV
    if variant.is_tempered:
        student_tempered_RV, teacher_tempered_RV = student_RV * per_temperature, teacher_RV * per_temperature
    q, p = _softmax(student_tempered_RV), _softmax(teacher_tempered_RV)
    # Near-equal logits subtract without rounding; log q - log p would round both first.
    gap_RV = (student_tempered_RV - teacher_tempered_RV) - (q.log_z_R1 - p.log_z_R1)
    # Tokens that neither side can give have no gap: -inf - -inf.
    gap_RV = torch.where(q.probability_RV + p.probability_RV == 0, 0.0, gap_RV)
    log_q_RV, log_p_RV = student_tempered_RV - q.log_z_R1, teacher_tempered_RV - p.log_z_R1
    pair = Pair(q.probability_RV, p.probability_RV, log_q_RV, log_p_RV, gap_RV)
    value_terms_RV, slope_RV = TERMS[variant.kind](pair, first, second)
    values_R = value_terms_RV.sum(dim=1) * factor
    is_finite_R = values_R.isfinite()
    is_teacher_finite_R = p.log_z_R1[:, 0].isfinite()
    # As a maximum of floats, which is fused with the sums; `any` is not.
    teacher_at_top_RV = torch.where(student_tempered_RV == q.top_R1, teacher_tempered_RV, -math.inf)
    is_top_shared_R = teacher_at_top_RV.amax(dim=1) == p.top_R1[:, 0]
    agrees_R = is_top_shared_R & is_teacher_finite_R & q.log_z_R1[:, 0].isfinite()

    cross_entropy_R = None
    untempered_q = q
    if labels_R is not None:
        if variant.is_tempered:
            untempered_q = _softmax(student_RV)
        V = student_RV.shape[1]
        label_logits_R = student_RV.gather(1, labels_R.clamp(0, V - 1)[:, None])[:, 0]
        cross_entropy_R = mask_cross_entropy(untempered_q.log_z_R1[:, 0] - label_logits_R, labels_R, V)

    if value_weight_R is not None:
        weight_R1 = (value_weight_R * factor * per_temperature)[:, None]
        gradient_RV = (slope_RV - q.probability_RV * slope_RV.sum(dim=1, keepdim=True)) * weight_R1
        # An infinite row would otherwise reach the others through the head's weight, even at weight zero.
        gradient_RV = torch.where(is_finite_R[:, None], gradient_RV, 0.0)
        if label_weight_R is not None and labels_R is not None and cross_entropy_R is not None:
            ids_V = torch.arange(student_RV.shape[1], device=student_RV.device)
            is_label_RV = (ids_V == labels_R[:, None]).to(student_RV.dtype)
            label_slope_RV = untempered_q.probability_RV - is_label_RV
            is_trained_R = cross_entropy_R.isfinite() & (labels_R != IGNORE_INDEX)
            gradient_RV += torch.where(is_trained_R[:, None], label_slope_RV * label_weight_R[:, None], 0.0)
        if variant.is_capped:
            gradient_RV *= 1 - (student_RV * per_softcap) ** 2
            # Last, because the factor of a logit that is not finite makes NaN of zero.
            gradient_RV = torch.where(q.log_z_R1.isfinite(), gradient_RV, 0.0)
        student_RV.copy_(gradient_RV)
    return RowStatistics(
        values_R, cross_entropy_R, q.entropy_R, p.entropy_R, agrees_R, is_teacher_finite_R, is_finite_R
    )


class _Softmax(NamedTuple):
    """The distribution of each row of logits, and what is known of it."""

    probability_RV: Tensor
    entropy_R: Tensor
    log_z_R1: Tensor
    top_R1: Tensor


def _softmax(logits_RV: Tensor) -> _Softmax:
    """Return the softmax of logits; where all are -inf, NaN with a largest logit and a log-normaliser of -inf."""
    top_R1 = logits_RV.amax(dim=1, keepdim=True)
    # Where all is -inf there is nothing to shift by: -inf - -inf would be NaN.
    shift_R1 = torch.where(top_R1 == -math.inf, 0.0, top_R1)
    shifted_RV = logits_RV - shift_R1
    # The one exponential of each logit, which the compiler keeps because it is used more than once.
    weight_RV = shifted_RV.exp()
    z_R1 = weight_RV.sum(dim=1, keepdim=True)
    # Zero probability contributes nothing: 0·-inf would be NaN. NaN stays NaN.
    weighted_R1 = (weight_RV * shifted_RV.clamp(min=-1e4)).sum(dim=1, keepdim=True)
    entropy_R1 = z_R1.log() - weighted_R1 / z_R1
    return _Softmax(weight_RV * (1 / z_R1), entropy_R1[:, 0], z_R1.log() + shift_R1, top_R1)


def _implementation(variant: _Variant, student_RV: Tensor) -> tuple[_Compare, int]:
    """Return what compares rows, and how many it is given at once."""
    engine = _engine or _suitable_engine(variant, student_RV)
    if engine == "triton":
        return functools.partial(_compare_with_triton, variant=variant), sys.maxsize
    compare = _compiled(variant) if engine == "compiled" else functools.partial(_compare, variant=variant)

    def compare_with_tensors(student_RV: Tensor, *inputs: Any) -> RowStatistics:
        *others, numbers = inputs
        return compare(student_RV, *others, _as_tensors(numbers, student_RV.dtype, student_RV.device))

    return compare_with_tensors, tile_rows(student_RV)


def _suitable_engine(variant: _Variant, student_RV: Tensor) -> str:
    if student_RV.is_cuda:
        return "triton" if student_RV.dtype == torch.float32 and variant.kind in _triton_kinds() else "eager"
    return "compiled" if is_compiled(student_RV) else "eager"


def _compare_with_triton(*inputs: Any, variant: _Variant) -> RowStatistics:
    from gkd_trainer.divergence import triton

    return RowStatistics._make(triton.compare_rows(*inputs, **variant._asdict()))


@functools.cache
def _triton_kinds() -> frozenset[str]:
    try:
        from gkd_trainer.divergence import triton
    except ImportError:
        logger.warning("Triton can't be imported, and the divergence will be slower: pip install triton")
        return frozenset()
    return triton.KINDS


@functools.cache
def _compiled(variant: _Variant) -> _Compare:
    # Code of its own for each variant: the compiler counts the variants of one function, and stops at eight.
    code = _compare.__code__.replace(co_name="_".join(map(str, ("compare", *variant))))
    copy = types.FunctionType(code, _compare.__globals__, closure=_compare.__closure__)
    return functools.partial(fused(copy), variant=variant)


@functools.cache
def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function fused for any number of rows and tokens, or as it is where nothing can be compiled."""
    # Trying out which vector instructions the C++ compiler knows would take as long as all the rest; where it does not
    # know those of the processor, nothing is compiled.
    fastest = torch.compile(function, dynamic=True, fullgraph=True, options={"cpp.vec_isa_ok": True})
    is_first = True

    def run(*inputs: Any, **options: Any) -> Any:
        nonlocal fastest, is_first
        try:
            # The compiler warns of what it uses itself.
            with warnings.catch_warnings(action="ignore") if is_first else contextlib.nullcontext():
                is_first = False
                return fastest(*inputs, **options)
        except Exception as error:  # no compiler, a broken one, no folder to write to: whatever it may be
            if fastest is function:
                raise
            logger.warning("The divergence can't be compiled, and will be slower: %s: %s", type(error).__name__, error)
            fastest = function
        return function(*inputs, **options)

    return run


@functools.lru_cache(maxsize=64)
def _as_tensors(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    # Tensors, so that nothing is compiled again for other numbers; kept, since copies to a device take time.
    with torch.inference_mode(False):
        return tuple(torch.tensor(number, dtype=dtype, device=device) for number in numbers)
