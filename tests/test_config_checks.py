"""Valid options, alone and in combination: all others are refused, with what to do instead."""

import dataclasses

import numpy as np
import pytest
from packaging.version import Version
from transformers import GenerationConfig

from gkd_trainer.config import GKDArguments
from gkd_trainer.config_checks import (
    _REFUSED_GENERATION_KWARGS,
    check_cache,
    check_combinations,
    check_loss_temperature,
)
from gkd_trainer.config_effects import Run
from gkd_trainer.errors import GKDConfigError
from tests.test_config import MyConfig
from tests.versions import TRANSFORMERS

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
    free |= {"teacher_cache_dir", "teacher_tokenizer_name_or_path"}
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


def test_the_plain_configuration_checks_them_too(config_of):
    with pytest.raises(GKDConfigError, match="beta must be in"):
        config_of(beta=1.5)


def test_a_linear_schedule_needs_its_end():
    with pytest.raises(GKDConfigError, match=r"lmbda_schedule='linear' needs lmbda_end.*got None"):
        GKDArguments(lmbda_schedule="linear")
    assert GKDArguments(lmbda_schedule="linear", lmbda_end=0.0).lmbda_end == 0.0


def test_an_end_without_a_schedule_is_refused_rather_than_ignored():
    with pytest.raises(GKDConfigError, match=r"lmbda_end=0\.9 has no effect.*set lmbda_schedule='linear'"):
        GKDArguments(lmbda_end=0.9)
    GKDArguments(lmbda=0.5, lmbda_end=0.5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lmbda": 0.0, "lmbda_schedule": "linear", "lmbda_end": 0.5},
        {"lmbda": 0.0, "seq_kd": True},
        {"lmbda": 0.0, "eval_on_policy": True},
    ],
)
def test_prompts_must_leave_room_for_generated_completions(options):
    with pytest.raises(GKDConfigError, match=r"max_length \(128\) must exceed max_new_tokens \(128\)"):
        GKDArguments(max_length=128, max_new_tokens=128, **options)
    GKDArguments(max_length=129, max_new_tokens=128, **options)


def test_without_generation_max_length_may_be_short():
    GKDArguments(lmbda=0.0, max_length=16, max_new_tokens=128)


@pytest.mark.parametrize("lmbda", [{"lmbda": 1.0}, {"lmbda": 1.0, "lmbda_end": 1.0, "lmbda_schedule": "linear"}])
@pytest.mark.parametrize("option", [{"ce_weight": 0.5}, {"seq_kd": True}])
def test_options_that_need_data_are_refused_if_every_sample_is_on_policy(option, lmbda):
    [(name, value)] = option.items()
    with pytest.raises(
        GKDConfigError, match=rf"^{name}={value} has no effect, since it needs off-policy samples.*leave {name} out$"
    ):
        GKDArguments(**option, **lmbda)
    GKDArguments(**option, lmbda=1.0, lmbda_end=0.5, lmbda_schedule="linear")


@pytest.mark.parametrize(
    ("divergence", "options", "message"),
    [
        ("jsd", {"alpha": 0.1}, r"the divergence 'jsd' has the options \[\]; got \['alpha'\]"),
        ("skew_kl", {"beta": 0.1}, r"'skew_kl' has the options \['alpha'\]; got \['beta'\]"),
        ("skew_kl", {"alpha": 1.0}, r"'alpha' of the divergence 'skew_kl' must be in \(0, 1\)"),
        ("adaptive_kl", '{"mu": "0.5"}', "'mu' of the divergence 'adaptive_kl' must be a number; got '0.5'"),
        ("alpha_beta", {"alpha": None}, "'alpha' of the divergence 'alpha_beta' must be a number; got None"),
    ],
)
def test_options_that_a_divergence_does_not_take_are_refused(divergence, options, message):
    with pytest.raises(GKDConfigError, match=message):
        GKDArguments(divergence=divergence, divergence_options=options)


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


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "min_p", "max_new_tokens", "repetition_penalty"])
def test_generation_kwargs_leave_sampling_to_the_options_of_that_name(name):
    with pytest.raises(GKDConfigError) as raised:
        GKDArguments(generation_kwargs={name: 1})
    assert str(raised.value) == f"generation_kwargs can't hold '{name}': set {name} itself, outside generation_kwargs"


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("do_sample", False, "set top_k=1"),
        ("num_beams", 4, "one completion"),
        ("num_return_sequences", 2, "one completion"),
        ("eos_token_id", 5, "the model's generation_config or the tokenizer"),
        ("stop_strings", ["\n"], "set eos_token_id"),
        ("pad_token_id", 5, "in the tokenizer"),
        ("use_cache", False, "always on"),
        ("return_dict_in_generate", True, "only token ids"),
        ("output_scores", True, "only token ids"),
        ("max_length", 50, "set max_new_tokens"),
        ("max_time", 1.0, "set max_new_tokens"),
        ("min_length", 5, "set min_new_tokens"),
        ("typical_p", 0.9, "set top_p, top_k or min_p"),
        ("prompt_lookup_num_tokens", 5, "token by token"),
    ],
)
def test_generation_kwargs_cannot_break_the_engine(name, value, remedy):
    with pytest.raises(GKDConfigError) as raised:
        GKDArguments(generation_kwargs={"min_new_tokens": 2, name: value})
    assert str(raised.value).startswith(f"generation_kwargs can't hold '{name}': ")
    assert remedy in str(raised.value)


