"""Completions by transformers.generate: exactly the model's distribution, and dependent only on the seeds."""

import logging
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from gkd_trainer.rollouts import HFRollouts, hf
from gkd_trainer.rollouts.hf import _SeededChoice
from gkd_trainer.types import Sampling

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14], [15], [16, 17, 18, 19, 20, 21, 22], [23, 24, 25]]

SEEDS = [101, 102, 103, 104, 105, 106]

DRAWS = 2000


def engine_of(model, stop_ids=(2,), **options):
    engine = HFRollouts(stop_ids, **{"pad_token_id": 2, **options})
    engine.sync(model)
    return engine


def token_ids(completions):
    return [list(completion.token_ids) for completion in completions]


@pytest.fixture
def dice(tiny_model):
    """A model over 12 tokens whose distribution is far from uniform but spreads over all of them."""
    return tiny_model(vocab=12, head_scale=6.0)


def drawn_frequencies(model, sampling, prompt=(3, 4, 5, 4)):
    engine = engine_of(model, stop_ids=(), pad_token_id=0)
    completions = engine.generate([list(prompt)] * DRAWS, sampling, list(range(DRAWS)))
    return np.bincount([completion.token_ids[0] for completion in completions], minlength=12) / DRAWS


def next_token_logits(model, prompt=(3, 4, 5, 4)):
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0, -1].double()


def distance(frequencies, expected):
    """Total variation; 2,000 draws over 12 tokens stay below 0.04."""
    return 0.5 * np.abs(frequencies - expected.numpy()).sum()


# Where the randomness comes from


def test_completions_do_not_depend_on_batch_order_or_batch_size(model):
    sampling = Sampling(12)
    together = token_ids(engine_of(model).generate(PROMPTS, sampling, SEEDS))
    assert len({tuple(ids) for ids in together}) == len(PROMPTS)
    alone = [
        token_ids(engine_of(model).generate([prompt], sampling, [seed]))[0]
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    assert alone == together
    order = [3, 0, 5, 1, 4, 2]
    shuffled = engine_of(model).generate([PROMPTS[i] for i in order], sampling, [SEEDS[i] for i in order])
    assert token_ids(shuffled) == [together[i] for i in order]
    for batch_size in (1, 2, 4):
        assert token_ids(engine_of(model, batch_size=batch_size).generate(PROMPTS, sampling, SEEDS)) == together


def test_the_seed_of_a_prompt_and_nothing_else_changes_its_completion(model):
    first = token_ids(engine_of(model).generate(PROMPTS, Sampling(12), SEEDS))
    torch.manual_seed(99)
    assert token_ids(engine_of(model).generate(PROMPTS, Sampling(12), SEEDS)) == first
    other_seeds = [*SEEDS[:2], 7, *SEEDS[3:]]
    second = token_ids(engine_of(model).generate(PROMPTS, Sampling(12), other_seeds))
    assert [a != b for a, b in zip(first, second, strict=True)] == [False, False, True, False, False, False]


def test_equal_prompts_with_other_seeds_get_other_completions(model):
    completions = token_ids(engine_of(model).generate([PROMPTS[0]] * 20, Sampling(8), list(range(20))))
    assert len({tuple(ids) for ids in completions}) > 15


def test_the_global_random_states_are_as_before(model):
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    engine_of(model).generate(PROMPTS, Sampling(6, temperature=0.8, top_p=0.9, top_k=9), SEEDS)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]


# The distribution


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_tokens_come_as_often_as_the_model_says(dice, temperature):
    expected = (next_token_logits(dice) / temperature).softmax(-1)
    assert expected.max() < 0.8
    frequencies = drawn_frequencies(dice, Sampling(1, temperature=temperature))
    assert distance(frequencies, expected) < 0.04
    for other in (0.7, 1.0, 1.5):
        if other != temperature:
            assert distance(frequencies, (next_token_logits(dice) / other).softmax(-1)) > 0.04


