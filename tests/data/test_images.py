"""Rows with images: one placeholder becomes the image's tokens, and the batch gets its pixels."""

import pickle

import pytest
import torch
from datasets import Dataset, Image, List
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, DataCollatorForVisionLanguageModeling

from gkd_trainer import GKDDataError
from gkd_trainer.batch_keys import IGNORE_INDEX, PROMPT_IDS
from gkd_trainer.data import ImageProcessing, KeepSideTensors, WithImages, prepare_dataset
from gkd_trainer.data.images import images_of, with_image_parts
from gkd_trainer.data.rows import RowPreparer
from gkd_trainer.data.rules import RowRules
from gkd_trainer.data.tokens import RowDropped
from tests.vision import EOS, FAMILIES, IMAGE, conversation, make_processor, picture


def rules_of(processor, **changes):
    stop = frozenset({processor.tokenizer.convert_tokens_to_ids(EOS)})
    return RowRules(
        **{
            "stop_ids": stop,
            "max_length": 200,
            "max_new_tokens": 8,
            "train_on": "all_turns",
            "is_generating": True,
            "needs_completion": False,
            "needs_prompt": False,
            **changes,
        }
    )


def preparer_of(processor, **changes):
    images = ImageProcessing.of(processor)
    return RowPreparer.create(images.tokenizer, rules_of(processor, **changes), None, images=images)


@pytest.fixture(scope="module", params=FAMILIES)
def processor(request):
    return make_processor(request.param)


@pytest.fixture(scope="module")
def qwen():
    return make_processor("qwen2")


TWO = {"images": [picture(1, 16, 8), picture(2, 24, 16)], "messages": conversation("Hi", "Yes.")}


