"""Two vocabularies with some tokens in common, and both distributions over their categories, written plainly.

Shapes: N tokens, V the student's vocabulary, W the teacher's, M tokens that both have, G groups.
"""

import torch

from gkd_trainer.divergence import formulas
from gkd_trainer.signals import Head, HiddenSignal, LogitsSignal, MappedSignal, VocabularyMap

N, V, W, M, G = 7, 23, 31, 13, 5


def a_map(mode="matched", *, V=V, W=W, M=M, seed=0, min_matched_mass=0.5):
    """A random map: by default the fall-back to groups takes some positions and not others."""
    generator = torch.Generator().manual_seed(seed)
    student_ids_M = torch.randperm(V, generator=generator)[:M].sort().values
    teacher_ids_M = torch.randperm(W, generator=generator)[:M]
    groups = [torch.randint(0, G, (size,), generator=generator) for size in (V, W)]
    for group in groups:  # each has tokens on both sides
        group[:G] = torch.arange(G)
    return VocabularyMap(student_ids_M, teacher_ids_M, *groups, G, mode, min_matched_mass)


def logits(*shape, seed, dtype=torch.float64):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def hidden(mapping, side, *, N=N, H=6, dtype=torch.float64, **head):
    """Hidden states with a head over one side's tokens."""
    size = len(mapping.student_group_V if side == "student" else mapping.teacher_group_W)
    seed = 10 if side == "student" else 20
    tensors = logits(N, H, seed=seed, dtype=dtype), logits(size, H, seed=seed + 1, dtype=dtype) / 3
    return HiddenSignal(tensors[0].requires_grad_(), Head(tensors[1].requires_grad_(), **head))


def mapped(teacher_logits_NW, mapping):
    return MappedSignal(LogitsSignal(teacher_logits_NW), mapping)


def expected(student_NV, teacher_NW, mapping, *, beta=0.5, temperature=1.0):
    """The value of each token by its definition, in float64, with its gradient by autograd."""
    q, p = ((each.double() / temperature).softmax(dim=1) for each in (student_NV, teacher_NW))
    student, teacher = mapping.student_ids_M, mapping.teacher_ids_M
    if mapping.mode in ("matched", "next_byte"):
        over_groups_N = formulas.jsd(
            over_groups(p, mapping.teacher_group_W), over_groups(q, mapping.student_group_V), {"beta": beta}
        )
        if mapping.mode == "next_byte":
            return over_groups_N
        over_tokens_N = formulas.jsd(with_rest(p, teacher), with_rest(q, student), {"beta": beta})
        return torch.where(p[:, teacher].sum(dim=1) < mapping.min_matched_mass, over_groups_N, over_tokens_N)
    if mapping.mode == "uld":
        return sorted_distance(q, p)
    share = len(teacher) / p.shape[1]
    matched_N = formulas.jsd(p[:, teacher], q[:, student], {"beta": beta})
    return share * matched_N + (1 - share) * sorted_distance(others(q, student), others(p, teacher))


def others(p_NV, ids_M):
    return p_NV[:, [each for each in range(p_NV.shape[1]) if each not in set(ids_M.tolist())]]


def with_rest(p_NV, ids_M):
    return torch.cat([p_NV[:, ids_M], others(p_NV, ids_M).sum(dim=1, keepdim=True)], dim=1)


def over_groups(p_NV, group_V):
    return torch.stack([p_NV[:, group_V == group].sum(dim=1) for group in range(G)], dim=1)


def sorted_distance(q_NU, p_NU):
    size = max(q_NU.shape[1], p_NU.shape[1])
    q, p = (
        torch.nn.functional.pad(each.sort(dim=1, descending=True).values, (0, size - each.shape[1]))
        for each in (q_NU, p_NU)
    )
    return (q - p).abs().sum(dim=1)
