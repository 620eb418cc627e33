"""Completions by vLLM servers: from the latest weights, or an error that says why there are none."""

import copy
import gc
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from peft import LoraConfig

from gkd_trainer.errors import GKDConfigError, GKDServerError
from gkd_trainer.rollouts import HFRollouts, VLLMServerRollouts, vllm_sync
from gkd_trainer.types import Sampling
from tests.models.test_weights import adapted, assert_equal_states, state_of
from tests.serving import (
    MAX_MODEL_LENGTH,
    Answer,
    FaultyProxy,
    changed,
    cut_in_half,
    delayed,
    free_port,
    hang_up,
    status,
)

pytestmark = pytest.mark.usefixtures("short_waits", "ranks_of_one_process")

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14], [15], [16, 17, 18, 19, 20, 21, 22], [23, 24, 25]]

SEEDS = [101, 102, 103, 104, 105, 106]

ROWS, VOCABULARY = 368, 360

"""The head has rows that are no tokens."""

STOP = 2

COMPLETIONS, VERSION, LOAD = "/v1/completions", "/weight_info", "/collective_rpc"


def post(server, path, body):
    httpx.post(server.base_url + path, json=body, timeout=60, trust_env=False).raise_for_status()


def load(server, folder, version):
    """Give a server other weights, as somebody else would, or a restart."""
    post(server, LOAD, {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
    post(server, "/reset_prefix_cache", {})
    post(server, "/update_weight_version", {"new_version": version})


@pytest.fixture(autouse=True, scope="module")
def server_as_it_was(vllm_server, served_dir):
    yield
    load(vllm_server, served_dir, "default")


@pytest.fixture
def make(proxy):
    """Make an engine of the server behind `proxy`."""

    def make(base_url=proxy.base_url, **options):
        options = {"server_timeout": 5.0, "request_timeout": 60.0, **options}
        return VLLMServerRollouts(base_url, [STOP], VOCABULARY, **options)

    return make


@pytest.fixture
def student(tiny_model):
    """Make a student of the served model's shape, with other weights than it."""

    def make(seed=1, head_scale=12.0, **config):
        return tiny_model(hidden=128, vocab=ROWS, seed=seed, head_scale=head_scale, **config)

    return make


@pytest.fixture
def model(student):
    return student()


@pytest.fixture
def engine(make, proxy, model):
    """An engine with the weights of `model`; what was asked of the proxy meanwhile is forgotten."""
    engine = make()
    engine.sync(model)
    proxy.requests.clear()
    return engine


def greedy(engine, prompts=PROMPTS, length=10, **options):
    return engine.generate(prompts, Sampling(length, temperature=0.0, **options), [0] * len(prompts))


def greedy_of_transformers(model, prompts=PROMPTS, length=10, **options):
    engine = HFRollouts([STOP], pad_token_id=STOP, vocab_size=VOCABULARY)
    engine.sync(model)
    return greedy(engine, prompts, length, **options)


def token_ids(completions):
    return [list(completion.token_ids) for completion in completions]


def test_servers_that_do_not_hold_the_longest_sequences_are_refused_at_first_contact(make):
    with pytest.raises(GKDConfigError, match=r"take at most 320 tokens, but max_length is 321.*--max-model-len 321"):
        make(max_length=MAX_MODEL_LENGTH + 1)
    assert make(max_length=MAX_MODEL_LENGTH)


# Whose completions they are


def test_greedy_completions_are_those_of_the_weights_synced_last(make, student):
    engine, seen = make(), []
    for seed in (1, 2, 3):
        model = student(seed=seed)
        engine.sync(model)
        completions = greedy(engine)
        assert completions == greedy_of_transformers(model)
        assert completions not in seen
        seen.append(completions)
    assert len({token for completion in seen[0] for token in completion.token_ids}) > 6


ADAPTERS = {
    "LoRA": LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, lora_alpha=16),
    "LoRA on the head": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"], r=4, lora_alpha=16),
    "DoRA": LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, lora_alpha=16, use_dora=True),
}


