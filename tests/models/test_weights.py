"""The student's weights in the form of a checkpoint, with adapters merged into copies."""

import contextlib
import copy
import json
import resource

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    MixtralConfig,
    MixtralForCausalLM,
    set_seed,
)

from gkd_trainer.errors import GKDConfigError, GKDRolloutError
from gkd_trainer.models.loading import base_model
from gkd_trainer.models.weights import (
    changes_base_weights,
    checkpoint_weights,
    config_ties_head,
    has_tied_head,
    is_plain_lora,
    load_converted,
    write_adapter,
    write_weights,
)
from tests.rollouts.test_mixing_images import IDS, MODELS, TEXT

TIED = {"tie_word_embeddings": True}
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def student(tiny_model):
    """Make a small model of two layers."""

    def make(family="llama", **config):
        return tiny_model(family, head_scale=3.0, **config)

    return make


def adapted(model, config):
    """Wrap a model in an adapter whose every parameter is far from its initial value, which would change nothing."""
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                # IA3 multiplies, and the magnitudes of DoRA must stay positive.
                scale = 0.3 * parameter.abs().mean().clamp(min=0.3)
                if "magnitude" in name:
                    scale = 0.1 * parameter.mean()
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def lora(**options):
    options = {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 16, **options}
    return LoraConfig(task_type="CAUSAL_LM", **options)


ADAPTERS = {
    "LoRA": lora(),
    "LoRA on every linear layer": lora(target_modules="all-linear"),
    "LoRA of several ranks": lora(rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3}),
    "LoRA with biases": lora(bias="lora_only"),
    "rank-stabilised LoRA": lora(use_rslora=True),
    "DoRA": lora(use_dora=True),
    "IA3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4),
    "a whole layer": lora(modules_to_save=["norm"]),
    "a whole head": lora(modules_to_save=["lm_head"]),
    "whole embeddings": lora(modules_to_save=["embed_tokens"]),
    "some tokens": lora(trainable_token_indices=[5, 7]),
    "some tokens alone": lora(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2, 3]}),
    "LoRA on the embeddings": lora(target_modules=["q_proj", "embed_tokens"]),
    "LoRA on the head": lora(target_modules=["q_proj", "lm_head"]),
    "LoRA on both ends": lora(target_modules=["embed_tokens", "lm_head"]),
}

pytestmark = [
    # What PEFT advises against is what is tested here.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning"),
    pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias:UserWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
]


def logits_of(model):
    with torch.no_grad():
        return model(torch.arange(4, 44).view(4, 10)).logits


def loaded(make, weights, **config):
    """Return a model, with a head of its own, that holds the weights and nothing else."""
    model = make(tie_word_embeddings=False, seed=99, **config)
    model.load_state_dict(weights)
    return model


def state_of(model):
    """All that training a model depends on, and which tensors are one."""
    named = list(model.named_parameters(remove_duplicate=False))
    return {
        "parameters": {name: (parameter.detach().clone(), parameter.requires_grad) for name, parameter in named},
        "grads": {name: None if parameter.grad is None else parameter.grad.clone() for name, parameter in named},
        "places": {name: parameter.data_ptr() for name, parameter in named},
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "modules": {name: id(module) for name, module in model.named_modules(remove_duplicate=False)},
        "modes": [module.training for module in model.modules()],
    }


def assert_equal_states(state, before):
    assert state.keys() == before.keys()
    torch.testing.assert_close(state["grads"], before["grads"], rtol=0, atol=0)
    for kind in ("places", "modules", "modes"):
        assert state[kind] == before[kind]
    assert state["parameters"].keys() == before["parameters"].keys()
    for name, (value, requires_grad) in state["parameters"].items():
        assert requires_grad == before["parameters"][name][1]
        assert torch.equal(value, before["parameters"][name][0])
    assert all(torch.equal(buffer, before["buffers"][name]) for name, buffer in state["buffers"].items())


# What the weights are


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi", "cohere", "granite"])
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_a_plain_models_weights_are_those_that_save_pretrained_writes(student, family, is_tied, tmp_path):
    model = student(family, tie_word_embeddings=is_tied)
    weights = dict(checkpoint_weights(model))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert (HEAD in saved) is not is_tied
    # A tied head comes all the same, for engines that keep a copy of it.
    assert weights.keys() == {*saved, HEAD}
    assert all(torch.equal(weights[name], value) for name, value in saved.items())
    assert torch.equal(weights[HEAD], model.get_output_embeddings().weight)


@pytest.fixture(scope="module")
def mixture_of_experts():
    """A small Mixtral, whose experts are one tensor in memory and many in a checkpoint."""
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=60, num_key_value_heads=2, num_local_experts=3, **sizes)
    return MixtralForCausalLM(config).eval()


