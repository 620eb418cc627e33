"""Teachers that run the student, in training runs."""

from dataclasses import replace
from itertools import chain, repeat
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from gkd_trainer import FrozenTeacher, GKDTeacherError, GKDTrainer, RoutedTeachers, WeightedTeachers
from gkd_trainer.batch_keys import TEACHER_PROMPT_IDS
from gkd_trainer.teachers import SelfTeacher
from gkd_trainer.trainer.student_teachers import StudentTeachers
from tests.trainer.conftest import make_rows
from tests.trainer.run import FSDP
from tests.trainer.test_deepspeed import ENVIRONMENT, PACKAGE, zero
from tests.versions import IN_ORDER

needs_deepspeed = pytest.mark.skipif(not PACKAGE.is_dir(), reason="needs DeepSpeed in .cache/deepspeed")

OPTIONS = {
    "max_steps": 3,
    "save_strategy": "no",
    "optim": "sgd",
    "learning_rate": 0.1,
    "max_grad_norm": 0.0,
    **IN_ORDER,
    "per_device_eval_batch_size": 2,
    "lmbda": 0.5,
    "gradient_checkpointing": True,
    "self_teacher_ema_decay": 0.5,
}


SOURCES = {
    **{source: {"self_teacher": source} for source in ("ema", "base", "reference")},
    # A rank may have no sample of one of them.
    "routed": {"self_teachers": ["ema", "reference"]},
}


@pytest.fixture(scope="module")
def one_rank(full_run, tiny_model, tmp_path_factory):
    """The runs of one rank, by the teacher."""
    runs = {}

    def run(source):
        if source not in runs:
            folder = tmp_path_factory.mktemp("one") / "run"
            student = tiny_model(tie_word_embeddings=False)
            options = {**OPTIONS, **SOURCES[source]}
            runs[source] = full_run(folder, student=student, per_device_train_batch_size=4, **options)[:2]
        return runs[source]

    return run


slow = pytest.mark.servers

ZERO_3 = {"deepspeed": zero(3)}


@pytest.mark.parametrize(
    ("source", "sharding"),
    [
        pytest.param("routed", FSDP, id="routed-fsdp"),
        pytest.param("ema", ZERO_3, marks=needs_deepspeed, id="ema-zero3"),
        # These repeat most of the above.
        pytest.param("ema", {}, marks=slow, id="ema-ddp"),
        pytest.param("ema", FSDP, marks=slow, id="ema-fsdp"),
        pytest.param("base", FSDP, marks=slow, id="base-fsdp"),
        pytest.param("reference", FSDP, marks=slow, id="reference-fsdp"),
        pytest.param("base", ZERO_3, marks=[needs_deepspeed, slow], id="base-zero3"),
        pytest.param("reference", ZERO_3, marks=[needs_deepspeed, slow], id="reference-zero3"),
        pytest.param("routed", ZERO_3, marks=[needs_deepspeed, slow], id="routed-zero3"),
    ],
)
def test_two_ranks_train_like_one(one_rank, full_run, tiny_model, tmp_path, source, sharding):
    expected_result, expected = one_rank(source)
    result, actual, process = full_run(
        tmp_path / "two",
        ranks=2,
        student=tiny_model(tie_word_embeddings=False),
        environment=ENVIRONMENT if "deepspeed" in sharding else None,
        per_device_train_batch_size=2,
        **{**OPTIONS, **SOURCES[source], **sharding},
    )
    assert result is not None, process.stderr
    for name, tensor in expected.items():
        assert torch.allclose(actual[name], tensor, rtol=0, atol=1e-5), name
    for first, second in zip(expected_result["log"], result["log"], strict=True):
        for metric in {"loss", "eval_loss", "teacher_entropy"} & first.keys():
            assert second[metric] == pytest.approx(first[metric], rel=1e-4), metric