def test_later_tokens_depend_on_earlier_ones(dice):
    engine = engine_of(dice, stop_ids=(), pad_token_id=0)
    completions = token_ids(engine.generate([[3, 4]] * DRAWS, Sampling(2), list(range(DRAWS))))
    pairs = np.zeros((12, 12))
    for first, second in completions:
        pairs[first, second] += 1 / DRAWS
    first = next_token_logits(dice, (3, 4)).softmax(-1)
    second = torch.stack([next_token_logits(dice, (3, 4, token)).softmax(-1) for token in range(12)])
    assert distance(pairs, first[:, None] * second) < 0.12  # 144 cells


def restricted(probabilities, keep):
    kept = torch.where(keep, probabilities, 0.0)
    return kept / kept.sum()


def test_top_k_keeps_the_k_most_probable_tokens(dice):
    probabilities = next_token_logits(dice).softmax(-1)
    expected = restricted(probabilities, probabilities >= probabilities.sort(descending=True).values[2])
    frequencies = drawn_frequencies(dice, Sampling(1, top_k=3))
    assert (frequencies > 0).sum() == 3
    assert distance(frequencies, expected) < 0.04


def test_top_p_keeps_the_smallest_set_of_at_least_that_mass(dice):
    probabilities = next_token_logits(dice).softmax(-1)
    ranked = probabilities.sort(descending=True)
    kept = int((ranked.values.cumsum(-1) < 0.75).sum()) + 1
    assert 1 < kept < 12
    frequencies = drawn_frequencies(dice, Sampling(1, top_p=0.75))
    assert set(frequencies.nonzero()[0]) == set(ranked.indices[:kept].tolist())
    assert distance(frequencies, restricted(probabilities, probabilities >= ranked.values[kept - 1])) < 0.04


def test_min_p_keeps_tokens_by_their_share_of_the_top_one(dice):
    probabilities = next_token_logits(dice).softmax(-1)
    keep = probabilities >= 0.3 * probabilities.max()
    assert 1 < keep.sum() < 12
    frequencies = drawn_frequencies(dice, Sampling(1, min_p=0.3))
    assert set(frequencies.nonzero()[0]) == set(keep.nonzero()[:, 0].tolist())
    assert distance(frequencies, restricted(probabilities, keep)) < 0.04


def test_a_repetition_penalty_lowers_the_logits_of_tokens_seen(dice):
    prompt = (8, 3, 5)  # of which one has a negative logit next, and two have positive ones
    logits = next_token_logits(dice, prompt)
    penalised = logits.clone()
    for token in prompt:
        penalised[token] = logits[token] / 1.8 if logits[token] > 0 else logits[token] * 1.8
    frequencies = drawn_frequencies(dice, Sampling(1, repetition_penalty=1.8), prompt)
    assert distance(frequencies, penalised.softmax(-1)) < 0.04
    assert distance(frequencies, logits.softmax(-1)) > 0.04


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_repetition_penalty_does_not_see_the_padding(model, temperature):
    with torch.no_grad():
        model.lm_head.weight[2] += model.lm_head.weight.mean(0) + 0.3  # the pad token, often drawn
    sampling = Sampling(12, temperature=temperature, repetition_penalty=5.0)
    together = token_ids(engine_of(model, stop_ids=[300]).generate(PROMPTS, sampling, SEEDS))
    alone = [
        token_ids(engine_of(model, stop_ids=[300]).generate([prompt], sampling, [seed]))[0]
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    assert together == alone
    assert any(2 in ids for ids in alone)


def test_a_uniform_of_0_or_nearly_1_never_takes_a_token_of_probability_zero(monkeypatch):
    logits_BV = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]] * 2)
    uniforms = iter([0.0, np.nextafter(1.0, 0.0)])
    monkeypatch.setattr(np.random, "Generator", lambda _: SimpleNamespace(random=lambda n: np.full(n, next(uniforms))))
    choose = _SeededChoice([0, 1], 1, torch.ones(2, 3))
    assert choose(torch.zeros(2, 3), logits_BV).argmax(dim=-1).tolist() == [1, 2]


# Greedy


def test_greedy_is_transformers_own_greedy(model):
    engine = engine_of(model)
    completions = engine.generate(PROMPTS, engine.greedy_sampling(10), [0] * len(PROMPTS))
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        output = model.generate(
            torch.tensor([prompt]),
            generation_config=GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=2, pad_token_id=2),
        )
        assert list(completion.token_ids) == output[0, len(prompt) :].tolist()


