"""Completions by a vLLM engine in this process: from the latest weights, and dependent only on the seeds."""

import gc
import io
import os
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from gkd_trainer.errors import GKDConfigError, GKDRolloutError
from gkd_trainer.rollouts import HFRollouts, VLLMColocateRollouts, vllm_colocate
from gkd_trainer.rollouts.vllm_colocate import _stdout_with_descriptor
from gkd_trainer.types import Sampling
from tests.models.test_weights import adapted, assert_equal_states, state_of

# PEFT's advice about adapters on either end of a tied model: what it advises against is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14], [15], [16, 17, 18, 19, 20, 21, 22], [23, 24, 25]]
SEEDS = [101, 102, 103, 104, 105, 106]
ROWS, VOCABULARY = 368, 360
"""The head has rows that are no tokens."""
STOP = 2
DRAWS = 2000
ENGINE = {"enforce_eager": True, "max_num_seqs": 64}


def global_states():
    return SimpleNamespace(
        torch=torch.get_rng_state(),
        numpy=np.random.get_state()[1].tolist(),
        python=random.getstate(),
        environment={name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
        threads=torch.get_num_threads(),
    )


def assert_undisturbed(before, after=None):
    after = after or global_states()
    assert torch.equal(after.torch, before.torch)
    assert (after.numpy, after.python, after.threads) == (before.numpy, before.python, before.threads)
    # vLLM and its dependencies add variables of their own, but change none, except the name of the last engine.
    names = before.environment.keys() - {"VLLM_DIST_IDENT"}
    assert {name: after.environment.get(name) for name in names} == {name: before.environment[name] for name in names}
    ours = {"VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_NO_USAGE_STATS", "VLLM_CPU_OMP_THREADS_BIND"}
    assert not ours & (after.environment.keys() - before.environment.keys())


def token_ids(completions):
    return [list(completion.token_ids) for completion in completions]


def greedy(engine, length=10, **options):
    return engine.generate(PROMPTS, Sampling(length, temperature=0.0, **options), [0] * len(PROMPTS))


def greedy_of_transformers(model, length=10, vocab_size=VOCABULARY, **options):
    engine = HFRollouts([STOP], pad_token_id=STOP, vocab_size=vocab_size)
    engine.sync(model)
    return greedy(engine, length, **options)


def lora(*target_modules, **options):
    return LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=list(target_modules), **options)


@pytest.fixture(scope="module")
def make(tiny_model):
    """Make a student whose greedy completions are not of one token repeated, also where its head is tied."""

    def make(seed=0, head_scale=12.0, tied=False, **config):
        model = tiny_model(hidden=128, vocab=ROWS, seed=seed, head_scale=head_scale, tie_word_embeddings=tied, **config)
        with torch.no_grad():
            for parameter in model.model.layers.parameters():
                if parameter.dim() > 1:
                    parameter *= 8
        return model

    return make


@pytest.fixture(scope="module")
def built(make):
    """The engine of this module, and the process's states before and after it was built."""
    gc.collect()  # vLLM takes down what engines of one process share when any of them goes
    model = make(tied=True)
    before = global_states()
    engine = VLLMColocateRollouts(model, [STOP], VOCABULARY, max_model_length=64, engine_kwargs=ENGINE)
    with pytest.raises(RuntimeError, match=r"before sync\(model\)"):
        engine.generate(PROMPTS, Sampling(2), SEEDS)
    others = []
    yield SimpleNamespace(engine=engine, before=before, after=global_states(), others=others)
    others.clear()
    del engine
    gc.collect()


@pytest.fixture
def model(make):
    return make()


@pytest.fixture
def engine(built, model):
    """The module's engine, with the weights of `model`."""
    built.engine.sync(model)
    return built.engine


# What it does to the process


def test_building_leaves_random_states_environment_and_threads_as_they_were(built):
    assert_undisturbed(built.before, built.after)


@pytest.mark.parametrize("stdout", [None, io.StringIO()])
def test_an_engine_is_built_with_a_stdout_that_has_a_descriptor(monkeypatch, stdout):
    monkeypatch.setattr(sys, "stdout", stdout)
    with _stdout_with_descriptor():
        assert sys.stdout.fileno() == 1
    assert sys.stdout is stdout


