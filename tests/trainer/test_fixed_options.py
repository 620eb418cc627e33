"""Options that are changed after a trainer was built."""

import pytest
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback

from gkd_trainer import GKDTrainer, HFRollouts
from gkd_trainer.config import GKDArguments
from gkd_trainer.config_effects import Run
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.trainer.checkpoints import damage
from gkd_trainer.trainer.fixed_options import FixedOptions
from gkd_trainer.types import Completion


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


class Lambdas(TrainerCallback):
    """Sets λ before each step."""

    def __init__(self, *lambdas):
        self.lambdas = lambdas

    def on_train_begin(self, args, state, control, **kwargs):
        args.lmbda = self.lambdas[0]

    def on_step_end(self, args, state, control, **kwargs):
        args.lmbda = self.lambdas[min(state.global_step, len(self.lambdas) - 1)]


class Scripted(HFRollouts):
    """Completes each prompt with two tokens, and notes the prompts of each call."""

    def __init__(self):
        super().__init__(stop_ids=[2])
        self.calls = []

    def generate(self, prompts, sampling, seeds):
        self.calls.append([tuple(prompt) for prompt in prompts])
        return [Completion([7, 2], True) for _ in prompts]


class Recording(GKDTrainer):
    """Keeps the first tokens of the samples trained on, and which are on-policy, by step."""

    steps = ()

    def training_step(self, model, inputs, *args, **kwargs):
        first_tokens = inputs["input_ids"][:, 0].tolist()
        marks = inputs["is_on_policy"].tolist() if "is_on_policy" in inputs else [False] * len(first_tokens)
        self.steps += (dict(zip(first_tokens, marks, strict=True)),)
        return super().training_step(model, inputs, *args, **kwargs)


BY_FIRST_TOKEN = Dataset.from_list(
    [{"input_ids": [token, 5, 6, 2], "labels": [-100, -100, 6, 2]} for token in range(10, 26)]
)
OVERLAP = {
    "rollout_overlap": True,
    "use_vllm": True,
    "vllm_mode": "server",
    "vllm_server_base_url": "http://127.0.0.1:1",
}


@pytest.mark.parametrize(
    ("lambdas", "on_policy", "options"),
    [
        ([1, 1, 0], [1, 1, 0, 0], {}),
        ([1, 0, 0, 1], [1, 0, 0, 1], {}),
        ([0, 1], [0, 1, 1, 1], {}),
        ([1, 0], [1, 1, 0, 0], {"rollout_steps": 2}),
        ([1, 1, 0, 1], [1, 1, 1, 0], OVERLAP),  # each window is planned a step earlier
    ],
)
def test_lmbda_may_be_zero_for_some_steps_of_a_run(make_trainer, lambdas, on_policy, options):
    engine = Scripted()
    trainer = make_trainer(
        trainer_class=Recording,
        trainer_args={"train_dataset": BY_FIRST_TOKEN, "rollouts": engine, "callbacks": [Lambdas(*lambdas)]},
        lmbda=1.0,
        num_train_epochs=1,
        max_steps=-1,
        **options,
    )
    assert trainer.train().global_step == trainer.state.max_steps == 4
    assert [set(step.values()) for step in trainer.steps] == [{bool(each)} for each in on_policy]
    assert sorted(token for step in trainer.steps for token in step) == list(range(10, 26))
    assert sum(map(len, engine.calls)) == 4 * sum(on_policy)
    assert all(engine.calls)  # steps without completions don't ask the engine


def test_lmbda_can_not_rise_from_zero_in_a_run_that_began_without_rollouts(make_trainer, tmp_path):
    trainer = make_trainer(
        trainer_args={"callbacks": [Lambdas(0.0, 0.0, 0.5)]}, max_steps=4, output_dir=str(tmp_path / "run")
    )
    with pytest.raises(GKDConfigError, match=r"lmbda is 0\.5, but was 0\.0 when this run began.*checkpoint-2"):
        trainer.train()
    assert damage(tmp_path / "run" / "checkpoint-2") is None


def test_prompts_that_only_rollouts_complete_are_refused_if_lmbda_falls_from_one_in_a_run(make_trainer, tmp_path):
    rows = Dataset.from_list([PROMPT] * 16)
    trainer = make_trainer(
        trainer_args={"train_dataset": rows, "rollouts": Scripted(), "callbacks": [Lambdas(1.0, 0.5)]},
        lmbda=1.0,
        output_dir=str(tmp_path / "run"),
    )
    with pytest.raises(GKDConfigError, match=r"lmbda is 0\.5, but was 1\.0 .* row 0, a prompt.*checkpoint-1"):
        trainer.train()
