"""The parts of a trainer, built and run together without one."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from gkd_trainer import FrozenTeacher, HFRollouts
from gkd_trainer.errors import GKDDataError, GKDRolloutError, GKDTeacherError
from gkd_trainer.report.metrics import TrainingMeter
from gkd_trainer.rollouts import build
from gkd_trainer.rollouts.mixing import sampling_seed
from gkd_trainer.trainer.loss import Comparison, run_student
from gkd_trainer.trainer.parts import build_parts
from gkd_trainer.trainer.rollout_queue import CurrentStudent
from gkd_trainer.trainer.windows import Epoch
from gkd_trainer.types import TokenBatch
from tests.trainer.queues import Spy


@pytest.fixture
def parts(config, tiny_model, byte_level):
    """Build parts for a student and a teacher; options go to GKDConfig."""

    def build(student, teacher=None, rollouts=None, formatting_func=None, has_eval_rows=False, **options):
        return build_parts(
            config(**options),
            student,
            teacher or FrozenTeacher(tiny_model(hidden=48, seed=1)),
            Accelerator(cpu=True),
            processing_class=byte_level(),
            rollouts=rollouts,
            formatting_func=formatting_func,
            has_eval_rows=has_eval_rows,
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


def test_a_passed_engine_is_used(parts, tiny_model):
    engine = HFRollouts([2], 0, 365)
    assert parts(tiny_model(), rollouts=engine).queue.engine is engine
    assert isinstance(parts(tiny_model()).queue.engine, HFRollouts)


@pytest.mark.parametrize(
    ("options", "is_vllm"), [({}, False), ({"has_eval_rows": True}, True), ({"eval_on_policy": True}, True)]
)
def test_an_engine_of_vllm_is_built_only_for_a_run_that_may_generate(parts, tiny_model, monkeypatch, options, is_vllm):
    engine = HFRollouts([2], 0, 365)
    monkeypatch.setattr(build, "VLLMColocateRollouts", lambda *_, **__: engine)
    assert (parts(tiny_model(), lmbda=0.0, use_vllm=True, **options).queue.engine is engine) == is_vllm


def test_the_callers_options_are_not_changed_when_the_context_shortens_them(parts, tiny_model, config, byte_level):
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
        has_eval_rows=False,
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


def batch_of(first):
    return {
        "input_ids": torch.tensor([[first, 6, 7], [8, 9, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "labels": torch.tensor([[-100, -100, 7], [-100, 9, -100]]),
    }


def window_of(made, student, first=5):
    epoch = Epoch(
        made.windows,
        iter([batch_of(first)]),
        has_length=True,
        num_batches=1,
        accumulation=1,
        batch_size=2,
        max_steps=1,
        is_first=True,
    )
    return made.queue.next_window(epoch, CurrentStudent(student, student, 0), TrainingMeter(torch.device("cpu")))[0]


def test_the_teacher_is_prepared_for_the_runs_device_tokenizer_and_length(parts, tiny_model, byte_level):
    seen = []

    class Seeing(FrozenTeacher):
        def prepare(self, device, tokenizer=None, max_length=None):
            seen.append((device, tokenizer.get_vocab(), max_length))
            super().prepare(device, tokenizer, max_length)

    student = tiny_model(max_position_embeddings=32)
    parts(student, Seeing(tiny_model(seed=1)), max_length=1024)
    assert seen == [(torch.device("cpu"), byte_level().get_vocab(), 32)]


def test_the_students_engine_samples_tokens_of_the_tokenizer_and_stops_at_its_end(parts, tiny_model):
    student = tiny_model("phi")
    with torch.no_grad():
        student.lm_head.bias[2], student.lm_head.bias[366] = 1e4, 1e5  # the stop token, and a padding row
    window = window_of(parts(student, lmbda=1.0), student)
    assert [list(item.completion.token_ids) for item in window.generated] == [[2], [2]]
    assert all(item.completion.is_finished for item in window.generated)


def test_batches_are_filled_with_the_pad_token_of_the_tokenizer(parts, tiny_model):
    student = tiny_model("phi")
    with torch.no_grad():
        student.lm_head.bias[2] = 1e4
    window = window_of(parts(student, lmbda=1.0), student)
    assert window.batches[0]["input_ids"].tolist() == [[5, 6, 2], [8, 2, 2]]


@pytest.mark.parametrize("seq_kd", [True, False])
def test_the_teacher_generates_only_under_seq_kd(parts, tiny_model, seq_kd):
    student, seen = tiny_model(), 0
    for seed in range(3):
        made = parts(student, lmbda=0.5, seq_kd=seq_kd, seed=seed)
        seen += sum(not item.is_on_policy for item in window_of(made, student).generated)
    assert (seen > 0) is seq_kd


def test_draws_are_keyed_by_the_seed_of_the_run(parts, tiny_model):
    engine, student = Spy(), tiny_model()
    engine.sync = lambda model: None
    made = parts(student, rollouts=engine, lmbda=1.0, seed=11)
    window_of(made, student)
    made.args.seed = 12  # as a hyperparameter search sets it for a trial
    window_of(made, student)
    for seed, call in zip((11, 12), engine.calls, strict=True):
        assert call[2] == [sampling_seed(seed, 0, position) for position in range(2)]


def test_a_prompt_with_an_image_of_the_student_is_not_completed(parts, tiny_model):
    student = tiny_model()
    student.config.image_token_id = 40
    made = parts(student, lmbda=1.0)
    window_of(made, student)
    with pytest.raises(GKDDataError, match="a prompt to be completed holds token 40"):
        window_of(made, student, first=40)


def test_a_student_that_accelerate_compiles_is_paired_as_compiled(parts, tiny_model, monkeypatch):
    """As it does under torch_compile, `accelerate launch --dynamo_backend` and ACCELERATE_DYNAMO_BACKEND."""
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    assert not parts(tiny_model()).pairing.is_compiled
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    assert parts(tiny_model()).pairing.is_compiled


def test_recovery_knows_how_the_run_restarts_and_what_it_saves(parts, tiny_model, tmp_path):
    out_of_memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(torch.OutOfMemoryError):
        parts(tiny_model(), auto_find_batch_size=True).recovery.raise_together(out_of_memory, GKDRolloutError, "it")
    for saves_only_model in (True, False):
        recovery = parts(tiny_model(), save_only_model=saves_only_model).recovery
        recovery.last_checkpoint = tmp_path / "checkpoint-3"
        with pytest.raises(GKDRolloutError) as raised, recovery.saving_before_it_fails(3, pytest.fail):
            recovery.raise_together(out_of_memory, GKDRolloutError, "it")
        assert ("save_only_model" in str(raised.value)) is saves_only_model


@pytest.mark.parametrize(
    ("student", "teacher", "ce_weight", "vocab_size"),
    [(384, 400, 0.0, 384), (400, 384, 0.0, 384), (384, 400, 0.5, 365), (384, 384, 0.5, 384)],
)
def test_labels_are_within_both_models_and_as_targets_within_the_compared_tokens(
    parts, tiny_model, byte_level, student, teacher, ce_weight, vocab_size
):
    frozen = FrozenTeacher(tiny_model(vocab=teacher, seed=1), tokenizer=byte_level())
    assert parts(tiny_model(vocab=student), frozen, ce_weight=ce_weight).preparation.vocab_size == vocab_size


def test_rows_are_prepared_by_what_the_parts_have_in_common(parts, tiny_model):
    preparation = parts(tiny_model(max_position_embeddings=32), max_length=32, formatting_func=str).preparation
    assert preparation.stop_ids == {2}
    assert preparation.formatting_func is str
    assert (preparation.shorter.owner, preparation.shorter.context.limit) == ("student", 32)
    assert not preparation.has_ranks
