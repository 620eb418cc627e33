"""A run's log covers only the training of that run."""

import time

import pytest

from gkd_trainer import GKDTrainer, HFRollouts

SYNC_SECONDS = 0.3


class SlowSync(HFRollouts):
    """An engine that takes its time to get weights."""

    def __init__(self):
        super().__init__(stop_ids=[2], vocab_size=365)
        self.syncs = 0

    def sync(self, model):
        self.syncs += 1
        time.sleep(SYNC_SECONDS)
        super().sync(model)


def steps(trainer):
    return [entry for entry in trainer.state.log_history if "learning_rate" in entry]


def test_a_second_run_does_not_log_what_the_first_one_left(make_trainer):
    options = {"lmbda": 0.5, "max_new_tokens": 4, "logging_steps": 2}
    trainer = make_trainer(max_steps=3, **options)
    trainer.train()
    assert trainer._meter._sample_sums["samples"] == 4  # of its third step, which has no entry
    counted = []
    read = trainer._meter.read
    trainer._meter.read = lambda reduce: counted.append(dict(trainer._meter._sample_sums)) or read(reduce)
    trainer.train()
    assert [counts["samples"] for counts in counted] == [8]


def test_a_run_after_one_that_failed_does_not_log_its_steps(make_trainer):
    trainer = make_trainer(max_steps=2, logging_steps=2)
    compute_loss, counts = trainer.compute_loss, []

    def fail_in_the_second_step(model, inputs, num_items_in_batch=None):
        counts.append(int(num_items_in_batch))
        if len(counts) == 2:
            raise KeyboardInterrupt
        return compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)

    trainer.compute_loss = fail_in_the_second_step
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    logged = []
    read = trainer._meter.read
    trainer._meter.read = lambda reduce: read(lambda sums: logged.append(sums[0].item()) or reduce(sums))
    trainer.train()
    assert logged == [sum(counts[2:])]


def test_seconds_of_an_evaluation_are_not_those_of_training(make_trainer, token_rows):
    """It syncs the weights of each step, so that training, which would have to, does so in its first step alone."""
    engine = SlowSync()
    trainer = make_trainer(
        trainer_args={"rollouts": engine, "eval_dataset": token_rows(4)},
        lmbda=1.0,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        eval_on_policy=True,
    )
    trainer.train()
    assert engine.syncs == 4
    seconds = [entry["seconds_sync"] for entry in steps(trainer)]
    assert seconds[0] >= SYNC_SECONDS
    assert max(seconds[1:]) < SYNC_SECONDS / 10


def test_training_that_generates_nothing_logs_no_seconds_for_it(make_trainer, token_rows):
    engine = SlowSync()
    trainer = make_trainer(
        trainer_args={"rollouts": engine, "eval_dataset": token_rows(4)},
        eval_strategy="steps",
        eval_steps=1,
        eval_on_policy=True,
    )
    trainer.train()
    assert engine.syncs == 2
    for entry in steps(trainer):
        assert entry.keys().isdisjoint({"seconds_rollout", "seconds_sync"})


def test_an_evaluation_measures_the_same_before_in_and_after_training(make_trainer, token_rows):
    """Its sums are its own: those of the steps between do not enter."""
    trainer = make_trainer(
        trainer_args={"eval_dataset": token_rows(4)},
        lmbda=0.5,
        learning_rate=0.0,
        eval_strategy="steps",
        eval_steps=1,
        logging_steps=5,
    )
    before = trainer.evaluate()
    trainer.train()
    inside = [entry for entry in trainer.state.log_history if "eval_loss" in entry and entry["step"] > 0]
    assert len(inside) == 2
    for measured in (*inside, trainer.evaluate()):
        for metric in ("eval_loss", "eval_student_entropy", "eval_top_token_agreement"):
            assert measured[metric] == pytest.approx(before[metric], rel=1e-6)


class LoggingOnTheFirstRank(GKDTrainer):
    """As subclasses of Trainer may do."""

    def log(self, logs, *args):
        if self.is_world_process_zero():
            super().log(logs, *args)


@pytest.mark.parametrize("is_first", [True, False])
def test_ranks_sum_their_metrics_whatever_a_subclass_logs(make_trainer, monkeypatch, is_first):
    trainer = make_trainer(trainer_class=LoggingOnTheFirstRank, max_steps=3)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: is_first)
    counts = []
    read = trainer._meter.read
    trainer._meter.read = lambda reduce: read(lambda sums: counts.append(sums[0].item()) or reduce(sums))
    trainer.train()
    assert len(counts) == 3
    assert all(counts)
    assert ["student_entropy" in entry for entry in steps(trainer)] == [True] * (3 if is_first else 0)
