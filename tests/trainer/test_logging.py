"""How often a run is logged by default."""

import logging
import re

import pytest
from transformers import TrainerCallback


def logged_steps(trainer):
    return [entry["step"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_short_run_is_logged_ten_times_with_its_metrics(make_trainer):
    trainer = make_trainer(logging_steps=None, max_steps=30)
    trainer.train()
    assert logged_steps(trainer) == list(range(3, 31, 3))
    assert all("divergence_off_policy" in entry for entry in trainer.state.log_history[:10])


@pytest.mark.parametrize(("options", "steps"), [({"logging_steps": 500}, []), ({"logging_strategy": "epoch"}, [4, 8])])
def test_what_was_set_is_kept(options, steps, make_trainer):
    trainer = make_trainer(**{"logging_steps": None, "max_steps": 8, **options})  # of 4 steps an epoch
    trainer.train()
    assert logged_steps(trainer) == steps


class Noting(TrainerCallback):
    """Notes what callbacks that go by the arguments go by."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen.append((args.logging_steps, state.logging_steps))


def test_callbacks_see_the_interval_of_each_run(make_trainer):
    noting = Noting()
    trainer = make_trainer(trainer_args={"callbacks": [noting]}, logging_steps=None, max_steps=30)
    trainer.train()
    trainer.args.max_steps = 10
    trainer.train()
    assert noting.seen == [(3, 3), (1, 1)]


def test_a_resumed_run_logs_at_the_steps_of_an_uninterrupted_one_without_a_warning(make_trainer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    options = {"logging_steps": None, "max_steps": 20, "save_strategy": "steps", "save_steps": 5}
    make_trainer(**options).train()
    resumed = make_trainer(**options)
    checkpoint = f"{resumed.args.output_dir}/checkpoint-5"
    resumed.train(resume_from_checkpoint=checkpoint)
    assert logged_steps(resumed) == list(range(2, 21, 2))
    assert "do not match" not in caplog.text


def test_a_notebooks_table_has_our_metrics(make_trainer, shown, monkeypatch):
    monkeypatch.setattr("transformers.trainer.DEFAULT_PROGRESS_CALLBACK", shown.callback)
    make_trainer(disable_tqdm=False, lmbda=0.5, max_steps=2).train()
    [html] = shown.states
    names = ["Step", "Training Loss", "Divergence On Policy", "Divergence Off Policy", "Student Entropy"]
    assert re.findall(r"<th[^>]*>(.*?)</th>", html)[:5] == names
