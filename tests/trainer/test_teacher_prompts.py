"""Prompts of the teacher's own in training runs: for any teacher, on the data and on the student's completions."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from gkd_trainer import ContextTeacher, GKDDataError, RoutedTeachers
from gkd_trainer.batch_keys import ROW_KEY, TEACHER_PROMPT_IDS
from gkd_trainer.divergence import token_divergence
from gkd_trainer.signals import LogitsSignal
from gkd_trainer.teachers import FrozenTeacher, SelfTeacher

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
LORA = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)


def rows_of(**columns):
    rows = [{"prompt": f"{word} is", "completion": f" {word} {word}"} for word in WORDS]
    return Dataset.from_list([{**row, **{k: f(i) for k, f in columns.items()}} for i, row in enumerate(rows)])


@pytest.fixture
def read(monkeypatch):
    """What the teacher reads: the token ids of each sample, and which of them are scored."""
    samples = []
    score = FrozenTeacher.score

    def recording(self, batch):
        for ids_L, mask_L, labels_L in zip(
            batch.model_inputs["input_ids"], batch.model_inputs["attention_mask"].bool(), batch.labels_BL, strict=True
        ):
            samples.append((ids_L[mask_L].tolist(), labels_L[labels_L != -100].tolist()))
        return score(self, batch)

    monkeypatch.setattr(FrozenTeacher, "score", recording)
    return samples


@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("is_stream", [False, True])
def test_the_teacher_reads_its_own_prompt_before_each_completion(make_trainer, byte_level, read, lmbda, is_stream):
    rows = rows_of(teacher_prompt=lambda i: f"hello {WORDS[i]}?" if i % 2 else None)
    trainer = make_trainer(
        trainer_args={"train_dataset": rows.to_iterable_dataset() if is_stream else rows}, lmbda=lmbda
    )
    trainer.train()
    assert len(read) == 8
    texts = [byte_level().decode(ids[: len(ids) - len(scored)]) for ids, scored in read]
    expected = {f"hello {word}?" if i % 2 else f"{word} is" for i, word in enumerate(WORDS)}
    assert set(texts) == expected
    assert all(ids[-len(scored) :] == scored for ids, scored in read)


def test_the_loss_is_the_divergence_from_the_teacher_behind_its_prompt(make_trainer, tiny_model, byte_level):
    tokenizer, student, teacher = byte_level(), tiny_model(), tiny_model(hidden=48, seed=1)
    rows = rows_of(teacher_prompt=lambda i: "hello there" + "?" * i)
    trainer = make_trainer(
        trainer_args={"model": student, "teacher_model": teacher, "eval_dataset": rows}, per_device_eval_batch_size=8
    )
    actual = trainer.evaluate()["eval_loss"]
    total, count = 0.0, 0
    for row in rows:
        completion = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        sides = []
        for model, prompt in ((student, row["prompt"]), (teacher, row["teacher_prompt"])):
            ids = tokenizer(prompt)["input_ids"]
            with torch.no_grad():
                logits_LV = model(torch.tensor([ids + completion])).logits[0].double()
            sides.append(logits_LV[len(ids) - 1 : -1])
        values_N = token_divergence(*map(LogitsSignal, sides), beta=0.5).values_N
        total, count = total + float(values_N.sum()), count + len(values_N)
    assert actual == pytest.approx(total / count, rel=1e-5)


def test_a_function_shows_the_teacher_what_the_student_wrote(make_trainer, tiny_model, byte_level, read):
    rows = rows_of(row_key=lambda i: 10 + i)
    seen = []

    def prompt(row, completion):
        seen.append((row["prompt"], completion))
        return [{"role": "user", "content": f"{row['prompt']}: {len(completion)} letters"}]

    teacher = ContextTeacher(FrozenTeacher(tiny_model(hidden=48, seed=1)), prompt, rows)
    trainer = make_trainer(
        trainer_args={"train_dataset": rows, "teacher": teacher, "teacher_model": None}, lmbda=1.0, max_length=200
    )
    trainer.train()
    assert {first for first, _ in seen} == {f"{word} is" for word in WORDS}
    tokenizer = byte_level()
    for (ids, scored), (row_prompt, completion) in zip(read, seen, strict=True):
        shown = tokenizer.decode(ids[: len(ids) - len(scored)])
        assert shown == f"<|im_start|>user\n{row_prompt}: {len(completion)} letters<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(scored, skip_special_tokens=True) == completion


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
@pytest.mark.parametrize("is_routed", [False, True])
def test_a_function_gets_only_the_last_turn_of_a_conversation_as_the_completion(
    make_trainer, tiny_model, byte_level, read, lmbda, is_routed
):
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    messages = [{"role": role, "content": content} for role, content in turns]
    rows = Dataset.from_list([{"row_key": 0, "teacher": "hinted", "messages": messages}])
    completions = []

    def prompt(row, completion):
        completions.append(completion)
        return [{"role": "system", "content": "hint"}, *row["messages"][:-1]]

    teacher = ContextTeacher(FrozenTeacher(tiny_model(hidden=48, seed=1)), prompt, rows)
    if is_routed:
        teacher = RoutedTeachers({"hinted": teacher, "plain": FrozenTeacher(tiny_model(hidden=48, seed=2))})
    trainer = make_trainer(
        trainer_args={"train_dataset": rows, "teacher": teacher}, lmbda=lmbda, max_length=200, max_steps=1
    )
    trainer.train()
    [completion], [(ids, scored), *_] = completions, read
    tokenizer = byte_level()
    hinted = [{"role": "system", "content": "hint"}, *messages[:-1]]
    expected = tokenizer.apply_chat_template(hinted, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(ids[: len(ids) - len(scored)]) == expected
    assert tokenizer.decode(scored, skip_special_tokens=True) == completion
    if lmbda == 0:
        assert completion == "four"


@pytest.mark.parametrize("source", ["base", "ema"])
def test_the_student_learns_from_itself_behind_another_prompt(make_trainer, source):
    rows = rows_of(teacher_prompt=lambda i: "hello there, how are you today?")
    arguments = {"train_dataset": rows, "eval_dataset": rows, "teacher_model": None, "peft_config": LORA}
    trainer = make_trainer(trainer_args=arguments, self_teacher=source, max_steps=20, learning_rate=5e-2, beta=0.0)
    assert isinstance(trainer.teacher, SelfTeacher)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert before > 0.01
    assert trainer.evaluate()["eval_loss"] < before


def test_a_prompt_longer_than_the_teachers_context_is_refused_at_construction(make_trainer, tiny_model):
    arguments = {
        "train_dataset": rows_of(teacher_prompt=lambda i: "?" * 62),
        "teacher_model": tiny_model(hidden=48, seed=1, max_position_embeddings=64),
    }
    with pytest.raises(GKDDataError, match="8 teacher_prompt with its completion longer than the teacher's 64 tokens"):
        make_trainer(trainer_args=arguments)


def test_prompts_longer_than_max_length_are_taken_if_the_teachers_context_is(make_trainer, read):
    rows = rows_of(teacher_prompt=lambda i: "?" * 100)
    make_trainer(trainer_args={"train_dataset": rows}, max_length=20).train()
    assert all(len(ids) > 100 for ids, _ in read)


def test_no_prompt_of_the_teacher_reaches_a_forward(make_trainer):
    rows = rows_of(teacher_prompt=lambda i: "hello")
    trainer = make_trainer(trainer_args={"train_dataset": rows})
    seen = set()
    for model in (trainer.model, trainer.teacher_model):
        model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    trainer.train()
    assert "input_ids" in seen
    assert not seen & {TEACHER_PROMPT_IDS, ROW_KEY}


def test_keys_missing_in_a_run_are_an_error(make_trainer, tiny_model):
    rows = rows_of(row_key=lambda i: i)
    teacher = ContextTeacher(FrozenTeacher(tiny_model(hidden=48, seed=1)), lambda row, completion: None, rows)
    trainer = make_trainer(
        trainer_args={"train_dataset": rows.remove_columns(ROW_KEY), "teacher": teacher, "teacher_model": None}
    )
    with pytest.raises(GKDDataError, match="finds a sample's row by its row_key; got None"):
        trainer.train()
