"""The loss from hidden states under mixed precision: queued on the device without waiting, and equal if repeated.

On a meta tensor everything that would wait for a GPU raises, since there is nothing to read. So all that CUDA does but
for the kernels themselves, with its products of halves, runs here on meta tensors.
Shapes: N tokens, V vocabulary, H hidden width, K top tokens of a teacher.
"""

import pytest
import torch

from gkd_trainer.divergence import projection, rows, token_divergence, workspace
from gkd_trainer.signals import Head, HiddenSignal, TopKSignal
from tests.copies import NoOrdinaryCopies

pytest.importorskip("triton")

from gkd_trainer.divergence import triton, triton_topk

HALF = torch.bfloat16

ON_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CASES = [
    pytest.param(dtype, K, options, id=f"{str(dtype)[6:]}-{'all tokens' if K is None else 'top k'}-{options}")
    for dtype in (HALF, torch.float32)
    for K in (None, 5)
    for options in ({"beta": 0.5}, {"beta": 0.0})
]
"""The dtype of hidden states and heads, how many of the teacher's top tokens are known, and the divergence."""


@pytest.fixture
def launched(monkeypatch):
    """Have tensors on the meta device compared as on CUDA; the kernels, as they would be queued."""
    names = []

    class NoKernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **options: names.append(self.name)

    autocast = torch.autocast  # has no meta device
    monkeypatch.setattr(torch, "autocast", lambda device, **options: autocast("cpu", **options))
    monkeypatch.setattr(rows, "_engine", "triton")
    monkeypatch.setattr(projection, "_sums_halves", lambda head, half: half is not None)
    monkeypatch.setattr(workspace, "_padding", lambda device: workspace._CUDA_PADDING)
    for module, name in [
        (triton, "_compare_kernel"),
        (triton_topk, "_categories_kernel"),
        (triton_topk, "_gradient_kernel"),
    ]:
        monkeypatch.setattr(module, name, NoKernel(name))
    return names


def comparison(device, dtype, K, options, *, N, V, H=32):
    """Return a function that computes values, and gradients by both kinds of backward pass; each call repeats it."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    leaves = [randn(N, H).requires_grad_(), randn(V, H).requires_grad_()]
    student = HiddenSignal(leaves[0], Head(leaves[1]))
    teacher = HiddenSignal(randn(N, H + 8), Head(randn(V, H + 8)))
    if K is not None:
        log_p_NV = torch.randn(N, V, generator=generator).log_softmax(dim=1).to(device)
        teacher = TopKSignal(*log_p_NV.topk(K, dim=1)[::-1], V)
    labels_N = torch.arange(N, device=device) % V
    weight_N, upstream_N = (torch.linspace(0, end, N, device=device) for end in (1, 2))
    options = {"product_dtype": HALF, "token_block": -(-N // 3), **options}

    def compare():
        plain = token_divergence(student, teacher, **options)
        mixed = token_divergence(student, teacher, labels_N=labels_N, label_weight_N=weight_N, **options)
        # The gradient of the first is scaled, and that of the second computed again, since tokens weigh differently.
        loss = plain.values_N.sum() + (mixed.loss_N * upstream_N).sum()
        return plain.values_N, mixed.loss_N, *torch.autograd.grad(loss, leaves)

    return compare


@pytest.mark.parametrize(("dtype", "K", "options"), CASES)
def test_on_meta_forward_and_backward_wait_for_nothing(dtype, K, options, launched):
    compare = comparison("meta", dtype, K, options, N=10, V=101)
    with NoOrdinaryCopies():
        results = compare()
    own = {"_compare_kernel"} if K is None else {"_compare_kernel", "_categories_kernel", "_gradient_kernel"}
    assert set(launched) == own
    assert all(result.device.type == "meta" for result in results)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize(("dtype", "K", "options"), CASES)
def test_on_a_gpu_forward_and_backward_wait_for_nothing(dtype, K, options):
    compare = comparison("cuda", dtype, K, options, N=1000, V=5003)
    expected = compare()  # compiles kernels, and copies constants
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        results = compare()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize(("dtype", "K", "options"), CASES)
@pytest.mark.parametrize(("device", "V"), [("cpu", 101), pytest.param("cuda", 151_665, marks=ON_CUDA)])
def test_a_repeat_gives_the_same_bits(device, V, dtype, K, options):
    compare = comparison(device, dtype, K, options, N=1000 if device == "cuda" else 10, V=V)
    expected = compare()
    for _ in range(3):
        assert all(map(torch.equal, compare(), expected))
