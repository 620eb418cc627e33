"""Options without effect in a run are found, each with what it needs."""

import dataclasses

import pytest

from gkd_trainer.config import GKDArguments, GKDConfig
from gkd_trainer.config_checks import REFUSED_UNUSED
from gkd_trainer.config_effects import NEEDS, Run, unused_options

IN_TABLE = [name for names, _, _ in NEEDS for name in names.split()]
IN_EVERY_RUN = {
    *("lmbda", "loss_workspace_mb", "loss_product_dtype", "loss_temperature", "max_length", "train_on"),
    *("disable_dropout", "eval_on_policy", "report_samples"),
    # Refused without what they need: by the configuration, or, for the teacher's, by the trainer.
    *("lmbda_end", "lmbda_schedule", "vllm_server_base_url", "teacher_server_base_url"),
    *("teacher_model_name_or_path", "teacher_model_init_kwargs", "teacher_top_k", "teacher_server_signal"),
    *("teachers", "teacher_cache_dir", "teacher_vocabulary_mode"),
    *("teacher_model_name_or_path", "teacher_model_init_kwargs", "teacher_top_k", "self_teacher"),
    # Evaluation completes rows that are prompts alone.
    "max_new_tokens",
}
HIDDEN_STATES = {
    "teacher_server_base_url": "http://a:1",
    "teacher_server_signal": "hidden_states",
    "teacher_model_name_or_path": "a/teacher",
}
SERVER = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://a:1"}


def test_the_table_has_every_option_that_some_runs_do_not_use():
    assert len(IN_TABLE) == len(set(IN_TABLE))
    options = {option.name for option in dataclasses.fields(GKDArguments)}
    assert {*IN_TABLE} - {"model_init_kwargs"} == options - IN_EVERY_RUN
    assert "model_init_kwargs" in {option.name for option in dataclasses.fields(GKDConfig)}
    assert {*REFUSED_UNUSED} < {*IN_TABLE}


