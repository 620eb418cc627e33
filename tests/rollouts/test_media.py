"""Images are found by their placeholders, and go to the engine with their prompts."""

from dataclasses import replace

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, set_seed

from gkd_trainer import GKDDataError
from gkd_trainer.batch_keys import IGNORE_INDEX
from gkd_trainer.rollouts.block import Block, _digest
from gkd_trainer.rollouts.hf import HFRollouts
from gkd_trainer.rollouts.media import joined, media_of, refuse_media, require_media_taken
from gkd_trainer.rollouts.vllm_colocate import VLLMColocateRollouts
from gkd_trainer.rollouts.vllm_server import VLLMServerRollouts
from gkd_trainer.rollouts.window import Draw, generate_jobs, plan_window
from gkd_trainer.types import MediaTokens, PromptMedia, Sampling
from tests.vision import FAMILIES, IMAGE, make_pair, picture

X = IGNORE_INDEX
I, V, PAD = 90, 91, 0  # noqa: E741
TOKENS = MediaTokens(image=I, video=V)
PROMPTS = {0: [5, I, I, 6], 1: [7], 2: [I, I, I, I, I, I, 8]}


def batch_of(prompts=PROMPTS, **media):
    """Collate prompts with an answer of one token."""
    length = max(map(len, prompts.values())) + 1
    ids = [[*prompt, 9] + [PAD] * (length - len(prompt) - 1) for prompt in prompts.values()]
    mask = [[1] * (len(prompt) + 1) + [0] * (length - len(prompt) - 1) for prompt in prompts.values()]
    labels = [[9 if token_id == 9 else X for token_id in row] for row in ids]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
        **media,
    }


def counted(*shape):
    return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def test_patches_are_divided_by_grids():
    pixels = counted(32, 3)
    grids = torch.tensor([[1, 2, 4], [1, 4, 4], [1, 2, 4]])  # 2, 4 and 2 placeholders
    media = media_of(batch_of(pixel_values=pixels, image_grid_thw=grids), PROMPTS, TOKENS)
    assert media.keys() == {0, 2}
    torch.testing.assert_close(media[0].inputs["pixel_values"], pixels[:8])
    torch.testing.assert_close(media[2].inputs["pixel_values"], pixels[8:])
    assert media[2].inputs["image_grid_thw"].tolist() == [[1, 4, 4], [1, 2, 4]]
    assert media[0].mm_token_type_ids is None


def test_images_with_equally_many_tokens_are_divided_by_number():
    pixels = counted(4, 3, 2, 2)
    media = media_of(batch_of(pixel_values=pixels), PROMPTS, TOKENS)
    torch.testing.assert_close(media[0].inputs["pixel_values"], pixels[:1])
    torch.testing.assert_close(media[2].inputs["pixel_values"], pixels[1:])


def test_images_per_sample_stay_with_their_sample():
    pixels, mask = counted(3, 3, 3, 2, 2), counted(3, 3, 2, 2)
    media = media_of(batch_of(pixel_values=pixels, pixel_attention_mask=mask), {2: PROMPTS[2]}, TOKENS)
    torch.testing.assert_close(media[2].inputs["pixel_values"], pixels[2:])
    torch.testing.assert_close(media[2].inputs["pixel_attention_mask"], mask[2:])


def test_the_types_of_a_prompts_tokens_go_along():
    inputs = batch_of(pixel_values=counted(4, 3, 2, 2))
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == I).long()
    media = media_of(inputs, {0: [4, *PROMPTS[0]]}, TOKENS)  # a prompt of its own
    assert media[0].mm_token_type_ids.tolist() == [0, 0, 1, 1, 0]


def test_text_has_no_media():
    assert media_of(batch_of(), {1: PROMPTS[1]}, TOKENS) == {}
    assert media_of(batch_of(), PROMPTS, MediaTokens()) == {}


@pytest.mark.parametrize(
    ("media", "message"),
    [
        ({}, f"token {I}, which stands for an image, but the data collator returned no pixel_values"),
        ({"pixel_values": counted(3, 3, 2, 2)}, r"3 images for \[2, 0, 6\] image tokens per sample"),
        ({"pixel_values": counted(4, 6)}, r"pixel_values \[4, 6\]"),
        ({"pixel_values": counted(4, 2, 3, 2, 2)}, r"pixel_values \[4, 2, 3, 2, 2\]"),
        (
            {"pixel_values": counted(4, 3, 2, 2), "image_sizes": counted(4, 2)},
            "image_sizes that differ",
        ),
        ({"pixel_values": counted(4, 3, 2, 2), "spatial_shapes": counted(4, 2)}, "spatial_shapes, for which"),
        (
            {"pixel_values": counted(24, 3), "image_grid_thw": torch.tensor([[1, 4, 4], [1, 2, 4]])},
            "2 images for",
        ),
    ],
)
def test_what_can_not_be_divided_is_refused_by_name(media, message):
    with pytest.raises(GKDDataError, match=message):
        media_of(batch_of(**media), PROMPTS, TOKENS)


