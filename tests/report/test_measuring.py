"""What a student has become."""

import copy

import pytest
import torch

from gkd_trainer.errors import GKDDataError
from gkd_trainer.report.measuring import MEASURES, measured, usable_rows
from gkd_trainer.report.pair import pair
from gkd_trainer.types import Completion

ROWS = [
    {"prompt": "one two", "completion": " three four five"},
    {"prompt": "hello", "completion": " there", "ground_truth": "7"},
    {"prompt": "What is the capital of France?", "completion": " Paris"},
]


@pytest.fixture
def models(tiny_model, byte_level):
    return pair(tiny_model(), tiny_model(hidden=48, seed=1), byte_level())


def means_by_hand(models, sequences):
    """Forward and reverse KL, agreement and acceptance, from the models' own logits in float64."""
    parts = []
    for ids, labels in sequences:
        with torch.no_grad():
            log_q, log_p = (
                model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(dim=1)
                for model in (models.student, models.teacher.model)
            )
        is_scored = torch.tensor(labels[1:]) != -100
        log_q, log_p = log_q[is_scored], log_p[is_scored]
        parts.append(
            torch.stack(
                [
                    (log_p.exp() * (log_p - log_q)).sum(1),
                    (log_q.exp() * (log_q - log_p)).sum(1),
                    (log_p.argmax(1) == log_q.argmax(1)).double(),
                    torch.minimum(log_p.exp(), log_q.exp()).sum(1),
                ]
            )
        )
    return torch.cat(parts, dim=1).mean(dim=1)


NAMES = ("forward_kl", "reverse_kl", "agreement", "acceptance")


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_means_are_over_all_tokens_whatever_the_batches(models, batch_size):
    found = measured(models, "student", ROWS, max_new_tokens=5, batch_size=batch_size)
    tokenizer = models.tokenizer
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in ROWS]
    data = []
    for row, prompt in zip(ROWS, prompts, strict=True):
        completion = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        data.append(([*prompt, *completion], [*[-100] * len(prompt), *completion]))
    completions = models.completed(prompts, 5)
    own = [
        ([*prompt, *item.token_ids], [*[-100] * len(prompt), *item.token_ids])
        for prompt, item in zip(prompts, completions, strict=True)
    ]
    for prefix, sequences in (("data", data), ("own", own)):
        values = torch.tensor([found.measures[f"{prefix}_{name}"] for name in NAMES], dtype=torch.float64)
        torch.testing.assert_close(values, means_by_hand(models, sequences), rtol=1e-4, atol=1e-5)
    assert found.measures["length"] == sum(len(item.token_ids) for item in completions) / 3
    assert list(found.measures) == [key for key in MEASURES if key in found.measures]


def test_a_copy_of_the_teacher_is_no_distance_from_it(tiny_model, byte_level):
    teacher = tiny_model()
    found = measured(pair(copy.deepcopy(teacher), teacher, byte_level()), "copy", ROWS, max_new_tokens=4).measures
    for prefix in ("data", "own"):
        assert found[f"{prefix}_forward_kl"] == pytest.approx(0, abs=1e-6)
        assert found[f"{prefix}_acceptance"] == pytest.approx(1, abs=1e-5)
        assert found[f"{prefix}_agreement"] == 1


def test_samples_are_the_first_rows_with_their_maps(models):
    found = measured(models, "student", ROWS, max_new_tokens=4, batch_size=2, shown=3)
    assert [sample.prompt for sample in found.samples] == [row["prompt"] for row in ROWS]
    assert all(len(sample.tokens) <= 4 for sample in found.samples)
    assert [sample.tokens.prompt for sample in found.samples] == [row["prompt"] for row in ROWS]
    assert [sample.is_right for sample in found.samples] == [None, False, None]
    assert measured(models, "student", ROWS, max_new_tokens=4, shown=0).samples == ()


