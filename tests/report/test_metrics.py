"""The metrics of a run, against plain loops over tokens and samples."""

import time

import pytest
import torch

from gkd_trainer.divergence import TokenDivergence
from gkd_trainer.report.metrics import (
    SAMPLE_SUMS,
    TOKEN_SUMS,
    EvaluationMeter,
    Stopwatch,
    TeacherSums,
    TrainingMeter,
    sample_metrics,
    sums_by_sample,
    token_metrics,
)

CPU = torch.device("cpu")
QUANTITIES = ("divergence_N", "student_entropy_N", "teacher_entropy_N")
MASSES = ("teacher_mass_N", "student_mass_N", "acceptance_N")


def tokens(count, batch_size, seed=0, *, has_top_k=False):
    """Random per-token quantities of a batch, in which some samples may have no token."""
    generator = torch.Generator().manual_seed(seed)
    names = QUANTITIES + MASSES if has_top_k else QUANTITIES
    values = {name: torch.rand(count, generator=generator) for name in names}
    return {
        "rows_N": torch.randint(0, batch_size, (count,), generator=generator).sort().values,
        "is_on_policy_B": torch.rand(batch_size, generator=generator) < 0.5,
        "agrees_N": torch.rand(count, generator=generator) < 0.4,
        **values,
    }


def sums_of(batch):
    is_finite_N = torch.ones_like(batch["agrees_N"])
    result = TokenDivergence(
        values_N=batch["divergence_N"],
        cross_entropy_N=None,
        is_teacher_finite_N=is_finite_N,
        is_finite_N=is_finite_N,
        **{name: batch.get(name) for name in ("student_entropy_N", "teacher_entropy_N", "agrees_N", *MASSES)},
    )
    return sums_by_sample(batch["rows_N"], batch["is_on_policy_B"], result)


def row_of(**values):
    return [values.get(name, 0.0) for name in TOKEN_SUMS]


@pytest.mark.parametrize(("count", "batch_size"), [(37, 5), (1, 3), (0, 2)])
@pytest.mark.parametrize("has_top_k", [True, False])
def test_sums_by_sample_are_those_of_a_plain_loop(count, batch_size, has_top_k):
    batch = tokens(count, batch_size, has_top_k=has_top_k)
    expected = [dict.fromkeys(TOKEN_SUMS, 0.0) for _ in range(batch_size)]
    for token, row in enumerate(batch["rows_N"].tolist()):
        sums, divergence = expected[row], batch["divergence_N"][token].item()
        sums["tokens"] += 1
        sums["divergence"] += divergence
        if batch["is_on_policy_B"][row]:
            sums["on_policy_tokens"] += 1
            sums["on_policy_divergence"] += divergence
        sums["student_entropy"] += batch["student_entropy_N"][token].item()
        sums["teacher_entropy"] += batch["teacher_entropy_N"][token].item()
        sums["agreements"] += batch["agrees_N"][token].item()
        if has_top_k:
            sums["top_k_tokens"] += 1
            sums["teacher_top_k_mass"] += batch["teacher_mass_N"][token].item()
            sums["student_top_k_mass"] += batch["student_mass_N"][token].item()
            sums["drafted"] += 1
            sums["accepted"] += batch["acceptance_N"][token].item()
    sums_BK = sums_of(batch)
    assert sums_BK.dtype == torch.float64
    torch.testing.assert_close(sums_BK, torch.tensor([list(sums.values()) for sums in expected], dtype=torch.float64))


def test_sums_by_sample_are_cut_from_the_graph():
    batch = tokens(7, 2)
    batch["divergence_N"].requires_grad_()
    assert not sums_of(batch).requires_grad


def test_token_metrics_are_means_over_their_own_tokens():
    sums = dict.fromkeys(TOKEN_SUMS, 0.0) | {
        "tokens": 10.0,
        "divergence": 8.0,
        "on_policy_tokens": 4.0,
        "on_policy_divergence": 2.0,
        "student_entropy": 30.0,
        "teacher_entropy": 20.0,
        "agreements": 7.0,
    }
    assert token_metrics(sums) == {
        "divergence_on_policy": 0.5,
        "divergence_off_policy": 1.0,
        "student_entropy": 3.0,
        "teacher_entropy": 2.0,
        "top_token_agreement": 0.7,
    }


