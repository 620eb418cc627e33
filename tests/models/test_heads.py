"""Splitting a causal LM: the head found is the model's, or the model computes full logits."""

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    RecurrentGemmaConfig,
    RwkvConfig,
)

from gkd_trainer.batch_keys import IGNORE_INDEX
from gkd_trainer.models.decoders import with_decoder_inputs
from gkd_trainer.models.heads import (
    InseparableHead,
    SeparableHead,
    compare,
    find_context,
    find_head,
    predict,
    rounds_logits,
    vocabulary_size,
)
from gkd_trainer.signals import HiddenSignal, LogitsSignal
from gkd_trainer.teachers import FrozenTeacher
from gkd_trainer.types import TokenBatch
from tests.vision import make_pair

FAMILIES = ["llama", "qwen2", "gemma2", "phi", "cohere", "granite"]


def padded_batch(vocab=368):
    """Three rows of different lengths, padded on the right, of which some tokens are trained on."""
    generator = torch.Generator().manual_seed(1)
    ids_BL = torch.randint(0, vocab, (3, 9), generator=generator)
    mask_BL = torch.tensor([[1] * 9, [1] * 7 + [0] * 2, [1] * 4 + [0] * 5])
    labels_BL = ids_BL.masked_fill(mask_BL == 0, IGNORE_INDEX)
    labels_BL[:, :2] = IGNORE_INDEX
    inputs = {"input_ids": ids_BL, "attention_mask": mask_BL, "labels": labels_BL}
    return TokenBatch.from_inputs(inputs)


def model_logits(model, batch):
    return model(**batch.model_inputs).logits[batch.is_scored_BL]


class Selections(TorchDispatchMode):
    """Counts the operations whose number of results depends on values, for which a GPU has to be waited for."""

    def __init__(self):
        super().__init__()
        self.nonzeros = self.masks = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.nonzeros += func is torch.ops.aten.nonzero.default
        if func is torch.ops.aten.index.Tensor:
            self.masks += any(index is not None and index.dtype == torch.bool for index in args[1])
        return func(*args, **(kwargs or {}))