@pytest.mark.parametrize(
    ("unused", "options"),
    [
        ({"temperature": 0.5, "top_k": 5, "rollout_steps": 2, "log_completions": True}, {"lmbda": 0.0}),
        ({"generation_kwargs": {"min_new_tokens": 1}, "min_p": 0.1, "top_p": 0.5}, {"lmbda": 0.0}),
        ({"repetition_penalty": 1.1, "lmbda_granularity": "batch"}, {"lmbda": 0.0}),
        ({"temperature": 0.5}, {"lmbda": 0.0, "eval_on_policy": True}),
        ({"lmbda_granularity": "batch"}, {"lmbda": 1.0}),
        ({"num_completions_to_print": 2}, {}),
        ({"rollout_batch_size": 2}, {"use_vllm": True}),
        ({"beta": 0.1, "divergence_scale": "continuous"}, {"divergence": "skew_kl"}),
        ({"divergence_scale": "continuous"}, {"beta": 0.0}),
        ({"beta": 0.1}, {"teacher_vocabulary_mode": "uld"}),
        ({"divergence": "skew_kl", "divergence_options": {"alpha": 0.3}}, {"teacher_vocabulary_mode": "uld"}),
        ({"teacher_min_matched_mass": 0.5, "teacher_tokenizer_name_or_path": "a"}, {}),
        ({"teacher_min_matched_mass": 0.5}, {"teacher_vocabulary_mode": "gold"}),
        ({"teacher_server_model": "a", "teacher_server_api_token": "key", "teacher_server_checks": False}, {}),
        ({"teacher_weights": {"a": 1}, "teacher_column": "domain"}, {}),
        ({"teacher_offload": True}, {"self_teacher": "base"}),
        ({"teacher_offload": True}, {"teacher_server_base_url": "http://a:1"}),
        ({"teacher_offload": True}, {"teacher_cache_dir": "/a", "lmbda": 0.0}),
        ({"teacher_column": "domain"}, {"teachers": {"a": "b"}, "teacher_weights": {"a": 1}}),
        ({"teacher_cache_miss": "teacher"}, {}),
        ({"teacher_server_dtype": "float16"}, {"teacher_server_base_url": "http://a:1"}),
        ({"self_teacher_ema_decay": 0.5}, {"self_teacher": "base"}),
        ({"vllm_mode": "server", "vllm_weight_sync": "full", "vllm_gpu_memory_utilization": 0.5}, {}),
        ({"vllm_server_timeout": 5.0, "vllm_request_timeout": 5.0, "vllm_sync_dir": "/a"}, {"use_vllm": True}),
        ({"vllm_server_api_token": "key"}, {"use_vllm": True}),
        ({"vllm_sync_dir": "/a"}, {**SERVER, "vllm_weight_sync": "nccl"}),
        ({"vllm_tensor_parallel_size": 2, "vllm_enable_sleep_mode": True, "vllm_max_model_length": 2048}, SERVER),
        ({"vllm_engine_kwargs": {"enforce_eager": True}}, SERVER),
        ({"rollout_overlap": True}, {**SERVER, "lmbda": 0.0}),
    ],
)
def test_an_option_without_effect_is_listed_with_what_it_needs(unused, options):
    told = unused_options(Run(GKDArguments(**unused, **options)))
    assert {name for name, _ in told} == unused.keys()
    assert all(needs for _, needs in told)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5, "top_k": 5, "rollout_steps": 2, "log_completions": True, "num_completions_to_print": 2},
        {"lmbda": 0.0, "lmbda_end": 0.5, "lmbda_schedule": "linear", "lmbda_granularity": "batch", "min_p": 0.1},
        {"lmbda": 0.0, "seq_kd": True, "temperature": 0.5, "rollout_batch_size": 2},
        {"use_vllm": True, "seq_kd": True, "rollout_batch_size": 2},
        {"beta": 0.1, "divergence_scale": "continuous"},
        {"divergence": "skew_kl", "divergence_options": {"alpha": 0.3}, "teacher_vocabulary_mode": "matched"},
        {"teacher_top_k": 5, "teacher_tail": "renormalize"},
        {"teacher_vocabulary_mode": "matched", "teacher_min_matched_mass": 0.5, "teacher_tokenizer_name_or_path": "a"},
        {"teacher_server_base_url": "http://a:1", "vllm_server_timeout": 5.0, "teacher_server_checks": False},
        {**HIDDEN_STATES, "teacher_server_dtype": "float16", "teacher_model_init_kwargs": {"revision": "main"}},
        {"use_vllm": True, "vllm_engine_kwargs": {"enforce_eager": True}, "vllm_weight_sync": "full"},
        {**SERVER, "vllm_sync_dir": "/a", "vllm_request_timeout": 5.0, "rollout_overlap": True},
        {"lmbda": 0.0, "ce_weight": 0.5, "max_new_tokens": 5},
        {"teacher_cache_dir": "/a", "teacher_cache_miss": "teacher"},
        {"self_teacher": "ema", "self_teacher_ema_decay": 0.5},
    ],
)
def test_an_option_with_an_effect_is_not(options):
    assert unused_options(Run(GKDArguments(**options))) == []


@pytest.mark.parametrize(
    ("fact", "options", "unused"),
    [
        ("has_top_tokens", {"teacher_tail": "renormalize"}, {"teacher_tail"}),
        ("loads_student", {"model_init_kwargs": {"dtype": "bfloat16"}}, {"model_init_kwargs"}),
        ("builds_rollouts", {"use_vllm": True, "vllm_weight_sync": "full"}, {"use_vllm", "vllm_weight_sync"}),
        ("builds_rollouts", {"rollout_batch_size": 2}, {"rollout_batch_size"}),
        ("has_eval_rows", {"use_vllm": True, "lmbda": 0.0}, {"use_vllm"}),
        ("has_eval_rows", {"use_vllm": True, "lmbda": 0.0, "eval_on_policy": True}, set()),
        ("has_eval_rows", {"use_vllm": True, "lmbda": 1.0}, set()),
    ],
)
def test_facts_that_only_the_trainer_knows_count_once_known(tmp_path, fact, options, unused):
    args = GKDConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, **options)
    assert unused_options(Run(args)) == []
    assert {name for name, _ in unused_options(Run(args, **{fact: False}))} == unused