def test_masses_in_the_top_k_are_means_over_the_tokens_of_top_k_teachers():
    sums = dict.fromkeys(TOKEN_SUMS, 0.0) | {
        "tokens": 10.0,
        "top_k_tokens": 4.0,
        "teacher_top_k_mass": 3.0,
        "student_top_k_mass": 2.0,
    }
    metrics = token_metrics(sums)
    assert (metrics["teacher_top_k_mass"], metrics["student_top_k_mass"]) == (0.75, 0.5)


@pytest.mark.parametrize("has_top_k", [True, False])
def test_both_meters_show_the_masses_for_a_top_k_teacher(has_top_k):
    batches = [tokens(5, 2, seed=1, has_top_k=has_top_k), tokens(40, 3, seed=2, has_top_k=has_top_k)]
    training, evaluation = TrainingMeter(CPU), EvaluationMeter()
    for batch in batches:
        training.add_tokens(sums_of(batch))
        evaluation.add(sums_of(batch), mean_loss(batch), lambda rows: rows)
    for metrics in (training.read(lambda sums: sums), evaluation.read()):
        for side in ("teacher", "student"):
            if has_top_k:
                expected = torch.cat([batch[f"{side}_mass_N"] for batch in batches]).mean().item()
                assert metrics[f"{side}_top_k_mass"] == pytest.approx(expected, rel=1e-6)
            else:
                assert f"{side}_top_k_mass" not in metrics


def test_means_over_no_tokens_are_left_out():
    sums = dict.fromkeys(TOKEN_SUMS, 0.0)
    assert token_metrics(sums) == {}
    metrics = token_metrics(sums | {"tokens": 4.0, "divergence": 2.0})
    assert metrics["divergence_off_policy"] == 0.5
    assert "divergence_on_policy" not in metrics


def test_sample_metrics_are_shares_and_means():
    sums = dict.fromkeys(SAMPLE_SUMS, 0.0) | {
        "samples": 8.0,
        "on_policy_samples": 2.0,
        "completions": 4.0,
        "completion_tokens": 50.0,
        "truncated_completions": 1.0,
    }
    assert sample_metrics(sums) == {"on_policy_share": 0.25, "completion_length": 12.5, "truncated_share": 0.25}
    assert sample_metrics(sums | {"samples_without_prompt": 3.0})["samples_without_prompt"] == 3.0
    assert sample_metrics(dict.fromkeys(SAMPLE_SUMS, 0.0)) == {}


def test_the_training_meter_weights_micro_batches_by_their_tokens():
    meter = TrainingMeter(CPU)
    batches = [tokens(5, 2, seed=1), tokens(40, 3, seed=2)]
    for batch in batches:
        meter.add_tokens(sums_of(batch))
    meter.add_samples(samples=5, on_policy_samples=2, completions=2, completion_tokens=7)
    meter.add_samples(samples=3, truncated_completions=1)
    metrics = meter.read(lambda sums: sums)
    assert metrics["student_entropy"] == pytest.approx(
        torch.cat([batch["student_entropy_N"] for batch in batches]).mean().item()
    )
    on_policy = torch.cat([batch["divergence_N"][batch["is_on_policy_B"][batch["rows_N"]]] for batch in batches])
    assert 0 < len(on_policy) < 45
    assert metrics["divergence_on_policy"] == pytest.approx(on_policy.mean().item())
    assert metrics["on_policy_share"] == 2 / 8
    assert metrics["completion_length"] == 3.5
    assert metrics["truncated_share"] == 0.5


def test_reading_the_training_meter_starts_it_again():
    meter = TrainingMeter(CPU)
    meter.add_tokens(sums_of(tokens(5, 2, seed=1)))
    meter.add_samples(samples=5, on_policy_samples=2)
    meter.read(lambda sums: sums)
    metrics = meter.read(lambda sums: sums)
    assert "student_entropy" not in metrics
    assert "on_policy_share" not in metrics
    batch = tokens(8, 2, seed=3)
    meter.add_tokens(sums_of(batch))
    assert meter.read(lambda sums: sums)["student_entropy"] == pytest.approx(batch["student_entropy_N"].mean().item())


