"""Training runs that older or newer versions of transformers and TRL would change."""

import warnings

from transformers import Trainer

from gkd_trainer import GKDTrainer
from tests.versions import CHECKPOINTING


def test_a_loss_is_left_to_trainer_if_it_is_not_marked_as_scaled(make_trainer, monkeypatch):
    """As transformers before 5.19 has it, whose condition this is."""
    seen = []

    class Older(GKDTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            divides = not self.model_accepts_loss_kwargs or num_items_in_batch is None
            seen.append(divides and self.compute_loss_func is None)
            return super().training_step(model, inputs, num_items_in_batch)

    monkeypatch.delattr(Trainer, "loss_is_scaled_for_ga", raising=False)
    trainer = make_trainer(trainer_class=Older, max_steps=1, gradient_accumulation_steps=2)
    trainer.train()
    assert seen == [False, False]


def test_a_student_that_checkpoints_trains_without_a_deprecated_name(make_trainer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # also what the run of the tests ignores
        make_trainer(max_steps=1, lmbda=0.5, **{CHECKPOINTING: True}).train()
