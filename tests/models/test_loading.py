"""The student before training: dtype, tokenizer, adapter, and no dropout."""

import base64
import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    BartForConditionalGeneration,
    Gemma3Config,
    Mistral3Config,
    MistralConfig,
    MptConfig,
    MptForCausalLM,
    PreTrainedTokenizerFast,
)

from gkd_trainer.errors import GKDConfigError, GKDDataError, GKDTeacherError
from gkd_trainer.models.loading import (
    auto_class,
    base_model,
    disable_dropout,
    find_processing_class,
    find_tokenizer,
    give_pad_token,
    load_student,
    media_tokens,
    name_of,
    outline,
    refuse_mistral_common,
    refuse_prompt_learning,
    refuse_unread_media,
    stored_config,
    wrap_in_adapter,
)
from gkd_trainer.types import MediaTokens
from tests.vision import make_model, make_processor


@pytest.fixture
def bf16_checkpoint(tiny_model, tmp_path):
    model = tiny_model().bfloat16()
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_a_bf16_checkpoint_is_loaded_in_float32(bf16_checkpoint):
    path, saved = bf16_checkpoint
    student = load_student(str(path), None, trust_remote_code=False)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert torch.equal(student.lm_head.weight, saved.lm_head.weight.float())


@pytest.mark.parametrize(
    "init_kwargs", [{"dtype": torch.bfloat16}, {"dtype": "bfloat16"}, {"dtype": "auto"}, {"torch_dtype": "bfloat16"}]
)
def test_a_dtype_that_is_asked_for_is_taken(bf16_checkpoint, init_kwargs):
    student = load_student(str(bf16_checkpoint[0]), init_kwargs, trust_remote_code=False)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}


def test_init_kwargs_reach_the_model(bf16_checkpoint):
    student = load_student(str(bf16_checkpoint[0]), {"attn_implementation": "eager"}, trust_remote_code=False)
    assert student.config._attn_implementation == "eager"


def test_the_tokenizer_beside_the_weights_is_found(bf16_checkpoint, byte_level):
    path, _ = bf16_checkpoint
    byte_level().save_pretrained(path)
    tokenizer = find_tokenizer(str(path), trust_remote_code=False)
    assert tokenizer.get_vocab() == byte_level().get_vocab()


@pytest.fixture
def tekken():
    """A tekken.json of Mistral's, and the number of its tokens."""
    controls = "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS]"
    controls = f"{controls} [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX]".split()
    size = {"num_vocab_tokens": 256, "default_vocab_size": 256 + len(controls)}
    config = {"pattern": r"\p{L}+|[^\p{L}]+", **size, "default_num_special_tokens": len(controls), "version": "v3"}
    tekken = {
        "config": config,
        "vocab": [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode()} for i in range(256)],
        "special_tokens": [{"rank": i, "token_str": token, "is_control": True} for i, token in enumerate(controls)],
    }
    return json.dumps(tekken), size["default_vocab_size"]


def test_a_tekken_file_gives_a_tokenizer_of_transformers_also_beside_mistral_common(tmp_path, tekken):
    text, size = tekken
    (tmp_path / "tekken.json").write_text(text)
    MistralConfig(vocab_size=size).save_pretrained(tmp_path)
    tokenizer = find_tokenizer(str(tmp_path), trust_remote_code=False)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert len(tokenizer.get_vocab()) == size


def test_a_processor_has_a_tokenizer_of_transformers_also_beside_mistral_common(tmp_path, tekken):
    (tmp_path / "tekken.json").write_text(tekken[0])
    Mistral3Config(architectures=["Mistral3ForConditionalGeneration"]).save_pretrained(tmp_path)
    processor = make_processor("llava")  # Mistral's own needs torchvision
    processor.save_pretrained(tmp_path)
    found = find_processing_class(str(tmp_path), trust_remote_code=False)
    assert type(found) is type(processor)
    assert found.tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_a_tokenizer_of_mistral_common_is_refused_with_one_to_load_in_its_place(byte_level):
    class MistralCommonBackend:
        pass

    with pytest.raises(GKDConfigError, match=r"got MistralCommonBackend.*load transformers\.PreTrainedTokenizerFast"):
        refuse_mistral_common(MistralCommonBackend())
    refuse_mistral_common(byte_level())
    refuse_mistral_common(None)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi"])