def test_only_the_rows_that_are_kept_are_measured_and_named_by_their_own_index(models):
    found = measured(models, "student", ROWS, kept=(1, 2), max_new_tokens=4)
    assert found == measured(models, "student", ROWS[1:], max_new_tokens=4)
    with pytest.raises(GKDDataError, match="row 3: "):
        measured(models, "student", [*ROWS, {"prompt": ""}], kept=(0, 3))


def test_an_empty_completion_is_a_sample_without_a_map(models, monkeypatch):
    generated = [Completion([], True), Completion([5, 6], False), Completion([], True)]
    monkeypatch.setattr(type(models), "completed", lambda self, prompts, max_new_tokens: generated)
    found = measured(models, "student", ROWS, shown=3)
    assert [sample.tokens and len(sample.tokens) for sample in found.samples] == [None, 2, None]
    assert (found.measures["length"], found.measures["cut_off"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    generated[1] = Completion([], True)
    assert "own_reverse_kl" not in measured(models, "student", ROWS).measures


def test_rows_without_completions_are_only_completed(models):
    found = measured(models, "student", [{"prompt": "hello"}], max_new_tokens=4)
    assert not any(key.startswith("data_") for key in found.measures)
    assert "own_reverse_kl" in found.measures


def test_the_score_counts_right_answers_of_rows_that_have_one(models, monkeypatch):
    monkeypatch.setattr("gkd_trainer.report.measuring._text", lambda models, completion: "so it is #### 7")
    rows = [{"prompt": "a", "ground_truth": "7"}, {"prompt": "b", "ground_truth": "8"}, {"prompt": "c"}]
    assert measured(models, "student", rows, max_new_tokens=2).measures["task_score"] == 0.5


@pytest.mark.parametrize("truth", ["Paris", "", "Paris 2024", None, float("nan")])
def test_an_answer_that_is_no_number_is_not_scored(models, truth):
    found = measured(models, "student", [{"prompt": "hello", "ground_truth": truth}], max_new_tokens=2)
    assert "task_score" not in found.measures
    assert found.samples[0].is_right is None


@pytest.mark.parametrize("truth", ["7", "-1,234.50", "$3", 7, 7.0])
def test_an_answer_that_is_a_number_is_scored(models, truth):
    rows = [{"prompt": "a", "ground_truth": truth}]
    assert "task_score" in measured(models, "student", rows, max_new_tokens=2).measures


def test_gsm8ks_own_rows_become_conversations_with_their_answer():
    [row, other] = usable_rows(
        [{"question": "1 + 1?", "answer": "It is <<1+1=2>>2.\n#### 2"}, {"question": "Who?", "answer": "Me."}]
    )
    assert row["ground_truth"] == "2"
    assert row["messages"][0]["content"].startswith("1 + 1?\n\nReason step by step")
    assert other == {"prompt": "Who?", "completion": "Me."}


def test_a_row_keeps_its_format_of_training_and_its_ground_truth_beside_a_question():
    asked = {"question": "1 + 1?", "answer": "It is 2"}
    [formatted, scored] = usable_rows([{**asked, "prompt": "Sum", "completion": "2"}, {**asked, "ground_truth": "2"}])
    assert formatted == {**asked, "prompt": "Sum", "completion": "2"}
    assert scored == {"prompt": "1 + 1?", "completion": "It is 2", "ground_truth": "2"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}, {"prompt": ""}], "row 1: "),
        ([{"text": "plain text has no prompt"}], "row 0: "),
    ],
)
def test_a_row_that_can_not_be_completed_is_named(models, rows, message):
    with pytest.raises(GKDDataError, match=message):
        measured(models, "student", rows)


def test_rows_in_no_format_are_refused():
    with pytest.raises(GKDDataError, match=r"got the columns \['unknown'\]: rename them"):
        usable_rows([{"unknown": 1}])


def test_no_rows_are_refused():
    with pytest.raises(GKDDataError, match="the dataset has none"):
        usable_rows([])