def test_a_prompt_that_lacks_an_image_of_its_row_is_refused():
    with pytest.raises(GKDDataError, match="sample 0 of a batch has 2 image tokens, but its prompt does not"):
        media_of(batch_of(pixel_values=counted(4, 3, 2, 2)), {0: [5, I]}, TOKENS)


def test_a_video_is_refused():
    with pytest.raises(GKDDataError, match=f"token {V}, which stands for a video or sound"):
        media_of(batch_of({0: [V, 5]}, pixel_values=counted(1, 3, 2, 2)), {0: [V, 5]}, TOKENS)


def test_joined_images_are_padded_with_zeros_to_the_largest():
    small, large = counted(1, 1, 3, 2, 2), counted(1, 2, 3, 2, 3)
    both = joined([PromptMedia({"pixel_values": small}), PromptMedia({"pixel_values": large})])["pixel_values"]
    assert both.shape == (2, 2, 3, 2, 3)
    torch.testing.assert_close(both[0, :1, :, :, :2], small[0])
    assert both[0].sum() == small.sum()
    torch.testing.assert_close(both[1], large[0])


def test_engines_that_get_tokens_alone_refuse_images():
    media = [None, PromptMedia({"pixel_values": counted(1, 3, 2, 2)})]
    require_media_taken(holds_media=True, takes_media=True, image_token=I)
    require_media_taken(holds_media=False, takes_media=False, image_token=I)
    with pytest.raises(GKDDataError, match=f"token {I}, .* only gets token ids.*use_vllm=False"):
        require_media_taken(holds_media=True, takes_media=False, image_token=I)
    refuse_media(None)
    refuse_media([None, None])
    for engine in (VLLMColocateRollouts, VLLMServerRollouts):
        assert not engine.takes_media
        with pytest.raises(GKDDataError, match="a prompt has images: use HFRollouts"):
            engine.generate(object.__new__(engine), [[5], [I]], Sampling(3), [0, 0], media)


def test_a_student_whose_weights_are_sharded_takes_no_images():
    assert HFRollouts([2]).takes_media
    assert not HFRollouts([2], is_sharded=True).takes_media


@pytest.mark.parametrize("vocab_size", [None, 40])
def test_some_tokens_are_never_sampled(tiny_model, vocab_size):
    model = tiny_model()
    engine = HFRollouts([], 2, vocab_size, never_sampled=range(5, len(model.lm_head.weight)))
    engine.sync(model)
    for sampling in (engine.greedy_sampling(8), Sampling(8, temperature=3.0)):
        [completion] = engine.generate([[7, 8]], sampling, [0])
        assert max(completion.token_ids) < 5


def test_completions_of_other_images_are_not_resumed():
    def plan_of(value):
        inputs = [batch_of(pixel_values=torch.full((4, 3, 2, 2), value))]
        draw = Draw(1.0, "sample", seed=0, step=0, rank=0, world_size=1, batch_size=3)
        return plan_window(inputs, draw, teacher_generates=False, media_tokens=TOKENS)

    def state(plan):
        return {
            "weights_step": 0,
            "windows": [{**item, "student": [[[9], True]] * 3, "teacher": []} for item in windows(plan)],
        }

    def windows(plan):
        return [{"step": plan.step, "prompts": _digest(plan)}]

    saved = state(plan_of(1.0))
    assert Block.restored(saved, [plan_of(1.0)]) is not None
    assert Block.restored(saved, [plan_of(2.0)]) is None


def test_completions_of_other_token_types_are_not_resumed():
    def digest_of(**types):
        inputs = [batch_of(pixel_values=torch.ones(4, 3, 2, 2), **types)]
        draw = Draw(1.0, "sample", seed=0, step=0, rank=0, world_size=1, batch_size=3)
        return _digest(plan_window(inputs, draw, teacher_generates=False, media_tokens=TOKENS))

    types = batch_of()["input_ids"] == I
    assert len({digest_of(), digest_of(token_type_ids=types.long()), digest_of(token_type_ids=0 * types.long())}) == 3


def test_token_types_are_those_of_the_prompt_at_the_rows_beginning():
    inputs = batch_of(pixel_values=counted(4, 3, 2, 2))
    inputs["token_type_ids"] = torch.arange(inputs["input_ids"].numel()).view_as(inputs["input_ids"])
    media = media_of(inputs, PROMPTS, TOKENS)
    length = inputs["input_ids"].shape[1]
    assert media[0].token_type_ids.tolist() == [0, 1, 2, 3]
    assert media[2].token_type_ids.tolist() == list(range(2 * length, 2 * length + 7))
    padded_left = {
        name: torch.cat([value[:, :1] * 0, value], dim=1) if name != "pixel_values" else value
        for name, value in inputs.items()
    }
    assert media_of(padded_left, PROMPTS, TOKENS)[0].token_type_ids.tolist() == [0, 1, 2, 3]
    of_another = media_of({**inputs, "token_type_ids": (inputs["input_ids"] == I).long()}, {0: [8, I, I, 6]}, TOKENS)
    assert of_another[0].token_type_ids.tolist() == [0, 1, 1, 0]


