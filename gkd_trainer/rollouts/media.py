"""Which images of a batch belong to which sample, and the images of several prompts as those of one batch.

Shapes: B batch, L length, I images, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gkd_trainer.batch_keys import MEDIA_INPUTS
from gkd_trainer.errors import GKDDataError
from gkd_trainer.types import MediaTokens, PromptMedia

_INSTEAD = "Generate nothing for such rows (lmbda=0, seq_kd=False, eval_on_policy=False)"


def media_of(
    inputs: Mapping[str, Any], prompts: Mapping[int, Sequence[int]], tokens: MediaTokens
) -> dict[int, PromptMedia]:
    """Return the images of those prompts that have any, by row.

    A collated batch does not say which images belong to which sample. Their placeholders in its `input_ids` do, in
    three layouts: `pixel_values` in patches with `image_grid_thw` [I, 3] (an image has as many placeholders as its grid
    has merged patches); one tensor per image, [I, C, height, width], each with the same number of placeholders; and one
    per sample, [B, I, C, height, width].

    Args:
        inputs: A collated batch.
        prompts: The prompt of each sample that will be completed, by row.
        tokens: The tokens that stand for images and other media.

    Raises:
        GKDDataError: A prompt holds a video or sound, lacks an image of its row, or the batch has no pixels for it or
            holds them in another layout.
    """
    holding = {row: prompt for row, prompt in prompts.items() if not tokens.ids.isdisjoint(prompt)}
    if not holding:
        return {}
    for prompt in holding.values():
        other = next((token_id for token_id in prompt if token_id in tokens.ids - {tokens.image}), None)
        if other is not None:
            raise GKDDataError(
                f"a prompt to be completed holds token {other}, which stands for a video or sound, but rollouts only "
                f"take images. {_INSTEAD}"
            )
        if "pixel_values" not in inputs:
            raise GKDDataError(
                f"a prompt to be completed holds token {tokens.image}, which stands for an image, but the data "
                f"collator returned no pixel_values: it would be completed without it. {_INSTEAD}"
            )
    mask_BL = inputs.get("attention_mask")
    is_image_BL = inputs["input_ids"] == tokens.image
    if mask_BL is not None:
        is_image_BL = is_image_BL & mask_BL.bool()
    counts = is_image_BL.sum(dim=1).tolist()
    for row, prompt in holding.items():
        if sum(token_id == tokens.image for token_id in prompt) != counts[row]:
            raise GKDDataError(
                f"sample {row} of a batch has {counts[row]} image tokens, but its prompt does not have as many: an "
                "image after the prompt is among the tokens that a completion replaces, so its pixels would be left "
                "over. Put images before the last assistant turn"
            )
    layout = _Layout(inputs, counts)
    return {
        row: PromptMedia(
            layout.of(row),
            _by_token("mm_token_type_ids", inputs, row, prompt),
            _of_prompt("token_type_ids", inputs, row, prompt),
        )
        for row, prompt in holding.items()
    }


def require_media_taken(holds_media: bool, takes_media: bool, image_token: int | None) -> None:
    """Raise GKDDataError if a prompt with an image would go to an engine that gets only token ids."""
    if holds_media and not takes_media:
        raise GKDDataError(
            f"a prompt to be completed holds token {image_token}, which stands for an image, but this rollout engine "
            "only gets token ids: it would complete it without seeing it. Generate with transformers (use_vllm=False, "
            "on weights that are not sharded over ranks), or generate nothing for such rows (lmbda=0, seq_kd=False, "
            "eval_on_policy=False)"
        )


def refuse_media(media: Sequence[PromptMedia | None] | None) -> None:
    """Raise GKDDataError if an engine that gets only token ids is called with images."""
    if media is not None and any(item is not None for item in media):
        raise GKDDataError(
            "vLLM engines only get token ids, but a prompt has images: use HFRollouts for it (use_vllm=False)"
        )


def joined(media: Sequence[PromptMedia]) -> dict[str, Tensor]:
    """Return the MEDIA_INPUTS of a batch of prompts, each of which has images, in order.

    Images of other sizes or counts are padded with zeros, as processors pad them.
    """
    names = list(media[0].inputs)
    return {name: _concatenated([item.inputs[name] for item in media]) for name in names}


class _Layout:
    """Slices a batch's images by sample; `counts` are the samples' numbers of image tokens."""

    def __init__(self, inputs: Mapping[str, Any], counts: Sequence[int]) -> None:
        found = {name: value for name, value in inputs.items() if name in MEDIA_INPUTS and value is not None}
        self._pixels: Tensor = found.pop("pixel_values")
        self._grids: Tensor | None = found.pop("image_grid_thw", None)
        self._mask: Tensor | None = found.pop("pixel_attention_mask", None)
        self._sizes: Tensor | None = found.pop("image_sizes", None)
        self._images: list[int] | None = None  # the first of each sample; None if the pixels are per sample
        if found:
            raise _unknown(f"{', '.join(sorted(found))}, for which there is no rule")
        if self._grids is not None:
            if self._mask is not None or self._sizes is not None:
                raise _unknown("pixel_attention_mask or image_sizes with image_grid_thw")
            # Placeholders of one merged patch stand for merge² patches.
            self._images = _by_tokens(self._grids.prod(dim=1).tolist(), counts)
        elif self._pixels.dim() == 4 and (self._sizes is None or bool((self._sizes == self._sizes[0]).all())):
            self._images = _by_tokens([1] * len(self._pixels), counts)
        elif self._pixels.dim() != 5 or self._sizes is not None or len(self._pixels) != len(counts):
            sizes = "" if self._sizes is None else " with image_sizes that differ"
            raise _unknown(f"pixel_values {list(self._pixels.shape)}{sizes}")

    def of(self, row: int) -> dict[str, Tensor]:
        """Return the inputs of a single sample."""
        if self._images is None:
            per_sample = {"pixel_values": self._pixels, "pixel_attention_mask": self._mask}
            return {name: value[row : row + 1] for name, value in per_sample.items() if value is not None}
        start, end = self._images[row], self._images[row + 1]
        if self._grids is None:
            per_image = {
                "pixel_values": self._pixels,
                "image_sizes": self._sizes,
                "pixel_attention_mask": self._mask,
            }
            return {name: value[start:end] for name, value in per_image.items() if value is not None}
        patches = self._grids.prod(dim=1)
        first, count = int(patches[:start].sum()), int(patches[start:end].sum())
        return {"pixel_values": self._pixels[first : first + count], "image_grid_thw": self._grids[start:end]}


def _by_tokens(sizes: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Return the first image of each sample, and the number of images last.

    Args:
        sizes: The images' numbers of placeholders up to a common factor.
        counts: The samples' numbers of placeholders.
    """
    total, n_tokens = sum(sizes), sum(counts)
    firsts, image, seen = [0], 0, 0
    for end in _cumulated(counts):
        # In units of 1 / n_tokens, so that no division rounds.
        while image < len(sizes) and (seen + sizes[image]) * n_tokens <= end * total:
            seen += sizes[image]
            image += 1
        if seen * n_tokens != end * total:
            raise _unknown(f"{len(sizes)} images for {list(counts)} image tokens per sample, which do not fit")
        firsts.append(image)
    return firsts


