"""The token sequences that a server must score."""

import pytest
import torch

from gkd_trainer import GKDDataError
from gkd_trainer.teachers.prompt_scores import sequences_of
from gkd_trainer.types import TokenBatch

BATCH = {"input_ids": torch.tensor([[5, 6, 7, 0]]), "labels": torch.tensor([[-100, 6, 7, -100]])}


def test_a_sequence_ends_with_the_last_token_that_is_scored():
    [sequence] = sequences_of(TokenBatch.from_inputs(BATCH))
    assert sequence.token_ids == [5, 6, 7]
    assert sequence.targets_P.tolist() == [1, 2]


def test_the_tokens_that_are_scored_are_the_targets_also_where_labels_are_not_shifted():
    batch = TokenBatch.from_inputs(BATCH, label_offset=0)
    [sequence] = sequences_of(batch)
    assert [sequence.token_ids[target] for target in sequence.targets_P] == batch.targets_N.tolist() == [6, 7]


@pytest.mark.parametrize("name", ["pixel_values", "input_features"])
def test_a_batch_with_images_or_sound_is_refused_since_a_server_is_given_tokens_alone(name):
    with pytest.raises(GKDDataError, match=f"this batch also holds {name}"):
        sequences_of(TokenBatch.from_inputs({**BATCH, name: torch.ones(1, 3)}))
