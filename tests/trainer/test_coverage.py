"""Rows that a cache lacks are found before training, if it is certain that they will be drawn."""

from dataclasses import dataclass

import pytest
from datasets import Dataset
from transformers import DataCollatorWithPadding
from trl import SFTConfig, SFTTrainer

from gkd_trainer import CachedTeacher, FrozenTeacher, GKDArguments, GKDMixin, GKDTrainer, RoutedTeachers
from gkd_trainer.errors import GKDDataError, GKDTeacherError
from gkd_trainer.teachers import WeightedTeachers
from gkd_trainer.teachers.cache.format import write_manifest
from gkd_trainer.trainer import coverage

EPOCH = {"max_steps": -1, "num_train_epochs": 1}
MISSING = "train: 2 of 16 rows looked up are not in the cache in .*the first is row 14: "


@dataclass
class MyConfig(GKDArguments, SFTConfig):
    pass


class MySFT(GKDMixin, SFTTrainer):
    pass


class OwnLoader(GKDTrainer):
    def get_train_dataloader(self):
        return super().get_train_dataloader()


@pytest.fixture
def teacher(cached, token_rows):
    """The cache of the first 14 of the 16 rows that are trained on."""
    return CachedTeacher(cached(rows=token_rows(14)))


@pytest.fixture
def incomplete(teacher):
    """The same cache while it is being written."""
    [(folder, manifest)] = teacher.manifests.items()
    write_manifest(folder, manifest.model_copy(update={"is_complete": False}))
    return CachedTeacher(folder)


@pytest.mark.parametrize("options", [EPOCH, {"max_steps": 4}])
def test_missing_rows_are_counted_at_construction_if_all_will_be_drawn(make_trainer, teacher, options):
    with pytest.raises(GKDDataError, match=MISSING):
        make_trainer(trainer_args={"teacher": teacher}, **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (GKDTrainer, {"max_steps": 3}),
        (GKDTrainer, {**EPOCH, "num_train_epochs": 0.5}),
        (GKDTrainer, {**EPOCH, "dataloader_drop_last": True}),
        (OwnLoader, EPOCH),
    ],
)
def test_missing_rows_that_may_not_be_drawn_are_only_warned_of(make_trainer, teacher, caplog, kind, options):
    make_trainer(trainer_class=kind, trainer_args={"teacher": teacher}, **options)
    [warning] = [record.getMessage() for record in caplog.records if "not in the cache" in record.getMessage()]
    assert warning.startswith("train: 2 of 16 rows")
    assert warning.endswith("The run ends if it draws such a row.")


@pytest.mark.parametrize(("most", "found"), [(15, "1 of 8"), (8, "1 of 8"), (4, None)])
def test_of_many_rows_some_at_even_distances_are_looked_up(make_trainer, teacher, monkeypatch, most, found):
    monkeypatch.setattr(coverage, "MAX_LOOKED_UP", most)
    if found is None:
        make_trainer(trainer_args={"teacher": teacher}, **EPOCH)
        return
    with pytest.raises(GKDDataError, match=f"{found} rows looked up are not in the cache.*the first is row 14"):
        make_trainer(trainer_args={"teacher": teacher}, **EPOCH)


def test_all_rows_in_the_cache_pass_also_if_they_are_cut_shorter(make_trainer, cached, caplog):
    teacher = CachedTeacher(cached())
    make_trainer(trainer_args={"teacher": teacher}, **EPOCH, max_length=10)
    assert "not in the cache" not in caplog.text


def test_evaluation_sets_are_looked_up_too(make_trainer, teacher, token_rows, caplog):
    given = {"teacher": teacher, "train_dataset": token_rows(14), "eval_dataset": token_rows(16)}
    with pytest.raises(GKDDataError, match="eval: 2 of 16 rows"):
        make_trainer(trainer_args=given, eval_strategy="epoch", **EPOCH)
    trainer = make_trainer(trainer_args={**given, "eval_dataset": {"held out": token_rows(15)}}, **EPOCH)
    assert "held out: 1 of 15 rows" in caplog.text
    with pytest.raises(GKDDataError, match="eval: 2 of 16 rows"):
        trainer.evaluate(token_rows(16))


def test_prompts_to_evaluate_on_are_refused_before_training(make_trainer, cached):
    prompts = Dataset.from_list([{"input_ids": [5, 6], "labels": [-100, -100]}] * 4)
    given = {"teacher": CachedTeacher(cached()), "eval_dataset": prompts}
    with pytest.raises(GKDDataError, match="eval: 4 of 4 rows looked up are prompts without a completion"):
        make_trainer(trainer_args=given, eval_strategy="steps")
    with pytest.raises(GKDDataError, match="test: 4 of 4 rows looked up are prompts without a completion"):
        make_trainer(trainer_args=given).predict(prompts)