@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_an_adapted_student_completes_as_with_its_adapter_and_stays_as_it_was(make, student, config):
    model = adapted(student(), copy.deepcopy(config))
    expected, before = greedy_of_transformers(model), state_of(model)
    engine = make()
    engine.sync(model)
    assert greedy(engine) == expected
    assert_equal_states(state_of(model), before)
    with model.disable_adapter():
        assert greedy_of_transformers(model) != expected


def remember_versions(proxy):
    """Have a proxy hold the version of the weights: two before one server are then like two servers."""
    proxy.held = {}

    def name(request, forward):
        proxy.held["version"] = request.json["new_version"]
        return Answer(200, b'{"success": true}')

    def tell(request, forward):
        return Answer(200, json.dumps({"weight_version": proxy.held.get("version", "default")}).encode())

    proxy.next(name, path="/update_weight_version", times=None)
    proxy.next(tell, path=VERSION, times=None)


def test_two_servers_share_the_prompts_and_complete_them_as_one_does(engine, make, model, proxy, vllm_server):
    expected = engine.generate(PROMPTS, Sampling(8), SEEDS)
    with FaultyProxy(vllm_server.base_url) as second:
        both = make([proxy.base_url, second.base_url])
        for each in (proxy, second):
            each.requests.clear()
            remember_versions(each)
        both.sync(model)
        assert both.generate(PROMPTS, Sampling(8), SEEDS) == expected
        for each, prompts in ((proxy, PROMPTS[::2]), (second, PROMPTS[1::2])):
            asked = [request.json["prompt"] for request in each.requests if request.path == COMPLETIONS]
            assert sorted(asked) == sorted(prompts)
            assert each.paths().count(LOAD) == 1


def test_another_rank_completes_with_what_rank_0_sent_and_can_send_it_again(engine, make, model, proxy, served_dir):
    expected = engine.generate(PROMPTS, Sampling(8), SEEDS)
    other = make(rank=1)
    other.sync(model)
    assert LOAD not in proxy.paths()
    assert other.generate(PROMPTS, Sampling(8), SEEDS) == expected
    load(proxy, served_dir, "default")
    assert other.generate(PROMPTS, Sampling(8), SEEDS) == expected


def test_ranks_begin_with_different_servers(engine, make, model, proxy, vllm_server):
    with FaultyProxy(vllm_server.base_url) as second:
        other = make([proxy.base_url, second.base_url], rank=1)
        for each in (proxy, second):
            each.requests.clear()
        other.sync(model)
        other.generate(PROMPTS[:1], Sampling(2), SEEDS[:1])
        assert COMPLETIONS in second.paths()
        assert COMPLETIONS not in proxy.paths()


# Where the randomness comes from


