"""Bad input is refused early, with what was expected, what came, and what to do."""

import logging

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

from gkd_trainer import GKDConfigError, GKDDataError, GKDNumericsError, GKDTeacherError, GKDTrainer, HFRollouts
from gkd_trainer.signals import LogitsSignal
from gkd_trainer.teachers import FrozenTeacher, Teacher
from gkd_trainer.types import TokenBatch


class FaultyTeacher(FrozenTeacher):
    """A teacher whose logits are faulty in one row of the n-th batch."""

    fault, at, row = float("nan"), 3, 1

    def score(self, batch: TokenBatch):
        self.calls = getattr(self, "calls", 0) + 1
        signal = super().score(batch)
        logits = signal.head.logits(signal.hidden_NH)
        if self.calls == self.at:
            logits[batch.rows_N == self.row, 5] = self.fault
        return LogitsSignal(logits)


class InferenceTeacher(FrozenTeacher):
    """A teacher that scores as if nothing came after it."""

    @torch.inference_mode()
    def score(self, batch: TokenBatch):
        return super().score(batch)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}], ids=["full", "top_k"])
def test_predictions_of_inference_mode_are_refused_with_the_name_of_their_teacher(make_trainer, tiny_model, options):
    trainer = make_trainer(trainer_args={"teacher": InferenceTeacher(tiny_model(seed=1), **options)})
    with pytest.raises(GKDTeacherError, match=r"^InferenceTeacher\.score returned tensors .*under torch\.no_grad\(\)"):
        trainer.train()
    with torch.inference_mode():  # of the caller's, who does not train
        assert trainer.evaluate(trainer.train_dataset)["eval_loss"] > 0


def test_a_pad_token_without_an_embedding_is_refused_at_construction(make_trainer, tiny_model, byte_level):
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    models = {"model": tiny_model(vocab=365), "teacher_model": tiny_model(vocab=365, seed=1)}
    with pytest.raises(GKDConfigError, match="pad token has id 365, but the student has embeddings for 365 tokens"):
        make_trainer(trainer_args={**models, "processing_class": tokenizer})


def test_no_teacher(make_trainer, tiny_model, token_rows, config):
    with pytest.raises(GKDTeacherError, match="no teacher: pass teacher_model"):
        GKDTrainer(model=tiny_model(), args=config(), train_dataset=token_rows())


def test_teacher_in_the_place_that_trl_gives_it(tiny_model, config, tmp_path):
    config = config()
    for teacher in (tiny_model(seed=1), torch.nn.Linear(2, 2), "a/teacher", tmp_path, FrozenTeacher(tiny_model())):
        with pytest.raises(GKDConfigError) as raised:
            GKDTrainer(tiny_model(), teacher, config)
        message = str(raised.value)
        assert message.startswith("args, the second argument, must be a GKDConfig or TrainingArguments; got ")
        assert type(teacher).__name__ in message
        assert message.endswith("GKDTrainer(student, teacher_model=teacher, args=config, ...)")
    with pytest.raises(GKDConfigError, match=r"data_collator, the third argument, .*got GKDConfig.*teacher_model="):
        GKDTrainer(tiny_model(), None, config)


def test_teacher_object_in_the_place_of_a_model(make_trainer, tiny_model):
    with pytest.raises(GKDTeacherError, match="teacher_model is a FrozenTeacher: pass a Teacher as teacher"):
        make_trainer(trainer_args={"teacher_model": FrozenTeacher(tiny_model())})


def test_teacher_beside_the_name_of_another(make_trainer, tiny_model, tmp_path):
    for name in ("one", "two"):
        tiny_model(seed=1).save_pretrained(tmp_path / name)
    name = str(tmp_path / "one")
    message = "got a teacher that was not loaded from args.teacher_model_name_or_path="
    for given in (
        {"teacher_model": tiny_model(seed=1)},
        {"teacher_model": tmp_path / "two"},
        {"teacher_model": AutoModelForCausalLM.from_pretrained(tmp_path / "two")},
        {"teacher": FrozenTeacher.from_pretrained(tmp_path / "two")},
    ):
        with pytest.raises(GKDTeacherError, match=message):
            make_trainer(trainer_args=given, teacher_model_name_or_path=name)
    for given in (
        {"teacher_model": f"{name}/"},
        {"teacher_model": AutoModelForCausalLM.from_pretrained(name)},
        {"teacher": FrozenTeacher.from_pretrained(name)},
    ):
        make_trainer(trainer_args=given, teacher_model_name_or_path=name)