def test_the_number_of_threads_can_be_set_after_building(built):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_a_sync_and_rollouts_leave_the_random_states_as_they_were(built, model):
    before = global_states()
    built.engine.sync(model)
    assert_undisturbed(before)
    built.engine.generate(PROMPTS, Sampling(6, temperature=0.8, top_p=0.9, top_k=9), SEEDS)
    assert_undisturbed(before)


def test_the_trainers_autocast_does_not_reach_the_engine(built, model):
    built.engine.sync(model)
    expected = greedy(built.engine)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        built.engine.sync(model)
        assert greedy(built.engine) == expected
        assert torch.is_autocast_enabled("cpu")


# Whose completions they are


def test_greedy_completions_are_those_of_the_weights_synced_last(built, make):
    seen = []
    for seed in (1, 2, 3):
        model = make(seed=seed)
        built.engine.sync(model)
        completions = greedy(built.engine)
        assert completions == greedy_of_transformers(model)
        assert completions not in seen
        seen.append(completions)
    assert len({token for completion in seen[0] for token in completion.token_ids}) > 6


def test_a_small_step_of_training_is_enough_to_change_the_completions(engine, model):
    before = greedy(engine)
    model(torch.tensor(PROMPTS[:1]), labels=torch.tensor(PROMPTS[:1])).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert greedy(engine) == before  # not before a sync
    engine.sync(model)
    after = greedy(engine)
    assert after != before
    assert after == greedy_of_transformers(model)


@pytest.mark.parametrize(
    "config",
    [
        lora("q_proj", "down_proj"),
        lora("q_proj", "v_proj", use_dora=True),
        lora("q_proj", modules_to_save=["norm"]),
        lora("embed_tokens"),
        lora("lm_head"),
        lora("embed_tokens", "lm_head", "gate_proj"),
        lora("q_proj", modules_to_save=["lm_head"]),
        lora("q_proj", trainable_token_indices=[5, 6, 7, 8, 9]),
    ],
    ids=["linear layers", "DoRA", "a whole layer", "embeddings", "head", "both ends", "a whole head", "some tokens"],
)
def test_an_adapted_student_completes_as_with_its_adapter_and_stays_as_it_was(built, make, config):
    model = adapted(make(tied=True), config)
    expected, before = greedy_of_transformers(model), state_of(model)
    built.engine.sync(model)
    assert greedy(built.engine) == expected
    assert_equal_states(state_of(model), before)
    with model.disable_adapter():
        assert greedy_of_transformers(model) != expected


def test_the_student_of_the_demo_completes_as_transformers_does(built, smollm2_student_dir):
    model = AutoModelForCausalLM.from_pretrained(smollm2_student_dir, dtype=torch.float32).eval()
    size = model.config.vocab_size
    engine = VLLMColocateRollouts(model, [STOP], size, max_model_length=64, engine_kwargs=ENGINE)
    built.others.append(engine)
    seen = []
    for scale in (1.0, 0.7):
        with torch.no_grad():
            model.model.embed_tokens.weight[:, ::3] *= scale  # the tied head's too
        engine.sync(model)
        completions = greedy(engine, 6)
        assert completions == greedy_of_transformers(model, 6, size)
        assert completions not in seen
        seen.append(completions)


def test_the_engine_of_a_bfloat16_student_is_one_and_repeats_a_call(built, make):
    model = make().to(torch.bfloat16)
    engine = VLLMColocateRollouts(model, [STOP], VOCABULARY, max_model_length=64, engine_kwargs=ENGINE)
    built.others.append(engine)
    assert engine._llm.llm_engine.model_config.dtype == torch.bfloat16
    engine.sync(model)
    first = engine.generate(PROMPTS, Sampling(12), SEEDS)
    assert len({tuple(completion.token_ids) for completion in first}) == len(PROMPTS)
    engine.sync(model)
    assert engine.generate(PROMPTS, Sampling(12), SEEDS) == first


def test_only_a_lora_adapter_can_be_sent(built, make):
    model = adapted(make(), lora("q_proj", "down_proj"))
    engine = VLLMColocateRollouts(
        model, [STOP], VOCABULARY, max_model_length=64, weight_sync="adapter", engine_kwargs=ENGINE
    )
    built.others.append(engine)
    base = model.get_base_model()
    before, seen = state_of(model), []
    for _ in range(2):
        engine.sync(model)
        completions = greedy(engine)
        assert completions == greedy_of_transformers(model)
        assert completions not in seen
        seen.append(completions)
        assert_equal_states(state_of(model), before)
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                if "lora_B" in name:
                    parameter *= -2
        before = state_of(model)


