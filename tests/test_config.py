"""The options as one configuration: parsed, completed, printed, stored, and combined with other trainers'."""

import copy
import dataclasses
import json
import pickle
import traceback
from dataclasses import dataclass

import pytest
import torch
import trl
from transformers import BitsAndBytesConfig, HfArgumentParser, TrainingArguments

from gkd_trainer.config import GKDArguments, GKDConfig
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.redaction import dropping_secrets

OWN_FIELDS = [option.name for option in dataclasses.fields(GKDArguments)]
PLAIN_FIELDS = ["model_init_kwargs", "trust_remote_code", "dataset_num_proc", "dataset_kwargs"]


@dataclass
class MyConfig(GKDArguments, trl.SFTConfig):
    """What somebody writes who extends SFTTrainer."""


@pytest.mark.parametrize(
    ("max_length", "expected"), [(1024, 128), (129, 128), (128, 64), (65, 32), (64, 32), (2, 1), (None, 128)]
)
def test_unset_max_new_tokens_leaves_room_for_a_prompt(max_length, expected, caplog):
    for options in ({}, {"lmbda": 0.0, "seq_kd": True}, {"lmbda": 0.0, "eval_on_policy": True}):
        caplog.clear()
        args = GKDArguments(max_length=max_length, **options)
        assert args.max_new_tokens == expected
        assert isinstance(args.max_new_tokens, int)
        assert (f"max_new_tokens is {expected}, half of max_length={max_length}" in caplog.text) == (expected < 128)


@pytest.mark.parametrize("parser_class", [HfArgumentParser, trl.TrlParser])
def test_max_new_tokens_that_is_not_on_the_command_line_was_not_chosen(tmp_path, parser_class):
    words = ["--output_dir", str(tmp_path), "--report_to", "none", "--use_cpu", "true", "--max_length", "64"]
    [args] = parser_class(GKDConfig).parse_args_into_dataclasses(words)
    assert args.max_new_tokens == 32
    with pytest.raises(GKDConfigError, match=r"max_length \(64\) must exceed max_new_tokens \(128\)"):
        parser_class(GKDConfig).parse_args_into_dataclasses([*words, "--max_new_tokens", "128"])


@pytest.mark.parametrize(
    ("options", "generates", "is_always_on_policy"),
    [
        ({"lmbda": 0.0}, False, False),
        ({"lmbda": 0.1}, True, False),
        ({"lmbda": 1.0}, True, True),
        ({"lmbda": 0.0, "seq_kd": True}, True, False),
        ({"lmbda": 0.0, "lmbda_end": 1.0, "lmbda_schedule": "linear"}, True, False),
        ({"lmbda": 1.0, "lmbda_end": 0.0, "lmbda_schedule": "linear"}, True, False),
        ({"lmbda": 1.0, "lmbda_end": 1.0, "lmbda_schedule": "linear"}, True, True),
    ],
)
def test_whether_a_run_generates_takes_its_whole_schedule_into_account(options, generates, is_always_on_policy):
    args = GKDArguments(**options)
    assert (args.generates, args.is_always_on_policy) == (generates, is_always_on_policy)


def test_a_misspelt_key_of_dataset_kwargs_is_refused(config_of):
    with pytest.raises(GKDConfigError, match="takes only 'skip_prepare_dataset'; got 'skip_prepare'"):
        config_of(dataset_kwargs={"skip_prepare": True})
    read_by_another = {"of_another_trainer": True}
    assert config_of(MyConfig, dataset_kwargs=read_by_another).dataset_kwargs == read_by_another


@pytest.mark.parametrize("name", ["model_init_kwargs", "dataset_kwargs", "generation_kwargs"])
def test_json_fields_of_the_plain_configuration_are_parsed(config_of, name):
    assert getattr(config_of(**{name: "{}"}), name) == {}


