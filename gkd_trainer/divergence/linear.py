"""The divergence from final hidden states and heads, tile by tile, with the gradient computed in the forward pass.

Shapes: N tokens, V vocabulary, H the student's hidden width, K top tokens of a teacher, R the tokens of a tile.
A tile takes one product with each head for its logits (a top-k teacher has no head), and one each for the gradients
of the student's hidden states and weight; the backward pass scales these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gkd_trainer.divergence.mapped import MappedComparison
from gkd_trainer.divergence.objective import Objective
from gkd_trainer.divergence.projection import HeadGradient, Projection
from gkd_trainer.divergence.result import TokenDivergence, joined, mixed_loss, reordered, weighted_sum
from gkd_trainer.divergence.rows import LogitsComparison, RowComparison, gradient_of, has_kernel, tiles
from gkd_trainer.divergence.several import Form, Term, groups_of, tensors_of
from gkd_trainer.divergence.topk import TopKComparison, has_topk_kernels
from gkd_trainer.divergence.workspace import Plan, plan_for
from gkd_trainer.signals import Head, HiddenSignal, MappedSignal, TopKSignal, scored_positions


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

    A MappedSignal must be one of hidden states. The arguments are those of `loss.token_divergence`, which checks them.
    Gradients reach the student's hidden states, weight and bias, each in its own dtype, if they require one. An
    upstream gradient that is the same for all tokens (of the loss if labels are weighted, else of the values) scales
    the gradient that the forward pass prepared; any other recomputes the logits.
    """
    groups = groups_of(teacher)
    assert groups is not None
    return grouped_linear_divergence(
        student,
        groups,
        objective=objective,
        tail=tail,
        labels_N=labels_N,
        label_weight_N=label_weight_N,
        product_dtype=product_dtype,
        token_block=token_block,
        workspace_mb=workspace_mb,
    )


def grouped_linear_divergence(
    student: HiddenSignal,
    groups: Sequence[tuple[Term, ...]],
    order_N: Tensor | None = None,
    *,
    objective: Objective,
    tail: str = "bucket",
    labels_N: Tensor | None = None,
    label_weight_N: Tensor | None = None,
    product_dtype: torch.dtype | None = None,
    token_block: int | None = None,
    workspace_mb: float | None = None,
) -> TokenDivergence:
    """Compare a student with several teachers as `linear_divergence` does with one, at about the cost of one.

    Each of `groups` belongs to consecutive positions of `order_N`, a permutation of the N (None if they are in order),
    and is compared with the weighted sum of its terms. The student is projected once per token, each term once per
    token of its group, and all groups add to the same gradients.
    """
    student = _gathered(student)
    student_tensors = (student.hidden_NH, student.head.weight_VH, student.head.bias_V)
    groups = [
        tuple(
            term if isinstance(term.signal, TopKSignal) else replace(term, signal=_gathered(term.signal))
            for term in group
        )
        for group in groups
    ]
    teacher_tensors = [tensor for group in groups for term in group for tensor in tensors_of(term.signal)]
    comparison = _Comparison(
        student_form=(student.head.scale, student.head.softcap, student.head.vocab_size),
        groups=tuple(tuple(map(Form.of, group)) for group in groups),
        objective=objective,
        tail=tail,
        plan=plan_for(student, groups, product_dtype, token_block, workspace_mb),
        is_differentiable=torch.is_grad_enabled(),
    )
    result: TokenDivergence
    loss_N, values_N, cross_entropy_N, result = _LinearDivergence.apply(  # type: ignore[no-untyped-call]
        *student_tensors,
        *(None if tensor is None else tensor.detach() for tensor in teacher_tensors),
        order_N,
        labels_N,
        None if label_weight_N is None else label_weight_N.detach().to(comparison.plan.dtype),
        comparison,
    )
    return replace(result, loss_N=loss_N, values_N=values_N, cross_entropy_N=cross_entropy_N)


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor | None, Tensor, Tensor | None, TokenDivergence]:
        """Return the fields that have a gradient, then the result without the loss, which autograd ignores.

        `inputs` are the tensors of student and teachers (see `signals`), order_N, labels_N, label_weight_N and the
        comparison.
        """
        *sides, order_N, labels_N, label_weight_N, comparison = inputs
        student, groups = comparison.signals(sides)
        needs = ctx.needs_input_grad[:3]
        gradient = value_weight_N = None
        if comparison.is_differentiable and any(needs):
            gradient = HeadGradient.zeros(student, needs, comparison.plan.dtype, comparison.plan.half)
            value_weight_N = _value_weight(student, label_weight_N, comparison.plan.dtype)
        weights = _Weights(labels_N, value_weight_N, label_weight_N)
        result = comparison.run(student, groups, order_N, weights, gradient)

        loss_N = None
        if label_weight_N is not None and result.cross_entropy_N is not None:
            loss_N = mixed_loss(result.values_N, result.cross_entropy_N, label_weight_N)
        ctx.comparison, ctx.gradient = comparison, gradient
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*sides, order_N, labels_N, label_weight_N)
        return loss_N, result.values_N, result.cross_entropy_N, result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        loss_upstream_N, values_upstream_N, label_upstream_N, _ = upstream
        *sides, order_N, labels_N, label_weight_N = ctx.saved_tensors
        comparison: _Comparison = ctx.comparison
        student, groups = comparison.signals(sides)
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
        needs = ctx.needs_input_grad[:3]
        gradient = HeadGradient.zeros(student, needs, comparison.plan.dtype, comparison.plan.half)
        # Scaled to at most one: the weights of a scaled loss would overflow half-precision products.
        size = _largest(value_weight_N, ce_weight_N)
        ce_weight_N = None if ce_weight_N is None else ce_weight_N / size
        weights = _Weights(labels_N, value_weight_N / size, ce_weight_N)
        comparison.run(student, groups, order_N, weights, gradient)
        return *gradient.scaled(size, student), *others


