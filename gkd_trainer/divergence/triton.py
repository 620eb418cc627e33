"""Compare rows of logits in one Triton kernel: the computation of `rows.py`, in float32 registers.

Shapes: R rows of logits (one per token), V vocabulary, C a chunk of it. One program reads its row three times: for the
normalisers, for the sums over the vocabulary, and for the gradient, which it writes in place. The KLs take two passes,
since their values add up along with the normalisers. Each thread keeps its own sums until the end of a pass.
"""

# Triton compiles the kernels from their source and has no types for it.
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from gkd_trainer.divergence.result import TokenDivergence

KINDS = frozenset({"forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation", "alpha_beta"})
"""The keys of `objective.TERMS` that `_terms` below also has; plain torch does the others."""

CHUNK = 2048
"""How many logits of each side a program holds at once: eight per thread, so that two programs fit on one SM."""

LAUNCH: dict[str, int | bool] = {"num_warps": 8, "enable_fp_fusion": True}
"""How to compile the kernel. Fusion is Triton's default, but Triton 3.9 warns if it is not set."""

if torch.version.hip is None:
    LAUNCH["maxnreg"] = 65_536 // (2 * 8 * 32)  # an SM's registers, over the threads of two programs

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_FAR = tl.constexpr(1e4)
"""Stands for infinity when multiplied by probability zero, as in `objective.py`."""

_COMPARABLE = tl.constexpr(2.0**23)
"""From which difference on the gap of two logits absorbs a whole nat, as in `rows.py`."""

_HAS_PTX = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)
"""Whether the processor's own exponential and logarithm, of base two, can be called."""


def build_launcher() -> None:
    """Build what launches kernels, once per machine; raise what Triton raises without a C compiler or a GPU."""
    triton.runtime.driver.active.get_current_target()


def compare_rows(
    student_RV: Tensor,
    teacher_RV: Tensor,
    labels_R: Tensor | None,
    value_weight_R: Tensor | None,
    label_weight_R: Tensor | None,
    numbers: tuple[float, ...],
    *,
    kind: str,
    is_tempered: bool,
    is_capped: bool,
    half: torch.dtype | None = None,
    chunk: int = CHUNK,
) -> TokenDivergence:
    """Compare float32 rows; `student_RV` is overwritten as by `LogitsComparison`, whose `half` this is.

    `numbers` are from `Objective.numbers`.
    """
    R, V = student_RV.shape
    statistics = student_RV.new_empty(8, R)
    if R:
        per_temperature, per_softcap, factor, first, second = numbers
        rows_RV = _with_adjacent_columns(student_RV)
        teacher_RV = _with_adjacent_columns(teacher_RV)
        gradient_RV = rows_RV if half is None else rows_RV.view(half)
        # The kernel assumes that their elements are adjacent. It never reads the placeholder for None.
        per_row = [
            statistics if tensor is None else tensor.contiguous()
            for tensor in (labels_R, value_weight_R, label_weight_R)
        ]
        # Triton launches on the current device, which may not be that of the tensors.
        with torch.cuda.device_of(student_RV):
            _compare_kernel[(R,)](
                *(rows_RV, teacher_RV, gradient_RV, *per_row, statistics),
                *(rows_RV.stride(0), teacher_RV.stride(0), gradient_RV.stride(0), R, V),
                *(per_temperature, per_softcap, factor, first, second),
                KIND=kind,
                IS_TEMPERED=is_tempered,
                IS_CAPPED=is_capped,
                HAS_LABELS=labels_R is not None,
                HAS_GRADIENT=value_weight_R is not None,
                HAS_LABEL_WEIGHT=labels_R is not None and label_weight_R is not None,
                CHUNK=min(chunk, triton.next_power_of_2(V)),
                **LAUNCH,
            )
        if value_weight_R is not None and rows_RV is not student_RV:
            student_RV.copy_(rows_RV)
    values_R, cross_entropy_R, log_z_q_R, log_z_p_R, entropy_q_R, entropy_p_R, agrees_R, acceptance_R = statistics
    is_teacher_finite_R = log_z_p_R.isfinite()
    return TokenDivergence(
        values_N=values_R,
        cross_entropy_N=None if labels_R is None else cross_entropy_R,
        student_entropy_N=entropy_q_R,
        teacher_entropy_N=entropy_p_R,
        agrees_N=(agrees_R > 0) & is_teacher_finite_R & log_z_q_R.isfinite(),
        is_teacher_finite_N=is_teacher_finite_R,
        is_finite_N=values_R.isfinite(),
        acceptance_N=acceptance_R,
    )


