"""Tests that start their own vLLM servers, or restart one: run by `make test-servers`."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gkd_trainer.rollouts import HFRollouts, VLLMServerRollouts
from gkd_trainer.types import Sampling
from tests.serving import VLLMProcess

pytestmark = pytest.mark.servers

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14], [15], [16, 17, 18, 19, 20, 21, 22], [23, 24, 25]]
SEEDS = [101, 102, 103, 104, 105, 106]
STOP, VOCABULARY = 2, 360


@pytest.fixture(scope="module")
def adapter_server(served_dir, tmp_path_factory):
    """A server of the served model that takes LoRA adapters."""
    server = VLLMProcess(
        served_dir,
        tmp_path_factory.mktemp("vllm") / "adapters.log",
        *("--enable-lora", "--max-lora-rank", "8"),
        environment={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_SERVER_DEV_MODE": "0"},
    )
    server.start()
    yield server
    server.kill()


@pytest.fixture
def student(tiny_model):
    """The model that the servers started with, with an adapter that changes what it says."""
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"])
    student = get_peft_model(tiny_model(hidden=128), config)
    change(student)
    return student


def change(student):
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)


def greedy(engine):
    return engine.generate(PROMPTS, Sampling(10, temperature=0.0), [0] * len(PROMPTS))


def greedy_of_transformers(model):
    engine = HFRollouts([STOP], pad_token_id=STOP, vocab_size=VOCABULARY)
    engine.sync(model)
    return greedy(engine)


def assert_log_probs_are_those_of(model, completions):
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = list(completion.token_ids)
        with torch.no_grad():
            log_p_LV = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert completion.log_probs == pytest.approx(log_p_LV[torch.arange(len(ids)), ids].tolist(), abs=1e-2)


@pytest.mark.usefixtures("ranks_of_one_process")
def test_sending_only_an_adapter_gives_the_adapted_model_after_every_sync_and_a_restart(adapter_server, student):
    engine = VLLMServerRollouts(adapter_server.base_url, [STOP], VOCABULARY, weight_sync="adapter")
    other = VLLMServerRollouts(adapter_server.base_url, [STOP], VOCABULARY, weight_sync="adapter", rank=1)
    seen = []
    with student.disable_adapter():
        seen.append(greedy_of_transformers(student))
    for _ in range(3):
        change(student)
        engine.sync(student)
        other.sync(student)
        expected = greedy_of_transformers(student)
        assert expected not in seen
        assert greedy(engine) == greedy(other) == expected
        seen.append(expected)
    adapter_server.kill()
    adapter_server.start()
    assert greedy(engine) == expected
    assert_log_probs_are_those_of(student, engine.generate(PROMPTS, Sampling(10), SEEDS))


def test_a_server_that_was_killed_and_started_again_gets_the_weights_again(vllm_server, tiny_model):
    model = tiny_model(hidden=128, seed=1)
    engine = VLLMServerRollouts(vllm_server.base_url, [STOP], VOCABULARY)
    engine.sync(model)
    expected = engine.generate(PROMPTS, Sampling(8), SEEDS)
    vllm_server.kill()
    vllm_server.start()
    assert engine.generate(PROMPTS, Sampling(8), SEEDS) == expected
    assert greedy(engine) == greedy_of_transformers(model)
