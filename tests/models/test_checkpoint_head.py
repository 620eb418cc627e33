"""A head read from a checkpoint is the model's own, for every architecture whose logits it explains."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gkd_trainer.errors import GKDTeacherError
from gkd_trainer.models.checkpoint_head import read_head

EXPLAINED = [
    *("llama", "qwen2", "gemma2", "phi", "cohere", "granite", "gpt2", "rwkv", "mamba", "mixtral", "qwen3_moe"),
    "minimax",
]


def hidden_and_logits(model):
    """The input of a model's head for a few tokens, and the model's logits."""
    hidden = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    with torch.no_grad():
        logits = model(torch.tensor([[5, 9, 33, 7]])).logits
    hook.remove()
    return hidden[0], logits


def assert_is_the_models(head, model, **tolerance):
    hidden, logits = hidden_and_logits(model)
    torch.testing.assert_close(head.logits(hidden), logits, **tolerance)


def stored_in(folder):
    """The tensors of a folder, in memory: those that are mapped to a file die with it."""
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def renamed(folder, names):
    """Store the tensors of a folder under other names; None drops one."""
    tensors = stored_in(folder)
    kept = {names.get(name, name): tensor for name, tensor in tensors.items() if names.get(name, name) is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("family", EXPLAINED)
def test_it_gives_the_models_logits(tiny_model, tmp_path, family):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    assert_is_the_models(read_head(str(tmp_path)), model)


@pytest.mark.parametrize("family", ["qwen2", "phi"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_stays_in_the_dtype_of_the_checkpoint(tiny_model, tmp_path, family, dtype):
    model = tiny_model(family).to(dtype)
    model.save_pretrained(tmp_path)
    head = read_head(str(tmp_path))
    assert torch.equal(head.weight_VH, model.lm_head.weight)
    assert head.weight_VH.dtype == dtype
    if family == "phi":
        assert torch.equal(head.bias_V, model.lm_head.bias)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_tied_head_is_the_input_embeddings(tiny_model, tmp_path, family):
    model = tiny_model(family, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert not any("lm_head" in name for name in stored_in(tmp_path))
    assert_is_the_models(read_head(str(tmp_path)), model)


def test_of_several_files_only_the_one_with_the_head_is_read(tiny_model, tmp_path):
    model = tiny_model(layers=3)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    places = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for file in set(places.values()) - {places["lm_head.weight"]}:
        (tmp_path / file).unlink()
    assert_is_the_models(read_head(str(tmp_path)), model)
    (tmp_path / places["lm_head.weight"]).unlink()
    with pytest.raises(GKDTeacherError, match=f"has no file {places['lm_head.weight']}, which its index names"):
        read_head(str(tmp_path))


@pytest.mark.parametrize("prefix", ["language_model.", ""])
def test_names_may_have_another_prefix(tiny_model, tmp_path, prefix):
    """As in the checkpoints of a model of images and text, and in old ones without the model's own prefix."""
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)
    renamed(tmp_path, {"transformer.wte.weight": f"{prefix}wte.weight"})
    assert_is_the_models(read_head(str(tmp_path)), model)


def test_a_name_that_two_tensors_end_with_is_not_guessed(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tensors = stored_in(tmp_path)
    weight = tensors.pop("lm_head.weight")
    save_file(
        {**tensors, "a.lm_head.weight": weight, "b.lm_head.weight": weight.clone()}, tmp_path / "model.safetensors"
    )
    with pytest.raises(GKDTeacherError, match=r"stores no lm_head\.weight, the head of its architecture"):
        read_head(str(tmp_path))


def test_reading_draws_no_random_numbers(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    before = torch.random.get_rng_state()
    read_head(str(tmp_path))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_architecture_whose_logits_are_more_than_its_head_is_refused(tiny_model, tmp_path):
    """RecurrentGemma caps its logits by an option of a name of its own."""
    tiny_model("recurrent_gemma").save_pretrained(tmp_path)
    with pytest.raises(GKDTeacherError, match="can't be computed from its final hidden states: its logits are not"):
        read_head(str(tmp_path))


def test_a_quantised_head_is_refused(tiny_model, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tensors = stored_in(tmp_path)
    for weight, got in (
        (tensors["lm_head.weight"].to(torch.int8), r"torch\.int8 \[368, 32\]"),
        (tensors["lm_head.weight"].to(torch.float8_e4m3fn), r"torch\.float8_e4m3fn \[368, 32\]"),
        (tensors["lm_head.weight"][:, :16].contiguous(), r"torch\.float32 \[368, 16\]"),
    ):
        save_file({**tensors, "lm_head.weight": weight}, tmp_path / "model.safetensors")
        with pytest.raises(GKDTeacherError, match=rf"stored as \[V, 32\] in float32, .*; got {got}: name an"):
            read_head(str(tmp_path))
    renamed(tmp_path, {"lm_head.weight": "lm_head.qweight"})
    with pytest.raises(GKDTeacherError, match=r"stores no lm_head\.weight"):
        read_head(str(tmp_path))


def test_a_missing_bias_is_named(tiny_model, tmp_path):
    tiny_model("phi").save_pretrained(tmp_path)
    renamed(tmp_path, {"lm_head.bias": None})
    with pytest.raises(GKDTeacherError, match=r"stores no lm_head\.bias"):
        read_head(str(tmp_path))


def test_a_checkpoint_that_is_not_there_or_in_another_format_is_refused(tiny_model, tmp_path):
    with pytest.raises(GKDTeacherError, match="could not read the config of the teacher 'no/where'"):
        read_head("no/where")
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(GKDTeacherError, match=r"has neither model\.safetensors\.index\.json nor model\.safetensors"):
        read_head(str(tmp_path))


def test_an_architecture_that_transformers_can_not_build_is_refused(tiny_model, tmp_path):
    tiny_model().config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "clip_vision_model"}))
    with pytest.raises(GKDTeacherError, match=r"could not build the architecture of .* without layers"):
        read_head(str(tmp_path))


def test_options_beyond_the_place_are_refused(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    read_head(str(tmp_path), init_kwargs={"revision": "main", "token": None})
    with pytest.raises(GKDTeacherError, match=r"only say where it is stored .*; got device_map, dtype: give"):
        read_head(str(tmp_path), init_kwargs={"dtype": "bfloat16", "device_map": "auto"})