def test_defaults_are_those_of_trl_but_for_the_temperature(config_of, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDConfig as TRLConfig

    theirs, ours = config_of(TRLConfig), config_of()
    shared = {option.name for option in dataclasses.fields(TRLConfig)} & set(OWN_FIELDS)
    assert shared == {
        "beta",
        "disable_dropout",
        "lmbda",
        "max_length",
        "max_new_tokens",
        "seq_kd",
        "teacher_model_init_kwargs",
        "teacher_model_name_or_path",
        "temperature",
    }
    for name in shared - {"temperature"}:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.temperature == 1.0


def test_the_plain_configuration_is_one_of_transformers(config_of):
    args = config_of(learning_rate=1e-3)
    assert isinstance(args, TrainingArguments)
    assert args.learning_rate == 1e-3
    assert args.lr_scheduler_kwargs is None or isinstance(args.lr_scheduler_kwargs, dict)


def test_fields_of_transformers_that_hold_json_are_still_parsed(config_of):
    for config_class in (GKDConfig, MyConfig):
        args = config_of(config_class, lr_scheduler_kwargs='{"num_cycles": 2}')
        assert args.lr_scheduler_kwargs == {"num_cycles": 2}
    assert config_of(MyConfig, model_init_kwargs='{"dtype": "auto"}').model_init_kwargs == {"dtype": "auto"}


def test_sft_config_can_be_extended(config_of):
    args = config_of(MyConfig, lmbda=0.0, packing=True, beta=0.1, generation_kwargs="{}", max_length=77)
    assert isinstance(args, trl.SFTConfig)
    assert (args.packing, args.beta, args.generation_kwargs, args.max_length) == (True, 0.1, {}, 77)
    assert config_of(MyConfig).max_length == 1024
    with pytest.raises(GKDConfigError, match="beta must be in"):
        config_of(MyConfig, beta=2)


@pytest.mark.parametrize("name", ["packing", "padding_free", "assistant_only_loss", "dataset_text_field"])
def test_an_option_of_sft_config_names_the_class_that_has_it(config_of, name):
    with pytest.raises(GKDConfigError) as raised:
        config_of(**{name: True})
    message = str(raised.value)
    assert message.startswith(f"{name}: options of trl.SFTConfig")
    assert "class MyConfig(GKDArguments, trl.SFTConfig)" in message


def test_an_unknown_option_is_refused_by_python(config_of):
    with pytest.raises(TypeError, match="unexpected keyword argument 'lambda_'"):
        config_of(lambda_=1)


def test_a_subclass_may_add_an_option_that_sft_config_has(config_of):
    @dataclass
    class WithTextField(GKDConfig):
        dataset_text_field: str = "mine"

    assert config_of(WithTextField, dataset_text_field="own").dataset_text_field == "own"


CANARY = "canary-31337"


SECRETS = {
    "hub_token": CANARY,
    "vllm_server_api_token": CANARY,
    "vllm_server_base_url": f"http://user:{CANARY}@a:1,http://b:2",
    "teacher_server_base_url": [f"https://{CANARY}@c"],
    "teacher_server_api_token": CANARY,
    "teacher_model_init_kwargs": {"token": CANARY, "proxies": {"https": f"http://u:{CANARY}@proxy"}},
    "vllm_engine_kwargs": f'{{"hf_overrides": [{{"apiKey": "{CANARY}"}}]}}',
    "use_vllm": True,
    "vllm_mode": "server",
}


PLAIN_SECRETS = {"model_init_kwargs": {"use_auth_token": CANARY}}


def printed(args):
    forms = [str(args), repr(args), f"{args}", "%r" % [args]]
    if hasattr(args, "to_json_string"):
        forms += [args.to_json_string(), str(args.to_sanitized_dict())]
    return "\n".join([*forms, str(args.to_dict())])


def test_secrets_are_in_no_printed_form_of_a_configuration(config_of):
    plain = {name: value for name, value in SECRETS.items() if name != "hub_token"}
    for args in (
        config_of(**SECRETS, **PLAIN_SECRETS),
        config_of(MyConfig, **SECRETS, **PLAIN_SECRETS, dataset_kwargs={"storage": {"password": CANARY}}),
        GKDArguments(**plain),
    ):
        text = printed(args)
        assert CANARY not in text
        assert "'token': '<TOKEN>'" in text
        assert "https://c" in text
        # They are there all the same, also after printing.
        assert args.teacher_model_init_kwargs["token"] == args.vllm_server_api_token == CANARY
        assert args.vllm_server_base_url[0].credentials == ("user", CANARY)


def test_secrets_are_kept_when_a_configuration_is_copied_or_pickled(config_of):
    args = config_of(**SECRETS)
    for copied in (copy.copy(args), copy.deepcopy(args), pickle.loads(pickle.dumps(args)), dataclasses.replace(args)):
        assert copied.teacher_model_init_kwargs["token"] == copied.hub_token == CANARY


def test_secrets_are_left_out_of_what_is_pickled_to_be_saved(config_of):
    with dropping_secrets():
        stored = pickle.dumps(config_of(**SECRETS, **PLAIN_SECRETS))
    assert CANARY.encode() not in stored
    loaded = pickle.loads(stored)
    assert loaded.hub_token is loaded.vllm_server_api_token is loaded.teacher_model_init_kwargs["token"] is None


def test_a_configuration_goes_through_a_parser_with_its_secrets_hidden(config_of):
    """As TrainingArguments' own do: the names of the secrets come back in their place."""
    fields = {option.name for option in dataclasses.fields(GKDConfig) if option.init}
    stored = {name: value for name, value in config_of(**SECRETS).to_dict().items() if name in fields}
    [again] = HfArgumentParser(GKDConfig).parse_dict(stored)
    assert again.hub_token == "<HUB_TOKEN>"
    assert again.vllm_server_api_token == "<VLLM_SERVER_API_TOKEN>"
    assert again.teacher_model_init_kwargs["token"] == "<TOKEN>"
    assert again.teacher_server_base_url == ["https://c"]


@pytest.mark.parametrize(
    "options",
    [
        {"teacher_model_init_kwargs": f"{{'token': '{CANARY}'}}"},
        {"vllm_engine_kwargs": [{"token": CANARY}]},
        {"model_init_kwargs": f'["api_key", "{CANARY}"]'},
        {"vllm_server_api_token": [CANARY]},
        {"teacher_server_api_token": {"key": CANARY}},
        {"teacher_server_base_url": f"ftp://user:{CANARY}@host"},
        {"teacher_server_base_url": [f"http://user:{CANARY}@host", 3]},
        {"vllm_server_base_url": f"http://user:{CANARY}@host"},
    ],
)
def test_no_error_shows_a_secret(config_of, options):
    with pytest.raises(GKDConfigError) as raised:
        config_of(**options)
    assert CANARY not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("config_class", [GKDConfig, MyConfig])
def test_a_configuration_prints_all_its_options(config_of, config_class):
    text = repr(config_of(config_class, learning_rate=3e-4, beta=0.25))
    assert text.startswith(f"{config_class.__name__}(\n")
    assert "\nlearning_rate=0.0003,\n" in text
    assert "\nbeta=0.25,\n" in text
    for option in dataclasses.fields(config_class):
        assert f"\n{option.name}=" in text, option.name
    assert "\nbeta=0.25,\n" in repr(GKDArguments(beta=0.25))


def test_a_quantisation_inside_of_an_option_is_serialised(config_of):
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16")
    args = config_of(teacher_model_init_kwargs={"quantization_config": quantisation, "dtype": torch.bfloat16})
    stored = json.loads(args.to_json_string())["teacher_model_init_kwargs"]
    assert stored["dtype"] == stored["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    assert args.teacher_model_init_kwargs["quantization_config"] is quantisation


@pytest.mark.parametrize("name", OWN_FIELDS + PLAIN_FIELDS)
def test_every_option_is_documented(name):
    [option] = [option for option in dataclasses.fields(GKDConfig) if option.name == name]
    assert len(option.metadata["help"]) > 20


def command_line_value(name, default):
    special = {
        "lmbda": ("0.25", 0.25),
        "lmbda_end": ("0.75", 0.75),
        "lmbda_schedule": ("linear", "linear"),
        "lmbda_granularity": ("batch", "batch"),
        "divergence_scale": ("continuous", "continuous"),
        "train_on": ("last_turn", "last_turn"),
        "min_p": ("0.1", 0.1),
        "top_p": ("0.9", 0.9),
        "beta": ("1e-3", 1e-3),
        "ce_weight": ("0.2", 0.2),
        "rollout_batch_size": ("3", 3),
        "dataset_num_proc": ("2", 2),
        "teacher_model_name_or_path": ("a/teacher", "a/teacher"),
        "generation_kwargs": ('{"min_new_tokens": 2}', {"min_new_tokens": 2}),
        "teacher_model_init_kwargs": ('{"dtype": "auto"}', {"dtype": "auto"}),
        "model_init_kwargs": ('{"dtype": "auto"}', {"dtype": "auto"}),
        "dataset_kwargs": ('{"skip_prepare_dataset": true}', {"skip_prepare_dataset": True}),
        "divergence": ("skew_kl", "skew_kl"),
        "divergence_options": ('{"alpha": 0.2}', {"alpha": 0.2}),
        "loss_workspace_mb": ("64", 64.0),
        "loss_product_dtype": ("bfloat16", "bfloat16"),
        "vllm_mode": ("server", "server"),
        "vllm_weight_sync": ("adapter", "adapter"),
        "vllm_server_base_url": ("http://a:1, http://b:2", ["http://a:1", "http://b:2"]),
        "teacher_server_base_url": ("http://a:1", ["http://a:1"]),
        "vllm_server_api_token": ("secret", "secret"),
        "teacher_server_api_token": ("secret", "secret"),
        "vllm_sync_dir": ("/shared", "/shared"),
        "vllm_gpu_memory_utilization": ("0.5", 0.5),
        "vllm_max_model_length": ("2048", 2048),
        "vllm_engine_kwargs": ('{"enforce_eager": true}', {"enforce_eager": True}),
        "teacher_top_k": ("64", 64),
        "teacher_tail": ("renormalize", "renormalize"),
        "teacher_cache_dir": ("/cache", ["/cache"]),
        "teacher_cache_miss": ("teacher", "teacher"),
        "teachers": ('{"math": "my/math"}', {"math": "my/math"}),
        "teacher_column": ("domain", "domain"),
        "teacher_weights": ('{"math": 2}', {"math": 2}),
        "teacher_server_model": ("teacher", "teacher"),
        "teacher_server_signal": ("hidden_states", "hidden_states"),
        "teacher_server_dtype": ("fp8_e4m3", "fp8_e4m3"),
        "self_teacher": ("ema", "ema"),
        "self_teacher_ema_decay": ("0.9", 0.9),
        "teacher_vocabulary_mode": ("next_byte", "next_byte"),
        "teacher_min_matched_mass": ("0.5", 0.5),
        "teacher_tokenizer_name_or_path": ("a/tokenizer", "a/tokenizer"),
    }
    if name in special:
        return special[name]
    if isinstance(default, bool):
        return str(not default).lower(), not default
    return (str(default + 1), default + 1)


@pytest.mark.parametrize("parser_class", [HfArgumentParser, trl.TrlParser])
@pytest.mark.parametrize("name", OWN_FIELDS + PLAIN_FIELDS)
def test_every_option_is_read_from_the_command_line(tmp_path, parser_class, name):
    default = next(option.default for option in dataclasses.fields(GKDConfig) if option.name == name)
    text, expected = command_line_value(name, default)
    words = ["--output_dir", str(tmp_path), "--report_to", "none", "--use_cpu", "true", f"--{name}", text]
    if name == "lmbda_end":
        words += ["--lmbda_schedule", "linear"]
    if name == "lmbda_schedule":
        words += ["--lmbda_end", "0.75"]
    if name == "divergence_options":
        words += ["--divergence", "skew_kl"]
    if name in ("vllm_mode", "vllm_server_base_url", "rollout_overlap"):
        server = {"use_vllm": "true", "vllm_mode": "server", "vllm_server_base_url": "http://a:1", name: text}
        words += [word for option, value in server.items() for word in (f"--{option}", value)]
    if name == "teacher_cache_dir":
        words += ["--lmbda", "0.0"]
    if name == "teacher_server_signal":
        words += ["--teacher_server_base_url", "http://a:1", "--teacher_model_name_or_path", "a/teacher"]
    [args] = parser_class(GKDConfig).parse_args_into_dataclasses(words)
    assert getattr(args, name) == expected != default
    assert type(getattr(args, name)) is type(expected)


def test_options_are_read_from_a_yaml_file(tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text(
        f"output_dir: {tmp_path}\nuse_cpu: true\nbeta: 1e-3\nlmbda: 1\ngeneration_kwargs:\n  min_new_tokens: 2\n"
    )
    [args] = trl.TrlParser(GKDConfig).parse_args_and_config(["--config", str(file), "--lmbda", "0.25"])
    assert (args.beta, args.lmbda, args.generation_kwargs) == (1e-3, 0.25, {"min_new_tokens": 2})


@pytest.mark.parametrize("config_class", [GKDConfig, MyConfig])
def test_a_configuration_survives_json(config_of, config_class):
    args = config_of(
        config_class,
        beta=0.1,
        lmbda=0.2,
        lmbda_end=0.3,
        lmbda_schedule="linear",
        generation_kwargs={"min_new_tokens": 2},
        teacher_model_init_kwargs='{"dtype": "bfloat16"}',
        min_p=0.1,
    )
    stored = json.loads(args.to_json_string())
    for name in OWN_FIELDS:
        if not name.endswith("_token"):
            assert stored[name] == getattr(args, name), name
    # Secrets are not stored: transformers hides every field whose name ends in _token.
    fields = {option.name for option in dataclasses.fields(config_class) if not option.name.endswith("_token")}
    again = config_class(**{name: value for name, value in stored.items() if name in fields})
    assert again.to_dict() == args.to_dict()


def test_a_configuration_can_be_copied_and_pickled(config_of):
    args = config_of(beta=0.1)
    for copied in (copy.deepcopy(args), pickle.loads(pickle.dumps(args)), dataclasses.replace(args, lmbda=0.1)):
        assert isinstance(copied, GKDConfig)
        assert copied.beta == 0.1
    assert dataclasses.replace(args, lmbda=0.1).lmbda == 0.1


def test_a_fitted_max_new_tokens_is_fitted_again_if_a_configuration_changes(config_of):
    off_policy = config_of(lmbda=0.0, max_length=64)
    assert off_policy.max_new_tokens == 128
    assert dataclasses.replace(off_policy, lmbda=0.5).max_new_tokens == 32
    fitted = config_of(lmbda=0.5, max_length=64)
    assert dataclasses.replace(fitted, max_length=512).max_new_tokens == 128
    assert dataclasses.replace(fitted, max_length=20).max_new_tokens == 10


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lmbda": 0.0}, False),
        ({"lmbda": 0.0, "eval_on_policy": True}, True),
        ({"lmbda": 0.0, "seq_kd": True}, True),
        ({"lmbda": 0.1}, True),
    ],
)
def test_completions_may_be_generated_in_training_or_for_an_evaluation(options, expected):
    assert GKDArguments(**options).generates_anywhere == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"use_vllm": True}, False), ({"vllm_mode": "server"}, False), ({"use_vllm": True, "vllm_mode": "server"}, True)],
)
def test_vllm_servers_are_used_if_both_options_are_set(options, expected):
    urls = {"vllm_server_base_url": "http://a:1"} if expected else {}
    assert GKDArguments(**options, **urls).uses_vllm_server == expected