def test_a_folder_without_tokenizer_gives_none(tiny_model, tmp_path, family):
    """For some of these families transformers makes a tokenizer without words instead."""
    tiny_model(family).save_pretrained(tmp_path)
    assert find_tokenizer(str(tmp_path), trust_remote_code=False) is None


def test_a_damaged_tokenizer_is_named_and_not_taken_for_none(bf16_checkpoint, byte_level):
    path, _ = bf16_checkpoint
    byte_level().save_pretrained(path)
    for damaged in ("{broken", "[]", '{"model": {"type": "none such"}}'):
        (path / "tokenizer.json").write_text(damaged)
        with pytest.raises(GKDConfigError, match=r"could not read the tokenizer of .* from tokenizer\.json") as raised:
            find_tokenizer(str(path), trust_remote_code=False)
        assert str(path) in str(raised.value)


@pytest.mark.parametrize("name", ["", "/no/such/folder"])
def test_no_name_or_no_folder_gives_no_tokenizer(name):
    assert find_tokenizer(name, trust_remote_code=False) is None


def test_a_model_is_named_after_the_place_it_was_loaded_from(bf16_checkpoint, tiny_model):
    path = str(bf16_checkpoint[0])
    assert name_of(load_student(path, None, trust_remote_code=False)) == path
    assert name_of(tiny_model()) == ""
    assert name_of(nn.Linear(1, 1)) == ""
    assert name_of(None) == ""


def test_a_model_without_pad_token_is_given_one(tiny_model):
    for model in (tiny_model(pad_token_id=None), wrap_in_adapter(tiny_model(pad_token_id=None), LoraConfig())):
        give_pad_token(model, 5)
        assert (model.config.pad_token_id, model.generation_config.pad_token_id) == (5, 5)
    give_pad_token(nn.Linear(1, 1), 5)


def test_a_pad_token_that_a_model_has_stays(tiny_model):
    model = tiny_model()
    give_pad_token(model, 5)
    assert (model.config.pad_token_id, model.generation_config.pad_token_id) == (2, 2)


def test_a_second_adapter_is_refused(tiny_model):
    config = LoraConfig(target_modules=["q_proj"])
    student = wrap_in_adapter(tiny_model(), config)
    with pytest.raises(GKDConfigError, match=r"already has an adapter.*merge_and_unload"):
        wrap_in_adapter(student, config)


def test_a_second_adapter_on_a_model_loaded_from_an_adapters_folder_is_refused(tiny_model, tmp_path):
    config = LoraConfig(target_modules=["q_proj"])
    tiny_model().save_pretrained(tmp_path / "base")
    base = load_student(str(tmp_path / "base"), None, trust_remote_code=False)
    wrap_in_adapter(base, config).save_pretrained(tmp_path / "adapter")
    student = load_student(str(tmp_path / "adapter"), None, trust_remote_code=False)
    with pytest.raises(GKDConfigError, match=r"already has an adapter.*is_trainable=True.*merge_and_unload"):
        wrap_in_adapter(student, config)
    merged = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").merge_and_unload()
    assert wrap_in_adapter(merged, config).active_adapters == ["default"]


def test_the_base_of_an_adapted_student_is_its_causal_lm(tiny_model):
    model = tiny_model()
    assert base_model(model) is model
    assert base_model(wrap_in_adapter(model, LoraConfig(target_modules=["q_proj"]))) is model


def test_prompt_learning_is_refused_by_name(tiny_model):
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    with pytest.raises(GKDConfigError, match=r"'default' is PromptTuningConfig.*such as peft\.LoraConfig"):
        refuse_prompt_learning(get_peft_model(tiny_model(), config))


def test_prompt_learning_is_refused_before_a_model_gets_it():
    message = "^PromptTuningConfig learns virtual tokens that the teacher does not see: use an adapter that changes"
    with pytest.raises(GKDConfigError, match=message):
        refuse_prompt_learning(PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2))
    refuse_prompt_learning(LoraConfig(target_modules=["q_proj"]))
    refuse_prompt_learning(None)


def test_prompt_learning_of_the_teacher_is_an_error_of_the_teacher(tiny_model):
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    message = "the teacher's adapter 'default' is PromptTuningConfig, which learns .* that the student does not see"
    with pytest.raises(GKDTeacherError, match=message):
        refuse_prompt_learning(get_peft_model(tiny_model(), config), "teacher")