def test_options_without_effect_are_logged_once_with_what_they_need(make_trainer, caplog):
    make_trainer(divergence="skew_kl", beta=0.1, model_init_kwargs={"token": "canary"}, teacher_tail="renormalize")
    [message] = [record.message for record in caplog.records if "have no effect" in record.message]
    assert message.startswith("These options have no effect in this run: beta=0.1 needs divergence='jsd', ")
    assert "model_init_kwargs={'token': '<TOKEN>'} needs a student given by name" in message
    assert "teacher_tail='renormalize' needs a teacher that gives only its top tokens" in message
    caplog.clear()
    make_trainer(lmbda=0.5, beta=0.1, temperature=0.5)
    assert "have no effect" not in caplog.text


def test_vllm_is_not_started_for_a_run_without_completions(make_trainer, caplog):
    assert type(make_trainer(lmbda=0.0, use_vllm=True).rollouts) is HFRollouts
    assert "use_vllm=True needs completions (lmbda above 0, eval_on_policy, or an eval_dataset of " in caplog.text


def test_two_teachers(make_trainer, tiny_model):
    with pytest.raises(GKDTeacherError, match="got more than one of teacher, teacher_model"):
        make_trainer(trainer_args={"teacher": FrozenTeacher(tiny_model()), "teacher_model": tiny_model()})


def test_no_student(make_trainer):
    with pytest.raises(GKDConfigError, match="pass model"):
        make_trainer(trainer_args={"model": None})


def test_model_that_can_not_be_loaded_says_whose_it_is_and_what_was_expected(make_trainer, tiny_model, tmp_path):
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    damaged = tmp_path / "damaged"
    tiny_model().save_pretrained(damaged)
    (damaged / "model.safetensors").write_bytes(b"no weights")
    for name, kwargs, cause in (
        ("/no/such/folder", {}, "HFValidationError|OSError"),
        ("not a name", {}, "OSError"),
        (empty, {}, "ValueError|OSError"),
        (folder, {"attn_implementation": "none_such"}, "ValueError|ImportError"),
        (folder, {"dtipe": "float32"}, "TypeError"),
        (folder, {"dtype": "float99"}, "AttributeError|ValueError"),
        (damaged, {}, "SafetensorError"),
    ):
        message = f"could not load the {{}} from '{name}': expected .*the arguments to load it in {{}}.*({cause}): "
        with pytest.raises(GKDConfigError, match=message.format("student", "model_init_kwargs")) as raised:
            make_trainer(trainer_args={"model": name}, model_init_kwargs=kwargs)
        assert raised.value.__cause__ is not None
        with pytest.raises(GKDTeacherError, match=message.format("teacher", "teacher_model_init_kwargs")) as raised:
            make_trainer(trainer_args={"teacher_model": name}, teacher_model_init_kwargs=kwargs)
        assert raised.value.__cause__ is not None


def test_teacher_that_is_the_student(make_trainer, tiny_model):
    model = tiny_model()
    with pytest.raises(GKDTeacherError, match="the same object"):
        make_trainer(trainer_args={"model": model, "teacher_model": model})


def test_teacher_options_for_a_loaded_teacher(make_trainer):
    with pytest.raises(GKDTeacherError, match="teacher_model_init_kwargs is for loading a teacher by name"):
        make_trainer(teacher_model_init_kwargs={"dtype": "bfloat16"})


def test_tokenizers_that_differ_are_named(make_trainer, tiny_model, byte_level):
    other = byte_level()
    other.add_tokens(["<|extra|>"])
    with pytest.raises(GKDTeacherError, match=r"1 tokens are only the teacher's, such as '<\|extra\|>'"):
        make_trainer(trainer_args={"teacher": FrozenTeacher(tiny_model(), tokenizer=other)})


def test_a_temperature_that_top_tokens_can_not_take_is_refused(make_trainer, tiny_model):
    with pytest.raises(GKDConfigError, match=r"loss_temperature=2\.0 can't be applied to a teacher's top tokens"):
        make_trainer(trainer_args={"teacher": FrozenTeacher(tiny_model(), top_k=5)}, loss_temperature=2.0)


def test_teacher_that_cannot_generate_under_seq_kd(make_trainer):
    class Remote(Teacher):
        vocab_size, vocabulary, model, top_k = 368, None, None, None
        is_local = can_generate = False

        def score(self, batch):
            raise AssertionError

        def prepare(self, device, tokenizer=None, max_length=None):
            raise AssertionError

    with pytest.raises(GKDTeacherError, match="seq_kd=True makes the teacher generate"):
        make_trainer(trainer_args={"teacher": Remote()}, seq_kd=True)


@pytest.mark.parametrize("lmbda", [0.0, 0.5])
def test_bare_prompts_need_generated_completions(make_trainer, lmbda):
    rows = Dataset.from_list([{"prompt": "hello"}] * 8)
    with pytest.raises(GKDDataError, match=r"lmbda=1.*seq_kd"):
        make_trainer(trainer_args={"train_dataset": rows}, lmbda=lmbda)


