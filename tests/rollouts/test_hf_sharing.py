"""Prompts share a batch only if that changes nothing."""

import functools
import json
import random

import numpy as np
import pytest
import torch

from gkd_trainer.types import Sampling
from tests.forks import run_ranks
from tests.rollouts.conftest import calls_of
from tests.rollouts.test_hf import PROMPTS, SEEDS, engine_of, token_ids

PROBES = [(1, 3, True), (1, 24, True), (2, 3, True), (2, 24, True), (2, 24, True)]


# Padding


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba", "rwkv", "recurrent_gemma", "minimax"])
def test_completions_of_no_architecture_depend_on_the_batch(tiny_model, family):
    model = tiny_model(family, layers=3 if family == "recurrent_gemma" else 2)
    with torch.no_grad():
        model.get_input_embeddings().weight[2].normal_()  # the pad token's: a new model's is zero, and leaves no trace
    alone = [
        token_ids(engine_of(model).generate([prompt], Sampling(8), [seed]))[0]
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    for batch_size in (None, 1, 2, 4):
        assert token_ids(engine_of(model, batch_size=batch_size).generate(PROMPTS, Sampling(8), SEEDS)) == alone


ONE_BY_ONE = [(1, 1), (1, 2), (1, 3), (1, 3), (1, 5), (1, 7)]

BY_LENGTH = [(1, 1), (1, 2), (2, 3), (1, 5), (1, 7)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "shapes", "message"),
    [
        ("llama", [(6, 7)], None),
        ("gpt2", [(6, 7)], None),
        ("mamba", [(6, 7)], None),
        ("recurrent_gemma", BY_LENGTH, "RecurrentGemmaForCausalLM reads the padding"),
        ("minimax", BY_LENGTH, "MiniMaxForCausalLM reads the padding"),
        ("rwkv", ONE_BY_ONE, "RwkvForCausalLM mixes the prompts"),
    ],
)
def test_prompts_share_a_batch_if_that_changes_nothing_else_a_warning_is_logged_once(
    tiny_model, monkeypatch, caplog, family, shapes, message, dtype
):
    model = tiny_model(family, layers=2 if family == "minimax" else 3).to(dtype)
    calls = calls_of(model, monkeypatch)
    engine = engine_of(model)
    for _ in range(2):
        engine.generate(PROMPTS, Sampling(2), SEEDS)
        engine.sync(model)
    assert [call[:2] for call in calls[len(PROBES) :]] == shapes * 2
    messages = [record.message for record in caplog.records if record.name.startswith("gkd_trainer")]
    assert len(messages) == (message is not None)
    assert message is None or messages[0].startswith(message)