class _Weights(NamedTuple):
    """The labels of the tokens, and the weights of values and cross entropies in the gradient."""

    labels_N: Tensor | None
    values_N: Tensor | None
    cross_entropies_N: Tensor | None

    def at(self, index: slice | Tensor) -> _Weights:
        """Return those of some tokens."""
        return _Weights(*(None if tensor is None else tensor[index] for tensor in self))

    def times(self, factor: float) -> _Weights:
        """Return them with weights that are larger by a factor."""
        if factor == 1:
            return self
        return _Weights(self.labels_N, *(None if weight_N is None else weight_N * factor for weight_N in self[1:]))


@dataclass(frozen=True)
class _Buffers:
    """The student's logits of a tile, the teacher's or other scratch, and copies of the student's for a sum."""

    student_RV: Tensor
    scratch: Tensor
    copies: list[Tensor]


@dataclass(frozen=True)
class _Comparison:
    """How student and teachers are compared; their tensors are passed in, since autograd keeps them.

    `student_form` is the (scale, softcap, vocab_size) of the student's head.
    """

    student_form: tuple[float, float | None, int | None]
    groups: tuple[tuple[Form, ...], ...]
    objective: Objective
    tail: str
    plan: Plan
    is_differentiable: bool

    def signals(self, tensors: list[Any]) -> tuple[HiddenSignal, list[list[Term]]]:
        """Return the student and the terms of each group, given the tensors of each in turn (see `tensors_of`)."""
        hidden_NH, weight_VH, bias_V, *teacher_tensors = tensors
        student = HiddenSignal(hidden_NH, Head(weight_VH, bias_V, *self.student_form))
        left = iter(teacher_tensors)
        return student, [[form.filled(left) for form in group] for group in self.groups]

    def run(
        self,
        student: HiddenSignal,
        groups: list[list[Term]],
        order_N: Tensor | None,
        weights: _Weights,
        gradient: HeadGradient | None,
    ) -> TokenDivergence:
        """Compare tile by tile; add to `gradient` the gradient of values and cross entropies times their weights."""
        if order_N is not None:
            student = replace(student, hidden_NH=student.hidden_NH.index_select(0, order_N))
            weights = weights.at(order_N)
        plan, N, V = self.plan, student.hidden_NH.shape[0], student.vocab_size
        project = Projection(student.head.cut(), plan.dtype, plan.chunk, plan.half)
        weights = _Weights(weights.labels_N, None, None) if gradient is None else weights.times(project.gain)
        tile_gradient = None if gradient is None else gradient.cut(V)
        tokens = min(plan.tile, max(N, 1))
        scratch, student_RV, *copies = (
            student.hidden_NH.new_empty((tokens, plan.stride(columns)), dtype=plan.dtype)[:, :columns]
            for columns in (plan.scratch, *([V] * (1 if gradient is None else 1 + plan.copies)))
        )
        parts: list[TokenDivergence] = []
        start = 0
        for terms, halves in zip(groups, plan.halves, strict=True):
            stored = plan.half if _stores_half(terms, self.objective, student_RV) else None
            compared = [self._compared(term, half, student, stored) for term, half in zip(terms, halves, strict=True)]
            size = scored_positions(terms[0].signal)
            if size == 0 and (N > 0 or parts):
                continue
            for tile_of_group in tiles(size, plan.tile, plan.multiple):
                R = tile_of_group.stop - tile_of_group.start
                tile = slice(start + tile_of_group.start, start + tile_of_group.stop)
                project.logits(student.hidden_NH[tile], student_RV[:R])
                buffers = _Buffers(student_RV[:R], scratch[:R], [copy_RV[:R] for copy_RV in copies])
                part = _compare_tile(compared, tile_of_group, buffers, weights.at(tile))
                parts.append(part if len(groups) == 1 else replace(part, terms_NT=None))
                if tile_gradient is not None:
                    slope_RV = gradient_of(student_RV[:R], stored)
                    project.add_gradient(slope_RV, scratch[:R], student.hidden_NH[tile], tile, tile_gradient)
            start += size
        result = joined(parts)
        if order_N is None:
            return result
        if gradient is not None and gradient.hidden_NH is not None:
            gradient.hidden_NH = torch.empty_like(gradient.hidden_NH).index_copy_(0, order_N, gradient.hidden_NH)
        return reordered(result, order_N)

    def _compared(
        self, term: Term, half: torch.dtype | None, student: HiddenSignal, stored: torch.dtype | None
    ) -> _ComparedTerm:
        plan, softcap = self.plan, student.head.softcap
        if isinstance(term.signal, TopKSignal):
            compare: RowComparison = TopKComparison(self.objective, self.tail, softcap, plan.temporary, stored)
            return _ComparedTerm(term, None, compare, 0)
        project = Projection(term.signal.head.cut(), plan.dtype, plan.chunk, half)
        if term.mapping is not None:
            compare = MappedComparison(self.objective, term.mapping, softcap, plan.temporary)
        else:
            compare = LogitsComparison(self.objective, softcap, plan.temporary, stored)
        return _ComparedTerm(term, project, compare, plan.stride(term.signal.vocab_size))