def test_text_under_lmbda_one(make_trainer):
    rows = Dataset.from_list([{"text": "hello there"}] * 8)
    with pytest.raises(GKDDataError, match="prompt"):
        make_trainer(trainer_args={"train_dataset": rows}, lmbda=1.0)


def test_rows_without_prompt_from_a_collator_under_lmbda_one(make_trainer):
    def all_trained(rows):
        ids = torch.tensor([[5, 6, 7, 2]] * len(rows))
        return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}

    trainer = make_trainer(trainer_args={"data_collator": all_trained}, lmbda=1.0)
    with pytest.raises(GKDDataError, match="4 of the first 4 samples have no prompt"):
        trainer.train()


def test_collator_without_labels(make_trainer):
    def without_labels(rows):
        ids = torch.tensor([[5, 6, 7, 2]] * len(rows))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    trainer = make_trainer(trainer_args={"data_collator": without_labels})
    with pytest.raises(GKDDataError, match="returned no labels, only attention_mask, input_ids"):
        trainer.train()


def test_values_per_token_of_a_collator_that_completions_do_not_have(make_trainer):
    def with_weights(rows):
        ids = torch.tensor([[5, 6, 7, 2]] * len(rows))
        labels = torch.tensor([[-100, -100, 7, 2]] * len(rows))
        return {"input_ids": ids, "labels": labels, "weights": torch.ones_like(ids)}

    trainer = make_trainer(trainer_args={"data_collator": with_weights}, lmbda=0.5)
    with pytest.raises(GKDDataError, match=r"returned weights \[4, 4\].*Make it return no weights"):
        trainer.train()


def test_compute_loss_func(make_trainer):
    with pytest.raises(GKDConfigError, match="compute_loss_func would replace the divergence"):
        make_trainer(trainer_args={"compute_loss_func": lambda *_, **__: None})


def test_label_smoothing(make_trainer):
    with pytest.raises(GKDConfigError, match=r"label_smoothing_factor=0\.1"):
        make_trainer(label_smoothing_factor=0.1)


def test_prompt_learning_adapter(make_trainer):
    adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(GKDConfigError, match="virtual tokens"):
        make_trainer(trainer_args={"peft_config": adapter})


def test_data_parallel_names_the_remedies(make_trainer, config, monkeypatch):
    args = config()
    monkeypatch.setattr(type(args), "n_gpu", property(lambda self: 2))
    with pytest.raises(GKDConfigError, match=r"accelerate launch.*CUDA_VISIBLE_DEVICES"):
        make_trainer(trainer_args={"args": args})


def test_deepspeed_that_accelerate_does_not_run(make_trainer, config):
    args = config()
    args.deepspeed = {
        "zero_optimization": {"stage": 2}
    }  # as ACCELERATE_USE_CPU=true leaves it: set, without its plugin
    with pytest.raises(GKDConfigError, match=r"deepspeed is set, but .*use_cpu=True.*ACCELERATE_TORCH_DEVICE=cpu"):
        make_trainer(trainer_args={"args": args})


def test_student_that_cannot_generate_under_lmbda(make_trainer, tiny_model):
    class Student(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_model()
            self.config = self.inner.config

        def forward(self, input_ids, attention_mask=None, labels=None):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask)

    make_trainer(trainer_args={"model": Student(), "processing_class": None}).train()
    with pytest.raises(GKDConfigError, match="makes the student generate, but Student can't"):
        make_trainer(trainer_args={"model": Student(), "processing_class": None}, lmbda=0.5)


def test_max_length_too_small_for_any_prompt(make_trainer):
    with pytest.raises(GKDDataError, match="max_length"):
        make_trainer(lmbda=0.5, max_length=7, max_new_tokens=6)


def test_no_usable_row(make_trainer):
    rows = Dataset.from_list([{"prompt": "hello", "completion": ""}] * 4)
    with pytest.raises(GKDDataError, match="empty completion"):
        make_trainer(trainer_args={"train_dataset": rows})


def test_token_ids_that_the_models_do_not_have(make_trainer):
    rows = Dataset.from_list([{"input_ids": [5, 400, 7], "labels": [-100, -100, 7]}] * 4)
    with pytest.raises(GKDDataError, match="a token id beyond the models' 368 tokens"):
        make_trainer(trainer_args={"train_dataset": rows})


def test_iterable_without_usable_row_is_refused_in_the_first_step(make_trainer):
    rows = Dataset.from_list([{"prompt": "hello", "completion": ""}] * 4).to_iterable_dataset()
    trainer = make_trainer(trainer_args={"train_dataset": rows})
    with pytest.raises(GKDDataError, match="is too small for one step: 1 of 1 ranks"):
        trainer.train()