def test_greedy_with_a_penalty_is_transformers_own(model):
    sampling = Sampling(10, temperature=0.0, repetition_penalty=1.5)
    for prompt in PROMPTS:
        output = model.generate(
            torch.tensor([prompt]),
            generation_config=GenerationConfig(
                max_new_tokens=10, do_sample=False, eos_token_id=2, pad_token_id=2, repetition_penalty=1.5
            ),
        )
        [completion] = engine_of(model).generate([prompt], sampling, [0])
        assert list(completion.token_ids) == output[0, len(prompt) :].tolist()


# Where a completion ends


def path(model, prompt, length):
    """The greedy tokens after a prompt, never stopped."""
    engine = engine_of(model, stop_ids=[])
    return list(engine.generate([prompt], engine.greedy_sampling(length), [0])[0].token_ids)


def test_a_completion_ends_at_any_of_the_stop_ids_and_keeps_it(model):
    tokens = path(model, PROMPTS[0], 12)
    first_of = {token: tokens.index(token) for token in tokens}
    assert len(first_of) > 4
    stop, later_stop = (token for token in first_of if first_of[token] in (2, 4))
    for stop_ids in ([stop, later_stop], [later_stop, stop], [stop, 300]):
        engine = engine_of(model, stop_ids=stop_ids)
        [completion] = engine.generate(PROMPTS[:1], engine.greedy_sampling(12), [0])
        assert list(completion.token_ids) == tokens[:3]
        assert completion.is_finished


def test_a_completion_cut_off_keeps_all_tokens_and_is_not_finished(model):
    tokens = path(model, PROMPTS[0], 5)
    engine = engine_of(model, stop_ids=[300])
    assert 300 not in tokens
    [completion] = engine.generate(PROMPTS[:1], engine.greedy_sampling(5), [0])
    assert list(completion.token_ids) == tokens
    assert not completion.is_finished


def test_a_stop_token_in_the_last_place_finishes(model):
    tokens = path(model, PROMPTS[0], 4)
    assert tokens[-1] not in tokens[:-1]
    engine = engine_of(model, stop_ids=[tokens[-1]])
    [completion] = engine.generate(PROMPTS[:1], engine.greedy_sampling(4), [0])
    assert completion.is_finished


@pytest.mark.parametrize("pad_token_id", [2, 0])
def test_a_row_that_ends_early_has_no_padding_in_it(model, pad_token_id):
    """Also where the pad token is the stop token, which then stands once, at the end."""
    with torch.no_grad():
        model.lm_head.weight[2] = model.lm_head.weight[20] * 1.2
    sampling = Sampling(25, extra={"suppress_tokens": [0]})
    completions = engine_of(model, pad_token_id=pad_token_id).generate(PROMPTS * 5, sampling, list(range(30)))
    finished = [completion for completion in completions if completion.is_finished]
    assert len({len(completion.token_ids) for completion in finished}) > 1
    for completion in completions:
        ids = list(completion.token_ids)
        assert ids.count(2) == completion.is_finished
        assert completion.is_finished == (ids[-1] == 2)
        assert completion.is_finished or len(ids) == 25
        assert 0 not in ids


def test_prompts_that_end_with_the_pad_token_are_not_called_padded_on_the_right(model, monkeypatch, caplog):
    logger, generate = logging.getLogger("transformers.generation.utils"), type(model).generate

    def as_in_transformers_5_0(model, *, input_ids, generation_config, **options):
        if len(input_ids) > 1 and (input_ids[:, -1] == generation_config.pad_token_id).any():
            logger.warning("A decoder-only architecture is being used, but right-padding was detected!")
        return generate(model, input_ids=input_ids, generation_config=generation_config, **options)

    monkeypatch.setattr(type(model), "generate", as_in_transformers_5_0)
    logger.addHandler(caplog.handler)  # transformers' loggers do not propagate
    engine_of(model).generate([[5, 2], [6, 7, 2]], Sampling(2), [0, 1])
    logger.removeHandler(caplog.handler)
    assert caplog.messages == []


