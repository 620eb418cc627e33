"""An evaluation gives each token the same weight, whatever its batch, rank or kind of sample."""

import pytest
import torch

from gkd_trainer.divergence import TokenDivergence
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.report.metrics import sums_by_sample
from gkd_trainer.trainer.evaluation import Evaluation, require_equal_batches


def sums_of(*rows):
    """The sums of a batch from the divergence of each token of each row; the entropy of a token is its row's number."""
    divergence_N = torch.tensor([value for row in rows for value in row])
    rows_N = torch.tensor([number for number, row in enumerate(rows) for _ in row], dtype=torch.long)
    all_N = torch.ones(len(rows_N), dtype=torch.bool)
    result = TokenDivergence(divergence_N, None, rows_N.double(), 2 * rows_N.double(), divergence_N < 1, all_N, all_N)
    return sums_by_sample(rows_N, torch.zeros(len(rows), dtype=torch.bool), result)


def mean_of(*rows):
    return torch.tensor([value for row in rows for value in row]).mean()


def add(evaluation, *rows, **options):
    evaluation.see(sums_of(*rows))
    evaluation.count(mean_of(*rows), **options)


@pytest.fixture
def evaluation():
    return Evaluation(lambda rows: rows)


def test_each_token_weighs_the_same_in_whatever_batch_it_lies(evaluation):
    add(evaluation, [0.5, 1.5, 4.0], [2.0])
    add(evaluation, [0.25])
    assert evaluation.metrics("eval") == {
        "eval_loss": pytest.approx(8.25 / 5),
        "eval_student_entropy": pytest.approx(1 / 5),
        "eval_teacher_entropy": pytest.approx(2 / 5),
        "eval_top_token_agreement": pytest.approx(2 / 5),
    }


def test_completions_of_the_student_are_measured_apart_under_names_of_their_own(evaluation):
    add(evaluation, [1.0])
    add(evaluation, [3.0], [5.0], is_on_policy=True)
    metrics = evaluation.metrics("test")
    assert (metrics["test_loss"], metrics["test_on_policy_loss"]) == (1.0, 4.0)
    assert metrics["test_on_policy_student_entropy"] == 0.5
    assert len(metrics) == 8


def test_a_batch_is_counted_once_and_with_the_last_sums_that_were_seen(evaluation):
    evaluation.see(sums_of([9.0]))
    add(evaluation, [1.0])
    evaluation.count(torch.tensor(7.0))
    assert evaluation.metrics("eval")["eval_loss"] == 1.0


def test_nothing_is_added_if_no_batch_was_seen(evaluation):
    evaluation.count(torch.tensor(7.0))
    evaluation.count(torch.tensor(7.0), is_on_policy=True)
    assert evaluation.metrics("eval") == {}


def test_a_batch_without_tokens_changes_nothing(evaluation):
    add(evaluation, [2.0])
    evaluation.see(sums_of([], []))
    evaluation.count(torch.tensor(0.0))
    assert evaluation.metrics("eval")["eval_loss"] == 2.0


def test_a_subclasss_change_of_the_loss_is_weighted_by_its_batchs_tokens(evaluation):
    add(evaluation, [1.0, 3.0, 2.0])
    evaluation.see(sums_of([1.0]))
    evaluation.count(torch.tensor(1.5))
    assert evaluation.metrics("eval")["eval_loss"] == pytest.approx((6 + 1.5) / 4)


def test_samples_that_only_pad_a_batch_are_left_out_when_gathering():
    evaluation = Evaluation(lambda rows: rows[:2])
    add(evaluation, [1.0], [2.0, 3.0], [50.0])
    assert evaluation.metrics("eval")["eval_loss"] == pytest.approx(2.0)


def test_samples_of_other_ranks_count():
    other = []
    evaluation = Evaluation(lambda rows: torch.cat([rows, *other]))
    alone = Evaluation(lambda rows: other.append(rows) or rows)
    add(alone, [5.0, 7.0, 9.0])
    add(evaluation, [1.0])
    assert evaluation.metrics("eval")["eval_loss"] == pytest.approx(22 / 4)


def test_ranks_with_different_numbers_of_batches_are_refused(two_ranks):
    ranks = two_ranks(2, 1)
    require_equal_batches([1, 2], ranks)  # with even_batches they don't ask
    ranks.accelerator.even_batches = False
    require_equal_batches([1, 2], ranks)
    require_equal_batches(iter([1, 2]), ranks)
    with pytest.raises(GKDConfigError, match="they have 2, 1, and would wait"):
        require_equal_batches([1, 2], ranks)
    assert ranks.said == [[2], [2]]
