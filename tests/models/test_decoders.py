"""The decoder's inputs of encoder-decoders, made from labels as their own forwards make them."""

import pytest
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MBartConfig,
    MBartForConditionalGeneration,
)

from gkd_trainer.batch_keys import IGNORE_INDEX
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.models.decoders import (
    has_fixed_start,
    in_label_columns,
    is_encoder_decoder,
    start_token_id,
    with_decoder_inputs,
)

X = IGNORE_INDEX
FAMILIES = ["t5", "t5_untied", "mt5", "bart"]
SIZES = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "vocab_size": 40,
}


def batch_of(labels, **others):
    ids = torch.tensor([[11, 12, 13], [14, 15, 2]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(labels), **others}


@pytest.fixture(scope="module")
def mbart():
    """A model that puts the last label first."""
    return MBartForConditionalGeneration(MBartConfig(**SIZES)).eval()


@pytest.fixture(scope="module")
def m2m100():
    """A model that shifts its labels only inside its forward."""
    return M2M100ForConditionalGeneration(M2M100Config(**SIZES)).eval()


def test_an_encoder_decoder_is_one_by_its_config(tiny_model, tiny_encoder_decoder):
    assert is_encoder_decoder(tiny_encoder_decoder())
    assert not is_encoder_decoder(tiny_model())
    assert not is_encoder_decoder(torch.nn.Linear(2, 2))
    assert not is_encoder_decoder(None)


def test_the_start_token_is_that_of_the_models_own_shift(tiny_encoder_decoder, mbart, m2m100):
    assert [start_token_id(tiny_encoder_decoder(family)) for family in FAMILIES] == [0, 0, 0, 2]
    assert start_token_id(mbart) == 2  # the label that it is given
    assert start_token_id(m2m100) == 2


def test_a_start_token_is_fixed_unless_it_is_the_last_label(tiny_encoder_decoder, mbart, m2m100):
    assert all(has_fixed_start(tiny_encoder_decoder(family)) for family in FAMILIES)
    assert has_fixed_start(m2m100)
    assert not has_fixed_start(mbart)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("unset", ["decoder_start_token_id", "pad_token_id"])
def test_a_model_without_a_start_or_pad_token_is_refused(tiny_encoder_decoder, family, unset):
    model = tiny_encoder_decoder(family)
    setattr(model.config, unset, None)
    with pytest.raises(GKDConfigError, match="has no first token: set decoder_start_token_id and pad_token_id"):
        start_token_id(model)


def test_a_causal_lms_batch_stays_as_it_is(tiny_model):
    inputs = batch_of([[X, 12, 2], [X, 15, 2]])
    assert with_decoder_inputs(tiny_model(), inputs) is inputs
    assert with_decoder_inputs(tiny_model(), {"input_ids": 1, "labels": None}) == {"input_ids": 1, "labels": None}


@pytest.mark.parametrize("family", [*FAMILIES, "mbart", "m2m100"])
def test_the_logits_are_those_of_a_forward_that_gets_the_labels(family, request, tiny_encoder_decoder):
    model = request.getfixturevalue(family) if family in ("mbart", "m2m100") else tiny_encoder_decoder(family)
    inputs = batch_of([[5, 6, 7, 2], [8, 2, X, X]])
    decoded = with_decoder_inputs(model, inputs)
    expected = model(**inputs).logits
    labels = decoded.pop("labels")
    assert torch.equal(labels, inputs["labels"])
    is_scored = labels != X
    assert torch.equal(model(**decoded).logits[is_scored], expected[is_scored])


def test_padding_before_the_labels_moves_behind_them(tiny_encoder_decoder):
    decoded = with_decoder_inputs(tiny_encoder_decoder(), batch_of([[X, X, 5, 6], [7, 8, X, 9]]))
    assert decoded["labels"].tolist() == [[5, 6, X, X], [7, 8, X, 9]]
    assert decoded["decoder_input_ids"].tolist() == [[0, 5, 6, 0], [0, 7, 8, 0]]


def test_values_per_label_come_back_to_the_columns_of_the_labels(tiny_encoder_decoder):
    inputs = batch_of([[X, X, 5, 6], [7, 8, X, 9]])
    decoded = with_decoder_inputs(tiny_encoder_decoder(), inputs)
    assert torch.equal(in_label_columns(inputs, decoded["labels"]), inputs["labels"])
    values = decoded["labels"][..., None] + torch.tensor([0.0, 0.5])
    assert torch.equal(
        in_label_columns(inputs, values)[0, 2:], inputs["labels"][0, 2:, None] + torch.tensor([0.0, 0.5])
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_collator_that_pads_on_the_left_gives_the_inputs_of_one_that_pads_on_the_right(
    family, tiny_encoder_decoder, byte_level
):
    model = tiny_encoder_decoder(family)
    rows = [{"input_ids": [11, 12], "labels": [5, 6, 7, 2]}, {"input_ids": [13, 14, 15], "labels": [8, 2]}]
    made = {}
    for side in ("left", "right"):
        tokenizer = byte_level()
        tokenizer.padding_side = side
        for shifts in (model, None):
            batch = dict(DataCollatorForSeq2Seq(tokenizer, shifts)([dict(row) for row in rows]))
            made[side, shifts is None] = with_decoder_inputs(model, batch)
    for decoded in made.values():
        for name in ("labels", "decoder_input_ids"):
            assert torch.equal(decoded[name], made["right", True][name])


def test_decoder_inputs_of_the_collators_own_are_kept(tiny_encoder_decoder):
    inputs = batch_of([[X, X, 5, 2], [X, 6, 7, 2]], decoder_input_ids=torch.tensor([[0, 9, 9, 5], [0, 9, 6, 7]]))
    assert with_decoder_inputs(tiny_encoder_decoder(), inputs) is inputs


def test_a_decoder_mask_says_what_is_padding(tiny_encoder_decoder):
    inputs = batch_of(
        [[X, X, 5, 2], [X, 6, 7, 2]],
        decoder_input_ids=torch.tensor([[0, 0, 9, 5], [0, 9, 6, 7]]),
        decoder_attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]),
    )
    decoded = with_decoder_inputs(tiny_encoder_decoder(), inputs)
    assert decoded["labels"].tolist() == [[X, 5, 2, X], [X, 6, 7, 2]]
    assert decoded["decoder_input_ids"].tolist() == [[0, 9, 5, 0], [0, 9, 6, 7]]
    assert decoded["decoder_attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("family", [*FAMILIES, "mbart", "m2m100"])
def test_a_row_without_labels_begins_with_the_start_token(family, request, tiny_encoder_decoder):
    model = request.getfixturevalue(family) if family in ("mbart", "m2m100") else tiny_encoder_decoder(family)
    for labels in ([[X, X], [5, 2]], [[], []]):
        decoded = with_decoder_inputs(model, batch_of(labels))
        assert decoded["decoder_input_ids"][:, 0].tolist() == [start_token_id(model)] * 2
        assert decoded["labels"].shape == decoded["decoder_input_ids"].shape
        assert with_decoder_inputs(model, decoded)["decoder_input_ids"].equal(decoded["decoder_input_ids"])