# What else is never sampled, and what is passed on


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_beyond_the_vocabulary_are_never_sampled(model, temperature):
    sampling = Sampling(12, temperature=temperature)
    unlimited = token_ids(engine_of(model, stop_ids=[]).generate(PROMPTS, sampling, SEEDS))
    assert any(token >= 30 for ids in unlimited for token in ids)
    limited = token_ids(engine_of(model, stop_ids=[], vocab_size=30).generate(PROMPTS, sampling, SEEDS))
    assert all(token < 30 for ids in limited for token in ids)
    assert len({token for ids in limited for token in ids}) > 3


def test_options_of_the_engine_reach_transformers(model):
    suppressed = token_ids(engine_of(model).generate(PROMPTS, Sampling(1), SEEDS))
    banned = sorted({ids[0] for ids in suppressed})
    sampling = Sampling(1, extra={"suppress_tokens": banned})
    assert not set(banned) & {ids[0] for ids in token_ids(engine_of(model).generate(PROMPTS, sampling, SEEDS))}
    # Before the choice of the token, not after it.
    sampling = Sampling(8, extra={"min_new_tokens": 8})
    stop_ids = list(range(300))
    for completion in engine_of(model, stop_ids=stop_ids).generate(PROMPTS, sampling, SEEDS):
        assert len(completion.token_ids) == 8


def test_no_prompts_give_no_completions(model):
    assert engine_of(model).generate([], Sampling(4), []) == []


PROBES = [(1, 3, True), (1, 24, True), (2, 3, True), (2, 24, True), (2, 24, True)]


@pytest.mark.parametrize("extra", [{}, {"min_new_tokens": 4, "no_repeat_ngram_size": 2}])
def test_a_rank_of_a_sharded_model_without_prompts_generates_one_token_of_its_own(model, calls, monkeypatch, extra):
    """After that, `generate` calls the forward only as long as another rank needs it."""
    monkeypatch.setattr(hf, "_of_all_ranks", lambda value: [value, [0]] if value == [] else [value])
    engine, forwards = engine_of(model, stop_ids=(), is_sharded=True), []
    engine.generate(PROMPTS, Sampling(1), SEEDS)  # the probes
    del calls[:]
    model.register_forward_pre_hook(lambda *_: forwards.append(None))
    assert engine.generate([], Sampling(40, extra=extra), []) == []
    assert calls == [(1, 1, True)]
    assert len(forwards) == 1


def test_a_sharded_model_runs_no_forward_if_no_rank_has_prompts(model, calls):
    assert engine_of(model, is_sharded=True).generate([], Sampling(4), []) == []
    assert calls == PROBES


def test_a_sharded_model_gets_all_prompts_in_one_call_on_every_rank(model, calls):
    """Ranks with more prompts than others would otherwise run more forwards."""
    engine = engine_of(model, is_sharded=True, batch_size=4)
    engine.generate(PROMPTS, Sampling(2), SEEDS)
    assert calls == [*PROBES, (6, 7, True)]
    engine.generate(PROMPTS[:2], Sampling(2), SEEDS[:2])
    assert calls[len(PROBES) + 1 :] == [(2, 5, True)]


def test_a_batch_holds_at_most_batch_size_prompts(model, calls):
    engine_of(model, batch_size=4).generate(PROMPTS, Sampling(2), SEEDS)
    assert [call[:2] for call in calls[len(PROBES) :]] == [(4, 3), (2, 7)]


