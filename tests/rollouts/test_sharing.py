"""Which prompts may share a batch of a model, by its logits."""

import pytest
import torch

from gkd_trainer.rollouts.sharing import Sharing, find_sharing

PAD = 2


@pytest.fixture
def warnings_of(caplog):
    """Return what the module under test warned of so far."""
    name = find_sharing.__module__
    return lambda: [record.getMessage() for record in caplog.records if record.name == name]


def changed(model, monkeypatch, change):
    """Return the model with `change` made to the logits of its forwards, given which rows are padded."""
    forward = model.forward

    def wrapped(*args, **kwargs):
        output = forward(*args, **kwargs)
        change(output.logits, (kwargs["attention_mask"] == 0).any(dim=1))
        return output

    monkeypatch.setattr(model, "forward", wrapped)
    return model


@pytest.mark.parametrize(
    ("family", "sharing"),
    [
        ("llama", Sharing.ANY),
        ("gpt2", Sharing.ANY),
        ("recurrent_gemma", Sharing.EQUAL_LENGTH),
        ("rwkv", Sharing.NONE),
    ],
)
def test_a_model_shares_its_batches_as_far_as_its_architecture_keeps_rows_apart(
    tiny_model, warnings_of, family, sharing
):
    model = tiny_model(family, layers=3 if family == "recurrent_gemma" else 2).eval()
    assert find_sharing(model, PAD, is_sharded=False) is sharing
    assert len(warnings_of()) == (sharing is not Sharing.ANY)


@pytest.mark.parametrize(("factor", "sharing"), [(1 + 1e-5, Sharing.ANY), (1.1, Sharing.EQUAL_LENGTH)])
def test_a_difference_behind_padding_counts_from_beyond_rounding_on(tiny_model, monkeypatch, factor, sharing):
    def change(logits_BLV, is_padded_B):
        logits_BLV[is_padded_B] *= factor

    model = changed(tiny_model().eval(), monkeypatch, change)
    assert find_sharing(model, PAD, is_sharded=False) is sharing


@pytest.mark.parametrize(("factor", "sharing"), [(1 + 1e-5, Sharing.ANY), (1.1, Sharing.NONE)])
def test_a_difference_beside_another_row_counts_from_beyond_rounding_on(tiny_model, monkeypatch, factor, sharing):
    def change(logits_BLV, is_padded_B):
        if len(is_padded_B) > 1:
            logits_BLV *= factor

    model = changed(tiny_model().eval(), monkeypatch, change)
    assert find_sharing(model, PAD, is_sharded=False) is sharing


@pytest.mark.parametrize(("dtype", "sharing"), [(torch.float32, Sharing.NONE), (torch.bfloat16, Sharing.ANY)])
def test_what_counts_as_rounding_depends_on_the_weights_dtype(tiny_model, monkeypatch, dtype, sharing):
    def change(logits_BLV, is_padded_B):
        if len(is_padded_B) > 1:
            logits_BLV *= 1.01  # 4 times the precision of bf16 is 0.03

    model = changed(tiny_model().eval().to(dtype), monkeypatch, change)
    assert find_sharing(model, PAD, is_sharded=False) is sharing


def test_a_model_that_can_not_be_probed_shares_no_batch_and_logs_why(tiny_model, monkeypatch, warnings_of):
    def change(logits_BLV, is_padded_B):
        raise RuntimeError("no batches here")

    model = changed(tiny_model().eval(), monkeypatch, change)
    assert find_sharing(model, PAD, is_sharded=False) is Sharing.NONE
    [warning] = warnings_of()
    assert "LlamaForCausalLM can generate in batches (RuntimeError: no batches here)" in warning


def test_the_strictest_of_several_ranks_verdicts_is_the_largest():
    assert max(Sharing.ANY, Sharing.EQUAL_LENGTH) is Sharing.EQUAL_LENGTH
    assert max(Sharing.EQUAL_LENGTH, Sharing.NONE) is Sharing.NONE


def test_the_probe_draws_no_random_numbers(tiny_model):
    model = tiny_model().eval()
    state = torch.get_rng_state()
    find_sharing(model, PAD, is_sharded=False)
    assert torch.equal(torch.get_rng_state(), state)
