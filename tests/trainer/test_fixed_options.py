"""Options that are changed after a trainer was built."""

import pytest
from datasets import Dataset, IterableDataset

from gkd_trainer.config import GKDArguments
from gkd_trainer.config_effects import Run
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.trainer.fixed_options import FixedOptions


def changed(before, after):
    """Check options after a change."""
    args = GKDArguments(**before)
    fixed = FixedOptions(Run(args))
    for name, value in after.items():
        setattr(args, name, value)
    fixed.require_unchanged(args)


REFUSED = [
    ({"lmbda": 0.0}, {"lmbda": 0.5}),
    ({"lmbda": 0.0, "lmbda_end": 0.0, "lmbda_schedule": "linear"}, {"lmbda_end": 1.0}),
    ({}, {"seq_kd": True}),
    ({"seq_kd": True}, {"seq_kd": False}),
    ({}, {"max_new_tokens": 64}),
    ({}, {"max_length": 512}),
    ({}, {"train_on": "last_turn"}),
    ({}, {"eval_on_policy": True}),
    ({}, {"teacher_top_k": 8}),
    ({}, {"report_samples": 1}),
]


@pytest.mark.parametrize(("before", "after"), REFUSED)
def test_an_option_that_shaped_rows_teacher_or_engines_is_refused_if_it_changes(before, after):
    [(name, value)] = after.items()
    then = getattr(GKDArguments(**before), name)
    with pytest.raises(GKDConfigError) as raised:
        changed(before, after)
    assert str(raised.value).startswith(f"{name} is {value!r}, but was {then!r} when this trainer prepared its rows")
    assert f"build a new trainer with {name}={value!r}" in str(raised.value)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"lmbda": 0.5}, {"lmbda": 0.9}),  # as callbacks do that schedule it
        ({"lmbda": 0.5}, {"lmbda": 0.0}),
        ({"lmbda": 1.0}, {"lmbda": 0.2}),  # but see require_completions
        ({"seq_kd": True, "lmbda": 0.0}, {"lmbda": 0.5}),
        ({}, {"beta": 0.1, "loss_temperature": 2.0, "temperature": 0.7, "ce_weight": 0.1, "rollout_steps": 2}),
        ({"eval_on_policy": True}, {"eval_on_policy": False}),
    ],
)
def test_an_option_that_is_read_when_used_may_change(before, after):
    changed(before, after)


@pytest.mark.parametrize(
    ("after", "message"),
    [({"beta": 1.5}, r"beta must be in \[0, 1\]"), ({"lmbda_schedule": "linear"}, "lmbda_schedule='linear' needs")],
)
def test_values_and_combinations_are_checked_again(after, message):
    with pytest.raises(GKDConfigError, match=message):
        changed({}, after)


def test_facts_of_the_trainer_count_in_the_combinations():
    args = GKDArguments()
    fixed = FixedOptions(Run(args, has_top_tokens=True))
    args.loss_temperature = 2.0
    with pytest.raises(GKDConfigError, match="loss_temperature"):
        fixed.require_unchanged(args)


def test_secrets_are_not_shown():
    before = {"vllm_server_base_url": "http://a:1", "use_vllm": True, "vllm_mode": "server"}
    with pytest.raises(GKDConfigError) as raised:
        changed({**before, "vllm_server_api_token": "hidden"}, {"vllm_server_api_token": "secret"})
    assert "hidden" not in str(raised.value)
    assert "secret" not in str(raised.value)


def test_training_does_not_start_with_options_that_its_rows_do_not_fit(make_trainer):
    rows = Dataset.from_list([{"input_ids": list(range(3, 27)), "labels": [-100] * 22 + [25, 26]}] * 4)
    trainer = make_trainer(trainer_args={"train_dataset": rows}, max_length=24, max_new_tokens=12)
    trainer.lmbda = 1.0
    with pytest.raises(GKDConfigError, match=r"lmbda is 1.0, but was 0.0"):
        trainer.train()
    assert trainer.state.global_step == 0


PROMPT = {"input_ids": [5, 6], "labels": [-100, -100]}
COMPLETED = {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}
OF_AN_ENCODER_DECODER = {"input_ids": [5, 6], "labels": []}
SINCE_ONE = [
    ({"lmbda": 0.2}, r"lmbda is 0\.2, but was 1\.0 .*with lmbda=0\.2, or set it to 1\.0"),
    ({"lmbda": 0.0}, r"lmbda is 0\.0, but was 1\.0"),
    ({"lmbda_schedule": "linear", "lmbda_end": 0.2}, r"lmbda_end is 0\.2, but was None"),
]


def require_completions(before, after, rows):
    """Check the rows of a trainer whose options were changed."""
    args = GKDArguments(**before)
    fixed = FixedOptions(Run(args))
    for name, value in after.items():
        setattr(args, name, value)
    fixed.require_completions(args, rows)


@pytest.mark.parametrize(("after", "message"), SINCE_ONE)
@pytest.mark.parametrize("prompt", [PROMPT, OF_AN_ENCODER_DECODER])
def test_prompts_that_only_rollouts_complete_are_refused_if_lmbda_falls_from_one(after, message, prompt):
    with pytest.raises(GKDConfigError, match=message) as raised:
        require_completions({"lmbda": 1.0}, after, Dataset.from_list([COMPLETED, COMPLETED, prompt]))
    assert "row 2, a prompt without a completion, can't be trained on off-policy" in str(raised.value)


@pytest.mark.parametrize(("after", "message"), SINCE_ONE)
def test_streamed_rows_are_refused_if_lmbda_falls_from_one(after, message):
    with pytest.raises(GKDConfigError, match=message):
        require_completions({"lmbda": 1.0}, after, IterableDataset.from_generator(lambda: iter([COMPLETED])))


@pytest.mark.parametrize(
    ("before", "after", "rows"),
    [
        ({"lmbda": 1.0}, {"lmbda": 0.2}, Dataset.from_list([COMPLETED, COMPLETED])),
        ({"lmbda": 1.0}, {"lmbda": 0.2}, [PROMPT]),  # a dataset of the user's own is used as it is, whatever λ is
        ({"lmbda": 1.0}, {}, Dataset.from_list([PROMPT])),
        ({"lmbda": 0.2}, {"lmbda": 0.5}, Dataset.from_list([PROMPT])),  # never prepared
    ],
)
def test_lmbda_may_fall_from_one_if_off_policy_samples_have_completions(before, after, rows):
    require_completions(before, after, rows)


@pytest.mark.parametrize("has_completions", [True, False])
def test_a_run_whose_lmbda_fell_from_one_trains_on_completions_or_not_at_all(make_trainer, token_rows, has_completions):
    rows = token_rows(8) if has_completions else Dataset.from_list([PROMPT] * 8)
    trainer = make_trainer(trainer_args={"train_dataset": rows}, lmbda=1.0, max_steps=1)
    trainer.lmbda = 0.2
    if has_completions:
        assert trainer.train().global_step == 1
        return
    with pytest.raises(GKDConfigError, match="row 0, a prompt without a completion"):
        trainer.train()
    assert trainer.state.global_step == 0
