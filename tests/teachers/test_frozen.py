"""A teacher in this process: frozen, scoring only the batch's scored positions, in any dtype."""

import logging
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.ao.quantization import quantize_dynamic

from gkd_trainer.batch_keys import IGNORE_INDEX
from gkd_trainer.divergence import token_divergence
from gkd_trainer.errors import GKDTeacherError
from gkd_trainer.models import heads
from gkd_trainer.signals import HiddenSignal, LogitsSignal, TopKSignal, plain_signals, tensors_of
from gkd_trainer.teachers import FrozenTeacher, Teacher, WeightedTeachers, frozen
from gkd_trainer.types import TokenBatch

CPU, META = torch.device("cpu"), torch.device("meta")


def batch_of_two():
    ids_BL = torch.randint(0, 368, (2, 8), generator=torch.Generator().manual_seed(0))
    labels_BL = ids_BL.clone()
    labels_BL[:, :3] = IGNORE_INDEX
    labels_BL[1, 6:] = IGNORE_INDEX
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[1, 6:] = 0
    return TokenBatch.from_inputs({"input_ids": ids_BL, "attention_mask": mask_BL, "labels": labels_BL})


def prepared(model, **options):
    teacher = FrozenTeacher(model, **options)
    teacher.prepare(CPU)
    return teacher


def adapted_head(model):
    """A model whose head can't be split off."""
    return get_peft_model(model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False)).get_base_model()


def test_the_teacher_is_in_eval_mode_and_no_parameter_requires_gradients(tiny_model):
    model = tiny_model().train()
    assert any(parameter.requires_grad for parameter in model.parameters())
    teacher = FrozenTeacher(model)
    assert isinstance(teacher, Teacher)
    assert teacher.model is model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scores_are_the_models_logits_in_any_dtype(tiny_model, dtype):
    model, batch = tiny_model().to(dtype), batch_of_two()
    signal = prepared(model).score(batch)
    assert isinstance(signal, HiddenSignal)
    assert signal.hidden_NH.dtype == dtype
    assert signal.hidden_NH.shape == (len(batch.targets_N), 32)
    expected_NV = model(**batch.model_inputs).logits[batch.is_scored_BL].to(torch.promote_types(dtype, torch.float32))
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(signal.head.logits(signal.hidden_NH), expected_NV, atol=tolerance, rtol=0.02)


def test_scores_carry_no_gradients(tiny_model):
    batch = batch_of_two()
    signal = prepared(tiny_model()).score(batch)
    assert not signal.hidden_NH.requires_grad
    assert not signal.head.weight_VH.requires_grad
    assert not prepared(adapted_head(tiny_model())).score(batch).logits_NV.requires_grad


def test_scores_carry_no_gradients_even_where_the_models_inputs_do(tiny_model):
    """As in a model that gradient checkpointing was prepared for."""
    model = tiny_model()
    model.enable_input_require_grads()
    assert not prepared(model).score(batch_of_two()).hidden_NH.requires_grad


def test_a_teacher_set_to_training_mode_scores_without_dropout(tiny_model):
    model, batch = tiny_model(attention_dropout=0.5), batch_of_two()
    teacher = prepared(model)
    expected_NH = teacher.score(batch).hidden_NH
    model.train()
    assert torch.equal(teacher.score(batch).hidden_NH, expected_NH)


def test_no_cache_of_keys_and_values_is_built(tiny_model):
    model = tiny_model()
    teacher, outputs = prepared(model), []
    model.register_forward_hook(lambda module, args, output: outputs.append(output.past_key_values))
    teacher.score(batch_of_two())
    assert outputs == [None]


def test_an_inseparable_head_is_logged_once_and_scored_by_logits(tiny_model, caplog):
    model, batch = adapted_head(tiny_model()), batch_of_two()
    with caplog.at_level(logging.WARNING):
        teacher = prepared(model)
        signals = [teacher.score(batch) for _ in range(3)]
    [record] = [record for record in caplog.records if record.name.startswith("gkd_trainer")]
    assert "its head is a Linear, not a plain nn.Linear" in record.getMessage()
    assert "LlamaForCausalLM" in record.getMessage()
    assert isinstance(signals[0], LogitsSignal)
    torch.testing.assert_close(signals[0].logits_NV, model(**batch.model_inputs).logits[batch.is_scored_BL])


def test_a_separable_head_logs_nothing(tiny_model, caplog):
    prepared(tiny_model())
    assert not [record for record in caplog.records if record.name.startswith("gkd_trainer")]


