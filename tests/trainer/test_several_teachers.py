"""Training and evaluating with several teachers: each sample has its own, or all of them, by objects and by options."""

import json
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset, IterableDataset
from trl import SFTConfig

from gkd_trainer import FrozenTeacher, GKDArguments, RoutedTeachers, WeightedTeachers
from gkd_trainer.errors import GKDConfigError, GKDDataError, GKDTeacherError
from gkd_trainer.trainer.parts import teacher_route
from tests.trainer.conftest import make_rows

NAMES = ("math", "code", "chat")
WIDTHS = {"math": 48, "code": 32, "chat": 64}


@pytest.fixture
def teachers(tiny_model, byte_level):
    """Make named teachers of different widths."""

    def make(*names, **options):
        return {
            name: FrozenTeacher(tiny_model(hidden=WIDTHS[name], seed=NAMES.index(name) + 1), byte_level(), **options)
            for name in names or NAMES
        }

    return make


def rows_with(names, count=12):
    """Token rows; the teacher of row i is names[i mod len(names)]."""
    return [{**row, "teacher": names[i % len(names)]} for i, row in enumerate(make_rows(count))]


def weights_after(trainer):
    trainer.train()
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def first_batch(trainer):
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def gradients_of(trainer, batch):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()
    return loss.detach(), {name: weight.grad.clone() for name, weight in trainer.model.named_parameters()}


def test_a_batch_s_loss_and_gradient_are_the_sum_over_each_sample_and_its_own_teacher(make_trainer, teachers):
    given = {"train_dataset": Dataset.from_list(rows_with(NAMES)), "teacher": RoutedTeachers(teachers())}
    routed = make_trainer(trainer_args=given, per_device_train_batch_size=7)
    batch = first_batch(routed)
    index_B = batch["teacher_index"]
    assert len(set(index_B.tolist())) == 3
    loss, gradients = gradients_of(routed, batch)
    count = (batch["labels"][:, 1:] != -100).sum()
    expected_loss, expected = 0.0, {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}
    for index, name in enumerate(NAMES):
        alone = make_trainer(trainer_args={"teacher": teachers(name)[name]})
        part = {key: value[index_B == index] for key, value in batch.items() if key != "teacher_index"}
        part_count = (part["labels"][:, 1:] != -100).sum()
        part_loss, part_gradients = gradients_of(alone, part)
        expected_loss += part_loss * part_count / count
        for key, gradient in part_gradients.items():
            expected[key] += gradient * part_count / count
    torch.testing.assert_close(loss, expected_loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_a_run_logs_each_teacher_s_divergence_and_share(make_trainer, teachers, lmbda):
    rows = Dataset.from_list(rows_with(("math", "code", "code")))
    given = {"train_dataset": rows, "eval_dataset": rows, "teacher": RoutedTeachers(teachers("math", "code"))}
    trainer = make_trainer(trainer_args=given, lmbda=lmbda, eval_on_policy=True)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    shares = {name: entry[f"teacher_share_{name}"] for name in ("math", "code")}
    assert sum(shares.values()) == pytest.approx(1)
    total = sum(entry[f"divergence_teacher_{name}"] * share for name, share in shares.items())
    assert total == pytest.approx(entry["divergence_on_policy" if lmbda else "divergence_off_policy"])
    metrics = trainer.evaluate()
    for prefix in ("eval", "eval_on_policy"):
        parts = [metrics[f"{prefix}_divergence_teacher_{n}"] * metrics[f"{prefix}_teacher_share_{n}"] for n in shares]
        assert sum(parts) == pytest.approx(metrics[f"{prefix}_loss"])


def test_evaluation_s_metric_of_a_teacher_is_that_of_its_rows_alone(make_trainer, teachers):
    rows = rows_with(("math", "code", "code"))
    given = {"eval_dataset": Dataset.from_list(rows), "train_dataset": None}
    routed = make_trainer(trainer_args={**given, "teacher": RoutedTeachers(teachers("math", "code"))})
    metrics = routed.evaluate()
    for name in ("math", "code"):
        own = Dataset.from_list([row for row in rows if row["teacher"] == name])
        alone = make_trainer(trainer_args={"eval_dataset": own, "train_dataset": None, "teacher": teachers(name)[name]})
        assert metrics[f"eval_divergence_teacher_{name}"] == pytest.approx(alone.evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("offload", [False, True])
def test_a_teacher_without_rows_in_a_batch_changes_nothing(make_trainer, teachers, offload):
    rows = Dataset.from_list(rows_with(("code",)))
    routed = make_trainer(trainer_args={"train_dataset": rows, "teacher": RoutedTeachers(teachers(), offload=offload)})
    alone = make_trainer(trainer_args={"train_dataset": rows, "teacher": teachers("code")["code"]})
    expected = weights_after(alone)
    for name, weight in weights_after(routed).items():
        torch.testing.assert_close(weight, expected[name], msg=name)
    assert "divergence_teacher_math" not in routed.state.log_history[0]
    assert routed.state.log_history[0]["teacher_share_math"] == 0


def test_the_route_of_a_row_may_be_a_function(make_trainer, teachers):
    rows = [{key: value for key, value in row.items() if key != "teacher"} for row in rows_with(NAMES)]
    teacher = RoutedTeachers(teachers("math", "code"), lambda row: "code" if len(row["input_ids"]) % 2 else "math")
    trainer = make_trainer(trainer_args={"train_dataset": Dataset.from_list(rows), "teacher": teacher})
    expected = [len(row["input_ids"]) % 2 for row in rows]
    assert trainer.train_dataset["teacher_index"] == expected


def test_a_stream_is_routed_and_drops_rows_of_unknown_teachers(make_trainer, teachers, caplog):
    rows = rows_with(("math", "code", "nobody"))
    given = {"train_dataset": IterableDataset.from_generator(lambda: iter(rows))}
    trainer = make_trainer(trainer_args={**given, "teacher": RoutedTeachers(teachers("math", "code"))})
    prepared = list(trainer.train_dataset)
    assert [row["teacher_index"] for row in prepared] == [0, 1] * 4
    assert "the column 'teacher' holds 'nobody'" in caplog.text
    trainer.train()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("physics", r"train: row 1: expected one of the teachers 'math', 'code' .* column 'teacher' holds 'physics'"),
        (None, r"train: row 1: .* the column 'teacher' holds None"),
    ],
)
def test_a_row_without_a_known_teacher_is_refused(make_trainer, teachers, name, message):
    rows = Dataset.from_list(rows_with(("math", name, "code")))
    with pytest.raises(GKDDataError, match=message):
        make_trainer(trainer_args={"train_dataset": rows, "teacher": RoutedTeachers(teachers("math", "code"))})