class UnknownScale(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.config.unheard_of_scale
        return output


class UnknownSoftcap(LlamaForCausalLM):
    """As good as the identity as long as logits are small, like those of a model that was never trained."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output


class UnknownOffset(LlamaForCausalLM):
    """Lost beside large logits, but a difference of 0.01 nat between tokens."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 0.01 * (torch.arange(output.logits.shape[-1]) % 2)
        return output


class MaskedTokens(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits[..., -1] = -torch.inf
        return output


class TwoForwards(LlamaForCausalLM):
    """Contrasts two passes, so that no one input of the head explains the logits."""

    def forward(self, *args, **kwargs):
        first = super().forward(*args, **kwargs)
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits - first.logits
        return output


class OwnLinear(nn.Linear):
    pass


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_head_give_the_models_own_logits(tiny_model, family):
    model, batch = tiny_model(family), padded_batch()
    head = find_head(model)
    assert isinstance(head, SeparableHead)
    signal, _ = predict(model, batch, head)
    assert isinstance(signal, HiddenSignal)
    assert signal.hidden_NH.shape == (batch.targets_N.numel(), 32)
    expected_NV = model_logits(model, batch)
    assert expected_NV.std() > 0.1
    torch.testing.assert_close(signal.head.logits(signal.hidden_NH), expected_NV, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bf16_model_is_separable_and_gives_its_logits_up_to_their_rounding(tiny_model, family):
    model, batch = tiny_model(family).bfloat16(), padded_batch()
    head = find_head(model)
    assert isinstance(head, SeparableHead)
    signal, _ = predict(model, batch, head)
    expected_NV = model_logits(model, batch).float()
    torch.testing.assert_close(signal.head.logits(signal.hidden_NH), expected_NV, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("family", ["llama", "granite", "cohere"])
def test_attention_that_takes_only_halves_does_not_hide_the_head_of_float32_weights(tiny_model, flash_like, family):
    model = tiny_model(family, attn_implementation=flash_like)
    with pytest.raises(RuntimeError, match="FlashAttention"):
        model(input_ids=torch.arange(4)[None])
    assert isinstance(find_head(model), SeparableHead)
    assert not torch.is_autocast_enabled("cpu")
    model.lm_head.register_forward_hook(lambda module, args, output: 1.1 * output)
    assert isinstance(find_head(model), InseparableHead)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_model_with_tiny_logits_is_separable(tiny_model, family):
    assert isinstance(find_head(tiny_model(family, head_scale=1e-3)), SeparableHead)


@pytest.mark.parametrize("head_scale", [1.0, 20.0])
@pytest.mark.parametrize("model_class", [UnknownScale, UnknownSoftcap, UnknownOffset, MaskedTokens, TwoForwards])
def test_an_unknown_step_between_head_and_logits_is_answered_with_logits(tiny_model, model_class, head_scale):
    model = model_class(tiny_model().config).eval()
    model.config.unheard_of_scale = 0.5
    with torch.no_grad():
        model.lm_head.weight.mul_(head_scale)
    batch = padded_batch()
    head = find_head(model)
    assert isinstance(head, InseparableHead)
    assert "its logits are not its head applied to the head's input" in head.reason
    signal, output = predict(model, batch, head)
    assert isinstance(signal, LogitsSignal)
    assert output.logits.shape == (3, 9, 368)
    torch.testing.assert_close(signal.logits_NV, model_logits(model, batch))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "Linear"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "ModulesToSaveWrapper"),
    ],
)
def test_an_adapter_on_the_head_is_inseparable(tiny_model, options, named):
    student = get_peft_model(tiny_model(), LoraConfig(r=2, init_lora_weights=False, **options)).eval()
    base, batch = student.get_base_model(), padded_batch()
    head = find_head(base)
    assert isinstance(head, InseparableHead)
    assert f"its head is a {named}, not a plain nn.Linear" in head.reason
    signal, _ = predict(student, batch, head)
    torch.testing.assert_close(signal.logits_NV, model_logits(student, batch))


def students_of_logits(tiny_model):
    """Students that compute their own logits, by how."""
    lora, plain = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "lm_head"]), tiny_model()
    saved = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    replaced = tiny_model()
    replaced.lm_head.forward = replaced.lm_head.forward
    return {
        "adapter": get_peft_model(tiny_model(), lora),
        "saved": get_peft_model(tiny_model(), saved),
        "unknown": UnknownSoftcap(plain.config),
        "replaced": replaced,
        "compiled": torch.compile(plain, backend="eager"),
    }


@pytest.mark.parametrize("kind", ["adapter", "saved", "unknown", "replaced", "compiled"])
def test_autocast_does_not_round_the_logits_of_float32_weights(tiny_model, kind):
    student, batch = students_of_logits(tiny_model)[kind].eval(), padded_batch()
    base = {"adapter": lambda: student.get_base_model(), "saved": lambda: student.get_base_model()}
    model = base.get(kind, lambda: getattr(student, "_orig_mod", student))()
    head = InseparableHead("a test", model.lm_head) if kind == "compiled" else find_head(model)
    assert isinstance(head, InseparableHead)
    inputs, forwards = [], (model.lm_head.forward, "forward" in vars(model.lm_head))
    hook = model.lm_head.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        signal, _ = predict(student, batch, head)
    hook.remove()
    assert (model.lm_head.forward, "forward" in vars(model.lm_head)) == forwards
    expected_BLV = model.lm_head(inputs[0].float())
    if kind == "unknown":
        expected_BLV = 30 * torch.tanh(expected_BLV / 30)
    torch.testing.assert_close(signal.logits_NV, expected_BLV[batch.rows_N, batch.columns_N], rtol=1e-5, atol=1e-6)


def test_an_embedding_that_serves_as_the_head_still_reads_token_ids(tiny_model):
    model, batch = tiny_model(tie_word_embeddings=True), padded_batch()
    embedding = model.get_input_embeddings()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as FSMT's output embeddings are
        signal, _ = predict(model, batch, InseparableHead("a test", embedding))
    assert signal.logits_NV.shape[1] == embedding.num_embeddings


def test_a_head_of_half_weights_computes_as_it_does_alone_and_is_put_back_after_a_forward_that_raised(tiny_model):
    model, batch = tiny_model().bfloat16(), padded_batch()
    signal, _ = predict(model, batch, InseparableHead("a test", model.lm_head))
    assert torch.equal(signal.logits_NV, model_logits(model, batch))
    model.lm_head.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predict(model, batch, InseparableHead("a test", model.lm_head))
    assert "forward" not in vars(model.lm_head)