def test_scoring_before_prepare_raises(tiny_model):
    with pytest.raises(RuntimeError, match=r"before prepare\(device\)"):
        FrozenTeacher(tiny_model()).score(batch_of_two())


@pytest.mark.parametrize(
    ("attributes", "moved"),
    [
        ({}, [CPU]),
        ({"hf_device_map": {"": 0}}, []),
        ({"is_quantized": True}, []),
        ({"hf_device_map": None, "is_quantized": False}, [CPU]),
    ],
)
def test_a_model_is_moved_to_the_device_unless_loading_placed_it(tiny_model, monkeypatch, attributes, moved):
    model = tiny_model()
    for name, value in attributes.items():
        setattr(model, name, value)
    moves = []
    monkeypatch.setattr(model, "to", moves.append)
    prepared(model)
    assert moves == moved


def spread(model):
    """A model with accelerate's hooks, as a device map over several devices puts them."""
    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_spread_by_a_device_map_gives_hidden_states_equal_to_the_bit(tiny_model, family, dtype, caplog):
    batch = batch_of_two()
    expected = prepared(tiny_model(family).to(dtype)).score(batch)
    found = prepared(spread(tiny_model(family).to(dtype))).score(batch)
    assert isinstance(found, HiddenSignal)
    assert torch.equal(found.hidden_NH, expected.hidden_NH)
    assert torch.equal(found.head.logits(found.hidden_NH), expected.head.logits(expected.hidden_NH))
    assert not [record for record in caplog.records if record.name.startswith("gkd_trainer")]


def test_an_adapter_around_a_teacher_spread_by_a_device_map_changes_nothing_of_that(tiny_model):
    batch = batch_of_two()
    expected = prepared(adapted(tiny_model())).score(batch)
    for model in (adapted(spread(tiny_model())), spread(adapted(tiny_model()))):
        found = prepared(model).score(batch)
        assert isinstance(found, HiddenSignal)
        assert torch.equal(found.hidden_NH, expected.hidden_NH)


def test_the_top_tokens_of_a_teacher_spread_by_a_device_map_are_not_rounded_with_its_logits(tiny_model):
    batch = batch_of_two()
    expected = prepared(tiny_model().bfloat16(), top_k=5).score(batch)
    found = prepared(spread(tiny_model().bfloat16()), top_k=5).score(batch)
    assert torch.equal(found.ids_NK, expected.ids_NK)
    assert torch.equal(found.log_p_NK, expected.log_p_NK)


def test_a_teacher_whose_head_is_offloaded_computes_logits_and_says_why(tiny_model, caplog, tmp_path):
    places = {"model": "cpu", "lm_head": "disk"}
    teacher = prepared(dispatch_model(tiny_model(), places, offload_dir=str(tmp_path)))
    assert "full logits, which takes more memory: the weight of its head is offloaded or sharded" in caplog.text
    batch = batch_of_two()
    expected_NV = tiny_model()(**batch.model_inputs).logits[batch.is_scored_BL]
    assert torch.equal(teacher.score(batch).logits_NV, expected_NV)


def test_a_teacher_keeps_its_head_where_layers_are_offloaded(tiny_model, tmp_path):
    batch, model = batch_of_two(), ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb"]
    places = {**dict.fromkeys([*model, "lm_head"], "cpu"), "model.layers.1": "disk"}
    signal = prepared(dispatch_model(tiny_model(), places, offload_dir=str(tmp_path))).score(batch)
    assert isinstance(signal, HiddenSignal)
    assert torch.equal(signal.hidden_NH, prepared(tiny_model()).score(batch).hidden_NH)


@pytest.fixture
def far_batch(monkeypatch):
    """A batch on the meta device, which teachers on the CPU read on the CPU."""
    predict = heads.predict
    monkeypatch.setattr(
        frozen, "predict", lambda model, batch, *args, **options: predict(model, batch.on_host, *args, **options)
    )
    return batch_of_two().to(META)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"is_separable": False}], ids=str)
def test_a_signal_is_on_the_batchs_device_wherever_the_teacher_is(tiny_model, far_batch, options):
    top_k, is_separable = options.get("top_k"), options.get("is_separable", True)
    apart = prepared(spread(tiny_model()) if is_separable else adapted_head(tiny_model()), top_k=top_k)
    for teacher in (apart, WeightedTeachers({"a": apart, "b": prepared(tiny_model("phi"))})):
        for plain in plain_signals(teacher.score(far_batch)):
            assert {tensor.device for tensor in tensors_of(plain)} == {META}


