"""A run on rows with images, for tests with several ranks: `python -m tests.trainer.image_ranks FOLDER BATCH`."""

import json
import sys
from pathlib import Path

import torch

from gkd_trainer import GKDConfig, GKDTrainer
from tests.versions import CHECKPOINTING, IN_ORDER
from tests.vision import conversation, make_pair, picture

# Ranks get rows 0 and 1, and 2 and 3; then 4 and 5, which have no images, and 6 and 7.
ROWS = [
    {"images": [picture(seed, 8 * width, 8)] if width else [], "messages": conversation(question, answer)}
    for seed, width, question, answer in [
        (1, 2, "What?", "A cat."),
        (2, 1, "And this one?", "A dog."),
        (0, 0, "Two and two?", "Four."),
        (3, 3, "And here, in a few words?", "A horse."),
        (0, 0, "Why?", "So."),
        (0, 0, "Who asks?", "I do."),
        (4, 1, "This?", "A hen."),
        (5, 2, "That?", "Two hens."),
    ]
]


def main(folder: Path, batch_size: int) -> None:
    pair = make_pair("qwen2.5")
    args = GKDConfig(
        output_dir=str(folder / "run"),
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        max_length=160,
        max_new_tokens=5,
        max_steps=2,
        lmbda=0.5,
        learning_rate=1e-2,
        optim="sgd",
        max_grad_norm=0.0,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        eval_on_policy=True,
        # With it, Trainer no longer lets DDP look for weights without gradients: those of the image encoder in step 2.
        **{CHECKPOINTING: True},
        **IN_ORDER,
    )
    trainer = GKDTrainer(
        pair.student,
        args,
        train_dataset=ROWS,
        eval_dataset=ROWS[:7],
        processing_class=pair.processor,
        teacher_model=pair.teacher,
    )
    trainer.train()
    result = {"log": trainer.state.log_history, "evaluation": trainer.evaluate()}
    if trainer.is_world_process_zero():
        (folder / "result.json").write_text(json.dumps(result))
        torch.save(pair.student.state_dict(), folder / "weights.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
