"""Students side by side."""

import io
import math

from rich.console import Console

from gkd_trainer.report.comparison import comparison_page, measure_bars, print_comparison
from gkd_trainer.report.measuring import MeasuredStudent, Sample
from gkd_trainer.report.pieces import readable
from tests.report.samples import NASTY, token_map
from tests.report.test_page import data_of

SAMPLE = Sample("".join(NASTY), token_map(NASTY), "".join(NASTY[:4]), True, None)
EMPTY = Sample("prompt", None, "", True, False)

STUDENTS = [
    MeasuredStudent("first", {"own_reverse_kl": 2.0, "own_acceptance": 0.5, "length": 5.0}, (SAMPLE, EMPTY)),
    MeasuredStudent("[bold]second", {"own_reverse_kl": 1.0, "task_score": 0.25, "length": 9.0}, (SAMPLE, EMPTY)),
    MeasuredStudent("third", {"own_reverse_kl": math.inf, "own_acceptance": 0.75}, (SAMPLE, EMPTY)),
]


def test_the_best_is_the_least_divergence_and_the_most_agreement():
    bars = {measure.name: bars for measure, bars in measure_bars(STUDENTS)}
    best = {name: [bar.name for bar in found if bar.is_best] for name, found in bars.items()}
    assert best == {
        "reverse KL, own text": ["[bold]second"],
        "acceptance, own text": ["third"],
        "task score": [],  # of one student only
        "length of own completions": [],
    }


def test_bars_share_a_scale_that_infinity_does_not_stretch():
    bars = {measure.name: bars for measure, bars in measure_bars(STUDENTS)}
    assert [bar.share for bar in bars["reverse KL, own text"]] == [1.0, 0.5, 1.0]
    assert [bar.share for bar in bars["acceptance, own text"]] == [0.5, 0.0, 0.75]
    assert [bar.value for bar in bars["task score"]] == [None, 0.25, None]


def printed(students):
    output = io.StringIO()
    print_comparison(students, "teacher", 3, Console(file=output, width=160))
    return output.getvalue()


def test_the_terminal_shows_measures_and_samples():
    text = printed(STUDENTS)
    assert "Compared with teacher on 3 rows" in text
    assert "[bold]second" in text
    [line] = [line for line in text.splitlines() if "reverse KL, own text" in line]
    assert [cell.strip() for cell in line.split("│")[2:5]] == ["2.000", "1.000", "inf"]
    assert "<script>alert(1)</script>" in text
    assert text.count("third (wrong)") == 1


def test_the_page_shows_them_with_all_text_escaped():
    page = comparison_page(STUDENTS, "<script>teacher", 3)
    assert page.count("<script") == 2
    sides = data_of(page)["sides"]
    assert set(sides) == {f"{row}-{column}" for row in range(2) for column in range(3)}
    assert sides["1-0"] == [{"caption": "first (wrong)", "prompt": "", "isCut": False, "tokens": []}]
    assert [token[0] for token in sides["0-1"][0]["tokens"]] == list(map(readable, NASTY))
    for side in sides:
        assert f'data-side="{side}"' in page
    assert ">inf<" in page


def test_without_samples_there_are_only_measures():
    students = [MeasuredStudent("only", {"own_reverse_kl": 0.0}, ())]
    assert '<h2 id="samples">' not in comparison_page(students, "teacher", 1)
    assert "own text" in printed(students)
