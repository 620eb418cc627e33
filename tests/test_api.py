"""The public interface: names, options and defaults change only on purpose, with a line in the changelog."""

import dataclasses
import subprocess
import sys

import pytest

import gkd_trainer

NAMES = [
    "CachedTeacher",
    "ContextTeacher",
    "FrozenTeacher",
    "GKDArguments",
    "GKDConfig",
    "GKDConfigError",
    "GKDDataError",
    "GKDError",
    "GKDMixin",
    "GKDNumericsError",
    "GKDRolloutError",
    "GKDServerError",
    "GKDTeacherError",
    "GKDTrainer",
    "HFRollouts",
    "HiddenStateServerTeacher",
    "OtherTokenizerTeacher",
    "RolloutEngine",
    "RoutedTeachers",
    "SelfTeacher",
    "Teacher",
    "VLLMColocateRollouts",
    "VLLMServerRollouts",
    "VLLMServerTeacher",
    "WeightedTeachers",
    "cache_predictions",
    "generalized_jsd",
    "linear_generalized_jsd",
    "topk_generalized_jsd",
]

OPTIONS = {
    "lmbda": 0.5,
    "lmbda_end": None,
    "lmbda_schedule": "constant",
    "lmbda_granularity": "sample",
    "beta": 0.5,
    "divergence": "jsd",
    "divergence_options": None,
    "loss_workspace_mb": None,
    "loss_product_dtype": "auto",
    "divergence_scale": "paper",
    "loss_temperature": 1.0,
    "ce_weight": 0.0,
    "seq_kd": False,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "max_new_tokens": 128,
    "generation_kwargs": None,
    "rollout_batch_size": None,
    "rollout_steps": 1,
    "rollout_overlap": False,
    "use_vllm": False,
    "vllm_mode": "colocate",
    "vllm_server_base_url": None,
    "vllm_server_api_token": None,
    "vllm_server_timeout": 240.0,
    "vllm_request_timeout": 300.0,
    "vllm_weight_sync": "auto",
    "vllm_sync_dir": None,
    "vllm_gpu_memory_utilization": 0.3,
    "vllm_max_model_length": None,
    "vllm_tensor_parallel_size": 1,
    "vllm_enable_sleep_mode": False,
    "vllm_engine_kwargs": None,
    "max_length": 1024,
    "train_on": "all_turns",
    "disable_dropout": True,
    "teacher_model_name_or_path": None,
    "self_teacher": None,
    "self_teacher_ema_decay": 0.99,
    "teacher_model_init_kwargs": None,
    "teacher_top_k": None,
    "teacher_tail": "bucket",
    "teachers": None,
    "teacher_column": "teacher",
    "teacher_weights": None,
    "teacher_offload": False,
    "teacher_server_base_url": None,
    "teacher_server_model": None,
    "teacher_server_signal": "top_k",
    "teacher_server_dtype": "auto",
    "teacher_server_api_token": None,
    "teacher_server_checks": True,
    "teacher_vocabulary_mode": "same",
    "teacher_min_matched_mass": 0.9,
    "teacher_tokenizer_name_or_path": None,
    "teacher_cache_dir": None,
    "teacher_cache_miss": "error",
    "eval_on_policy": False,
    "log_completions": False,
    "num_completions_to_print": 4,
    "report_samples": 0,
}

PLAIN_OPTIONS = {
    "model_init_kwargs": None,
    "trust_remote_code": False,
    "dataset_num_proc": None,
    "dataset_kwargs": None,
}


def test_the_public_names_are_these():
    assert gkd_trainer.__all__ == NAMES
    assert dir(gkd_trainer) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_there(name):
    value = getattr(gkd_trainer, name)
    assert value.__name__ == name
    assert value.__module__.startswith("gkd_trainer.")
    assert value.__doc__


def test_another_name_is_no_attribute():
    with pytest.raises(AttributeError, match="module 'gkd_trainer' has no attribute 'GKD'"):
        _ = gkd_trainer.GKD


def test_the_options_and_their_defaults_are_these():
    options = {option.name: option.default for option in dataclasses.fields(gkd_trainer.GKDArguments)}
    assert options == OPTIONS
    assert list(options) == list(OPTIONS)


def test_the_plain_configuration_adds_these():
    from transformers import TrainingArguments

    base = {option.name for option in dataclasses.fields(TrainingArguments)}
    own = {option.name: option.default for option in dataclasses.fields(gkd_trainer.GKDConfig)}
    assert {name: own[name] for name in own.keys() - base - OPTIONS.keys()} == PLAIN_OPTIONS


def test_every_error_is_one_of_ours_and_a_standard_one():
    for name, standard in (
        ("GKDConfigError", ValueError),
        ("GKDDataError", ValueError),
        ("GKDTeacherError", ValueError),
        ("GKDNumericsError", ArithmeticError),
    ):
        assert issubclass(getattr(gkd_trainer, name), (gkd_trainer.GKDError, standard))
        assert issubclass(getattr(gkd_trainer, name), gkd_trainer.GKDError)
        assert issubclass(getattr(gkd_trainer, name), standard)


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import gkd_trainer", ["torch", "transformers", "trl", "datasets", "peft", "accelerate"]),
        ("import gkd_trainer.divergence", ["transformers", "trl", "datasets", "peft", "accelerate"]),
        ("from gkd_trainer import generalized_jsd", ["transformers", "trl", "datasets", "peft", "accelerate"]),
        ("from gkd_trainer import GKDArguments", ["trl", "datasets"]),
    ],
)
def test_an_import_brings_no_more_than_it_needs(statement, absent):
    program = f"import sys\n{statement}\nprint(*(name for name in {absent} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