@dataclass(frozen=True)
class _ComparedTerm:
    """A term, its head's products (None for top tokens), its comparison, and the stride of the rows of its logits."""

    term: Term
    project: Projection | None
    compare: RowComparison
    stride: int

    def __call__(self, tile: slice, student_RV: Tensor, scratch: Tensor, weights: _Weights) -> TokenDivergence:
        """Compare the tile of a group; with weights, overwrite `student_RV` by the gradient."""
        signal, value_weight_R = self.term.signal, weights.values_N
        if isinstance(signal, TopKSignal):
            teacher: tuple[Tensor, ...] = (signal.ids_NK[tile], signal.log_p_NK[tile])
        else:
            assert self.project is not None
            R, W = len(student_RV), signal.vocab_size
            teacher_RW = scratch.view(-1)[: R * self.stride].view(R, self.stride)[:, :W]
            self.project.logits(signal.hidden_NH[tile], teacher_RW)
            teacher = (teacher_RW,)
        if value_weight_R is not None and self.term.weight != 1:
            value_weight_R = value_weight_R * self.term.weight
        return self.compare(
            student_RV,
            teacher,
            weights.labels_N,
            value_weight_R=value_weight_R,
            label_weight_R=weights.cross_entropies_N,
        )


def _stores_half(terms: Sequence[Term], objective: Objective, student_RV: Tensor) -> bool:
    """Return whether the comparison itself can round its gradient: not if it is one of a sum."""
    (term, *others) = terms
    if others or term.mapping is not None:
        return False
    if isinstance(term.signal, TopKSignal):
        return has_topk_kernels(student_RV, term.signal.ids_NK, term.signal.log_p_NK)
    return has_kernel(objective, student_RV)


def _compare_tile(terms: Sequence[_ComparedTerm], tile: slice, buffers: _Buffers, weights: _Weights) -> TokenDivergence:
    """Compare a tile of a group with each term; with weights, the student's logits become the gradient of the sum."""
    *others, last = terms
    # The cross entropy does not depend on the teacher.
    value_weights = _Weights(None, weights.values_N, None)
    student_RV, parts, sum_RV = buffers.student_RV, [], None
    for term in others:
        logits_RV = student_RV
        if weights.values_N is not None:
            logits_RV = buffers.copies[0 if sum_RV is None else 1].copy_(student_RV)
        parts.append(term(tile, logits_RV, buffers.scratch, value_weights))
        if weights.values_N is not None:
            sum_RV = logits_RV if sum_RV is None else sum_RV.add_(logits_RV)
    parts.append(last(tile, student_RV, buffers.scratch, weights))
    if sum_RV is not None:
        student_RV.add_(sum_RV)
    return weighted_sum(parts, [term.term.weight for term in terms])


def _gathered(signal: HiddenSignal) -> HiddenSignal:
    """Return the signal with a head that is sharded over ranks gathered; gradients reach the shards.

    Each rank's shard gets its part of that rank's gradient, which is right where all ranks compare the same tokens
    (tensor parallelism). A shard does not say whether they do.
    """
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
