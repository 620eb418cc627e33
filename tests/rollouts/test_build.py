"""Options become the right engine, or an error that says why not."""

from types import SimpleNamespace

import pytest
import torch
from transformers import MBartConfig, MBartForConditionalGeneration

from gkd_trainer import GKDArguments
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.rollouts import (
    HFRollouts,
    VLLMServerRollouts,
    build,
    build_student_engine,
    build_teacher_engine,
    find_stop_ids,
    refuse_engine,
    sampled_vocabulary_size,
)
from gkd_trainer.types import Sampling

TOKENS = {"stop_ids": [2, 5], "pad_token_id": 0, "vocab_size": 365, "never_sampled": {7}}
URL = "http://127.0.0.1:9"


class Recorded:
    """Stands in for an engine of vLLM's, and keeps what it was built with."""

    def __init__(self, *arguments, **options):
        self.arguments, self.options = arguments, options


@pytest.fixture
def recorded(monkeypatch):
    for name in ("VLLMServerRollouts", "VLLMColocateRollouts"):
        monkeypatch.setattr(build, name, type(name, (Recorded,), {}))


@pytest.mark.parametrize(
    ("model_eos", "tokenizer_eos", "expected"),
    [(None, None, []), (4, None, [4]), (4, 2, [2, 4]), ([7, 4], 4, [4, 7]), (None, 0, [0])],
)
def test_stop_ids_are_those_of_the_generation_config_and_the_tokenizer(model_eos, tokenizer_eos, expected):
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=model_eos))
    assert find_stop_ids(model, SimpleNamespace(eos_token_id=tokenizer_eos)) == expected


def test_a_model_without_a_generation_config_and_tokenizer_has_no_stop_ids():
    assert find_stop_ids(torch.nn.Linear(2, 2)) == []


@pytest.mark.parametrize(
    ("shared_size", "vocabulary", "expected"),
    [(368, {"a": 0, "b": 364}, 365), (300, {"a": 0, "b": 364}, 300), (368, None, 368)],
)
def test_only_tokens_that_exist_and_are_compared_are_sampled(shared_size, vocabulary, expected):
    assert sampled_vocabulary_size(shared_size, vocabulary) == expected


def test_an_encoder_decoder_generates_with_transformers_unsharded(tiny_encoder_decoder, tiny_model):
    model, on_policy = tiny_encoder_decoder(), GKDArguments(lmbda=1.0)
    refuse_engine(None, on_policy, model, is_sharded=False)
    refuse_engine(None, GKDArguments(lmbda=0.0), model, is_sharded=True)
    refuse_engine(None, GKDArguments(use_vllm=True), tiny_model(), is_sharded=True)
    with pytest.raises(GKDConfigError, match="T5ForConditionalGeneration is an encoder-decoder, and vLLM only"):
        refuse_engine(None, GKDArguments(use_vllm=True), model, is_sharded=False)
    server = VLLMServerRollouts.__new__(VLLMServerRollouts)
    with pytest.raises(GKDConfigError, match="vLLM only generates with causal LMs here: set use_vllm=False"):
        refuse_engine(server, on_policy, model, is_sharded=False)
    sizes = {"d_model": 8, "vocab_size": 9, "encoder_layers": 1, "decoder_layers": 1}
    mbart = MBartForConditionalGeneration(MBartConfig(**sizes, encoder_attention_heads=1, decoder_attention_heads=1))
    refuse_engine(None, GKDArguments(lmbda=0.0), mbart, is_sharded=False)
    with pytest.raises(GKDConfigError, match=r"puts the last label of a sample before the first.*generate nothing"):
        refuse_engine(None, on_policy, mbart, is_sharded=False)
    with pytest.raises(GKDConfigError, match=r"whose weights are sharded .*Generate nothing \(lmbda=0"):
        refuse_engine(None, on_policy, model, is_sharded=True)


def test_without_vllm_transformers_generates_with_these_limits(tiny_model):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[365:] *= 50
    engine = build_student_engine(GKDArguments(lmbda=1.0), model, **TOKENS)
    assert isinstance(engine, HFRollouts)
    engine.sync(model)
    completions = engine.generate([[7, 8], [9]] * 20, Sampling(8), list(range(40)))
    for completion in completions:
        assert max(completion.token_ids) < 365
        assert completion.is_finished == (completion.token_ids[-1] in (2, 5))


@pytest.mark.parametrize(
    ("options", "named"), [({"lmbda": 0.5}, r"lmbda=0\.5"), ({"lmbda": 0.0, "eval_on_policy": True}, "eval_on_policy")]
)
def test_a_student_that_can_not_generate_is_refused_if_it_must(options, named):
    student = torch.nn.Linear(2, 2)
    with pytest.raises(GKDConfigError, match=f"{named}.* makes the student generate, but Linear can't"):
        build_student_engine(GKDArguments(**options), student, **TOKENS)
    assert build_student_engine(GKDArguments(lmbda=0.0), student, **TOKENS)