def test_rows_without_the_column_are_refused_with_what_to_do(make_trainer, teachers, token_rows):
    with pytest.raises(GKDDataError, match=r"expected a column 'domain' .* 'math', 'code'; got the columns"):
        make_trainer(trainer_args={"teacher": RoutedTeachers(teachers("math", "code"), column="domain")})
    rows = torch.utils.data.Subset(make_rows(4), range(4))
    with pytest.raises(GKDDataError, match="a Subset is used as is, so its rows must have a teacher_index"):
        make_trainer(trainer_args={"train_dataset": rows, "teacher": RoutedTeachers(teachers("math", "code"))})


def test_a_weighted_sum_has_the_weighted_gradient_of_its_teachers(make_trainer, teachers):
    summed = make_trainer(trainer_args={"teacher": WeightedTeachers(teachers(), {"math": 1, "code": 2, "chat": 5})})
    batch = first_batch(summed)
    loss, gradients = gradients_of(summed, batch)
    parts = [gradients_of(make_trainer(trainer_args={"teacher": teachers(name)[name]}), batch) for name in NAMES]
    torch.testing.assert_close(loss, sum(w * part for w, (part, _) in zip((1, 2, 5), parts, strict=True)) / 8)
    for name, gradient in gradients.items():
        expected = sum(w * of_part[name] for w, (_, of_part) in zip((1, 2, 5), parts, strict=True)) / 8
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_a_weighted_sum_logs_the_divergence_from_each_teacher(make_trainer, teachers):
    trainer = make_trainer(trainer_args={"teacher": WeightedTeachers(teachers("math", "code"), {"math": 3, "code": 1})})
    trainer.train()
    entry = trainer.state.log_history[0]
    expected = (3 * entry["divergence_teacher_math"] + entry["divergence_teacher_code"]) / 4
    assert entry["divergence_off_policy"] == pytest.approx(expected)
    assert "teacher_share_math" not in entry


