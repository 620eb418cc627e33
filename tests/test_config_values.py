"""Values of the options, one by one: ranges, types, choices, and those given as JSON or URLs."""

import dataclasses

import numpy as np
import pytest

from gkd_trainer.config import GKDArguments
from gkd_trainer.errors import GKDConfigError

NAN, INF = float("nan"), float("inf")

OUT_OF_RANGE = [
    ("beta", [-0.1, 1.5, NAN], "in [0, 1]"),
    ("lmbda", [-0.1, 1.01, NAN], "in [0, 1]"),
    ("lmbda_end", [-0.1, 1.01], "in [0, 1]"),
    ("ce_weight", [-0.1, 1.01], "in [0, 1]"),
    ("temperature", [0, -1.0, NAN, INF], "above 0 and finite"),
    ("loss_temperature", [0, -1.0, NAN, INF], "above 0 and finite"),
    ("top_p", [0.0, 1.01], "in (0, 1]"),
    ("top_k", [-1], "0 (keeps every token) or more"),
    ("min_p", [-0.1, 1.01], "in [0, 1]"),
    ("repetition_penalty", [0.0, -1.0, NAN, INF], "above 0 and finite"),
    ("max_new_tokens", [0, -5], "at least 1"),
    ("rollout_batch_size", [0], "at least 1"),
    ("max_length", [1, 0], "at least 2"),
    ("num_completions_to_print", [0], "at least 1"),
    ("report_samples", [-1], "0 (keeps nothing) or more"),
    ("lmbda_schedule", ["cosine"], "one of 'constant', 'linear'"),
    ("lmbda_granularity", ["token"], "one of 'sample', 'batch'"),
    ("divergence_scale", ["liger"], "one of 'paper', 'continuous'"),
    ("train_on", ["first_turn"], "one of 'all_turns', 'last_turn'"),
    ("rollout_steps", [0], "at least 1"),
    (
        "divergence",
        ["kl"],
        "one of 'jsd', 'skew_kl', 'skew_reverse_kl', 'total_variation', 'alpha_beta', 'adaptive_kl'",
    ),
    ("loss_workspace_mb", [0.5, NAN], "at least 1"),
    ("loss_product_dtype", ["half"], "one of 'auto', 'float32', 'bfloat16', 'float16'"),
    ("vllm_mode", ["remote"], "one of 'colocate', 'server'"),
    ("vllm_weight_sync", ["ipc"], "one of 'auto', 'full', 'adapter', 'nccl'"),
    ("vllm_server_timeout", [0, NAN, INF], "above 0 and finite"),
    ("vllm_request_timeout", [-1.0, NAN, INF], "above 0 and finite"),
    ("vllm_gpu_memory_utilization", [0.0, 1.5], "in (0, 1]"),
    ("vllm_max_model_length", [0], "at least 1"),
    ("vllm_tensor_parallel_size", [0], "at least 1"),
    ("vllm_server_base_url", ["localhost:8000", "http://", "http://a:1, b:2"], "a URL that starts"),
    ("vllm_server_base_url", [[], [8000]], "URLs such as http://127.0.0.1:8000, as a list or separated by commas"),
    ("teacher_server_base_url", ["ftp://a"], "a URL that starts with http:// or https://"),
    ("teacher_top_k", [0], "at least 1"),
    ("self_teacher_ema_decay", [-0.1, 1.0, NAN], "in [0, 1)"),
    ("teacher_tail", ["drop"], "one of 'bucket', 'renormalize'"),
    ("teacher_cache_miss", ["live", "Teacher"], "one of 'error', 'teacher'"),
    ("teacher_server_signal", ["logits"], "one of 'top_k', 'hidden_states'"),
    (
        "teacher_server_dtype",
        ["int8"],
        "one of 'auto', 'float32', 'bfloat16', 'float16', 'fp8_e4m3', 'fp8_e5m2'",
    ),
    ("teacher_vocabulary_mode", ["auto"], "one of 'same', 'matched', 'next_byte', 'uld', 'gold'"),
    ("teacher_min_matched_mass", [-0.1, 1.1, NAN], "in [0, 1]"),
]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [(name, value, expected) for name, values, expected in OUT_OF_RANGE for value in values],
)
def test_a_value_out_of_range_is_refused_with_name_range_and_value(name, value, expected):
    options = {"lmbda_schedule": "linear"} if name == "lmbda_end" else {}
    with pytest.raises(GKDConfigError) as raised:
        GKDArguments(**{name: value, **options})
    message = str(raised.value)
    assert message.startswith(f"{name} must be {expected}")
    assert message.endswith(f"; got {value!r}")
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta", 0),
        ("beta", 1),
        ("lmbda", 0.0),
        ("lmbda", 1.0),
        ("ce_weight", 1.0),
        ("temperature", 1e-3),
        ("loss_temperature", 10.0),
        ("top_p", 1.0),
        ("top_k", 0),
        ("min_p", 0.0),
        ("min_p", 1.0),
        ("repetition_penalty", 0.5),
        ("max_new_tokens", 1),
        ("rollout_batch_size", 1),
        ("rollout_steps", 1),
        ("vllm_gpu_memory_utilization", 1.0),
        ("vllm_max_model_length", 1024),
        ("vllm_tensor_parallel_size", 1),
        ("teacher_top_k", 1),
        ("self_teacher_ema_decay", 0.0),
        ("max_length", 129),
        ("max_length", None),
        ("num_completions_to_print", 1),
        ("train_on", "last_turn"),
    ],
)
def test_the_ends_of_a_range_belong_to_it(name, value):
    assert getattr(GKDArguments(**{name: value}), name) == value