def test_ranks_are_added_up_before_means_are_taken():
    """The other rank saw other shares: means of means would differ."""
    here, there = TrainingMeter(CPU), TrainingMeter(CPU)
    batches = [tokens(5, 2, seed=1), tokens(40, 3, seed=2)]
    sent = []
    for meter, batch, samples in ((there, batches[1], 30), (here, batches[0], 10)):
        meter.add_tokens(sums_of(batch))
        meter.add_samples(samples=samples, on_policy_samples=10)
    there.read(lambda sums: sent.append(sums) or sums)
    metrics = here.read(lambda sums: sums + sent[0])
    assert metrics["on_policy_share"] == 0.5
    assert metrics["teacher_entropy"] == pytest.approx(
        torch.cat([batch["teacher_entropy_N"] for batch in batches]).mean().item()
    )


def test_a_rank_without_tokens_reduces_as_many_numbers_as_the_others():
    shapes = []
    idle, busy = TrainingMeter(CPU), TrainingMeter(CPU)
    busy.add_tokens(sums_of(tokens(5, 2)))
    for meter in (idle, busy):
        meter.read(lambda sums: shapes.append((sums.shape, sums.dtype)) or sums)
    assert shapes[0] == shapes[1]


@pytest.fixture
def clock(monkeypatch):
    """The time, in a list of one number to set forward."""
    now = [0.0]
    monkeypatch.setattr("gkd_trainer.report.metrics.perf_counter", lambda: now[0])
    return now


def train_for(meter, clock, *, rollout=0.0, teacher=0.0, student=0.0, token_count=0):
    with meter.measure("rollout"):
        clock[0] += rollout
    with meter.measure("step"):
        with meter.measure("teacher"):
            clock[0] += teacher
        clock[0] += student
    meter.add_tokens(torch.tensor([row_of(tokens=float(token_count))], dtype=torch.float64))


def test_the_students_seconds_are_those_of_the_step_without_the_teachers(clock):
    meter = TrainingMeter(CPU)
    for _ in range(2):
        train_for(meter, clock, rollout=3.0, teacher=1.0, student=4.0)
    metrics = meter.read(lambda sums: sums)
    assert (metrics["seconds_rollout"], metrics["seconds_teacher"], metrics["seconds_student"]) == (6.0, 2.0, 8.0)
    metrics = meter.read(lambda sums: sums)
    assert (metrics["seconds_teacher"], metrics["seconds_student"]) == (0.0, 0.0)


def test_seconds_of_rollouts_are_given_only_where_something_was_rolled_out(clock):
    meter = TrainingMeter(CPU)
    with meter.measure("step"):
        clock[0] += 1.0
    assert not {"seconds_rollout", "seconds_sync"} & meter.read(lambda sums: sums).keys()
    with meter.measure("rollout"):
        clock[0] += 2.0
    metrics = meter.read(lambda sums: sums)
    assert (metrics["seconds_rollout"], metrics["seconds_sync"]) == (2.0, 0.0)


def test_the_load_balancing_loss_is_a_mean_over_micro_batches_and_ranks():
    meters = [TrainingMeter(CPU) for _ in range(2)]
    for meter, losses in zip(meters, ([1.0, 4.0], [10.0]), strict=True):
        for loss in losses:
            meter.add_router_loss(torch.tensor(loss))
    sums = []
    meters[1].read(lambda added: sums.append(added) or added)
    assert meters[0].read(lambda added: added + sums[0])["aux_loss"] == 5.0
    assert "aux_loss" not in meters[0].read(lambda added: added)


def test_a_cleared_meter_has_seen_nothing(clock):
    meter = TrainingMeter(CPU)
    train_for(meter, clock, rollout=3.0, teacher=1.0, student=4.0, token_count=20)
    meter.add_samples(**dict.fromkeys(SAMPLE_SUMS, 1.0))
    meter.add_router_loss(torch.tensor(1.0))
    meter.clear()
    assert meter.read(lambda sums: sums) == {"seconds_teacher": 0.0, "seconds_student": 0.0}