def test_completions_do_not_depend_on_order_or_grouping(engine):
    together = token_ids(engine.generate(PROMPTS, Sampling(12), SEEDS))
    assert len({tuple(ids) for ids in together}) == len(PROMPTS)
    alone = [engine.generate([prompt], Sampling(12), [seed]) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    assert [ids for completions in alone for ids in token_ids(completions)] == together
    order = [3, 0, 5, 1, 4, 2]
    shuffled = engine.generate([PROMPTS[i] for i in order], Sampling(12), [SEEDS[i] for i in order])
    assert token_ids(shuffled) == [together[i] for i in order]
    second = token_ids(engine.generate(PROMPTS, Sampling(12), [*SEEDS[:2], 7, *SEEDS[3:]]))
    assert [a != b for a, b in zip(together, second, strict=True)] == [False, False, True, False, False, False]


# What is asked


def test_a_request_sets_every_option_with_a_server_default(engine, proxy, vllm_server):
    sampling = Sampling(7, temperature=0.8, top_p=0.9, top_k=11, min_p=0.05, repetition_penalty=1.1)
    engine.generate(PROMPTS[:1], sampling, SEEDS[:1])
    [request] = [request for request in proxy.requests if request.path == COMPLETIONS]
    assert request.json == {
        "model": str(vllm_server.model),
        "prompt": PROMPTS[0],
        "seed": SEEDS[0],
        "n": 1,
        "max_tokens": 7,
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 11,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "min_tokens": 0,
        "stop_token_ids": [STOP],
        "ignore_eos": True,
        "logit_bias": {str(token): -100.0 for token in range(VOCABULARY, ROWS)},
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "add_special_tokens": False,
        "stream": False,
    }


def test_unrestricted_sampling_is_named_too(engine, proxy):
    engine.generate(PROMPTS[:1], Sampling(1), SEEDS[:1])
    [request] = [request for request in proxy.requests if request.path == COMPLETIONS]
    restricting = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert {name: request.json[name] for name in restricting} == restricting


def test_options_of_the_engine_are_added_and_win(engine, proxy):
    sampling = Sampling(3, extra={"min_tokens": 3, "frequency_penalty": 0.5, "logit_bias": {5: 1.5}})
    engine.generate(PROMPTS[:1], sampling, SEEDS[:1])
    [request] = [request for request in proxy.requests if request.path == COMPLETIONS]
    assert (request.json["min_tokens"], request.json["frequency_penalty"]) == (3, 0.5)
    assert request.json["logit_bias"] == {"5": 1.5, **{str(token): -100.0 for token in range(VOCABULARY, ROWS)}}


# What it tells of its tokens


def test_log_probs_are_those_of_the_weights_synced_last(engine, model):
    sampling = Sampling(8, temperature=0.5, top_k=5, repetition_penalty=1.2)
    for prompt, completion in zip(PROMPTS, engine.generate(PROMPTS, sampling, SEEDS), strict=True):
        ids = list(completion.token_ids)
        with torch.no_grad():
            log_p_LV = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = log_p_LV[torch.arange(len(ids)), ids].tolist()
        assert completion.log_probs == pytest.approx(expected, abs=1e-3)
        assert min(expected) < -0.1


def test_only_the_first_prompts_of_a_call_are_asked_for_log_probs(engine):
    completions = engine.generate(PROMPTS * 2, Sampling(2), SEEDS * 2)
    assert [completion.log_probs is not None for completion in completions] == [True] * 8 + [False] * 4


@pytest.mark.parametrize(
    ("value", "are_raw"),
    [(-1.5, True), (-5.8, True), (0.0, False), (12.5, False), (-33.0, False), (None, False)],
    ids=["raw", "nearly uniform", "after restrictions", "logits", "logits below zero", "none"],
)
def test_log_probs_of_another_mode_are_recognised_at_first_contact(make, model, proxy, caplog, value, are_raw):
    logprobs = None if value is None else {"token_logprobs": [value]}
    proxy.next(choice_with(logprobs=logprobs), path=COMPLETIONS)
    engine = make()
    [probe] = [request.json for request in proxy.requests if request.path == COMPLETIONS]
    assert (probe["max_tokens"], probe["top_k"], probe["logprobs"]) == (1, 1, 0)
    assert ("--logprobs-mode" in caplog.text) == (not are_raw)
    engine.sync(model)
    [completion] = engine.generate(PROMPTS[:1], Sampling(4), SEEDS[:1])
    assert (completion.log_probs is not None) == are_raw


def test_a_server_that_refuses_to_tell_log_probs_is_used_without(make, model, proxy, caplog):
    proxy.next(status(400, b"no logprobs here"), path=COMPLETIONS)
    engine = make()
    assert "--logprobs-mode" in caplog.text
    engine.sync(model)
    assert engine.generate(PROMPTS[:1], Sampling(4), SEEDS[:1])[0].log_probs is None


def test_rows_of_the_head_that_are_no_tokens_are_never_sampled(make, student):
    model = student()
    with torch.no_grad():
        model.lm_head.weight[VOCABULARY:] *= 5
    engine = make()
    engine.sync(model)
    completions = engine.generate(PROMPTS * 5, Sampling(10), list(range(30)))
    assert all(max(completion.token_ids) < VOCABULARY for completion in completions)
    assert greedy(engine) == greedy_of_transformers(model)


def test_a_completion_ends_with_the_stop_token_or_is_cut_off(make, student):
    model = student()
    with torch.no_grad():
        model.lm_head.weight[STOP] = model.lm_head.weight[20] * 2.5
    engine = make()
    engine.sync(model)
    completions = engine.generate(PROMPTS * 5, Sampling(25), list(range(30)))
    assert {completion.is_finished for completion in completions} == {True, False}
    for completion in completions:
        ids = list(completion.token_ids)
        assert ids.count(STOP) == completion.is_finished == (ids[-1] == STOP)
        assert completion.is_finished or len(ids) == 25


def test_the_token_goes_with_every_request(make, proxy, model):
    engine = make(api_token="secret")
    engine.sync(model)
    engine.generate(PROMPTS, Sampling(1), SEEDS)
    assert {COMPLETIONS, VERSION, LOAD} <= set(proxy.paths())
    assert {request.authorization for request in proxy.requests} == {"Bearer secret"}


def test_no_prompts_give_no_completions_and_no_requests(engine, proxy):
    assert engine.generate([], Sampling(4), []) == []
    assert proxy.requests == []


def test_a_prompt_too_long_for_the_server_is_refused_with_the_numbers(engine, proxy):
    with pytest.raises(GKDConfigError, match="at most 320 tokens, but a prompt of 314 and max_new_tokens=7 make 321"):
        engine.generate([PROMPTS[0], [5] * (MAX_MODEL_LENGTH - 6)], Sampling(7), [0, 1])
    assert proxy.requests == []


# Where weights pass


def test_weights_are_in_a_private_folder_and_old_ones_are_removed(make, proxy, student):
    engine, folders = make(), []
    for seed in (1, 2):
        engine.sync(student(seed=seed))
        body = next(request.json for request in reversed(proxy.requests) if request.path == LOAD)
        folders.append(Path(body["kwargs"]["weights_path"]))
    parent = folders[0].parent
    assert parent.parent == Path("/dev/shm")
    assert parent.stat().st_mode & 0o777 == 0o700
    assert folders[0] != folders[1]
    assert [path for path in parent.iterdir() if path.is_dir()] == [folders[1]]
    assert folders[1].stat().st_mode & 0o777 == 0o700
    del engine
    gc.collect()
    assert not parent.exists()


def test_closing_removes_the_folder_and_may_be_repeated(make, model, tmp_path):
    engine = make(sync_dir=str(tmp_path))
    engine.sync(model)
    assert len(list(tmp_path.iterdir())) == 1
    engine.close()
    engine.close()
    assert list(tmp_path.iterdir()) == []
    other = make(rank=1)
    other.close()


def test_a_folder_that_can_not_be_made_is_refused_with_the_option(make, tmp_path):
    with pytest.raises(GKDConfigError, match=rf"vllm_sync_dir must be a writable folder.*got '{tmp_path}/none'"):
        make(sync_dir=f"{tmp_path}/none")


def test_weights_pass_through_the_folder_that_was_named(make, proxy, model, tmp_path):
    engine = make(sync_dir=str(tmp_path))
    engine.sync(model)
    [parent] = tmp_path.iterdir()
    assert parent.stat().st_mode & 0o777 == 0o700
    [request] = [request for request in proxy.requests if request.path == LOAD]
    assert Path(request.json["kwargs"]["weights_path"]).parent == parent
    assert greedy(engine) == greedy_of_transformers(model)


def test_credentials_in_a_url_are_not_shown(make):
    with pytest.raises(GKDConfigError, match=r"^http://gpu-node:8000 may be on another machine") as raised:
        make("http://user:s3cret@gpu-node:8000")
    assert "s3cret" not in str(raised.value)


# Servers that lose weights


def loses_weights(server, folder):
    """A rule: before the answer the server is given other weights."""

    def rule(request, forward):
        load(server, folder, "default")
        return forward()

    return rule


def test_a_window_during_which_the_weights_were_lost_is_generated_again(engine, proxy, vllm_server, served_dir, caplog):
    expected = engine.generate(PROMPTS, Sampling(8), SEEDS)
    proxy.requests.clear()
    proxy.next(loses_weights(vllm_server, served_dir), path=COMPLETIONS)
    with caplog.at_level(logging.WARNING, logger="gkd_trainer.rollouts.vllm_server"):
        assert engine.generate(PROMPTS, Sampling(8), SEEDS) == expected
    assert proxy.paths().count(COMPLETIONS) == 2 * len(PROMPTS)
    assert proxy.paths().count(LOAD) == 1
    [record] = caplog.records
    lost = f"{proxy.base_url} lost the student's weights; 6 of 6 completions are generated again"
    assert record.message == lost


def test_only_the_requests_of_the_server_that_lost_the_weights_are_repeated(engine, make, model, proxy, vllm_server):
    expected = engine.generate(PROMPTS, Sampling(8), SEEDS)
    with FaultyProxy(vllm_server.base_url) as second:
        both = make([proxy.base_url, second.base_url])
        for each in (proxy, second):
            remember_versions(each)
        both.sync(model)
        for each in (proxy, second):
            each.requests.clear()
        # As by a restart.
        second.next(lambda request, forward: (second.held.clear(), forward())[1], path=COMPLETIONS)
        assert both.generate(PROMPTS, Sampling(8), SEEDS) == expected
        # The three of the second are head_scale over both again.
        assert [each.paths().count(COMPLETIONS) for each in (proxy, second)] == [3 + 2, 3 + 1]


def test_a_name_that_took_long_to_give_is_not_trusted(make, model, proxy, monkeypatch):
    """The server may have restarted between the two answers."""
    monkeypatch.setattr(vllm_sync, "FASTEST_RESTART", 0.2)
    engine = make()
    proxy.next(lambda request, forward: forward(), path="/update_weight_version")
    proxy.next(delayed(0.3), path="/update_weight_version")
    engine.sync(model)
    assert proxy.paths().count(LOAD) == 2
    assert greedy(engine) == greedy_of_transformers(model)


@pytest.mark.parametrize("fault", [status(502), status(503), hang_up, cut_in_half, status(500)])
def test_a_connection_that_fails_during_a_window_repeats_only_that_request(engine, proxy, fault):
    expected = engine.generate(PROMPTS, Sampling(8), SEEDS)
    proxy.requests.clear()
    proxy.next(fault, path=COMPLETIONS)
    assert engine.generate(PROMPTS, Sampling(8), SEEDS) == expected
    assert proxy.paths().count(COMPLETIONS) == len(PROMPTS) + 1
    assert LOAD not in proxy.paths()


def test_ten_failed_connections_in_a_row_do_not_stop_a_run(engine, model, proxy):
    expected = engine.generate(PROMPTS, Sampling(8), SEEDS)
    for path in (COMPLETIONS, VERSION, LOAD, "/reset_prefix_cache", "/update_weight_version"):
        proxy.next(status(502), path=path, times=10)
    assert engine.generate(PROMPTS, Sampling(8), SEEDS) == expected
    engine.sync(model)
    assert engine.generate(PROMPTS, Sampling(8), SEEDS) == expected


def test_four_windows_with_one_failed_connection_each_are_not_an_error(engine, proxy):
    expected = engine.generate(PROMPTS, Sampling(8), SEEDS)
    for _ in range(4):
        proxy.next(hang_up, path=COMPLETIONS)
        assert engine.generate(PROMPTS, Sampling(8), SEEDS) == expected


def test_weights_restored_by_another_rank_do_not_hide_that_they_were_lost(
    engine, make, model, proxy, vllm_server, served_dir
):
    """The server restarts, answers with the weights of its start, and has the right ones again before it is asked."""
    expected = engine.generate(PROMPTS, Sampling(8), SEEDS)
    other = make(vllm_server.base_url, rank=1)
    other.sync(model)
    other.generate(PROMPTS[:1], Sampling(1), SEEDS[:1])
    answers = []

    def rule(request, forward):
        load(vllm_server, served_dir, "default")
        answers.append(forward())
        other.generate(PROMPTS[:1], Sampling(1), SEEDS[:1])
        return answers[0]

    proxy.next(rule, path=COMPLETIONS)
    proxy.requests.clear()
    assert engine.generate(PROMPTS[:1], Sampling(8), SEEDS[:1]) == expected[:1]
    assert json.loads(answers[0].body)["choices"][0]["token_ids"] != list(expected[0].token_ids)
    assert proxy.paths().count(COMPLETIONS) == 2
    assert LOAD not in proxy.paths()


@pytest.mark.parametrize("step", [LOAD, "/reset_prefix_cache", "/weight_info", "/update_weight_version"])
def test_a_server_that_restarts_while_it_takes_weights_does_not_get_their_name(
    make, model, proxy, vllm_server, served_dir, step
):
    engine = make()

    def restarted_after(request, forward):
        answer = forward()
        load(vllm_server, served_dir, "default")
        return answer

    # The second of what names: the first says that weights are on their way.
    if step == "/update_weight_version":
        proxy.next(lambda request, forward: forward(), path=step)
    proxy.next(restarted_after, path=step)
    engine.sync(model)
    assert greedy(engine) == greedy_of_transformers(model)


def test_two_ranks_that_restore_one_server_at_once_both_complete_with_its_weights(
    engine, make, model, vllm_server, served_dir
):
    expected = engine.generate(PROMPTS, Sampling(8), SEEDS)
    ranks = [make(vllm_server.base_url, rank=rank) for rank in (1, 2, 3)]
    for rank in ranks:
        rank.sync(model)
        rank.generate(PROMPTS[:1], Sampling(1), SEEDS[:1])
    for _ in range(3):
        load(vllm_server, served_dir, "default")
        with ThreadPoolExecutor(3) as pool:
            results = list(pool.map(lambda rank: rank.generate(PROMPTS, Sampling(8), SEEDS), ranks))
        assert results == [expected] * 3


def test_weights_lost_three_times_in_one_window_are_an_error_that_names_the_server(engine, proxy, vllm_server):
    def rule(request, forward):
        post(vllm_server, "/update_weight_version", {"new_version": "somebody-elses"})
        return forward()

    proxy.next(rule, path=COMPLETIONS, times=None)
    with pytest.raises(GKDServerError, match=f"{proxy.base_url} lost the student's weights 3 times"):
        engine.generate(PROMPTS[:2], Sampling(2), SEEDS[:2])
    assert proxy.paths().count(COMPLETIONS) == 6


def test_weights_of_the_sync_before_are_not_taken_for_the_last_ones(engine, make, student, proxy):
    [server] = engine._servers
    previous = engine._sync.confirmed_version(server)
    assert previous is not None
    model = student(seed=2)
    engine.sync(model)
    post(proxy, "/update_weight_version", {"new_version": previous})
    assert greedy(engine) == greedy_of_transformers(model)
    assert proxy.paths().count(LOAD) == 2


def test_completions_without_weights_sent_are_refused(make, proxy):
    engine = make()
    proxy.requests.clear()
    post(proxy, "/update_weight_version", {"new_version": "default"})
    with pytest.raises(GKDServerError, match=f"{proxy.base_url} has no weights of the student: call sync first"):
        engine.generate(PROMPTS, Sampling(2), SEEDS)
    assert COMPLETIONS not in proxy.paths()


# Servers that answer wrongly


def choice_with(**fields):
    return changed(lambda answer: answer["choices"][0].update(fields))


FAULTS = {
    "status 500": (status(500, b"out of memory"), "status 500: out of memory"),
    "half an answer": (cut_in_half, "without sending complete message body"),
    "an unknown token": (choice_with(token_ids=[5, ROWS, 5, 5]), r"expected token ids in \[0, 360\)"),
    "a padding row": (choice_with(token_ids=[5, VOCABULARY, 5, 5]), r"expected token ids in \[0, 360\)"),
    "a negative token": (choice_with(token_ids=[5, -1, 5, 5]), r"expected token ids in \[0, 360\)"),
    "no tokens": (choice_with(token_ids=[]), "at least one; got"),
    "no token ids": (choice_with(token_ids=None), "choices.0.token_ids: Input should be a valid list"),
    "words": (choice_with(token_ids=["a", "b", "c", "d"]), "choices.0.token_ids.0: Input should be a valid integer"),
    "truth values": (choice_with(token_ids=[True] * 4), "choices.0.token_ids.0: Input should be a valid integer"),
    "a log-prob too few": (
        choice_with(logprobs={"token_logprobs": [-1.0] * 3}),
        "expected 4 finite log-probs, one per token; got 3",
    ),
    "log-probs that are words": (
        choice_with(logprobs={"token_logprobs": ["a"] * 4}),
        "choices.0.logprobs.token_logprobs.0: Input should be a valid number",
    ),
    "too few tokens": (choice_with(token_ids=[5, 5, 5]), "after 4 tokens; got 3 tokens up to 5"),
    "too many tokens": (choice_with(token_ids=[5] * 5), "after 4 tokens; got 5 tokens"),
    "too many tokens up to a stop": (choice_with(token_ids=[5, 5, 5, 5, STOP], finish_reason="stop"), "got 5 tokens"),
    "a stop without a stop token": (
        choice_with(token_ids=[5, 5], finish_reason="stop"),
        "up to 5, finish_reason 'stop'",
    ),
    "another reason": (choice_with(token_ids=[5, 5, 5, 5], finish_reason="abort"), "finish_reason 'abort'"),
    "no reason": (choice_with(token_ids=[5, 5, 5, 5], finish_reason=None), "finish_reason None"),
    "no choice": (changed(lambda answer: answer.update(choices=[])), "choices: List should have at least 1 item"),
    "no JSON": (status(200, b"<html>"), "JSONDecodeError"),
}


@pytest.mark.parametrize(("fault", "cause"), FAULTS.values(), ids=FAULTS.keys())
def test_a_wrong_answer_is_requested_again_and_then_one_error(engine, proxy, fault, cause):
    expected = engine.generate(PROMPTS[:2], Sampling(4), SEEDS[:2])
    proxy.next(fault, path=COMPLETIONS, times=3)
    assert engine.generate(PROMPTS[:2], Sampling(4), SEEDS[:2]) == expected
    proxy.requests.clear()
    proxy.next(fault, path=COMPLETIONS, times=None)
    with pytest.raises(GKDServerError, match=f"{proxy.base_url} did not complete POST {COMPLETIONS}.*{cause}"):
        engine.generate(PROMPTS[:1], Sampling(4), SEEDS[:1])
    assert proxy.paths().count(COMPLETIONS) == 4
    proxy.heal()
    assert engine.generate(PROMPTS[:2], Sampling(4), SEEDS[:2]) == expected


@pytest.mark.parametrize("path", [LOAD, "/reset_prefix_cache", "/update_weight_version"])
def test_a_sync_that_fails_in_any_step_is_tried_again_and_then_an_error(make, model, proxy, path):
    engine = make()
    proxy.next(status(500), path=path, times=3)
    engine.sync(model)
    assert greedy(engine) == greedy_of_transformers(model)
    proxy.next(status(500), path=path, times=None)
    with pytest.raises(GKDServerError, match=f"did not complete POST {path}"):
        engine.sync(model)


def test_a_server_that_takes_the_weights_only_in_part_does_not_hold_them(make, model, student, proxy):
    engine = make()
    engine.sync(student(seed=2))
    proxy.next(status(500), path="/update_weight_version", times=None)
    with pytest.raises(GKDServerError, match="update_weight_version"):
        engine.sync(model)
    proxy.heal()
    assert greedy(engine) == greedy_of_transformers(model)


# Servers that were not started for this


def test_a_port_that_nobody_listens_on_ends_within_the_time_out(make):
    url = f"http://127.0.0.1:{free_port()}"
    started = time.monotonic()
    with pytest.raises(GKDServerError, match=f"{url} did not complete GET /v1/models"):
        make(url, server_timeout=0.5)
    assert 0.5 <= time.monotonic() - started < 2


def test_a_server_without_its_developers_endpoints_is_refused_with_the_remedy(make, proxy):
    proxy.next(status(404), path=VERSION, times=None)
    with pytest.raises(GKDConfigError, match=rf"{proxy.base_url} takes no weights: .*VLLM_SERVER_DEV_MODE=1.*404"):
        make()


def test_servers_of_different_models_are_refused(make, proxy, vllm_server):
    with FaultyProxy(vllm_server.base_url) as second:
        second.next(changed(lambda answer: answer["data"][0].update(id="other")), path="/v1/models")
        with pytest.raises(GKDConfigError, match=f"under one name; got {vllm_server.model}, other"):
            make([proxy.base_url, second.base_url])


def served_with(hf_overrides, device="cpu"):
    def change(answer):
        answer["vllm_config"]["model_config"]["hf_overrides"] = hf_overrides
        answer["vllm_config"]["device_config"]["device"] = device

    return changed(change)


UNTIED = {"tie_word_embeddings": False}


def test_a_server_on_cpus_that_ties_the_head_is_refused_with_the_remedy(make, student, proxy):
    with pytest.raises(
        GKDConfigError,
        match=rf"{proxy.base_url} ties the head.*packed copy.*--hf-overrides '{{\"tie_word_embeddings\": false}}'",
    ):
        make().sync(student(tie_word_embeddings=True))
    assert LOAD not in proxy.paths()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_tied_student_is_taken_by_servers_that_keep_its_head_right(make, student, proxy):
    tied = student(head_scale=2.0, tie_word_embeddings=True)
    untying = adapted(student(tie_word_embeddings=True), copy.deepcopy(ADAPTERS["LoRA on the head"]))
    proxy.next(served_with(UNTIED), path="/server_info")
    engine = make()
    engine.sync(tied)
    assert greedy(engine) == greedy_of_transformers(tied)
    proxy.next(served_with({}, device="cuda"), path="/server_info")
    make().sync(tied)
    proxy.next(served_with({}, device="cuda"), path="/server_info")
    with pytest.raises(GKDConfigError, match="the adapter changes only the embeddings or only the head"):
        make().sync(untying)
    proxy.next(served_with(UNTIED, device="cuda"), path="/server_info")
    engine = make()
    engine.sync(untying)
    assert greedy(engine) == greedy_of_transformers(untying)


@pytest.fixture
def adapter_server():
    """Stands in for a server with --enable-lora, which answers in plain text; on a CPU a real one takes too long."""
    adapters = {}

    def rule(request, forward):
        name = (request.json or {}).get("lora_name")
        if request.path == "/v1/load_lora_adapter":
            adapters[name] = request.json["lora_path"]
            return Answer(200, b"Success: LoRA adapter added")
        if request.path == "/v1/unload_lora_adapter":
            return Answer(200, b"Success") if adapters.pop(name, None) else Answer(404, b'{"error": "not found"}')
        if request.path == COMPLETIONS:
            held = request.json["model"] in adapters
            choice = {"token_ids": [5, 5], "finish_reason": "length"}
            return Answer(200, json.dumps({"choices": [choice]}).encode()) if held else Answer(404, b"no such model")
        cards = [{"id": "base", "root": "/base", "max_model_len": 64}]
        cards += [{"id": name, "root": folder, "max_model_len": None} for name, folder in adapters.items()]
        return Answer(200, json.dumps({"data": cards}).encode())

    with FaultyProxy("http://127.0.0.1:9") as server:
        server.next(rule, times=None)
        server.adapters = adapters
        yield server


def test_an_adapter_replaces_the_previous_one(make, student, adapter_server):
    model = adapted(student(), copy.deepcopy(ADAPTERS["LoRA"]))
    engine = make(adapter_server.base_url, weight_sync="adapter")
    names = []
    for _ in range(2):
        engine.sync(model)
        [(name, folder)] = adapter_server.adapters.items()
        names.append(name)
        assert {path.name for path in Path(folder).iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
        greedy(engine, PROMPTS[:1], length=2)
        assert adapter_server.requests[-2].json["model"] == name
    assert names[0] != names[1]
    other = make(adapter_server.base_url, weight_sync="adapter", rank=1)
    other.sync(model)
    greedy(other, PROMPTS[:1], length=2)
    assert adapter_server.adapters.keys() == {names[1]}


def test_a_server_that_lost_the_adapter_gets_it_again(make, student, adapter_server):
    engine = make(adapter_server.base_url, weight_sync="adapter")
    engine.sync(adapted(student(), copy.deepcopy(ADAPTERS["LoRA"])))
    before = dict(adapter_server.adapters)
    adapter_server.adapters.clear()
    greedy(engine, PROMPTS[:2], length=2)
    assert adapter_server.adapters == before


def test_a_student_without_plain_lora_sends_no_adapter(make, student, adapter_server):
    engine = make(adapter_server.base_url, weight_sync="adapter")
    for model in (student(), adapted(student(), copy.deepcopy(ADAPTERS["DoRA"]))):
        with pytest.raises(GKDConfigError, match="'adapter' needs a student with one plain LoRA adapter"):
            engine.sync(model)
    assert adapter_server.adapters == {}
