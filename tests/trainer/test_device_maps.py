"""Runs with models that a device map placed: the results are those without the map."""

import pytest
import torch
from accelerate import dispatch_model

from gkd_trainer import CachedTeacher, FrozenTeacher, RoutedTeachers

RUN = {"max_steps": 2, "learning_rate": 0.02, "optim": "sgd"}


def spread(model):
    """The model with accelerate's hooks, as a device map over several devices puts them."""
    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


def trained(trainer):
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    return losses, torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])


@pytest.mark.parametrize(
    ("options", "top_k"),
    [({"lmbda": 0.5}, None), ({"lmbda": 0.0, "seq_kd": True}, None), ({"lmbda": 0.0}, 20)],
    ids=str,
)
def test_a_run_with_a_teacher_spread_by_a_device_map_is_the_run_with_that_teacher(
    make_trainer, tiny_model, options, top_k
):
    runs = []
    for place in (lambda model: model, spread):
        teacher = FrozenTeacher(place(tiny_model(hidden=48, seed=1)), top_k=top_k)
        runs.append(trained(make_trainer(**RUN, **options, trainer_args={"teacher": teacher})))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])


def test_teachers_spread_by_device_maps_can_be_routed_to(make_trainer, tiny_model, token_rows):
    rows, runs = token_rows(), []
    rows = rows.add_column("teacher", ["a", "b"] * (len(rows) // 2))
    for place in (lambda model: model, spread):
        teachers = {"a": FrozenTeacher(place(tiny_model(seed=1))), "b": FrozenTeacher(tiny_model("qwen2", seed=2))}
        given = {"teacher": RoutedTeachers(teachers), "train_dataset": rows}
        runs.append(trained(make_trainer(**RUN, trainer_args=given, lmbda=0.0)))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])


def test_the_hidden_states_of_a_teacher_spread_by_a_device_map_are_cached(make_trainer, cached, tiny_model):
    folder = cached(FrozenTeacher(spread(tiny_model(hidden=48, seed=1))), kind="hidden")
    live, _ = trained(make_trainer(**RUN, trainer_args={"teacher": FrozenTeacher(tiny_model(hidden=48, seed=1))}))
    losses, _ = trained(make_trainer(**RUN, trainer_args={"teacher": CachedTeacher(folder)}))
    assert losses == pytest.approx(live, rel=1e-4)


def test_a_student_spread_by_a_device_map_is_trained_by_its_full_logits(make_trainer, tiny_model, caplog):
    students = tiny_model(), spread(tiny_model())
    runs = [trained(make_trainer(**RUN, trainer_args={"model": student})) for student in students]
    assert "student computes full logits, which takes more memory: a device map placed it" in caplog.text
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    assert torch.allclose(runs[0][1], runs[1][1], atol=1e-6)