def test_tokens_per_second_count_rollouts_and_steps_but_no_time_between_them(clock):
    meter = TrainingMeter(CPU)
    train_for(meter, clock, rollout=3.0, teacher=1.0, student=4.0, token_count=20)
    clock[0] += 100.0  # an evaluation
    train_for(meter, clock, teacher=1.0, student=1.0, token_count=10)
    assert meter.read(lambda sums: sums)["tokens_per_second"] == 3.0
    clock[0] += 100.0
    assert "tokens_per_second" not in meter.read(lambda sums: sums)
    train_for(meter, clock, student=4.0, token_count=2)
    assert meter.read(lambda sums: 2 * sums)["tokens_per_second"] == 1.0  # of two ranks in the same time


def mean_loss(batch):
    return batch["divergence_N"].mean()


def test_the_evaluation_loss_is_a_mean_over_tokens_not_over_batches():
    meter = EvaluationMeter()
    batches = [tokens(3, 2, seed=1), tokens(50, 3, seed=2)]
    batches[0]["divergence_N"] += 1
    for batch in batches:
        meter.add(sums_of(batch), mean_loss(batch), lambda rows: rows)
    every = torch.cat([batch["divergence_N"] for batch in batches])
    of_batches = torch.stack([mean_loss(batch) for batch in batches]).mean().item()
    metrics = meter.read()
    assert metrics["loss"] == pytest.approx(every.mean().item(), rel=1e-6)
    assert abs(of_batches - every.mean().item()) > 1e-2
    assert metrics.keys() == {"loss", "student_entropy", "teacher_entropy", "top_token_agreement"}


def test_a_subclass_that_changes_the_loss_changes_its_evaluation_too():
    meter = EvaluationMeter()
    batches = [tokens(3, 2, seed=1), tokens(50, 3, seed=2)]
    losses = [10 * mean_loss(batch) + 1 for batch in batches]
    for batch, loss in zip(batches, losses, strict=True):
        meter.add(sums_of(batch), loss, lambda rows: rows)
    assert meter.read()["loss"] == pytest.approx((3 * losses[0] + 50 * losses[1]).item() / 53, rel=1e-6)


def test_samples_that_only_pad_the_last_batch_are_not_counted():
    meter = EvaluationMeter()
    batch = tokens(40, 4, seed=2)
    assert batch["rows_N"].unique().tolist() == [0, 1, 2, 3]
    meter.add(sums_of(batch), mean_loss(batch), lambda rows: rows[:3])
    kept = batch["rows_N"] < 3
    metrics = meter.read()
    assert metrics["loss"] == pytest.approx(batch["divergence_N"][kept].mean().item(), rel=1e-6)
    assert metrics["student_entropy"] == pytest.approx(batch["student_entropy_N"][kept].mean().item())


def test_samples_of_all_ranks_are_gathered():
    here, there = tokens(5, 2, seed=1), tokens(30, 2, seed=2)
    rows = []
    for batch in (there, here):
        meter = EvaluationMeter()
        meter.add(sums_of(batch), mean_loss(batch), lambda sums: rows.append(sums) or torch.cat(rows))
    every = torch.cat([here["divergence_N"], there["divergence_N"]])
    assert meter.read()["loss"] == pytest.approx(every.mean().item(), rel=1e-6)


def test_an_evaluation_without_tokens_has_no_metrics():
    meter = EvaluationMeter()
    assert meter.read() == {}
    meter.add(sums_of(tokens(0, 2)), torch.tensor(0.0), lambda rows: rows)
    assert meter.read() == {}


def test_reading_the_evaluation_meter_starts_it_again():
    meter = EvaluationMeter()
    first, second = tokens(5, 2, seed=1), tokens(5, 2, seed=2)
    meter.add(sums_of(first), mean_loss(first), lambda rows: rows)
    meter.read()
    assert meter.read() == {}
    meter.add(sums_of(second), mean_loss(second), lambda rows: rows)
    assert meter.read()["loss"] == pytest.approx(mean_loss(second).item(), rel=1e-6)


def test_a_stopwatch_adds_up_by_name_and_starts_again_when_read():
    stopwatch = Stopwatch(CPU)
    for _ in range(2):
        with stopwatch.measure("sleep"):
            time.sleep(0.02)
    with stopwatch.measure("nothing"):
        pass
    seconds = stopwatch.read()
    assert seconds.keys() == {"sleep", "nothing"}
    assert 0.04 <= seconds["sleep"] < 1.0
    assert seconds["nothing"] < 0.02
    assert stopwatch.read() == {}


