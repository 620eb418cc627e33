"""Several teachers whose divergences are averaged by weight."""

import pytest
import torch

from gkd_trainer.errors import GKDConfigError, GKDTeacherError
from gkd_trainer.signals import SummedSignal
from gkd_trainer.teachers import FrozenTeacher, WeightedTeachers
from gkd_trainer.types import TokenBatch


@pytest.fixture
def two(tiny_model):
    return {"math": FrozenTeacher(tiny_model(seed=1)), "code": FrozenTeacher(tiny_model(hidden=48, seed=2))}


def test_every_teacher_scores_every_sample_with_weights_that_sum_to_one(two):
    teacher = WeightedTeachers(two, {"code": 3, "math": 1})
    teacher.prepare(torch.device("cpu"))
    ids_BL = torch.arange(10).reshape(2, 5)
    batch = TokenBatch.from_inputs({"input_ids": ids_BL, "labels": ids_BL})
    signal = teacher.score(batch)
    assert isinstance(signal, SummedSignal)
    assert signal.weights == (0.25, 0.75)
    for term, each in zip(signal.terms, two.values(), strict=True):
        assert torch.equal(term.hidden_NH, each.score(batch).hidden_NH)


def test_without_weights_all_count_alike(two):
    assert WeightedTeachers(two).weights == {"math": 0.5, "code": 0.5}


@pytest.mark.parametrize("weight", [0, -1.0, float("inf"), float("nan"), "much", True, None])
def test_a_weight_that_is_not_positive_and_finite_is_refused(two, weight):
    with pytest.raises(GKDConfigError, match="weights of code must be positive and finite"):
        WeightedTeachers(two, {"math": 1.0, "code": weight})


@pytest.mark.parametrize("names", [("math",), ("math", "code", "chat"), ("math", "chat")])
def test_weights_of_other_teachers_are_refused(two, names):
    with pytest.raises(GKDConfigError, match="a weight for each of the teachers math, code; got math"):
        WeightedTeachers(two, dict.fromkeys(names, 1.0))


def test_a_sum_inside_a_sum_is_refused(two):
    with pytest.raises(GKDTeacherError, match="'both' contains several teachers itself"):
        WeightedTeachers({"both": WeightedTeachers(two)})
