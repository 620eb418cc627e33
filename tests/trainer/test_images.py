"""Training on images: real models of five families read the same text and images in a batch as they do alone."""

from dataclasses import dataclass, replace

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from gkd_trainer import GKDArguments, GKDDataError, GKDMixin, GKDTrainer
from gkd_trainer.batch_keys import IGNORE_INDEX, IS_ON_POLICY
from gkd_trainer.types import TokenBatch
from tests.vision import FAMILIES, VOCAB, conversation, make_pair, picture

ROWS = [
    {"images": [picture(1, 16, 8)], "messages": conversation("What?", "A cat.")},
    {"images": [], "messages": conversation("Two and two?", "Four.", "Sure?", "Yes.")},
    {
        "images": [picture(2), picture(3, 24, 16)],
        "messages": [
            {"role": "user", "content": "Compare them."},
            {"role": "assistant", "content": "One is larger."},
        ],
    },
    {"images": [picture(4, 8, 24)], "messages": conversation("And this one, in a few words?", "A dog.")},
]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    return make_pair(request.param)


@pytest.fixture
def trainer_of(config_of):
    def make(pair, rows=ROWS, **options):
        given = {name: options.pop(name) for name in ("eval_dataset", "data_collator") if name in options}
        settings = {
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_steps": 1,
            "max_new_tokens": 6,
            "max_length": 160,
            "learning_rate": 1e-3,
            **options,
        }
        return GKDTrainer(
            pair.student,
            config_of(**settings),
            train_dataset=rows,
            processing_class=pair.processor,
            teacher_model=pair.teacher,
            **given,
        )

    return make


def window_of(trainer):
    """Return the one batch of a window after its rollouts."""
    loader = iter(trainer.get_train_dataloader())
    trainer.callback_handler.train_dataloader = trainer.get_train_dataloader()
    trainer.create_optimizer_and_scheduler(1)
    trainer.state.max_steps, trainer._train_batch_size = 1, 4
    [batch], _ = trainer.get_batch_samples(loader, 1, torch.device("cpu"))
    return batch


def samples_of(batch):
    """Return each sample's tokens, without padding."""
    masks = batch["attention_mask"].bool()
    return [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], masks, strict=True)]


def rendered(pair, row):
    """Return a row's prompt as the processor makes it for inference, with its inputs for the images."""
    content = [{"type": "image"}] * len(row["images"]) + [{"type": "text", "text": row["messages"][0]["content"]}]
    messages = [{"role": "user", "content": content}]
    for message in row["messages"][1:-1]:
        messages.append({**message, "content": [{"type": "text", "text": message["content"]}]})
    text = pair.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    images = {"images": [row["images"]]} if row["images"] else {}
    output = pair.processor(text=[text], return_tensors="pt", add_special_tokens=False, **images)
    return {name: value for name, value in output.items() if name not in ("rows", "cols")}


def alone(pair, model, row, ids):
    """Return the logits [L, V] of a plain forward of one sample, made by the processor alone."""
    inputs = rendered(pair, row)
    n_prompt = inputs["input_ids"].shape[1]
    assert ids[:n_prompt] == inputs["input_ids"][0].tolist()
    inputs["input_ids"] = torch.tensor([ids])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        types = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(types, (0, len(ids) - n_prompt))
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits[0]


def prompt_of(pair, row):
    return rendered(pair, row)["input_ids"][0].tolist()


def row_of(pair, ids):
    """Return the index of the row whose prompt begins a sample."""
    return next(i for i, row in enumerate(ROWS) if ids[: len(prompt_of(pair, row))] == prompt_of(pair, row))


def kl_alone(pair, ids, labels):
    """Return the sum of KL(teacher‖student) in float64 over a sample's trained tokens, from forwards of it alone."""
    row = ROWS[row_of(pair, ids)]
    teacher, student = (alone(pair, model, row, ids).double().log_softmax(-1) for model in (pair.teacher, pair.student))
    kl_L = (teacher.exp() * (teacher - student)).sum(-1)
    return sum(kl_L[i - 1] for i, label in enumerate(labels) if label != IGNORE_INDEX)


