"""TRL's loss, against TRL. Shapes: B batch, L length, V vocabulary."""

import warnings

import pytest
import torch

from gkd_trainer.divergence import reference_jsd, trl_generalized_jsd_loss
from gkd_trainer.errors import GKDConfigError

B, L, V = 3, 5, 37
REDUCTIONS = ("batchmean", "sum", "mean", "none")


@pytest.fixture(scope="module")
def trl_loss():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gkd = pytest.importorskip("trl.experimental.gkd")
    return gkd.GKDTrainer.generalized_jsd_loss


def pair(*leading, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    student_logits = 2 * torch.randn(*leading, V, generator=generator)
    teacher_logits = 2 * torch.randn(*leading, V, generator=generator)
    return student_logits.to(dtype).requires_grad_(), teacher_logits.to(dtype)


def some_labels(*leading):
    labels = torch.arange(torch.Size(leading).numel()).reshape(leading)
    return labels.masked_fill(labels % 3 == 1, -100)


def assert_same(ours, theirs, student_logits):
    """Compare values, and gradients under uneven upstream gradients."""
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    weights = torch.linspace(-1, 2, ours.numel()).reshape(ours.shape) if ours.ndim else torch.tensor(1.5)
    (our_gradient,) = torch.autograd.grad((ours * weights).sum(), student_logits)
    (their_gradient,) = torch.autograd.grad((theirs * weights).sum(), student_logits)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("has_labels", [False, True])
@pytest.mark.parametrize("num_items_in_batch", [None, 7, torch.tensor(7)])
def test_every_reduction_equals_trl(trl_loss, beta, temperature, reduction, has_labels, num_items_in_batch):
    student_logits, teacher_logits = pair(B, L)
    options = {
        "labels": some_labels(B, L) if has_labels else None,
        "beta": beta,
        "temperature": temperature,
        "reduction": reduction,
        "num_items_in_batch": num_items_in_batch,
    }
    ours = trl_generalized_jsd_loss(student_logits, teacher_logits, **options)
    assert_same(ours, trl_loss(student_logits, teacher_logits, **options), student_logits)


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 3, 2), (0, 5), (2, 0)])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
def test_every_leading_shape_equals_trl(trl_loss, leading, reduction):
    student_logits, teacher_logits = pair(*leading)
    ours = trl_generalized_jsd_loss(student_logits, teacher_logits, reduction=reduction)
    assert_same(ours, trl_loss(student_logits, teacher_logits, reduction=reduction), student_logits)
    labels = some_labels(*leading)
    ours = trl_generalized_jsd_loss(student_logits, teacher_logits, labels, reduction=reduction)
    assert_same(ours, trl_loss(student_logits, teacher_logits, labels, reduction=reduction), student_logits)


def test_nothing_to_train_on_is_a_connected_zero_like_trls(trl_loss):
    student_logits, teacher_logits = pair(B, L)
    labels = torch.full((B, L), -100)
    ours = trl_generalized_jsd_loss(student_logits, teacher_logits, labels)
    assert ours.item() == trl_loss(student_logits, teacher_logits, labels).item() == 0
    assert (torch.autograd.grad(ours, student_logits)[0] == 0).all()


def test_positional_arguments_and_defaults_are_those_of_trl(trl_loss):
    student_logits, teacher_logits = pair(B, L)
    labels = some_labels(B, L)
    for arguments in ((), (labels,), (labels, 0.1, 2.0, "sum"), (labels, 0.1, 2.0, "sum", 5)):
        ours = trl_generalized_jsd_loss(student_logits, teacher_logits, *arguments)
        assert_same(ours, trl_loss(student_logits, teacher_logits, *arguments), student_logits)


def test_values_without_trl_are_sums_of_the_oracle():
    student_logits, teacher_logits = pair(B, L)
    values_N = reference_jsd(student_logits.view(-1, V), teacher_logits.view(-1, V), beta=0.1)
    total = trl_generalized_jsd_loss(student_logits, teacher_logits, beta=0.1)
    torch.testing.assert_close(total.double(), values_N.sum() / B, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_bfloat16_logits_give_a_float32_loss(reduction):
    student_logits, teacher_logits = pair(B, L, dtype=torch.bfloat16)
    expected = trl_generalized_jsd_loss(student_logits.float(), teacher_logits.float(), reduction=reduction)
    actual = trl_generalized_jsd_loss(student_logits, teacher_logits, reduction=reduction)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "batch"}, r"reduction must be one of 'batchmean', .*got 'batch'"),
        ({"beta": 2.0, "reduction": "none"}, r"beta must be in \[0, 1\]"),
        ({"temperature": 0.0}, r"temperature must be above 0"),
        ({"teacher_logits": torch.zeros(B, L, V + 1)}, r"same shape .*got \[3, 5, 37\] and \[3, 5, 38\]"),
        ({"labels": torch.zeros(B, L + 1)}, r"labels must have .*\[3, 5\]; got \[3, 6\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    student_logits, teacher_logits = pair(B, L)
    arguments = {"student_logits": student_logits, "teacher_logits": teacher_logits, **change}
    with pytest.raises(GKDConfigError, match=message):
        trl_generalized_jsd_loss(**arguments)
