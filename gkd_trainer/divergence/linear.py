"""The divergence from final hidden states and heads, tile by tile, with the gradient computed in the forward pass.

Shapes: N tokens, V vocabulary, H the student's hidden width, K top tokens of a teacher, R the tokens of a tile.
A tile takes one product with each head for its logits (a top-k teacher has no head), and one each for the gradients
of the student's hidden states and weight; the backward pass scales these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gkd_trainer.divergence.mapped import MappedComparison
from gkd_trainer.divergence.objective import Objective
from gkd_trainer.divergence.projection import HALVES, HeadGradient, Projection
from gkd_trainer.divergence.result import TokenDivergence, joined, mixed_loss
from gkd_trainer.divergence.rows import LogitsComparison, RowComparison, tiles
from gkd_trainer.divergence.topk import TopKComparison
from gkd_trainer.signals import Head, HiddenSignal, MappedSignal, TopKSignal, VocabularyMap

CPU_WORKSPACE_MB = 256
"""The default budget on the CPU. With less, at large vocabularies, moving weights takes longer than multiplying."""

WORKSPACE_MB = 1024
"""The default budget elsewhere, where larger products keep the device busy."""

_RESERVE = 1 / 6
"""The share of the budget for everything but logits: temporaries, and chunks of a weight in another dtype."""

_TEMPORARIES = 16
"""How many temporaries an eager comparison has alive at once."""


def linear_divergence(
    student: HiddenSignal,
    teacher: HiddenSignal | TopKSignal | MappedSignal,
    *,
    objective: Objective,
    tail: str = "bucket",
    labels_N: Tensor | None = None,
    label_weight_N: Tensor | None = None,
    product_dtype: torch.dtype | None = None,
    token_block: int | None = None,
    workspace_mb: float | None = None,
) -> TokenDivergence:
    """Compare a student with a teacher token by token from the student's final hidden states.

    A `MappedSignal` must be one of hidden states.

    The arguments are those of `loss.token_divergence`, which checks them. Gradients reach the student's hidden
    states, weight and bias, each in its own dtype, if they require one. An upstream gradient that is the same for all
    tokens (of the loss if labels are weighted, of the values if there are no labels) scales the gradient that the
    forward pass prepared; any other recomputes the logits.
    """
    student = _gathered(student)
    mapping = None
    if isinstance(teacher, MappedSignal):
        assert isinstance(teacher.signal, HiddenSignal)
        mapping, teacher = teacher.mapping, teacher.signal
    student_tensors = (student.hidden_NH, student.head.weight_VH, student.head.bias_V)
    teacher_tensors: tuple[Tensor | None, ...]
    teacher_form = None
    if isinstance(teacher, TopKSignal):
        teacher_tensors = (teacher.ids_NK, teacher.log_p_NK)
    else:
        teacher = _gathered(teacher)
        teacher_tensors = (teacher.hidden_NH, teacher.head.weight_VH, teacher.head.bias_V)
        teacher_form = (teacher.head.scale, teacher.head.softcap, teacher.head.vocab_size)
    comparison = _Comparison(
        student_form=(student.head.scale, student.head.softcap, student.head.vocab_size),
        teacher_form=teacher_form,
        objective=objective,
        tail=tail,
        plan=_plan(student, teacher, mapping, product_dtype, token_block, workspace_mb),
        is_differentiable=torch.is_grad_enabled(),
        mapping=mapping,
    )
    result: TokenDivergence
    loss_N, values_N, cross_entropy_N, result = _LinearDivergence.apply(  # type: ignore[no-untyped-call]
        *student_tensors,
        *(None if tensor is None else tensor.detach() for tensor in teacher_tensors),
        labels_N,
        None if label_weight_N is None else label_weight_N.detach().to(comparison.plan.dtype),
        comparison,
    )
    return replace(result, loss_N=loss_N, values_N=values_N, cross_entropy_N=cross_entropy_N)


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor | None, Tensor, Tensor | None, TokenDivergence]:
        """Return the fields that have a gradient, then the result without the loss, which autograd ignores.

        `inputs` are the tensors of student and teacher (see `signals`), labels_N, label_weight_N and the comparison.
        """
        *sides, labels_N, label_weight_N, comparison = inputs
        student, teacher = comparison.signals(sides)
        needs = ctx.needs_input_grad[:3]
        # With labels but no weights, the caller mixes the loss, and is unlikely to weight all tokens alike.
        is_prepared = comparison.is_differentiable and any(needs) and (labels_N is None or label_weight_N is not None)
        gradient = value_weight_N = None
        if is_prepared:
            gradient = HeadGradient.zeros(student, needs, comparison.plan.dtype)
            value_weight_N = _value_weight(student, label_weight_N, comparison.plan.dtype)
        result = comparison.run(student, teacher, labels_N, value_weight_N, label_weight_N, gradient)

        loss_N = None
        if label_weight_N is not None and result.cross_entropy_N is not None:
            loss_N = mixed_loss(result.values_N, result.cross_entropy_N, label_weight_N)
        ctx.comparison, ctx.gradient = comparison, gradient
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*sides, labels_N, label_weight_N)
        return loss_N, result.values_N, result.cross_entropy_N, result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        loss_upstream_N, values_upstream_N, label_upstream_N, _ = upstream
        *sides, labels_N, label_weight_N = ctx.saved_tensors
        comparison: _Comparison = ctx.comparison
        student, teacher = comparison.signals(sides)
        others = (None,) * len(ctx.needs_input_grad[3:])

        # Removed from ctx, so that a second backward pass does not scale the tensors that the first returned.
        gradient, ctx.gradient = ctx.gradient, None
        prepared_for, *rest = (
            (loss_upstream_N, values_upstream_N, label_upstream_N)
            if label_weight_N is not None
            else (values_upstream_N, loss_upstream_N, label_upstream_N)
        )
        if gradient is not None and prepared_for is not None and rest == [None, None] and _is_uniform(prepared_for):
            factor = prepared_for[0] if len(prepared_for) else prepared_for.new_ones(())
            return *gradient.scaled(factor, student), *others

        value_weight_N, ce_weight_N = values_upstream_N, label_upstream_N
        if loss_upstream_N is not None:
            assert label_weight_N is not None
            value_weight_N = _sum_of(value_weight_N, loss_upstream_N * (1 - label_weight_N))
            ce_weight_N = _sum_of(ce_weight_N, loss_upstream_N * label_weight_N)
        if value_weight_N is None:
            if ce_weight_N is None:
                return None, None, None, *others
            value_weight_N = torch.zeros_like(ce_weight_N)
        del gradient
        gradient = HeadGradient.zeros(student, ctx.needs_input_grad[:3], comparison.plan.dtype)
        # Scaled to at most one: the weights of a scaled loss would overflow half-precision products.
        size = _largest(value_weight_N, ce_weight_N)
        ce_weight_N = None if ce_weight_N is None else ce_weight_N / size
        comparison.run(student, teacher, labels_N, value_weight_N / size, ce_weight_N, gradient)
        return *gradient.scaled(size, student), *others


@dataclass(frozen=True)
class _Plan:
    """The dtype of the logits, the dtypes to which each side's products round, and the sizes that the budget allows.

    `tile` is a number of tokens, `scratch` the columns of a second buffer beside a tile's logits, `chunk` the number of
    vocabulary entries whose weights are converted at once, and `temporary` a number of elements.
    """

    dtype: torch.dtype
    halves: list[torch.dtype | None]
    tile: int
    scratch: int
    chunk: int
    temporary: int


@dataclass(frozen=True)
class _Comparison:
    """How student and teacher are compared; their tensors are passed in, since autograd keeps them.

    The forms are (scale, softcap, vocab_size) of each head; None for a top-k teacher, which has no head. `mapping` is
    for a teacher with another vocabulary.
    """

    student_form: tuple[float, float | None, int | None]
    teacher_form: tuple[float, float | None, int | None] | None
    objective: Objective
    tail: str
    plan: _Plan
    is_differentiable: bool
    mapping: VocabularyMap | None = None

    def signals(self, tensors: list[Any]) -> tuple[HiddenSignal, HiddenSignal | TopKSignal]:
        """Return student and teacher, given their tensors: hidden states, weight and bias, or ids and log-probs."""
        hidden_NH, weight_VH, bias_V, *teacher_tensors = tensors
        student = HiddenSignal(hidden_NH, Head(weight_VH, bias_V, *self.student_form))
        if self.teacher_form is None:
            ids_NK, log_p_NK = teacher_tensors
            return student, TopKSignal(ids_NK, log_p_NK, student.vocab_size)
        hidden_NH, weight_VH, bias_V = teacher_tensors
        return student, HiddenSignal(hidden_NH, Head(weight_VH, bias_V, *self.teacher_form))

    def run(
        self,
        student: HiddenSignal,
        teacher: HiddenSignal | TopKSignal,
        labels_N: Tensor | None,
        value_weight_N: Tensor | None,
        label_weight_N: Tensor | None,
        gradient: HeadGradient | None,
    ) -> TokenDivergence:
        """Compare tile by tile; add to `gradient` the gradient of values and cross entropies times their weights."""
        plan, N = self.plan, student.hidden_NH.shape[0]
        project_student, *project_teacher = (
            Projection(signal.head.cut(), plan.dtype, plan.chunk, half)
            for signal, half in zip(_of_hidden_states(student, teacher), plan.halves, strict=True)
        )
        compare = self._row_comparison(teacher, student.head.softcap)
        if gradient is None:
            value_weight_N = label_weight_N = None
        else:
            gradient = gradient.cut(student.vocab_size)
        student_RV, scratch = (
            student.hidden_NH.new_empty((min(plan.tile, max(N, 1)), columns), dtype=plan.dtype)
            for columns in (student.vocab_size, plan.scratch)
        )
        parts = []
        for tile in tiles(N, plan.tile):
            R = tile.stop - tile.start
            project_student.logits(student.hidden_NH[tile], student_RV[:R])
            if isinstance(teacher, TopKSignal):
                teacher_tensors: tuple[Tensor, ...] = (teacher.ids_NK[tile], teacher.log_p_NK[tile])
            else:
                teacher_RV = scratch.view(-1)[: R * teacher.vocab_size].view(R, teacher.vocab_size)
                project_teacher[0].logits(teacher.hidden_NH[tile], teacher_RV)
                teacher_tensors = (teacher_RV,)
            labels_R, value_weight_R, label_weight_R = (
                None if tensor is None else tensor[tile] for tensor in (labels_N, value_weight_N, label_weight_N)
            )
            parts.append(
                compare(
                    student_RV[:R],
                    teacher_tensors,
                    labels_R,
                    value_weight_R=value_weight_R,
                    label_weight_R=label_weight_R,
                )
            )
            if gradient is not None:
                project_student.add_gradient(student_RV[:R], scratch[:R], student.hidden_NH[tile], tile, gradient)
        return joined(parts)

    def _row_comparison(self, teacher: HiddenSignal | TopKSignal, softcap: float | None) -> RowComparison:
        if isinstance(teacher, TopKSignal):
            return TopKComparison(self.objective, self.tail, softcap, self.plan.temporary)
        if self.mapping is not None:
            return MappedComparison(self.objective, self.mapping, softcap, self.plan.temporary)
        return LogitsComparison(self.objective, softcap, self.plan.temporary)


def planned_tile(N: int, V: int, device: torch.device) -> int:
    """Return the size of the largest tile when N tokens of two models are compared by default, in float32."""
    largest = _largest_tile(2 * V, _default_workspace_mb(device) * 2**20 / torch.float32.itemsize)
    return int(max(tile.stop - tile.start for tile in tiles(N, largest)))


def _plan(
    student: HiddenSignal,
    teacher: HiddenSignal | TopKSignal,
    mapping: VocabularyMap | None,
    product_dtype: torch.dtype | None,
    token_block: int | None,
    workspace_mb: float | None,
) -> _Plan:
    dtype, sides, V = torch.float32, _of_hidden_states(student, teacher), student.vocab_size
    for signal in sides:
        for tensor in (signal.hidden_NH, signal.head.weight_VH):
            dtype = torch.promote_types(dtype, tensor.dtype)
    if workspace_mb is None:
        workspace_mb = _default_workspace_mb(student.hidden_NH.device)
    elements = workspace_mb * 2**20 / dtype.itemsize
    widest = max(1, *(signal.hidden_NH.shape[1] for signal in sides))
    halves = [_half(signal, product_dtype, dtype) for signal in sides]
    # For the teacher's logits, or the student's gradient rounded to a half.
    of_half = 0 if halves[0] is None else -(-V // 2)
    scratch = of_half if isinstance(teacher, TopKSignal) else max(teacher.vocab_size, of_half)
    # Top tokens are compared for a whole tile at once.
    temporaries = _TEMPORARIES * teacher.ids_NK.shape[1] if isinstance(teacher, TopKSignal) else 0
    return _Plan(
        dtype,
        halves=halves,
        tile=token_block or _largest_tile(V + scratch + temporaries, elements),
        scratch=scratch,
        chunk=max(1, int(elements * _RESERVE / 4 / widest)),
        temporary=int(elements * _RESERVE * 3 / 4 / _TEMPORARIES),
    )


def _of_hidden_states(student: HiddenSignal, teacher: HiddenSignal | TopKSignal) -> list[HiddenSignal]:
    return [student] if isinstance(teacher, TopKSignal) else [student, teacher]


def _half(signal: HiddenSignal, product_dtype: torch.dtype | None, dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype to which a side's products round their inputs, or None if they round nothing."""
    of_weight = signal.head.weight_VH.dtype
    if product_dtype is None and signal.hidden_NH.is_cuda and signal.hidden_NH.dtype == of_weight:
        product_dtype = of_weight  # nothing is rounded, and sums are still float32
    is_taken = product_dtype == torch.bfloat16 or (product_dtype in HALVES and signal.hidden_NH.is_cuda)
    return product_dtype if is_taken and dtype == torch.float32 else None


