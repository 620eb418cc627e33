"""Compare rows of logits in one Triton kernel: the computation of `rows.py`, in float32 registers.

Shapes: R rows of logits (one per token), V vocabulary, C a chunk of it. One program reads its row three times: for the
normalisers and top tokens, for value, entropies and slope, and for the gradient, which it writes in place.
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

LAUNCH: dict[str, int | bool] = {"num_warps": 8, "enable_fp_fusion": True}
"""How to compile the kernel. Fusion is Triton's default, but Triton 3.9 warns if it is not set."""


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
    chunk: int = 4096,
) -> TokenDivergence:
    """Compare float32 rows; `student_RV` is overwritten as in `RowComparison`.

    `numbers` are from `Objective.numbers`.
    """
    R, V = student_RV.shape
    values_R, cross_entropy_R, entropy_q_R, entropy_p_R, log_z_q_R, log_z_p_R, agrees_R, acceptance_R = (
        student_RV.new_empty(8, R).unbind()
    )
    if R:
        per_temperature, per_softcap, factor, first, second = numbers
        rows_RV = _with_adjacent_columns(student_RV)
        teacher_RV = _with_adjacent_columns(teacher_RV)
        # The kernel assumes that their elements are adjacent. It never reads the placeholder for None.
        per_row = [
            values_R if tensor is None else tensor.contiguous() for tensor in (labels_R, value_weight_R, label_weight_R)
        ]
        # Triton launches on the current device, which may not be that of the tensors.
        with torch.cuda.device_of(student_RV):
            _compare_kernel[(R,)](
                rows_RV,
                teacher_RV,
                *per_row,
                *(values_R, cross_entropy_R, entropy_q_R, entropy_p_R, log_z_q_R, log_z_p_R, agrees_R, acceptance_R),
                *(rows_RV.stride(0), teacher_RV.stride(0), V),
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


@triton.jit
def _compare_kernel(
    student_ptr,
    teacher_ptr,
    labels_ptr,
    value_weight_ptr,
    label_weight_ptr,
    values_ptr,
    cross_entropy_ptr,
    entropy_q_ptr,
    entropy_p_ptr,
    log_z_q_ptr,
    log_z_p_ptr,
    agrees_ptr,
    acceptance_ptr,
    student_stride,
    teacher_stride,
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
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    ids_C = tl.arange(0, CHUNK)

    top_q, z_q, top_p, z_p, top, z = -float("inf"), 0.0, -float("inf"), 0.0, -float("inf"), 0.0
    for start in range(0, V, CHUNK):
        is_inside_C = start + ids_C < V
        logits_C = tl.load(student_ptr + start + ids_C, mask=is_inside_C, other=-float("inf"))
        teacher_C = tl.load(teacher_ptr + start + ids_C, mask=is_inside_C, other=-float("inf"))
        top_q, z_q = _normalise(logits_C * per_temperature, top_q, z_q)
        top_p, z_p = _normalise(teacher_C * per_temperature, top_p, z_p)
        if HAS_LABELS and IS_TEMPERED:
            top, z = _normalise(logits_C, top, z)
    log_z_q = tl.log(z_q) + tl.where(top_q == -float("inf"), 0.0, top_q)
    log_z_p = tl.log(z_p) + tl.where(top_p == -float("inf"), 0.0, top_p)

    value, slope_sum, entropy_q, entropy_p, agrees, acceptance = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for start in range(0, V, CHUNK):
        is_inside_C = start + ids_C < V
        student_C = tl.load(student_ptr + start + ids_C, mask=is_inside_C, other=-float("inf")) * per_temperature
        teacher_C = tl.load(teacher_ptr + start + ids_C, mask=is_inside_C, other=-float("inf")) * per_temperature
        log_q_C, log_p_C = student_C - log_z_q, teacher_C - log_z_p
        q_C, p_C = tl.exp(log_q_C), tl.exp(log_p_C)
        gap_C = _gap(student_C, teacher_C, q_C, p_C, log_z_q, log_z_p)
        value_C, slope_C = _terms(q_C, p_C, log_q_C, log_p_C, gap_C, first, second, KIND)
        value += tl.sum(value_C, axis=0)
        slope_sum += tl.sum(slope_C, axis=0)
        entropy_q -= tl.sum(tl.where(q_C == 0, 0.0, q_C * log_q_C), axis=0)
        entropy_p -= tl.sum(tl.where(p_C == 0, 0.0, p_C * log_p_C), axis=0)
        acceptance += tl.sum(tl.minimum(q_C, p_C, propagate_nan=tl.PropagateNan.ALL), axis=0)
        is_top_C = (student_C == top_q) & (teacher_C == top_p) & is_inside_C
        agrees = tl.maximum(agrees, tl.max(is_top_C.to(tl.float32), axis=0))
    value *= factor
    tl.store(values_ptr + row, value)
    tl.store(entropy_q_ptr + row, entropy_q)
    tl.store(entropy_p_ptr + row, entropy_p)
    tl.store(log_z_q_ptr + row, log_z_q)
    tl.store(log_z_p_ptr + row, log_z_p)
    tl.store(agrees_ptr + row, agrees)
    tl.store(acceptance_ptr + row, acceptance)

    label = -1
    log_z = log_z_q
    cross_entropy = 0.0
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
        if IS_TEMPERED:
            log_z = tl.log(z) + tl.where(top == -float("inf"), 0.0, top)
        is_token = (label >= 0) & (label < V)
        label_logit = tl.load(student_ptr + label, mask=is_token, other=-float("inf"))
        cross_entropy = tl.where(is_token, log_z - label_logit, float("inf"))
        cross_entropy = tl.where(label == -100, 0.0, cross_entropy)
        tl.store(cross_entropy_ptr + row, cross_entropy)

    if HAS_GRADIENT:
        # All threads must read the label's logit before one overwrites it.
        tl.debug_barrier()
        value_weight = tl.load(value_weight_ptr + row) * factor * per_temperature
        is_finite = tl.abs(value) < float("inf")
        is_student_finite = tl.abs(log_z_q) < float("inf")
        is_trained = False
        label_weight = 0.0
        if HAS_LABEL_WEIGHT:
            label_weight = tl.load(label_weight_ptr + row)
            is_trained = (tl.abs(cross_entropy) < float("inf")) & (label != -100)
        for start in range(0, V, CHUNK):
            is_inside_C = start + ids_C < V
            logits_C = tl.load(student_ptr + start + ids_C, mask=is_inside_C, other=-float("inf"))
            teacher_C = tl.load(teacher_ptr + start + ids_C, mask=is_inside_C, other=-float("inf")) * per_temperature
            student_C = logits_C * per_temperature
            log_q_C, log_p_C = student_C - log_z_q, teacher_C - log_z_p
            q_C, p_C = tl.exp(log_q_C), tl.exp(log_p_C)
            gap_C = _gap(student_C, teacher_C, q_C, p_C, log_z_q, log_z_p)
            _, slope_C = _terms(q_C, p_C, log_q_C, log_p_C, gap_C, first, second, KIND)
            gradient_C = tl.where(is_finite, (slope_C - q_C * slope_sum) * value_weight, 0.0)
            if HAS_LABEL_WEIGHT:
                label_slope_C = tl.exp(logits_C - log_z) - (start + ids_C == label).to(tl.float32)
                gradient_C += tl.where(is_trained, label_slope_C * label_weight, 0.0)
            if IS_CAPPED:
                gradient_C *= 1.0 - (logits_C * per_softcap) * (logits_C * per_softcap)
                # Last, because the factor of a non-finite logit turns zero into NaN.
                gradient_C = tl.where(is_student_finite, gradient_C, 0.0)
            tl.store(student_ptr + start + ids_C, gradient_C, mask=is_inside_C)


@triton.jit
def _normalise(logits_C, top, z):
    new_top = tl.maximum(top, tl.max(logits_C, axis=0))
    # While all are -inf, shift by nothing: -inf - -inf would be NaN.
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    return new_top, z * tl.exp(top - shift) + tl.sum(tl.exp(logits_C - shift), axis=0)


@triton.jit
def _gap(student_C, teacher_C, q_C, p_C, log_z_q, log_z_p):
    # Near-equal logits subtract without rounding. Tokens of probability zero on both sides have no gap: -inf - -inf.
    return tl.where((q_C == 0) & (p_C == 0), 0.0, (student_C - teacher_C) - (log_z_q - log_z_p))


@triton.jit
def _terms(q_C, p_C, log_q_C, log_p_C, gap_C, first, second, KIND: tl.constexpr):
    """Return value and slope, like the functions in `objective.TERMS`."""
    if KIND == "forward_kl":
        value_C, slope_C = tl.where(p_C == 0, 0.0, -p_C * gap_C), q_C - p_C
    elif KIND == "reverse_kl":
        value_C = tl.where(q_C == 0, 0.0, q_C * gap_C)
        slope_C = value_C
    elif KIND == "skew_kl":
        _, log_p_over_m_C = _log_over_mixture(gap_C, first)
        value_C, slope_C = p_C * log_p_over_m_C, (first - 1) * q_C * _expm1(log_p_over_m_C)
    elif KIND == "skew_reverse_kl":
        log_q_over_m_C, _ = _log_over_mixture(gap_C, 1 - first)
        value_C = q_C * log_q_over_m_C
        slope_C = value_C - first * q_C * _expm1(log_q_over_m_C)
    elif KIND == "total_variation":
        value_C = 0.5 * tl.abs(q_C - p_C)
        slope_C = 0.5 * q_C * tl.where(gap_C > 0, 1.0, tl.where(gap_C < 0, -1.0, 0.0))
    elif KIND == "alpha_beta":
        cross_C = tl.exp(first * log_p_C + second * log_q_C)
        p_power_C, q_power_C = tl.exp((first + second) * log_p_C), tl.exp((first + second) * log_q_C)
        value_C = (p_power_C * first + q_power_C * second) / (first + second) - cross_C
        value_C, slope_C = value_C / (first * second), (q_power_C - cross_C) / first
    else:
        tl.static_assert(KIND == "jsd", "a kind without a kernel")
        log_q_over_m_C, log_p_over_m_C = _log_over_mixture(gap_C, first)
        slope_C = (1 - first) * q_C * log_q_over_m_C
        value_C = slope_C + first * p_C * log_p_over_m_C
    return value_C, slope_C


@triton.jit
def _log_over_mixture(gap_C, share_p):
    gap_C = tl.where(gap_C > 80.0, 80.0, tl.where(gap_C < -80.0, -80.0, gap_C))  # NaN stays NaN
    log_q_over_m_C = -_log1p(share_p * _expm1(-gap_C))
    return log_q_over_m_C, log_q_over_m_C - gap_C


@triton.jit
def _expm1(x):
    near = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(tl.abs(x) < 0.1, near, tl.exp(x) - 1)


@triton.jit
def _log1p(x):
    near = x * (1 - x * (1 / 2 - x * (1 / 3 - x * (1 / 4 - x * (1 / 5 - x * (1 / 6 - x * (1 / 7 - x / 8)))))))
    return tl.where(tl.abs(x) < 0.1, near, tl.log(1 + x))
