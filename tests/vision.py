"""Tiny vision-language models of five families with random weights, and their processors, without torchvision."""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMVisionConfig,
    set_seed,
)

try:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
except ImportError:  # names of earlier versions of transformers 5
    from transformers.models.clip.image_processing_clip import CLIPImageProcessor as CLIPImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor as Qwen2VLImageProcessorPil
    from transformers.models.smolvlm.image_processing_smolvlm import SmolVLMImageProcessor as SmolVLMImageProcessorPil

FAMILIES = ("llava", "smolvlm", "qwen2", "qwen2.5", "qwen3")
EOS, IMAGE, VISION_START, VISION_END = "<|im_end|>", "<image>", "<|vision_start|>", "<|vision_end|>"
SPECIAL = [EOS, "<|im_start|>", IMAGE, "<video>", VISION_START, VISION_END]
SMOLVLM_SPECIAL = ["<fake_token_around_image>", "<global-img>"] + [
    f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)
]
VOCAB = 272

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ PLACEHOLDER }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ImagesOnly(Qwen2VLProcessor):
    """Qwen's processor without that of videos, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = IMAGE, "<video>"
        self.image_token_id, self.video_token_id = map(tokenizer.convert_tokens_to_ids, (IMAGE, "<video>"))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def make_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        pad_token=EOS,
        extra_special_tokens=[*SPECIAL[1:], *SMOLVLM_SPECIAL],
    )


def make_processor(family):
    tokenizer = make_tokenizer()
    placeholder = f"'{VISION_START}{IMAGE}{VISION_END}'" if family.startswith("qwen") else f"'{IMAGE}'"
    template = TEMPLATE.replace("PLACEHOLDER", placeholder)
    if family == "llava":
        images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
        return LlavaProcessor(
            images,
            tokenizer,
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            image_token=IMAGE,
            chat_template=template,
        )
    if family == "smolvlm":
        images = SmolVLMImageProcessorPil(size={"longest_edge": 16}, max_image_size={"longest_edge": 8})
        return Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
    )
    return ImagesOnly(images, tokenizer, chat_template=template)


_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_PATCHES = {"depth": 2, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
_QWEN = {
    "qwen2": (
        Qwen2VLForConditionalGeneration,
        Qwen2VLConfig,
        {**_PATCHES, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
    ),
    "qwen2.5": (
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig,
        {
            **_PATCHES,
            "hidden_size": 16,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
    ),
    "qwen3": (
        Qwen3VLForConditionalGeneration,
        Qwen3VLConfig,
        {
            **_PATCHES,
            "hidden_size": 16,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    ),
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def make_model(family, tokenizer, seed=0):
    token = tokenizer.convert_tokens_to_ids
    eos, image, video = token(EOS), token(IMAGE), token("<video>")
    text = {**_TEXT, "pad_token_id": eos, "eos_token_id": eos, "bos_token_id": None}
    set_seed(seed)
    model: Any
    if family == "llava":
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                text_config=LlamaConfig(**text),
                vision_config=CLIPVisionConfig(**_VISION),
                image_token_index=image,
                image_seq_length=4,
                vision_feature_layer=-1,
            )
        )
    elif family == "smolvlm":
        model = SmolVLMForConditionalGeneration(
            SmolVLMConfig(
                text_config=LlamaConfig(**text),
                vision_config=SmolVLMVisionConfig(**_VISION),
                image_token_id=image,
                scale_factor=1,
                tie_word_embeddings=False,
                pad_token_id=eos,
            )
        )
    else:
        model_class, config_class, vision = _QWEN[family]
        model = model_class(
            config_class(
                text_config={**text, **_MROPE},
                vision_config=vision,
                vision_start_token_id=token(VISION_START),
                vision_end_token_id=token(VISION_END),
                image_token_id=image,
                video_token_id=video,
                tie_word_embeddings=False,
            )
        )
    model.generation_config.eos_token_id = eos
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model.eval()


@dataclass(frozen=True)
class VisionLanguage:
    """A processor and a student with its teacher, of one family."""

    family: str
    processor: Any
    student: Any
    teacher: Any


def make_pair(family):
    processor = make_processor(family)
    student, teacher = (make_model(family, processor.tokenizer, seed) for seed in (0, 1))
    return VisionLanguage(family, processor, student, teacher)


def picture(seed, width=8, height=8):
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def conversation(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]
