"""The loss of a micro-batch without a trainer: one value and one gradient, however the student's head is reached."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gkd_trainer import FrozenTeacher, GKDArguments
from gkd_trainer.divergence import reference_jsd, token_divergence
from gkd_trainer.models.heads import InseparableHead, SeparableHead, find_head
from gkd_trainer.signals import LogitsSignal
from gkd_trainer.trainer.loss import Comparison, divided, product_dtype, run_student
from gkd_trainer.types import TokenBatch

X = -100
TWO_ROWS = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 2, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]),
    "labels": torch.tensor([[X, X, 7, 8, 9], [X, 11, 12, 2, X]]),
    "is_on_policy": torch.tensor([False, True]),
}
IS_DATA_N = torch.tensor([True] * 3 + [False] * 3)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Awaiting(nn.Module):
    """Wraps a student as DDP with a static graph does: it acts once the gradient of its output is there."""

    def __init__(self, student):
        super().__init__()
        self.student, self.calls = student, 0

    def forward(self, **inputs):
        output = self.student(**inputs)
        output.logits.register_hook(lambda gradient: setattr(self, "calls", self.calls + 1))
        return output


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("labels", [TWO_ROWS["labels"], torch.full((2, 5), X)], ids=["tokens", "none"])
def test_what_awaits_the_gradient_of_the_output_gets_it_and_no_gradient_changes(tiny_model, family, labels):
    student, teacher = tiny_model(family), FrozenTeacher(tiny_model(family, hidden=48, seed=1))
    teacher.prepare(torch.device("cpu"))
    batch, found = TokenBatch.from_inputs({**TWO_ROWS, "labels": labels}), []
    for is_output_awaited in (False, True):
        wrapped = Awaiting(student)
        comparison = Comparison(GKDArguments(), batch, teacher.score(batch), 368, True)
        student.zero_grad()
        output = run_student(
            wrapped, student, batch, find_head(student), comparison, is_output_awaited=is_output_awaited
        )
        output.loss_sum.backward()
        found.append(gradients(student))
        assert wrapped.calls == (is_output_awaited or batch.n_scored == 0)
    assert_same_gradients(*found, tolerance=0.0)


def assert_same_gradients(actual, expected, tolerance=1e-5):
    assert actual.keys() == expected.keys()
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (actual[name] - gradient).abs().max() <= tolerance * scale, name


@pytest.fixture
def run(tiny_model):
    """Run a student on two rows without a trainer; return its output and gradients."""
    frozen = {top_k: FrozenTeacher(tiny_model(hidden=48, seed=1), top_k=top_k) for top_k in (None, 8)}

    def run(
        student,
        head=None,
        *,
        is_training=True,
        vocab_size=368,
        top_k=None,
        keeps_logits=False,
        args=None,
        backward=True,
        **inputs,
    ):
        batch, teacher = TokenBatch.from_inputs({**TWO_ROWS, **inputs}), frozen[top_k]
        teacher.prepare(torch.device("cpu"))
        signal = teacher.score(batch).sliced(vocab_size)
        comparison = Comparison(GKDArguments(**(args or {})), batch, signal, vocab_size, is_training)
        output = run_student(student, student, batch, head or find_head(student), comparison, keeps_logits=keeps_logits)
        student.zero_grad()
        if backward:
            output.loss_sum.backward()
        return output, gradients(student)

    return run


def logits_of_two_rows(model):
    is_scored = TWO_ROWS["labels"][:, 1:] != X
    return (
        model(TWO_ROWS["input_ids"], attention_mask=TWO_ROWS["attention_mask"])
        .logits[:, :-1][is_scored]
        .detach()
        .double()
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "gpt2"])
def test_the_loss_is_the_same_however_the_head_is_found(run, tiny_model, family):
    student = tiny_model(family)
    separable = find_head(student)
    assert isinstance(separable, SeparableHead)
    expected, expected_gradients = run(student, separable)
    teacher = logits_of_two_rows(tiny_model(hidden=48, seed=1))
    divergence_N = reference_jsd(logits_of_two_rows(student), teacher, beta=0.5)
    assert torch.allclose(expected.tokens.values_N.double(), divergence_N, rtol=1e-4)
    assert expected.loss_sum.item() == pytest.approx(divergence_N.sum().item(), rel=1e-5)
    for head in (InseparableHead("a test"), replace(separable, is_sharded=True)):
        output, actual_gradients = run(student, head)
        assert torch.allclose(output.tokens.values_N, expected.tokens.values_N, rtol=1e-5)
        assert_same_gradients(actual_gradients, expected_gradients)


@pytest.mark.parametrize(("keeps_logits", "columns"), [(True, 368), (False, 1)])
def test_full_logits_are_returned_only_on_request(run, tiny_model, keeps_logits, columns):
    output, _ = run(tiny_model(), keeps_logits=keeps_logits)
    assert output.outputs.logits.shape == (2, 5, columns)


def test_logits_returned_on_request_are_not_rounded_under_autocast(run, tiny_model):
    student = tiny_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        separable, whole = (run(student, keeps_logits=keeps, backward=False)[0] for keeps in (False, True))
    logits_BLV = whole.outputs.logits
    assert (logits_BLV != logits_BLV.bfloat16()).any()
    torch.testing.assert_close(whole.tokens.values_N, separable.tokens.values_N, rtol=1e-5, atol=1e-6)


def test_logits_on_request_are_left_to_autocast_if_the_products_are_to_round(run, tiny_model):
    student = tiny_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = run(student, keeps_logits=True, backward=False, args={"loss_product_dtype": "bfloat16"})
    assert output.outputs.logits.dtype == torch.bfloat16


@pytest.mark.parametrize("head", [None, InseparableHead("a test")])
def test_a_batch_without_a_token_to_train_on_stays_connected_to_all_weights(run, tiny_model, head):
    student = tiny_model(tie_word_embeddings=False)
    output, zeros = run(student, head, labels=torch.full((2, 5), X))
    assert output.loss_sum.item() == 0
    assert zeros.keys() == {name for name, _ in student.named_parameters()}
    assert not any(gradient.any() for gradient in zeros.values())


@pytest.mark.parametrize(("is_sharded", "inputs"), [(True, {}), (False, {"labels": torch.full((2, 5), X)})])
def test_the_backward_pass_of_a_sharded_head_or_of_no_token_starts_at_the_forwards_output(
    run, tiny_model, is_sharded, inputs
):
    student = tiny_model()
    output, _ = run(student, replace(find_head(student), is_sharded=is_sharded), backward=False, **inputs)
    assert torch.autograd.grad(output.loss_sum, output.outputs.logits)[0].shape[:2] == (2, 5)


def test_cross_entropy_is_only_for_training_on_the_data(run, tiny_model):
    student, args = tiny_model(), {"ce_weight": 0.25}
    output, _ = run(student, args=args)
    divergence_N, loss_N = output.tokens.values_N, output.tokens.loss_N
    targets_N = torch.tensor([7, 8, 9, 11, 12, 2])
    cross_entropy_N = nn.functional.cross_entropy(logits_of_two_rows(student), targets_N, reduction="none").float()
    mixed_N = torch.where(IS_DATA_N, 0.25 * cross_entropy_N + 0.75 * divergence_N, divergence_N)
    assert torch.allclose(loss_N, mixed_N, rtol=1e-4)
    assert output.loss_sum.item() == pytest.approx(mixed_N.sum().item(), rel=1e-5)
    for without in (run(student, is_training=False, args=args), run(student)):
        assert without[0].tokens.loss_N is without[0].tokens.cross_entropy_N is None
        assert torch.equal(without[0].loss_sum, divergence_N.sum())


@pytest.mark.parametrize(
    ("top_k", "args", "options"),
    [
        (None, {"beta": 0.1, "divergence_scale": "continuous"}, {"beta": 0.1, "scale": "continuous"}),
        (None, {"loss_temperature": 2.0}, {"beta": 0.5, "temperature": 2.0}),
        (
            None,
            {"divergence": "skew_kl", "divergence_options": {"alpha": 0.3}},
            {"divergence": "skew_kl", "divergence_options": {"alpha": 0.3}},
        ),
        (8, {"teacher_tail": "renormalize"}, {"beta": 0.5, "tail": "renormalize"}),
    ],
)
def test_the_options_reach_the_divergence(run, tiny_model, top_k, args, options):
    student, teacher = tiny_model(), FrozenTeacher(tiny_model(hidden=48, seed=1), top_k=top_k)
    teacher.prepare(torch.device("cpu"))
    output, _ = run(student, top_k=top_k, args=args)
    signal = teacher.score(TokenBatch.from_inputs(TWO_ROWS))
    expected = token_divergence(LogitsSignal(logits_of_two_rows(student).float()), signal, **options)
    assert torch.allclose(output.tokens.values_N, expected.values_N, rtol=1e-4)


def test_rows_of_the_head_beyond_the_shared_vocabulary_take_no_part(run, tiny_model):
    student = tiny_model(tie_word_embeddings=False)
    output, actual = run(student, vocab_size=300)
    divergence_N = reference_jsd(
        logits_of_two_rows(student)[:, :300], logits_of_two_rows(tiny_model(hidden=48, seed=1))[:, :300], beta=0.5
    )
    assert torch.allclose(output.tokens.values_N.double(), divergence_N, rtol=1e-4)
    assert actual["lm_head.weight"][:300].any()
    assert not actual["lm_head.weight"][300:].any()


def test_a_mixture_of_experts_has_its_router_loss_in_training_if_its_config_sets_it(run, tiny_model):
    student = tiny_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.7)
    output, _ = run(student)
    expected = student(TWO_ROWS["input_ids"], TWO_ROWS["attention_mask"], output_router_logits=True).aux_loss
    assert output.router_loss.value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.router_loss.weighted(torch.device("cpu")).item() == pytest.approx(0.7 * expected.item(), rel=1e-5)
    evaluated, _ = run(student, is_training=False)
    assert evaluated.router_loss is evaluated.outputs.aux_loss is None
    assert run(tiny_model("mixtral", output_router_logits=False))[0].router_loss is None
    assert run(tiny_model())[0].router_loss is None


@pytest.mark.parametrize(
    ("divisor", "ranks", "expected"),
    [(4, 1, 1.5), (torch.tensor(4), 1, 1.5), (0, 1, 6.0), (torch.tensor(0), 2, 12.0), (4, 2, 3.0)],
)
def test_a_sum_is_divided_by_the_tokens_of_all_ranks_that_are_averaged(divisor, ranks, expected):
    assert divided(torch.tensor(6.0), divisor, ranks).item() == expected


@pytest.mark.parametrize(
    ("option", "device", "mixed_precision", "expected"),
    [
        ("auto", "cuda", "bf16", torch.bfloat16),
        ("auto", "cuda", "fp16", torch.float16),
        ("auto", "cuda", "no", None),
        ("auto", "cpu", "bf16", None),
        ("float32", "cuda", "bf16", torch.float32),
        ("bfloat16", "cpu", "no", torch.bfloat16),
    ],
)
def test_products_follow_mixed_precision_on_cuda_unless_told_otherwise(option, device, mixed_precision, expected):
    args = SimpleNamespace(loss_product_dtype=option, device=torch.device(device))
    assert product_dtype(args, mixed_precision) == expected


def log_probs_in_columns(values):
    """Return the batch's SAMPLING_LOG_PROBS: those of the second row, as an engine gave them."""
    return torch.tensor([[math.nan] * 5, [math.nan, *values, math.nan]])


