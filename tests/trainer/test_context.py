"""Sequences longer than a model's context are refused at construction, or never made."""

import logging

import pytest
from datasets import Dataset

from gkd_trainer import GKDArguments, GKDConfigError

LIMIT = 64  # of the tiny gpt2
DEFAULT = GKDArguments.max_length


def long_rows(length, prompt=10, count=8):
    row = {"input_ids": list(range(4, 4 + length)), "labels": [-100] * prompt + list(range(4 + prompt, 4 + length))}
    return Dataset.from_list([row] * count)


@pytest.fixture
def models(tiny_model):
    def make(student="llama", teacher="llama", **config):
        return {"model": tiny_model(student, **config), "teacher_model": tiny_model(teacher, seed=1)}

    return make


@pytest.mark.parametrize("owner", ["student", "teacher"])
def test_max_length_beyond_learned_positions_is_refused(make_trainer, models, owner):
    pair = models(**{owner: "gpt2"})
    with pytest.raises(GKDConfigError) as raised:
        make_trainer(trainer_args=pair, max_length=LIMIT + 1)
    assert str(raised.value) == (
        f"max_length={LIMIT + 1} is more than the {owner}'s context, {LIMIT} tokens: set max_length to {LIMIT} or less"
    )


def test_max_length_beyond_rotary_positions_is_refused_unless_they_are_scaled(make_trainer, models):
    with pytest.raises(GKDConfigError, match=r"student's context, 32 tokens.*or scale its rotary embeddings"):
        make_trainer(trainer_args=models(max_position_embeddings=32))
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    make_trainer(trainer_args=models(max_position_embeddings=32, rope_parameters=scaling))


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_sequences_as_long_as_the_context_are_trained_on(make_trainer, models, lmbda):
    rows = long_rows(LIMIT + 20, prompt=LIMIT - 6)
    trainer = make_trainer(
        trainer_args={**models("gpt2", "gpt2"), "train_dataset": rows}, lmbda=lmbda, max_length=LIMIT, max_new_tokens=6
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


def test_the_default_of_max_length_gives_way_to_a_shorter_context(make_trainer, models, caplog):
    caplog.set_level(logging.INFO)
    trainer = make_trainer(trainer_args={**models("gpt2"), "train_dataset": long_rows(LIMIT + 20)}, max_length=DEFAULT)
    assert trainer.args.max_length == LIMIT
    assert {len(row["input_ids"]) for row in trainer.train_dataset} == {LIMIT}
    messages = [record.message for record in caplog.records if "max_length is" in record.message]
    assert messages == [f"max_length is {LIMIT}, the student's context, instead of its default of {DEFAULT}."]
    trainer.train()


def test_the_configuration_that_was_passed_keeps_its_lengths(config, make_trainer, models):
    args = config(max_length=DEFAULT)
    assert make_trainer(trainer_args={**models("gpt2"), "args": args}).args.max_length == LIMIT
    assert args.max_length == DEFAULT


def test_the_default_is_kept_if_it_fits_both_contexts(make_trainer, models):
    assert make_trainer(trainer_args=models(), max_length=DEFAULT).args.max_length == DEFAULT


def test_completions_that_fill_the_context_are_refused(make_trainer, models):
    with pytest.raises(GKDConfigError, match=rf"max_length \({LIMIT}\) must exceed max_new_tokens \(100\)"):
        make_trainer(trainer_args=models("gpt2"), lmbda=0.5, max_length=DEFAULT, max_new_tokens=100)


def test_the_default_of_max_new_tokens_gives_way_to_a_shorter_context_too(make_trainer, models):
    default = GKDArguments.max_new_tokens
    args = make_trainer(trainer_args=models("gpt2"), lmbda=0.5, max_length=DEFAULT, max_new_tokens=default).args
    assert (args.max_length, args.max_new_tokens) == (LIMIT, LIMIT // 2)


def test_without_max_length_rows_beyond_the_context_are_refused(make_trainer, models):
    def make(length, **options):
        return make_trainer(
            trainer_args={**models("gpt2"), "train_dataset": long_rows(length)}, max_length=None, **options
        )

    make(LIMIT).train()
    with pytest.raises(
        GKDConfigError, match=f"train: max_length=None.*needs 65 tokens, more.*set max_length to {LIMIT}"
    ):
        make(LIMIT + 1)
    make(40, lmbda=0.5, max_new_tokens=LIMIT - 10).train()
    with pytest.raises(GKDConfigError, match="needs 65 tokens with max_new_tokens, more"):
        make(40, lmbda=0.5, max_new_tokens=LIMIT - 9)


def test_without_max_length_prompts_of_an_evaluation_have_to_leave_room_for_completions(make_trainer, models):
    def make(prompt):
        rows = Dataset.from_list([{"input_ids": list(range(4, 4 + prompt)), "labels": [-100] * prompt}] * 2)
        return make_trainer(trainer_args={**models("gpt2"), "eval_dataset": rows}, max_length=None)

    make(LIMIT - 6).evaluate()
    with pytest.raises(GKDConfigError, match=r"eval: max_length=None.*needs 65 tokens with max_new_tokens"):
        make(LIMIT - 5)


@pytest.mark.parametrize("family", ["rwkv", "mamba"])
def test_recurrent_models_have_no_context_to_exceed(make_trainer, models, family):
    make_trainer(trainer_args=models(family, family), max_length=5000)