def test_an_engine_of_vllm_is_built_only_if_it_may_generate(recorded, tiny_model):
    args = GKDArguments(use_vllm=True, lmbda=0.0)
    assert type(build_student_engine(args, tiny_model(), **TOKENS, may_generate=False)) is HFRollouts
    assert type(build_student_engine(args, tiny_model(), **TOKENS, may_generate=True)) is not HFRollouts


@pytest.mark.parametrize(("sync", "is_refused"), [("auto", True), ("full", True), ("nccl", True), ("adapter", False)])
def test_a_quantised_student_is_refused_where_servers_would_get_all_its_weights(recorded, tiny_model, sync, is_refused):
    student = tiny_model()
    student.is_quantized = True
    args = GKDArguments(use_vllm=True, vllm_mode="server", vllm_server_base_url=URL, vllm_weight_sync=sync)
    if is_refused:
        with pytest.raises(GKDConfigError, match=r"weights are quantised .*vllm_weight_sync='adapter' with a server"):
            build_student_engine(args, student, **TOKENS)
    else:
        assert build_student_engine(args, student, **TOKENS)


@pytest.mark.parametrize("mode", ["server", "colocate"])
def test_vllm_under_the_first_version_of_fsdp_is_refused(recorded, mode):
    args = GKDArguments(use_vllm=True, vllm_mode=mode, vllm_server_base_url=URL if mode == "server" else None)
    student = torch.nn.Linear(2, 2)
    with pytest.raises(GKDConfigError, match="but FSDP 1 stores them flattened together: set fsdp_version: 2"):
        build_student_engine(args, student, **TOKENS, fsdp_version=1, is_sharded=True)
    assert build_student_engine(args, student, **TOKENS, fsdp_version=2, is_sharded=True)


def test_the_options_of_servers_reach_their_engine(recorded):
    args = GKDArguments(
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=URL,
        vllm_server_api_token="key",
        vllm_server_timeout=3.0,
        vllm_request_timeout=4.0,
        vllm_weight_sync="full",
        vllm_sync_dir="/shared",
        max_length=99,
    )
    engine = build_student_engine(args, torch.nn.Linear(2, 2), **TOKENS, rank=3)
    assert type(engine).__name__ == "VLLMServerRollouts"
    assert engine.arguments == (args.vllm_server_base_url, [2, 5], 365)
    assert engine.options == {
        "never_sampled": {7},
        "api_token": "key",
        "server_timeout": 3.0,
        "request_timeout": 4.0,
        "weight_sync": "full",
        "sync_dir": "/shared",
        "max_length": 99,
        "rank": 3,
    }


def test_the_options_of_an_engine_in_this_process_reach_it(recorded):
    args = GKDArguments(
        use_vllm=True,
        vllm_gpu_memory_utilization=0.5,
        vllm_tensor_parallel_size=2,
        vllm_engine_kwargs={"enforce_eager": True},
        max_length=99,
    )
    student = torch.nn.Linear(2, 2)
    engine = build_student_engine(args, student, **TOKENS, dtype=torch.bfloat16, trust_remote_code=True)
    assert type(engine).__name__ == "VLLMColocateRollouts"
    assert engine.arguments == (student, [2, 5], 365)
    assert engine.options == {
        "never_sampled": {7},
        "dtype": torch.bfloat16,
        "max_model_length": 99,
        "gpu_memory_utilization": 0.5,
        "tensor_parallel_size": 2,
        "enable_sleep_mode": False,
        "weight_sync": "auto",
        "trust_remote_code": True,
        "engine_kwargs": {"enforce_eager": True},
    }


@pytest.mark.parametrize(
    ("option", "is_sharded", "expected"),
    [("auto", True, "full"), ("auto", False, "auto"), ("adapter", True, "adapter")],
)
def test_a_sharded_student_sends_full_weights_unless_told(recorded, option, is_sharded, expected):
    args = GKDArguments(use_vllm=True, vllm_weight_sync=option)
    engine = build_student_engine(args, torch.nn.Linear(2, 2), **TOKENS, is_sharded=is_sharded)
    assert engine.options["weight_sync"] == expected


def test_a_teachers_completions_end_at_its_own_stop_ids_too(tiny_model):
    teacher = tiny_model(eos=[11, 12])
    engine = build_teacher_engine(GKDArguments(seq_kd=True, lmbda=0.0), teacher, **TOKENS)
    completions = engine.generate([[7, 8]] * 300, Sampling(20, temperature=3.0), list(range(300)))
    last = {completion.token_ids[-1] for completion in completions if completion.is_finished}
    assert {2, 5} & last
    assert {11, 12} & last
    assert last <= {2, 5, 11, 12}