def test_weights_that_a_checkpoint_holds_in_another_form_come_in_that_form(mixture_of_experts, tmp_path):
    weights = dict(checkpoint_weights(mixture_of_experts))
    mixture_of_experts.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() != mixture_of_experts.state_dict().keys()
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], value) for name, value in saved.items())


def test_weights_in_another_form_are_loaded_from_a_checkpoint(mixture_of_experts, tmp_path):
    mixture_of_experts.save_pretrained(tmp_path)
    model = copy.deepcopy(mixture_of_experts)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert load_converted(model, tmp_path)
    torch.testing.assert_close(model.state_dict(), mixture_of_experts.state_dict(), rtol=0, atol=0)


def test_a_checkpoint_that_lacks_weights_is_refused(mixture_of_experts, tmp_path):
    shallow = copy.deepcopy(mixture_of_experts)
    del shallow.model.layers[1:]
    shallow.save_pretrained(tmp_path)
    with pytest.raises(GKDConfigError, match=r"lacks \d+ weights of the MixtralForCausalLM, such as model.layers.1"):
        load_converted(copy.deepcopy(mixture_of_experts), tmp_path)


def test_weights_in_the_models_own_form_are_left_to_trainer(student, tmp_path):
    assert not load_converted(student(), tmp_path)
    assert not load_converted(torch.nn.Linear(2, 2), tmp_path)
    assert not load_converted(get_peft_model(student(), lora()), tmp_path)


def test_experts_with_an_adapter_on_them_come_merged_and_in_the_checkpoints_form(mixture_of_experts, tmp_path):
    model = copy.deepcopy(mixture_of_experts)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = adapted(model, lora(target_modules=["q_proj"], target_parameters=parameters))
    before = state_of(model)
    weights = dict(checkpoint_weights(model))
    assert_equal_states(state_of(model), before)
    merged = copy.deepcopy(model).merge_and_unload()
    merged.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == saved.keys()
    torch.testing.assert_close(weights, saved)
    assert not torch.equal(
        weights["model.layers.0.block_sparse_moe.experts.1.w2.weight"],
        dict(checkpoint_weights(mixture_of_experts))["model.layers.0.block_sparse_moe.experts.1.w2.weight"],
    )


every_adapter = pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS.keys())
tied_or_not = pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])


@tied_or_not
@every_adapter
def test_a_model_of_the_merged_weights_predicts_what_the_adapted_one_does(student, config, is_tied):
    model = adapted(student(tie_word_embeddings=is_tied), copy.deepcopy(config))
    expected = logits_of(model)
    with model.disable_adapter():
        assert (logits_of(model) - expected).abs().max() > 0.005
    weights = dict(checkpoint_weights(model))
    torch.testing.assert_close(logits_of(loaded(student, weights)), expected, atol=1e-5, rtol=1e-5)


# Of a tied model, merge_and_unload merges an adapter on one end into the weight of both.
@pytest.mark.parametrize(
    ("config", "is_tied"),
    [
        pytest.param(config, is_tied, id=f"{name}-{'tied' if is_tied else 'untied'}")
        for name, config in ADAPTERS.items()
        for is_tied in (False, True)
        if not (is_tied and name.startswith("LoRA on ") and name != "LoRA on every linear layer")
    ],
)
def test_merged_weights_are_those_of_merge_and_unload_of_a_copy(student, config, is_tied):
    model = adapted(student(tie_word_embeddings=is_tied), copy.deepcopy(config))
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    weights = dict(checkpoint_weights(model))
    assert weights.keys() == merged.keys()
    assert all(torch.equal(weights[name], value) for name, value in merged.items())


@tied_or_not
@every_adapter
def test_merging_leaves_the_model_as_it_was(student, config, is_tied):
    model = adapted(student(tie_word_embeddings=is_tied), copy.deepcopy(config)).train()
    model(torch.arange(4, 24).view(2, 10), labels=torch.arange(4, 24).view(2, 10)).loss.backward()
    before = state_of(model)
    assert any(grad is not None and grad.any() for grad in before["grads"].values())
    for with_adapters in (True, False):
        for _, weight in checkpoint_weights(model, with_adapters=with_adapters):
            assert not weight.requires_grad
    assert_equal_states(state_of(model), before)


@tied_or_not
@every_adapter
def test_without_adapters_the_weights_are_the_base_models(student, config, is_tied):
    base = dict(checkpoint_weights(student(tie_word_embeddings=is_tied)))
    model = adapted(student(tie_word_embeddings=is_tied), copy.deepcopy(config))
    weights = dict(checkpoint_weights(model, with_adapters=False))
    assert weights.keys() == base.keys()
    if getattr(config, "bias", "none") != "none":  # those biases are the base model's own
        weights, base = ({n: w for n, w in some.items() if not n.endswith(".bias")} for some in (weights, base))
    assert all(torch.equal(weights[name], value) for name, value in base.items())


