"""The tokens per forward of assisted generation: its bounds, and that drafting changes only the speed."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from gkd_trainer.errors import GKDConfigError
from gkd_trainer.report.drafting import tokens_per_forward

PROMPTS = [[5, 6, 7, 8], [30, 31], [100, 120, 140, 160, 180]]
HARMFUL = {
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[9]],
    "min_p": 0.2,
    "typical_p": 0.5,
    "top_p": 0.5,
    "temperature": 0.3,
    "min_new_tokens": 5,
    "suppress_tokens": [11],
    "max_length": 6,
}


@pytest.fixture
def teacher(tiny_model):
    """A model that never stops."""
    model = tiny_model(seed=1)
    model.generation_config.eos_token_id = None
    return model


def accepted_always(drafts, length=20):
    """The rate if every draft is accepted; the length may cut the last forward short."""
    return pytest.approx(length / -(-length // (drafts + 1)))


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("drafts", [1, 4])
def test_a_student_that_is_its_teacher_has_every_draft_accepted(teacher, tiny_model, drafts, seed):
    rate = tokens_per_forward(teacher, tiny_model(seed=1), PROMPTS, drafts=drafts, max_new_tokens=20, seed=seed)
    assert rate == accepted_always(drafts)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_temperature_is_applied_once_to_both(teacher, tiny_model, temperature):
    student = tiny_model(seed=1)
    rate = tokens_per_forward(teacher, student, PROMPTS, drafts=4, max_new_tokens=20, temperature=temperature, seed=0)
    assert rate == accepted_always(4)


@pytest.mark.parametrize("seed", [None, 0])
def test_generation_configs_of_either_model_change_nothing(teacher, tiny_model, seed):
    student = tiny_model(seed=2)
    plain = tokens_per_forward(teacher, student, PROMPTS, drafts=3, max_new_tokens=30, seed=seed)
    for model in (teacher, student):
        model.generation_config = GenerationConfig(pad_token_id=2, **HARMFUL)
    assert tokens_per_forward(teacher, student, PROMPTS, drafts=3, max_new_tokens=30, seed=seed) == plain
    same = copy.deepcopy(teacher)
    rate = tokens_per_forward(teacher, same, PROMPTS, drafts=4, max_new_tokens=20, seed=seed)
    assert rate == accepted_always(4)


def with_padded_head(model, size):
    """A copy whose head has more rows, which would win every argmax and nearly every draw."""
    larger = copy.deepcopy(model)
    used = model.config.vocab_size
    larger.resize_token_embeddings(size, mean_resizing=False)
    hidden = []
    with torch.no_grad():
        model.model.norm.register_forward_hook(lambda module, inputs, output: hidden.append(output))
        model(torch.tensor([PROMPTS[0]]))
        larger.get_output_embeddings().weight[used:] = 100 * hidden[0][0, -1]
    return larger


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("padded", ["teacher", "student"])
def test_padding_of_the_larger_head_is_neither_drafted_nor_generated(teacher, tiny_model, padded, seed):
    models = {"teacher": teacher, "student": tiny_model(seed=1)}
    models[padded] = with_padded_head(models[padded], 375)
    models["teacher"].generation_config.eos_token_id = None
    rate = tokens_per_forward(**models, prompts=PROMPTS, drafts=4, max_new_tokens=20, seed=seed)
    assert rate == accepted_always(4)
    assert models["student"].config.vocab_size == len(models["student"].get_output_embeddings().weight)


def test_the_mean_of_accepted_drafts_is_the_overlap_of_both_models(teacher, tiny_model):
    student, temperature = tiny_model(seed=2), 4.0
    ids_1L = torch.tensor(PROMPTS[:1])
    with torch.no_grad():
        p, q = ((model(ids_1L).logits[0, -1] / temperature).softmax(0) for model in (teacher, student))
    # A completion of two tokens takes one forward if its draft is accepted, else two.
    options = {"drafts": 1, "max_new_tokens": 2, "temperature": temperature, "seed": 0}
    forwards = 2 / tokens_per_forward(teacher, student, PROMPTS[:1] * 300, **options)
    overlap = torch.minimum(p, q).sum().item()
    assert 0.2 < overlap < 0.8
    assert 2 - forwards == pytest.approx(overlap, abs=0.08)


def test_drafts_that_are_never_accepted_give_one_token_per_forward(teacher, tiny_model):
    student = tiny_model(seed=1)
    with torch.no_grad():
        student.get_output_embeddings().weight.neg_()
    assert tokens_per_forward(teacher, student, PROMPTS, drafts=3, max_new_tokens=10) == 1.0


def test_adapters_of_either_model_stay_active(teacher, tiny_model):
    def adapted(model):
        with_adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        generator = torch.Generator().manual_seed(0)
        for name, weight in with_adapter.named_parameters():
            if "lora_" in name:
                weight.data = torch.randn(weight.shape, generator=generator)
        return with_adapter

    options = {"prompts": PROMPTS, "drafts": 4, "max_new_tokens": 20}
    assert tokens_per_forward(adapted(teacher), adapted(tiny_model(seed=1)), **options) == accepted_always(4)
    assert tokens_per_forward(adapted(tiny_model(seed=1)), tiny_model(seed=1), **options) < 4


def test_it_leaves_modes_configs_and_the_random_numbers_as_they_were(teacher, tiny_model):
    student = tiny_model(seed=2).train()
    student.model.layers[0].eval()
    configs = [model.generation_config for model in (teacher, student)]
    before = [config.to_dict() for config in configs]
    state = torch.get_rng_state()
    rates = {tokens_per_forward(teacher, student, PROMPTS, drafts=2, max_new_tokens=12, seed=3) for _ in range(2)}
    assert len(rates) == 1
    assert 1 <= rates.pop() <= 3
    assert student.training
    assert not student.model.layers[0].training
    assert not teacher.training
    assert [model.generation_config for model in (teacher, student)] == configs
    assert [config.to_dict() for config in configs] == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("prompts", "drafts"), [([], 4), (PROMPTS, 0)])
def test_nothing_to_measure_is_refused(teacher, tiny_model, prompts, drafts):
    with pytest.raises(GKDConfigError, match="expected prompts, and at least 1 draft"):
        tokens_per_forward(teacher, tiny_model(), prompts, drafts=drafts)


def test_a_temperature_of_zero_is_refused(teacher, tiny_model):
    with pytest.raises(GKDConfigError, match=r"temperature must be above 0; got 0"):
        tokens_per_forward(teacher, tiny_model(), PROMPTS, drafts=1, temperature=0, seed=0)


def test_one_model_in_both_roles_is_refused(teacher):
    with pytest.raises(GKDConfigError, match="load it twice"):
        tokens_per_forward(teacher, teacher, PROMPTS, drafts=1)


@pytest.mark.parametrize("roles", [("teacher",), ("student",), ("teacher", "student")])
def test_encoder_decoders_are_refused(teacher, tiny_model, tiny_encoder_decoder, roles):
    models = {"teacher": teacher, "student": tiny_model(), **{role: tiny_encoder_decoder() for role in roles}}
    with pytest.raises(GKDConfigError, match="must be causal language models; got T5ForConditionalGeneration"):
        tokens_per_forward(**models, prompts=PROMPTS, drafts=1)
