"""A run is logged ten times unless its configuration says otherwise."""

import dataclasses
import json
from dataclasses import dataclass

import pytest
from transformers import TrainerState, TrainingArguments
from trl import SFTConfig

from gkd_trainer import GKDArguments, GKDConfig
from gkd_trainer.config import Unset
from gkd_trainer.report.interval import tenth_of
from gkd_trainer.trainer.configuration import completed_args


def interval(args, max_steps):
    """The interval of a run: a tenth of it if none was chosen, else what Trainer computes."""
    if isinstance(args.logging_steps, Unset):
        return tenth_of(max_steps)
    state = TrainerState(max_steps=max_steps)
    state.compute_steps(args, max_steps)
    return state.logging_steps


def config(**options):
    return GKDConfig(output_dir="unused", **options)


@pytest.mark.parametrize(
    ("max_steps", "steps"), [(1, 1), (9, 1), (10, 1), (29, 2), (400, 40), (5000, 500), (10**6, 500)]
)
def test_an_unset_interval_is_a_tenth_of_the_run_and_at_most_500_steps(max_steps, steps):
    assert interval(config(), max_steps) == steps


@pytest.mark.parametrize(("given", "steps"), [(500, 500), (500.0, 500), (7, 7), (0.1, 4000), (0.5, 20_000)])
def test_a_given_interval_is_kept(given, steps):
    assert interval(config(logging_steps=given), 40_000) == steps


def test_an_unset_interval_stays_unset_in_copies():
    args = dataclasses.replace(config(), beta=0.1)
    assert interval(args, 100) == 10
    assert interval(GKDConfig(**json.loads(args.to_json_string())), 100) == 10
    assert interval(dataclasses.replace(config(logging_steps=500)), 100) == 500


def test_other_intervals_do_not_follow_it():
    args = config(eval_strategy="steps", load_best_model_at_end=True)
    assert (args.logging_steps, args.eval_steps, args.save_steps) == (500, 500, 500)
    assert 1000 % args.logging_steps == 0  # as callbacks compute with it
    assert config(logging_steps=20, eval_strategy="steps").eval_steps == 20


def test_zero_is_still_refused():
    with pytest.raises(ValueError, match="non-zero --logging_steps"):
        config(logging_steps=0)


def test_a_configuration_over_sftconfig_keeps_its_default():
    @dataclass
    class MyConfig(GKDArguments, SFTConfig):
        pass

    assert interval(MyConfig(output_dir="unused", bf16=False), 30) == 10
    assert interval(MyConfig(output_dir="unused", bf16=False, logging_steps=500), 30) == 500


def test_plain_training_arguments_get_the_default_too():
    assert interval(completed_args(TrainingArguments(output_dir="unused"), True), 100) == 10
    assert interval(completed_args(TrainingArguments(output_dir="unused", logging_steps=20), True), 100) == 20