def test_a_compiled_student_is_compiled_once(tiny_model):
    model, batch = tiny_model(), padded_batch()
    student = torch.compile(model, backend="eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        first, _ = predict(student, batch, InseparableHead("a test", model.lm_head))
        with torch._dynamo.config.patch(error_on_recompile=True):
            second, _ = predict(student, batch, InseparableHead("a test", model.lm_head))
    assert torch.equal(first.logits_NV, second.logits_NV)


@pytest.mark.parametrize(
    ("dtype", "is_autocast", "has_head", "is_rounded"),
    [
        (torch.float32, True, True, False),
        (torch.bfloat16, False, True, True),
        (torch.float32, False, False, False),
        (torch.float32, True, False, True),
    ],
)
def test_logits_are_rounded_by_halves_and_by_an_autocast_that_no_head_escapes(
    tiny_model, dtype, is_autocast, has_head, is_rounded
):
    model = tiny_model().to(dtype)
    if not has_head:
        model.get_output_embeddings = lambda: None
    assert rounds_logits(model, is_autocast=is_autocast) is is_rounded


def test_an_offset_is_found_beside_large_logits_too(tiny_model):
    model = UnknownOffset(tiny_model().config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(2000)
    assert model(torch.arange(4)[None]).logits.abs().max() > 100
    assert isinstance(find_head(model), InseparableHead)


def test_an_adapter_on_the_trunk_is_separable_and_its_effect_is_in_the_hidden_states(tiny_model):
    plain = tiny_model()
    student = get_peft_model(tiny_model(), LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])).eval()
    batch = padded_batch()
    head = find_head(student.get_base_model())
    assert isinstance(head, SeparableHead)
    signal, _ = predict(student, batch, head)
    logits_NV = signal.head.logits(signal.hidden_NH)
    torch.testing.assert_close(logits_NV, model_logits(student, batch), atol=1e-5, rtol=1e-5)
    assert (logits_NV - model_logits(plain, batch)).abs().max() > 1e-3


def test_a_head_of_another_type_is_inseparable(tiny_model):
    model = tiny_model()
    model.lm_head = OwnLinear(32, 368, bias=False)
    head = find_head(model)
    assert isinstance(head, InseparableHead)
    assert "its head is a OwnLinear" in head.reason


def test_a_head_whose_forward_was_replaced_is_inseparable_and_keeps_it(tiny_model):
    model = tiny_model()
    model.lm_head.forward = replaced = lambda hidden: nn.functional.linear(hidden, model.lm_head.weight)
    head = find_head(model)
    assert isinstance(head, InseparableHead)
    predict(model, padded_batch(), head)
    assert model.lm_head.forward is replaced


def test_a_head_on_the_meta_device_is_inseparable(tiny_model):
    model = tiny_model()
    model.lm_head.to("meta")
    assert "offloaded" in find_head(model).reason


def test_a_model_without_output_embeddings_is_inseparable():
    assert "no output embeddings" in find_head(nn.Linear(2, 2)).reason


def test_finding_the_head_restores_training_flags_and_random_states(tiny_model):
    model = tiny_model(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    find_head(model)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]
    assert not model.lm_head._forward_pre_hooks


def test_finding_the_head_restores_the_model_when_its_forward_raises(tiny_model):
    model = tiny_model().train()
    model.model.layers[1].register_forward_pre_hook(lambda module, args: 1 / 0)
    assert "ZeroDivisionError" in find_head(model).reason
    assert all(module.training for module in model.modules())
    assert not model.lm_head._forward_pre_hooks


def test_the_head_works_again_after_the_forward_raised(tiny_model):
    model, batch = tiny_model(), padded_batch()
    head, expected_NV = find_head(model), model_logits(model, batch)

    def interrupt(module, args, output):
        raise RuntimeError("interrupted")

    hook = model.lm_head.register_forward_hook(interrupt)
    with pytest.raises(RuntimeError, match="interrupted"):
        predict(model, batch, head)
    hook.remove()
    assert torch.equal(model_logits(model, batch), expected_NV)


