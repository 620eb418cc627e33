"""Weights from GPU to GPU, as far as a CPU allows: the weights to send, and the requests to the servers."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig

from gkd_trainer.errors import GKDConfigError, GKDServerError
from gkd_trainer.models.weights import checkpoint_weights
from gkd_trainer.rollouts import VLLMServerRollouts
from gkd_trainer.rollouts.vllm_nccl import NCCLSync, _Client, _Source
from gkd_trainer.vllm_client import VLLMServer
from tests.models.test_weights import adapted
from tests.serving import Answer, FaultyProxy, status

pytestmark = pytest.mark.usefixtures("short_waits")


@pytest.fixture
def fake():
    """A server that says yes to everything, and remembers the version of the weights that it was told."""
    held = {"weight_version": "default", "world_size": 2, "success": True}

    def rule(request, forward):
        if request.path == "/update_weight_version":
            held["weight_version"] = request.json["new_version"]
        return Answer(200, json.dumps(held).encode())

    with FaultyProxy("http://127.0.0.1:9") as server:
        server.next(rule, times=None)
        server.held, server.rule = held, rule
        yield server


def client(server):
    return VLLMServer(server.base_url, server_timeout=2.0, request_timeout=10.0)


def asked(server):
    return [(request.method, request.path, request.json) for request in server.requests]


STUDENTS = {
    "untied": (False, None),
    "tied": (True, None),
    "LoRA": (False, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4)),
    "LoRA, tied": (True, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4)),
}


@pytest.mark.parametrize(("is_tied", "config"), STUDENTS.values(), ids=STUDENTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_source_announces_what_it_then_yields_each_time(tiny_model, is_tied, config, dtype):
    source = _Source()
    model = tiny_model(tie_word_embeddings=is_tied).to(dtype)
    source.model = model if config is None else adapted(model, config)
    announced = [(meta.name, meta.dtype, meta.shape) for meta in source.metadata()]
    for _ in range(2):
        assert [(name, weight.dtype, tuple(weight.shape)) for name, weight in source] == announced
    assert {dtype for _, dtype, _ in announced} == {dtype}
    assert len({name for name, _, _ in announced}) == len(announced)
    weights = dict(source)
    assert all(torch.equal(weight, weights[name]) for name, weight in checkpoint_weights(source.model))
    assert "lm_head.weight" in weights


def test_the_source_follows_the_models_weights(tiny_model):
    source = _Source()
    source.model = tiny_model()
    with torch.no_grad():
        source.model.lm_head.weight.add_(1.0)
    assert torch.equal(dict(source)["lm_head.weight"], source.model.lm_head.weight)


def test_the_client_has_the_calls_of_vllms_own_and_asks_the_endpoints_behind_them(fake):
    from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient

    ours = _Client(client(fake))
    assert isinstance(ours, VLLMWeightSyncClient)
    ours.init_weight_transfer_engine({"master_port": 5})
    ours.start_weight_update()
    ours.update_weights({"names": ["a"]})
    ours.finish_weight_update()
    ours.finish_weight_update("v2")
    assert asked(fake) == [
        ("POST", "/init_weight_transfer_engine", {"init_info": {"master_port": 5}}),
        ("POST", "/start_weight_update", {}),
        ("POST", "/update_weights", {"update_info": {"names": ["a"]}}),
        ("POST", "/finish_weight_update", {"weight_version": None}),
        ("POST", "/finish_weight_update", {"weight_version": "v2"}),
    ]


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("init_weight_transfer_engine", ({"master_port": 5},)),
        ("start_weight_update", ()),
        ("update_weights", ({"names": ["a"]},)),
        ("finish_weight_update", ("v2",)),
    ],
)
def test_each_call_is_sent_once_although_others_of_its_server_are_repeated(fake, call, arguments):
    fake._rules.clear()
    fake.next(status(500, b"no peer"), times=None)
    server = client(fake)
    with pytest.raises(GKDServerError, match=f"POST /{call}, which can't be sent twice"):
        getattr(_Client(server), call)(*arguments)
    assert fake.paths() == [f"/{call}"]
    with pytest.raises(GKDServerError, match="gave up after 4 attempts"):
        server.get("/get_world_size", lambda answer: answer)
    assert fake.paths() == [f"/{call}", *["/get_world_size"] * 4]


@pytest.fixture
def sync(fake, monkeypatch):
    """NCCLSync whose broadcast is a note in `fake.requests`."""
    sync = NCCLSync([client(fake)])
    engine = SimpleNamespace(send_weights=lambda: sync._servers[0].post("/broadcast", None, lambda answer: answer))
    monkeypatch.setattr(sync, "_connected", lambda server: engine)
    return sync


def test_weights_get_their_name_after_they_were_sent_and_a_new_one_each_time(sync, fake, tiny_model):
    sync.send(tiny_model())
    sync.send(tiny_model(seed=1))
    naming = "/update_weight_version"
    assert fake.paths() == [naming, "/broadcast", "/reset_prefix_cache?reset_external=true", "/weight_info", naming] * 2
    names = [request.json["new_version"] for request in fake.requests if request.path == naming]
    loading, first, _, second = names
    assert loading == f"loading:{first}"
    assert first != second
    assert sync.confirmed_version(sync._servers[0]) == second
    fake.held["weight_version"] = first
    assert sync.confirmed_version(sync._servers[0]) is None


def test_the_device_has_finished_the_weights_before_they_are_sent(sync, fake, tiny_model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: sync._servers[0].post_unread("/synchronize", None))
    sync.send(tiny_model())
    paths = [path for path in fake.paths() if path in ("/synchronize", "/broadcast")]
    assert paths == ["/synchronize", "/broadcast"]


def test_a_server_that_was_restarted_while_it_took_weights_gets_no_name(sync, fake, tiny_model):
    def restarted(request, forward):
        fake.held["weight_version"] = "default"
        return Answer(200, b"{}")

    fake._rules.clear()
    fake.next(restarted, path="/broadcast")
    fake.next(fake.rule, times=None)
    with pytest.raises(GKDServerError, match=f"{fake.base_url} restarted while it loaded weights"):
        sync.send(tiny_model())
    assert fake.held["weight_version"] == "default"


class _Broadcasting:
    """vLLM's own driver of a transfer, whose broadcast, which takes GPUs, is left out."""

    def __init__(self, server, source):
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

        class Engine(NCCLTrainerWeightTransferEngine):
            def _broadcast(self, source, meta):
                assert [name for name, _ in source] == [each.name for each in meta]

        self.send_weights = Engine(client=_Client(server), source=source).send_weights