class FakeEvent:
    """An event of a device whose clock the tests set."""

    now, done = 0.0, 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.now

    def query(self):
        return self.at <= FakeEvent.done

    def synchronize(self):
        FakeEvent.done = max(FakeEvent.done, self.at)

    def elapsed_time(self, end):
        return 1000 * (end.at - self.at)


def test_a_stopwatch_that_is_never_read_keeps_few_events_and_waits_for_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "now", 0.0)
    monkeypatch.setattr(FakeEvent, "done", 0.0)
    stopwatch = Stopwatch(torch.device("cuda"))
    for turn in range(5000):
        if turn == 3000:
            assert len(stopwatch._events) == 3000  # the device has done nothing yet
            assert FakeEvent.done == 0.0
        if turn >= 3000:
            FakeEvent.done = FakeEvent.now
        with stopwatch.measure("step"):
            FakeEvent.now += 0.5
    assert len(stopwatch._events) <= 1001
    assert stopwatch.read() == {"step": 2500.0}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_a_stopwatch_measures_the_device_and_does_not_wait_for_it():
    device = torch.device("cuda")
    stopwatch = Stopwatch(device)
    torch.cuda._sleep(1)  # the first call starts CUDA
    torch.cuda.synchronize()
    began = time.perf_counter()
    with stopwatch.measure("sleep"):
        torch.cuda._sleep(2_000_000_000)
    assert time.perf_counter() - began < 0.5
    assert stopwatch.read()["sleep"] > 0.5


def result_of(values_N, **fields):
    flags_N = torch.ones(len(values_N), dtype=torch.bool)
    return TokenDivergence(values_N, None, values_N, values_N, flags_N, flags_N, flags_N, **fields)


def test_each_teacher_s_divergence_and_share_are_those_of_its_tokens():
    teachers = TeacherSums(("math", "code", "chat"), is_routed=True)
    rows_N, index_B = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([1, 0, 1])
    result = result_of(torch.tensor([1.0, 2.0, torch.inf, 4.0, 5.0]))
    sums_BK = sums_by_sample(rows_N, torch.zeros(3, dtype=torch.bool), result, teachers, index_B)
    assert sums_BK.shape == (3, len(TOKEN_SUMS) + len(teachers))
    meter = TrainingMeter(CPU, teachers)
    meter.add_tokens(sums_BK)
    metrics = meter.read(lambda sums: sums)
    assert metrics["divergence_teacher_code"] == 3.0
    assert metrics["divergence_teacher_math"] == torch.inf  # and no other teacher's
    assert metrics["teacher_share_math"] == pytest.approx(0.2)
    assert metrics["teacher_share_code"] == pytest.approx(0.8)
    assert metrics["teacher_share_chat"] == 0
    assert "divergence_teacher_chat" not in metrics
    assert meter.read(lambda sums: sums).keys().isdisjoint({"teacher_share_math", "divergence_teacher_code"})


def test_in_a_sum_each_teacher_s_divergence_is_over_all_tokens():
    teachers = TeacherSums(("math", "code"))
    terms_NT = torch.tensor([[1.0, 10.0], [2.0, 20.0], [6.0, 30.0]])
    result = result_of(torch.zeros(3), terms_NT=terms_NT)
    sums_BK = sums_by_sample(torch.tensor([0, 1, 1]), torch.zeros(2, dtype=torch.bool), result, teachers)
    meter = EvaluationMeter(teachers)
    meter.add(sums_BK, torch.tensor(0.0), lambda sums: sums)
    metrics = meter.read()
    assert metrics["divergence_teacher_math"] == 3.0
    assert metrics["divergence_teacher_code"] == 20.0
    assert "teacher_share_math" not in metrics


def test_masses_are_means_over_the_tokens_that_have_them():
    mass_N = torch.tensor([0.5, torch.nan, 0.75])
    result = result_of(torch.zeros(3), teacher_mass_N=mass_N, student_mass_N=mass_N / 2)
    sums_BK = sums_by_sample(torch.tensor([0, 0, 0]), torch.zeros(1, dtype=torch.bool), result)
    metrics = token_metrics(dict(zip(TOKEN_SUMS, sums_BK[0].tolist(), strict=True)))
    assert metrics["teacher_top_k_mass"] == 0.625
    assert metrics["student_top_k_mass"] == 0.3125
