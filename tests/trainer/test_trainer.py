"""The trainer on Trainer's hooks: Trainer's features keep working."""

import inspect
import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from gkd_trainer import FrozenTeacher, GKDConfig, GKDDataError, GKDTrainer, HFRollouts
from tests.versions import CHECKPOINTING, HAS_SAMPLING_STRATEGY, IN_ORDER


def test_every_argument_of_trainer_has_its_name_place_and_default():
    expected = list(inspect.signature(Trainer.__init__).parameters.values())
    actual = list(inspect.signature(GKDTrainer.__init__).parameters.values())
    assert [(p.name, p.kind, p.default) for p in actual[: len(expected)]] == [
        (p.name, p.kind, p.default) for p in expected
    ]
    own = actual[len(expected) : -1]
    assert [p.name for p in own] == ["teacher_model", "peft_config", "formatting_func", "teacher", "rollouts"]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY and p.default is None for p in own)


def test_argument_that_trainer_does_not_take_is_unexpected(make_trainer):
    with pytest.raises(TypeError, match="unexpected keyword argument 'quantization'"):
        make_trainer(trainer_args={"quantization": 4})


def test_without_args_a_default_configuration_is_made(tiny_model, token_rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    trainer = GKDTrainer(model=tiny_model(), teacher_model=tiny_model(seed=1), train_dataset=token_rows())
    assert isinstance(trainer.args, GKDConfig)
    assert (trainer.args.lmbda, trainer.args.output_dir) == (0.5, "tmp_trainer")


def test_plain_training_arguments_keep_their_values(tiny_model, token_rows, tmp_path):
    args = TrainingArguments(
        output_dir=str(tmp_path), learning_rate=3e-4, max_steps=1, use_cpu=True, report_to=[], warmup_steps=2
    )
    trainer = GKDTrainer(tiny_model(), args, teacher_model=tiny_model(seed=1), train_dataset=token_rows())
    assert isinstance(trainer.args, GKDConfig)
    assert (trainer.args.learning_rate, trainer.args.max_steps, trainer.args.warmup_steps) == (3e-4, 1, 2)


def test_callbacks_see_every_step_and_can_stop_the_run(make_trainer):
    events = []

    class Stopping(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            events.append(state.global_step)
            control.should_training_stop = state.global_step == 2

    make_trainer(trainer_args={"callbacks": [Stopping()]}, max_steps=5, lmbda=0.5).train()
    assert events == [1, 2]


def test_compute_metrics_and_predict_get_the_students_full_logits(make_trainer, token_rows):
    seen = {}

    def compute_metrics(prediction):
        seen["shapes"] = (prediction.predictions.shape, prediction.label_ids.shape)
        chosen = prediction.predictions[:, :-1].argmax(-1)
        targets = prediction.label_ids[:, 1:]
        return {"accuracy": float((chosen == targets)[targets != -100].mean())}

    trainer = make_trainer(trainer_args={"eval_dataset": token_rows(6), "compute_metrics": compute_metrics})
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_accuracy"] <= 1
    (rows, length, vocab), labels = seen["shapes"]
    assert (rows, vocab) == (6, 368)
    assert labels == (rows, length)

    output = trainer.predict(trainer.eval_dataset)
    batch = trainer.data_collator([trainer.eval_dataset[index] for index in range(4)])
    with torch.no_grad():
        expected = trainer.model(batch["input_ids"], batch["attention_mask"]).logits.numpy()
    is_real = batch["attention_mask"].bool().numpy()
    actual = output.predictions[:4, : expected.shape[1]]
    assert np.abs(actual - expected)[is_real].max() < 1e-4
    assert "test_loss" in output.metrics


def test_predict_returns_every_row_of_a_test_set(make_trainer):
    rows = [{"prompt": "one two" * count, "completion": " three"} for count in (1, 10, 2)]
    trainer = make_trainer(lmbda=0.5, max_length=24)
    assert trainer.predict(Dataset.from_list(rows)).predictions.shape[0] == 3
    rows[1]["completion"] = ""
    with pytest.raises(GKDDataError, match=r"test: .* 1 empty completion \(row 1, from 0\): correct or remove it"):
        trainer.predict(Dataset.from_list(rows))


def test_model_init_makes_an_adapted_student_for_every_run(make_trainer, tiny_model):
    made = []

    def model_init():
        made.append(tiny_model(attention_dropout=0.1))
        return made[-1]

    lora = LoraConfig(r=2, target_modules=["q_proj"])
    trainer = make_trainer(trainer_args={"model_init": model_init, "peft_config": lora}, lmbda=0.5)
    trainer.train()
    assert len(made) == 2  # Trainer makes one at construction and one for the run
    assert isinstance(trainer.model, PeftModel)
    assert trainer.model.get_base_model() is made[-1]
    assert made[-1].model.layers[0].self_attn.attention_dropout == 0


def test_subclass_can_change_the_loss_the_teacher_and_the_collator(make_trainer, tiny_model, token_rows):
    class Doubled(GKDTrainer):
        def compute_loss(self, *args, return_outputs=False, **kwargs):
            result = super().compute_loss(*args, return_outputs=return_outputs, **kwargs)
            return (2 * result[0], result[1]) if return_outputs else 2 * result

    class CountingTeacher(FrozenTeacher):
        calls = 0

        def score(self, batch):
            CountingTeacher.calls += 1
            return super().score(batch)

    collated = []

    def collator(rows):
        collated.append(len(rows))
        return plain.data_collator(rows)

    plain = make_trainer(trainer_args={"eval_dataset": token_rows(5)})
    doubled = make_trainer(
        trainer_class=Doubled,
        trainer_args={
            "eval_dataset": token_rows(5),
            "teacher": CountingTeacher(tiny_model(hidden=48, seed=1)),
            "data_collator": collator,
        },
    )
    assert doubled.evaluate()["eval_loss"] == pytest.approx(2 * plain.evaluate()["eval_loss"], rel=1e-5)
    assert CountingTeacher.calls == 2
    assert collated == [4, 1]


def test_passed_rollouts_are_used(make_trainer):
    class Spy(HFRollouts):
        calls = 0

        def generate(self, prompts, sampling, seeds):
            Spy.calls += 1
            return super().generate(prompts, sampling, seeds)

    spy = Spy(stop_ids=[2], vocab_size=365)
    trainer = make_trainer(trainer_args={"rollouts": spy}, lmbda=1.0, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.rollouts is spy
    assert Spy.calls == 2  # one for each window


def test_student_and_teacher_are_loaded_by_path(tiny_model, byte_level, token_rows, config, tmp_path):
    student = tiny_model()
    student.to(torch.bfloat16).save_pretrained(tmp_path / "student")
    byte_level().save_pretrained(tmp_path / "student")
    tiny_model(hidden=48, seed=1).save_pretrained(tmp_path / "teacher")
    byte_level().save_pretrained(tmp_path / "teacher")
    trainer = GKDTrainer(
        model=str(tmp_path / "student"),
        args=config(
            teacher_model_name_or_path=str(tmp_path / "teacher"), teacher_model_init_kwargs='{"dtype": "bfloat16"}'
        ),
        train_dataset=token_rows(),
    )
    assert trainer.model.dtype == torch.float32
    assert trainer.teacher_model.dtype == torch.bfloat16
    assert len(trainer.processing_class) == 365
    trainer.train()
    assert trainer.state.global_step == 2


def test_student_and_teacher_are_loaded_from_path_objects(make_trainer, tiny_model, byte_level, tmp_path):
    tiny_model().save_pretrained(tmp_path / "student")
    tiny_model(hidden=48, seed=1).save_pretrained(tmp_path / "teacher")
    for options, arguments in (
        ({}, {"teacher_model": tmp_path / "teacher"}),
        ({"teacher_model_name_or_path": tmp_path / "teacher"}, {"teacher_model": None}),
    ):
        trainer = make_trainer(trainer_args={"model": tmp_path / "student", **arguments}, max_steps=1, **options)
        assert trainer.teacher_model.config.hidden_size == 48
        trainer.train()
        trainer.args.to_json_string()


def test_teacher_in_an_adapter_teaches_what_its_merged_weights_teach(make_trainer, tiny_model):
    losses = []
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    for is_merged in (False, True):
        teacher = get_peft_model(tiny_model(hidden=48, seed=1), lora)
        arguments = {"teacher_model": teacher.merge_and_unload() if is_merged else teacher}
        trainer = make_trainer(trainer_args=arguments, max_steps=1, lmbda=0.0, seq_kd=True)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_compiled_student_and_teacher_train_as_the_models_inside_do(make_trainer, tiny_model, tmp_path, caplog):
    losses, student = [], tiny_model()
    compiled = {
        "model": torch.compile(student, backend="eager"),
        "teacher_model": torch.compile(tiny_model(hidden=48, seed=1), backend="eager"),
    }
    for arguments in ({}, compiled):
        trainer = make_trainer(trainer_args=arguments, lmbda=0.5, max_steps=1)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == losses[1]
    assert trainer.model is student
    assert "torch_compile=True" in caplog.text
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.equal(type(student).from_pretrained(tmp_path / "saved").lm_head.weight, student.lm_head.weight)


def test_wrapped_model_is_trained_as_it_is(make_trainer, tiny_model):
    student = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    before = {name: p.clone() for name, p in student.named_parameters()}
    make_trainer(trainer_args={"model": student}, lmbda=0.5, **{CHECKPOINTING: True}).train()
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora" in name for name in changed)


def test_student_whose_forward_takes_no_extra_arguments_gets_the_loss_undivided(make_trainer, tiny_model):
    class Plain(type(tiny_model())):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask)

    plain = tiny_model()
    plain.__class__ = Plain
    logs = []
    for model in (plain, tiny_model()):
        trainer = make_trainer(trainer_args={"model": model}, gradient_accumulation_steps=2, max_steps=1)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-5)
    assert logs[0]["grad_norm"] == pytest.approx(logs[1]["grad_norm"], rel=1e-4)


def test_torch_dataset_of_token_rows_trains(make_trainer, token_rows):
    class Rows(torch.utils.data.Dataset):
        def __init__(self):
            self.rows = list(token_rows())

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, index):
            return self.rows[index]

    trainer = make_trainer(trainer_args={"train_dataset": Rows()}, lmbda=0.5)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