def _cumulated(counts: Sequence[int]) -> list[int]:
    return [sum(counts[: index + 1]) for index in range(len(counts))]


def _of_prompt(name: str, inputs: Mapping[str, Any], row: int, prompt: Sequence[int]) -> Tensor | None:
    """Return the values of a prompt with which the row begins; of another, those of equal tokens."""
    values_BL, mask_BL = inputs.get(name), inputs.get("attention_mask")
    ids_L = inputs["input_ids"][row]
    real_L = torch.ones_like(ids_L, dtype=torch.bool) if mask_BL is None else mask_BL[row].bool()
    if values_BL is None or ids_L[real_L][: len(prompt)].tolist() != list(prompt):
        return _by_token(name, inputs, row, prompt)
    values: Tensor = values_BL[row][real_L][: len(prompt)]
    return values


def _by_token(name: str, inputs: Mapping[str, Any], row: int, prompt: Sequence[int]) -> Tensor | None:
    """Return for each token of a prompt the value of an equal token of the row, else 0."""
    types_BL = inputs.get(name)
    if types_BL is None:
        return None
    type_of = dict(zip(inputs["input_ids"][row].tolist(), types_BL[row].tolist(), strict=True))
    return torch.tensor([type_of.get(token_id, 0) for token_id in prompt], dtype=types_BL.dtype)


def _concatenated(values: Sequence[Tensor]) -> Tensor:
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padded = []
    for value in values:
        missing = [wanted - size for wanted, size in zip(shape, value.shape[1:], strict=True)]
        # From the last dimension to the first, as F.pad reads them.
        padded.append(nn.functional.pad(value, [end for size in reversed(missing) for end in (0, size)]))
    return torch.cat(padded)


def _unknown(what: str) -> GKDDataError:
    return GKDDataError(
        "can't tell which images belong to which sample of a batch to be completed: the data collator returned "
        f"{what}. Known are pixel_values [patches, width] with image_grid_thw, [images, channels, height, width] with "
        f"equally many tokens per image, and [samples, images, channels, height, width]. {_INSTEAD}"
    )