def test_a_head_elsewhere_is_copied_once_for_all_batches(tiny_model, far_batch):
    teacher = prepared(spread(tiny_model()))
    first, again = (teacher.score(far_batch).head.weight_VH for _ in range(2))
    assert first is again
    assert teacher.model.lm_head.weight.device == CPU


def test_the_copy_of_a_head_ends_with_its_teacher(tiny_model, far_batch):
    teacher = prepared(spread(tiny_model()))
    copy = weakref.ref(teacher.score(far_batch).head.weight_VH)
    assert copy() is not None
    del teacher
    assert copy() is None


def test_top_tokens_need_no_copy_of_the_head(tiny_model, far_batch, monkeypatch):
    monkeypatch.setattr(frozen.HeadCopy, "on", lambda *_: pytest.fail("copied"))
    assert prepared(spread(tiny_model()), top_k=5).score(far_batch).log_p_NK.device == META


def test_inputs_go_to_a_teacher_that_a_device_map_put_on_one_other_device(tiny_model, monkeypatch):
    model, seen = tiny_model().to(META), []
    model.hf_device_map = {"": "meta"}
    teacher = prepared(model)
    nothing = LogitsSignal(torch.zeros(1, 368))
    monkeypatch.setattr(frozen, "predict", lambda model, batch, *_, **__: (seen.append(batch), nothing)[::-1])
    batch = batch_of_two()
    assert teacher.score(batch).logits_NV.device == CPU
    assert {value.device for value in seen[0].model_inputs.values()} == {META}
    assert seen[0].on_host is batch


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("head", [0, 1])
@pytest.mark.parametrize("top_k", [None, 5])
def test_a_teacher_on_two_gpus_gives_what_it_gives_on_one(tiny_model, head, top_k):
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    batch = batch_of_two().to(first)
    whole = FrozenTeacher(tiny_model("gemma2", tie_word_embeddings=False), top_k=top_k)
    whole.prepare(first)
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1}
    model = tiny_model("gemma2", tie_word_embeddings=False)
    parts = FrozenTeacher(dispatch_model(model, {**places, "lm_head": head}), top_k=top_k)
    alone = FrozenTeacher(dispatch_model(tiny_model("gemma2", tie_word_embeddings=False), {"": second}), top_k=top_k)
    for teacher in (parts, alone):
        teacher.prepare(first)
        found = teacher.score(batch)
        assert isinstance(found, HiddenSignal if top_k is None else TopKSignal)
        for actual, other in zip(tensors_of(found), tensors_of(whole.score(batch)), strict=True):
            assert actual.device == first
            torch.testing.assert_close(actual, other)