def test_the_output_holds_one_real_logit_column(tiny_model):
    model, batch = tiny_model("phi"), padded_batch()
    _, output = predict(model, batch, find_head(model))
    assert output.logits.shape == (3, 9, 1)
    torch.testing.assert_close(output.logits, model(**batch.model_inputs).logits[..., :1])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gradients_through_hidden_states_are_those_through_full_logits(tiny_model, family, tied):
    batch = padded_batch()

    def gradients(uses_hidden):
        model = tiny_model(family, head_scale=1.0, tie_word_embeddings=tied)
        if uses_hidden:
            signal, output = predict(model, batch, find_head(model))
            logits_NV = signal.head.logits(signal.hidden_NH)
            # What DDP needs: the head's weight is also in the graph of the forward's own output.
            weight = model.get_output_embeddings().weight
            assert torch.autograd.grad(output.logits.sum(), weight, retain_graph=True)[0][0].abs().max() > 0
        else:
            logits_NV = model_logits(model, batch)
        nn.functional.cross_entropy(logits_NV, batch.targets_N).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected, actual = gradients(False), gradients(True)
    assert ("lm_head.weight" in expected) is not tied
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_the_head_of_a_signal_follows_training(tiny_model):
    model, batch = tiny_model(), padded_batch()
    head = find_head(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    signal, _ = predict(model, batch, head)
    torch.testing.assert_close(signal.head.logits(signal.hidden_NH), model_logits(model, batch), atol=1e-5, rtol=1e-5)


def test_forward_options_reach_the_model(tiny_model):
    model, batch = tiny_model(), padded_batch()
    for head in (find_head(model), InseparableHead("asked for")):
        assert predict(model, batch, head, use_cache=True)[1].past_key_values is not None
        assert predict(model, batch, head, use_cache=False)[1].past_key_values is None


def test_the_rows_of_a_plain_head_count_its_padding(tiny_model):
    model = tiny_model()
    model.lm_head = nn.Linear(32, 384, bias=False)
    assert vocabulary_size(model) == 384


def test_the_rows_of_another_head_are_those_of_the_config(tiny_model):
    model = tiny_model()
    model.lm_head = OwnLinear(32, 11, bias=False)  # packed, as quantised weights are
    assert vocabulary_size(model) == 368


def test_model_that_wants_more_than_ids_and_mask_is_asked_for_its_logits(tiny_model):
    class Demanding(type(tiny_model())):
        def forward(self, input_ids, attention_mask=None, *, topic):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask)

    model = tiny_model()
    model.__class__ = Demanding
    head = find_head(model)
    assert isinstance(head, InseparableHead)
    assert "TypeError" in head.reason


def scaled(rope_type, factor, original=None, stated=2048):
    scaling = {"rope_type": rope_type, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    return LlamaConfig(max_position_embeddings=stated, rope_parameters={"rope_theta": 1e4, **scaling})


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (LlamaConfig(max_position_embeddings=512), 512),
        (GPT2Config(n_positions=256), 256),
        (GPTNeoConfig(max_position_embeddings=128), 128),
        (OPTConfig(max_position_embeddings=64), 64),
        (Gemma2Config(max_position_embeddings=300), 300),  # slides in every other layer
        (Qwen2Config(max_position_embeddings=300, use_sliding_window=False), 300),
        (scaled("linear", 4.0), 8192),
        (scaled("dynamic", 2.0), 4096),
        (scaled("yarn", 4.0, original=2048), 8192),
        (scaled("yarn", 4.0, original=2048, stated=8192), 8192),
        (scaled("llama3", 8.0, original=8192, stated=131072), 131072),
        (
            Gemma3TextConfig(
                max_position_embeddings=1000,
                rope_parameters={
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            ),
            8000,
        ),
        (FalconConfig(max_position_embeddings=99, alibi=True), None),
        (BloomConfig(), None),
        (MistralConfig(max_position_embeddings=500, sliding_window=100), None),
        (MistralConfig(max_position_embeddings=500, sliding_window=None), 500),
        (Phi3Config(max_position_embeddings=500, sliding_window=100), None),
        (RwkvConfig(), None),
        (RecurrentGemmaConfig(), None),
        (MambaConfig(), None),
    ],
    ids=lambda value: type(value).__name__.removesuffix("Config"),
)
def test_the_context_is_what_the_config_states_for_each_kind_of_positions(config, limit):
    context = find_context(SimpleNamespace(config=config))
    assert (None if context is None else context.limit) == limit