def test_some_unusable_rows_are_counted_and_the_run_continues(make_trainer, caplog):
    rows = [{"prompt": "hello", "completion": "one two"}] * 6 + [{"prompt": "hello", "completion": ""}] * 2
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(trainer_args={"train_dataset": Dataset.from_list(rows)}, lmbda=0.5)
    assert any("2 of 8 rows dropped" in record.message for record in caplog.records)
    trainer.train()
    assert trainer.state.global_step == 2


def faulty_run(make_trainer, tiny_model, fault, **options):
    teacher = FaultyTeacher(tiny_model(hidden=48, seed=1))
    teacher.fault = fault
    trainer = make_trainer(
        trainer_args={"teacher": teacher},
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        **options,
    )
    return trainer


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_teacher_logits_that_are_not_finite_stop_the_run_before_the_step(make_trainer, tiny_model, tmp_path, fault):
    trainer = faulty_run(make_trainer, tiny_model, fault)
    weights = {}
    trainer.add_callback(_KeepWeights(weights, trainer))
    with pytest.raises(
        GKDNumericsError, match=r"step 2, rank 0, micro-batch 0, sample 1: the teacher's logits hold NaN or \+inf"
    ):
        trainer.train()
    assert trainer.state.global_step == 1
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    assert (tmp_path / "run" / "checkpoint-1" / "model.safetensors").exists()


def test_a_teacher_that_fails_during_a_run_leaves_a_checkpoint_to_resume_from(make_trainer, tiny_model, tmp_path):
    class Failing(FrozenTeacher):
        fails_at = 2

        def score(self, batch: TokenBatch):
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == self.fails_at:
                raise GKDTeacherError("a row is too long")
            return super().score(batch)

    teacher = Failing(tiny_model(hidden=48, seed=1))
    with pytest.raises(GKDTeacherError, match=r"a row is too long.*step 1 is saved in .*checkpoint-1: once it"):
        make_trainer(trainer_args={"teacher": teacher}).train()
    trainer = make_trainer(trainer_args={"teacher": teacher})
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    assert teacher.calls == 3


def test_minus_infinity_is_probability_zero_if_the_divergence_stays_finite(make_trainer, tiny_model):
    trainer = faulty_run(make_trainer, tiny_model, -float("inf"), beta=0.5)
    trainer.train()
    assert trainer.state.global_step == 4


def test_minus_infinity_is_refused_if_the_divergence_is_infinite(make_trainer, tiny_model):
    trainer = faulty_run(make_trainer, tiny_model, -float("inf"), beta=1.0)
    with pytest.raises(GKDNumericsError, match="the loss is not finite"):
        trainer.train()


class _KeepWeights(TrainerCallback):
    def __init__(self, weights, trainer):
        self.weights, self.trainer = weights, trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.weights.update({name: p.detach().clone() for name, p in self.trainer.model.named_parameters()})


def test_teacher_that_shares_weights_with_an_adapted_student(make_trainer, tiny_model):
    base = tiny_model()
    student = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(GKDTeacherError, match="shares weights with the student"):
        make_trainer(trainer_args={"model": student, "teacher_model": base})


def test_student_without_a_parameter_to_train(make_trainer, tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(GKDConfigError, match=r"no parameter.*is_trainable=True"):
        make_trainer(trainer_args={"model": str(tmp_path / "adapter")})
    trainable = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=True)
    make_trainer(trainer_args={"model": trainable}).train()


def test_labels_beyond_the_shared_vocabulary_are_dropped_if_cross_entropy_needs_them(
    make_trainer, tiny_model, byte_level, caplog
):
    rows = [{"input_ids": [5, 6, label], "labels": [-100, -100, label]} for label in (7, 370, 8, 9, 10, 11, 12, 13)]
    teacher = FrozenTeacher(tiny_model(vocab=400, seed=1), tokenizer=byte_level())
    arguments = {"model": tiny_model(vocab=384), "teacher": teacher, "train_dataset": Dataset.from_list(rows)}
    trainer = make_trainer(trainer_args=arguments, ce_weight=0.5)
    assert len(trainer.train_dataset) == 7
    trainer.train()
    assert trainer.state.global_step == 2


def test_student_that_cannot_generate_under_eval_on_policy(make_trainer, tiny_model):
    student = tiny_model()
    plain = torch.nn.Module()
    plain.inner, plain.config = student, student.config
    plain.forward = lambda input_ids, attention_mask=None, labels=None: student(input_ids, attention_mask)
    with pytest.raises(GKDConfigError, match="eval_on_policy=True makes the student generate"):
        make_trainer(trainer_args={"model": plain, "processing_class": None}, eval_on_policy=True)
