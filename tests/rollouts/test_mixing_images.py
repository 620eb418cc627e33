"""Completions in batches with images: real models place each sample's tokens as they do without the other samples."""

import pytest
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    set_seed,
)

from gkd_trainer.batch_keys import IGNORE_INDEX
from gkd_trainer.rollouts.mixing import with_completions
from gkd_trainer.types import Completion, Generated, TokenBatch

X = IGNORE_INDEX
PAD, START, IMAGE, END = 0, 60, 62, 61
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
}
IDS = {
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "image_token_id": IMAGE,
    "video_token_id": 63,
    "tie_word_embeddings": False,
}
VISION = {"depth": 2, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
MODELS = {
    "qwen2": (
        Qwen2VLForConditionalGeneration,
        Qwen2VLConfig,
        {**VISION, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
    ),
    "qwen2.5": (
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig,
        {
            **VISION,
            "hidden_size": 16,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
    ),
    "qwen3": (
        Qwen3VLForConditionalGeneration,
        Qwen3VLConfig,
        {
            **VISION,
            "hidden_size": 16,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    ),
}

# Two samples with an image of 4 by 4 patches each, which are merged to four tokens.
PICTURE = [START, IMAGE, IMAGE, IMAGE, IMAGE, END]
FIRST, SECOND = [5, *PICTURE, 6, 7, 8, 9, 2], [*PICTURE, 10, 11, 2]
N_TRAINED = 3


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    model_class, config_class, vision = MODELS[request.param]
    set_seed(0)
    model = model_class(config_class(text_config=TEXT, vision_config=vision, **IDS)).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))


def batch_of(samples, pixels, side="right"):
    """Collate samples as the models' processors do, the last tokens of each trained on."""
    length = max(map(len, samples))
    rows = {"input_ids": [], "attention_mask": [], "labels": [], "mm_token_type_ids": []}
    for ids in samples:
        fill = [None] * (length - len(ids))
        padded = [*ids, *fill] if side == "right" else [*fill, *ids]
        trained = ids[-N_TRAINED:] if len(ids) > N_TRAINED else ids
        labels = [X] * (len(ids) - len(trained)) + trained
        rows["input_ids"].append([PAD if token_id is None else token_id for token_id in padded])
        rows["attention_mask"].append([int(token_id is not None) for token_id in padded])
        rows["labels"].append(labels + [X] * len(fill) if side == "right" else [X] * len(fill) + labels)
        rows["mm_token_type_ids"].append([int(token_id == IMAGE) for token_id in padded])
    grid = torch.tensor([[1, 4, 4]] * len(samples))
    tensors = {name: torch.tensor(values) for name, values in rows.items()}
    return {**tensors, "pixel_values": pixels.flatten(0, 1), "image_grid_thw": grid}


def logits_of_samples(model, inputs):
    """Return the logits [L, V] of each sample's own tokens."""
    batch = TokenBatch.from_inputs(inputs)
    with torch.no_grad():
        logits_BLV = model(**batch.model_inputs, use_cache=False).logits
    return [logits[mask.bool()] for logits, mask in zip(logits_BLV, inputs["attention_mask"], strict=True)]


@pytest.mark.parametrize("side", ["right", "left"])
def test_each_sample_of_a_mixed_batch_has_the_logits_it_has_alone(model, pixels, side):
    prompt, completion = SECOND[:-N_TRAINED], [12, 13, 14, 15, 16, 17, 18, 2]
    mixed = with_completions(
        batch_of([FIRST, SECOND], pixels, side), {1: Generated(prompt, Completion(completion, True), True)}, PAD
    )
    assert mixed["input_ids"].tolist() == [[*FIRST, PAD, PAD], [*prompt, *completion]]
    first, second = logits_of_samples(model, mixed)
    [alone] = logits_of_samples(model, batch_of([FIRST], pixels[:1]))
    torch.testing.assert_close(first, alone, rtol=0, atol=1e-4)
    [alone] = logits_of_samples(model, batch_of([[*prompt, *completion]], pixels[1:]))
    torch.testing.assert_close(second, alone, rtol=0, atol=1e-4)


def test_the_logits_tell_positions_and_pixels_apart(model, pixels):
    batch = batch_of([FIRST], pixels[:1])
    [logits] = logits_of_samples(model, batch)
    [elsewhere] = logits_of_samples(model, {**batch, "position_ids": torch.arange(len(FIRST)).expand(3, 1, -1)})
    [other_image] = logits_of_samples(model, batch_of([FIRST], pixels[1:]))
    assert (logits - elsewhere).abs().max() > 1e-2
    assert (logits - other_image).abs().max() > 1e-2
