"""The images of rows: their tokens, by a processor, and their pixels, in batches.

Shapes: B batch, L length, I images.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from transformers import ProcessorMixin

from gkd_trainer.batch_keys import IGNORE_INDEX, MEDIA_INPUTS
from gkd_trainer.data.collate import Collator, Wrapper
from gkd_trainer.data.tokens import RowDropped, RowTokens
from gkd_trainer.errors import GKDDataError
from gkd_trainer.types import prompt_length

IMAGE_COLUMNS = ("images", "image")
"""The columns of a row's images: a list of them, or one."""

_IMAGE_TYPE = 1
"""The value of `mm_token_type_ids` at an image's tokens; 0 is text."""


def images_of(row: Mapping[str, Any]) -> list[Any]:
    """Return a row's images: the list in `images`, or the one in `image`; both may be missing or empty."""
    images = row.get("images")
    if images is None:
        image = row.get("image")
        return [] if image is None else [image]
    return list(images) if isinstance(images, list | tuple) else [images]


def require_readable(images: Sequence[Any], processing: ImageProcessing | None, *, is_encoder_decoder: bool) -> None:
    """Raise GKDDataError if a row has images that can't become tokens of a decoder."""
    if images and is_encoder_decoder:
        raise GKDDataError(
            "the rows have images, but the student is an encoder-decoder, and only decoders that read images among "
            "their tokens can take them: remove the columns `image` and `images`"
        )
    if images and processing is None:
        raise GKDDataError(
            "the rows have images, which only a processor of images and text can prepare: pass the processor of a "
            "vision-language model as processing_class, or remove the columns `image` and `images`"
        )


def require_own(formatted: Mapping[str, Any], images: Sequence[Any]) -> None:
    """Raise GKDDataError if a formatting_func returned other images than its row has: batches would lack them."""
    if set(IMAGE_COLUMNS).isdisjoint(formatted) or (returned := images_of(formatted)) == list(images):
        return
    raise GKDDataError(
        f"formatting_func returned other images ({len(returned)}) than the row's column `images` or `image` holds "
        f"({len(images)}), but pixels are read from the dataset's columns: make that column first, for example by "
        'dataset.rename_column("picture", "image") or dataset.map'
    )