# What it tells of them


def log_probs_of(model, prompt, ids):
    with torch.no_grad():
        log_p_LV = model(torch.tensor([[*prompt, *ids]])).logits[0].double().log_softmax(-1)
    return [log_p_LV[len(prompt) + place - 1, token_id].item() for place, token_id in enumerate(ids)]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "top_k": 5, "repetition_penalty": 1.2}], ids=str)
def test_log_probs_are_the_model_s_own_however_tokens_are_sampled(engine, model, options):
    completions = engine.generate(PROMPTS, Sampling(12, **options), SEEDS)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        expected = log_probs_of(model, prompt, list(completion.token_ids))
        assert completion.log_probs == pytest.approx(expected, abs=1e-3)
        assert min(expected) < -0.1


def test_only_the_first_prompts_of_a_call_are_asked_for_log_probs(engine):
    completions = engine.generate(PROMPTS * 2, Sampling(2), SEEDS * 2)
    assert [completion.log_probs is not None for completion in completions] == [True] * 8 + [False] * 4


def test_log_probs_of_another_kind_or_that_nobody_wants_are_left_out(engine, monkeypatch):
    for unwanted in (Sampling(4, extra={"logprobs": None}), engine.greedy_sampling(4)):
        [completion] = engine.generate(PROMPTS[:1], unwanted, SEEDS[:1])
        assert completion.log_probs is None
    monkeypatch.setattr(engine, "_computes_raw_log_probs", False)
    [completion] = engine.generate(PROMPTS[:1], Sampling(4), SEEDS[:1])
    assert completion.log_probs is None


# Where the randomness comes from


