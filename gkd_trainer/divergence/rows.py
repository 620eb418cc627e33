"""Compare student and teacher from rows of logits: values, statistics and, in place, the gradient.

Shapes: R rows of logits, one per token compared at once, V vocabulary. A tile is a slice of consecutive tokens.
p = teacher, q = student, both softmax(logits / temperature). The log-normaliser of a side is a shift, its largest logit
or 0, over the temperature, plus log_z.
A probability that underflows to zero counts as zero.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from gkd_trainer.batch_keys import IGNORE_INDEX
from gkd_trainer.divergence.objective import TERMS, Objective, Pair
from gkd_trainer.divergence.result import TokenDivergence

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)

_CPU_TILE_ELEMENTS = 2**19
"""Elements of a temporary on the CPU: 2 MiB in float32, so that those alive at once stay in cache."""

_TILE_ELEMENTS = 2**24
"""The same off the CPU, where many small kernels cost more than 64 MiB per temporary."""

_COMPILED_VOCABULARY = 4096
"""The vocabulary size from which fusing is worth the seconds of compilation."""

_engine: str | None = None
"""The implementation that tests force: "eager", "compiled" or "triton"; None picks one to suit the tensors."""


class RowComparison(Protocol):
    """Compares rows of a student's logits with a teacher's predictions for the same tokens."""

    def __call__(
        self,
        student_RV: Tensor,
        teacher: tuple[Tensor, ...],
        labels_R: Tensor | None = None,
        *,
        value_weight_R: Tensor | None = None,
        label_weight_R: Tensor | None = None,
    ) -> TokenDivergence:
        """Compare rows of logits, and turn them into a gradient if weights are given.

        Then `student_RV` is overwritten by value_weight·∂value/∂logits + label_weight·∂cross entropy/∂logits, with
        respect to the logits before the soft-cap; a row that is not finite gets zero. `label_weight_R` needs
        `value_weight_R`. `teacher` holds the teacher's tensors, with R as their first axis.
        """
        ...


@dataclass(frozen=True)
class LogitsComparison(RowComparison):
    """Compares with a teacher's logits, one tensor [R, V] in the student's dtype, float32 or float64.

    `softcap` is the student's. `temporary` is the maximum number of elements of a temporary, but at least one row's;
    None for a default. With `half`, which needs `has_kernel`, the gradient has this dtype (see `gradient_of`).
    """

    objective: Objective
    softcap: float | None = None
    temporary: int | None = None
    half: torch.dtype | None = None

    def __call__(
        self,
        student_RV: Tensor,
        teacher: tuple[Tensor, ...],
        labels_R: Tensor | None = None,
        *,
        value_weight_R: Tensor | None = None,
        label_weight_R: Tensor | None = None,
    ) -> TokenDivergence:
        """Compare; see `RowComparison`."""
        (teacher_RV,) = teacher
        numbers = self.objective.numbers(self.softcap)
        variant = _Variant(self.objective.kind, self.objective.temperature != 1, self.softcap is not None)
        compare, largest = _implementation(variant, student_RV, self.half)
        if self.temporary is not None and largest != sys.maxsize:
            largest = max(1, min(largest, self.temporary // student_RV.shape[1]))
        if largest == 2:  # an odd number would leave a tile of one row, for which the compiler compiles again
            largest = 1
        result: TokenDivergence | None = None
        for tile in tiles(student_RV.shape[0], largest):
            # As plain tensors: the compiler checks the size of a view's base, which changes.
            labels, value_weight, label_weight = (
                None if tensor is None else tensor[tile].data for tensor in (labels_R, value_weight_R, label_weight_R)
            )
            student_logits, teacher_logits = student_RV[tile].data, teacher_RV[tile].data
            part = compare(student_logits, teacher_logits, labels, value_weight, label_weight, numbers)
            # Copied: if each tile's results were kept, they would fragment the memory of the temporaries, and the
            # allocator would take new pages from the system, which costs half the time of the comparison.
            result = result or part.new_empty(student_RV.shape[0])
            result.write(tile, part)
        assert result is not None
        return result


def has_kernel(objective: Objective, logits_RV: Tensor) -> bool:
    """Return whether these rows are compared by a Triton kernel."""
    return (_engine or _suitable_engine(objective.kind, logits_RV)) == "triton"


def gradient_of(student_RV: Tensor, half: torch.dtype | None) -> Tensor:
    """Return the gradient that a comparison left in the memory of the logits, each row at the start of its own."""
    return student_RV if half is None else student_RV.view(half)[:, : student_RV.shape[1]]


def tile_size(logits_RV: Tensor) -> int:
    """Return how many rows are compared at once."""
    elements = _CPU_TILE_ELEMENTS if logits_RV.device.type == "cpu" else _TILE_ELEMENTS
    return max(1, elements // logits_RV.shape[1])


def tiles(N: int, largest: int, multiple: int = 1) -> Iterator[slice]:
    """Split N tokens into tiles of nearly equal size, at most `largest`; at least one tile, which may be empty.

    Each size but the last is a multiple of `multiple`, and so must `largest` be.
    """
    units = -(-N // multiple)
    count = max(1, -(-units * multiple // largest))
    ends = [min(N, units * index // count * multiple) for index in range(count + 1)]
    return (slice(start, end) for start, end in itertools.pairwise(ends))


def is_compiled(logits_RV: Tensor) -> bool:
    """Return whether code on these rows runs fused by the compiler."""
    if _engine is not None:
        return _engine == "compiled"
    # For a single row the compiler would compile again.
    return logits_RV.device.type == "cpu" and logits_RV.shape[1] >= _COMPILED_VOCABULARY and logits_RV.shape[0] > 1


def runs_in_triton(logits_RV: Tensor) -> bool:
    """Return whether these rows are compared by kernels, if there is one for the comparison."""
    if _engine is not None:
        return _engine == "triton"
    return logits_RV.is_cuda and logits_RV.dtype == torch.float32 and bool(_triton_kinds())


def top_or_zero(logits_RV: Tensor) -> Tensor:
    """Return each row's largest logit [R, 1], to subtract; 0 where all are -inf: -inf - -inf would be NaN."""
    top_R1 = logits_RV.amax(dim=1, keepdim=True)
    return torch.where(top_R1 == -math.inf, 0.0, top_R1)