@pytest.mark.parametrize("name", ["min_tokens", "_from_model_config", "__class__"])
def test_generation_kwargs_of_unknown_names_are_refused(name):
    with pytest.raises(
        GKDConfigError, match=f"generation_kwargs holds '{name}', which is not an option of transformers"
    ):
        GKDArguments(generation_kwargs={name: 1})


def test_generation_kwargs_that_transformers_refuses_are_refused_at_once():
    with pytest.raises(GKDConfigError, match=r"does not take generation_kwargs.*cache_implementation.*nonsense"):
        GKDArguments(generation_kwargs={"cache_implementation": "nonsense"})


def test_other_generation_kwargs_are_taken():
    options = {"min_new_tokens": 2, "no_repeat_ngram_size": 3, "suppress_tokens": [5], "bad_words_ids": [[1, 2]]}
    assert GKDArguments(generation_kwargs=options).generation_kwargs == options


def test_every_name_that_is_refused_is_one_of_transformers():
    newer = set() if Version("5.19") <= TRANSFORMERS else {"use_mtp"}
    assert _REFUSED_GENERATION_KWARGS.keys() - newer <= vars(GenerationConfig()).keys()


def test_sampling_options_of_vllm_are_taken_where_vllm_samples():
    args = GKDArguments(use_vllm=True, generation_kwargs={"min_tokens": 2, "presence_penalty": 0.5})
    assert args.generation_kwargs == {"min_tokens": 2, "presence_penalty": 0.5}


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_penalties_that_only_vllm_has_are_refused_if_the_teacher_generates(name):
    with pytest.raises(GKDConfigError, match=f"'{name}', which only vLLM has.*set repetition_penalty"):
        GKDArguments(use_vllm=True, seq_kd=True, generation_kwargs={name: 0.5})
    shared = {name: 0.0, "min_tokens": 2, "logit_bias": {"7": -1.5}}
    assert GKDArguments(use_vllm=True, seq_kd=True, generation_kwargs=shared).generation_kwargs == shared


@pytest.mark.parametrize("biases", [[5, 1.0], {"the": 1.0}, {5: "1"}])
def test_biases_that_are_not_of_token_ids_are_refused(biases):
    with pytest.raises(GKDConfigError, match="logit_bias in generation_kwargs must be a dictionary of token ids"):
        GKDArguments(use_vllm=True, generation_kwargs={"logit_bias": biases})


@pytest.mark.parametrize("name", ["packing", "padding_free", "eval_packing"])
@pytest.mark.parametrize(
    "options", [{"lmbda": 0.1}, {"lmbda": 0.0, "seq_kd": True}, {"lmbda": 0.0, "eval_on_policy": True}]
)
def test_sequences_of_several_samples_are_refused_if_completions_are_generated(config_of, name, options):
    with pytest.raises(
        GKDConfigError, match=f"{name}=True joins samples.*set {name}=False, or lmbda=0, seq_kd=False and eval_on"
    ):
        config_of(MyConfig, **{name: True}, **options)


@pytest.mark.parametrize("name", ["packing", "eval_packing"])
def test_packing_without_a_length_is_refused(config_of, name):
    with pytest.raises(GKDConfigError, match="set max_length"):
        config_of(MyConfig, lmbda=0.0, max_length=None, **{name: True})


def test_training_on_prompts_is_refused(config_of):
    with pytest.raises(GKDConfigError, match="completion_only_loss=False would compare the models on prompts"):
        config_of(MyConfig, completion_only_loss=False)
    config_of(MyConfig, completion_only_loss=True)


@pytest.mark.parametrize("loss_type", ["dft", "whatever"])
def test_another_loss_of_sft_is_refused(config_of, loss_type):
    with pytest.raises(GKDConfigError, match=f"loss_type='{loss_type}'.*the loss here is the divergence"):
        config_of(MyConfig, loss_type=loss_type)
    config_of(MyConfig, loss_type="nll")