@pytest.mark.skipif(not HAS_SAMPLING_STRATEGY, reason="transformers before 5.2 shuffles what has a length")
def test_iterable_dataset_trains_on_the_rows_of_its_map_style_twin(make_trainer, token_rows):
    losses = []
    for rows in (token_rows(16), token_rows(16).to_iterable_dataset()):
        trainer = make_trainer(trainer_args={"train_dataset": rows}, **IN_ORDER, max_steps=4, lmbda=0.5)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert trainer.args.accelerator_config.dispatch_batches is False
    assert losses[0] == losses[1]


def test_evaluation_sets_have_their_own_names_and_metrics(make_trainer, token_rows):
    prompts = Dataset.from_list([{"prompt": "hello"}] * 3)
    trainer = make_trainer(trainer_args={"eval_dataset": {"train": prompts, "data": token_rows(5)}})
    metrics = trainer.evaluate()
    assert metrics["eval_train_loss"] > 0
    assert metrics["eval_data_loss"] == pytest.approx(trainer.evaluate(token_rows(5))["eval_loss"], rel=1e-6)


def test_seconds_of_evaluation_are_not_those_of_training(make_trainer, token_rows):
    trainer = make_trainer(
        trainer_args={"eval_dataset": token_rows(16)}, eval_on_start=True, per_device_eval_batch_size=1, max_steps=1
    )
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert 0 < entry["seconds_teacher"] < 10 * entry["seconds_student"]
    assert entry["seconds_student"] > 0


