"""The real pair: SmolLM2-135M-Instruct teaches a student cut out of it."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from gkd_trainer import GKDConfig, GKDTrainer

ANSWERS = Path(__file__).parents[2] / "examples" / "demo_data" / "teacher_answers.jsonl"


@pytest.fixture(scope="module")
def trained(smollm2_pair, tmp_path_factory):
    """A trainer after an off-policy and an on-policy phase on a few answers of the teacher."""
    teacher, student = smollm2_pair
    answers = [json.loads(line) for line in ANSWERS.read_text().splitlines()[:4]]
    rows = Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": answer["prompt"]},
                    {"role": "assistant", "content": answer["completion"]},
                ]
            }
            for answer in answers
        ]
    )

    def run(model, **options):
        trainer = GKDTrainer(
            model=model,
            teacher_model=str(teacher),
            args=GKDConfig(
                output_dir=str(tmp_path_factory.mktemp("run")),
                per_device_train_batch_size=2,
                per_device_eval_batch_size=4,
                learning_rate=3e-4,
                lr_scheduler_type="constant",
                logging_steps=1,
                max_length=192,
                max_new_tokens=16,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                teacher_model_init_kwargs={"dtype": "float32"},
                **options,
            ),
            train_dataset=rows,
            eval_dataset=rows,
        )
        before = trainer.evaluate()
        trainer.train()
        return trainer, before, trainer.evaluate()

    off_policy = run(str(student), lmbda=0.0, beta=0.0, max_steps=6)
    mixed = run(off_policy[0].model, lmbda=0.5, beta=0.5, max_steps=3, gradient_accumulation_steps=2)
    return off_policy, mixed


def test_off_policy_training_brings_the_student_to_its_teacher(trained):
    (_, before, after), _ = trained
    assert after["eval_loss"] < 0.75 * before["eval_loss"]
    assert after["eval_top_token_agreement"] > before["eval_top_token_agreement"]


def test_mixed_training_brings_it_closer_still(trained):
    _, (trainer, before, after) = trained
    assert after["eval_loss"] < before["eval_loss"]
    shares = [entry["on_policy_share"] for entry in trainer.state.log_history if "on_policy_share" in entry]
    assert any(0 < share < 1 for share in shares)


def test_turn_ends_at_its_stop_token_which_is_trained_on_though_it_is_the_pad_too(trained):
    trainer = trained[0][0]
    tokenizer = trainer.processing_class
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    for row in trainer.train_dataset:
        ids = [label for label in row["labels"] if label != -100]
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1]) == row["messages"][-1]["content"]
        assert row["labels"][-1] == -100  # the template's newline


def test_saved_student_gives_the_same_logits_after_a_reload(trained, tmp_path):
    trainer = trained[1][0]
    trainer.save_model(str(tmp_path))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, trainer.model.eval()(ids).logits)
