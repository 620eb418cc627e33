"""Recorded samples, records and folders of runs, for tests of reports."""

import json

from gkd_trainer.report.positions import PositionMeans
from gkd_trainer.report.records import FILE_NAME, Record, RecordFile, RunFacts
from gkd_trainer.report.token_map import TokenMap

NASTY = ("<script>alert(1)</script>", "</script><!--", " 😀", "\ufffd", "مرحبا", "\u202e", "a\nb", "", "'\"&")
"""Tokens that markup, bidirectional text or encodings could trip over."""

FACTS = RunFacts("student", "teacher", 40, {"lmbda": 0.5, "divergence": "jsd", "beta": 0.5})


def token_map(text=("one", " two"), *, is_on_policy=True, prompt="Count:", **fields):
    count = len(text)
    top = (("one", 0.5), ("<b>", 0.25))
    values = {
        "divergence": tuple(0.1 * index for index in range(count)),
        "student_entropy": (1.5,) * count,
        "teacher_entropy": (1.25,) * count,
        "acceptance": (0.75,) * count,
        "student_p": (0.5,) * count,
        "teacher_p": (None,) * count,
        "student_top": (top,) * count,
        "teacher_top": (top,) * count,
        "student_rank": (0,) * count,
        "teacher_rank": (None,) * count,
    }
    return TokenMap(prompt=prompt, is_on_policy=is_on_policy, is_cut=False, text=tuple(text), **{**values, **fields})


def record(step, *, samples=None, **metrics):
    means = PositionMeans((0, 1, 16), (0.5, 0.25, 0.125), (4, 4, 8))
    return Record(
        step,
        {"loss": 1 / step, "learning_rate": 1e-3, "divergence_on_policy": 1 / step, "on_policy_share": 0.5, **metrics},
        step,
        (token_map(), token_map(is_on_policy=False)) if samples is None else samples,
        {"on_policy": means, "off_policy": means},
    )


def write_records(folder, records, facts=FACTS):
    file = RecordFile(folder / FILE_NAME)
    file.start(facts, 0)
    for each in records:
        file.append(each)
    return folder / FILE_NAME


def write_state(path, steps, *, max_steps=40, **metrics):
    path.parent.mkdir(parents=True, exist_ok=True)
    log = [{"step": step, "loss": 1 / step, "learning_rate": 1e-3, "epoch": 0.1, **metrics} for step in steps]
    path.write_text(json.dumps({"log_history": log, "max_steps": max_steps, "global_step": max(steps, default=0)}))
    return path