def tiny_gemma3():
    """A Gemma 3 whose image tokens attend to one another, if it is told which those are."""
    set_seed(0)
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "max_position_embeddings": 128,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
        mm_tokens_per_image=4,
        boi_token_index=60,
        eoi_token_index=61,
        image_token_index=62,
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.model.multi_modal_projector.mm_input_projection_weight.normal_()
        for name, weight in model.named_parameters():
            if "language_model" in name and weight.dim() == 2:
                weight.normal_(0, 0.05 if "embed_tokens" in name else 0.5)
        model.lm_head.weight.normal_()
    return model


def test_gemma3_completes_images_as_its_training_forward_sees_them():
    """It learns from `token_type_ids` which tokens are an image's; without them, those attend causally."""
    model, image = tiny_gemma3(), 62
    prompts = {0: [2, 5, 60, *[image] * 4, 61, 7, 8], 1: [6, 60, *[image] * 4, 61]}
    inputs = {**batch_of(prompts), "pixel_values": torch.randn(2, 3, 16, 16)}
    inputs["token_type_ids"] = (inputs["input_ids"] == image).long()
    draw = Draw(1.0, "sample", seed=0, step=0, rank=0, world_size=1, batch_size=2)
    plan = plan_window([inputs], draw, teacher_generates=False, media_tokens=MediaTokens(image=image))
    engine = HFRollouts([], 0, 60)
    engine.sync(model)
    completions = generate_jobs([plan.student_jobs], engine.greedy_sampling(12), engine)
    [batch] = plan.rolled_out(completions[0], [], 0).batches
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        best, causal = (
            model(**each).logits[:, :-1, :60].argmax(-1)
            for each in (batch, {name: value for name, value in batch.items() if name != "token_type_ids"})
        )
    trained = labels != X
    assert torch.equal(best[trained], labels[trained])
    assert not torch.equal(causal[trained], labels[trained])


def test_token_types_that_a_model_does_not_take_are_left_out():
    pair = make_pair("llava")
    prompts, inputs = prompts_of(pair)
    media = media_from(inputs[0])
    engine = HFRollouts([], 1, len(pair.processor.tokenizer))
    engine.sync(pair.student)
    typed = replace(media, token_type_ids=torch.zeros(len(prompts[0]), dtype=torch.long))
    assert engine.generate(prompts[:1], Sampling(2), [0], media=[typed]) == engine.generate(
        prompts[:1], Sampling(2), [0], media=[media]
    )


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    return make_pair(request.param)


def prompts_of(pair):
    """Return prompts with and without images, and what the processor makes of each alone."""
    texts = [f"{IMAGE}a", "no image", f"{IMAGE}and{IMAGE}, longer", f"x{IMAGE}"]
    images = [[picture(1, 16, 8)], [], [picture(2), picture(3, 24, 16)], [picture(4, 8, 16)]]
    made = [
        pair.processor(text=[text], return_tensors="pt", add_special_tokens=False, **({"images": [own]} if own else {}))
        for text, own in zip(texts, images, strict=True)
    ]
    inputs = [{k: v for k, v in each.items() if k not in ("rows", "cols")} for each in made]
    return [each["input_ids"][0].tolist() for each in inputs], inputs


def media_from(inputs):
    types = inputs.get("mm_token_type_ids")
    if "pixel_values" not in inputs:
        return None
    pixels = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
    return PromptMedia(pixels, None if types is None else types[0])


def test_greedy_completions_are_those_of_plain_forwards(pair):
    prompts, inputs = prompts_of(pair)
    image = pair.processor.image_token_id
    engine = HFRollouts([], 1, len(pair.processor.tokenizer), never_sampled=[image])
    engine.sync(pair.student)
    media = [media_from(each) for each in inputs]
    completions = engine.generate(prompts, engine.greedy_sampling(5), [0] * 4, media=media)
    for prompt, each, completion in zip(prompts, inputs, completions, strict=True):
        ids = list(prompt)
        for token_id in completion.token_ids:
            now = {**each, "input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
            if "mm_token_type_ids" in each:
                now["mm_token_type_ids"] = (now["input_ids"] == image).long()
            with torch.no_grad():
                logits_V = pair.student(**now, use_cache=False).logits[0, -1, : len(pair.processor.tokenizer)]
            logits_V[image] = -torch.inf
            assert token_id == int(logits_V.argmax())
            ids.append(token_id)


def test_a_completion_depends_on_its_own_seed_and_images(pair):
    prompts, inputs = prompts_of(pair)
    engine = HFRollouts([], 1, len(pair.processor.tokenizer), never_sampled=[pair.processor.image_token_id])
    engine.sync(pair.student)
    media, sampling = [media_from(each) for each in inputs], Sampling(8, temperature=2.0)
    together = engine.generate(prompts, sampling, [3, 4, 5, 6], media=media)
    for index in range(4):
        [alone] = engine.generate([prompts[index]], sampling, [3 + index], media=[media[index]])
        assert alone == together[index]
    blank = PromptMedia(
        {**media[0].inputs, "pixel_values": -media[0].inputs["pixel_values"]}, media[0].mm_token_type_ids
    )
    [other] = engine.generate(prompts[:1], sampling, [3], media=[blank])
    assert other != together[0]