def test_trained_biases_of_the_base_model_come_along(student):
    model = adapted(student("qwen2"), lora(bias="all"))
    expected = logits_of(model)
    weights = dict(checkpoint_weights(model))
    torch.testing.assert_close(logits_of(loaded(student, weights, family="qwen2")), expected, atol=1e-5, rtol=1e-5)
    assert "model.layers.0.self_attn.q_proj.bias" in weights


def test_two_active_adapters_are_both_merged(student):
    model = adapted(student(), lora(target_modules=["q_proj"]))
    model.add_adapter("second", lora(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    expected = logits_of(model)
    torch.testing.assert_close(
        logits_of(loaded(student, dict(checkpoint_weights(model)))), expected, atol=1e-5, rtol=1e-5
    )
    model.base_model.set_adapter("default")
    assert (logits_of(model) - expected).abs().max() > 0.02


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("wrap", ["checkpointed", "compiled"])
def test_wrappers_inside_the_model_are_not_in_the_names(student, wrap):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    expected = dict(checkpoint_weights(student()))
    model = student()
    layers = model.model.layers
    layers[1] = checkpoint_wrapper(layers[1]) if wrap == "checkpointed" else torch.compile(layers[1])
    assert set(dict(model.named_parameters())) != set(expected)
    weights = dict(checkpoint_weights(model))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_a_quantised_model_is_refused(student, tmp_path):
    student(hidden=64).save_pretrained(tmp_path)
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantisation)
    for refused in (model, get_peft_model(model, lora())):
        with pytest.raises(GKDConfigError, match=r"quantised \(model\.layers\.0\..*vLLM can't take those"):
            list(checkpoint_weights(refused))


def test_an_adapter_that_can_not_be_merged_is_refused_with_its_reason(student):
    model = adapted(student(), lora(lora_bias=True))
    with pytest.raises(
        GKDConfigError, match=r"the adapter on model\.layers\.0\.\S+ can't be merged: .*base layer has no bias"
    ):
        list(checkpoint_weights(model))


# What they are asked


def test_a_head_is_tied_unless_an_adapter_is_on_either_end(student):
    assert has_tied_head(student(**TIED))
    assert not has_tied_head(student(tie_word_embeddings=False))
    untying = {name for name in ADAPTERS if not has_tied_head(adapted(student(**TIED), copy.deepcopy(ADAPTERS[name])))}
    assert untying == {
        "a whole head",
        "whole embeddings",
        "some tokens",
        "some tokens alone",
        "LoRA on the embeddings",
        "LoRA on the head",
        "LoRA on both ends",
    }
    assert not any(
        has_tied_head(adapted(student(tie_word_embeddings=False), copy.deepcopy(config)))
        for config in ADAPTERS.values()
    )


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("is_tied", [True, False])
def test_a_vision_language_models_head_is_tied_as_the_whole_models_config_says(family, is_tied):
    model_class, config_class, vision = MODELS[family]
    options = {**IDS, "tie_word_embeddings": is_tied}
    model = model_class(config_class(text_config=TEXT, vision_config=vision, **options))
    model.config.get_text_config().tie_word_embeddings = not is_tied
    assert config_ties_head(model) == has_tied_head(model) == is_tied
    with contextlib.suppress(AttributeError):  # a class that has the option keeps its default
        del model.config.get_text_config().tie_word_embeddings
    assert config_ties_head(model) == has_tied_head(model) == is_tied


def test_a_head_that_was_replaced_is_not_tied_whatever_the_config_says(student):
    model = student(**TIED)
    model.lm_head = torch.nn.Linear(32, 368, bias=False)
    assert model.config.tie_word_embeddings
    assert not has_tied_head(model)


PLAIN = {"LoRA", "LoRA on every linear layer", "rank-stabilised LoRA"}


def test_plain_lora_is_lora_on_linear_layers_and_nothing_else(student):
    plain = {name for name in ADAPTERS if is_plain_lora(adapted(student(), copy.deepcopy(ADAPTERS[name])))}
    assert plain == PLAIN
    assert is_plain_lora(get_peft_model(student(), lora(init_lora_weights="gaussian")))
    assert not is_plain_lora(student())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_lora_that_changed_the_base_model_is_not_plain(student, init):
    base = dict(checkpoint_weights(student()))
    model = get_peft_model(student(), lora(init_lora_weights=init))
    assert any(not torch.equal(weight, base[name]) for name, weight in checkpoint_weights(model, with_adapters=False))
    assert not is_plain_lora(model)


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, False),
        ({"init_lora_weights": False}, False),
        ({"init_lora_weights": "Gaussian"}, False),
        ({"init_lora_weights": "orthogonal"}, False),
        ({"init_lora_weights": "pissa_niter_4"}, True),
        ({"init_lora_weights": "lora_ga"}, True),
        ({"kasa_config": {"beta": 1e-4}}, True),
    ],
)
def test_some_adapters_change_the_weights_that_they_are_added_to(options, changes):
    config = LoraConfig()
    for name, value in options.items():
        setattr(config, name, value)  # older versions of PEFT lack some
    assert changes_base_weights(config) is changes
    assert not changes_base_weights(IA3Config())