def test_under_autocast_rounding_is_not_taken_for_padding_that_is_read(tiny_model, monkeypatch):
    model = tiny_model(layers=8)
    calls = calls_of(model, monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        engine_of(model).generate(PROMPTS, Sampling(2), SEEDS)
    assert [call[:2] for call in calls[len(PROBES) :]] == [(6, 7)]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_padding_that_is_read_is_not_taken_for_rounding_under_autocast(tiny_model, monkeypatch, seed):
    model = tiny_model("minimax", seed=seed)
    calls = calls_of(model, monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        engine_of(model).generate(PROMPTS, Sampling(2), SEEDS)
    assert [call[:2] for call in calls[len(PROBES) :]] == BY_LENGTH


def test_attention_that_takes_only_halves_is_probed_under_the_autocast_of_training(tiny_model, flash_like, monkeypatch):
    model = tiny_model(attn_implementation=flash_like)
    calls = calls_of(model, monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        engine_of(model).generate(PROMPTS, Sampling(2), SEEDS)
    assert [call[:2] for call in calls[len(PROBES) :]] == [(6, 7)]


def test_the_probe_is_of_products_in_float32_even_if_training_takes_tf32(tiny_model, monkeypatch):
    model, products = tiny_model(), torch.backends.cuda.matmul
    before = products.fp32_precision
    precisions = []
    model.register_forward_pre_hook(lambda module, args: precisions.append(products.fp32_precision))
    products.fp32_precision = "tf32"
    try:
        engine_of(model).generate(PROMPTS, Sampling(2), SEEDS)
        assert products.fp32_precision == "tf32"
    finally:
        products.fp32_precision = before
    assert precisions[0] == "ieee"
    assert precisions[-1] == "tf32"


def change_logits(model, monkeypatch, change):
    """Have the forward's logits [B, L, V] changed by `change(logits_BLV, ids_BL, is_padded_B)`."""
    forward = model.forward

    @functools.wraps(forward)
    def changed(*args, **kwargs):
        output = forward(*args, **kwargs)
        ids_BL, mask_BL = kwargs["input_ids"], kwargs.get("attention_mask")
        mask_BL = torch.ones_like(ids_BL) if mask_BL is None else mask_BL
        change(output.logits, ids_BL, (mask_BL == 0).any(dim=1))
        return output

    monkeypatch.setattr(model, "forward", changed)


def test_padding_whose_content_counts_less_than_rounding_is_found(model, calls, monkeypatch, caplog):
    def change(logits_BLV, ids_BL, is_padded_B):
        if len(ids_BL) > 1:
            logits_BLV *= 1.01  # as other kernels may round
        if ids_BL.shape[1] > 1:
            logits_BLV *= (1 + 0.03 * is_padded_B * (ids_BL[:, 0] % 2))[:, None, None]

    model.bfloat16()
    change_logits(model, monkeypatch, change)
    engine_of(model).generate(PROMPTS, Sampling(2), SEEDS)
    assert [call[:2] for call in calls[len(PROBES) :]] == BY_LENGTH
    assert "LlamaForCausalLM reads the padding" in caplog.text


def test_rounding_behind_padding_is_judged_by_that_beside_another_row(model, calls, monkeypatch):
    def change(logits_BLV, _, is_padded_B):
        if len(is_padded_B) > 1:
            logits_BLV *= (1.01 + 0.01 * is_padded_B)[:, None, None]

    model.bfloat16()
    change_logits(model, monkeypatch, change)
    engine_of(model).generate(PROMPTS, Sampling(2), SEEDS)
    assert [call[:2] for call in calls[len(PROBES) :]] == [(6, 7)]


def test_logits_of_nan_behind_padding_are_a_difference(model, calls, monkeypatch, caplog):
    def change(logits_BLV, _, is_padded_B):
        logits_BLV[is_padded_B] = torch.nan

    change_logits(model, monkeypatch, change)
    engine_of(model).generate(PROMPTS, Sampling(2), SEEDS)
    assert [call[:2] for call in calls[len(PROBES) :]] == BY_LENGTH
    assert "LlamaForCausalLM reads the padding" in caplog.text


def test_logits_of_nan_beside_another_row_are_a_difference(model, calls, monkeypatch, caplog):
    def change(logits_BLV, _, is_padded_B):
        if len(is_padded_B) > 1:
            logits_BLV.fill_(torch.nan)

    change_logits(model, monkeypatch, change)
    engine_of(model).generate(PROMPTS, Sampling(2), SEEDS)
    assert [call[:2] for call in calls[len(PROBES) :]] == ONE_BY_ONE
    assert "LlamaForCausalLM mixes the prompts" in caplog.text


@pytest.mark.parametrize("masked", [-torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize(("family", "shapes"), [("llama", [(6, 7)]), ("recurrent_gemma", BY_LENGTH)])
def test_tokens_that_a_head_masks_out_hide_no_difference_and_make_none(tiny_model, monkeypatch, masked, family, shapes):
    model = tiny_model(family, layers=3)
    calls = calls_of(model, monkeypatch)
    change_logits(model, monkeypatch, lambda logits_BLV, *_: logits_BLV[..., 300:].fill_(masked))
    engine_of(model).generate(PROMPTS, Sampling(2), SEEDS)
    assert [call[:2] for call in calls[len(PROBES) :]] == shapes


def test_prompts_that_share_no_batch_need_no_probe(model, calls):
    engine_of(model).generate(PROMPTS[:1], Sampling(2), SEEDS[:1])
    engine_of(model, batch_size=1).generate(PROMPTS[:2], Sampling(2), SEEDS[:2])
    assert [call[:2] for call in calls] == [(1, 5), (1, 2), (1, 5)]


def test_the_probe_restores_training_flags_and_random_states(tiny_model):
    model = tiny_model("recurrent_gemma", layers=3).train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    config = model.generation_config
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    engine_of(model).generate(PROMPTS, Sampling(2), SEEDS)
    assert [module.training for module in model.modules()] == flags
    assert model.generation_config is config
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]


def test_a_model_that_can_not_be_probed_generates_one_by_one(model, calls, monkeypatch, caplog):
    record = model.generate

    def fail_without_scores(**options):
        if options["generation_config"].output_logits:
            raise NotImplementedError("no logits here")
        return record(**options)

    monkeypatch.setattr(model, "generate", fail_without_scores)
    engine_of(model).generate(PROMPTS, Sampling(2), SEEDS)
    assert [call[:2] for call in calls] == ONE_BY_ONE
    assert "NotImplementedError: no logits here" in caplog.text


@pytest.mark.parametrize(
    "options",
    [
        {"no_repeat_ngram_size": 1},
        {"encoder_repetition_penalty": 3.0},
        {"encoder_no_repeat_ngram_size": 1},
        {"bad_words_ids": [[2, 15, token] for token in range(3, 360)]},  # as if padding and prompt began them
        {"sequence_bias": [[[2, 15, token], -30.0] for token in range(3, 360)]},
        {"forced_bos_token_id": 9},
    ],
)
def test_options_that_read_the_prompt_do_not_see_padding(model, options):
    with torch.no_grad():
        model.lm_head.weight[2] += model.lm_head.weight.mean(0) + 0.3  # the pad token, often drawn
    sampling = Sampling(12, extra=options)
    together = token_ids(engine_of(model, stop_ids=[300]).generate(PROMPTS, sampling, SEEDS))
    alone = [
        token_ids(engine_of(model, stop_ids=[300]).generate([prompt], sampling, [seed]))[0]
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    assert together == alone


@pytest.mark.parametrize(("family", "calls"), [("llama", 1 + 1), ("recurrent_gemma", 3 + 4), ("rwkv", 3 + 4)])
def test_ranks_of_a_sharded_model_make_the_same_calls(tiny_model, tmp_path, family, calls):
    """Each has prompts of its own, and a rank that made fewer calls would leave the other waiting."""
    tiny_model(family, layers=3).save_pretrained(tmp_path)
    process = run_ranks("tests.rollouts.sharded_generate", tmp_path, ranks=2)
    assert process.returncode == 0, process.stderr
    of_ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [len(result["calls"]) for result in of_ranks] == [len(PROBES) + calls] * 2
    model = tiny_model(family, layers=3)
    for result in of_ranks:
        for prompt, seed, completion in zip(result["prompts"], result["seeds"], result["completions"], strict=True):
            assert token_ids(engine_of(model).generate([prompt], Sampling(4), [seed])) == [completion]
