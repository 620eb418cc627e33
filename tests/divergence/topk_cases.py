"""Students, top-k teachers and comparisons for their tests. Shapes: N tokens, V vocabulary, K top tokens, H width."""

import torch
from torch.nn import functional

from gkd_trainer.divergence import (
    topk,
)
from gkd_trainer.divergence.linear import linear_divergence
from gkd_trainer.divergence.objective import Objective
from gkd_trainer.signals import Head, HiddenSignal, TopKSignal

BETAS = (0.0, 1e-3, 0.1, 0.5, 0.9, 1.0)
TAILS = ("bucket", "renormalize")
N, V, K, H = 7, 131, 5, 9


def objective_of(beta, scale="paper"):
    return Objective(beta=beta, is_continuous=scale == "continuous")


def topk_divergence(student_logits_NV, teacher, *, beta, scale="paper", **options):
    return topk.topk_divergence(student_logits_NV, teacher, objective=objective_of(beta, scale), **options)


def linear_topk_divergence(student, teacher, *, beta, scale="paper", **options):
    return linear_divergence(student, teacher, objective=objective_of(beta, scale), **options)


def pair(N=N, V=V, *, sigma=1.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    student_logits_NV = 3 * torch.randn(N, V, generator=generator)
    teacher_logits_NV = student_logits_NV + sigma * torch.randn(N, V, generator=generator)
    return student_logits_NV.to(dtype).requires_grad_(), teacher_logits_NV.to(dtype)


def top(teacher_logits_NV, K=K):
    top_NK = teacher_logits_NV.log_softmax(dim=1).topk(K, dim=1)
    return top_NK.indices, top_NK.values


def signal(teacher_logits_NV, K=K):
    return TopKSignal(*top(teacher_logits_NV, K), teacher_logits_NV.shape[1])


def hidden_signal(N=N, *, dtype=torch.float32, with_bias=True, requires_grad=True, **head):
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape, std):
        return (std * torch.randn(*shape, generator=generator)).to(dtype).requires_grad_(requires_grad)

    bias_V = leaf(V, std=0.5) if with_bias else None
    return HiddenSignal(leaf(N, H, std=1.0), Head(leaf(V, H, std=1.0), bias_V, **head))


def leaves(student):
    tensors = (student.hidden_NH, student.head.weight_VH, student.head.bias_V)
    return [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]


def oracle_logits(student):
    head = student.head
    bias_V = None if head.bias_V is None else head.bias_V.double()
    logits_NV = functional.linear(student.hidden_NH.double(), head.weight_VH.double(), bias_V) * head.scale
    return logits_NV if head.softcap is None else head.softcap * (logits_NV / head.softcap).tanh()


def upstream(N=N):
    """Upstream gradients of both signs and different sizes."""
    return torch.linspace(-1.0, 2.5, N)


def gradients(values_N, wrt, upstream_N=None):
    upstream_N = upstream(len(values_N)) if upstream_N is None else upstream_N
    return torch.autograd.grad(values_N, wrt, upstream_N.to(values_N.dtype), retain_graph=True)


def assert_values_close(actual_N, expected_N, beta):
    torch.testing.assert_close(actual_N.double(), expected_N, rtol=2e-5, atol=2e-6 * (beta * (1 - beta) or 1))


def assert_close_in_norm(actual, expected, *, tolerance):
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, f"relative error {error:.1e}"