@pytest.mark.parametrize("failing", ["/start_weight_update", "/update_weights", "/finish_weight_update"])
def test_a_failed_step_of_a_transfer_is_not_sent_again(fake, tiny_model, monkeypatch, failing):
    sync = NCCLSync([client(fake)])
    monkeypatch.setattr(sync, "_connected", lambda server: _Broadcasting(server, sync._source))
    sync.send(tiny_model())
    steps = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
    assert [path for path in fake.paths() if path in steps] == steps
    fake._rules.clear()
    fake.next(status(500, b"no peer"), path=failing, times=None)
    fake.next(fake.rule, times=None)
    fake.requests.clear()
    with pytest.raises(GKDServerError, match=f"{fake.base_url} did not complete POST {failing}, which can't be sent"):
        sync.send(tiny_model())
    assert fake.paths().count(failing) == 1
    assert sync.confirmed_version(sync._servers[0]) is None


def test_a_failure_of_the_transfer_is_an_error_of_ours(sync, fake, tiny_model, monkeypatch):
    def fail():
        raise RuntimeError("NCCL error: unhandled system error")

    monkeypatch.setattr(sync, "_connected", lambda server: SimpleNamespace(send_weights=fail))
    with pytest.raises(GKDServerError, match=rf"{fake.base_url} over NCCL failed with RuntimeError: NCCL error"):
        sync.send(tiny_model())


def test_a_rank_that_can_not_connect_still_takes_part_in_what_the_others_gather(sync, tiny_model, monkeypatch):
    gathered = []
    monkeypatch.setattr("gkd_trainer.rollouts.vllm_nccl.gather_weights", gathered.append)
    monkeypatch.setattr(sync, "_engines", [])
    monkeypatch.setattr(sync, "_connected", lambda server: (_ for _ in ()).throw(GKDConfigError("no NCCL")))
    model = tiny_model()
    with pytest.raises(GKDConfigError, match="no NCCL"):
        sync._send(model)
    assert gathered == [model, model]  # the metadata, and the tensors


def test_another_rank_takes_the_name_that_the_server_holds(sync, fake, tiny_model):
    sync.send(tiny_model())
    other = NCCLSync([client(fake)])
    other.assist(tiny_model())
    assert other.confirmed_version(other._servers[0]) == sync._version
    fake.held["weight_version"] = "default"
    assert other.confirmed_version(other._servers[0]) is None


def test_a_server_that_lost_the_weights_ends_the_run_with_the_remedy(sync, fake, tiny_model):
    sync.send(tiny_model())
    with pytest.raises(GKDServerError, match=f"{fake.base_url} no longer holds.*vllm_weight_sync='full' survives that"):
        sync.restore(sync._servers[0])


def test_padding_rows_are_known_after_the_weights_were_sent(sync, tiny_model):
    assert list(sync.padding_ids(366)) == []
    sync.send(tiny_model())
    assert list(sync.padding_ids(366)) == [366, 367]


def test_a_server_that_was_not_started_for_it_is_refused_with_the_remedy(vllm_server, served_model, monkeypatch):
    engine = VLLMServerRollouts(vllm_server.base_url, [2], 368, server_timeout=5, weight_sync="nccl")
    with pytest.raises(GKDConfigError, match='"nccl" needs a CUDA device to send from; there is none: use "full"'):
        engine.sync(served_model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    remedy = (
        rf"{vllm_server.base_url} takes no weights over NCCL: .*--weight-transfer-config '{{\"backend\": \"nccl\"}}'"
    )
    with pytest.raises(GKDConfigError, match=remedy):
        engine.sync(served_model)
    with FaultyProxy(vllm_server.base_url) as proxy:
        proxy.next(status(404), path="/server_info", times=None)
        engine = VLLMServerRollouts(proxy.base_url, [2], 368, server_timeout=5, weight_sync="nccl")
        with pytest.raises(GKDConfigError, match="VLLM_SERVER_DEV_MODE=1"):
            engine.sync(served_model)