def test_generating_before_a_sync_raises():
    with pytest.raises(RuntimeError, match=r"before sync\(model\)"):
        HFRollouts([2]).generate([[3]], Sampling(2), [0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_of_nan_do_not_kill_the_rollout(model, temperature):
    """A step's check of finite values names the sample; an index error of a sampling kernel would not."""
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    sampling = Sampling(4, temperature=temperature)
    for completion in engine_of(model, vocab_size=100).generate(PROMPTS, sampling, SEEDS):
        assert all(0 <= token < 100 for token in completion.token_ids)


# The model around the call


def test_the_models_own_generation_config_does_not_leak_in(tiny_model):
    clean, opinionated = tiny_model(), tiny_model()
    opinionated.generation_config = config = GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_k=1,
        repetition_penalty=3.0,
        no_repeat_ngram_size=1,
        suppress_tokens=list(range(100, 300)),
        forced_eos_token_id=2,
        min_new_tokens=11,
        max_length=8,
        eos_token_id=[2, *range(150, 250)],
    )
    before = config.to_dict()
    for sampling in (Sampling(12), Sampling(12, temperature=0.0)):
        expected = engine_of(clean).generate(PROMPTS, sampling, SEEDS)
        assert engine_of(opinionated).generate(PROMPTS, sampling, SEEDS) == expected
    assert opinionated.generation_config is config
    assert config.to_dict() == before


def test_every_step_after_the_first_feeds_one_token_to_the_cache(model):
    widths = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: widths.append(args[0].shape[1]))
    model.gradient_checkpointing_enable()
    model.train()
    engine_of(model, stop_ids=[]).generate(PROMPTS, Sampling(4), SEEDS)
    assert widths[3 * len(PROBES) :] == [7, 1, 1, 1]


def test_dropout_is_off_while_generating_and_every_training_flag_is_restored(tiny_model):
    model = tiny_model(attention_dropout=0.5)
    expected = token_ids(engine_of(model).generate(PROMPTS, Sampling(8), SEEDS))
    model.train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    assert len(set(flags)) == 2
    assert token_ids(engine_of(model).generate(PROMPTS, Sampling(8), SEEDS)) == expected
    assert [module.training for module in model.modules()] == flags