@dataclass(frozen=True)
class ImageProcessing:
    """Turns a row's images into tokens, and those of a batch into a model's inputs, by a processor of transformers.

    A chat template writes one placeholder per image, and the processor replaces it by the image's own tokens, whose
    number depends on its size.
    """

    processor: Any
    token_id: int
    _tokens_by_size: dict[tuple[int, int], list[int]] = field(default_factory=dict, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        # What was cached must not change the fingerprint of a dataset.
        return {**vars(self), "_tokens_by_size": {}}

    @classmethod
    def of(cls, processing_class: Any) -> ImageProcessing | None:
        """Return the processing of images by a processor; None for a tokenizer, or a processor of other media."""
        if not isinstance(processing_class, ProcessorMixin) or not hasattr(processing_class, "image_processor"):
            return None
        token_id = getattr(processing_class, "image_token_id", None)
        if token_id is None:
            token = getattr(processing_class, "image_token", None)
            token_id = None if token is None else processing_class.tokenizer.convert_tokens_to_ids(token)
        return None if token_id is None else cls(processing_class, int(token_id))

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer, with the processor's chat template, if it has its own."""
        tokenizer = self.processor.tokenizer
        template = getattr(self.processor, "chat_template", None)
        if template is None or template == tokenizer.chat_template:
            return tokenizer
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = template
        return tokenizer

    def expanded(self, tokens: RowTokens, images: Sequence[Any], *, is_generating: bool) -> RowTokens:
        """Return a row's tokens, with placeholders replaced by the images' tokens, which are not trained on.

        Args:
            tokens: The tokens of a row, with a placeholder for each image; those of a prepared row stay as they are.
            images: Its images.
            is_generating: Whether its prompt may get another completion.

        Raises:
            RowDropped: There are more or fewer placeholders than images, in the row or in its on-policy prompt.
            GKDDataError: An image is not a PIL image, or the processor writes text around it.
        """
        pieces = [self._tokens_of(image) for image in images]
        behind = tokens.ids[prompt_length(tokens.labels) :] if prompt_length(tokens.labels) else ()
        if is_generating and not tokens.prompt_ids and self.token_id in behind:
            raise RowDropped("an image after the prompt")
        n_given = tokens.ids.count(self.token_id)
        # Rows of a dataset that is already prepared.
        if n_given != len(images) and n_given == sum(piece.count(self.token_id) for piece in pieces):
            labels = [IGNORE_INDEX if label == self.token_id else label for label in tokens.labels]
            return replace(tokens, labels=labels)
        if images and tokens.per_token:
            raise RowDropped(f"image placeholders together with {', '.join(sorted(tokens.per_token))}")
        ids, labels = self._replaced(tokens.ids, tokens.labels, pieces)
        prompt_ids = self._replaced(tokens.prompt_ids, [], pieces)[0] if tokens.prompt_ids else []
        return replace(tokens, ids=ids, labels=labels, prompt_ids=prompt_ids)

    def require_whole(self, ids: Sequence[int], max_length: int | None) -> None:
        """Raise RowDropped if cutting a row to `max_length` would leave out tokens of an image."""
        if max_length is not None and self.token_id in ids[max_length:]:
            last = max(index for index, token_id in enumerate(ids) if token_id == self.token_id)
            raise RowDropped(f"an image that does not end within max_length ({max_length})", last + 1)

    def inputs(self, images: Sequence[Sequence[Any]], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return what a model's forward takes for the images of a batch, besides the batch's own tensors.

        Args:
            images: The images of each sample; of at least one.
            batch: `input_ids` [B, L] and others, with the images' tokens.

        Raises:
            GKDDataError: The tokens are not those of the images, or the processor returns a tensor with an unknown
                name.
        """
        rows = [row for row, own in enumerate(images) if own]
        texts = [self.processor.image_token * len(images[row]) for row in rows]
        made = self._processed(texts, [list(images[row]) for row in rows])
        is_image_BL = batch["input_ids"] == self.token_id
        counts = (made.pop("input_ids") == self.token_id).sum(dim=1).tolist()
        found = is_image_BL.sum(dim=1).tolist()
        expected = dict(zip(rows, counts, strict=True))
        if found != [expected.get(row, 0) for row in range(len(found))]:
            raise GKDDataError(
                f"the samples of a batch have {found} image tokens, but their images have "
                f"{[expected.get(row, 0) for row in range(len(images))]}: the data collator must keep the rows, their "
                "order and their tokens, and the processor must give images of one size equally many tokens"
            )
        added: dict[str, Tensor] = {}
        has_types = made.pop("mm_token_type_ids", None) is not None
        if has_types or "mm_token_type_ids" in self.processor.model_input_names:
            added["mm_token_type_ids"] = is_image_BL.to(batch["input_ids"].dtype) * _IMAGE_TYPE
        for name in ("attention_mask", *getattr(self.processor, "unused_input_names", ())):
            made.pop(name, None)
        if unknown := sorted(made.keys() - MEDIA_INPUTS):
            raise GKDDataError(
                f"{type(self.processor).__name__} returns {', '.join(unknown)}, which this package can't put into a "
                "batch: pass a data_collator of your own, with dataset_kwargs={'skip_prepare_dataset': True}"
            )
        # Values per sample rather than per image, which a sample without images must have too.
        is_per_sample = made["pixel_values"].dim() == 5 and "image_sizes" not in made
        if is_per_sample:
            made = {name: _for_all_samples(value, rows, len(images)) for name, value in made.items()}
        return {**added, **made}

    def _tokens_of(self, image: Any) -> list[int]:
        size = getattr(image, "size", None)
        if not (isinstance(size, tuple) and hasattr(image, "convert")):
            raise GKDDataError(
                f"expected PIL images; got {type(image).__name__}: cast a column of paths or bytes with "
                'dataset.cast_column("images", datasets.List(datasets.Image()))'
            )
        if size not in self._tokens_by_size:
            ids = self._processed([self.processor.image_token], [[image]])["input_ids"][0]
            self._tokens_by_size[size] = self._checked([int(token_id) for token_id in ids])
        return self._tokens_by_size[size]

    def _checked(self, ids: list[int]) -> list[int]:
        added = self.processor.tokenizer.added_tokens_decoder
        # Texts are split at added tokens before anything else, so the tokens around them don't depend on them.
        if self.token_id not in ids or ids[0] not in added or ids[-1] not in added:
            raise GKDDataError(
                f"{type(self.processor).__name__} writes text around an image, whose tokens depend on those around it: "
                "pass a data_collator of your own, such as trl's DataCollatorForVisionLanguageModeling"
            )
        return ids

    def _processed(self, texts: list[str], images: list[list[Any]]) -> dict[str, Any]:
        return dict(
            self.processor(text=texts, images=images, add_special_tokens=False, padding=True, return_tensors="pt")
        )

    def _replaced(
        self, ids: Sequence[int], labels: Sequence[int], pieces: Sequence[Sequence[int]]
    ) -> tuple[list[int], list[int]]:
        n_placeholders = sum(token_id == self.token_id for token_id in ids)
        if n_placeholders != len(pieces):
            raise RowDropped(f"{n_placeholders} image placeholders for {len(pieces)} images")
        remaining = iter(pieces)
        new_ids: list[int] = []
        new_labels: list[int] = []
        for index, token_id in enumerate(ids):
            if token_id == self.token_id:
                piece = next(remaining)
                new_ids += piece
                new_labels += [IGNORE_INDEX] * len(piece)
            else:
                new_ids.append(token_id)
                new_labels += labels[index : index + 1]
        return new_ids, new_labels


class WithImages(Wrapper):
    """Collates rows with any collator, and adds the inputs of their images to the batch."""

    def __init__(self, collator: Collator, processing: ImageProcessing) -> None:
        super().__init__(collator)
        vars(self)["processing"] = processing

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """Return the collated batch, with pixels if any row has images.

        Raises:
            GKDDataError: The collator changes the rows' tokens or order.
        """
        if not all(isinstance(row, Mapping) for row in rows):
            return self.collator(rows)
        batch = self.collator([{key: row[key] for key in row if key not in IMAGE_COLUMNS} for row in rows])
        images = [images_of(row) for row in rows]
        return {**batch, **self.processing.inputs(images, batch)} if any(images) else batch


def with_image_parts(messages: list[dict[str, Any]], n_images: int) -> list[dict[str, Any]]:
    """Return messages whose contents are lists of parts, as the templates of vision-language models read them.

    Without parts for images, `n_images` of them are put before the first user's text.
    """
    has_parts = any(
        isinstance(message["content"], list)
        and any(isinstance(part, Mapping) and part.get("type") == "image" for part in message["content"])
        for message in messages
    )
    first_user = next((index for index, message in enumerate(messages) if message["role"] == "user"), None)
    result = []
    for index, message in enumerate(messages):
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) and content else content
        if not has_parts and index == first_user and n_images:
            parts = [*({"type": "image"} for _ in range(n_images)), *(parts or [])]
        result.append({**message, "content": parts or []})
    return result


def _for_all_samples(value: Tensor, rows: Sequence[int], n_samples: int) -> Tensor:
    """Return values [B, ...] from those of the samples `rows`, the only ones with images; zeros are padding."""
    if len(rows) == n_samples:
        return value
    values = value.new_zeros((n_samples, *value.shape[1:]))
    values[list(rows)] = value
    return values