@pytest.mark.parametrize("options", [{}, {"loss_temperature": 2.0}, {"ce_weight": 0.25}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_sampled_tokens_have_the_student_s_cross_entropy_and_change_no_loss(run, tiny_model, family, options):
    student = tiny_model(family)
    log_p_NV = logits_of_two_rows(student).log_softmax(-1)
    expected, expected_gradients = run(student, args=options)
    output, found = run(student, args=options, sampling_log_probs=log_probs_in_columns([-1.0, -2.0, -3.0]))
    sampled_N = -log_p_NV[torch.arange(3, 6), torch.tensor([11, 12, 2])]
    assert torch.allclose(output.tokens.cross_entropy_N[3:].double(), sampled_N, rtol=1e-4)
    assert torch.equal(output.loss_sum, expected.loss_sum)
    assert_same_gradients(found, expected_gradients, tolerance=1e-6)
    # Nor are other tokens looked at, whose labels may be outside of the vocabulary.
    if "ce_weight" not in options:
        assert output.tokens.cross_entropy_N[:3].tolist() == [0.0] * 3
        assert expected.tokens.cross_entropy_N is None


def test_an_evaluation_does_not_look_at_the_log_probs_of_an_engine(run, tiny_model):
    values = log_probs_in_columns([-1.0, -2.0, -3.0])
    output, _ = run(tiny_model(), is_training=False, backward=False, sampling_log_probs=values)
    assert output.tokens.cross_entropy_N is None