@pytest.mark.parametrize("options", [{"packing": True}, {"padding_free": True, "max_length": None}])
def test_joined_rows_are_looked_up_one_by_one(config, tiny_model, byte_level, cached, token_rows, options):
    def trainer(rows):
        return MySFT(
            model=tiny_model(),
            args=config(MyConfig, bf16=False, **EPOCH, **options),
            train_dataset=rows,
            processing_class=byte_level(),
            teacher=CachedTeacher(folder),
        )

    folder = cached(rows=token_rows(14), **{name: options[name] for name in options if name == "max_length"})
    trainer(token_rows(14)).train()
    with pytest.raises(GKDDataError, match=r"of .* rows looked up are not in the cache"):
        trainer(token_rows(15))


class Reversing(DataCollatorWithPadding):
    """A collator of a user's, whose samples are not the rows."""

    def __call__(self, rows):
        rows = [{"input_ids": row["input_ids"][::-1]} for row in rows]
        batch = super().__call__(rows)
        return {**batch, "labels": batch["input_ids"]}


def test_rows_that_a_collator_changes_are_not_looked_up_so_the_cache_must_be_complete(
    make_trainer, byte_level, cached, token_rows
):
    folder = cached(rows=token_rows(14))
    collator = Reversing(byte_level())
    make_trainer(trainer_args={"teacher": CachedTeacher(folder), "data_collator": collator}, **EPOCH)
    [(path, manifest)] = CachedTeacher(folder).manifests.items()
    write_manifest(path, manifest.model_copy(update={"is_complete": False}))
    with pytest.raises(GKDTeacherError, match="not complete: it holds 14 rows so far, and the rows of train can't be"):
        make_trainer(trainer_args={"teacher": CachedTeacher(folder), "data_collator": collator}, **EPOCH)


def test_a_cache_that_is_still_written_serves_a_run_whose_rows_it_has(make_trainer, incomplete, token_rows):
    trainer = make_trainer(trainer_args={"teacher": incomplete, "train_dataset": token_rows(14)}, **EPOCH)
    assert trainer.train().global_step == 4
    stream = token_rows(14).to_iterable_dataset()
    with pytest.raises(GKDTeacherError, match=r"not complete.* the rows of train can't be looked up"):
        make_trainer(trainer_args={"teacher": incomplete, "train_dataset": stream}, max_steps=2)


def test_rows_are_looked_up_in_all_folders_of_one_teacher(make_trainer, teacher, cached, token_rows):
    folders = [*teacher.manifests, cached(rows=token_rows(16).select([14]), name="later")]
    with pytest.raises(GKDDataError, match=r"train: 1 of 16 rows .* not in the cache in .*cache, .*later.* row 15: "):
        make_trainer(trainer_args={"teacher": CachedTeacher(folders)}, **EPOCH)
    cached(rows=token_rows(16).select([14, 15]), name="later")
    make_trainer(trainer_args={"teacher": CachedTeacher(folders)}, **EPOCH)


def test_each_of_several_caches_is_asked_for_the_rows_that_it_scores(make_trainer, teacher, cached, token_rows):
    all_rows = CachedTeacher(cached(name="all"))
    rows = token_rows(16).add_column("teacher", ["old"] * 14 + ["new"] * 2)

    def make(new, old=teacher):
        make_trainer(trainer_args={"train_dataset": rows, "teacher": RoutedTeachers({"old": old, "new": new})}, **EPOCH)

    make(all_rows)
    with pytest.raises(GKDDataError, match=r"train: 2 of 2 rows .*the first is row 14"):
        make(teacher, all_rows)
    with pytest.raises(GKDDataError, match=r"train: 2 of 2 rows .*the first is row 14"):
        make(WeightedTeachers({"one": all_rows, "two": teacher}))


def test_rows_with_a_live_teacher_are_not_read(make_trainer, tiny_model, monkeypatch):
    read = []
    teacher = FrozenTeacher(tiny_model(hidden=48, seed=1))
    monkeypatch.setattr("gkd_trainer.trainer.coverage.CollatedRows.__iter__", lambda rows: read.append(rows))
    make_trainer(trainer_args={"teacher": teacher, "train_dataset": Dataset.from_list([{"input_ids": [4, 5]}])})
    assert not read
