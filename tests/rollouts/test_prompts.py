"""Prompts as the inputs of `generate`."""

import torch

from gkd_trainer.rollouts.prompts import PromptBatch

PROMPTS = [[5, 6, 7], [8]]


def test_a_causal_lms_prompts_are_padded_on_the_left(tiny_model):
    batch = PromptBatch.of(tiny_model(), PROMPTS, 1)
    assert batch.ids_BL.tolist() == [[5, 6, 7], [1, 1, 8]]
    assert batch.mask_BL.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.n_given == 3
    assert batch.given_mask_BL is batch.mask_BL
    assert batch.config_options == {}


def test_an_encoders_prompts_are_padded_on_the_right_and_its_decoder_starts_with_one_token(tiny_encoder_decoder):
    for family, start in (("t5", 0), ("bart", 2)):
        batch = PromptBatch.of(tiny_encoder_decoder(family), PROMPTS, 1)
        assert batch.ids_BL.tolist() == [[5, 6, 7], [8, 1, 1]]
        assert batch.mask_BL.tolist() == [[1, 1, 1], [1, 0, 0]]
        assert batch.n_given == 1
        assert torch.equal(batch.given_mask_BL, torch.tensor([[0], [0]]))
        assert batch.config_options == {"decoder_start_token_id": start}
