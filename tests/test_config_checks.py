"""Options that have no meaning together are refused, with what to do instead."""

import pytest
from packaging.version import Version
from transformers import GenerationConfig

from gkd_trainer.config import GKDArguments
from gkd_trainer.config_checks import (
    _REFUSED_GENERATION_KWARGS,
)
from gkd_trainer.errors import GKDConfigError
from tests.test_config import MyConfig
from tests.versions import TRANSFORMERS

NAN, INF = float("nan"), float("inf")


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
        ("watermarking_config", {"bias": 2.5}, "already drawn"),
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


def test_the_comparison_of_log_probs_is_declined_by_none_alone():
    for seq_kd in (False, True):
        args = GKDArguments(use_vllm=True, seq_kd=seq_kd, generation_kwargs='{"logprobs": null}')
        assert args.generation_kwargs == {"logprobs": None}
    with pytest.raises(GKDConfigError, match="logprobs=5: it must be None"):
        GKDArguments(use_vllm=True, generation_kwargs={"logprobs": 5})


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


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
def test_cutting_prompts_at_the_front_is_refused(config_of):
    with pytest.raises(GKDConfigError, match="truncation_mode='keep_end' would cut the prompts, but here rows"):
        config_of(MyConfig, truncation_mode="keep_end")
    config_of(MyConfig, truncation_mode="keep_start")


@pytest.mark.parametrize("loss_type", ["dft", "whatever"])
def test_another_loss_of_sft_is_refused(config_of, loss_type):
    with pytest.raises(GKDConfigError, match=f"loss_type='{loss_type}'.*the loss here is the divergence"):
        config_of(MyConfig, loss_type=loss_type)
    config_of(MyConfig, loss_type="nll")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_vllm": True, "vllm_mode": "server"}, "vllm_mode='server' needs vllm_server_base_url.*got None"),
        ({"vllm_server_base_url": "http://a:1"}, "has no effect without use_vllm=True and vllm_mode='server'"),
        ({"rollout_overlap": True}, "rollout_overlap=True generates while the student trains.*vllm_mode='server'"),
        ({"rollout_overlap": True, "use_vllm": True}, "vllm_mode='server'"),
        ({"vllm_weight_sync": "nccl"}, "'nccl' sends weights to a server"),
        ({"vllm_max_model_length": 512}, r"vllm_max_model_length \(512\) must be at least max_length \(1024\)"),
        ({"use_vllm": True, "temperature": 2.5}, r"temperature must be at most 2\.0 under use_vllm; got 2\.5"),
        ({"use_vllm": True, "generation_kwargs": {"min_new_tokens": 2}}, "can't hold 'min_new_tokens' under use_vllm"),
    ],
)
def test_what_servers_can_not_do_is_refused(options, message):
    with pytest.raises(GKDConfigError, match=message):
        GKDArguments(**options)
