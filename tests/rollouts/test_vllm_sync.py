"""The folder of weights for servers, and the servers' versions of them."""

import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from gkd_trainer.errors import GKDConfigError
from gkd_trainer.rollouts import VLLMServerRollouts
from gkd_trainer.rollouts.vllm_sync import FullSync, shared_folder
from gkd_trainer.types import Sampling
from gkd_trainer.vllm_client import VLLMServer
from tests.models.test_weights import adapted
from tests.rollouts.test_mixing_images import IDS, MODELS, TEXT
from tests.serving import Answer, FaultyProxy, status


class Fake(FaultyProxy):
    """A server of a base model that loads and unloads adapters and completes anything with one token."""

    def __init__(self):
        super().__init__("http://127.0.0.1:9")
        self.adapters, self.version, self.environment = {}, "default", {}
        self.next(self._served, times=None)

    def restart(self):
        self.adapters.clear()
        self.version = "default"

    def _served(self, request, forward):
        if request.path in ("/weight_info", "/update_weight_version"):
            self.version = (request.json or {}).get("new_version", self.version)
            answer = {"weight_version": self.version, "success": True}
        elif request.path.startswith("/server_info") and self.environment is None:
            return status(404)(request, forward)
        elif request.path.startswith("/server_info"):
            config = {"device_config": {"device": "cuda"}, "model_config": {"hf_overrides": {}}}
            answer = {"vllm_config": config, "vllm_env": self.environment}
        elif request.path in ("/collective_rpc", "/reset_prefix_cache?reset_external=true"):
            answer = {"results": [None]}
        elif request.path == "/v1/models":
            served = {"base": "/base", **self.adapters}
            answer = {"data": [{"id": name, "root": root, "max_model_len": 64} for name, root in served.items()]}
        elif request.path == "/v1/load_lora_adapter":
            self.adapters[request.json["lora_name"]] = request.json["lora_path"]
            return Answer(200, b"loaded")
        elif request.path == "/v1/unload_lora_adapter":
            self.adapters.pop(request.json["lora_name"], None)
            return Answer(200, b"unloaded")
        elif request.json["model"] not in {"base": "", **self.adapters}:
            return status(404)(request, forward)
        else:
            log_probs = {"token_logprobs": [-1.0]}
            choice = {"index": 0, "text": "", "token_ids": [2], "finish_reason": "stop", "logprobs": log_probs}
            answer = {"choices": [choice]}
        return Answer(200, json.dumps(answer).encode())


@pytest.fixture
def fake():
    with Fake() as server:
        yield server


@pytest.fixture
def student(tiny_model):
    return adapted(tiny_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4))


def engine_of(*servers, **options):
    urls = [server.base_url for server in servers]
    options = {"weight_sync": "adapter", "server_timeout": 2.0, "request_timeout": 5.0, **options}
    return VLLMServerRollouts(urls, [2], 360, **options)


@pytest.mark.parametrize("weight_sync", ["full", "adapter"])
def test_a_server_that_restarts_before_another_rank_asks_it_first_gets_the_weights_from_there(
    fake, student, ranks_of_one_process, weight_sync
):
    first, other = (engine_of(fake, weight_sync=weight_sync, rank=rank) for rank in (0, 1))
    for _ in range(2):
        first.sync(student)
        other.sync(student)
        held = dict(fake.adapters), fake.version.rpartition("#")[0]
        fake.restart()
        assert other.generate([[5, 6]], Sampling(2), [0])
        assert (fake.adapters, fake.version.rpartition("#")[0]) == held


@pytest.mark.parametrize("weight_sync", ["full", "adapter"])
def test_weights_of_another_run_are_not_taken_for_those_of_rank_0(fake, student, ranks_of_one_process, weight_sync):
    first, other = (engine_of(fake, weight_sync=weight_sync, rank=rank) for rank in (0, 1))
    first.sync(student)
    other.sync(student)
    fake.restart()
    fake.adapters["gkd-student-z-weights-000009"], fake.version = "/z/weights-000009", "/z/weights-000009#1"
    [server] = other._servers
    assert other._sync.confirmed_version(server) is None