def _with_adjacent_columns(logits_RV: Tensor) -> Tensor:
    """Return the logits, copied if necessary, with adjacent elements in a row, as the kernel reads them."""
    return logits_RV if logits_RV.stride(1) == 1 else logits_RV.contiguous()


@triton.jit(do_not_specialize=["R"])  # or it would be compiled again for a last tile
def _compare_kernel(
    student_ptr,
    teacher_ptr,
    gradient_ptr,
    labels_ptr,
    value_weight_ptr,
    label_weight_ptr,
    statistics_ptr,
    student_stride,
    teacher_stride,
    gradient_stride,
    R,
    V,
    per_temperature,
    per_softcap,
    factor,
    first,
    second,
    KIND: tl.constexpr,
    IS_TEMPERED: tl.constexpr,
    IS_CAPPED: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    HAS_LABEL_WEIGHT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    IS_KL: tl.constexpr = KIND == "forward_kl" or KIND == "reverse_kl"
    row = tl.program_id(0).to(tl.int64)  # in 32 bits, the offset of a row beyond 2^31 elements would overflow
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    gradient_ptr += row * gradient_stride
    statistics_ptr += row

    top_q, z_q, top_p, z_p, z, mean_gap = _normalise(
        student_ptr, teacher_ptr, V, per_temperature, KIND, HAS_LABELS and IS_TEMPERED, CHUNK
    )
    log_z_q, log_z_p = tl.log(z_q), tl.log(z_p)
    gap_of_z = (top_q - top_p) * per_temperature + (log_z_q - log_z_p)
    sides = (top_q, tl.log2(z_q), top_p, tl.log2(z_p), gap_of_z)
    numbers = (per_temperature, per_softcap, first, second)
    zero_C = tl.zeros([CHUNK], tl.float32)
    sums = (zero_C, zero_C, zero_C, zero_C, zero_C, zero_C)
    value, slope_sum = 0.0, 0.0
    if not (IS_KL and HAS_GRADIENT):
        sums = _add_up(student_ptr, teacher_ptr, V, sides, numbers, sums, KIND, CHUNK)
    if KIND == "forward_kl":
        value = mean_gap * per_temperature + gap_of_z
    elif KIND == "reverse_kl":
        value = mean_gap * per_temperature - gap_of_z
        slope_sum = value
    else:
        value, slope_sum = tl.sum(sums[0], axis=0) * factor, tl.sum(sums[1], axis=0)
    value += (log_z_q + log_z_p) * 0.0  # NaN if a side is not finite, which its terms may hide
    value = tl.where(tl.abs(top_q - top_p) < _COMPARABLE, value, float("nan"))

    label, cross_entropy = -1, 0.0
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
        is_token = (label >= 0) & (label < V)
        label_logit = tl.load(student_ptr + label, mask=is_token, other=-float("inf"))
        cross_entropy = tl.where(is_token, tl.log(z) - (label_logit - top_q), float("inf"))
        cross_entropy = tl.where(label == -100, 0.0, cross_entropy)
        tl.store(statistics_ptr + R, cross_entropy)
    # Before the gradient, which needs the registers.
    tl.store(statistics_ptr, value)
    tl.store(statistics_ptr + 2 * R, log_z_q)
    tl.store(statistics_ptr + 3 * R, log_z_p)

    if HAS_GRADIENT:
        weight = tl.load(value_weight_ptr + row) * factor * per_temperature
        of_value = (weight, slope_sum, tl.abs(value) < float("inf"))
        of_label = (0.0, label, 0.0, False)
        if HAS_LABEL_WEIGHT:
            is_trained = (tl.abs(cross_entropy) < float("inf")) & (label != -100)
            of_label = (tl.load(label_weight_ptr + row), label, tl.log2(z), is_trained)
        # All threads must read the label's logit before one overwrites it.
        tl.debug_barrier()
        sums = _write_gradient(
            student_ptr,
            teacher_ptr,
            gradient_ptr,
            V,
            sides,
            numbers,
            of_value,
            of_label,
            sums,
            KIND,
            IS_CAPPED,
            HAS_LABEL_WEIGHT,
            CHUNK,
        )
    _, _, entropy_q_C, entropy_p_C, acceptance_C, agrees_C = sums
    tl.store(statistics_ptr + 4 * R, tl.sum(entropy_q_C, axis=0) * -_LN_2)
    tl.store(statistics_ptr + 5 * R, tl.sum(entropy_p_C, axis=0) * -_LN_2)
    tl.store(statistics_ptr + 6 * R, tl.max(agrees_C, axis=0))
    tl.store(statistics_ptr + 7 * R, tl.sum(acceptance_C, axis=0))


@triton.jit
def _normalise(
    student_ptr, teacher_ptr, V, per_temperature, KIND: tl.constexpr, NEEDS_Z: tl.constexpr, CHUNK: tl.constexpr
):
    """Return each side's largest logit and z, the student's z at temperature 1, and the mean gap between the logits.

    z is Σ exp((logit - largest) / temperature). The mean is the expectation that a KL needs.
    """
    scale = per_temperature * _LOG2_E
    zero_C = tl.zeros([CHUNK], tl.float32)
    top_q_C, top_p_C = zero_C + _LOWEST, zero_C + _LOWEST
    z_q_C, z_p_C, z_C, gap_C = zero_C, zero_C, zero_C, zero_C
    for start in range(0, V, CHUNK):
        student_C, teacher_C = _load(student_ptr, start, V, CHUNK), _load(teacher_ptr, start, V, CHUNK)
        kept_q_C, added_q_C, is_higher_q_C = _rescaled(student_C, top_q_C, scale)
        kept_p_C, added_p_C, is_higher_p_C = _rescaled(teacher_C, top_p_C, scale)
        z_q_C, z_p_C = z_q_C * kept_q_C + added_q_C, z_p_C * kept_p_C + added_p_C
        if KIND == "forward_kl":
            gap_C = _plus_gap(gap_C, teacher_C - student_C, kept_p_C, added_p_C, is_higher_p_C)
        elif KIND == "reverse_kl":
            gap_C = _plus_gap(gap_C, student_C - teacher_C, kept_q_C, added_q_C, is_higher_q_C)
        if NEEDS_Z:
            kept_C, added_C, _ = _rescaled(student_C, top_q_C, _LOG2_E)
            z_C = z_C * kept_C + added_C
        top_q_C, top_p_C = tl.maximum(top_q_C, student_C), tl.maximum(top_p_C, teacher_C)
    top_q, top_p = tl.max(top_q_C, axis=0), tl.max(top_p_C, axis=0)
    share_q_C, share_p_C = _exp2((top_q_C - top_q) * scale), _exp2((top_p_C - top_p) * scale)
    z_q, z_p = tl.sum(z_q_C * share_q_C, axis=0), tl.sum(z_p_C * share_p_C, axis=0)
    z, mean_gap = z_q, 0.0
    if NEEDS_Z:
        z = tl.sum(z_C * _exp2((top_q_C - top_q) * _LOG2_E), axis=0)
    if KIND == "forward_kl":
        mean_gap = tl.sum(_product(share_p_C, gap_C), axis=0) / z_p
    elif KIND == "reverse_kl":
        mean_gap = tl.sum(_product(share_q_C, gap_C), axis=0) / z_q
    return top_q, z_q, top_p, z_p, z, mean_gap


@triton.jit
def _rescaled(logits_C, top_C, scale):
    """Return the factor of each sum of exponentials when its largest logit may rise, what is added, and if it rises."""
    above_C = logits_C - top_C
    smaller_C = _exp2(-tl.abs(above_C) * scale)
    is_higher_C = above_C > 0
    return tl.where(is_higher_C, smaller_C, 1.0), tl.where(is_higher_C, 1.0, smaller_C), is_higher_C


@triton.jit
def _plus_gap(sum_C, gap_C, kept_C, added_C, is_higher_C):
    """Return sum·kept + gap·added, without the part whose factor is zero: it may be infinite, or NaN."""
    all_C = sum_C * kept_C + gap_C * added_C
    # One factor is 1. Cheaper than a look at both: the NaN of an infinity times zero. That of a logit is in z too.
    return tl.where(all_C == all_C, all_C, tl.where(is_higher_C, gap_C, sum_C))


@triton.jit
def _product(probability_C, gap_C):
    """Return the product, which is zero where the probability is: the gap may be infinite, or NaN."""
    return tl.where(probability_C == 0, 0.0, probability_C * gap_C)


@triton.jit
def _add_up(student_ptr, teacher_ptr, V, sides, numbers, sums, KIND: tl.constexpr, CHUNK: tl.constexpr):
    """Return the sums over the vocabulary."""
    last = (V - 1) // CHUNK * CHUNK
    for done in range(0, V, CHUNK):
        # Backwards: what the pass before read last may still be in the cache.
        student_C, teacher_C = _load(student_ptr, last - done, V, CHUNK), _load(teacher_ptr, last - done, V, CHUNK)
        pair = _pair(student_C, teacher_C, sides, numbers)
        sums = _plus(sums, student_C, teacher_C, sides, pair, _terms(pair, numbers, KIND))
    return sums


@triton.jit
def _write_gradient(
    student_ptr,
    teacher_ptr,
    gradient_ptr,
    V,
    sides,
    numbers,
    of_value,
    of_label,
    sums,
    KIND: tl.constexpr,
    IS_CAPPED: tl.constexpr,
    HAS_LABEL_WEIGHT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write the gradient, and return the sums, to which only the KLs add."""
    value_weight, slope_sum, is_finite = of_value
    label_weight, label, log2_z, is_trained = of_label
    top_q, log2_z_q, _, _, _ = sides
    _, per_softcap, _, _ = numbers
    for start in range(0, V, CHUNK):
        student_C, teacher_C = _load(student_ptr, start, V, CHUNK), _load(teacher_ptr, start, V, CHUNK)
        pair = _pair(student_C, teacher_C, sides, numbers)
        terms = _terms(pair, numbers, KIND)
        if KIND == "forward_kl" or KIND == "reverse_kl":
            sums = _plus(sums, student_C, teacher_C, sides, pair, terms)
        gradient_C = tl.where(is_finite, (terms[1] - pair[0] * slope_sum) * value_weight, 0.0)
        if HAS_LABEL_WEIGHT:
            is_label_C = start + tl.arange(0, CHUNK) == label
            label_slope_C = _exp2((student_C - top_q) * _LOG2_E - log2_z) - is_label_C.to(tl.float32)
            gradient_C += tl.where(is_trained, label_slope_C * label_weight, 0.0)
        if IS_CAPPED:
            capped_C = student_C * per_softcap
            # Last, because the factor of a non-finite logit turns zero into NaN.
            gradient_C = tl.where(tl.abs(log2_z_q) < float("inf"), gradient_C * (1.0 - capped_C * capped_C), 0.0)
        # It overwrites logits that other threads read: those of this chunk, if it is shorter than the program and
        # several threads have each, and, by a gradient of half the size, those of earlier chunks.
        tl.debug_barrier()
        _store(gradient_ptr, gradient_C, start, V, CHUNK)
    return sums


@triton.jit
def _load(ptr, start, V, CHUNK: tl.constexpr):
    """Return a chunk, with -inf beyond the vocabulary. Loads with a mask are not vectorised: only the last has one."""
    ids_C = start + tl.arange(0, CHUNK)
    return tl.load(ptr + ids_C) if start + CHUNK <= V else tl.load(ptr + ids_C, mask=ids_C < V, other=-float("inf"))


@triton.jit
def _store(ptr, values_C, start, V, CHUNK: tl.constexpr):
    ids_C = start + tl.arange(0, CHUNK)
    if ptr.dtype.element_ty == tl.float16:  # see projection.FLOAT16_LIMIT
        values_C = tl.minimum(tl.maximum(values_C, -65504.0), 65504.0)
    if start + CHUNK <= V:
        tl.store(ptr + ids_C, values_C.to(ptr.dtype.element_ty))
    else:
        tl.store(ptr + ids_C, values_C.to(ptr.dtype.element_ty), mask=ids_C < V)


@triton.jit
def _pair(student_C, teacher_C, sides, numbers):
    """Return q and p, their logarithms of base two, and the gap: `objective.Pair`."""
    top_q, log2_z_q, top_p, log2_z_p, gap_of_z = sides
    per_temperature, _, _, _ = numbers
    scale = per_temperature * _LOG2_E
    log2_q_C, log2_p_C = (student_C - top_q) * scale - log2_z_q, (teacher_C - top_p) * scale - log2_z_p
    # Near-equal logits subtract without rounding.
    gap_C = (student_C - teacher_C) * per_temperature - gap_of_z
    return _exp2(log2_q_C), _exp2(log2_p_C), log2_q_C, log2_p_C, gap_C


@triton.jit
def _plus(sums, student_C, teacher_C, sides, pair, terms):
    """Return the sums with those of a chunk added; agreement is a sum of ones, where both sides have the largest."""
    value_C, slope_sum_C, entropy_q_C, entropy_p_C, acceptance_C, agrees_C = sums
    top_q, _, top_p, _, _ = sides
    q_C, p_C, log2_q_C, log2_p_C, _ = pair
    return (
        value_C + terms[0],
        slope_sum_C + terms[1],
        entropy_q_C + q_C * tl.maximum(log2_q_C, -_FAR),
        entropy_p_C + p_C * tl.maximum(log2_p_C, -_FAR),
        acceptance_C + tl.minimum(q_C, p_C, propagate_nan=tl.PropagateNan.ALL),
        tl.where((student_C == top_q) & (teacher_C == top_p), 1.0, agrees_C),
    )


@triton.jit
def _terms(pair, numbers, KIND: tl.constexpr):
    """Return the terms of the value and the slope, like the functions in `objective.TERMS`."""
    q_C, p_C, log2_q_C, log2_p_C, gap_C = pair
    _, _, first, second = numbers
    if KIND == "forward_kl":
        value_C, slope_C = q_C, q_C - p_C  # the value is known
    elif KIND == "reverse_kl":
        value_C, slope_C = q_C, _product(q_C, gap_C)
    elif KIND == "skew_kl":
        _, log_p_over_m_C = _log_over_mixture(gap_C, first, second)
        value_C, slope_C = p_C * log_p_over_m_C, -second * q_C * _expm1(log_p_over_m_C)
    elif KIND == "skew_reverse_kl":
        log_q_over_m_C, _ = _log_over_mixture(gap_C, second, first)
        value_C = q_C * log_q_over_m_C
        slope_C = value_C - first * q_C * _expm1(log_q_over_m_C)
    elif KIND == "total_variation":
        value_C = 0.5 * tl.abs(q_C - p_C)
        slope_C = q_C * tl.where(gap_C > 0, 0.5, tl.where(gap_C < 0, -0.5, 0.0))
    elif KIND == "alpha_beta":
        # See objective.py. The largest number stands for an infinite gap, and for none between zeros (NaN).
        size_C = tl.abs(gap_C)
        size_C = tl.where(size_C < -_LOWEST, size_C, -_LOWEST)
        is_q_larger_C = gap_C > 0
        a_C, b_C = tl.where(is_q_larger_C, first, second), tl.where(is_q_larger_C, second, first)
        power_C = _exp2((first + second) * tl.maximum(log2_q_C, log2_p_C))
        cross_C = power_C * _exp2(-a_C * size_C * _LOG2_E)
        per_a_C = tl.where(is_q_larger_C, -1 / first, -1 / second)
        per_b_C = tl.where(is_q_larger_C, -1 / second, -1 / first)
        rise_C = power_C * _expm1(-a_C * size_C) * per_a_C
        fall_C = cross_C * _expm1(-b_C * size_C) * per_b_C
        value_C = (rise_C - fall_C) * (1 / (first + second))
        slope_C = tl.where(is_q_larger_C, rise_C, -fall_C)
    else:
        tl.static_assert(KIND == "jsd", "a kind without a kernel")
        log_q_over_m_C, log_p_over_m_C = _log_over_mixture(gap_C, first, second)
        slope_C = second * q_C * log_q_over_m_C
        value_C = slope_C + first * p_C * log_p_over_m_C
    return value_C, slope_C


@triton.jit
def _log_over_mixture(gap_C, share_p, share_q):
    """Return log(q/m) and log(p/m), with m = share_p·p + share_q·q, both within 1e-6 (of the gap, if above one).

    That of the larger share is right in proportion, within 2e-6: it is small, if the other share is. An exponential and
    a logarithm within 2^-22 suffice for this.
    """
    is_mostly_p = share_p > share_q
    gap_C = tl.minimum(_at_least(tl.where(is_mostly_p, -gap_C, gap_C), -80.0), 80.0)
    log_more_C = -_log1p(tl.minimum(share_p, share_q) * _expm1(-gap_C))
    log_less_C = log_more_C - gap_C
    return tl.where(is_mostly_p, log_less_C, log_more_C), tl.where(is_mostly_p, log_more_C, log_less_C)


@triton.jit
def _at_least(gap_C, lowest):
    """Return the gaps from a lowest one up, which also stands for NaN: no probability then, or one that is NaN too."""
    return tl.where(gap_C > lowest, gap_C, lowest)


@triton.jit
def _expm1(x_C):
    """Return exp(x) - 1; the polynomials here and below are the minimax ones of relative error."""
    near_C = x_C * (1.0 + x_C * (0.4999965 + x_C * (0.16666818 + x_C * (0.04182287 + x_C * 0.008333326))))
    return tl.where(tl.abs(x_C) < 0.3, near_C, _exp2(x_C * _LOG2_E) - 1)


@triton.jit
def _log1p(x_C):
    near_C = 0.1987018 + x_C * (-0.1651108 + x_C * (0.1651394 - x_C * 0.1475348))
    near_C = -0.4999997 + x_C * (0.3333571 + x_C * (-0.2500387 + x_C * near_C))
    return tl.where(tl.abs(x_C) < 0.3, x_C + x_C * x_C * near_C, _log2(1 + x_C) * _LN_2)


@triton.jit
def _exp2(x):
    if _HAS_PTX:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)


@triton.jit
def _log2(x):
    if _HAS_PTX:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)