def quantised(model, layers):
    """Weights in int8 for real, by torch's own dynamic quantisation; marked like a model that was loaded quantised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but here without another package
        model = quantize_dynamic(model, layers, dtype=torch.qint8)
    model.is_quantized = True
    return model


@pytest.mark.parametrize(
    ("layers", "signal_type"),
    [
        ({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, HiddenSignal),
        ({torch.nn.Linear}, LogitsSignal),  # the head too
    ],
)
def test_a_quantised_teacher_is_scored_by_its_quantised_weights(tiny_model, layers, signal_type):
    full, batch = tiny_model(), batch_of_two()
    names = {name for name, _ in full.named_modules() if name.split(".")[-1] in layers} or layers
    teacher = prepared(quantised(tiny_model(), names))
    signal = teacher.score(batch)
    assert isinstance(signal, signal_type)
    logits_NV = signal.logits_NV if signal_type is LogitsSignal else signal.head.logits(signal.hidden_NH)
    expected_NV, full_NV = (
        model(**batch.model_inputs).logits[batch.is_scored_BL].detach() for model in (teacher.model, full)
    )
    torch.testing.assert_close(logits_NV, expected_NV, atol=1e-5, rtol=1e-5)
    error = (logits_NV - full_NV).abs().max() / full_NV.abs().max()
    assert 1e-4 < error < 0.1
    assert teacher.vocab_size == signal.vocab_size == 368


def test_a_teacher_in_an_adapter_is_scored_with_it(tiny_model):
    options = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model, batch = get_peft_model(tiny_model(), options), batch_of_two()
    signal = prepared(model).score(batch)
    assert isinstance(signal, HiddenSignal)
    logits_NV = signal.head.logits(signal.hidden_NH)
    torch.testing.assert_close(logits_NV, model(**batch.model_inputs).logits[batch.is_scored_BL], atol=1e-5, rtol=1e-5)
    plain_NV = tiny_model()(**batch.model_inputs).logits[batch.is_scored_BL]
    assert (logits_NV - plain_NV).abs().max() > 1e-3


def test_it_loads_with_the_checkpoints_dtype_unless_told(tiny_model, tmp_path):
    tiny_model().bfloat16().save_pretrained(tmp_path)
    assert FrozenTeacher.from_pretrained(str(tmp_path)).model.dtype == torch.bfloat16
    assert FrozenTeacher.from_pretrained(str(tmp_path), dtype="float32").model.dtype == torch.float32
    assert FrozenTeacher.from_pretrained(str(tmp_path), dtype=torch.float16).model.dtype == torch.float16


def test_remote_code_is_trusted_only_on_request(monkeypatch, tiny_model):
    loaded = []

    def load(name, **options):
        loaded.append(options)
        return tiny_model()

    auto_class = SimpleNamespace(from_pretrained=load)
    monkeypatch.setattr("gkd_trainer.teachers.frozen.auto_class", lambda *_: auto_class)
    monkeypatch.setattr("gkd_trainer.teachers.frozen.find_tokenizer", lambda name, trusted, *_: loaded.append(trusted))
    FrozenTeacher.from_pretrained("a/teacher", dtype="auto")
    assert loaded[:2] == [{"dtype": "auto", "trust_remote_code": False}, False]
    loaded.clear()
    FrozenTeacher.from_pretrained("a/teacher", trust_remote_code=True)
    assert loaded[:2] == [{"trust_remote_code": True}, True]


def test_its_vocabulary_is_that_of_the_tokenizer_given_or_found(tiny_model, tmp_path, byte_level):
    tokenizer = byte_level()
    tiny_model().save_pretrained(tmp_path)
    assert FrozenTeacher.from_pretrained(str(tmp_path)).vocabulary is None
    assert FrozenTeacher(tiny_model(), tokenizer).vocabulary == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    teacher = FrozenTeacher.from_pretrained(str(tmp_path))
    assert teacher.vocabulary == tokenizer.get_vocab()
    assert FrozenTeacher(teacher.model).vocabulary == tokenizer.get_vocab()  # by the place it was loaded from


def test_its_vocabulary_size_counts_the_rows_of_its_head(tiny_model):
    assert FrozenTeacher(tiny_model(vocab=384)).vocab_size == 384


def test_tokenizer_comes_from_the_place_that_the_init_kwargs_name(tiny_model, byte_level, tmp_path):
    tiny_model().save_pretrained(tmp_path / "inner")
    byte_level().save_pretrained(tmp_path / "inner")
    teacher = FrozenTeacher.from_pretrained(str(tmp_path), subfolder="inner")
    assert teacher.vocabulary == byte_level().get_vocab()


@pytest.mark.parametrize("is_separable", [True, False])
def test_top_tokens_are_those_of_the_models_log_probs(tiny_model, is_separable):
    model, batch = tiny_model() if is_separable else adapted_head(tiny_model()), batch_of_two()
    signal = prepared(model, top_k=5).score(batch)
    assert isinstance(signal, TopKSignal)
    expected = model(**batch.model_inputs).logits[batch.is_scored_BL].log_softmax(dim=1).topk(5, dim=1)
    assert torch.equal(signal.ids_NK, expected.indices)
    torch.testing.assert_close(signal.log_p_NK, expected.values, atol=1e-5, rtol=1e-5)
    assert signal.vocab_size == 368
    assert not signal.log_p_NK.requires_grad


@pytest.mark.parametrize("is_autocast", [False, True])
def test_top_tokens_of_a_bfloat16_teacher_are_projected_and_normalised_in_float32(tiny_model, is_autocast):
    model, batch = tiny_model().bfloat16(), batch_of_two()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        top = prepared(model, top_k=368).score(batch)
        whole = prepared(model).score(batch)
    assert top.log_p_NK.dtype == torch.float32
    torch.testing.assert_close(top.log_p_NK.exp().sum(dim=1), torch.ones(len(batch.targets_N)))
    expected_NV = whole.head.logits(whole.hidden_NH).log_softmax(dim=1)
    torch.testing.assert_close(top.log_p_NK, expected_NV.gather(1, top.ids_NK), atol=1e-6, rtol=1e-6)


def test_a_batch_without_trained_tokens_has_no_top_tokens(tiny_model):
    batch = batch_of_two()
    nothing = TokenBatch(batch.model_inputs, torch.full_like(batch.labels_BL, IGNORE_INDEX), batch.is_on_policy_B)
    assert prepared(tiny_model(), top_k=5).score(nothing).log_p_NK.shape == (0, 5)


@pytest.mark.parametrize("shared", [368, 350])
def test_all_tokens_as_top_tokens_give_the_full_divergence(tiny_model, shared):
    """Also where the teacher's head has more rows than the vocabulary that is compared."""
    batch = batch_of_two()
    student = prepared(tiny_model(seed=1)).score(batch).sliced(shared)
    expected_N, actual_N = (
        token_divergence(student, prepared(tiny_model(), top_k=top_k).score(batch).sliced(shared), beta=0.5).values_N
        for top_k in (None, 368)
    )
    torch.testing.assert_close(actual_N, expected_N, atol=1e-6, rtol=1e-4)