@pytest.mark.parametrize("raises", [False, True])
def test_gradient_checkpointing_is_off_in_the_call_and_as_before_afterwards(model, raises):
    model.gradient_checkpointing_enable()
    model.train()
    model.model.layers[1].gradient_checkpointing = False  # as with checkpoints at every second layer
    names = [name for name, module in model.named_modules() if getattr(module, "gradient_checkpointing", False)]
    config = model.generation_config
    assert "model.layers.0" in names
    seen = []

    def look(module, args):
        seen.extend(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        seen.extend(module.training for module in model.modules())
        if raises:
            raise RuntimeError("out of memory")

    hook = model.model.register_forward_pre_hook(look)
    engine = engine_of(model)
    if raises:
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.generate(PROMPTS, Sampling(2), SEEDS)
    else:
        engine.generate(PROMPTS, Sampling(2), SEEDS)
    hook.remove()
    assert seen
    assert not any(seen)
    assert [n for n, module in model.named_modules() if getattr(module, "gradient_checkpointing", False)] == names
    assert all(module.training for module in model.modules())
    assert model.generation_config is config


def test_no_gradients_are_recorded(model):
    outputs = []
    hook = model.register_forward_hook(lambda module, args, output: outputs.append(output.logits))
    engine_of(model).generate(PROMPTS, Sampling(2), SEEDS)
    hook.remove()
    assert outputs
    assert not any(logits.requires_grad for logits in outputs)


def test_the_adapter_of_a_peft_student_takes_part(tiny_model):
    plain = token_ids(engine_of(tiny_model()).generate(PROMPTS, Sampling(8), SEEDS))
    config = LoraConfig(r=4, lora_alpha=64, lora_dropout=0.5, init_lora_weights=False, target_modules="all-linear")
    student = get_peft_model(tiny_model(), config).train()
    base = student.get_base_model()
    adapted = token_ids(engine_of(base).generate(PROMPTS, Sampling(8), SEEDS))
    assert adapted != plain
    assert token_ids(engine_of(base).generate(PROMPTS, Sampling(8), SEEDS)) == adapted  # without its dropout
    with student.disable_adapter():
        assert token_ids(engine_of(base).generate(PROMPTS, Sampling(8), SEEDS)) == plain


def test_weights_and_models_of_a_later_sync_count(tiny_model):
    model, other = tiny_model(), tiny_model(seed=1)
    engine = engine_of(model)
    before = token_ids(engine.generate(PROMPTS, Sampling(8), SEEDS))
    engine.sync(other)
    assert token_ids(engine.generate(PROMPTS, Sampling(8), SEEDS)) != before
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    engine.sync(other)
    assert token_ids(engine.generate(PROMPTS, Sampling(8), SEEDS)) == before


def test_a_bf16_model_generates(tiny_model):
    completions = engine_of(tiny_model().bfloat16()).generate(PROMPTS, Sampling(4), SEEDS)
    assert all(completion.token_ids for completion in completions)


ENCODER_DECODERS = ["t5", "mt5", "bart"]


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_an_encoder_decoders_greedy_completions_are_those_of_generate(tiny_encoder_decoder, family):
    model = tiny_encoder_decoder(family)
    engine = HFRollouts([2], 1)
    engine.sync(model)
    prompts = [[11, 12, 13, 14], [15], [16, 17]]
    completions = engine.generate(prompts, engine.greedy_sampling(7), [0, 1, 2])
    for prompt, completion in zip(prompts, completions, strict=True):
        options = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": 2, "pad_token_id": 1}
        [expected] = model.generate(torch.tensor([prompt]), **options).tolist()
        assert list(completion.token_ids) == expected[1:]
        assert completion.is_finished == (expected[-1] == 2)


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_an_encoder_decoders_samples_depend_only_on_their_prompts_and_seeds(tiny_encoder_decoder, family):
    model = tiny_encoder_decoder(family)
    engine = HFRollouts([2], 1)
    engine.sync(model)
    prompts, sampling = [[11, 12, 13, 14], [15], [16, 17]], Sampling(7, repetition_penalty=1.3)
    together = engine.generate(prompts, sampling, [7, 8, 9])
    state = torch.get_rng_state()
    alone = [engine.generate([prompt], sampling, [seed])[0] for prompt, seed in zip(prompts, [7, 8, 9], strict=True)]
    assert together == alone
    assert together != engine.generate(prompts, sampling, [17, 18, 19])
    assert torch.equal(torch.get_rng_state(), state)


def test_an_encoder_decoders_tokens_come_as_often_as_the_model_says(tiny_encoder_decoder):
    model = tiny_encoder_decoder("bart", vocab=12)
    engine = HFRollouts([2], 1)
    engine.sync(model)
    prompt = torch.tensor([[5, 6, 7]])
    logits = model(prompt, decoder_input_ids=torch.tensor([[2]])).logits[0, -1].double()
    expected = (logits / 4).softmax(-1)
    completions = engine.generate([[5, 6, 7]] * 2000, Sampling(1, temperature=4.0), list(range(2000)))
    counts = torch.bincount(torch.tensor([completion.token_ids[0] for completion in completions]), minlength=12)
    assert expected.max() < 0.8
    # 5 standard deviations
    assert ((counts / 2000 - expected).abs() <= 5 * (expected * (1 - expected) / 2000).sqrt() + 1e-9).all()


def test_the_start_token_of_a_decoder_is_not_penalised_as_a_repetition(tiny_encoder_decoder):
    model = tiny_encoder_decoder("bart")  # starts with its eos
    with torch.no_grad():
        model.final_logits_bias[0, 2] = 50.0
    engine = HFRollouts([2], 1)
    engine.sync(model)
    [completion] = engine.generate([[5, 6]], Sampling(4, temperature=0.0, repetition_penalty=100.0), [0])
    assert completion.token_ids == [2]


def test_completions_can_be_sampled_where_only_deterministic_operations_are_allowed(tiny_model, monkeypatch):
    # CUDA's cumsum is none; it raises only there.
    allowed = []
    cumsum = torch.Tensor.cumsum

    def noting(*args, **kwargs):
        allowed.append(not torch.are_deterministic_algorithms_enabled())
        return cumsum(*args, **kwargs)

    model = tiny_model()
    engine = HFRollouts([2])
    engine.sync(model)
    expected = engine.generate([[5, 6, 7]], Sampling(4), [0])
    monkeypatch.setattr(torch.Tensor, "cumsum", noting)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert engine.generate([[5, 6, 7]], Sampling(4), [0]) == expected
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert any(allowed)
