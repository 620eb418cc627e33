"""The measures are those of plain torch, and completions end where they should."""

import pytest
import torch

from experiments.measures import Remembering, compared, completions, padded

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]},
    {"input_ids": [30, 31, 32], "labels": [-100, 31, 32]},
    {"input_ids": [40, 41], "labels": [-100, 41]},
]


def test_means_over_tokens_are_those_of_plain_torch(tiny_model):
    student, teacher = tiny_model(seed=0).eval(), tiny_model(seed=1).eval()
    found = compared(student, teacher, ROWS, pad_token_id=2, batch_size=2)
    sums, count = dict.fromkeys(found, 0.0), 0
    for row in ROWS:
        ids_1L = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            log_q_LV, log_p_LV = (
                model(input_ids=ids_1L).logits[0].double().log_softmax(-1) for model in (student, teacher)
            )
        for place, label in enumerate(row["labels"]):
            if label == -100:
                continue
            log_q_V, log_p_V = log_q_LV[place - 1], log_p_LV[place - 1]
            sums["forward_kl"] += float((log_p_V.exp() * (log_p_V - log_q_V)).sum())
            sums["reverse_kl"] += float((log_q_V.exp() * (log_q_V - log_p_V)).sum())
            sums["acceptance"] += float(torch.minimum(log_p_V.exp(), log_q_V.exp()).sum())
            sums["agreement"] += float(log_p_V.argmax() == log_q_V.argmax())
            sums["student_entropy"] -= float((log_q_V.exp() * log_q_V).sum())
            sums["teacher_entropy"] -= float((log_p_V.exp() * log_p_V).sum())
            count += 1
    assert found == pytest.approx({name: total / count for name, total in sums.items()}, rel=1e-4)


def test_a_teacher_that_remembers_runs_once_for_each_row(tiny_model):
    student, teacher = tiny_model(seed=0).eval(), tiny_model(seed=1).eval()
    forwards = []
    teacher.register_forward_pre_hook(lambda module, inputs: forwards.append(None))
    remembering = Remembering(teacher)
    for row in (*ROWS, *ROWS):
        assert compared(student, remembering, [row], pad_token_id=2) == compared(student, teacher, [row], 2)
    assert len(forwards) == 3 + 6
    with pytest.raises(AssertionError):
        compared(student, remembering, ROWS, pad_token_id=2)  # padded


def test_rows_are_padded_on_the_right():
    inputs, labels_BL = padded(ROWS, pad_token_id=2)
    assert inputs["input_ids"][2].tolist() == [40, 41, 2, 2, 2]
    assert inputs["attention_mask"][2].tolist() == [1, 1, 0, 0, 0]
    assert labels_BL[1].tolist() == [-100, 31, 32, -100, -100]


@pytest.mark.parametrize("seed", [None, 0])
def test_completions_end_with_the_stop_token_or_at_the_length_and_repeat(tiny_model, seed):
    model = tiny_model(seed=1).eval()
    prompts = [row["input_ids"] for row in ROWS]
    found = completions(model, prompts, 2, max_new_tokens=30, seed=seed, batch_size=2)
    assert found == completions(model, prompts, 2, max_new_tokens=30, seed=seed, batch_size=2)
    for completion in found:
        assert completion[-1] == 2 or len(completion) == 30
        assert 2 not in completion[:-1]


def test_greedy_completions_are_those_of_one_prompt_at_a_time(tiny_model):
    model = tiny_model(seed=1).eval()
    prompts = [row["input_ids"] for row in ROWS]
    one_by_one = [completions(model, [prompt], 2, max_new_tokens=12)[0] for prompt in prompts]
    assert completions(model, prompts, 2, max_new_tokens=12) == one_by_one