HIDDEN_STATES = {
    "teacher_server_base_url": "http://a:1",
    "teacher_server_signal": "hidden_states",
    "teacher_model_name_or_path": "a/teacher",
}
SERVER = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://127.0.0.1:8000"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_vllm": True, "vllm_mode": "server"}, "vllm_mode='server' needs vllm_server_base_url.*got None"),
        ({"vllm_server_base_url": "http://a:1"}, "has no effect without use_vllm=True and vllm_mode='server'"),
        ({"rollout_overlap": True}, "rollout_overlap=True generates while the student trains.*vllm_mode='server'"),
        ({"rollout_overlap": True, "use_vllm": True}, "vllm_mode='server'"),
        ({"vllm_weight_sync": "nccl"}, "'nccl' sends weights to a server"),
        (
            {"teacher_server_base_url": "http://a:1", "teacher_model_name_or_path": "a/teacher"},
            "got both teacher_server_base_url and teacher_model_name_or_path.*or teacher_server_signal='hidden_states'",
        ),
        (
            {"teacher_server_signal": "hidden_states"},
            "'hidden_states' needs .*: set teacher_server_base_url and teacher_model_name_or_path$",
        ),
        (
            {"teacher_server_signal": "hidden_states", "teacher_model_name_or_path": "a/teacher"},
            "set teacher_server_base_url$",
        ),
        (
            {"teacher_server_signal": "hidden_states", "teacher_server_base_url": "http://a:1"},
            "set teacher_model_name_or_path$",
        ),
        ({**HIDDEN_STATES, "teacher_top_k": 5}, "teacher_top_k=5 has no effect under teacher_server_signal='hidden_st"),
        (
            {"self_teacher": "base", "teacher_model_name_or_path": "a/teacher"},
            "self_teacher='base' makes the student its own teacher, .*so teacher_model_name_or_path has no meaning",
        ),
        ({"self_teacher": "ema", "teacher_server_base_url": "http://a:1"}, "so teacher_server_base_url has no meaning"),
        ({"self_teacher": "base", "teacher_top_k": 5}, "so teacher_top_k has no meaning"),
        ({"self_teacher": "base", "teachers": {"a": "b"}}, "so teachers has no meaning"),
        ({"self_teacher": "base", "teacher_cache_dir": "/a"}, "so teacher_cache_dir has no meaning"),
        ({"teacher_top_k": 5, "loss_temperature": 2.0}, r"loss_temperature=2\.0 can't be applied to a teacher's top"),
        ({"teacher_server_base_url": "http://a:1", "loss_temperature": 0.5}, "their log-probs are at temperature 1"),
        ({"vllm_max_model_length": 512}, r"vllm_max_model_length \(512\) must be at least max_length \(1024\)"),
        ({"use_vllm": True, "temperature": 2.5}, r"temperature must be at most 2\.0 under use_vllm; got 2\.5"),
        ({"use_vllm": True, "generation_kwargs": {"min_new_tokens": 2}}, "can't hold 'min_new_tokens' under use_vllm"),
    ],
)
def test_what_servers_can_not_do_is_refused(options, message):
    with pytest.raises(GKDConfigError, match=message):
        GKDArguments(**options)


def test_urls_come_as_a_list_or_separated_by_commas():
    assert GKDArguments(**SERVER).vllm_server_base_url == ["http://127.0.0.1:8000"]
    urls = ["http://a:1", "https://b"]
    assert GKDArguments(**{**SERVER, "vllm_server_base_url": urls}).vllm_server_base_url == urls
    assert GKDArguments(**{**SERVER, "vllm_server_base_url": "http://a:1,https://b"}).vllm_server_base_url == urls


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_hidden_states_of_servers_take_any_loss_temperature(temperature):
    args = GKDArguments(**HIDDEN_STATES, loss_temperature=temperature)
    check_loss_temperature(Run(args, has_top_tokens=False))


@pytest.mark.parametrize("options", [{}, {"lmbda": 0.0, "eval_on_policy": True}])
def test_a_top_k_that_only_the_trainer_knows_of_is_checked_like_one_of_the_configuration(options):
    args = GKDArguments(loss_temperature=2.0, **options)
    check_loss_temperature(Run(args, has_top_tokens=False))
    for check in (check_loss_temperature, check_combinations):
        with pytest.raises(GKDConfigError, match=r"loss_temperature=2\.0 can't be applied to a teacher's top tokens"):
            check(Run(args, has_top_tokens=True))
    check_loss_temperature(Run(GKDArguments(**options), has_top_tokens=True))