def test_lora_beside_other_trained_weights_is_not_plain(student):
    model = get_peft_model(student(), lora())
    assert is_plain_lora(model)
    base_model(model).model.norm.weight.requires_grad_(True)
    assert not is_plain_lora(model)


def test_lora_is_not_plain_if_two_adapters_are_active(student):
    model = get_peft_model(student(), lora())
    model.add_adapter("second", lora())
    assert is_plain_lora(model)
    model.base_model.set_adapter(["default", "second"])
    assert not is_plain_lora(model)


# What is written


def load(folder, model):
    base_model(model).config.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    return loaded.eval()


def test_the_folder_appears_complete_and_can_be_loaded(student, tmp_path):
    model = adapted(student(), lora())
    write_weights(model, tmp_path / "weights")
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    assert (tmp_path / "weights").stat().st_mode & 0o777 == 0o700
    assert load_file(tmp_path / "weights" / "model.safetensors").keys() == dict(checkpoint_weights(model)).keys()
    torch.testing.assert_close(logits_of(load(tmp_path / "weights", model)), logits_of(model), atol=1e-5, rtol=1e-5)


def test_a_tied_head_is_written_under_both_names(student, tmp_path):
    model = student(**TIED)
    write_weights(model, tmp_path / "weights")
    written = load_file(tmp_path / "weights" / "model.safetensors")
    assert torch.equal(written[HEAD], written[EMBEDDINGS])
    assert torch.equal(logits_of(load(tmp_path / "weights", model)), logits_of(model))


def test_weights_in_several_files_have_an_index(student, tmp_path, monkeypatch):
    from gkd_trainer.models import weights

    save = weights.save_torch_state_dict
    monkeypatch.setattr(weights, "save_torch_state_dict", lambda *args, **kw: save(*args, **kw, max_shard_size="50KB"))
    model = student(**TIED)
    write_weights(model, tmp_path / "weights")
    index = json.loads((tmp_path / "weights" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == dict(checkpoint_weights(model)).keys()
    assert torch.equal(logits_of(load(tmp_path / "weights", model)), logits_of(model))


def test_a_folder_that_is_there_is_not_overwritten(student, tmp_path):
    write_weights(student(), tmp_path / "weights")
    before = (tmp_path / "weights" / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError):
        write_weights(student(seed=1), tmp_path / "weights")
    assert (tmp_path / "weights" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


@pytest.fixture
def file_limit():
    """Let files have only so many bytes, as on a disk that is full after those."""

    @contextlib.contextmanager
    def limit(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


def test_a_write_that_fails_leaves_no_folder_and_can_be_repeated(student, tmp_path, file_limit):
    with file_limit(16_384), pytest.raises(GKDRolloutError):
        write_weights(student(), tmp_path / "weights")
    assert list(tmp_path.iterdir()) == []
    write_weights(student(), tmp_path / "weights")
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


@pytest.mark.parametrize("name", ["default", "student"])
def test_only_the_active_adapter_is_written_and_it_can_be_loaded(student, tmp_path, name):
    model = get_peft_model(student(), lora(init_lora_weights=False), adapter_name=name)
    model.add_adapter("other", lora(target_modules=["v_proj"], init_lora_weights=False))
    write_adapter(model, tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    assert not list((tmp_path / "adapter").rglob("other"))
    loaded = PeftModel.from_pretrained(student(), tmp_path / "adapter")
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert not torch.equal(logits_of(loaded), logits_of(student()))


@pytest.mark.parametrize("write", [write_weights, write_adapter])
def test_weights_that_can_not_be_written_are_an_error_that_says_how_much_room_they_need(
    student, tmp_path, file_limit, write
):
    model = student() if write is write_weights else adapted(student(), lora(r=32))
    size = sum(weight.nbytes for name, weight in model.named_parameters() if write is write_weights or ".lora_" in name)
    with file_limit(16_384), pytest.raises(GKDRolloutError) as raised:
        write(model, tmp_path / "weights")
    message = str(raised.value)
    assert f"could not be written to {tmp_path / 'weights'}: " in message
    assert "File too large" in message
    assert f"They take {size / 1e6:,.1f} MB, and " in message
    assert " MB are free there" in message
    assert "vllm_sync_dir" in message
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_gone_is_an_error_of_ours(student, tmp_path):
    with pytest.raises(GKDRolloutError, match="No such file or directory"):
        write_weights(student(), tmp_path / "gone" / "weights")
