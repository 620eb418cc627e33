"""Encoder-decoders as student and teacher: the loss, rollouts, evaluation, and what is refused."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel
from transformers import (
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5ForConditionalGeneration,
)
from trl import SFTConfig, SFTTrainer

from gkd_trainer import (
    FrozenTeacher,
    GKDArguments,
    GKDConfig,
    GKDConfigError,
    GKDDataError,
    GKDMixin,
    GKDTeacherError,
    GKDTrainer,
    HFRollouts,
    VLLMServerTeacher,
)
from gkd_trainer.batch_keys import IS_ON_POLICY, ROW_KEY
from gkd_trainer.divergence import reference_jsd
from gkd_trainer.models.heads import SeparableHead
from gkd_trainer.teachers import RoutedTeachers, Teacher
from gkd_trainer.trainer.pairing import require_same_kind

FAMILIES = ["t5", "t5_untied", "mt5", "bart"]
ROWS = [
    {"prompt": "one two three " * (1 + i % 3), "completion": "four five" + " six" * (i % 4), ROW_KEY: i}
    for i in range(12)
]


@dataclass
class MyS2SConfig(GKDArguments, Seq2SeqTrainingArguments):
    pass


class MyS2S(GKDMixin, Seq2SeqTrainer):
    pass


@pytest.fixture
def make(make_trainer, tiny_encoder_decoder, config):
    """Make a Seq2SeqTrainer of a tiny student and a wider tiny teacher; options go to its configuration."""

    def build(family="t5", *, trainer_class=MyS2S, config_class=MyS2SConfig, trainer_args=None, **options):
        arguments = {"train_dataset": Dataset.from_list(ROWS), "args": config(config_class, **options)}
        arguments |= trainer_args or {}
        if "model" not in arguments and "model_init" not in arguments:
            arguments["model"] = tiny_encoder_decoder(family)
        if "teacher" not in arguments:
            arguments.setdefault("teacher_model", tiny_encoder_decoder(family, hidden=48, seed=1))
        return make_trainer(trainer_class=trainer_class, trainer_args=arguments)

    return build


def batch_of(trainer, count=5):
    return trainer.data_collator([trainer.train_dataset[index] for index in range(count)])


def plain_logits(model, inputs):
    """Logits in float64 of a forward that shifts the labels by itself, at the labels."""
    names = ("input_ids", "attention_mask", "labels")
    return model(**{name: inputs[name] for name in names}).logits[inputs["labels"] != -100].double()


def expected_loss(trainer, inputs, beta=0.5, temperature=1.0):
    student = plain_logits(trainer.model, inputs)
    with torch.no_grad():
        teacher = plain_logits(trainer.teacher_model, inputs)
    return reference_jsd(student, teacher, beta=beta, temperature=temperature).mean()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("family", "beta"), [("t5", 0.3), ("t5_untied", 0.0), ("mt5", 1.0), ("bart", 0.3), ("bart", 1.0)]
)
def test_loss_and_gradients_are_those_of_plain_logits_in_float64(make, family, beta):
    trainer = make(family, beta=beta, loss_temperature=2.0)
    assert isinstance(trainer._pairing.head, SeparableHead)
    assert isinstance(trainer.teacher._head, SeparableHead)
    inputs = batch_of(trainer)
    inputs["labels"][0, 1] = -100  # a label in the middle that is not trained on
    assert inputs["input_ids"].shape[1] != inputs["labels"].shape[1]

    expected = expected_loss(trainer, inputs, beta, temperature=2.0)
    expected.backward()
    expected_gradients = gradients(trainer.model)
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert expected.item() > 1e-3
    actual = gradients(trainer.model)
    assert actual.keys() == expected_gradients.keys()
    scale = max(gradient.abs().max() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        assert (actual[name] - gradient).abs().max() <= 1e-4 * scale, name


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_teachers_prompts_take_the_place_of_what_its_encoder_reads(make, byte_level, family):
    rows = [{**row, "teacher_prompt": f"seven {i} eight" if i % 2 else None} for i, row in enumerate(ROWS)]
    trainer = make(family, trainer_args={"train_dataset": Dataset.from_list(rows)})
    inputs = batch_of(trainer)
    loss = trainer.compute_loss(trainer.model, dict(inputs)).item()
    tokenizer, values = byte_level(), []
    for i in range(5):
        labels = inputs["labels"][i][inputs["labels"][i] != -100]
        texts = (ROWS[i]["prompt"], rows[i]["teacher_prompt"] or ROWS[i]["prompt"])
        with torch.no_grad():
            student, teacher = (
                model(input_ids=tokenizer(text, return_tensors="pt")["input_ids"], labels=labels[None])
                .logits[0]
                .double()
                for model, text in zip((trainer.model, trainer.teacher_model), texts, strict=True)
            )
        values.append(reference_jsd(student, teacher, beta=0.5))
    assert loss == pytest.approx(torch.cat(values).mean().item(), rel=1e-5)
    trainer.train()


@pytest.mark.parametrize(("family", "source"), [("t5", "base"), ("bart", "ema")])
def test_an_encoder_decoder_teaches_itself(make, tiny_encoder_decoder, family, source):
    names = ["q", "v"] if family == "t5" else ["q_proj", "v_proj"]
    lora = LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    plain = tiny_encoder_decoder(family)
    arguments = {"teacher_model": None, "model": tiny_encoder_decoder(family), "peft_config": lora}
    trainer = make(family, trainer_args=arguments, self_teacher=source, lmbda=0.5, max_new_tokens=4, learning_rate=1e-2)
    inputs = batch_of(trainer)
    loss = trainer.compute_loss(trainer.model, dict(inputs)).item()
    student = plain_logits(trainer.model, inputs)
    with torch.no_grad():
        teacher = plain_logits(plain, inputs) if source == "base" else student
    assert loss == pytest.approx(reference_jsd(student, teacher, beta=0.5).mean().item(), rel=1e-4, abs=1e-6)
    trainer.train()
    assert trainer.compute_loss(trainer.model, dict(inputs)).item() > 1e-4


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_full_logits_are_in_the_columns_of_the_labels(make, family):
    trainer = make(family)
    inputs = batch_of(trainer)
    loss = trainer.compute_loss(trainer.model, inputs)
    with_outputs, outputs = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
    assert with_outputs.item() == pytest.approx(loss.item(), rel=1e-5)
    assert outputs.logits.shape == (*inputs["labels"].shape, 368)
    is_label = inputs["labels"] != -100
    expected = plain_logits(trainer.model, inputs)
    assert torch.allclose(outputs.logits[is_label].double(), expected, atol=1e-5)

    left = dict(inputs, labels=torch.cat([torch.full((5, 2), -100), inputs["labels"]], dim=1))
    moved_loss, moved = trainer.compute_loss(trainer.model, left, return_outputs=True)
    assert moved_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert torch.allclose(moved.logits[left["labels"] != -100].double(), expected, atol=1e-5)


def test_padding_of_the_encoder_on_the_left_changes_nothing(make):
    trainer = make("bart")  # whose positions count columns
    inputs = batch_of(trainer)
    expected = trainer.compute_loss(trainer.model, inputs).item()
    n_padding = (inputs["attention_mask"] == 0).sum(dim=1)
    columns = (torch.arange(inputs["input_ids"].shape[1]) - n_padding[:, None]) % inputs["input_ids"].shape[1]
    left = dict(inputs, **{name: inputs[name].gather(1, columns) for name in ("input_ids", "attention_mask")})
    assert n_padding.any()
    assert trainer.compute_loss(trainer.model, left).item() == pytest.approx(expected, rel=1e-5)


def test_a_window_of_one_label_and_one_of_none(make):
    trainer = make()
    inputs = {"input_ids": torch.tensor([[11, 12]]), "labels": torch.tensor([[7]])}
    loss = trainer.compute_loss(trainer.model, inputs)
    assert loss.item() == pytest.approx(expected_loss(trainer, {**inputs, "attention_mask": None}).item(), rel=1e-5)
    nothing = trainer.compute_loss(trainer.model, {**inputs, "labels": torch.tensor([[-100]])})
    assert nothing.item() == 0
    nothing.backward()


@pytest.mark.parametrize("family", ["t5_untied", "bart"])
def test_training_off_policy_divides_by_all_labels(make, family):
    trainer = make(family, gradient_accumulation_steps=2, max_steps=3, learning_rate=1e-2)
    seen = []
    get_batch_samples = trainer.get_batch_samples

    def note(*arguments):
        batches, count = get_batch_samples(*arguments)
        seen.append((sum(int((batch["labels"] != -100).sum()) for batch in batches), int(count)))
        return batches, count

    trainer.get_batch_samples = note
    trainer.train()
    assert all(labels == count > 0 for labels, count in seen)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("family", "lmbda"), [("t5", 0.5), ("bart", 1.0)])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(make, tmp_path, family, lmbda):
    options = {"lmbda": lmbda, "max_steps": 4, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    options |= {"disable_dropout": False, "output_dir": str(tmp_path / "unbroken")}
    unbroken = make(family, **options)
    unbroken.train()
    resumed = make(family, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-2"))
    shares = {entry["on_policy_share"] for entry in unbroken.state.log_history if "on_policy_share" in entry}
    assert shares == {1.0} if lmbda == 1 else len(shares | {0.0, 1.0}) > 2
    expected = dict(unbroken.model.named_parameters())
    for name, weight in resumed.model.named_parameters():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_on_policy_labels_are_what_the_student_generates(make, family):
    trainer = make(family, lmbda=0.5, max_steps=1, top_k=1, per_device_train_batch_size=6)
    seen = []
    get_batch_samples = trainer.get_batch_samples
    trainer.get_batch_samples = lambda *arguments: seen.append(get_batch_samples(*arguments)) or seen[-1]
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    trainer.train()
    trainer.model.load_state_dict(before)
    [([batch], count)] = seen
    is_on_policy = batch[IS_ON_POLICY]
    assert 0 < is_on_policy.sum() < 6
    assert count == (batch["labels"] != -100).sum()
    by_key = {row[ROW_KEY]: row for row in trainer.train_dataset}
    start = trainer.model.config.decoder_start_token_id
    for row, generated in enumerate(is_on_policy.tolist()):
        data = by_key[int(batch[ROW_KEY][row])]
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        assert ids == data["input_ids"]  # the encoder reads the same
        labels = batch["labels"][row][batch["labels"][row] != -100].tolist()
        assert batch["decoder_input_ids"][row, : len(labels)].tolist() == [start, *labels[:-1]]
        if not generated:
            assert labels == data["labels"]
            continue
        output = trainer.model.eval().generate(
            input_ids=torch.tensor([ids]), max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=1
        )
        assert labels == output[0, 1:].tolist()


def test_prompts_train_on_the_students_and_the_teachers_completions(make):
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS])
    for options in ({"lmbda": 1.0, "rollout_steps": 2}, {"lmbda": 0.5, "seq_kd": True}):
        trainer = make("bart", trainer_args={"train_dataset": prompts}, **options)
        trainer.train()
        [first, *_] = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert first["loss"] > 0
        assert first["completion_length"] > 0


def test_the_teachers_completions_are_its_own(make, tiny_encoder_decoder):
    trainer = make("bart", seq_kd=True, max_steps=1, top_k=1)
    trainer.train()
    teacher = tiny_encoder_decoder("bart", hidden=48, seed=1)
    for item in trainer._generated:
        output = teacher.generate(
            input_ids=torch.tensor([item.prompt]), max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=1
        )
        assert list(item.completion.token_ids) == output[0, 1:].tolist()
        assert not item.is_on_policy


def test_cross_entropy_counts_the_labels_of_the_data(make):
    trainer = make("t5", ce_weight=0.25)
    inputs = batch_of(trainer)
    logits, labels = plain_logits(trainer.model, inputs), inputs["labels"][inputs["labels"] != -100]
    cross_entropy = torch.nn.functional.cross_entropy(logits, labels)
    expected = 0.25 * cross_entropy + 0.75 * expected_loss(trainer, inputs)
    trainer.model.train()
    assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_lora_student_trains_only_its_adapter(make, family):
    targets = {"t5": ["q", "v"], "bart": ["q_proj", "v_proj"]}[family]
    adapter = LoraConfig(r=2, target_modules=targets, task_type="SEQ_2_SEQ_LM", init_lora_weights=False)
    trainer = make(family, lmbda=0.5, learning_rate=1e-2, trainer_args={"peft_config": adapter})
    assert isinstance(trainer.model, PeftModel)
    inputs = batch_of(trainer)
    expected = expected_loss(trainer, inputs).item()
    assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(expected, rel=1e-5)
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_models_are_loaded_by_name(make, tiny_encoder_decoder, byte_level, tmp_path):
    for name, seed in (("student", 0), ("teacher", 1)):
        tiny_encoder_decoder("bart", seed=seed).bfloat16().save_pretrained(tmp_path / name)
        byte_level().save_pretrained(tmp_path / name)
    arguments = {"model": tmp_path / "student", "teacher_model": tmp_path / "teacher", "processing_class": None}
    trainer = make(trainer_class=GKDTrainer, config_class=GKDConfig, trainer_args=arguments, lmbda=0.5)
    assert isinstance(trainer.model, BartForConditionalGeneration)
    assert isinstance(trainer.teacher_model, BartForConditionalGeneration)
    assert trainer.model.dtype == torch.float32
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert T5ForConditionalGeneration is not type(FrozenTeacher.from_pretrained(tmp_path / "saved").model)


def test_a_student_of_model_init_gets_the_collator_of_its_kind(make, tiny_encoder_decoder):
    trainer = make(trainer_args={"model_init": lambda: tiny_encoder_decoder("t5")}, lmbda=0.5)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_stream_and_rows_of_tokens_train(make):
    rows = [{"input_ids": [11, 12, 13 + i], "labels": [5 + i, 2], "attention_mask": [1, 1, 1]} for i in range(12)]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    assert isinstance(stream, IterableDataset)
    trainer = make(trainer_args={"train_dataset": stream}, lmbda=0.5)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(("side", "shifts"), [("left", True), ("right", False)])
def test_transformers_collator_gives_the_loss_of_ours(make, tiny_encoder_decoder, byte_level, side, shifts):
    student, tokenizer = tiny_encoder_decoder("bart"), byte_level()
    tokenizer.padding_side = side
    collator = DataCollatorForSeq2Seq(tokenizer, model=student if shifts else None)
    arguments = {"model": student, "data_collator": collator, "processing_class": tokenizer}
    trainer, ours = make("bart", trainer_args=arguments, max_steps=1), make("bart", max_steps=1)
    trainer.train()
    ours.train()
    [loss, expected] = [each.state.log_history[0]["loss"] for each in (trainer, ours)]
    assert loss == pytest.approx(expected, rel=1e-5)


def test_evaluation_measures_the_data_and_the_students_completions(make):
    rows = [*ROWS[:3], {"prompt": "one two", ROW_KEY: 3}]
    evaluation = {"eval_dataset": Dataset.from_list(rows)}
    trainer = make("bart", trainer_args=evaluation, eval_on_policy=True, per_device_eval_batch_size=2)
    metrics = trainer.evaluate()
    student, teacher = trainer.model, trainer.teacher_model
    values = {"data": [], "completions": []}
    for row in trainer.eval_dataset:
        ids = torch.tensor([row["input_ids"]])
        output = student.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=1)[:, 1:]
        for name, labels in (("data", torch.tensor([row["labels"]]).long()), ("completions", output)):
            inputs = {"input_ids": ids, "attention_mask": None, "labels": labels if labels.shape[1] else output}
            with torch.no_grad():
                logits = plain_logits(student, inputs), plain_logits(teacher, inputs)
            values[name].append(reference_jsd(*logits, beta=0.5))
    assert metrics["eval_loss"] == pytest.approx(torch.cat(values["data"]).mean().item(), rel=1e-4)
    assert metrics["eval_on_policy_loss"] == pytest.approx(torch.cat(values["completions"]).mean().item(), rel=1e-4)


def test_compute_metrics_gets_the_logits_of_the_labels(make):
    seen = []
    arguments = {"eval_dataset": Dataset.from_list(ROWS[:5]), "compute_metrics": lambda given: seen.append(given) or {}}
    trainer = make(trainer_args=arguments, per_device_eval_batch_size=2)
    trainer.evaluate()
    [given] = seen
    labels = torch.tensor(given.label_ids)
    inputs = batch_of(trainer)
    assert torch.equal(labels[labels != -100], inputs["labels"][inputs["labels"] != -100])
    expected = plain_logits(trainer.model, inputs).detach()
    assert torch.allclose(torch.tensor(given.predictions)[labels != -100].double(), expected, atol=1e-5)


def test_predict_with_generate_gives_generated_tokens_and_our_loss(make):
    seen = []
    rows = Dataset.from_list([*ROWS[:4], {"prompt": "one two", ROW_KEY: 4}])
    arguments = {"eval_dataset": rows, "compute_metrics": lambda given: seen.append(given) or {"seen": 1.0}}
    options = {"generation_max_length": 7, "generation_num_beams": 2, "per_device_eval_batch_size": 5}
    trainer = make("bart", trainer_args=arguments, predict_with_generate=True, **options)
    metrics = trainer.evaluate()
    assert metrics["eval_seen"] == 1
    without = make("bart", trainer_args={"eval_dataset": rows}, per_device_eval_batch_size=5).evaluate()
    assert metrics["eval_loss"] == pytest.approx(without["eval_loss"], rel=1e-5)
    [given] = seen
    inputs = trainer.data_collator(list(trainer.eval_dataset))
    encoded = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = trainer.model.generate(**encoded, max_length=7, num_beams=2)
    assert torch.equal(torch.tensor(given.predictions)[:, : expected.shape[1]], expected)
    assert given.label_ids.tolist() == inputs["labels"].tolist()  # a prompt has none
    assert trainer.predict(rows, max_length=5).predictions.shape[0] == 5


def test_predict_with_generate_is_refused_where_nothing_would_be_generated(make, tiny_model, config):
    with pytest.raises(GKDConfigError, match=r"needs an encoder-decoder and `class MyS2S\(GKDMixin, Seq2SeqTrainer\)`"):
        make(trainer_class=GKDTrainer, predict_with_generate=True)
    models = {"model": tiny_model(), "teacher_model": tiny_model(seed=1)}
    with pytest.raises(GKDConfigError, match="the student is a LlamaForCausalLM: leave it out"):
        make(trainer_args=models, predict_with_generate=True)


def test_a_seq2seq_trainer_needs_its_configuration(make, config):
    for args in (None, Seq2SeqTrainingArguments(output_dir="x", use_cpu=True), config()):
        with pytest.raises(GKDConfigError, match=r"derive `class MyConfig\(GKDArguments, Seq2SeqTrainingArguments\)`"):
            make(trainer_args={"args": args})


def test_a_causal_lm_trains_under_a_seq2seq_trainer(make, tiny_model):
    arguments = {"model": tiny_model(), "teacher_model": tiny_model(hidden=48, seed=1)}
    trainer = make(trainer_args=arguments, lmbda=0.5)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_each_sample_is_compared_with_its_own_of_several_teachers(make, tiny_encoder_decoder):
    models = {name: tiny_encoder_decoder("bart", hidden=48, seed=seed) for seed, name in enumerate("ab", start=1)}
    teacher = RoutedTeachers({name: FrozenTeacher(model) for name, model in models.items()})
    rows = Dataset.from_list([{**row, "teacher": "aab"[i % 3]} for i, row in enumerate(ROWS)])
    trainer = make("bart", trainer_args={"teacher": teacher, "train_dataset": rows}, lmbda=0.5)
    for count in (5, 2):  # the second teacher has none of the first two
        inputs = batch_of(trainer, count)
        values = []
        for index, model in enumerate(models.values()):
            chosen = inputs["teacher_index"] == index
            if not chosen.any():
                continue
            of_teacher = {name: value[chosen] for name, value in inputs.items()}
            logits = plain_logits(trainer.model, of_teacher), plain_logits(model, of_teacher)
            values.append(reference_jsd(*logits, beta=0.5))
        expected = torch.cat(values).mean().item()
        assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(expected, rel=1e-5)
    trainer.train()
    assert trainer.state.global_step == 2


def test_label_smoothing_is_refused(make):
    with pytest.raises(GKDConfigError, match=r"label_smoothing_factor=0.1 smooths labels"):
        make(label_smoothing_factor=0.1)


def test_models_of_two_kinds_are_refused(make, tiny_model, tiny_encoder_decoder):
    with pytest.raises(GKDTeacherError, match=r"\(T5ForConditionalGeneration\) is an encoder-decoder, but the teacher"):
        make(trainer_args={"teacher_model": tiny_model()})
    with pytest.raises(GKDTeacherError, match=r"is a causal LM, but the teacher \(T5ForConditionalGeneration\)"):
        make(trainer_args={"model": tiny_model()}, trainer_class=GKDTrainer, config_class=GKDConfig)
    adapted = PeftModel(tiny_encoder_decoder(seed=2), LoraConfig(target_modules=["q"]))
    with pytest.raises(GKDTeacherError, match=r"predicts other positions: pass a causal LM as the teacher"):
        require_same_kind(tiny_model(), FrozenTeacher(adapted))


def test_decoders_that_start_with_different_tokens_are_refused(make, tiny_encoder_decoder):
    teacher = tiny_encoder_decoder("t5", hidden=48, decoder_start_token_id=3)
    with pytest.raises(GKDTeacherError, match="the teacher's decoder starts with token 3, the student's with token 0"):
        make(trainer_args={"teacher_model": teacher})


def test_a_server_is_refused_as_the_teacher_of_an_encoder_decoder(make, tiny_encoder_decoder):
    teacher = VLLMServerTeacher("http://127.0.0.1:1")
    with pytest.raises(GKDTeacherError, match=r"is an encoder-decoder, whose batches a VLLMServerTeacher does not"):
        make(trainer_args={"teacher": teacher})

    class Own(FrozenTeacher):
        scores_encoder_decoders = False

    with pytest.raises(GKDTeacherError, match=r"a Own does not score: .* sets scores_encoder_decoders = True"):
        require_same_kind(tiny_encoder_decoder(), Own(tiny_encoder_decoder(seed=1)))
    assert not Teacher.scores_encoder_decoders


@dataclass
class MySFTConfig(GKDArguments, SFTConfig):
    pass


class MySFT(GKDMixin, SFTTrainer):
    pass


def test_trls_trainers_and_packing_are_refused(make):
    with pytest.raises(GKDConfigError, match="the trainers of TRL are for causal LMs: use GKDTrainer"):
        make(trainer_class=MySFT, config_class=MySFTConfig, bf16=False)
    with pytest.raises(GKDConfigError, match="packing=True joins rows into one sequence, but T5ForConditionalGener"):
        make(trainer_class=GKDTrainer, config_class=MySFTConfig, bf16=False, packing=True)


def test_vllm_is_refused(make):
    with pytest.raises(GKDConfigError, match="vLLM only generates with causal LMs here: set use_vllm=False"):
        make(lmbda=0.5, use_vllm=True)


def test_generation_that_starts_with_another_token_than_the_labels_is_refused(make, tiny_encoder_decoder):
    student = tiny_encoder_decoder("t5")
    student.generation_config.decoder_start_token_id = 5
    with pytest.raises(GKDConfigError, match=r"starts to generate with token 5 .*after token 0"):
        make(trainer_args={"model": student}, lmbda=0.5)
    make(trainer_args={"model": student})  # nothing is generated


def test_rows_of_text_are_refused(make):
    with pytest.raises(GKDDataError, match="an encoder-decoder needs a source and a target text"):
        make(trainer_args={"train_dataset": [{"text": "one two"}]})


def test_an_engine_of_ones_own_gets_what_the_encoder_reads(make):
    engine = HFRollouts([2], 1)
    trainer = make("bart", trainer_args={"rollouts": engine}, lmbda=1.0, max_steps=1)
    prompts = []
    generate = engine.generate
    engine.generate = lambda given, *others: prompts.extend(given) or generate(given, *others)
    trainer.train()
    rows = [row["input_ids"] for row in trainer.train_dataset]
    assert len(prompts) == 4
    assert all(prompt in rows for prompt in prompts)


def test_rows_without_a_bound_must_fit_the_models_positions(make):
    long = Dataset.from_list([{"input_ids": [11] * 140, "labels": [5, 2]}] * 4)
    with pytest.raises(GKDConfigError, match=r"the longest needs 140 tokens, more than the student's context, 128"):
        make("bart", trainer_args={"train_dataset": long}, max_length=None)
    with pytest.raises(GKDConfigError, match=r"needs 200 tokens with max_new_tokens, more than the student's context"):
        make("bart", lmbda=0.5, max_length=None, max_new_tokens=200)


def test_rules_of_preparation_know_the_kind_of_the_student(make):
    trainer = make()
    assert trainer._preparation.is_encoder_decoder
    assert not replace(trainer._preparation, is_encoder_decoder=False)._rules(True, False).is_encoder_decoder