@pytest.mark.parametrize("composite", [RoutedTeachers, WeightedTeachers])
def test_several_teachers_may_be_the_student_each_with_its_prompts(make_trainer, tiny_model, composite):
    """The loss is the mean over those of each teacher by itself, on its samples or on all."""
    student = tiny_model()
    model = get_peft_model(student, replace(LORA, init_lora_weights=False))
    rows = [
        {**row, "teacher": "ab"[i % 2], TEACHER_PROMPT_IDS: [5 + i, 6, 7] if i % 3 else []}
        for i, row in enumerate(make_rows(6))
    ]

    def loss_of(teacher, rows):
        trainer = make_trainer(
            trainer_args={"model": model, "teacher": teacher, "teacher_model": None, "train_dataset": rows},
            per_device_train_batch_size=len(rows),
        )
        inputs = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))]))
        return trainer.compute_loss(trainer.model, inputs).item(), int((inputs["labels"] != -100).sum())

    teachers = {"a": SelfTeacher("base"), "b": FrozenTeacher(tiny_model(hidden=48, seed=1))}
    actual, _ = loss_of(composite(teachers), rows)
    total = count = 0
    for name, teacher in teachers.items():
        own = [row for row in rows if composite is WeightedTeachers or row["teacher"] == name]
        loss, n_tokens = loss_of(teacher, own)
        total, count = total + loss * n_tokens, count + n_tokens
    assert actual == pytest.approx(total / count, rel=1e-5)
    assert actual > 1e-3


LORA = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.3)


def weights_of(trainer):
    return {name: weight.clone() for name, weight in trainer.model.state_dict().items() if "lora_" in name}


@pytest.mark.parametrize("is_made_by_model_init", [False, True])
def test_a_resumed_run_ends_with_the_weights_and_average_of_an_uninterrupted_one(
    make_trainer, tiny_model, tmp_path, is_made_by_model_init
):
    """With dropout, and an average that matters: its teacher is compared in every step."""

    def trainer(folder, **options):
        student = {"model_init": lambda: tiny_model()} if is_made_by_model_init else {"model": tiny_model()}
        return make_trainer(
            trainer_args={"teacher_model": None, "peft_config": LORA, **student},
            self_teacher="ema",
            self_teacher_ema_decay=0.6,
            ce_weight=0.5,
            lmbda=0.5,
            disable_dropout=False,
            output_dir=str(tmp_path / folder),
            max_steps=5,
            save_strategy="steps",
            save_steps=1,
            learning_rate=1e-2,
            **options,
        )

    unbroken = trainer("unbroken")
    unbroken.train()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-3"))
    expected = weights_of(unbroken)
    assert expected
    for name, weight in weights_of(resumed).items():
        assert torch.equal(weight, expected[name]), name
    first, second = (
        load_file(tmp_path / folder / "checkpoint-5" / "teacher-0.safetensors") for folder in ("unbroken", "resumed")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    started = load_file(tmp_path / "unbroken" / "checkpoint-3" / "teacher-0.safetensors")
    assert any(not torch.equal(first[name], started[name]) for name in first)


def test_the_best_student_is_loaded_with_the_average_of_its_step(make_trainer, token_rows, tmp_path):
    scores = chain([0, 1], repeat(0))
    trainer = make_trainer(
        trainer_args={
            "teacher_model": None,
            "peft_config": LORA,
            "eval_dataset": token_rows(4, seed=1),
            "compute_metrics": lambda _: {"score": next(scores)},
        },
        self_teacher="ema",
        self_teacher_ema_decay=0.5,
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        ce_weight=0.5,
        learning_rate=0.1,
        output_dir=str(tmp_path / "run"),
    )
    trainer.train()
    average = load_file(tmp_path / "run" / "checkpoint-2" / "teacher-0.safetensors")
    assert trainer.teacher.state().keys() == average.keys()
    assert all(torch.equal(tensor, average[name]) for name, tensor in trainer.teacher.state().items())
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[1], rel=1e-6)


def test_a_best_student_saved_without_its_average_leaves_the_last_one(make_trainer, tmp_path, caplog):
    trainer = make_trainer(trainer_args={"teacher_model": None, "peft_config": LORA}, self_teacher="ema", max_steps=1)
    trainer.train()
    last = {name: tensor.clone() for name, tensor in trainer.teacher.state().items()}
    trainer._student_teachers.load_best(tmp_path)
    assert "the teacher stays the average at the last step" in caplog.text
    assert all(torch.equal(tensor, last[name]) for name, tensor in trainer.teacher.state().items())


