"""The tokens per forward of assisted generation: its bounds, and that drafting changes only the speed."""

import pytest
import torch

from gkd_trainer.errors import GKDConfigError
from gkd_trainer.report.drafting import tokens_per_forward

PROMPTS = [[5, 6, 7, 8], [30, 31], [100, 120, 140, 160, 180]]


@pytest.fixture
def teacher(tiny_model):
    """A model that never stops."""
    model = tiny_model(seed=1)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("drafts", [1, 4])
def test_a_student_that_is_its_teacher_has_every_draft_accepted(teacher, tiny_model, drafts, seed):
    rate = tokens_per_forward(teacher, tiny_model(seed=1), PROMPTS, drafts=drafts, max_new_tokens=20, seed=seed)
    # The last forward may be cut short by the length.
    assert rate == pytest.approx(20 / -(-20 // (drafts + 1)))


def test_drafts_that_are_never_accepted_give_one_token_per_forward(teacher, tiny_model):
    student = tiny_model(seed=1)
    with torch.no_grad():
        student.get_output_embeddings().weight.neg_()
    assert tokens_per_forward(teacher, student, PROMPTS, drafts=3, max_new_tokens=10) == 1.0


def test_it_leaves_modes_configs_and_the_random_numbers_as_they_were(teacher, tiny_model):
    student = tiny_model(seed=2).train()
    config = student.generation_config
    state = torch.get_rng_state()
    rates = {tokens_per_forward(teacher, student, PROMPTS, drafts=2, max_new_tokens=12, seed=3) for _ in range(2)}
    assert len(rates) == 1
    assert 1 <= rates.pop() <= 3
    assert student.training
    assert student.generation_config is config
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("prompts", "drafts"), [([], 4), (PROMPTS, 0)])
def test_nothing_to_measure_is_refused(teacher, prompts, drafts):
    with pytest.raises(GKDConfigError, match="expected prompts, and at least 1 draft"):
        tokens_per_forward(teacher, teacher, prompts, drafts=drafts)
