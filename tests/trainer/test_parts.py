"""The parts of a trainer, built and run together without one."""

import pytest
import torch
from accelerate import Accelerator

from gkd_trainer import FrozenTeacher, HFRollouts
from gkd_trainer.errors import GKDTeacherError
from gkd_trainer.report.metrics import TrainingMeter
from gkd_trainer.trainer.loss import Comparison, run_student
from gkd_trainer.trainer.parts import build_parts
from gkd_trainer.trainer.rollout_queue import CurrentStudent
from gkd_trainer.trainer.windows import Epoch
from gkd_trainer.types import TokenBatch


@pytest.fixture
def parts(config, tiny_model, byte_level):
    """Build parts for a student and a teacher; options go to GKDConfig."""

    def build(student, teacher=None, rollouts=None, **options):
        return build_parts(
            config(**options),
            student,
            teacher or FrozenTeacher(tiny_model(hidden=48, seed=1)),
            Accelerator(cpu=True),
            processing_class=byte_level(),
            rollouts=rollouts,
            formatting_func=None,
        )

    return build


def test_rows_become_windows_with_completions_and_a_loss_whose_gradient_reaches_the_student(
    parts, tiny_model, token_rows
):
    student, teacher = tiny_model(), FrozenTeacher(tiny_model(hidden=48, seed=1))
    made = parts(student, teacher, lmbda=1.0)
    rows = list(made.preparation.prepared(token_rows(2), "train", is_training=True))
    length = max(len(row["input_ids"]) for row in rows)
    batch = {
        name: torch.tensor([row[name] + [fill] * (length - len(row[name])) for row in rows])
        for name, fill in (("input_ids", 0), ("labels", -100))
    }
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    epoch = Epoch(
        made.windows,
        iter([batch]),
        has_length=True,
        num_batches=1,
        accumulation=1,
        batch_size=2,
        max_steps=1,
        is_first=True,
    )
    window, staleness = made.queue.next_window(
        epoch, CurrentStudent(student, student, 0), TrainingMeter(torch.device("cpu"))
    )
    assert staleness == 0
    assert window.on_policy_samples == 2
    [inputs] = window.batches
    tokens = TokenBatch.from_inputs(inputs)
    signal = teacher.score(tokens).sliced(made.pairing.vocab_size)
    comparison = Comparison(made.args, tokens, signal, made.pairing.vocab_size, is_training=True)
    output = run_student(student, student, tokens, made.pairing.head, comparison)
    output.loss_sum.backward()
    assert output.loss_sum.item() > 0
    assert student.lm_head.weight.grad.norm() > 0
    assert all(parameter.grad is None for parameter in teacher.model.parameters())
    assert (
        made.queue.next_window(epoch, CurrentStudent(student, student, 1), TrainingMeter(torch.device("cpu"))) is None
    )


def test_an_engine_that_is_passed_is_the_engine(parts, tiny_model):
    engine = HFRollouts([2], 0, 365)
    assert parts(tiny_model(), rollouts=engine).queue.engine is engine
    assert isinstance(parts(tiny_model()).queue.engine, HFRollouts)


def test_the_callers_options_stay_where_the_context_shortens_them(parts, tiny_model, config, byte_level):
    args = config(max_length=1024, max_new_tokens=6)
    student = tiny_model()
    student.config.max_position_embeddings = 32
    made = build_parts(
        args,
        student,
        FrozenTeacher(tiny_model(seed=1)),
        Accelerator(cpu=True),
        processing_class=byte_level(),
        rollouts=None,
        formatting_func=None,
    )
    assert made.args.max_length == 32
    assert args.max_length == 1024
    assert made.preparation.args is made.args


def test_a_teacher_of_other_tokens_is_refused(parts, tiny_model, byte_level):
    class Foreign(FrozenTeacher):
        @property
        def vocabulary(self):
            return {"other": 0}

    with pytest.raises(GKDTeacherError, match="token"):
        parts(tiny_model(), Foreign(tiny_model(seed=1)))