def mask_cross_entropy(cross_entropy_R: Tensor, labels_R: Tensor, V: int) -> Tensor:
    """Return the cross entropy, with +inf where the label is outside the vocabulary, and 0 where it is IGNORE_INDEX."""
    is_outside_R = (labels_R < 0) | (labels_R >= V)
    return cross_entropy_R.masked_fill(is_outside_R, math.inf).masked_fill(labels_R == IGNORE_INDEX, 0.0)


def cross_entropy(logits_RV: Tensor, shift_R1: Tensor, log_z_R1: Tensor, labels_R: Tensor) -> Tensor:
    """Return the cross entropy of labels under logits with the log-normaliser shift + log_z; see `mask_cross_entropy`.

    The shift is a logit: its sum with log_z would round more coarsely than log_z.
    """
    V = logits_RV.shape[1]
    label_logits_R1 = logits_RV.gather(1, labels_R.clamp(0, V - 1)[:, None]) - shift_R1
    return mask_cross_entropy(log_z_R1[:, 0] - label_logits_R1[:, 0], labels_R, V)


def label_gradient(q_RV: Tensor, labels_R: Tensor, label_weight_R: Tensor, cross_entropy_R: Tensor) -> Tensor:
    """Return the gradient of the weighted cross entropy with respect to the logits, zero where it is not finite."""
    ids_V = torch.arange(q_RV.shape[1], device=q_RV.device)
    is_label_RV = (ids_V == labels_R[:, None]).to(q_RV.dtype)
    is_trained_R = cross_entropy_R.isfinite() & (labels_R != IGNORE_INDEX)
    return torch.where(is_trained_R[:, None], (q_RV - is_label_RV) * label_weight_R[:, None], 0.0)


class _Variant(NamedTuple):
    """The parameters that compiled code is specialised on; all others are tensors, to avoid compiling again."""

    kind: str
    is_tempered: bool
    is_capped: bool


class _Compare(Protocol):
    """The type of `_compare`."""

    def __call__(
        self,
        student_RV: Tensor,
        teacher_RV: Tensor,
        labels_R: Tensor | None,
        value_weight_R: Tensor | None,
        label_weight_R: Tensor | None,
        parameters: tuple[Tensor, ...],
        variant: _Variant,
        /,
    ) -> TokenDivergence: ...


class _CompareTile(Protocol):
    """Compares one tile, in any implementation; `numbers` are from `Objective.numbers`."""

    def __call__(
        self,
        student_RV: Tensor,
        teacher_RV: Tensor,
        labels_R: Tensor | None,
        value_weight_R: Tensor | None,
        label_weight_R: Tensor | None,
        numbers: tuple[float, ...],
        /,
    ) -> TokenDivergence: ...