def test_rotary_embeddings_can_be_scaled_and_learned_ones_can_not():
    for config, has_rope in (
        (LlamaConfig(), True),
        (FalconConfig(), True),
        (GPT2Config(), False),
        (OPTConfig(), False),
    ):
        assert find_context(SimpleNamespace(config=config)).has_rope == has_rope


def test_a_model_without_a_config_has_no_context_to_fit_into():
    assert find_context(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("is_separable", [True, False])
def test_the_positions_of_a_batch_are_found_once_for_the_teacher_the_student_and_the_targets(tiny_model, is_separable):
    student, teacher = tiny_model().eval(), FrozenTeacher(tiny_model(seed=1), top_k=None if is_separable else 5)
    teacher.prepare(torch.device("cpu"))
    head = find_head(student) if is_separable else InseparableHead("for the test")
    batch = padded_batch()
    with Selections() as selections:
        teacher.score(batch)
        compare(student, batch, head, lambda signal: (signal, batch.targets_N, batch.is_on_policy_B[batch.rows_N]))
    assert selections.nonzeros == 1
    assert selections.masks == 0


@pytest.mark.parametrize("is_separable", [True, False])
def test_where_labels_are_not_shifted_the_predictions_are_those_of_the_labels_own_positions(tiny_model, is_separable):
    model, batch = tiny_model().eval(), replace(padded_batch(), label_offset=0)
    head = find_head(model) if is_separable else InseparableHead("for the test")
    signal, _ = predict(model, batch, head)
    logits_NV = signal.head.logits(signal.hidden_NH) if is_separable else signal.logits_NV
    torch.testing.assert_close(logits_NV, model(**batch.model_inputs).logits[batch.labels_BL != IGNORE_INDEX])


ENCODER_DECODERS = ["t5", "t5_untied", "mt5", "bart"]


def decoder_batch(model):
    """Rows whose encoder's inputs and labels differ in length, with labels that are not trained on."""
    generator = torch.Generator().manual_seed(1)
    ids_BL = torch.randint(3, 368, (3, 9), generator=generator)
    labels_BL = torch.randint(3, 368, (3, 5), generator=generator)
    labels_BL[0, 2], labels_BL[1, 3:], labels_BL[2] = IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX
    mask_BL = torch.tensor([[1] * 9, [1] * 7 + [0] * 2, [1] * 4 + [0] * 5])
    inputs = {"input_ids": ids_BL, "attention_mask": mask_BL, "labels": labels_BL}
    return TokenBatch.from_inputs(with_decoder_inputs(model, inputs))


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_the_input_of_its_head_explains_an_encoder_decoders_logits(tiny_encoder_decoder, family):
    model = tiny_encoder_decoder(family).double()
    batch = decoder_batch(model)
    head = find_head(model)
    assert isinstance(head, SeparableHead)
    signal, output = predict(model, batch, head)
    assert isinstance(signal, HiddenSignal)
    assert output.logits.shape[-1] == 1  # also if the model adds a bias behind its head
    expected = model(**batch.model_inputs).logits[batch.is_scored_BL]
    assert batch.n_scored == len(expected) == 7
    assert torch.allclose(signal.head.logits(signal.hidden_NH), expected, rtol=1e-10, atol=1e-10)


def test_the_last_hidden_states_of_a_tied_t5_do_not_explain_its_logits(tiny_encoder_decoder):
    model = tiny_encoder_decoder("t5")
    batch, head = decoder_batch(model), find_head(model)
    signal, _ = predict(model, batch, head)
    hidden = model(**batch.model_inputs, output_hidden_states=True).decoder_hidden_states[-1][batch.is_scored_BL]
    assert torch.allclose(signal.hidden_NH, hidden * 32**-0.5, atol=1e-6)


def test_the_bias_behind_the_head_counts_wherever_the_model_was_moved(tiny_encoder_decoder):
    model = tiny_encoder_decoder("bart")
    head = find_head(model)
    model.double()  # replaces the buffer
    batch = decoder_batch(model)
    signal, _ = predict(model, batch, head)
    assert signal.head.bias_V.equal(model.final_logits_bias[0])
    assert signal.head.bias_V.abs().max() > 1


def test_the_bias_behind_the_head_is_whole_after_a_forward_that_failed(tiny_encoder_decoder):
    model = tiny_encoder_decoder("bart")
    batch, head, bias = decoder_batch(model), find_head(model), model.final_logits_bias

    def fail(signal):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        compare(model, batch, head, fail)
    compare(model, batch, head, lambda signal: None)
    assert model.final_logits_bias is bias
    assert bias.shape == (1, 368)


class Offset(ModelHook):
    def post_forward(self, module, output):
        return output + 1


@pytest.fixture
def spread():
    """Put accelerate's hooks on a model, as a device map over several devices does."""
    return lambda model: dispatch_model(model, {"": "cpu"}, force_hooks=True)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "qwen3_moe"])
