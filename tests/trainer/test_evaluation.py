"""An evaluation gives each token the same weight, whatever its batch, rank or kind of sample."""

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from gkd_trainer.divergence import TokenDivergence
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.report.metrics import sums_by_sample
from gkd_trainer.trainer import trainer as trainer_module
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


@pytest.mark.parametrize("gathers_outputs", [False, True])
def test_ranks_with_different_numbers_of_batches_are_refused(two_ranks, gathers_outputs):
    ranks = two_ranks(2, 1)
    require_equal_batches([1, 2], ranks, gathers_outputs=gathers_outputs)  # with even_batches they don't ask
    ranks.accelerator.even_batches = False
    require_equal_batches([1, 2], ranks, gathers_outputs=gathers_outputs)
    require_equal_batches(iter([1, 2]), ranks, gathers_outputs=gathers_outputs)
    with pytest.raises(GKDConfigError, match="they have 2, 1, and would wait"):
        require_equal_batches([1, 2], ranks, gathers_outputs=gathers_outputs)
    assert ranks.said == [[2], [2]]


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [2, 4])
@pytest.mark.parametrize("samples", range(5, 18))
def test_batches_of_different_sizes_are_refused_if_outputs_are_gathered(
    two_ranks, samples, batch_size, drop_last, splits
):
    loaders = [
        prepare_data_loader(
            DataLoader(range(samples), batch_size, drop_last=drop_last),
            num_processes=2,
            process_index=rank,
            split_batches=splits,
            even_batches=False,
        )
        for rank in range(2)
    ]
    first, second = ([len(batch) for batch in loader.batch_sampler] for loader in loaders)
    ranks = two_ranks(*[len(loaders[0])] * 2)
    ranks.accelerator.even_batches = False
    require_equal_batches(loaders[0], ranks, gathers_outputs=False)
    if first == second:
        require_equal_batches(loaders[0], ranks, gathers_outputs=True)
        return
    with pytest.raises(GKDConfigError, match=rf"but {samples} samples are not a multiple of the \d+ in one batch"):
        require_equal_batches(loaders[0], ranks, gathers_outputs=True)


@pytest.mark.parametrize(
    ("options", "has_metrics", "gathers"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"prediction_loss_only": True}, True, False),
        ({"include_for_metrics": ["inputs"]}, False, True),
    ],
)
def test_outputs_are_gathered_if_more_than_the_loss_is_wanted(
    make_trainer, token_rows, monkeypatch, options, has_metrics, gathers
):
    asked = []
    monkeypatch.setattr(
        trainer_module, "require_equal_batches", lambda *_, gathers_outputs: asked.append(gathers_outputs)
    )
    metrics = (lambda prediction: {}) if has_metrics else None
    trainer = make_trainer(trainer_args={"eval_dataset": token_rows(2), "compute_metrics": metrics}, **options)
    trainer.evaluate()
    trainer.predict(token_rows(2))
    assert asked == [gathers, "prediction_loss_only" not in options]
