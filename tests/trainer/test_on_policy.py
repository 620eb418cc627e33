"""What the trainer generates and when, and which tokens of that it trains on."""

import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from torch.utils.data import DataLoader

from gkd_trainer import GKDTrainer, HFRollouts
from gkd_trainer.types import Completion, Sampling
from tests.versions import TRANSFORMERS

METRICS = {
    "divergence_on_policy",
    "divergence_off_policy",
    "student_entropy",
    "teacher_entropy",
    "top_token_agreement",
    "acceptance",
    "on_policy_share",
    "completion_length",
    "truncated_share",
    "seconds_rollout",
    "seconds_teacher",
    "seconds_student",
    "tokens_per_second",
}


class Recording(GKDTrainer):
    """Keeps the batches that are trained on."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.batches = [*getattr(self, "batches", []), {key: value.clone() for key, value in inputs.items()}]
        return super().compute_loss(model, inputs, *args, **kwargs)


class Scripted(HFRollouts):
    """An engine whose completions are known, and that keeps what it was asked."""

    def __init__(self, token_ids=(7, 8, 2), is_finished=True):
        super().__init__(stop_ids=[2])
        self.calls, self.completion = [], Completion(token_ids, is_finished)

    def generate(self, prompts, sampling, seeds):
        self.calls.append((prompts, sampling, seeds))
        return [self.completion for _ in prompts]


def trained_rows(trainer):
    """Each sample trained on: its ids, its trained ids, and whether it was marked on-policy."""
    return [
        (
            ids[mask.bool()].tolist(),
            labels[labels != -100].tolist(),
            bool(marked),
        )
        for batch in trainer.batches
        for ids, mask, labels, marked in zip(
            batch["input_ids"], batch["attention_mask"], batch["labels"], batch["is_on_policy"], strict=True
        )
    ]


def run(make_trainer, engine=None, max_steps=2, trainer_args=None, **options):
    arguments = {**({"rollouts": engine} if engine else {}), **(trainer_args or {})}
    trainer = make_trainer(trainer_class=Recording, trainer_args=arguments, max_steps=max_steps, **options)
    trainer.train()
    return trainer


def test_off_and_on_policy_samples_sit_in_one_micro_batch(make_trainer):
    trainer = run(make_trainer, Scripted(), lmbda=0.5, per_device_train_batch_size=8)
    shares = [batch["is_on_policy"].float().mean().item() for batch in trainer.batches]
    assert any(0 < share < 1 for share in shares)
    data = {tuple(row["input_ids"]): row for row in trainer.train_dataset}
    for ids, trained, is_on_policy in trained_rows(trainer):
        if is_on_policy:
            assert trained == [7, 8, 2]  # the terminating stop token is trained on
            assert ids[-3:] == [7, 8, 2]
            assert any(row[: len(ids) - 3] == tuple(ids[:-3]) for row in data)
        else:
            assert trained == [label for label in data[tuple(ids)]["labels"] if label != -100]


def test_samples_keep_their_position_ids_beside_completed_ones(make_trainer, token_rows):
    rows = [{**row, "position_ids": list(range(len(row["input_ids"])))} for row in token_rows()]

    def collator(rows):
        columns = {"input_ids": 0, "labels": -100, "position_ids": 0, "attention_mask": 0}
        rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        length = max(len(row["input_ids"]) for row in rows)
        return {
            name: torch.tensor([row[name] + [fill] * (length - len(row[name])) for row in rows])
            for name, fill in columns.items()
        }

    arguments = {"train_dataset": Dataset.from_list(rows), "data_collator": collator}
    trainer = run(make_trainer, Scripted(), lmbda=0.5, per_device_train_batch_size=8, trainer_args=arguments)
    for batch in trainer.batches:
        assert set(batch["is_on_policy"].tolist()) == {True, False}
        for positions, mask in zip(batch["position_ids"], batch["attention_mask"].bool(), strict=True):
            assert positions[mask].tolist() == list(range(int(mask.sum())))


def test_all_of_a_truncated_completion_is_trained_on_and_counted(make_trainer):
    trainer = run(make_trainer, Scripted(token_ids=(7, 8, 9), is_finished=False), lmbda=1.0)
    assert all(trained == [7, 8, 9] for _, trained, _ in trained_rows(trainer))
    assert trainer.state.log_history[0]["truncated_share"] == 1
    assert trainer.state.log_history[0]["completion_length"] == 3


def test_a_window_is_one_call_with_the_tokens_before_the_completions(make_trainer):
    engine = Scripted()
    trainer = run(make_trainer, engine, lmbda=1.0, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    assert [len(prompts) for prompts, _, _ in engine.calls] == [8, 8]
    prompts = {tuple(prompt) for call in engine.calls for prompt in call[0]}
    expected = {
        tuple(i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100)
        for row in trainer.train_dataset
    }
    assert prompts <= expected
    seeds = [seed for call in engine.calls for seed in call[2]]
    assert len(set(seeds)) == 16


def test_every_sample_of_larger_batches_has_its_own_seed(make_trainer):
    class OwnLoader(Recording):
        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, batch_size=8, collate_fn=self.data_collator)

    engine = Scripted()
    make_trainer(
        trainer_class=OwnLoader,
        trainer_args={"rollouts": engine},
        lmbda=1.0,
        max_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    ).train()
    [(prompts, _, seeds)] = engine.calls
    assert len(prompts) == len(set(seeds)) == 16


@pytest.mark.skipif(Version("5.19") > TRANSFORMERS, reason="this transformers has no batch_rebalance")
def test_batches_that_are_balanced_by_length_are_completed(make_trainer, token_rows):
    engine = Scripted()
    trainer = run(
        make_trainer,
        engine,
        trainer_args={"train_dataset": token_rows(32, longest=30)},
        lmbda=1.0,
        max_steps=2,
        gradient_accumulation_steps=4,
        train_sampling_strategy="batch_rebalance",
    )
    sizes = [len(batch["input_ids"]) for batch in trainer.batches]
    assert sum(sizes) == 32
    assert len(set(sizes)) > 1
    for prompts, _, seeds in engine.calls:
        assert len(prompts) == len(set(seeds)) == 16
    assert all(trained == [7, 8, 2] for _, trained, _ in trained_rows(trainer))


def test_every_sampling_option_reaches_the_engine(make_trainer):
    engine = Scripted()
    options = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}
    run(make_trainer, engine, lmbda=1.0, max_new_tokens=5, generation_kwargs={"no_repeat_ngram_size": 2}, **options)
    assert engine.calls[0][1] == Sampling(5, extra={"no_repeat_ngram_size": 2}, **options)


def test_default_sampling_is_the_students_own_distribution(make_trainer):
    engine = Scripted()
    run(make_trainer, engine, lmbda=1.0)
    assert engine.calls[0][1] == Sampling(6, temperature=1.0, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0)


def test_batch_granularity_draws_once_for_a_step(make_trainer):
    trainer = run(make_trainer, Scripted(), max_steps=12, lmbda=0.5, lmbda_granularity="batch")
    shares = {entry["on_policy_share"] for entry in trainer.state.log_history if "on_policy_share" in entry}
    assert shares == {0.0, 1.0}


def test_linear_schedule_ends_all_on_policy(make_trainer):
    trainer = run(make_trainer, Scripted(), max_steps=4, lmbda=0.0, lmbda_end=1.0, lmbda_schedule="linear")
    shares = [entry["on_policy_share"] for entry in trainer.state.log_history if "on_policy_share" in entry]
    assert shares[0] == 0
    assert shares[-1] == 1


def test_teacher_generates_what_is_not_on_policy_under_seq_kd(make_trainer, tiny_model):
    trainer = run(make_trainer, Scripted(), lmbda=0.5, seq_kd=True, per_device_train_batch_size=8)
    engine = HFRollouts(stop_ids=[2], vocab_size=365)
    engine.sync(trainer.teacher_model)
    seen = set()
    for ids, trained, is_on_policy in trained_rows(trainer):
        seen.add(is_on_policy)
        if is_on_policy:
            assert trained == [7, 8, 2]
        else:
            # Whatever its seed, the teacher's logits give what it sampled a positive probability; the data's own
            # completion is gone.
            assert tuple(ids) not in {tuple(row["input_ids"]) for row in trainer.train_dataset}
            assert len(trained) <= 6
    assert seen == {True, False}


def test_seq_kd_with_a_near_greedy_teacher_trains_on_its_greedy_completions(make_trainer):
    trainer = run(make_trainer, lmbda=0.0, seq_kd=True, top_k=1)
    engine = HFRollouts(stop_ids=[2], vocab_size=368)
    engine.sync(trainer.teacher_model)
    for ids, trained, is_on_policy in trained_rows(trainer):
        (expected,) = engine.generate([ids[: -len(trained)]], engine.greedy_sampling(6), [0])
        assert trained == list(expected.token_ids)
        assert not is_on_policy


def test_the_teacher_follows_the_options_of_vllm_under_seq_kd(make_trainer):
    """It generates by transformers, which calls them otherwise, or would take no notice of them."""
    options = {"min_tokens": 6, "logit_bias": {"7": 60.0, "2": 120.0}}
    engine = Scripted()
    trainer = run(make_trainer, engine, lmbda=0.5, seq_kd=True, use_vllm=True, generation_kwargs=options)
    rows = trained_rows(trainer)
    assert {is_on_policy for *_, is_on_policy in rows} == {True, False}
    assert all(trained == [7] * 6 for _, trained, is_on_policy in rows if not is_on_policy)
    assert all(sampling.extra == options for _, sampling, _ in engine.calls)


def test_rows_of_text_stay_off_policy_and_are_counted(make_trainer):
    rows = Dataset.from_list([{"text": "hello there"}] * 8)
    trainer = run(make_trainer, Scripted(), trainer_args={"train_dataset": rows}, lmbda=0.999)
    assert not any(is_on_policy for *_, is_on_policy in trained_rows(trainer))
    assert trainer.state.log_history[0]["samples_without_prompt"] == 4


def test_bare_prompts_train_under_lmbda_one(make_trainer):
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "hello"}]}] * 8)
    trainer = run(make_trainer, Scripted(), trainer_args={"train_dataset": rows}, lmbda=1.0)
    decoded = {trainer.processing_class.decode(ids[:-3]) for ids, *_ in trained_rows(trainer)}
    assert decoded == {"<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"}


def test_on_policy_completions_come_from_the_current_student(make_trainer):
    trainer = run(make_trainer, lmbda=1.0, top_k=1, learning_rate=1.0, max_steps=3)
    engine = HFRollouts(stop_ids=[2], vocab_size=368)
    engine.sync(trainer.model)
    last = trainer.batches[-1]
    stale = 0
    for ids, mask, labels in zip(last["input_ids"], last["attention_mask"], last["labels"], strict=True):
        prompt = ids[(labels == -100) & mask.bool()].tolist()
        (now,) = engine.generate([prompt], engine.greedy_sampling(6), [0])
        stale += list(now.token_ids) != labels[labels != -100].tolist()
    assert stale > 0  # the last step changed the student after it had generated: the weights are shared, not copied


def test_all_metrics_are_in_the_ordinary_log(make_trainer):
    trainer = run(make_trainer, lmbda=0.5, per_device_train_batch_size=8)
    assert trainer.state.log_history[0].keys() >= METRICS


def test_logged_divergences_are_those_of_the_tokens_trained_on(make_trainer):
    trainer = make_trainer(lmbda=0.5, per_device_train_batch_size=8, max_steps=1)
    seen = []
    compute_loss = trainer.compute_loss

    def recording(model, inputs, *args, **kwargs):
        loss = compute_loss(model, inputs, *args, **kwargs)
        with torch.no_grad():
            for kind in (True, False):
                chosen = inputs["is_on_policy"] == kind
                part = {key: value[chosen] for key, value in inputs.items()}
                count = trainer._meter
                trainer._meter = type(count)(trainer.args.device)  # its own numbers stay out of the log
                seen.append(compute_loss(model, part).item())
                trainer._meter = count
        return loss

    trainer.compute_loss = recording
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["divergence_on_policy"] == pytest.approx(seen[0], rel=1e-5)
    assert entry["divergence_off_policy"] == pytest.approx(seen[1], rel=1e-5)


def test_evaluation_is_weighted_by_tokens(make_trainer, token_rows):
    trainer = make_trainer(trainer_args={"eval_dataset": token_rows(7, longest=30)}, per_device_eval_batch_size=2)
    total = tokens = 0.0
    for row in trainer.eval_dataset:
        batch = trainer.data_collator([row])
        count = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total += count * trainer.compute_loss(trainer.model, batch).item()
        tokens += count
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_bare_prompts_are_evaluated_on_greedy_completions(make_trainer, token_rows):
    rows = [
        {"input_ids": [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]}
        for row in token_rows(5)
    ]
    prompts = Dataset.from_list([{**row, "labels": [-100] * len(row["input_ids"])} for row in rows])
    trainer = make_trainer(trainer_args={"eval_dataset": prompts})
    engine = HFRollouts(stop_ids=[2], vocab_size=368)
    engine.sync(trainer.model)
    completed = []
    for row in rows:
        (completion,) = engine.generate([row["input_ids"]], engine.greedy_sampling(6), [0])
        ids = list(completion.token_ids)
        completed.append({"input_ids": row["input_ids"] + ids, "labels": [-100] * len(row["input_ids"]) + ids})
    expected = trainer.evaluate(Dataset.from_list(completed))["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_eval_on_policy_adds_the_divergence_on_greedy_completions(make_trainer, token_rows):
    trainer = make_trainer(trainer_args={"eval_dataset": token_rows(5)}, eval_on_policy=True)
    prompts = Dataset.from_list(
        [
            {
                "input_ids": [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100],
                "labels": [-100] * row["labels"].count(-100),
            }
            for row in token_rows(5)
        ]
    )
    metrics = trainer.evaluate()
    trainer.args.eval_on_policy = False
    assert metrics["eval_on_policy_loss"] == pytest.approx(trainer.evaluate(prompts)["eval_loss"], rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)


def test_teacher_is_not_registered_with_accelerate(make_trainer, token_rows):
    trainer = make_trainer(trainer_args={"eval_dataset": token_rows(4)}, lmbda=0.5, bf16=True)
    assert trainer.accelerator._models == []
    trainer.evaluate()
    assert [model is trainer.model for model in trainer.accelerator._models] == [True]
    trainer.train()
    assert not any(p.requires_grad for p in trainer.teacher_model.parameters())
    assert not trainer.teacher_model.training


def test_completions_are_shown_when_logging(make_trainer, capsys):
    run(make_trainer, Scripted(), lmbda=1.0, log_completions=True, num_completions_to_print=1, max_steps=1)
    printed = capsys.readouterr().out
    assert "Completions at step 1" in printed
    assert printed.count("student ") == 1  # one row of the table; the metrics' names go on with other signs


def test_teacher_stops_at_its_own_stop_ids_under_seq_kd(make_trainer, tiny_model):
    teacher = tiny_model(hidden=48, seed=1)
    teacher.generation_config.eos_token_id = list(range(4, 368))
    trainer = run(make_trainer, trainer_args={"teacher_model": teacher}, lmbda=0.0, seq_kd=True)
    assert all(len(trained) == 1 or trained[0] < 4 for _, trained, _ in trained_rows(trainer))


def test_padding_rows_of_equal_heads_are_never_sampled(make_trainer, tiny_model):
    student, teacher = (tiny_model(vocab=400, seed=seed) for seed in (0, 1))
    trainer = run(
        make_trainer, trainer_args={"model": student, "teacher_model": teacher}, max_steps=4, lmbda=1.0, temperature=9.0
    )
    sampled = [token for _, trained, _ in trained_rows(trainer) for token in trained]
    assert len(sampled) > 40
    assert max(sampled) < 365


def test_bare_prompts_too_long_to_complete_are_dropped_from_an_evaluation_set(make_trainer, caplog):
    prompts = Dataset.from_list(
        [{"messages": [{"role": "user", "content": text}]} for text in ("hello", "hello there " * 30)]
    )
    trainer = make_trainer(trainer_args={"eval_dataset": prompts}, lmbda=0.0)
    assert len(trainer.eval_dataset) == 1
    assert any("prompt longer than max_length" in record.message for record in caplog.records)


def test_eval_on_policy_does_not_change_the_training_rows(make_trainer, token_rows):
    long = {"input_ids": [5] * 61 + [6, 2], "labels": [-100] * 61 + [6, 2]}
    rows = Dataset.from_list([*token_rows(8), long])
    trainer = make_trainer(trainer_args={"train_dataset": rows, "eval_dataset": rows}, lmbda=0.0, eval_on_policy=True)
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (9, 8)