def test_teacher_quantised_by_its_init_kwargs_teaches(make_trainer, tiny_model, tmp_path):
    tiny_model(hidden=64, seed=1).save_pretrained(tmp_path / "teacher")
    quantisation = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    losses = []
    for init_kwargs in ({}, {"quantization_config": quantisation}):
        trainer = make_trainer(
            trainer_args={"teacher_model": str(tmp_path / "teacher")},
            teacher_model_init_kwargs={"dtype": "float32", **init_kwargs},
            max_steps=1,
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert type(trainer.teacher_model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.2)


def test_teacher_whose_forward_takes_only_ids_and_mask_teaches(make_trainer, tiny_model):
    class Plain(type(tiny_model())):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask)

    teacher = tiny_model(seed=1)
    teacher.__class__ = Plain
    make_trainer(trainer_args={"teacher_model": teacher}).train()


def test_resumed_run_on_iterable_rows_goes_past_the_end_of_an_epoch(make_trainer, token_rows, config):
    def trainer(max_steps):
        rows = token_rows(8).to_iterable_dataset()
        args = config(max_steps=max_steps, save_strategy="steps", save_steps=3)
        return make_trainer(trainer_args={"train_dataset": rows, "args": args})

    trainer(3).train()
    resumed = trainer(6)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6