def test_completions_do_not_depend_on_order_or_grouping(engine):
    sampling = Sampling(12)
    together = token_ids(engine.generate(PROMPTS, sampling, SEEDS))
    assert len({tuple(ids) for ids in together}) == len(PROMPTS)
    assert token_ids(engine.generate(PROMPTS, sampling, SEEDS)) == together
    alone = [
        token_ids(engine.generate([prompt], sampling, [seed]))[0] for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    assert alone == together
    order = [3, 0, 5, 1, 4, 2]
    shuffled = engine.generate([PROMPTS[i] for i in order], sampling, [SEEDS[i] for i in order])
    assert token_ids(shuffled) == [together[i] for i in order]


def test_the_seed_of_a_prompt_and_nothing_else_changes_its_completion(engine):
    first = token_ids(engine.generate(PROMPTS, Sampling(12), SEEDS))
    torch.manual_seed(99)
    second = token_ids(engine.generate(PROMPTS, Sampling(12), [*SEEDS[:2], 7, *SEEDS[3:]]))
    assert [a != b for a, b in zip(first, second, strict=True)] == [False, False, True, False, False, False]


def test_equal_prompts_with_other_seeds_get_other_completions(engine):
    completions = token_ids(engine.generate([PROMPTS[0]] * 20, Sampling(8), list(range(20))))
    assert len({tuple(ids) for ids in completions}) > 15


def test_seeds_of_64_bits_are_told_apart(engine):
    seeds = [2**63 - 1, 2**63 - 2, 2**62, 1]
    completions = token_ids(engine.generate([PROMPTS[0]] * 4, Sampling(12), seeds))
    assert len({tuple(ids) for ids in completions}) == 4
    assert token_ids(engine.generate([PROMPTS[0]], Sampling(12), [2**63 - 2])) == completions[1:2]


# The distribution


def next_token_probabilities(model, prompt, temperature=1.0):
    with torch.no_grad():
        return (model(torch.tensor([prompt])).logits[0, -1, :VOCABULARY].double() / temperature).softmax(-1)


def drawn_frequencies(engine, sampling, prompt=PROMPTS[0]):
    completions = engine.generate([prompt] * DRAWS, sampling, list(range(DRAWS)))
    return np.bincount([completion.token_ids[0] for completion in completions], minlength=VOCABULARY) / DRAWS


def distance(frequencies, expected):
    """Total variation; 2,000 draws over 8 tokens stay below 0.04."""
    return 0.5 * np.abs(frequencies - expected.numpy()).sum()


def restricted(probabilities, keep):
    kept = torch.where(keep, probabilities, 0.0)
    return kept / kept.sum()


def top(probabilities, count):
    return restricted(probabilities, probabilities >= probabilities.sort(descending=True).values[count - 1])


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_tokens_come_as_often_as_the_model_says(engine, model, temperature):
    expected = {t: top(next_token_probabilities(model, PROMPTS[0], t), 8) for t in (0.5, 1.0, 2.0)}
    assert expected[temperature].max() < 0.9
    frequencies = drawn_frequencies(engine, Sampling(1, temperature=temperature, top_k=8))
    assert (frequencies > 0).sum() <= 8
    for other, probabilities in expected.items():
        assert (distance(frequencies, probabilities) < 0.04) == (other == temperature)


def test_top_p_keeps_the_smallest_set_of_at_least_that_mass(engine, model):
    probabilities = next_token_probabilities(model, PROMPTS[0], 0.5)
    kept = int((probabilities.sort(descending=True).values.cumsum(-1) < 0.6).sum()) + 1
    assert 1 < kept < 12
    frequencies = drawn_frequencies(engine, Sampling(1, temperature=0.5, top_p=0.6))
    assert distance(frequencies, top(probabilities, kept)) < 0.04


def test_min_p_keeps_tokens_by_their_share_of_the_top_one(engine, model):
    probabilities = next_token_probabilities(model, PROMPTS[0], 0.5)
    keep = probabilities >= 0.2 * probabilities.max()
    assert 1 < keep.sum() < 12
    frequencies = drawn_frequencies(engine, Sampling(1, temperature=0.5, min_p=0.2))
    assert distance(frequencies, restricted(probabilities, keep)) < 0.04


def test_the_only_token_of_top_k_1_is_the_greedy_one(engine):
    expected = greedy(engine)
    assert engine.generate(PROMPTS, Sampling(10, top_k=1), SEEDS) == expected
    assert engine.generate(PROMPTS, Sampling(10), SEEDS) != expected


def test_a_repetition_penalty_is_transformers_own(engine, model):
    penalised = greedy(engine, repetition_penalty=1.5)
    assert penalised == greedy_of_transformers(model, repetition_penalty=1.5)
    assert penalised != greedy(engine)


def test_options_of_the_engine_reach_it(engine):
    unlimited = token_ids(greedy(engine))
    banned = sorted({ids[0] for ids in unlimited})
    biased = token_ids(greedy(engine, extra={"logit_bias": dict.fromkeys(banned, -100.0)}))
    assert not {ids[0] for ids in biased} & set(banned)


# Where a completion ends


def test_a_completion_ends_with_the_stop_token_or_is_cut_off(built, make):
    model = make()
    with torch.no_grad():
        model.lm_head.weight[STOP] = model.lm_head.weight[20] * 2
    built.engine.sync(model)
    completions = built.engine.generate(PROMPTS * 5, Sampling(25), list(range(30)))
    assert len({len(completion.token_ids) for completion in completions if completion.is_finished}) > 1
    assert {completion.is_finished for completion in completions} == {True, False}
    for completion in completions:
        ids = list(completion.token_ids)
        assert ids.count(STOP) == completion.is_finished == (ids[-1] == STOP)
        assert completion.is_finished or len(ids) == 25
    long_enough = built.engine.generate(PROMPTS * 5, Sampling(25, extra={"min_tokens": 6}), list(range(30)))
    assert min(len(completion.token_ids) for completion in long_enough) >= 6


def test_an_end_of_sequence_only_in_the_config_does_not_stop_it(make, built, monkeypatch):
    """The engine's config says that eos is 2."""
    model = make()
    with torch.no_grad():
        model.lm_head.weight[STOP] = model.lm_head.weight[20] * 2
    built.engine.sync(model)
    monkeypatch.setattr(built.engine, "_stop_ids", [7])
    completions = built.engine.generate(PROMPTS * 5, Sampling(25), list(range(30)))
    assert any(STOP in completion.token_ids[:-1] for completion in completions)


# What is never sampled, and what is refused


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_rows_of_the_head_that_are_no_tokens_are_never_sampled(built, make, temperature):
    model = make()
    with torch.no_grad():
        model.lm_head.weight[VOCABULARY:] *= 5
        best_BL = torch.cat([model(torch.tensor([prompt])).logits[0].argmax(-1) for prompt in PROMPTS])
    assert (best_BL >= VOCABULARY).any()
    built.engine.sync(model)
    completions = built.engine.generate(PROMPTS * 5, Sampling(10, temperature=temperature), list(range(30)))
    assert all(max(completion.token_ids) < VOCABULARY for completion in completions)
    if temperature == 0:
        assert greedy(built.engine) == greedy_of_transformers(model)


def test_a_bias_of_the_users_leaves_the_padding_rows_out(built, make):
    model = make()
    with torch.no_grad():
        model.lm_head.weight[VOCABULARY:] *= 5
    built.engine.sync(model)
    completions = greedy(built.engine, extra={"logit_bias": {5: 1.0}})
    assert all(max(completion.token_ids) < VOCABULARY for completion in completions)


def test_no_prompts_give_no_completions(engine):
    assert engine.generate([], Sampling(4), []) == []


def test_a_prompt_too_long_for_the_engine_is_refused_with_the_numbers(engine):
    with pytest.raises(
        GKDConfigError,
        match=r"at most 64 tokens, but a prompt of 60 and max_new_tokens=5 make 65: raise vllm",
    ):
        engine.generate([PROMPTS[0], [5] * 60], Sampling(5), [0, 1])
    [completion] = engine.generate([[5] * 60], Sampling(4), [0])
    assert len(completion.token_ids) <= 4


def test_an_option_that_vllm_does_not_know_is_refused(engine):
    with pytest.raises(GKDConfigError, match=r"vLLM refuses these sampling options: .*min_tokns"):
        engine.generate(PROMPTS, Sampling(5, extra={"min_tokns": 3}), SEEDS)


def refused(model, **options):
    return VLLMColocateRollouts(model, [STOP], VOCABULARY, **options)


def test_sleep_mode_without_a_gpu_is_refused(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(GKDConfigError, match="vllm_enable_sleep_mode=True needs a CUDA device"):
        refused(model, enable_sleep_mode=True)


def test_adapter_sync_of_a_student_without_plain_lora_is_refused(model):
    for student in (model, get_peft_model(model, lora("q_proj", use_dora=True))):
        with pytest.raises(GKDConfigError, match="'adapter' needs a student with one plain LoRA adapter"):
            refused(student, weight_sync="adapter")


def test_a_lora_rank_that_vllm_does_not_take_is_refused(model):
    student = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=600, target_modules=["q_proj"]))
    with pytest.raises(GKDConfigError, match=r"rank up to 512; got 600: set vllm_weight_sync='full'"):
        refused(student, weight_sync="adapter")