def test_a_head_that_a_device_map_placed_gives_what_it_gives_without_the_map(tiny_model, spread, family):
    batch = padded_batch()
    signals, heads = [], []
    for model in (tiny_model(family), spread(tiny_model(family))):
        heads.append(find_head(model, on_any_device=True))
        forward = model.get_output_embeddings().forward
        signals.append(predict(model, batch, heads[-1])[0])
        assert model.get_output_embeddings().forward == forward
        assert predict(model, batch, heads[-1])[1].logits.shape == (3, 9, 1)
    expected, found = signals
    assert isinstance(found, HiddenSignal)
    assert (heads[1].scale, heads[1].softcap) == (heads[0].scale, heads[0].softcap)
    assert torch.equal(found.hidden_NH, expected.hidden_NH)
    assert torch.equal(found.head.weight_VH, expected.head.weight_VH)
    assert torch.equal(found.head.logits(found.hidden_NH), expected.head.logits(expected.hidden_NH))


@pytest.mark.parametrize("family", ["t5", "t5_untied", "bart"])
def test_a_device_map_does_not_hide_the_head_of_an_encoder_decoder(tiny_encoder_decoder, spread, family):
    signals = []
    for model in (tiny_encoder_decoder(family), spread(tiny_encoder_decoder(family))):
        head = find_head(model, on_any_device=True)
        assert isinstance(head, SeparableHead)
        signals.append(predict(model, decoder_batch(model), head)[0])
    expected, found = signals
    assert torch.equal(found.head.logits(found.hidden_NH), expected.head.logits(expected.hidden_NH))


@pytest.mark.parametrize("family", ["llava", "qwen2"])
def test_a_device_map_does_not_hide_the_head_of_a_vision_language_model(spread, family):
    signals = []
    for model in (make_pair(family).teacher, spread(make_pair(family).teacher)):
        head = find_head(model, on_any_device=True)
        assert isinstance(head, SeparableHead)
        signals.append(predict(model, padded_batch(vocab=32), head)[0])
    expected, found = signals
    assert torch.equal(found.head.logits(found.hidden_NH), expected.head.logits(expected.hidden_NH))


def test_predictions_are_on_the_device_of_a_head_apart_from_the_layers(tiny_model):
    """The other way round, nothing could be read from the meta device."""
    model, batch = tiny_model(), padded_batch()
    head = replace(find_head(model), softcap=30.0)
    add_hook_to_module(model.lm_head, AlignDevicesHook("meta"))
    signal, output = predict(model, batch, head)
    assert (signal.hidden_NH.device.type, signal.head.weight_VH.device.type) == ("meta", "meta")
    assert signal.hidden_NH.shape == (batch.n_scored, 32)
    assert output.logits.device.type == "meta"


def test_a_bias_behind_a_head_on_another_device_follows_it(tiny_encoder_decoder):
    model = tiny_encoder_decoder("bart")
    head = find_head(model)
    model.lm_head.to("meta")
    assert head.current().bias_V.device.type == "meta"


@pytest.mark.parametrize(
    ("hook", "reason"),
    [
        (AlignDevicesHook("cpu", offload=True), "the weight of its head is offloaded or sharded"),
        (Offset(), "a hook of accelerate does more to its head than move tensors between devices"),
        (SequentialHook(AlignDevicesHook("cpu"), Offset()), "a hook of accelerate does more"),
    ],
)
def test_a_hook_that_does_more_than_move_tensors_hides_the_head_and_says_why(tiny_model, hook, reason):
    model = tiny_model()
    add_hook_to_module(model.lm_head, hook)
    assert reason in find_head(model, on_any_device=True).reason


def test_a_device_map_hides_a_head_whose_predictions_must_be_on_the_batchs_device(tiny_model, spread):
    assert find_head(spread(tiny_model())) == InseparableHead("a device map placed it on several devices")