def test_top_tokens_beyond_the_shared_vocabulary_count_as_mass_elsewhere(tiny_model):
    batch = batch_of_two()
    teacher, student = prepared(tiny_model(), top_k=60), prepared(tiny_model(seed=1)).score(batch)
    whole = teacher.score(batch)
    is_beyond_NK = whole.ids_NK >= 200
    assert 0 < is_beyond_NK.sum() < is_beyond_NK.numel()
    result = token_divergence(student.sliced(200), whole.sliced(200), beta=0.5)
    assert result.is_finite_N.all()
    torch.testing.assert_close(result.teacher_mass_N, whole.log_p_NK.exp().masked_fill(is_beyond_NK, 0.0).sum(dim=1))


@pytest.mark.parametrize("top_k", [0, -1, 369])
def test_a_top_k_that_the_head_does_not_have_is_refused(tiny_model, top_k):
    with pytest.raises(GKDTeacherError, match=rf"top_k must be in \[1, 368\].*got {top_k}: for full .* leave it None"):
        FrozenTeacher(tiny_model(), top_k=top_k)


def test_a_teacher_that_is_loaded_answers_with_top_tokens_too(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    teacher = FrozenTeacher.from_pretrained(str(tmp_path), top_k=3)
    teacher.prepare(CPU)
    assert teacher.score(batch_of_two()).ids_NK.shape[1] == 3


def adapted(model):
    """A model in a LoRA adapter that changes what it predicts."""
    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))


def test_a_peft_model_teaches_with_its_adapter(tiny_model):
    model, batch = adapted(tiny_model()), batch_of_two()
    expected_NV = model.eval()(**batch.model_inputs).logits[batch.is_scored_BL]
    with model.disable_adapter():
        base_NV = model(**batch.model_inputs).logits[batch.is_scored_BL]
    teacher = prepared(model)
    signal = teacher.score(batch)
    assert isinstance(signal, HiddenSignal)
    logits_NV = signal.head.logits(signal.hidden_NH)
    torch.testing.assert_close(logits_NV, expected_NV, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits_NV, base_NV, atol=0.1)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert teacher.vocab_size == 368


def test_a_compiled_model_teaches_uncompiled_and_says_so(tiny_model, caplog):
    model, batch = tiny_model(), batch_of_two()
    teacher = prepared(torch.compile(model, backend="eager"))
    assert teacher.model is model
    assert isinstance(teacher.score(batch), HiddenSignal)
    assert "The teacher was compiled, but runs uncompiled" in caplog.text


def test_a_model_compiled_in_place_gives_its_logits(tiny_model):
    model, batch = tiny_model(), batch_of_two()
    expected_NV = model(**batch.model_inputs).logits[batch.is_scored_BL]
    model.compile(backend="eager")
    signal = prepared(model).score(batch)
    assert isinstance(signal, LogitsSignal)
    torch.testing.assert_close(signal.logits_NV, expected_NV, atol=1e-4, rtol=1e-4)


def test_a_teacher_is_loaded_from_a_path(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    teacher = FrozenTeacher.from_pretrained(tmp_path)
    assert torch.equal(teacher.model.lm_head.weight, tiny_model().lm_head.weight)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("a/name", r"got str: FrozenTeacher\.from_pretrained loads one by name"),
        ({"model": "a/name"}, "expected a causal LM as the teacher; got dict"),
        (torch.nn.Linear(2, 2), "with a config as the teacher; got Linear"),
    ],
)
def test_anything_but_a_causal_lm_is_refused(model, message):
    with pytest.raises(GKDTeacherError, match=message):
        FrozenTeacher(model)


def test_a_teacher_whose_adapter_learns_virtual_tokens_is_refused(tiny_model):
    model = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(GKDTeacherError, match="learns virtual tokens"):
        FrozenTeacher(model)