def test_a_teacher_of_top_tokens_beside_full_ones_is_measured_alone(make_trainer, teachers):
    mixed = {**teachers("math"), **teachers("code", top_k=5)}
    rows = Dataset.from_list(rows_with(("math", "code")))
    trainer = make_trainer(trainer_args={"train_dataset": rows, "teacher": RoutedTeachers(mixed)})
    trainer.train()
    entry = trainer.state.log_history[0]
    assert 0 < entry["teacher_top_k_mass"] <= 1
    assert entry["loss"] > 0
    with pytest.raises(GKDConfigError, match="loss_temperature"):
        make_trainer(
            trainer_args={"train_dataset": rows, "teacher": RoutedTeachers(mixed)},
            loss_temperature=2.0,
        )


def test_a_student_among_its_teachers_is_refused(make_trainer, teachers, tiny_model):
    student = tiny_model()
    several = RoutedTeachers({**teachers("math"), "code": FrozenTeacher(student)})
    with pytest.raises(GKDTeacherError, match="the same object"):
        make_trainer(trainer_args={"model": student, "teacher": several})


def test_seq_kd_needs_one_teacher(make_trainer, teachers):
    with pytest.raises(GKDTeacherError, match="seq_kd=True makes the teacher generate"):
        make_trainer(trainer_args={"teacher": WeightedTeachers(teachers("math", "code"))}, seq_kd=True)


@pytest.fixture
def folders(tiny_model, byte_level, tmp_path):
    """Make the folders of named teachers, as the option `teachers` takes them."""

    def make(*names):
        paths = {}
        for name in names:
            paths[name] = str(tmp_path / name)
            tiny_model(hidden=WIDTHS[name], seed=NAMES.index(name) + 1).save_pretrained(paths[name])
            byte_level().save_pretrained(paths[name])
        return paths

    return make


def test_teachers_by_options_train_like_teachers_by_objects(make_trainer, teachers, folders):
    rows = Dataset.from_list([{**row, "domain": row["teacher"]} for row in rows_with(("math", "code"))])
    rows = rows.remove_columns("teacher")
    paths = folders("math", "code")
    given = {"train_dataset": rows, "teacher_model": None}
    for options, teacher in (
        ({"teacher_column": "domain"}, RoutedTeachers(teachers("math", "code"), column="domain")),
        (
            {"teacher_weights": '{"code": 3, "math": 1}'},
            WeightedTeachers(teachers("math", "code"), {"math": 1, "code": 3}),
        ),
    ):
        by_options = make_trainer(trainer_args=given, teachers=json.dumps(paths), teacher_offload=True, **options)
        expected = weights_after(make_trainer(trainer_args={**given, "teacher": teacher}))
        for name, weight in weights_after(by_options).items():
            assert torch.equal(weight, expected[name]), name


def test_the_model_card_names_every_teacher(make_trainer, folders, tmp_path):
    given = {"teacher_model": None, "train_dataset": Dataset.from_list(rows_with(("math", "code")))}
    make_trainer(trainer_args=given, teachers=folders("math", "code")).create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "distilled from math: `math`; code: `code` by generalised" in " ".join(card.split())
    weighted = make_trainer(
        trainer_args=given, teachers=folders("math", "code"), teacher_weights={"math": 1, "code": 3}
    )
    weighted.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "math (weight 0.25): `math`; code (weight 0.75): `code`" in card


@dataclass
class MyConfig(GKDArguments, SFTConfig):
    """Options for SFTTrainer."""


@pytest.mark.parametrize("name", ["packing", "padding_free", "eval_packing"])
def test_joined_samples_are_refused_if_each_has_its_own_teacher(config, teachers, name):
    args = config(MyConfig, **{name: True})
    with pytest.raises(GKDConfigError, match=f"{name}=True joins samples into one sequence, but each sample has a t"):
        teacher_route(RoutedTeachers(teachers("math", "code")), args)
    assert teacher_route(WeightedTeachers(teachers("math", "code")), args) is None
