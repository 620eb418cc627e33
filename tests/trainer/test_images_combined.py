"""Images together with several ranks, accumulation, several teachers, caches, adapters and packing."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from gkd_trainer import (
    CachedTeacher,
    FrozenTeacher,
    GKDArguments,
    GKDDataError,
    GKDMixin,
    GKDTrainer,
    RoutedTeachers,
    WeightedTeachers,
    cache_predictions,
)
from gkd_trainer.batch_keys import IGNORE_INDEX
from tests.trainer.image_ranks import main as run_rank
from tests.trainer.test_images import ROWS, kl_alone, row_of, samples_of, window_of
from tests.vision import VOCAB, conversation, make_model, make_pair, picture

SETTINGS = {
    "max_steps": 1,
    "max_new_tokens": 5,
    "max_length": 160,
    "learning_rate": 1e-2,
    "optim": "sgd",
    "max_grad_norm": 0.0,
}
"""Plain descent: Adam enlarges rounding."""


@pytest.fixture
def trainer_of(config_of):
    def make(pair, rows=ROWS, *, teacher=None, peft_config=None, **options):
        return GKDTrainer(
            pair.student,
            config_of(**{**SETTINGS, "per_device_train_batch_size": 4, **options}),
            train_dataset=rows,
            processing_class=pair.processor,
            peft_config=peft_config,
            **({"teacher_model": pair.teacher} if teacher is None else {"teacher": teacher}),
        )

    return make


def test_two_ranks_train_and_evaluate_like_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    run_rank(one, 4)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tests.trainer.image_ranks"]
    process = subprocess.run(
        [sys.executable, *launcher, str(two), "2"], capture_output=True, text=True, timeout=240, check=False
    )
    assert process.returncode == 0, process.stderr
    expected, actual = (torch.load(folder / "weights.pt") for folder in (one, two))
    initial = make_pair("qwen2.5").student.state_dict()
    assert max((expected[name] - initial[name]).abs().max() for name in initial if "visual" in name) > 1e-4
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, rtol=0, atol=1e-6, msg=name)
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, two)]
    for first, second in zip(*(result["log"] for result in results), strict=True):
        for metric in first.keys() & {"loss", "on_policy_share", "completion_length"}:
            assert second[metric] == pytest.approx(first[metric], rel=1e-5), metric
    for metric in ("eval_loss", "eval_on_policy_loss"):
        assert results[1]["evaluation"][metric] == pytest.approx(results[0]["evaluation"][metric], rel=1e-5)


@pytest.mark.parametrize("family", ["llava", "smolvlm", "qwen3"])
@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_accumulating_samples_one_by_one_trains_like_one_batch(trainer_of, family, lmbda):
    weights = []
    for size in (4, 1):
        pair = make_pair(family)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        trainer_of(pair, lmbda=lmbda, **options).train()
        weights.append(pair.student.state_dict())
    initial = make_pair(family).student.state_dict()
    assert max((weights[0][name] - initial[name]).abs().max() for name in initial) > 1e-3
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", ["llava", "smolvlm", "qwen2.5"])
def test_each_sample_and_its_images_are_compared_with_its_own_teacher(trainer_of, family):
    pair = make_pair(family)
    models = {"first": pair.teacher, "second": make_model(family, pair.processor.tokenizer, seed=2)}
    names = ["second", "first", "first", "second"]
    rows = [{**row, "teacher": name} for row, name in zip(ROWS, names, strict=True)]
    routed = RoutedTeachers({name: FrozenTeacher(model) for name, model in models.items()})
    trainer = trainer_of(pair, rows, teacher=routed, beta=0.0, lmbda=1.0)
    batch = window_of(trainer)
    expected = 0.0
    for ids, labels in zip(samples_of(batch), batch["labels"].tolist(), strict=True):
        own = replace(pair, teacher=models[names[row_of(pair, ids)]])
        expected += kl_alone(own, ids, labels)
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, batch)
    n_trained = int((batch["labels"] != IGNORE_INDEX).sum())
    torch.testing.assert_close(loss.double(), expected / n_trained, rtol=1e-4, atol=0)


def test_a_teacher_of_texts_among_several_refuses_a_batch_with_images_by_name(trainer_of, tiny_model):
    pair = make_pair("qwen2")
    rows = [{**row, "teacher": "images" if row["images"] else "texts"} for row in ROWS]
    teachers = {"images": FrozenTeacher(pair.teacher), "texts": FrozenTeacher(tiny_model(vocab=VOCAB))}
    trainer = trainer_of(pair, rows, teacher=RoutedTeachers(teachers))
    with pytest.raises(GKDDataError, match=r"pixel_values, which the teacher \(LlamaForCausalLM\) does not take"):
        trainer.train()


def test_weighted_teachers_all_see_the_images(trainer_of):
    pair = make_pair("qwen2")
    models = [pair.teacher, make_model("qwen2", pair.processor.tokenizer, seed=2)]
    weighted = WeightedTeachers({str(i): FrozenTeacher(model) for i, model in enumerate(models)}, {"0": 3.0, "1": 1.0})
    trainer = trainer_of(pair, teacher=weighted, beta=0.0, lmbda=1.0)
    batch = window_of(trainer)
    samples = list(zip(samples_of(batch), batch["labels"].tolist(), strict=True))
    sums = [sum(kl_alone(replace(pair, teacher=model), *sample) for sample in samples) for model in models]
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, batch)
    n_trained = int((batch["labels"] != IGNORE_INDEX).sum())
    torch.testing.assert_close(loss.double(), (0.75 * sums[0] + 0.25 * sums[1]) / n_trained, rtol=1e-4, atol=0)


def test_a_cache_serves_rows_of_text_and_refuses_images(trainer_of, config_of, tmp_path):
    pair, folder = make_pair("qwen2"), tmp_path / "cache"
    texts = [{"images": [], "messages": conversation(f"{i} and two?", f"{i + 2}.")} for i in range(4)]
    args = config_of(**SETTINGS, lmbda=0.0)
    teacher = FrozenTeacher(pair.teacher, pair.processor.tokenizer)
    with pytest.raises(GKDDataError, match="rows of the data to cache have images"):
        cache_predictions(teacher, ROWS, tmp_path / "other", args, processing_class=pair.processor)
    cache_predictions(teacher, texts, folder, args, processing_class=pair.processor)
    losses = []
    for given in (CachedTeacher(folder), teacher):
        trainer = trainer_of(make_pair("qwen2"), texts, teacher=given, lmbda=0.0)
        losses.append(trainer.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for cached in (CachedTeacher(folder), CachedTeacher(folder, fallback=teacher)):
        with pytest.raises(GKDDataError, match="in a cache knows only token ids, but this batch also holds"):
            trainer_of(make_pair("qwen2"), teacher=cached, lmbda=0.0).train()


# PEFT 0.20 looks for the config of a model without a name.
@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_an_adapter_sees_images_and_resumes_to_the_bit(trainer_of, tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj", "qkv"], init_lora_weights=False)

    def run(folder, **options):
        trainer = trainer_of(
            make_pair("qwen2.5"),
            peft_config=lora,
            lmbda=1.0,
            max_steps=3,
            save_strategy="steps",
            save_steps=1,
            per_device_train_batch_size=2,
            output_dir=str(folder),
        )
        before = {name: weight.clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}
        trainer.train(**options)
        return before, {name: weight for name, weight in trainer.model.named_parameters() if name in before}

    before, whole = run(tmp_path / "whole")
    moved = {name for name, weight in whole.items() if not torch.equal(weight, before[name])}
    assert any("visual" in name for name in moved)
    _, resumed = run(tmp_path / "again", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


@dataclass
class SFTConfigWithGKD(GKDArguments, SFTConfig):
    """SFTConfig with the options of distillation."""


class SFTTrainerWithGKD(GKDMixin, SFTTrainer):
    """SFTTrainer that distils."""


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"packing": True}, "train_dataset"),
        ({"padding_free": True}, "train_dataset"),
        ({"eval_packing": True}, "eval_dataset"),
    ],
)
def test_joining_rows_with_images_is_refused(config_of, options, given):
    pair = make_pair("qwen2")
    texts = Dataset.from_list([{"messages": conversation("What?", "A cat.")}])
    images = Dataset.from_list([{"images": [picture(1)], "messages": conversation("What?", "A cat.")}])
    args = config_of(SFTConfigWithGKD, **options, max_length=160, lmbda=0.0)
    models = {"processing_class": pair.processor, "teacher_model": pair.teacher}
    with pytest.raises(ValueError, match=r"(?i)packing joins token ids|not supported for vision"):
        SFTTrainerWithGKD(pair.student, args, **{"train_dataset": texts, given: images}, **models)
