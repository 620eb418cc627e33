"""Generation as subclasses of TRL's GKDTrainer call it, beside TRL's own."""

import pytest
import torch
from transformers import GenerationConfig
from trl.experimental.gkd import GKDTrainer as TRLGKDTrainer

from gkd_trainer import GKDTrainer
from gkd_trainer.trainer.trl_generation import trl_generation_config
from tests.versions import CHECKPOINTING

PROMPTS = torch.tensor([[2, 2, 5, 6], [7, 8, 9, 10], [2, 11, 12, 13]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])


def generated(trainer_class, model, inputs, *rest, **options):
    torch.manual_seed(0)
    return trainer_class.generate_on_policy_outputs(model, inputs, GenerationConfig(pad_token_id=2, **options), *rest)


@pytest.mark.parametrize(
    "options",
    [
        {"eos_token_id": 2, "do_sample": False},
        {"eos_token_id": 2, "do_sample": True, "temperature": 0.9, "top_k": 0},
        {"eos_token_id": [2, *range(100, 200)], "do_sample": True, "top_k": 0},
        {"eos_token_id": None, "do_sample": True},
    ],
)
def test_ids_mask_and_labels_are_trls(tiny_model, options):
    # Hidden states that say little leave the sampled completions of unequal length.
    model = tiny_model(head_scale=2.0)
    model.generation_config.eos_token_id = None
    inputs = {"prompts": PROMPTS, "prompt_attention_mask": MASK}
    ours = generated(GKDTrainer, model, inputs, max_new_tokens=8, **options)
    theirs = generated(TRLGKDTrainer, model, inputs, max_new_tokens=8, **options)
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our, their)
    if isinstance(options["eos_token_id"], list):
        assert 0 in ours[1][:, PROMPTS.shape[1] :]


def test_the_pad_token_of_earlier_versions_is_taken_and_the_mask_may_be_missing(tiny_model):
    model, options = tiny_model(), {"max_new_tokens": 5, "eos_token_id": 2, "do_sample": False}
    inputs = {"prompts": PROMPTS[1:2]}
    ids, mask, labels = generated(GKDTrainer, model, inputs, 2, **options)
    with_mask = generated(GKDTrainer, model, {**inputs, "prompt_attention_mask": MASK[1:2]}, **options)
    assert all(torch.equal(one, two) for one, two in zip((ids, mask, labels), with_mask, strict=True))
    assert (labels[:, :4] == -100).all()
    assert torch.equal(labels[:, 4:], ids[:, 4:])


def test_an_output_may_be_a_dictionary_and_the_mask_holds_integers(tiny_model):
    inputs = {"prompts": torch.tensor([[5, 6, 7]]), "prompt_attention_mask": torch.tensor([[True, True, True]])}
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 2}
    plain, as_dictionary = (
        GKDTrainer.generate_on_policy_outputs(
            tiny_model(), inputs, GenerationConfig(**options, return_dict_in_generate=is_dictionary)
        )
        for is_dictionary in (False, True)
    )
    assert all(torch.equal(one, other) for one, other in zip(plain, as_dictionary, strict=True))
    assert plain[1].dtype == torch.int64


def test_the_sampling_options_become_a_generation_config(tiny_model, config):
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}
    model = tiny_model(eos=[2, 7])
    made = trl_generation_config(config(**sampling, generation_kwargs={"min_new_tokens": 2}), model, 9)
    assert {name: getattr(made, name) for name in sampling} == sampling
    assert (made.max_new_tokens, made.min_new_tokens, made.pad_token_id, made.eos_token_id) == (6, 2, 9, [2, 7])
    assert made.do_sample
    assert made.use_cache
    assert not trl_generation_config(config(**{CHECKPOINTING: True}), model, 9).use_cache


def test_options_of_vllm_do_not_reach_transformers_and_a_model_may_have_no_generation_config(config):
    args = config(use_vllm=True, generation_kwargs={"min_tokens": 2}, lmbda=0.5)
    made = trl_generation_config(args, torch.nn.Linear(1, 1), 9)
    assert not hasattr(made, "min_tokens")
    assert made.eos_token_id is None