def test_an_engine_over_more_ranks_than_there_are_is_refused(model):
    with pytest.raises(GKDConfigError, match=r"vllm_tensor_parallel_size \(2\) must divide the number of ranks \(1\)"):
        refused(model, tensor_parallel_size=2)


def test_without_vllm_the_error_says_what_to_install(model, monkeypatch):
    before = global_states()
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(GKDConfigError, match=r'vLLM rollouts need: pip install "\.\[vllm\]" in a clone.*docs/vllm.md'):
        refused(model)
    assert_undisturbed(before)


class SleepyEngine:
    """Stands in for vLLM's engine on a GPU: it must not be asked for anything while what it needs for that sleeps.

    Level 2 drops the weights: here they become zero, as memory that was given back may hold anything.
    """

    def __init__(self, llm):
        self._llm, self.awake, self.calls = llm, {"weights", "kv_cache"}, []

    def sleep(self, level):
        self.awake = set()
        self.calls.append(f"sleep at level {level}")
        if level == 2:
            self._llm.collective_rpc(drop_weights)

    def wake_up(self, tags):
        assert not self.awake & set(tags)
        self.awake |= set(tags)
        self.calls.append(f"wake up {', '.join(tags)}")

    def collective_rpc(self, method, **options):
        assert "weights" in self.awake
        self.calls.append(method)
        return self._llm.collective_rpc(method, **options)

    def generate(self, *args, **options):
        assert self.awake == {"weights", "kv_cache"}
        self.calls.append("generate")
        return self._llm.generate(*args, **options)

    def __getattr__(self, name):
        return getattr(self._llm, name)