@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0])
def test_both_models_read_each_sample_of_a_batch_as_they_do_alone(pair, trainer_of, lmbda):
    trainer = trainer_of(pair, lmbda=lmbda, seed=3)
    batch = window_of(trainer)
    n_on_policy = int(batch[IS_ON_POLICY].sum()) if IS_ON_POLICY in batch else 0
    assert n_on_policy == {0.0: 0, 1.0: 4}.get(lmbda, n_on_policy)
    assert lmbda != 0.5 or 0 < n_on_policy < 4
    samples = samples_of(batch)
    assert sorted(row_of(pair, ids) for ids in samples) == [0, 1, 2, 3]
    inputs = TokenBatch.from_inputs(batch).model_inputs
    for model in (trainer.model, trainer.teacher_model):
        model.eval()
        with torch.no_grad():
            logits_BLV = model(**inputs, use_cache=False).logits
        for ids, logits_LV in zip(samples, logits_BLV, strict=True):
            expected_LV = alone(pair, model, ROWS[row_of(pair, ids)], ids)
            difference = (logits_LV[: len(ids)] - expected_LV).abs().max()
            assert difference <= 1e-5 * expected_LV.abs().max()


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_the_loss_is_that_of_the_samples_alone(pair, trainer_of, lmbda):
    trainer = trainer_of(pair, lmbda=lmbda, beta=0.0)
    batch = window_of(trainer)
    n_trained = int((batch["labels"] != IGNORE_INDEX).sum())
    expected = sum(map(kl_alone, [pair] * 4, samples_of(batch), batch["labels"].tolist())) / n_trained
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)


def test_training_and_evaluating_reach_the_image_encoder(trainer_of, tmp_path):
    pair = make_pair("qwen2.5")
    prompts = [{"images": row["images"], "prompt": row["messages"][:1]} for row in ROWS]
    trainer = trainer_of(pair, prompts, lmbda=1.0, eval_dataset=prompts, max_steps=2)
    encoder = {name: value.clone() for name, value in pair.student.named_parameters() if "visual" in name}
    trainer.train()
    assert all(not torch.equal(value, dict(pair.student.named_parameters())[name]) for name, value in encoder.items())
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0
    assert len(trainer._generated) == 4


def test_evaluation_completes_prompts_with_their_images(trainer_of):
    pair = make_pair("llava")
    trainer = trainer_of(pair, eval_dataset=ROWS[:1], eval_on_policy=True, lmbda=0.0)
    first = trainer.evaluate()
    [row] = ROWS[:1]
    trainer.eval_dataset = trainer._prepared([{**row, "images": [picture(9, 16, 8)]}], "eval")
    assert trainer.evaluate()["eval_on_policy_loss"] != first["eval_on_policy_loss"]


