"""The entry to the divergence of a student from a teacher: it checks the arguments and picks the path.

Shapes: N tokens trained on, V vocabulary, H the student's hidden width, G the teacher's, K its top tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gkd_trainer.divergence.dense import dense_divergence
from gkd_trainer.divergence.linear import grouped_linear_divergence
from gkd_trainer.divergence.mapped import mapped_divergence
from gkd_trainer.divergence.options import (
    PRODUCT_DTYPES,
    TAILS,
    check_choice,
    check_mode,
    check_tail,
    check_top_k_temperature,
    checked_objective,
)
from gkd_trainer.divergence.result import TokenDivergence, mixed_loss
from gkd_trainer.divergence.several import check_groups, check_terms, groups_of, separate_divergences
from gkd_trainer.divergence.topk import topk_divergence
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.signals import (
    GroupedSignal,
    Head,
    HiddenSignal,
    LogitsSignal,
    MappedSignal,
    PlainSignal,
    Signal,
    StudentSignal,
    SummedSignal,
    TopKSignal,
    plain_signals,
    scored_positions,
)


def token_divergence(
    student: StudentSignal,
    teacher: Signal,
    *,
    beta: float = 0.5,
    divergence: str = "jsd",
    divergence_options: Mapping[str, float] | None = None,
    temperature: float = 1.0,
    scale: str = "paper",
    tail: str = "bucket",
    labels_N: Tensor | None = None,
    label_weight_N: Tensor | None = None,
    product_dtype: torch.dtype | None = None,
    vocab_chunk: int | None = None,
    token_block: int | None = None,
    workspace_mb: float | None = None,
) -> TokenDivergence:
    """Return the divergence of each token, by default beta·KL(p‖m) + (1 - beta)·KL(q‖m) with m = beta·p + (1 - beta)·q.

    p is the teacher, q the student, each softmax(logits / temperature); beta 0 is the forward KL(p‖q), beta 1
    the reverse KL(q‖p). Source: Agarwal et al. 2023, arXiv 2306.13649, eq. 1. This never waits for the device, and no
    value in a tensor makes it raise.

    Args:
        student: final hidden states with their head, or logits, of N positions; gradients reach it.
        teacher: the same for the teacher, or its top tokens, over the same N positions and V tokens; or predictions
            over other tokens, with a map (`MappedSignal`; its mode says what is compared: see `categories` and `uld`).
            No gradient reaches it. A logit of -inf, on either side, is probability zero. Several teachers may be
            grouped by position, which costs about as much as one, or summed, which projects the student's hidden states
            once.
        beta: in [0, 1]; for "jsd" only.
        divergence: "jsd" for the formula above, or another key of `objective.DIVERGENCES`, which has the formulas.
        divergence_options: values of the options listed there, if not the defaults.
        temperature: positive and finite; 1 for a top-k teacher.
        scale: "paper" for the formula above, or "continuous", which divides value and gradient by
            beta·(1 - beta) inside (0, 1), so that its limits are the two KLs.
        tail: for a top-k teacher only. "bucket" merges all tokens that are not entries into one more category, on both
            sides: a lower bound of the divergence over all tokens, and equal to it if every token is an entry. The
            teacher's mass there is taken to be at least the rounding of its log-probs, 1.2e-7 in float32.
            "renormalize" compares both sides over the entries only.
        labels_N: [N] integer token ids for the cross entropy, if that is wanted too. IGNORE_INDEX gives 0; another id
            outside [0, V) gives +inf; neither has a gradient.
        label_weight_N: [N] weights of the cross entropy in `loss_N`, (1 - weight)·value + weight·cross entropy; needs
            `labels_N`. The forward pass must know the mix to compute its gradient; without weights it computes that of
            the values alone, and the cross entropy costs nearly nothing.
        product_dtype: the dtype to which matrix products of float32 hidden states, heads and gradients round their
            inputs; logits and gradients are still summed in float32. bfloat16 or float16 on CUDA; elsewhere bfloat16,
            only for the products of the gradient. float32 and None round nothing; with None, bfloat16 or float16
            inputs are multiplied as they are on CUDA.
        vocab_chunk: limits the temporaries of two sets of logits to N × vocab_chunk elements, but at least one
            position; None for a default.
        token_block: how many positions to project at once, for a student of hidden states and a teacher of hidden
            states or top tokens, None for as many as fit into `workspace_mb`; or how many positions of logits to
            compare with top tokens at once, None for a default.
        workspace_mb: the memory in MiB for projecting positions, besides inputs and gradients; None for 256 on the CPU,
            a 24th of the memory on CUDA (256 to 3072), and 1024 elsewhere. These three don't change the result.

    Raises:
        GKDConfigError: an option out of range, or shapes or dtypes that don't fit together.
    """
    check_choice("tail", tail, TAILS)
    _check_products(product_dtype, vocab_chunk=vocab_chunk, token_block=token_block, workspace_mb=workspace_mb)
    _check_signal("student", student)
    _check_teacher(teacher, temperature, divergence, tail)
    _check_pair(student, teacher, labels_N, label_weight_N)
    objective = checked_objective(
        divergence,
        divergence_options,
        beta=beta,
        temperature=temperature,
        scale=scale,
        dtype=torch.float64 if any(map(_is_float64, (student, *plain_signals(teacher)))) else torch.float32,
    )
    groups = groups_of(teacher)
    # Autocast would round the projection to bfloat16, and the gradient at small gaps with it.
    with torch.autocast(_first_tensor(student).device.type, enabled=False):
        if isinstance(student, HiddenSignal) and groups is not None:
            return grouped_linear_divergence(
                student,
                groups,
                teacher.order_N if isinstance(teacher, GroupedSignal) else None,
                objective=objective,
                tail=tail,
                labels_N=labels_N,
                label_weight_N=label_weight_N,
                product_dtype=product_dtype,
                token_block=token_block,
                workspace_mb=workspace_mb,
            )
        if isinstance(teacher, GroupedSignal | SummedSignal):
            options: dict[str, Any] = {"beta": beta, "divergence": divergence, "divergence_options": divergence_options}
            options |= {"temperature": temperature, "scale": scale, "tail": tail, "product_dtype": product_dtype}
            options |= {"vocab_chunk": vocab_chunk, "token_block": token_block, "workspace_mb": workspace_mb}
            compare = functools.partial(token_divergence, **options)
            return separate_divergences(student, teacher, compare, labels_N=labels_N, label_weight_N=label_weight_N)
        if isinstance(teacher, TopKSignal):
            result = topk_divergence(
                _logits(student), teacher, objective=objective, tail=tail, labels_N=labels_N, token_block=token_block
            )
        elif isinstance(teacher, MappedSignal):
            with torch.no_grad():
                teacher_logits_NW = _logits(teacher.signal)
            result = mapped_divergence(
                _logits(student),
                teacher_logits_NW,
                teacher.mapping,
                objective=objective,
                labels_N=labels_N,
                token_block=token_block,
            )
        else:
            with torch.no_grad():
                teacher_logits_NV = _logits(teacher)
            result = dense_divergence(
                _logits(student), teacher_logits_NV, objective=objective, labels_N=labels_N, vocab_chunk=vocab_chunk
            )
    if label_weight_N is None or result.cross_entropy_N is None:
        return result
    return replace(result, loss_N=mixed_loss(result.values_N, result.cross_entropy_N, label_weight_N))


def generalized_jsd(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    scale: str = "paper",
    vocab_chunk: int | None = None,
) -> Tensor:
    """Return `token_divergence(...).values_N` of logits [N, V]: nats, float32 (float64 for float64 inputs).

    Options and errors are those of `token_divergence`.
    """
    return token_divergence(
        LogitsSignal(student_logits_NV),
        LogitsSignal(teacher_logits_NV),
        beta=beta,
        temperature=temperature,
        scale=scale,
        vocab_chunk=vocab_chunk,
    ).values_N


def linear_generalized_jsd(
    student_hidden_NH: Tensor,
    student_weight_VH: Tensor,
    teacher_hidden_NG: Tensor,
    teacher_weight_VG: Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    scale: str = "paper",
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    token_block: int | None = None,
) -> Tensor:
    """Return `token_divergence(...).values_N` of final hidden states and heads, without all logits at once.

    The logits of a side are softcap·tanh(logit_scale·(hidden·weightᵀ + bias) / softcap), with bias [V] or
    None, and no tanh if the softcap is None. Gradients reach the student's hidden states, weight and bias. The other
    options and errors are those of `token_divergence`.
    """
    student_head = Head(student_weight_VH, student_bias, student_logit_scale, student_softcap)
    teacher_head = Head(teacher_weight_VG, teacher_bias, teacher_logit_scale, teacher_softcap)
    return token_divergence(
        HiddenSignal(student_hidden_NH, student_head),
        HiddenSignal(teacher_hidden_NG, teacher_head),
        beta=beta,
        temperature=temperature,
        scale=scale,
        token_block=token_block,
    ).values_N


def topk_generalized_jsd(
    student_logits_NV: Tensor,
    ids_NK: Tensor,
    log_p_NK: Tensor,
    *,
    beta: float,
    scale: str = "paper",
    tail: str = "bucket",
) -> Tensor:
    """Return `token_divergence(...).values_N` of logits [N, V] and a teacher's top tokens.

    `ids_NK` are int64 and distinct at each position; `log_p_NK` their log-probs over the teacher's whole vocabulary at
    temperature 1, float32 or float64, -inf for a missing entry. Options and errors are those of `token_divergence`.
    """
    return token_divergence(
        LogitsSignal(student_logits_NV),
        TopKSignal(ids_NK, log_p_NK, student_logits_NV.shape[-1]),
        beta=beta,
        scale=scale,
        tail=tail,
    ).values_N


def linear_topk_generalized_jsd(
    student_hidden_NH: Tensor,
    student_weight_VH: Tensor,
    ids_NK: Tensor,
    log_p_NK: Tensor,
    *,
    beta: float,
    scale: str = "paper",
    tail: str = "bucket",
    student_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    token_block: int | None = None,
) -> Tensor:
    """Return `topk_generalized_jsd` of final hidden states and a head, without all logits at once.

    The student's arguments are those of `linear_generalized_jsd`, the teacher's those of `topk_generalized_jsd`.
    """
    head = Head(student_weight_VH, student_bias, student_logit_scale, student_softcap)
    return token_divergence(
        HiddenSignal(student_hidden_NH, head),
        TopKSignal(ids_NK, log_p_NK, student_weight_VH.shape[0]),
        beta=beta,
        scale=scale,
        tail=tail,
        token_block=token_block,
    ).values_N


def _logits(signal: StudentSignal) -> Tensor:
    return signal.head.logits(signal.hidden_NH) if isinstance(signal, HiddenSignal) else signal.logits_NV


def _is_float64(signal: PlainSignal) -> bool:
    if isinstance(signal, MappedSignal):
        return _is_float64(signal.signal)
    if isinstance(signal, HiddenSignal):
        return torch.float64 in (signal.hidden_NH.dtype, signal.head.weight_VH.dtype)
    return (signal.log_p_NK if isinstance(signal, TopKSignal) else signal.logits_NV).dtype == torch.float64


def _first_tensor(signal: StudentSignal) -> Tensor:
    return signal.hidden_NH if isinstance(signal, HiddenSignal) else signal.logits_NV


def _check_products(product_dtype: torch.dtype | None, **sizes: float | None) -> None:
    if product_dtype not in (None, *PRODUCT_DTYPES.values()):
        raise GKDConfigError(
            f"product_dtype must be None, {', '.join(map(str, PRODUCT_DTYPES.values()))}; got {product_dtype}"
        )
    for name, size in sizes.items():
        if size is not None and not 1 <= size < math.inf:
            raise GKDConfigError(f"{name} must be at least 1 and finite, or None for a default; got {size}")


def _check_teacher(teacher: Signal, temperature: float, divergence: str, tail: str) -> None:
    if isinstance(teacher, GroupedSignal):
        check_groups(teacher)
    elif isinstance(teacher, SummedSignal):
        check_terms(teacher)
    for signal in plain_signals(teacher):
        if isinstance(signal, TopKSignal):
            _check_top_k(signal)
            check_tail(tail, signal.ids_NK.shape[1])
            check_top_k_temperature(temperature)
        elif isinstance(signal, MappedSignal):
            _check_signal("teacher", signal.signal)
            _check_map(signal)
            check_mode(signal.mapping.mode, divergence)
        else:
            _check_signal("teacher", signal)


def _check_top_k(teacher: TopKSignal) -> None:
    ids_NK, log_p_NK = teacher.ids_NK, teacher.log_p_NK
    if ids_NK.ndim != 2 or ids_NK.shape[1] == 0 or ids_NK.dtype != torch.long:
        raise GKDConfigError(
            "the teacher's top tokens must be an int64 tensor [N, K] with K of at least 1; flatten the batch and "
            f"length axes first; got {ids_NK.dtype} {list(ids_NK.shape)}"
        )
    if log_p_NK.shape != ids_NK.shape or log_p_NK.dtype not in (torch.float32, torch.float64):
        raise GKDConfigError(
            f"the teacher's log-probs must be a float32 or float64 tensor {list(ids_NK.shape)}, one for each of its "
            f"top tokens; got {log_p_NK.dtype} {list(log_p_NK.shape)}: below float32, rounding loses the mass of the "
            "other tokens"
        )


def _check_map(teacher: MappedSignal) -> None:
    mapping, W = teacher.mapping, teacher.signal.vocab_size
    if len(mapping.teacher_group_W) != W or len(mapping.student_ids_M) != len(mapping.teacher_ids_M):
        raise GKDConfigError(
            f"a map must have one group for each of the {W} tokens that the teacher predicts over, and as many matched "
            f"tokens of the student as of the teacher; got {len(mapping.teacher_group_W)} groups, and "
            f"{len(mapping.student_ids_M)} and {len(mapping.teacher_ids_M)} tokens: slice the teacher's signal to the "
            "tokens of its tokenizer"
        )


def _check_signal(name: str, signal: StudentSignal) -> None:
    if isinstance(signal, LogitsSignal):
        _check_tensor(f"{name} logits", signal.logits_NV, "[N, V]; flatten the batch and length axes first")
        return
    hidden_NH, head = signal.hidden_NH, signal.head
    _check_tensor(f"{name} hidden states", hidden_NH, "[N, H]; flatten the batch and length axes first")
    _check_tensor(f"{name} head weight", head.weight_VH, "[V, H], as nn.Linear keeps it")
    if hidden_NH.shape[1] != head.weight_VH.shape[1]:
        raise GKDConfigError(
            f"the {name}'s hidden states and head weight must have the same width H; got "
            f"{list(hidden_NH.shape)} and {list(head.weight_VH.shape)}: pass the same model's head as [V, H]"
        )
    if head.bias_V is not None and head.bias_V.shape != head.weight_VH.shape[:1]:
        raise GKDConfigError(
            f"the {name}'s head bias must have the shape [{len(head.weight_VH)}], one entry per token of the "
            f"weight; got {list(head.bias_V.shape)}: slice both in the same way"
        )
    if head.softcap is not None and not head.softcap > 0:
        raise GKDConfigError(f"the {name}'s softcap must be positive, or None for no cap; got {head.softcap}")


def _check_tensor(what: str, tensor: Tensor, expected: str) -> None:
    if tensor.ndim != 2 or not tensor.is_floating_point():
        raise GKDConfigError(f"the {what} must be a float tensor {expected}; got {tensor.dtype} {list(tensor.shape)}")


def _check_pair(
    student: StudentSignal, teacher: Signal, labels_N: Tensor | None, label_weight_N: Tensor | None
) -> None:
    for signal in plain_signals(teacher):
        if student.vocab_size != signal.vocab_size:
            raise GKDConfigError(
                "student and teacher must predict over the same vocabulary; got "
                f"{student.vocab_size} tokens for the student and {signal.vocab_size} for the teacher: "
                "slice both to the shared vocabulary first, signal.sliced(vocab_size)"
            )
    if student.vocab_size == 0:
        raise GKDConfigError("student and teacher must predict over at least one token; got V = 0")
    N, teacher_N = scored_positions(student), scored_positions(teacher)
    if teacher_N != N:
        raise GKDConfigError(
            f"student and teacher must be scored at the same positions; got N = {N} for the student and "
            f"N = {teacher_N} for the teacher: select the same positions on both sides"
        )
    if labels_N is not None and (labels_N.shape != (N,) or labels_N.dtype != torch.long):
        raise GKDConfigError(
            f"labels_N must be an int64 tensor with one token id for each position, [{N}]; got "
            f"{labels_N.dtype} {list(labels_N.shape)}"
        )
    if label_weight_N is not None and (labels_N is None or label_weight_N.shape != (N,)):
        raise GKDConfigError(
            f"label_weight_N must have one weight for each position, [{N}], and come with labels_N; got "
            f"{list(label_weight_N.shape)} {'without' if labels_N is None else 'with'} labels_N"
        )