def _compare(
    student_RV: Tensor,
    teacher_RV: Tensor,
    labels_R: Tensor | None,
    value_weight_R: Tensor | None,
    label_weight_R: Tensor | None,
    parameters: tuple[Tensor, ...],
    variant: _Variant,
) -> TokenDivergence:
    per_temperature, per_softcap, factor, first, second = parameters
    per_tempered = per_temperature if variant.is_tempered else None
    q, p = _softmax(student_RV, per_tempered), _softmax(teacher_RV, per_tempered)
    # Near-equal logits subtract without rounding; log q - log p would round both first, and so would the division by
    # the temperature. Of the log-normalisers only the logarithms are small: their shifts are logits too.
    gap_RV, shift_gap_R1 = student_RV - teacher_RV, q.shift_R1 - p.shift_R1
    # From here on the gap absorbs a whole nat of either side: the value, and often 0, would be that of other logits.
    is_comparable_R = shift_gap_R1[:, 0].abs() < 1 / torch.finfo(student_RV.dtype).eps
    if per_tempered is not None:
        gap_RV, shift_gap_R1 = gap_RV * per_tempered, shift_gap_R1 * per_tempered
    gap_RV = gap_RV - (shift_gap_R1 + (q.log_z_R1 - p.log_z_R1))
    # Tokens of probability zero on both sides have no gap: -inf - -inf.
    gap_RV = torch.where(q.probability_RV + p.probability_RV == 0, 0.0, gap_RV)
    pair = Pair(q.probability_RV, p.probability_RV, q.log_probability_RV, p.log_probability_RV, gap_RV)
    value_terms_RV, slope_RV = TERMS[variant.kind](pair, first, second)
    values_R = torch.where(is_comparable_R, value_terms_RV.sum(dim=1) * factor, math.nan)
    acceptance_R = torch.minimum(q.probability_RV, p.probability_RV).sum(dim=1)
    is_finite_R = values_R.isfinite()
    is_teacher_finite_R = p.log_z_R1[:, 0].isfinite()
    # A maximum of floats is fused with the sums; `any` is not.
    teacher_at_top_RV = torch.where(student_RV == q.shift_R1, teacher_RV, -math.inf)
    is_top_shared_R = teacher_at_top_RV.amax(dim=1) == p.shift_R1[:, 0]

    cross_entropy_R, untempered_q = None, q
    if labels_R is not None:
        untempered_q = _softmax(student_RV) if variant.is_tempered else q
        cross_entropy_R = cross_entropy(student_RV, untempered_q.shift_R1, untempered_q.log_z_R1, labels_R)
    if value_weight_R is not None:
        weight_R1 = (value_weight_R * factor * per_temperature)[:, None]
        gradient_RV = (slope_RV - q.probability_RV * slope_RV.sum(dim=1, keepdim=True)) * weight_R1
        # Otherwise an infinite row would reach the others through the head's weight, even at weight zero.
        gradient_RV = torch.where(is_finite_R[:, None], gradient_RV, 0.0)
        if label_weight_R is not None and labels_R is not None and cross_entropy_R is not None:
            gradient_RV += label_gradient(untempered_q.probability_RV, labels_R, label_weight_R, cross_entropy_R)
        if variant.is_capped:
            gradient_RV *= 1 - (student_RV * per_softcap) ** 2
            # Last, because the factor of a non-finite logit turns zero into NaN.
            gradient_RV = torch.where(q.log_z_R1.isfinite(), gradient_RV, 0.0)
        student_RV.copy_(gradient_RV)
    return TokenDivergence(
        values_N=values_R,
        cross_entropy_N=cross_entropy_R,
        student_entropy_N=q.entropy_R,
        teacher_entropy_N=p.entropy_R,
        agrees_N=is_top_shared_R & is_teacher_finite_R & q.log_z_R1[:, 0].isfinite(),
        is_teacher_finite_N=is_teacher_finite_R,
        is_finite_N=is_finite_R,
        acceptance_N=acceptance_R,
    )


class _Softmax(NamedTuple):
    """The distribution of each row of logits, its logarithm (logit - shift) / temperature - log_z, and its entropy."""

    probability_RV: Tensor
    log_probability_RV: Tensor
    entropy_R: Tensor
    shift_R1: Tensor
    log_z_R1: Tensor