def test_other_ranks_do_not_wait_for_a_rank_0_that_failed(fake, tiny_model, monkeypatch):
    said = []
    monkeypatch.setattr("gkd_trainer.rollouts.vllm_sync._from_rank_0", said.append)
    with pytest.raises(GKDConfigError, match="needs a student with one plain LoRA adapter"):
        engine_of(fake).sync(tiny_model())
    assert len(said) == 1


@pytest.mark.parametrize("is_silent", [False, True])
def test_more_logit_biases_than_vllm_takes_on_a_gpu_are_named_once_before_they_are_sent(
    fake, student, caplog, is_silent
):
    if is_silent:  # without its development mode
        fake.environment = None
    engine = engine_of(fake, never_sampled=range(400, 400 + 1024 - 8))  # and 8 rows of padding
    engine.sync(student)
    engine.generate([[5, 6]], Sampling(2), [0])
    assert not caplog.records
    for _ in range(2):
        engine.generate([[5, 6]], Sampling(2, extra={"logit_bias": {"5": 1.0}}), [0])
    assert caplog.text.count("but 1025 are needed") == 1
    assert "VLLM_USE_V2_MODEL_RUNNER=0" in caplog.text


@pytest.mark.parametrize("uses_v2", [True, False])
def test_more_logit_biases_than_a_server_takes_by_its_own_word_are_refused(fake, student, caplog, uses_v2):
    fake.environment["VLLM_USE_V2_MODEL_RUNNER"] = uses_v2
    engine = engine_of(fake, never_sampled=range(400, 400 + 1025))
    engine.sync(student)
    for _ in range(2):
        if uses_v2:
            with pytest.raises(GKDConfigError, match=rf"but 10\d\d are needed.*{fake.base_url} has VLLM_USE_V2_MODEL"):
                engine.generate([[5, 6]], Sampling(2), [0])
        else:
            assert engine.generate([[5, 6]], Sampling(2), [0])
    assert not caplog.records
    assert sum(path.startswith("/server_info") for path in fake.paths()) == (2 if uses_v2 else 1)


@pytest.mark.parametrize("url", ["http://10.1.2.3:8000", "http://gpu-node:8000", "http://[2001:db8::1]:8000"])
def test_a_server_that_may_be_elsewhere_needs_a_folder_that_both_see(url, tmp_path):
    with pytest.raises(GKDConfigError, match=f"{re.escape(url)} may be on another machine.*set vllm_sync_dir"):
        shared_folder(None, ["http://localhost:8000", url])
    assert shared_folder(str(tmp_path), [url]).path.parent == tmp_path


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://localhost:8000", "http://[::1]:8000"])
def test_a_server_on_this_machine_needs_none(url):
    assert shared_folder(None, [url]).path.parent == Path("/dev/shm")


@pytest.mark.parametrize("family", MODELS)
def test_a_server_of_a_vision_language_model_is_asked_whether_its_head_is_stale(family, monkeypatch):
    monkeypatch.setattr("gkd_trainer.rollouts.vllm_sync.weight_version", lambda server: "default")
    info = {"device_config": {"device": "cpu"}, "model_config": {"hf_overrides": {}}}
    model_class, config_class, vision = MODELS[family]
    for is_tied in (False, True):
        config = config_class(text_config=TEXT, vision_config=vision, **{**IDS, "tie_word_embeddings": is_tied})
        server = VLLMServer("http://127.0.0.1:9")
        monkeypatch.setattr(server, "get", lambda path, parse: parse({"vllm_config": info}))
        check = pytest.raises(GKDConfigError, match="ties the head to the embeddings") if is_tied else nullcontext()
        with check:
            FullSync([server], None)._refuse_stale_head(server, model_class(config))


def test_a_rank_that_finds_a_server_unfit_still_takes_part_in_what_the_others_gather(monkeypatch, tmp_path):
    def refuse(self, server, model):
        raise GKDConfigError("its head would not follow")

    gathered = []
    monkeypatch.setattr("gkd_trainer.rollouts.vllm_sync.gather_weights", gathered.append)
    monkeypatch.setattr("gkd_trainer.rollouts.vllm_sync.weight_version", lambda server: "default")
    monkeypatch.setattr(FullSync, "_refuse_stale_head", refuse)
    model = torch.nn.Linear(1, 1)
    sync = FullSync([VLLMServer("http://127.0.0.1:9")], None)
    with pytest.raises(GKDConfigError, match="would not follow"):
        sync._write(model, tmp_path)
    assert gathered == [model]