def test_secrets_reach_the_loaders_and_neither_the_log_nor_the_output_folder(
    make_trainer, tiny_model, byte_level, tmp_path, caplog, capsys
):
    secret = "canary-31337"
    for name, model in (("student", tiny_model()), ("teacher", tiny_model(hidden=48, seed=1))):
        model.save_pretrained(tmp_path / name)
        byte_level().save_pretrained(tmp_path / name)
    init_kwargs = {"token": secret, "proxies": {"https": f"http://user:{secret}@proxy"}}
    with caplog.at_level(logging.DEBUG):
        trainer = make_trainer(
            trainer_args={"model": tmp_path / "student", "teacher_model": tmp_path / "teacher"},
            model_init_kwargs=init_kwargs,
            teacher_model_init_kwargs=init_kwargs,
            hub_token=secret,
            save_strategy="steps",
            save_steps=1,
            report_to=["tensorboard"],
            max_steps=1,
        )
        trainer.train()
        trainer.save_model()
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert {"training_args.bin", "trainer_state.json"} <= {file.name for file in files}
    assert any(file.name.startswith("events.out.tfevents") for file in files)
    assert [file for file in files if secret.encode() in file.read_bytes()] == []
    output = capsys.readouterr()
    assert secret not in caplog.text + output.out + output.err
    assert trainer.args.hub_token == trainer.args.model_init_kwargs["token"] == secret
    saved = torch.load(tmp_path / "run" / "training_args.bin", weights_only=False)
    assert saved.max_steps == 1
    assert saved.hub_token is None


def test_a_teacher_and_its_name_may_be_spelled_differently(make_trainer, tiny_model, tmp_path, monkeypatch):
    tiny_model(hidden=48, seed=1).save_pretrained(tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    options = {"trainer_args": {"teacher_model": str(tmp_path / "teacher")}}
    make_trainer(**options, teacher_model_name_or_path="./teacher/")


@pytest.mark.parametrize("has_own", [False, True])
def test_a_search_minimises_the_loss_or_the_users_metrics(make_trainer, token_rows, monkeypatch, has_own):
    searched = []
    monkeypatch.setattr(
        Trainer,
        "hyperparameter_search",
        lambda self, hp_space, compute_objective, **options: searched.append((compute_objective, options)),
    )
    own = {"compute_metrics": lambda predictions: {"exact": 0.25, "partial": 0.5}} if has_own else {}
    trainer = make_trainer(trainer_args={"eval_dataset": token_rows(4), **own}, eval_on_policy=True, max_new_tokens=3)
    trainer.hyperparameter_search(direction="minimize")
    metrics = trainer.evaluate()
    metrics.pop("eval_model_preparation_time")  # which an evaluation in training lacks
    assert {"eval_acceptance", "eval_on_policy_loss", "eval_top_token_agreement"} < metrics.keys()
    [(objective, options)] = searched
    assert options == {"direction": "minimize"}
    assert objective(metrics) == (0.75 if has_own else metrics["eval_loss"])
    trainer.hyperparameter_search(None, len)
    assert searched[1][0] is len


def test_another_run_does_not_begin_with_the_checkpoint_of_the_one_before(make_trainer):
    seen = []

    class Noting(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append(trainer.last_checkpoint)

    trainer = make_trainer(
        trainer_args={"callbacks": [Noting()]}, max_steps=1, save_strategy="steps", save_steps=1, lmbda=0.0
    )
    trainer.train()
    first = trainer.last_checkpoint
    trainer.train()
    trainer.train(resume_from_checkpoint=str(first))
    assert first.name == "checkpoint-1"
    assert seen == [None, None, first]


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_an_evaluation_set_that_is_set_later_is_refused_before_the_first_step(make_trainer, token_rows, strategy):
    trainer = make_trainer(trainer_args={"eval_dataset": token_rows(4)}, eval_strategy=strategy)
    trainer.eval_dataset = Dataset.from_list([{"input_ids": [5, 999], "labels": [-100, 999]}])
    with pytest.raises(GKDDataError, match="eval: none of the 1 rows can be used"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_datasets_that_are_set_later_are_prepared(make_trainer, token_rows):
    long = Dataset.from_list([{"input_ids": [*range(4, 100)], "labels": [-100] * 4 + [*range(8, 100)]}] * 4)
    trainer = make_trainer(trainer_args={"eval_dataset": {"a": token_rows(4), "b": token_rows(4)}}, max_length=24)

    def length(loader):
        return next(iter(loader))["input_ids"].shape[1]

    trainer.train_dataset = long
    assert length(trainer.get_train_dataloader()) == 24
    trainer.eval_dataset["b"] = long
    assert length(trainer.get_eval_dataloader("b")) == 24
    assert length(trainer.get_eval_dataloader("a")) < 24
    trainer.eval_dataset = long
    assert length(trainer.get_eval_dataloader()) == 24
    trainer.eval_dataset = long
    assert length(trainer.get_eval_dataloader(long)) == 24
    prepared = trainer.train_dataset, trainer.eval_dataset
    trainer.train()
    trainer.evaluate()
    assert (trainer.train_dataset, trainer.eval_dataset) == prepared
