"""A teacher in this process: frozen, scored only where the batch is, in any dtype."""

import logging
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gkd_trainer.batch import IGNORE_INDEX, HiddenSignal, LogitsSignal, TokenBatch
from gkd_trainer.teachers import FrozenTeacher, Teacher

CPU = torch.device("cpu")


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
    """A model whose head can't be taken apart."""
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


def test_an_inseparable_head_is_said_once_and_scored_by_logits(tiny_model, caplog):
    model, batch = adapted_head(tiny_model()), batch_of_two()
    with caplog.at_level(logging.WARNING):
        teacher = prepared(model)
        signals = [teacher.score(batch) for _ in range(3)]
    [record] = [record for record in caplog.records if record.name.startswith("gkd_trainer")]
    assert "its head is a Linear, not a plain nn.Linear" in record.getMessage()
    assert "LlamaForCausalLM" in record.getMessage()
    assert isinstance(signals[0], LogitsSignal)
    torch.testing.assert_close(signals[0].logits_NV, model(**batch.model_inputs).logits[batch.is_scored_BL])


def test_a_separable_head_says_nothing(tiny_model, caplog):
    prepared(tiny_model())
    assert not [record for record in caplog.records if record.name.startswith("gkd_trainer")]


def test_scoring_before_prepare_says_so(tiny_model):
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


def test_it_loads_with_the_checkpoints_dtype_unless_told(tiny_model, tmp_path):
    tiny_model().bfloat16().save_pretrained(tmp_path)
    assert FrozenTeacher.from_pretrained(str(tmp_path)).model.dtype == torch.bfloat16
    assert FrozenTeacher.from_pretrained(str(tmp_path), dtype="float32").model.dtype == torch.float32
    assert FrozenTeacher.from_pretrained(str(tmp_path), dtype=torch.float16).model.dtype == torch.float16


def test_remote_code_is_trusted_only_where_asked(monkeypatch, tiny_model):
    loaded = []

    def load(name, **options):
        loaded.append(options)
        return tiny_model()

    auto_class = SimpleNamespace(from_pretrained=load)
    monkeypatch.setattr("gkd_trainer.teachers.frozen.AutoModelForCausalLM", auto_class)
    monkeypatch.setattr("gkd_trainer.teachers.frozen.find_tokenizer", lambda name, trusted: loaded.append(trusted))
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