def test_every_option_with_a_range_is_among_those_tested():
    ranged = {name for name, _, _ in OUT_OF_RANGE}
    free = {"seq_kd", "disable_dropout", "eval_on_policy", "log_completions"}
    free |= {"self_teacher", "generation_kwargs", "teacher_model_name_or_path", "teacher_model_init_kwargs"}
    free |= {"use_vllm", "rollout_overlap", "vllm_server_api_token", "vllm_sync_dir", "vllm_enable_sleep_mode"}
    free |= {"teachers", "teacher_column", "teacher_weights", "teacher_offload"}
    free |= {"divergence_options", "vllm_engine_kwargs", "teacher_server_api_token", "teacher_server_checks"}
    free |= {"teacher_cache_dir", "teacher_tokenizer_name_or_path", "teacher_server_model"}
    assert ranged | free == {option.name for option in dataclasses.fields(GKDArguments)}


WRONG_TYPES = [
    ("beta", [0.5], "a number"),
    ("beta", None, "a number"),
    ("beta", "0.5", "a number"),
    ("beta", True, "a number"),
    ("lmbda", "half", "a number"),
    ("lmbda_end", "half", "a number or None"),
    ("temperature", {}, "a number"),
    ("min_p", "", "a number or None"),
    ("max_new_tokens", 12.5, "a whole number"),
    ("max_new_tokens", "128", "a whole number"),
    ("top_k", False, "a whole number"),
    ("rollout_batch_size", 2.0, "a whole number or None"),
    ("max_length", "1k", "a whole number or None"),
    ("seq_kd", "false", "True or False"),
    ("disable_dropout", 1, "True or False"),
    ("lmbda_schedule", None, "a string"),
    ("train_on", ["last_turn"], "a string"),
    ("teacher_model_name_or_path", 7, "a string or None"),
    ("use_vllm", 1, "True or False"),
    ("rollout_steps", 1.5, "a whole number"),
    ("teacher_top_k", "all", "a whole number or None"),
    ("teacher_cache_dir", 7, "a folder or a list of folders"),
    ("teacher_cache_dir", [], "a folder or a list of folders"),
    ("teacher_cache_dir", ["a", None], "a folder or a list of folders"),
]


@pytest.mark.parametrize(("name", "value", "expected"), WRONG_TYPES)
def test_a_value_of_another_type_is_refused_with_name_type_and_value(name, value, expected):
    with pytest.raises(GKDConfigError) as raised:
        GKDArguments(**{name: value})
    assert str(raised.value) == f"{name} must be {expected}; got {value!r}"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("beta", [0.5], "a number"),
        ("trust_remote_code", "no", "True or False"),
        ("dataset_num_proc", "two", "a whole number or None"),
    ],
)
def test_the_plain_configuration_checks_the_types_of_its_own_options_too(config_of, name, value, expected):
    with pytest.raises(GKDConfigError) as raised:
        config_of(**{name: value})
    assert str(raised.value) == f"{name} must be {expected}; got {value!r}"


def test_numbers_of_numpy_are_numbers():
    args = GKDArguments(beta=np.float64(0.25), lmbda=np.float32(0.5), max_new_tokens=np.int64(5))
    assert (args.beta, args.lmbda, args.max_new_tokens) == (0.25, 0.5, 5)


@pytest.mark.parametrize("name", ["generation_kwargs", "teacher_model_init_kwargs"])
def test_json_fields_are_parsed(name):
    args = GKDArguments(**{name: '{"prefill_chunk_size": 3}'})
    assert getattr(args, name) == {"prefill_chunk_size": 3}
    assert getattr(GKDArguments(**{name: {"prefill_chunk_size": 3}}), name) == {"prefill_chunk_size": 3}
    assert getattr(GKDArguments(), name) is None


@pytest.mark.parametrize("value", ["{not json", "[1, 2]", "3", [1, 2]])
@pytest.mark.parametrize("name", ["generation_kwargs", "teacher_model_init_kwargs"])
def test_anything_but_a_json_object_is_refused_by_name(name, value):
    with pytest.raises(GKDConfigError) as raised:
        GKDArguments(**{name: value})
    assert str(raised.value).startswith(f"{name} must be a dictionary or a JSON object; got {value!r}")


SERVER = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://127.0.0.1:8000"}


def test_urls_come_as_a_list_or_separated_by_commas():
    assert GKDArguments(**SERVER).vllm_server_base_url == ["http://127.0.0.1:8000"]
    urls = ["http://a:1", "https://b"]
    assert GKDArguments(**{**SERVER, "vllm_server_base_url": urls}).vllm_server_base_url == urls
    assert GKDArguments(**{**SERVER, "vllm_server_base_url": "http://a:1,https://b"}).vllm_server_base_url == urls


def test_whole_numbers_become_floats_where_an_option_is_one():
    args = GKDArguments(lmbda=0, beta=np.int64(1), lmbda_end=None, temperature=2, loss_workspace_mb=64, top_k=3)
    assert (args.lmbda, args.beta, args.temperature, args.loss_workspace_mb) == (0.0, 1.0, 2.0, 64.0)
    assert {type(getattr(args, name)) for name in ("lmbda", "beta", "temperature", "loss_workspace_mb")} == {float}
    assert args.lmbda_end is None
    assert type(args.top_k) is int
