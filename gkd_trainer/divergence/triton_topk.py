"""Compare rows of logits with a teacher's top tokens in Triton: the passes over the vocabulary of `topk.py`.

Shapes: R rows of logits (one per token), V vocabulary, K top tokens of the teacher, C categories: the K and, as a
bucket, the rest; L the elements of a row that a program holds at once.
One program reads its row once for the categories and statistics, and once for the gradient. The divergence over the
categories is computed in between, by `rows.LogitsComparison`, so that any divergence can be.
"""

# Triton compiles the kernels from their source and has no types for it.
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_TOP_K = 1024
"""The largest K for which a program holds all categories of a row in registers."""

LAUNCH: dict[str, int | bool] = {"num_warps": 8, "enable_fp_fusion": True}
"""How to compile the kernels. Fusion is Triton's default, but Triton 3.9 warns if it is not set."""

if torch.version.hip is None:
    # An SM's registers, over the threads of three programs. With a fourth, Triton 3.6 would spill eight per thread.
    LAUNCH["maxnreg"] = 65_536 // (3 * 8 * 32) // 8 * 8

CHUNK = 2048
"""The elements of a row that a program holds at once: 8 per thread."""

_NOWHERE = 2**62
"""The id of a missing entry, after all others when sorted."""


class RowCategories(NamedTuple):
    """Both sides of each row over the categories, and statistics of the row; see `topk.py` for their meaning.

    The logits of a side that is not finite are NaN. `shift_R` is subtracted from the student's, and `log_z_R` is their
    log-normaliser. `rest_shift_R` is the largest logit outside the top k, zero if there is none, and `rest_total_R` is
    Σ exp(logit - rest_shift) there. `sorted_ids_RK` are in ascending order, that of the entries `order_RK`.
    """

    student_RC: Tensor
    teacher_RC: Tensor
    shift_R: Tensor
    log_z_R: Tensor
    rest_shift_R: Tensor
    rest_total_R: Tensor
    cross_entropy_R: Tensor | None
    student_entropy_R: Tensor
    student_mass_R: Tensor
    teacher_mass_R: Tensor
    is_teacher_finite_R: Tensor
    agrees_R: Tensor
    sorted_ids_RK: Tensor
    order_RK: Tensor