def test_a_run_resumes_to_the_bit(config_of, tmp_path):
    def run(folder, **options):
        pair = make_pair("qwen2")
        settings = {"per_device_train_batch_size": 2, "max_steps": 4, "lmbda": 1.0, "max_new_tokens": 4}
        args = config_of(**settings, rollout_steps=2, save_steps=1, output_dir=str(folder), max_length=160)
        trainer = GKDTrainer(
            pair.student, args, train_dataset=ROWS, processing_class=pair.processor, teacher_model=pair.teacher
        )
        trainer.train(**options)
        return pair.student

    whole = run(tmp_path / "run")
    resumed = run(tmp_path / "run", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    for name, value in whole.named_parameters():
        assert torch.equal(value, dict(resumed.named_parameters())[name])


def test_a_student_and_a_teacher_by_name_come_with_their_processor(config_of, tmp_path):
    pair = make_pair("llava")
    for name in ("student", "teacher"):
        getattr(pair, name).save_pretrained(tmp_path / name)
        pair.processor.save_pretrained(tmp_path / name)
    trainer = GKDTrainer(
        str(tmp_path / "student"),
        config_of(teacher_model_name_or_path=str(tmp_path / "teacher"), lmbda=0.0, max_length=160),
        train_dataset=ROWS,
    )
    assert type(trainer.model) is type(trainer.teacher_model) is type(pair.student)
    assert type(trainer.processing_class) is type(pair.processor)
    assert window_of(trainer)["pixel_values"].shape[0] == sum(len(row["images"]) for row in ROWS)


@dataclass
class SFTConfigWithGKD(GKDArguments, SFTConfig):
    """SFTConfig with the options of distillation."""


class SFTTrainerWithGKD(GKDMixin, SFTTrainer):
    """SFTTrainer that distils."""


def test_in_front_of_sft_trainer_only_the_assistants_tokens_are_trained_on(config_of):
    pair = make_pair("qwen3")
    args = config_of(SFTConfigWithGKD, per_device_train_batch_size=4, max_length=160, max_new_tokens=6, lmbda=0.5)
    trainer = SFTTrainerWithGKD(
        pair.student,
        args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=pair.processor,
        teacher_model=pair.teacher,
    )
    trainer._queue._args.lmbda = 0.0
    batch = next(iter(trainer.get_train_dataloader()))
    tokens = pair.processor.tokenizer
    trained = {tokens.decode([i for i in labels if i != IGNORE_INDEX]) for labels in batch["labels"].tolist()}
    assert trained == {
        "A cat.<|im_end|>",
        "Four.<|im_end|>Yes.<|im_end|>",
        "One is larger.<|im_end|>",
        "A dog.<|im_end|>",
    }
    made = {"pixel_values", "image_grid_thw", "mm_token_type_ids"} & {*pair.processor.model_input_names}
    assert {"pixel_values", "image_grid_thw"} <= made <= batch.keys()
    trainer.train()


def test_trls_collator_gets_the_rows_as_they_are(trainer_of):
    pair = make_pair("smolvlm")
    rows = [
        {"images": row["images"], "prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in ROWS
    ]
    collator = DataCollatorForVisionLanguageModeling(pair.processor, completion_only_loss=True)
    trainer = trainer_of(pair, Dataset.from_list(rows), data_collator=collator, lmbda=1.0)
    trainer.train()
    assert len(trainer._generated) == 4


def test_a_teacher_without_images_is_refused(trainer_of, tiny_model):
    pair = make_pair("llava")
    teacher = tiny_model(vocab=VOCAB)
    trainer = trainer_of(replace(pair, teacher=teacher), lmbda=0.0)
    with pytest.raises(GKDDataError, match=r"pixel_values, which the teacher \(LlamaForCausalLM\) does not take"):
        trainer.train()


def test_a_student_without_images_refuses_rows_with_images(config_of, tiny_model, byte_level):
    with pytest.raises(GKDDataError, match="rows have images"):
        GKDTrainer(
            tiny_model(),
            config_of(),
            train_dataset=ROWS,
            processing_class=byte_level(),
            teacher_model=tiny_model(seed=1),
        )


def test_an_engine_that_gets_tokens_alone_is_refused(trainer_of):
    trainer = trainer_of(make_pair("llava"), lmbda=1.0)
    trainer.rollouts.takes_media = False
    with pytest.raises(GKDDataError, match="this rollout engine only gets token ids"):
        trainer.train()


def test_a_field_without_a_rule_is_refused_by_name(trainer_of):
    trainer = trainer_of(make_pair("llava"), lmbda=1.0)
    collator = trainer.data_collator
    trainer._data_collator = lambda rows: {**collator(rows), "depth_maps": torch.ones(len(rows), 8)}
    with pytest.raises(GKDDataError, match="depth_maps"):
        trainer.train()
