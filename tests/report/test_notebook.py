"""The table in a notebook, drawn by transformers into a captured display."""

import re
import sys

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from gkd_trainer.report.notebook import NotebookMetrics, is_in_notebook

ENTRY = {"loss": 0.5, "grad_norm": 1.0, "learning_rate": 1e-3, "epoch": 0.5}
OURS = {"divergence_on_policy": 0.25, "student_entropy": 2.0, "seconds_rollout": 9.0, "tokens_per_second": 8.0}


def table(html):
    """The lines of the table as dictionaries."""
    names, *lines = [
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in re.findall(r"<tr.*?</tr>", html, re.DOTALL)
    ]
    return [dict(zip(names, line, strict=False)) for line in lines]


def run(shown, entries, **options):
    """Call the callbacks as Trainer does, with one step per entry, which an evaluation may follow."""
    args = TrainingArguments(output_dir="unused", use_cpu=True, **options)
    state, control = TrainerState(max_steps=len(entries), num_train_epochs=1, epoch=0.0), TrainerControl()
    handler = CallbackHandler([shown.callback()], None, None, None, None)
    handler.add_callback(NotebookMetrics(handler.callbacks))
    handler.on_train_begin(args, state, control)
    for step, (entry, metrics) in enumerate(entries, start=1):
        state.global_step = step
        handler.on_step_end(args, state, control)
        state.log_history.append({**entry, "step": step})
        handler.on_log(args, state, control, dict(entry))
        if metrics is not None:
            handler.on_evaluate(args, state, control, dict(metrics))
    handler.on_train_end(args, state, control)
    [html] = shown.states
    return table(html)


def test_a_line_of_the_table_has_our_metrics_beside_the_loss(shown):
    lines = run(shown, [({**ENTRY, **OURS}, None), ({**ENTRY, **OURS, "loss": 0.4}, None)])
    ours = {"Divergence On Policy": "0.250000", "Student Entropy": "2.000000"}
    assert lines == [
        {"Step": "1", "Training Loss": "0.500000", **ours},
        {"Step": "2", "Training Loss": "0.400000", **ours},
    ]


def test_a_metric_that_comes_later_gets_its_column_then(shown):
    lines = run(shown, [({**ENTRY, **OURS}, None), ({**ENTRY, **OURS, "completion_length": 7.0}, None), (ENTRY, None)])
    assert [line.get("Completion Length") for line in lines] == [None, "7.000000", "No Log"]


def test_the_line_of_an_evaluation_distinguishes_training_from_validation(shown):
    metrics = {"eval_loss": 0.75, "eval_student_entropy": 3.0, "eval_runtime": 1.0}
    entries = [({**ENTRY, **OURS}, None), ({**ENTRY, **OURS, "student_entropy": 1.0}, metrics)]
    [line] = run(shown, entries, eval_strategy="steps", eval_steps=2)
    assert line == {
        "Step": "2",
        "Training Loss": "0.500000",
        "Validation Loss": "0.750000",
        "Student Entropy": "3.000000",
        "Training Divergence On Policy": "0.250000",
        "Training Student Entropy": "1.000000",
    }


def test_an_evaluation_before_training_shows_its_own_table(shown):
    args, state, control = TrainingArguments(output_dir="unused", use_cpu=True), TrainerState(), TrainerControl()
    handler = CallbackHandler([shown.callback()], None, None, None, None)
    handler.add_callback(NotebookMetrics(handler.callbacks))
    handler.on_evaluate(args, state, control, {"eval_loss": 0.75})
    assert table(shown.states[0])[0]["Validation Loss"] == "0.750000"


def test_the_table_is_not_changed_if_its_callback_was_removed(shown):
    args, state, control = TrainingArguments(output_dir="unused", use_cpu=True), TrainerState(), TrainerControl()
    handler = CallbackHandler([shown.callback()], None, None, None, None)
    handler.add_callback(NotebookMetrics(handler.callbacks))
    handler.remove_callback(shown.callback)
    handler.on_log(args, state, control, {**ENTRY, **OURS})
    assert shown.states == []


def test_a_notebook_is_known_by_what_trainer_imports_there(shown):
    assert is_in_notebook()
    del sys.modules["transformers.utils.notebook"]
    assert not is_in_notebook()