def categories(
    student_RV: Tensor,
    ids_RK: Tensor,
    log_p_RK: Tensor,
    labels_R: Tensor | None,
    *,
    has_bucket: bool,
    max_mass: float,
) -> RowCategories:
    """Reduce float32 rows of a student's logits to a teacher's categories; `log_p_RK` is float32, K at most MAX_TOP_K.

    A teacher whose top k have a larger mass than `max_mass` is not finite.
    """
    (R, V), K = student_RV.shape, ids_RK.shape[1]
    rows_RV = _with_adjacent_columns(student_RV)
    ids_RK, log_p_RK = ids_RK.contiguous(), log_p_RK.contiguous()
    # A program meets the entries in the order of their ids as it walks along its row.
    sorted_ids_RK, order_RK = torch.where(log_p_RK == -math.inf, _NOWHERE, ids_RK).sort(dim=1)
    student_RC, teacher_RC = (student_RV.new_empty(R, K + has_bucket) for _ in range(2))
    # For a pointer that is no multiple of 16 bytes Triton compiles again.
    floats, flags = (
        student_RV.new_empty(count, -(-R // 16) * 16, dtype=dtype)[:, :R].unbind()
        for count, dtype in ((8, torch.float32), (2, torch.bool))
    )
    if R:
        # Triton launches on the current device, which may not be that of the tensors.
        with torch.cuda.device_of(student_RV):
            _categories_kernel[(R,)](
                rows_RV,
                *(ids_RK, log_p_RK, sorted_ids_RK),
                # The kernel never reads the placeholder for None.
                sorted_ids_RK if labels_R is None else labels_R.contiguous(),
                *(student_RC, teacher_RC, *floats, *flags),
                *(rows_RV.stride(0), V, K, max_mass),
                HAS_BUCKET=has_bucket,
                HAS_LABELS=labels_R is not None,
                BLOCK_K=triton.next_power_of_2(K),
                CHUNK=min(CHUNK, triton.next_power_of_2(V)),
                **LAUNCH,
            )
    shift_R, log_z_R, rest_shift_R, rest_total_R, cross_entropy_R, entropy_R, student_mass_R, teacher_mass_R = floats
    return RowCategories(
        *(student_RC, teacher_RC, shift_R, log_z_R, rest_shift_R, rest_total_R),
        None if labels_R is None else cross_entropy_R,
        *(entropy_R, student_mass_R, teacher_mass_R, *flags, sorted_ids_RK, order_RK),
    )


def write_gradient(
    student_RV: Tensor,
    slope_RC: Tensor,
    reduced: RowCategories,
    labels_R: Tensor | None,
    label_weight_R: Tensor | None,
    *,
    softcap: float | None,
    half: torch.dtype | None = None,
) -> None:
    """Overwrite logits by the gradient, given its part `slope_RC` of each category; see `rows.RowComparison`.

    `reduced` is what `categories` returned for these logits, in which the student's may have been overwritten. With
    `half`, the gradient is rounded to this dtype, and each row is at the start of the memory of the row of logits,
    whose elements must be adjacent.
    """
    (R, V), K = student_RV.shape, reduced.order_RK.shape[1]
    if not R:
        return
    rows_RV = _with_adjacent_columns(student_RV)
    gradient_RV = rows_RV if half is None else rows_RV.view(half)
    has_label_weight = labels_R is not None and label_weight_R is not None
    # The kernel never reads the placeholders for None.
    of_labels = [
        reduced.log_z_R if tensor is None else tensor.contiguous()
        for tensor in (labels_R, reduced.cross_entropy_R, label_weight_R)
    ]
    with torch.cuda.device_of(student_RV):
        _gradient_kernel[(R,)](
            *(rows_RV, gradient_RV),
            *(slope_RC.contiguous(), reduced.sorted_ids_RK, reduced.order_RK),
            *(reduced.shift_R, reduced.log_z_R, reduced.rest_shift_R, reduced.rest_total_R, *of_labels),
            *(rows_RV.stride(0), gradient_RV.stride(0), V, K, 0.0 if softcap is None else 1 / softcap),
            HAS_BUCKET=slope_RC.shape[1] > K,
            HAS_LABEL_WEIGHT=has_label_weight,
            IS_CAPPED=softcap is not None,
            CHUNK=min(CHUNK, triton.next_power_of_2(V)),
            **LAUNCH,
        )
    if rows_RV is not student_RV:
        student_RV.copy_(rows_RV)


def _with_adjacent_columns(logits_RV: Tensor) -> Tensor:
    """Return the logits, copied if necessary, with adjacent elements in a row, as the kernels read them."""
    return logits_RV if logits_RV.stride(1) == 1 else logits_RV.contiguous()


@triton.jit
def _categories_kernel(
    student_ptr,
    ids_ptr,
    log_p_ptr,
    sorted_ids_ptr,
    labels_ptr,
    student_categories_ptr,
    teacher_categories_ptr,
    shift_ptr,
    log_z_ptr,
    rest_shift_ptr,
    rest_total_ptr,
    cross_entropy_ptr,
    entropy_ptr,
    student_mass_ptr,
    teacher_mass_ptr,
    is_teacher_finite_ptr,
    agrees_ptr,
    student_stride,
    V,
    K,
    max_mass,
    HAS_BUCKET: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    rest_top, rest_total, rest_entropy = _measure_rest(student_ptr, sorted_ids_ptr + row * K, V, K, CHUNK)
    rest_shift = tl.where(rest_top == -float("inf"), 0.0, rest_top)

    k_K = tl.arange(0, BLOCK_K)
    is_column_K = k_K < K
    ids_K = tl.load(ids_ptr + row * K + k_K, mask=is_column_K, other=0)
    log_p_K = tl.load(log_p_ptr + row * K + k_K, mask=is_column_K, other=-float("inf"))
    is_entry_K = log_p_K != -float("inf")
    is_inside_K = is_entry_K & (ids_K >= 0) & (ids_K < V)
    entries = tl.sum(is_entry_K.to(tl.int32), axis=0)
    mass = tl.sum(tl.exp(log_p_K), axis=0)
    # False for NaN too.
    is_teacher_finite = (entries == tl.sum(is_inside_K.to(tl.int32), axis=0)) & (mass <= max_mass)
    top_p = tl.max(log_p_K, axis=0)

    logits_K = tl.load(student_ptr + ids_K, mask=is_inside_K, other=-float("inf"))
    top = tl.maximum(tl.max(logits_K, axis=0), rest_top)
    # While all are -inf, shift by nothing: -inf - -inf would be NaN.
    shift = tl.where(top == -float("inf"), 0.0, top)
    is_top_K = (logits_K == top) & (log_p_K == top_p)
    logits_K -= shift
    log_rest = tl.log(rest_total) + (rest_shift - shift)
    top_category = tl.maximum(tl.max(logits_K, axis=0), log_rest)
    top_category = tl.where(top_category == -float("inf"), 0.0, top_category)
    z = tl.sum(tl.exp(logits_K - top_category), axis=0) + tl.exp(log_rest - top_category)
    log_z = tl.log(z) + top_category
    is_student_finite = tl.abs(log_z) < float("inf")
    log_q_K, log_q_rest = logits_K - log_z, log_rest - log_z
    q_K, q_rest = tl.exp(log_q_K), tl.exp(log_q_rest)
    # Zero probability contributes nothing: 0·-inf would be NaN. NaN stays NaN.
    entropy = -tl.sum(q_K * tl.maximum(log_q_K, -1e4), axis=0) - q_rest * tl.maximum(log_q_rest, -1e4)

    C = K + 1 if HAS_BUCKET else K
    if not HAS_BUCKET:
        # Without entries, both sides have one category; see `topk.TopKComparison`.
        is_only_K = (entries == 0) & (k_K == 0)
        logits_K, log_p_K = tl.where(is_only_K, 0.0, logits_K), tl.where(is_only_K, 0.0, log_p_K)
    student_K = tl.where(is_student_finite, logits_K, float("nan"))
    teacher_K = tl.where(is_teacher_finite, log_p_K, float("nan"))
    tl.store(student_categories_ptr + row * C + k_K, student_K, mask=is_column_K)
    tl.store(teacher_categories_ptr + row * C + k_K, teacher_K, mask=is_column_K)
    if HAS_BUCKET:
        # 1 - mass rounds to zero for a small tail, which would make the reverse KL infinite.
        resolution = 1.1920929e-07
        tail_p = 1 - mass
        log_tail_p = tl.log(tl.maximum(tail_p, resolution))
        # Without a token outside, the entries are renormalised; see `topk._log_tail`.
        is_outside_empty = (entries == V) | ((rest_total == 0) & (tail_p <= resolution))
        log_tail_p = tl.where(is_outside_empty, -float("inf"), log_tail_p)
        log_tail_p = tl.where(is_teacher_finite, log_tail_p, float("nan"))
        tl.store(student_categories_ptr + row * C + K, tl.where(is_student_finite, log_rest, float("nan")))
        tl.store(teacher_categories_ptr + row * C + K, log_tail_p)

    tl.store(shift_ptr + row, shift)
    tl.store(log_z_ptr + row, log_z)
    tl.store(rest_shift_ptr + row, rest_shift)
    tl.store(rest_total_ptr + row, rest_total)
    tl.store(entropy_ptr + row, entropy + q_rest * rest_entropy)
    tl.store(student_mass_ptr + row, tl.sum(q_K, axis=0))
    tl.store(teacher_mass_ptr + row, mass)
    tl.store(is_teacher_finite_ptr + row, is_teacher_finite)
    agrees = tl.sum(is_top_K.to(tl.int32), axis=0) > 0
    tl.store(agrees_ptr + row, agrees & is_teacher_finite & is_student_finite)
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
        is_token = (label >= 0) & (label < V)
        label_logit = tl.load(student_ptr + label, mask=is_token, other=0.0)
        cross_entropy = tl.where(is_token, log_z - (label_logit - shift), float("inf"))
        tl.store(cross_entropy_ptr + row, tl.where(label == -100, 0.0, cross_entropy))


@triton.jit
def _measure_rest(student_ptr, sorted_ids_ptr, V, K, CHUNK: tl.constexpr):
    """Return the largest logit outside the top k, the sum of exp(logit - largest) there, and the entropy within it."""
    columns_L = tl.arange(0, CHUNK)
    # Each lane has a sum of its own. A finite start: -inf - -inf would be NaN.
    top_L = tl.full((CHUNK,), -3e38, tl.float32)
    total_L = tl.zeros((CHUNK,), tl.float32)
    weighted_L = tl.zeros((CHUNK,), tl.float32)
    position = 0
    entry = tl.load(sorted_ids_ptr)
    # The last chunk is on its own, so that the others need no mask and are loaded as vectors.
    last = (V - 1) // CHUNK * CHUNK
    for start in range(0, last, CHUNK):
        logits_L = tl.load(student_ptr + start + columns_L)
        while entry < start + CHUNK:
            logits_L = tl.where(start + columns_L == entry, -float("inf"), logits_L)
            position, entry = _next_entry(sorted_ids_ptr, position, K)
        top_L, total_L, weighted_L = _add_logits(logits_L, top_L, total_L, weighted_L)
    logits_L = tl.load(student_ptr + last + columns_L, mask=last + columns_L < V, other=-float("inf"))
    while entry < V:
        logits_L = tl.where(last + columns_L == entry, -float("inf"), logits_L)
        position, entry = _next_entry(sorted_ids_ptr, position, K)
    top_L, total_L, weighted_L = _add_logits(logits_L, top_L, total_L, weighted_L)

    top = tl.max(top_L, axis=0)
    below_L = tl.maximum(top_L - top, -1e4)
    kept_L = tl.exp(below_L)
    total = tl.sum(kept_L * total_L, axis=0)
    weighted = tl.sum(kept_L * (weighted_L + total_L * below_L), axis=0)
    total = tl.where(top == float("inf"), float("nan"), total)
    entropy = tl.where(total == 0, 0.0, tl.log(total) - weighted / total)
    return tl.where(total == 0, -float("inf"), top), total, entropy


@triton.jit
def _add_logits(logits_L, top_L, total_L, weighted_L):
    """Add logits to each lane's largest, its sum of e = exp(logit - largest), and its sum of e·(logit - largest)."""
    rise_L = logits_L - top_L
    smaller_L = tl.exp(-tl.abs(rise_L))
    is_new_top_L = rise_L > 0  # False for NaN, which then enters the sums
    # Zero probability contributes nothing: 0·-inf would be NaN.
    below_L = tl.maximum(-tl.abs(rise_L), -1e4)
    kept_L, e_L = tl.where(is_new_top_L, smaller_L, 1.0), tl.where(is_new_top_L, 1.0, smaller_L)
    top_below_L, below_top_L = tl.where(is_new_top_L, below_L, 0.0), tl.where(is_new_top_L, 0.0, below_L)
    weighted_L = kept_L * (weighted_L + total_L * top_below_L) + e_L * below_top_L
    return tl.maximum(top_L, logits_L), kept_L * total_L + e_L, weighted_L


@triton.jit
def _next_entry(sorted_ids_ptr, position, K):
    position += 1
    return position, tl.load(sorted_ids_ptr + position, mask=position < K, other=2**62)


@triton.jit
def _gradient_kernel(
    student_ptr,
    gradient_ptr,
    slope_ptr,
    sorted_ids_ptr,
    order_ptr,
    shift_ptr,
    log_z_ptr,
    rest_shift_ptr,
    rest_total_ptr,
    labels_ptr,
    cross_entropy_ptr,
    label_weight_ptr,
    student_stride,
    gradient_stride,
    V,
    K,
    per_softcap,
    HAS_BUCKET: tl.constexpr,
    HAS_LABEL_WEIGHT: tl.constexpr,
    IS_CAPPED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    gradient_ptr += row * gradient_stride
    sorted_ids_ptr += row * K
    order_ptr += row * K
    slope_ptr += row * (K + 1 if HAS_BUCKET else K)
    log_z = tl.load(log_z_ptr + row)
    rest_shift = tl.load(rest_shift_ptr + row)
    rest_total = tl.load(rest_total_ptr + row)
    rest_slope = tl.load(slope_ptr + K) if HAS_BUCKET else 0.0
    label, label_weight = -1, 0.0
    if HAS_LABEL_WEIGHT:
        label = tl.load(labels_ptr + row)
        is_trained = (tl.abs(tl.load(cross_entropy_ptr + row)) < float("inf")) & (label != -100)
        label_weight = tl.where(is_trained, tl.load(label_weight_ptr + row), 0.0)
    numbers = (
        rest_shift,
        tl.where(rest_total == 0, 0.0, rest_slope / rest_total),
        label,
        label_weight,
        log_z + tl.load(shift_ptr + row),
        tl.abs(log_z) < float("inf"),
        per_softcap,
    )

    columns_L = tl.arange(0, CHUNK)
    position = 0
    entry = tl.load(sorted_ids_ptr)
    last = (V - 1) // CHUNK * CHUNK
    for start in range(0, last, CHUNK):
        ids_L = start + columns_L
        logits_L = tl.load(student_ptr + ids_L)
        slope_L = _rest_slope(logits_L, numbers)
        while entry < start + CHUNK:
            slope = tl.load(slope_ptr + tl.load(order_ptr + position))
            slope_L = tl.where(ids_L == entry, slope, slope_L)
            position, entry = _next_entry(sorted_ids_ptr, position, K)
        gradient_L = _gradient(slope_L, logits_L, ids_L, numbers, HAS_LABEL_WEIGHT, IS_CAPPED)
        # Of half the size, it overwrites logits that other threads read, in this chunk or before.
        tl.debug_barrier()
        _store(gradient_ptr, gradient_L, ids_L, None)
    ids_L = last + columns_L
    logits_L = tl.load(student_ptr + ids_L, mask=ids_L < V, other=-float("inf"))
    slope_L = _rest_slope(logits_L, numbers)
    while entry < V:
        slope = tl.load(slope_ptr + tl.load(order_ptr + position))
        slope_L = tl.where(ids_L == entry, slope, slope_L)
        position, entry = _next_entry(sorted_ids_ptr, position, K)
    gradient_L = _gradient(slope_L, logits_L, ids_L, numbers, HAS_LABEL_WEIGHT, IS_CAPPED)
    # Also where several threads have each logit of a row that is shorter than the program.
    tl.debug_barrier()
    _store(gradient_ptr, gradient_L, ids_L, ids_L < V)


@triton.jit
def _store(gradient_ptr, gradient_L, ids_L, mask_L):
    if gradient_ptr.dtype.element_ty == tl.float16:  # see projection.FLOAT16_LIMIT
        gradient_L = tl.minimum(tl.maximum(gradient_L, -65504.0), 65504.0)
    tl.store(gradient_ptr + ids_L, gradient_L, mask=mask_L)


@triton.jit
def _rest_slope(logits_L, numbers):
    """Return the slopes of tokens outside the top k: that of the rest, in proportion to their probabilities."""
    return numbers[1] * tl.exp(logits_L - numbers[0])


@triton.jit
def _gradient(slope_L, logits_L, ids_L, numbers, HAS_LABEL_WEIGHT: tl.constexpr, IS_CAPPED: tl.constexpr):
    """Return the gradient of the logits before the soft-cap, given the slopes of the value."""
    _, _, label, label_weight, log_z, is_finite, per_softcap = numbers
    if HAS_LABEL_WEIGHT:
        slope_L += label_weight * (tl.exp(logits_L - log_z) - (ids_L == label).to(tl.float32))
    if IS_CAPPED:
        share_L = tl.maximum(logits_L * per_softcap, -1.0)
        slope_L *= 1.0 - share_L * share_L
    # Last, because 0·NaN is NaN.
    return tl.where(is_finite, slope_L, 0.0)