def _softmax(logits_RV: Tensor, per_temperature: Tensor | None = None) -> _Softmax:
    """Return the softmax of logits / temperature; that of a row of only -inf is NaN, and its log_z -inf."""
    shift_R1 = top_or_zero(logits_RV)
    shifted_RV = logits_RV - shift_R1
    if per_temperature is not None:
        shifted_RV = shifted_RV * per_temperature
    # The only exponential of each logit; the compiler keeps it because it is used more than once.
    weight_RV = shifted_RV.exp()
    z_R1 = weight_RV.sum(dim=1, keepdim=True)
    log_z_R1 = z_R1.log()
    # Zero probability contributes nothing: 0·-inf would be NaN. NaN stays NaN.
    weighted_R1 = (weight_RV * shifted_RV.clamp(min=-1e4)).sum(dim=1, keepdim=True)
    entropy_R1 = log_z_R1 - weighted_R1 / z_R1
    return _Softmax(weight_RV * (1 / z_R1), shifted_RV - log_z_R1, entropy_R1[:, 0], shift_R1, log_z_R1)


def _implementation(variant: _Variant, student_RV: Tensor, half: torch.dtype | None) -> tuple[_CompareTile, int]:
    """Return the function that compares a tile, and the maximum number of rows to give it."""
    engine = _engine or _suitable_engine(variant.kind, student_RV)
    if engine == "triton":
        from gkd_trainer.divergence import triton

        return functools.partial(triton.compare_rows, **variant._asdict(), half=half), sys.maxsize
    compare: _Compare = _compiled(variant) if engine == "compiled" else _compare

    def compare_tile(
        student_RV: Tensor,
        teacher_RV: Tensor,
        labels_R: Tensor | None,
        value_weight_R: Tensor | None,
        label_weight_R: Tensor | None,
        numbers: tuple[float, ...],
        /,
    ) -> TokenDivergence:
        parameters = _as_tensors(numbers, student_RV.dtype, student_RV.device)
        return compare(student_RV, teacher_RV, labels_R, value_weight_R, label_weight_R, parameters, variant)

    return compare_tile, tile_size(student_RV)


def _suitable_engine(kind: str, student_RV: Tensor) -> str:
    if student_RV.is_cuda:
        return "triton" if student_RV.dtype == torch.float32 and kind in _triton_kinds() else "eager"
    return "compiled" if is_compiled(student_RV) else "eager"


@functools.cache
def _triton_kinds() -> frozenset[str]:
    try:
        from gkd_trainer.divergence import triton
    except ImportError:
        logger.warning("Triton can't be imported, and the divergence will be slower: pip install triton")
        return frozenset()
    try:
        triton.build_launcher()
    except Exception as error:  # of the compiler, of the linker, or Triton's own
        logger.warning(
            "Triton can't launch kernels here, and the divergence will be slower: it needs a C compiler and Python's "
            "headers (apt install gcc python3-dev). %s: %s",
            type(error).__name__,
            error,
        )
        return frozenset()
    return triton.KINDS


@functools.cache
def _compiled(variant: _Variant) -> _Compare:
    # Separate code for each variant: the compiler counts the variants of one function, and stops at eight.
    code = _compare.__code__.replace(co_name="_".join(map(str, ("compare", *variant))))
    copy: _Compare = types.FunctionType(code, _compare.__globals__, closure=_compare.__closure__)
    return Fused(copy)


class Fused(Generic[P, T]):
    """A function compiled for any number of rows and tokens, or run eagerly if it can't be compiled."""

    def __init__(self, function: Callable[P, T]) -> None:
        self._function = function
        self._fastest: Callable[P, T] | None = None

    def __call__(self, *inputs: P.args, **options: P.kwargs) -> T:
        """Call the function, compiling it the first time."""
        is_first = self._fastest is None
        try:
            if self._fastest is None:
                # Testing which vector instructions the C++ compiler supports would take as long as everything else; if
                # it does not support the processor's, compiling fails.
                self._fastest = torch.compile(
                    self._function, dynamic=True, fullgraph=True, options={"cpp.vec_isa_ok": True}
                )
            # The compiler's warnings are about its own code.
            with warnings.catch_warnings(action="ignore") if is_first else contextlib.nullcontext():
                return self._fastest(*inputs, **options)
        except Exception as error:  # no compiler, a broken one, no folder to write to, or anything else
            if self._fastest is self._function:
                raise
            logger.warning("The divergence can't be compiled, and will be slower: %s: %s", type(error).__name__, error)
            self._fastest = self._function
        return self._function(*inputs, **options)


@functools.lru_cache(maxsize=64)
def _as_tensors(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    # Tensors, so that other numbers don't compile again; cached, since copies to a device take time.
    with torch.inference_mode(False):
        return tuple(torch.tensor(number, dtype=dtype, device=device) for number in numbers)