def drop_weights(worker):
    for weight in worker.model_runner.model.parameters():
        weight.data.zero_()


@pytest.fixture
def sleepy(engine, monkeypatch):
    """The engine of the module, asleep between its calls; it must be synced again afterwards."""
    stand_in = SleepyEngine(engine._llm)
    monkeypatch.setattr(engine, "_llm", stand_in)
    monkeypatch.setattr(engine, "_sleeps", True)
    emptied = torch.cuda.empty_cache
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: (stand_in.calls.append("free memory"), emptied()))
    monkeypatch.setattr(engine, "_is_asleep", False)
    return stand_in


class UnbuiltEngine:
    """Stands in for a vLLM engine on a GPU, as far as building one goes."""

    def __init__(self):
        self.calls, self.rows = [], ROWS
        config = SimpleNamespace(get_vocab_size=lambda: self.rows, max_model_len=64, logprobs_mode="raw_logprobs")
        self.llm_engine = SimpleNamespace(
            model_config=config,
            vllm_config=SimpleNamespace(use_v2_model_runner=True),
            engine_core=SimpleNamespace(shutdown=lambda: self.calls.append("shutdown")),
        )

    def sleep(self, level):
        self.calls.append(f"sleep at level {level}")

    def collective_rpc(self, method, kwargs):
        self.calls.append(method)

    def reset_prefix_cache(self, **options):
        self.calls.append(f"reset_prefix_cache {options}")
        return True


@pytest.fixture
def unbuilt(monkeypatch):
    """The engine that is built in place of vLLM's, as if there were a GPU."""
    stand_in = UnbuiltEngine()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(vllm_colocate, "_build", lambda options: stand_in)
    monkeypatch.setattr(vllm_colocate, "_LIVE_ENGINES", set())
    return stand_in


@pytest.mark.parametrize(("config", "level"), [(None, 2), (lora("q_proj"), 1)])
def test_an_engine_sleeps_from_the_start_until_something_is_generated(unbuilt, model, config, level):
    model = model if config is None else adapted(model, config)
    VLLMColocateRollouts(model, [STOP], VOCABULARY, enable_sleep_mode=True)
    assert unbuilt.calls == [f"sleep at level {level}"]
    VLLMColocateRollouts(model, [STOP], VOCABULARY)
    assert len(unbuilt.calls) == 1


def test_more_logit_biases_than_vllm_takes_on_a_gpu_are_refused(unbuilt, model, monkeypatch):
    """Its worker would raise in the middle of a step, and be lost."""
    unbuilt.rows = VOCABULARY + 1024 - 2
    engine = VLLMColocateRollouts(model, [STOP], VOCABULARY, never_sampled={3, 4})
    unbuilt.rows += 1
    with pytest.raises(GKDConfigError, match=r"at most 1024 logit biases .*but 1025 .*VLLM_USE_V2_MODEL_RUNNER=0"):
        VLLMColocateRollouts(model, [STOP], VOCABULARY, never_sampled={3, 4})
    assert unbuilt.calls == ["shutdown"]
    assert list(vllm_colocate._LIVE_ENGINES) == [engine]
    unbuilt.llm_engine.vllm_config.use_v2_model_runner = False
    VLLMColocateRollouts(model, [STOP], VOCABULARY, never_sampled={3, 4})
    monkeypatch.undo()
    engine.sync(model)
    with pytest.raises(GKDConfigError, match=r"but 1025 are needed: .*and those in generation_kwargs"):
        greedy(engine, extra={"logit_bias": {"5": 1.0}})


@pytest.mark.parametrize("config", [None, lora("q_proj")])
def test_a_quantised_student_is_refused_before_an_engine_is_built(unbuilt, model, monkeypatch, config):
    model.is_quantized = True
    model = model if config is None else adapted(model, config)
    monkeypatch.setattr(vllm_colocate, "_build", lambda options: pytest.fail("an engine was built"))
    with pytest.raises(GKDConfigError, match=r"the student's weights are quantised .*set use_vllm=False"):
        VLLMColocateRollouts(model, [STOP], VOCABULARY)