def test_adapters_that_change_weights_are_taken(tiny_model):
    refuse_prompt_learning(tiny_model())
    refuse_prompt_learning(get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])))
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    refuse_prompt_learning(get_peft_model(tiny_model(), config))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"attention_dropout": 0.5}),  # kept as a number by each attention layer
        ("phi", {"embd_pdrop": 0.5, "resid_pdrop": 0.5}),  # nn.Dropout
    ],
)
def test_without_dropout_a_model_in_training_mode_is_the_model_in_eval_mode(tiny_model, family, config):
    model, ids_BL = tiny_model(family, **config), torch.arange(20)[None]
    expected_BLV = model(ids_BL).logits
    model.train()
    assert not torch.allclose(model(ids_BL).logits, expected_BLV, atol=1e-4)
    disable_dropout(model)
    torch.testing.assert_close(model(ids_BL).logits, expected_BLV)


def test_the_dropout_of_an_architecture_with_another_name_for_it_is_disabled():
    """MPT keeps the probability of its attention as attn_dropout_p."""
    model, ids_BL = MptForCausalLM(MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=368)), torch.arange(20)[None]
    for block in model.transformer.blocks:
        block.attn.attn_dropout_p = 0.5
    expected_BLV = model.eval()(ids_BL).logits
    model.train()
    assert not torch.allclose(model(ids_BL).logits, expected_BLV, atol=1e-4)
    disable_dropout(model)
    torch.testing.assert_close(model(ids_BL).logits, expected_BLV)


class Named(nn.Module):
    def __init__(self, name, value):
        super().__init__()
        setattr(self, name, value)


@pytest.mark.parametrize("name", ["attention_dropout", "attn_dropout_p", "dropout_prob", "dropout", "resid_pdrop"])
def test_a_number_named_as_a_dropout_probability_becomes_zero(name):
    module = nn.Sequential(Named(name, 0.1))
    disable_dropout(module)
    assert getattr(module[0], name) == 0.0


@pytest.mark.parametrize(("name", "value"), [("token_dropout", True), ("dropout_rng", "key"), ("layerdrop", 0.1)])
def test_anything_but_a_dropout_probability_stays(name, value):
    module = Named(name, value)
    disable_dropout(module)
    assert getattr(module, name) is value