@pytest.mark.parametrize("teachers", [{}, {"math": 3}, {"math": ""}, {"": "a/b"}, {"math": None}])
def test_teachers_that_are_not_names_or_folders_by_name_are_refused(teachers):
    with pytest.raises(GKDConfigError, match="teachers must be names of models or folders by a name of your own"):
        GKDArguments(teachers=teachers)


@pytest.mark.parametrize("other", ["teacher_model_name_or_path", "teacher_server_base_url"])
def test_several_teachers_beside_another_source_are_refused(other):
    with pytest.raises(GKDConfigError, match=f"got both teachers and {other}: set one of them"):
        GKDArguments(teachers={"math": "a/b"}, **{other: "http://127.0.0.1:9"})


def test_weights_of_teachers_must_be_positive_and_for_each_of_them():
    teachers = {"math": "a/b", "code": "c/d"}
    assert GKDArguments(teachers=teachers, teacher_weights='{"code": 1, "math": 0.5}').teacher_weights["math"] == 0.5
    for weight in (0, -1, INF, NAN, "1", True):
        with pytest.raises(GKDConfigError, match="teacher_weights of code must be positive and finite"):
            GKDArguments(teachers=teachers, teacher_weights={"math": 1, "code": weight})
    with pytest.raises(GKDConfigError, match="a weight for each of the teachers math, code; got math, chat"):
        GKDArguments(teachers=teachers, teacher_weights={"math": 1, "chat": 1})


@pytest.mark.parametrize(
    ("options", "generates"),
    [
        ({}, "lmbda above 0"),
        ({"lmbda": 0.0, "lmbda_end": 0.5, "lmbda_schedule": "linear"}, "lmbda above 0"),
        ({"lmbda": 0.0, "seq_kd": True}, "seq_kd=True"),
        ({"lmbda": 0.0, "eval_on_policy": True}, "eval_on_policy=True"),
    ],
)
def test_completions_for_a_teacher_that_is_only_a_cache_are_refused(options, generates):
    problem = f"{generates} generates completions, for which a cached teacher has no predictions: set lmbda=0"
    with pytest.raises(GKDConfigError, match=problem):
        GKDArguments(teacher_cache_dir="cache", **options)
    GKDArguments(teacher_cache_dir="cache", teacher_cache_miss="teacher", **options)
    GKDArguments(teacher_cache_dir="cache", lmbda=0.0)
    args = GKDArguments(**options)
    check_cache(Run(args, has_only_cache=False))
    with pytest.raises(GKDConfigError, match=problem):  # known only to the trainer
        check_cache(Run(args, has_only_cache=True))


@pytest.mark.parametrize("teacher", ["teacher_model_name_or_path", "teacher_server_base_url"])
def test_a_teacher_that_a_cache_replaces_is_refused(teacher):
    options = {"teacher_cache_dir": "cache", teacher: "http://a:1", "lmbda": 0.0}
    with pytest.raises(GKDConfigError, match="teacher_cache_dir replaces the teacher: leave teacher_model_name"):
        GKDArguments(**options)
    GKDArguments(**options, teacher_cache_miss="teacher")


def test_a_cache_beside_several_teachers_is_refused():
    for miss in ("error", "teacher"):
        with pytest.raises(GKDConfigError, match="teacher_cache_dir holds the predictions of one teacher"):
            GKDArguments(teacher_cache_dir="cache", teacher_cache_miss=miss, teachers={"math": "a/b"}, lmbda=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_kd": True, "lmbda": 0.0}, "it can't complete the student's prompts: set seq_kd=False"),
        ({"teachers": {"math": "a/b"}}, "but teachers needs the student's: leave one of them out"),
        ({"teacher_cache_dir": "cache", "lmbda": 0.0}, "but teacher_cache_dir needs the student's"),
        ({"teacher_top_k": 5, "teacher_vocabulary_mode": "uld"}, "needs the teacher's whole distributions"),
        (
            {"teacher_server_base_url": "http://a:1", "teacher_vocabulary_mode": "next_byte"},
            "needs the teacher's whole distributions",
        ),
        (
            {"divergence": "skew_kl", "teacher_vocabulary_mode": "gold"},
            "teacher_vocabulary_mode='gold' needs divergence='jsd'",
        ),
    ],
)
def test_what_a_teacher_with_another_tokenizer_can_not_do_is_refused(options, message):
    with pytest.raises(GKDConfigError, match=message):
        GKDArguments(**{"teacher_vocabulary_mode": "matched", **options})


@pytest.mark.parametrize("options", [{"teacher_top_k": 5}, {"teacher_server_base_url": "http://a:1"}])
def test_top_tokens_of_another_vocabulary_are_matched(options):
    GKDArguments(teacher_vocabulary_mode="matched", **options)