@pytest.mark.parametrize(("config", "sent"), [(None, 2), (lora("q_proj"), 1)])
def test_a_sync_drops_the_cache_outside_the_gpu_too(unbuilt, model, monkeypatch, config, sent):
    model = model if config is None else adapted(model, config)
    engine = VLLMColocateRollouts(model, [STOP], VOCABULARY)
    monkeypatch.undo()
    for _ in range(2):
        engine.sync(model)
    assert unbuilt.calls.count("reload_weights") == sent
    assert unbuilt.calls.count("reset_prefix_cache {'reset_connector': True}") == 2


def test_each_state_of_an_adapter_has_its_own_place_in_vllms_cache(unbuilt, model, monkeypatch):
    """A block of the cache is known by its tokens, and by the name and the folder of the adapter."""
    model = adapted(model, lora("q_proj"))
    engine, keys = VLLMColocateRollouts(model, [STOP], VOCABULARY), set()
    monkeypatch.undo()
    for _ in range(3):
        engine.sync(model)
        keys.add((engine._lora_request.lora_name, engine._lora_request.lora_path))
    assert len(keys) == 3


_SYNC = ["free memory", "wake up weights", "reload_weights", "free memory", "wake up kv_cache"]


def test_an_engine_that_sleeps_gets_its_memory_for_weights_then_weights_then_its_cache(sleepy, engine, model):
    engine.sync(model)
    expected = greedy(engine)
    sleepy.calls.clear()
    engine.sync(model)
    assert greedy(engine) == expected
    assert sleepy.calls == [*_SYNC, "generate", "sleep at level 2"]


_WOKEN = ["free memory", "wake up weights", "free memory", "wake up kv_cache"]


def test_weights_that_sleep_dropped_are_sent_again_once_for_all_further_batches(sleepy, engine, model):
    engine.sync(model)
    expected = greedy(engine)
    for woken in (_SYNC, _WOKEN, _WOKEN):
        sleepy.calls.clear()
        assert greedy(engine) == expected
        assert sleepy.calls == [*woken, "generate", "sleep at level 1"]
    engine.sync(model)
    greedy(engine)
    assert sleepy.calls[-1] == "sleep at level 2"


def test_a_rank_without_prompts_wakes_up_and_sleeps_with_the_others(sleepy, engine, model):
    engine.sync(model)
    for level in (2, 1):
        sleepy.calls.clear()
        assert engine.generate([], Sampling(2), []) == []
        assert sleepy.calls[-1] == f"sleep at level {level}"
        assert "generate" not in sleepy.calls
    assert sleepy.calls == [*_SYNC, "sleep at level 1"]


def test_the_base_model_of_an_adapter_sleeps_on_the_cpu(sleepy, engine, model, monkeypatch):
    engine.sync(model)
    monkeypatch.setattr(engine, "_sends_adapter", True)
    expected = greedy(engine)
    sleepy.calls.clear()
    assert greedy(engine) == expected
    assert sleepy.calls == [*_WOKEN, "generate", "sleep at level 1"]


def test_an_engine_whose_student_is_gone_says_so(sleepy, engine, make):
    engine.sync(make())
    greedy(engine)
    gc.collect()
    with pytest.raises(GKDRolloutError, match="the student they came from no longer exists"):
        greedy(engine)


# Engines that fail


def test_an_invalid_completion_is_an_error_of_ours(engine):
    with pytest.raises(GKDRolloutError, match=r"engine in this process did not generate: ValueError: expected a compl"):
        engine.generate(PROMPTS, Sampling(5, extra={"max_tokens": 3}), SEEDS)
    assert engine.generate(PROMPTS, Sampling(2), SEEDS)


def test_a_refusal_by_vllm_is_an_error_of_ours(engine):
    with pytest.raises(GKDRolloutError, match=r"engine in this process did not generate: \w+: .*empty"):
        engine.generate([[]], Sampling(2), [0])
    assert engine.generate(PROMPTS, Sampling(2), SEEDS)


def test_a_cache_that_is_kept_is_an_error_of_ours(engine, model, monkeypatch):
    monkeypatch.setattr(engine._llm, "reset_prefix_cache", lambda reset_connector: False)
    with pytest.raises(GKDRolloutError, match="kept its cache of older weights"):
        engine.sync(model)