def test_the_prompt_has_the_tokens_that_the_processor_gives_it(processor):
    prepared = preparer_of(processor).prepare(TWO)
    [content] = [[{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Hi"}]]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    expected = processor(text=[text], images=[TWO["images"]], add_special_tokens=False)["input_ids"][0]
    assert prepared.input_ids[: prepared.n_prompt] == list(expected)
    answer = [label for label in prepared.labels if label != IGNORE_INDEX]
    assert processor.tokenizer.decode(answer) == f"Yes.{EOS}"


def test_labels_are_those_of_trl_for_prompts_and_completions(processor):
    row = {
        "images": TWO["images"],
        "prompt": conversation("Hi"),
        "completion": [{"role": "assistant", "content": "Yes."}],
    }
    theirs = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)([dict(row)])
    images = ImageProcessing.of(processor)
    prepared = preparer_of(processor).prepare(row)
    collator = WithImages(KeepSideTensors(DataCollatorForLanguageModeling(pad_token_id=0)), images)
    ours = collator([{"input_ids": prepared.input_ids, "labels": prepared.labels, "images": row["images"]}])
    n = ours["input_ids"].shape[1]
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
    assert ours["labels"][0, :-1].tolist() == theirs["labels"][0, : n - 1].tolist()
    # TRL trains on the newline behind the end of the turn.
    assert (ours["labels"][0, -1], theirs["labels"][0, -1]) == (IGNORE_INDEX, theirs["input_ids"][0, -1])
    for name in theirs.keys() - {"labels", "rows", "cols"}:
        torch.testing.assert_close(ours[name], theirs[name])


def test_samples_without_images_have_padding_where_pixels_are_per_sample():
    processor = make_processor("smolvlm")
    images = ImageProcessing.of(processor)
    pieces = images._tokens_of(picture(1))
    batch = {"input_ids": torch.tensor([[5] * len(pieces), pieces])}
    made = images.inputs([[], [picture(1)]], batch)
    assert made["pixel_values"].shape[0] == 2
    assert made["pixel_values"][0].abs().sum() == 0
    assert made["pixel_values"][1].abs().sum() > 0


def test_a_row_that_is_already_prepared_keeps_its_tokens(processor):
    preparer = preparer_of(processor)
    prepared = preparer.prepare(TWO)
    again = preparer.prepare(
        {"input_ids": prepared.input_ids, "labels": prepared.labels, "images": TWO["images"], PROMPT_IDS: []}
    )
    assert (again.input_ids, again.labels) == (prepared.input_ids, prepared.labels)


def test_parts_may_say_where_images_are(qwen):
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    row = {"images": [picture(1)], "messages": [{"role": "user", "content": parts}, *conversation("", "Yes.")[1:]]}
    prepared = preparer_of(qwen).prepare(row)
    text = qwen.tokenizer.decode(prepared.input_ids)
    assert f"user\na<|vision_start|>{IMAGE}<|vision_end|>b" in text


def test_images_come_before_the_first_users_text_once():
    messages = [{"role": "system", "content": "s"}, *conversation("a", "b", "c")]
    contents = [message["content"] for message in with_image_parts(messages, 2)]
    text = [[{"type": "text", "text": word}] for word in "sabc"]
    assert contents == [text[0], [{"type": "image"}, {"type": "image"}, *text[1]], text[2], text[3]]


def test_one_image_may_stand_alone():
    image = picture(1)
    assert images_of({"image": image}) == images_of({"images": [image]}) == images_of({"images": image}) == [image]
    assert images_of({"image": None, "images": []}) == images_of({}) == []


def test_rows_of_a_data_set_are_prepared(qwen):
    rows = Dataset.from_list([TWO, {"images": [], "messages": conversation("No image", "No.")}])
    images = ImageProcessing.of(qwen)
    prepared = prepare_dataset(rows, images.tokenizer, rules_of(qwen), images=images)
    image = qwen.image_token_id
    assert [ids.count(image) for ids in prepared["input_ids"]] == [2 + 6, 0]
    assert len(prepared[0]["images"]) == 2
    assert prepared.features["images"] == List(Image())


@pytest.mark.parametrize(
    ("row", "changes", "reason"),
    [
        (
            {"images": [picture(1)], "prompt": f"{IMAGE}{IMAGE} a", "completion": "b"},
            {},
            "2 image placeholders for 1 im",
        ),
        ({"images": [], "prompt": f"{IMAGE} a", "completion": "b"}, {}, "1 image placeholders for 0 images"),
        (TWO, {"max_length": 20, "max_new_tokens": 2}, "prompt longer than max_length"),
        ({"images": [picture(1, 24, 24)], "prompt": "a", "completion": f"b{IMAGE}"}, {}, "an image after the prompt"),
        (
            {"images": [picture(1, 24, 24)], "prompt": "a", "completion": f"b{IMAGE}"},
            {"is_generating": False, "max_length": 6},
            "an image that does not end within max_length",
        ),
    ],
)
def test_rows_whose_images_do_not_fit_are_dropped(qwen, row, changes, reason):
    with pytest.raises(RowDropped) as dropped:
        preparer_of(qwen, **changes).prepare(row)
    assert dropped.value.reason.startswith(reason)


def test_images_are_never_trained_on(qwen):
    prepared = preparer_of(qwen, is_generating=False).prepare({"images": [picture(1, 16, 8)], "text": f"a{IMAGE}b"})
    image = qwen.image_token_id
    assert prepared.input_ids.count(image) == 2
    assert image not in prepared.labels


def test_images_without_a_processor_are_refused(qwen):
    with pytest.raises(GKDDataError, match=r"rows have images.*pass the processor"):
        prepare_dataset([TWO], qwen.tokenizer, rules_of(qwen))
    assert ImageProcessing.of(qwen.tokenizer) is None


def test_paths_are_refused_with_a_remedy(qwen):
    with pytest.raises(GKDDataError, match=r"expected PIL images; got str: .*cast_column"):
        preparer_of(qwen).prepare({**TWO, "images": ["a.png", "b.png"]})


def test_a_collator_that_changes_the_tokens_is_refused(qwen):
    images = ImageProcessing.of(qwen)
    with pytest.raises(GKDDataError, match=r"have \[0\] image tokens, but their images have \[2\]"):
        images.inputs([[picture(1, 16, 8)]], {"input_ids": torch.tensor([[5, 6]])})


def test_a_value_of_the_processor_without_a_rule_is_refused_by_name(qwen, monkeypatch):
    made = type(qwen).__call__

    def call(self, **kwargs):
        return {**made(self, **kwargs), "depth_maps": torch.ones(1, 2)}

    monkeypatch.setattr(type(qwen), "__call__", call)
    images = ImageProcessing.of(qwen)
    with pytest.raises(GKDDataError, match="ImagesOnly returns depth_maps, which"):
        images.inputs([[picture(1)]], {"input_ids": torch.tensor([[images.token_id]])})


def test_a_processor_that_writes_text_around_images_is_refused(qwen, monkeypatch):
    made = type(qwen).__call__

    def call(self, *, text, **kwargs):
        return made(self, text=[each.replace(IMAGE, f"\n{IMAGE}\n") for each in text], **kwargs)

    monkeypatch.setattr(type(qwen), "__call__", call)
    with pytest.raises(GKDDataError, match="writes text around an image"):
        preparer_of(qwen).prepare(TWO)


def test_what_is_cached_leaves_the_pickle_as_it_was(qwen):
    images = ImageProcessing.of(qwen)
    assert images._tokens_of(picture(1)) == images._tokens_of(picture(2))
    assert images._tokens_by_size
    assert not vars(images.__class__(**images.__getstate__()))["_tokens_by_size"]
    assert pickle.loads(pickle.dumps(images)).token_id == images.token_id


@pytest.mark.parametrize(
    ("changes", "reason"), [({"is_encoder_decoder": True}, "is an encoder-decoder"), ({}, "a processor of images")]
)
def test_images_that_can_not_be_prepared_are_refused(qwen, changes, reason):
    preparer = RowPreparer.create(qwen.tokenizer, rules_of(qwen, **changes), None)
    with pytest.raises(GKDDataError, match=f"the rows have images, .*{reason}"):
        preparer.prepare(TWO)


def test_a_formatting_func_may_return_the_images_of_its_row_or_leave_them_out(qwen):
    rows = Dataset.from_list([TWO])
    images = ImageProcessing.of(qwen)
    expected = prepare_dataset(rows, images.tokenizer, rules_of(qwen), images=images)["input_ids"]
    for formatted in (
        dict,
        lambda row: {"images": row["images"], "messages": row["messages"]},
        lambda row: row["messages"],
    ):
        prepared = prepare_dataset(
            rows, images.tokenizer, rules_of(qwen), images=images, formatting_func=lambda row, f=formatted: f(row)
        )
        assert prepared["input_ids"] == expected


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("formatted", "counts"),
    [
        (lambda row: {"images": [row["picture"]], "messages": row["messages"]}, r"\(1\) .* \(2\)"),
        (lambda row: {"image": row["picture"], "messages": row["messages"]}, r"\(1\) .* \(2\)"),
        (lambda row: {"images": row["images"][:1], "messages": row["messages"]}, r"\(1\) .* \(2\)"),
        (lambda row: {"images": [image.rotate(90) for image in row["images"]]}, r"\(2\) .* \(2\)"),
        (lambda row: {"images": [], "messages": row["messages"]}, r"\(0\) .* \(2\)"),
    ],
)
def test_other_images_from_a_formatting_func_are_refused(qwen, formatted, counts, is_stream):
    rows = Dataset.from_list([{**TWO, "picture": picture(3)}])
    images = ImageProcessing.of(qwen)
    with pytest.raises(GKDDataError, match=f"formatting_func returned other images {counts}, but.*rename_column"):
        prepare_dataset(
            rows.to_iterable_dataset() if is_stream else rows,
            images.tokenizer,
            rules_of(qwen),
            images=images,
            formatting_func=formatted,
        )


def test_images_that_only_a_formatting_func_gives_are_refused(qwen):
    images = ImageProcessing.of(qwen)
    with pytest.raises(GKDDataError, match=r"other images \(1\) than .* holds \(0\), but pixels"):
        prepare_dataset(
            [{"picture": picture(1), "q": "Hi"}],
            images.tokenizer,
            rules_of(qwen),
            images=images,
            formatting_func=lambda row: {"images": [row["picture"]], "messages": conversation(row["q"], "Yes.")},
        )


def test_a_prompt_of_the_teachers_own_beside_images_is_refused(qwen):
    with pytest.raises(GKDDataError, match="a row has images, but its teacher reads a prompt of its own"):
        preparer_of(qwen).prepare({**TWO, "teacher_prompt": "Say yes."})