def _default_workspace_mb(device: torch.device) -> int:
    return CPU_WORKSPACE_MB if device.type == "cpu" else WORKSPACE_MB


def _largest_tile(columns: int, elements: float) -> int:
    return max(1, math.floor(elements * (1 - _RESERVE) / columns))


def _gathered(signal: HiddenSignal) -> HiddenSignal:
    """Return the signal with a head that is sharded over ranks gathered; gradients reach the shards."""
    if not torch.distributed.is_available():
        return signal
    from torch.distributed.tensor import DTensor

    weight_VH, bias_V = signal.head.weight_VH, signal.head.bias_V
    if isinstance(weight_VH, DTensor):
        weight_VH = weight_VH.full_tensor()
    if isinstance(bias_V, DTensor):
        bias_V = bias_V.full_tensor()
    return replace(signal, head=replace(signal.head, weight_VH=weight_VH, bias_V=bias_V))


def _value_weight(student: HiddenSignal, label_weight_N: Tensor | None, dtype: torch.dtype) -> Tensor:
    if label_weight_N is not None:
        return 1 - label_weight_N
    return student.hidden_NH.new_ones(student.hidden_NH.shape[0], dtype=dtype)


def _is_uniform(upstream_N: Tensor) -> bool:
    """Return whether all elements are known to be equal, without waiting for a device."""
    if upstream_N.numel() <= 1 or upstream_N.stride(0) == 0:
        return True
    return upstream_N.device.type == "cpu" and bool((upstream_N == upstream_N[0]).all())


def _sum_of(a_N: Tensor | None, b_N: Tensor) -> Tensor:
    return b_N if a_N is None else a_N + b_N


def _largest(*tensors: Tensor | None) -> Tensor:
    """Return the largest magnitude, or one if it is zero or there are no elements."""
    magnitudes = torch.cat([tensor.abs() for tensor in tensors if tensor is not None])
    if not magnitudes.numel():
        return magnitudes.new_ones(())
    return torch.where(magnitudes.amax() == 0, 1.0, magnitudes.amax())
