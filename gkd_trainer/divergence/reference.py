"""The divergence written like its formula, in plain torch: every faster path is tested against it.

Shapes: N tokens, V vocabulary, K top tokens of a teacher. p = teacher, q = student, m = beta·p + (1 - beta)·q.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gkd_trainer.divergence import formulas
from gkd_trainer.divergence.objective import DIVERGENCES
from gkd_trainer.divergence.options import TAILS, check_choice, checked_objective


def reference_jsd(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    scale: str = "paper",
) -> Tensor:
    """Return the divergence of each token in float64; autograd differentiates it by the student's logits.

    Args:
        student_logits_NV: [N, V], any float dtype; -inf is probability zero.
        teacher_logits_NV: [N, V], likewise; no gradient reaches it.
        beta: in [0, 1]; 0 is the forward KL(p‖q), 1 the reverse KL(q‖p).
        temperature: positive; both sides are softmax(logits / temperature).
        scale: "paper", or "continuous", which divides by beta·(1 - beta) inside (0, 1).

    Returns:
        values_N in nats, +inf where a KL is infinite.

    Raises:
        GKDConfigError: an unknown scale, or a number out of range.

    Source: Agarwal et al. 2023, arXiv 2306.13649, eq. 1.
    """
    checked_objective(beta=beta, temperature=temperature, scale=scale, dtype=torch.float64)
    values_NV = elementwise_jsd(
        student_logits_NV.double(), teacher_logits_NV.double(), beta=beta, temperature=temperature
    )
    values_N = values_NV.sum(dim=-1)
    if scale == "continuous" and 0 < beta < 1:
        values_N = values_N / (beta * (1 - beta))
    return values_N


def reference_topk_jsd(
    student_logits_NV: Tensor,
    ids_NK: Tensor,
    log_p_NK: Tensor,
    *,
    beta: float,
    scale: str = "paper",
    tail: str = "bucket",
) -> Tensor:
    """Return the divergence of each token over the teacher's K tokens and the tail, in float64, differentiable.

    Args:
        student_logits_NV: [N, V], any float dtype.
        ids_NK: [N, K] token ids, distinct at each position where `log_p_NK` is not -inf.
        log_p_NK: [N, K] the teacher's log-probs; -inf is not an entry. A position without entries has the value 0.
        beta: as for `reference_jsd`.
        scale: likewise.
        tail: "bucket" merges all tokens that are not entries into one category, "renormalize" leaves them out.

    Returns:
        values_N in nats.

    Raises:
        GKDConfigError: an unknown scale or tail, or a beta out of range.
    """
    checked_objective(beta=beta, scale=scale, dtype=torch.float64)
    check_choice("tail", tail, TAILS)
    N, V = student_logits_NV.shape
    is_entry_NK = log_p_NK != -torch.inf
    # One more column takes everything that is not an entry, whatever its id.
    column_NK = torch.where(is_entry_NK, ids_NK, V)
    p_NV = torch.zeros(N, V + 1, dtype=torch.float64).scatter(1, column_NK, log_p_NK.double().exp())[:, :V]
    is_inside_NV = torch.zeros(N, V + 1, dtype=torch.bool).scatter(1, column_NK, True)[:, :V]
    q_NV = student_logits_NV.double().softmax(dim=1)
    p_parts, q_parts = [p_NV], [q_NV * is_inside_NV]
    if tail == "bucket":
        # A teacher's mass is known only to the rounding of its log-probs.
        tail_p_N1 = (1 - p_NV.sum(dim=1, keepdim=True)).clamp_min(torch.finfo(log_p_NK.dtype).eps)
        p_parts.append(torch.where(is_inside_NV.all(dim=1, keepdim=True), 0.0, tail_p_N1))
        q_parts.append((q_NV * ~is_inside_NV).sum(dim=1, keepdim=True))
    else:  # without entries, nothing but one category that is the same on both sides
        p_parts.append((~is_inside_NV.any(dim=1, keepdim=True)).double())
        q_parts.append(p_parts[-1])
    p_NC, q_NC = torch.cat(p_parts, dim=1), torch.cat(q_parts, dim=1)
    p_NC, q_NC = p_NC / p_NC.sum(dim=1, keepdim=True), q_NC / q_NC.sum(dim=1, keepdim=True)
    values_N = formulas.jsd(p_NC, q_NC, {"beta": beta})
    return values_N / (beta * (1 - beta)) if scale == "continuous" and 0 < beta < 1 else values_N


def reference_divergence(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    *,
    divergence: str,
    temperature: float = 1.0,
    **parameters: float,
) -> Tensor:
    """Return any of the divergences of each token over the whole vocabulary, in float64, differentiable.

    Args:
        student_logits_NV: [N, V], any float dtype.
        teacher_logits_NV: [N, V], likewise; no gradient reaches it.
        divergence: a key of `objective.DIVERGENCES`, which names formula and source.
        temperature: positive; both sides are softmax(logits / temperature).
        parameters: beta for "jsd", 0.5 by default; the options of the others, if not the defaults.

    Returns:
        values_N.

    Raises:
        GKDConfigError: an unknown divergence, or a number out of range.
    """
    beta = parameters.pop("beta", 0.5) if divergence == "jsd" else 0.5
    objective = checked_objective(divergence, parameters, beta=beta, temperature=temperature, dtype=torch.float64)
    q_NV = (student_logits_NV.double() / temperature).softmax(dim=1)
    p_NV = (teacher_logits_NV.detach().double() / temperature).softmax(dim=1)
    return DIVERGENCES[divergence].oracle(p_NV, q_NV, objective.parameters)


def elementwise_jsd(student_logits: Tensor, teacher_logits: Tensor, *, beta: float, temperature: float) -> Tensor:
    """Return each token's contribution to the divergence, [..., V] as the logits, in their dtype.

    The arguments are those of `reference_jsd`. Several tensors of that size are allocated and kept for backward.
    """
    log_q = torch.log_softmax(student_logits / temperature, dim=-1)
    log_p = torch.log_softmax(teacher_logits.detach() / temperature, dim=-1)
    q, p = log_q.exp(), log_p.exp()
    if beta == 0:
        return _weighted(p, log_p, log_q)
    if beta == 1:
        return _weighted(q, log_q, log_p)
    m = beta * p + (1 - beta) * q
    # Where m is 0, so are p and q, and the terms are zero: the 1 only keeps log's gradient finite.
    log_m = torch.where(m == 0, 1.0, m).log()
    return beta * _weighted(p, log_p, log_m) + (1 - beta) * _weighted(q, log_q, log_m)


def _weighted(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    # The ratio is masked before it is multiplied, because 0·inf is NaN in the gradient even if masked later.
    return a * torch.where(a == 0, 0.0, log_a - log_b)