@pytest.mark.parametrize("should_save", [True, False])
def test_the_average_is_saved_by_each_rank_that_saves_for_its_node(make_trainer, tmp_path, monkeypatch, should_save):
    trainer = make_trainer(trainer_args={"teacher_model": None, "peft_config": LORA}, self_teacher="ema", max_steps=1)
    trainer.train()
    # With save_on_each_node, the first rank of another node.
    monkeypatch.setattr(type(trainer.args), "should_save", property(lambda args: should_save))
    monkeypatch.setattr(type(trainer._ranks), "index", property(lambda ranks: 8))
    trainer._save_rng_state(str(tmp_path / "checkpoint-1"))
    assert (tmp_path / "checkpoint-1" / "teacher-0.safetensors").exists() is should_save


def test_the_average_follows_each_optimizer_step_once(make_trainer):
    seen = []

    class Recording(GKDTrainer):
        def training_step(self, *args, **kwargs):
            seen.append({n: p.detach().clone() for n, p in self.model.named_parameters() if "lora_" in n})
            return super().training_step(*args, **kwargs)

    trainer = make_trainer(
        trainer_class=Recording,
        trainer_args={"teacher": SelfTeacher("ema", ema_decay=0.5), "teacher_model": None, "peft_config": LORA},
        max_steps=3,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        ce_weight=1.0,
        learning_rate=1e-2,
    )
    trainer.train()
    assert len(seen) == 6
    states = [*seen[::2], {n: p.detach() for n, p in trainer.model.named_parameters()}]
    matrices = trainer.teacher.average.matrices()
    assert len(matrices) == 4
    for name, actual_OI in matrices.items():
        up, down = f"{name}.lora_B.default.weight", f"{name}.lora_A.default.weight"
        scaling = trainer.model.get_submodule(name).scaling["default"]
        products = [scaling * (state[up].double() @ state[down].double()) for state in states]
        expected_OI = products[0]
        for product_OI in products[1:]:
            expected_OI = 0.5 * expected_OI + 0.5 * product_OI
        assert expected_OI.abs().max() > 1e-4
        torch.testing.assert_close(actual_OI, expected_OI.float(), atol=1e-8, rtol=1e-5)


def test_a_step_that_was_skipped_does_not_move_the_average():
    updates = []
    teacher = SelfTeacher()
    teacher.update = lambda: updates.append(1)
    callback = StudentTeachers(teacher).callback()
    for step_was_skipped, expected in ((True, 0), (False, 1)):
        callback.on_step_end(None, None, None, optimizer=SimpleNamespace(step_was_skipped=step_was_skipped))
        assert len(updates) == expected
    callback.on_step_end(None, None, None, optimizer=torch.optim.SGD([torch.zeros(1)]))
    assert len(updates) == 2


def test_other_teachers_need_no_callback(make_trainer):
    teachers = StudentTeachers(make_trainer().teacher)
    assert teachers.callback() is None
    teachers.load("/nowhere")


def test_a_new_student_of_model_init_gets_a_new_average(make_trainer, tiny_model):
    trainer = make_trainer(
        trainer_args={"model_init": lambda: tiny_model(), "teacher_model": None, "peft_config": LORA},
        self_teacher="ema",
        ce_weight=0.5,
    )
    first = trainer.teacher.student
    trainer.train()
    assert trainer.teacher.student is trainer.model
    assert trainer.teacher.student is not first


@pytest.mark.parametrize(
    ("source", "peft_config", "problem"),
    [
        ("base", None, r"\(LlamaForCausalLM\) is not a PEFT model: pass peft_config"),
        ("style", LORA, "the student has no adapter 'style', only 'default'"),
    ],
)
def test_a_student_that_can_not_teach_itself_is_refused_at_construction(make_trainer, source, peft_config, problem):
    with pytest.raises(GKDTeacherError, match=problem):
        make_trainer(trainer_args={"teacher_model": None, "peft_config": peft_config}, self_teacher=source)


def test_fsdp_version_1_is_refused():
    with pytest.raises(GKDTeacherError, match=r"FSDP version 1 does not support: set fsdp_config=\{'version': 2\}"):
        StudentTeachers(SelfTeacher()).attach(torch.nn.Linear(1, 1), SimpleNamespace(sharding="fsdp1"))


def test_a_student_that_teaches_itself_can_not_complete_prompts_as_the_teacher(make_trainer):
    with pytest.raises(GKDTeacherError, match="seq_kd=True makes the teacher generate, but this teacher can't"):
        make_trainer(trainer_args={"teacher_model": None, "peft_config": LORA}, self_teacher="base", seq_kd=True)