def test_the_dropout_of_an_adapter_is_disabled(tiny_model):
    config = LoraConfig(r=4, lora_dropout=0.5, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    student, ids_BL = get_peft_model(tiny_model(), config), torch.arange(20)[None]
    expected_BLV = student.eval()(ids_BL).logits
    student.train()
    assert not torch.allclose(student(ids_BL).logits, expected_BLV, atol=1e-4)
    disable_dropout(student)
    torch.testing.assert_close(student(ids_BL).logits, expected_BLV)


def test_tokens_of_other_media_are_those_that_the_config_names(tiny_model):
    model = tiny_model()
    assert media_tokens(model) == MediaTokens()
    model.config.image_token_id, model.config.audio_token_index, model.config.video_token_id = 5, 6, None
    assert media_tokens(model) == MediaTokens(image=5, audio=6)


def test_a_vision_language_model_is_loaded_by_name_with_its_processor(tmp_path, tiny_model):
    processor = make_processor("llava")
    model = make_model("llava", processor.tokenizer)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    student = load_student(str(tmp_path), None, trust_remote_code=False)
    assert type(student) is type(model)
    assert torch.equal(student.lm_head.weight, model.lm_head.weight)
    assert type(find_processing_class(str(tmp_path), trust_remote_code=False)) is type(processor)


def test_a_processor_that_can_not_be_loaded_is_replaced_by_its_tokenizer(tmp_path, caplog):
    processor = make_processor("llava")
    make_model("llava", processor.tokenizer).save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    found = find_processing_class(str(tmp_path), trust_remote_code=False)
    assert found.get_vocab() == processor.tokenizer.get_vocab()
    assert "rows can't have images" in caplog.text


def test_the_class_is_that_of_the_checkpoint(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert auto_class(str(tmp_path), {}) is AutoModelForCausalLM
    # Such a config also fits AutoModelForCausalLM.
    for architectures, expected in (
        (["Gemma3ForConditionalGeneration"], AutoModelForImageTextToText),
        (None, AutoModelForCausalLM),
    ):
        config = Gemma3Config(architectures=architectures)
        assert auto_class("any", {"config": config}) is expected


def test_media_that_a_forward_does_not_name_are_refused(tiny_model):
    refuse_unread_media(tiny_model(), {"input_ids": None, "position_ids": None}, "student")
    with pytest.raises(GKDDataError, match=r"image_grid_thw, pixel_values, which the student \(LlamaForCausalLM\)"):
        refuse_unread_media(tiny_model(), {"pixel_values": None, "image_grid_thw": None}, "student")
    processor = make_processor("llava")
    refuse_unread_media(make_model("llava", processor.tokenizer), {"pixel_values": None}, "student")


def test_the_auto_class_follows_the_config(tiny_model, tiny_encoder_decoder, tmp_path):
    tiny_model().save_pretrained(tmp_path / "causal")
    student = tiny_encoder_decoder("bart")
    student.save_pretrained(tmp_path / "pair")
    adapter = get_peft_model(student, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_2_SEQ_LM"))
    adapter.peft_config["default"].base_model_name_or_path = str(tmp_path / "pair")
    adapter.save_pretrained(tmp_path / "adapter")
    assert auto_class(str(tmp_path / "causal"), {}) is AutoModelForCausalLM
    assert auto_class(str(tmp_path / "pair"), {"trust_remote_code": False}) is AutoModelForSeq2SeqLM
    assert auto_class(str(tmp_path / "adapter"), {"dtype": "float32"}) is AutoModelForSeq2SeqLM
    assert auto_class("nowhere", {"config": student.config}) is AutoModelForSeq2SeqLM
    assert auto_class(str(tmp_path), {"subfolder": "pair"}) is AutoModelForSeq2SeqLM
    loaded = load_student(str(tmp_path / "adapter"), None, trust_remote_code=False)
    assert type(loaded) is BartForConditionalGeneration


def test_the_outline_of_a_model_has_its_configs_and_no_weights(tiny_model, tmp_path):
    model = tiny_model("qwen2", hidden=48)
    model.generation_config.eos_token_id = [2, 7]
    model.save_pretrained(tmp_path)
    empty = outline(str(tmp_path), {"dtype": "bfloat16"}, trust_remote_code=False)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert empty.generation_config.eos_token_id == [2, 7]
    assert empty.config.hidden_size == 48
    (tmp_path / "generation_config.json").unlink()
    assert outline(str(tmp_path), None, trust_remote_code=False).generation_config.eos_token_id == 2
    with pytest.raises(GKDConfigError, match="could not load the student from 'nowhere'"):
        outline("nowhere", None, trust_remote_code=False)


def test_the_outline_of_an_adapter_is_its_base_models(tiny_model, tmp_path):
    model = tiny_model("qwen2", hidden=48)
    model.generation_config.eos_token_id = [2, 7]
    model.save_pretrained(tmp_path / "base")
    LoraConfig(base_model_name_or_path=str(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    empty = outline(str(tmp_path / "adapter"), {"revision": "of-the-adapter"}, trust_remote_code=False)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert (empty.config.hidden_size, empty.generation_config.eos_token_id) == (48, [2, 7])


def test_the_base_of_an_adapter_is_found_in_the_cache_that_was_given(tiny_model, tmp_path):
    repository = tmp_path / "cache/models--org--base"
    tiny_model("qwen2", hidden=48).save_pretrained(repository / "snapshots/abc")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    LoraConfig(base_model_name_or_path="org/base").save_pretrained(tmp_path / "adapter")
    place = {"cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    assert stored_config(str(tmp_path / "adapter"), place).hidden_size == 48
    assert outline(str(tmp_path / "adapter"), place, trust_remote_code=False).config.hidden_size == 48


def test_a_model_with_an_adapter_in_its_folder_is_its_base(tiny_model, tmp_path):
    LoraConfig(base_model_name_or_path="org/nowhere").save_pretrained(tmp_path)
    tiny_model("qwen2", hidden=48).save_pretrained(tmp_path)
    assert stored_config(str(tmp_path), {"local_files_only": True}).hidden_size == 48


def test_an_encoder_decoder_has_no_outline(tiny_encoder_decoder, tmp_path):
    tiny_encoder_decoder("bart").save_pretrained(tmp_path)
    with pytest.raises(GKDConfigError, match="it is an encoder-decoder, and only causal LMs can be loaded without"):
        outline(str(tmp_path), None, trust_remote_code=False)
