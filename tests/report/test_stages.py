"""A student's way from stage to stage: every number in the table, every run and measure in the picture."""

import io

import pytest
from matplotlib.image import imread
from rich.console import Console

from gkd_trainer.report.stages import plot_stages, print_stages

STAGES = {
    "before": {"forward KL": 8.6125, "agreement": 0.03},
    "between": {"forward KL": 1.67, "agreement": 0.46},
    "after": {"forward KL": 1.9105, "agreement": 0.5},
}


def history(*losses):
    return [
        *({"step": 5 * (index + 1), "loss": loss} for index, loss in enumerate(losses)),
        {"step": 5 * len(losses), "train_runtime": 1.0},  # what Trainer adds at the end
    ]


def test_the_table_has_a_row_for_each_measure_and_a_column_for_each_stage():
    console = Console(record=True, width=100, file=io.StringIO())
    print_stages(STAGES, "On 8 held-out prompts", console)
    text = console.export_text()
    assert "On 8 held-out prompts" in text
    [names] = [line for line in text.splitlines() if "between" in line]
    assert names.index("before") < names.index("between") < names.index("after")
    [kl] = [line for line in text.splitlines() if "forward KL" in line]
    assert [float(cell) for cell in kl.replace("│", " ").split()[2:]] == [8.613, 1.670, 1.911]
    [agreement] = [line for line in text.splitlines() if "agreement" in line]
    assert [float(cell) for cell in agreement.replace("│", " ").split()[1:]] == [0.03, 0.46, 0.5]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, in order."""
    saved = []
    from matplotlib.figure import Figure

    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: saved.append(self) or save(self, *args, **kw))
    return saved


def test_the_picture_draws_the_runs_one_after_the_other_and_each_measure(tmp_path, figures):
    path = tmp_path / "new" / "stages.png"
    plot_stages(STAGES, {"off-policy": history(8.0, 2.0), "mixed": history(1.5, 1.0, 0.5)}, path)
    assert imread(path).std() > 0
    curves, *bars = figures[0].axes
    assert [(line.get_label(), line.get_xdata().tolist(), line.get_ydata().tolist()) for line in curves.lines] == [
        ("off-policy", [5, 10], [8.0, 2.0]),
        ("mixed", [15, 20, 25], [1.5, 1.0, 0.5]),
    ]
    assert [axes.get_title() for axes in bars] == ["forward KL", "agreement"]
    for axes, measure in zip(bars, ["forward KL", "agreement"], strict=True):
        assert [bar.get_height() for bar in axes.patches] == [values[measure] for values in STAGES.values()]
        assert [label.get_text() for label in axes.get_xticklabels()] == list(STAGES)


def test_a_run_that_logged_no_loss_leaves_the_picture_whole(tmp_path, figures):
    path = tmp_path / "stages.svg"
    plot_stages(STAGES, {"too short": history(), "mixed": history(1.5)}, path)
    assert [line.get_label() for line in figures[0].axes[0].lines] == ["mixed"]
    plot_stages(STAGES, {}, path)
    assert path.stat().st_size > 0
