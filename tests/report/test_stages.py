"""A student from stage to stage: every number in the table, every run and measure in the plot, every sample."""

import io
import sys

import pytest
from matplotlib.image import imread
from rich.console import Console

from gkd_trainer.errors import GKDConfigError
from gkd_trainer.report.stages import plot_curves, print_samples, print_stages

STAGES = {
    "before": {"forward KL": 8.6125, "agreement": 0.03},
    "between": {"forward KL": 1.67, "agreement": 0.46},
    "after": {"forward KL": 1.9105, "agreement": 0.5},
}
CURVES = {
    "off-policy": [(0, STAGES["before"]), (10, STAGES["between"])],
    "mixed": [(10, STAGES["between"]), (15, {"forward KL": 1.8, "agreement": 0.49}), (20, STAGES["after"])],
}


def recording(width=100):
    return Console(record=True, width=width, file=io.StringIO())


def test_the_table_has_each_measure_of_each_stage_and_its_caption_below():
    console = recording()
    print_stages(STAGES, "On 8 held-out prompts", "Compare the last two.", console)
    text = console.export_text()
    assert text.index("On 8 held-out prompts") < text.index("agreement") < text.index("Compare the last two.")
    [stages] = [line for line in text.splitlines() if "before" in line]
    assert [cell.strip() for cell in stages.replace("┃", "│").split("│") if cell.strip()] == list(STAGES)
    [kl] = [line for line in text.splitlines() if "forward KL" in line]
    assert [float(cell) for cell in kl.replace("│", " ").split()[2:]] == [8.613, 1.670, 1.911]
    [agreement] = [line for line in text.splitlines() if "agreement" in line]
    assert [float(cell) for cell in agreement.replace("│", " ").split()[1:]] == [0.03, 0.46, 0.5]


def test_samples_are_printed_at_full_width_below_their_prompt():
    console = recording(width=80)
    long = "word " * 14 + "end"  # 73 characters: with the margin of 4, exactly what fits
    samples = {"teacher": (long, True), "student, before": ("It is [bold]1[/bold],\n \n\nor [/red] so", False)}
    print_samples("What is [i][0]?", samples, console)
    lines = [line.rstrip() for line in console.export_text().splitlines()][1:]
    assert lines == [
        "What is [i][0]?",
        "teacher",
        f"    {long}",
        "student, before",
        "    It is [bold]1[/bold],",
        "    or [/red] so …",
    ]


def test_a_sample_can_not_control_the_terminal():
    console = Console(file=io.StringIO(), force_terminal=False, width=80)
    print_samples("\x1b[2Jprompt", {"\x1b]0;name\x07": ("\x1b]0;title\x07 \x9b31m", True)}, console)
    text = console.file.getvalue()
    assert not any(character in text for character in "\x1b\x07\x9b")
    assert "␛[2Jprompt" in text


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, in order."""
    saved = []
    from matplotlib.figure import Figure

    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: saved.append(self) or save(self, *args, **kw))
    return saved


def test_the_plot_draws_each_measure_of_all_runs_on_one_axis(tmp_path, figures):
    path = tmp_path / "new" / "stages.png"
    plot_curves(CURVES, path, logarithmic={"forward KL"})
    assert imread(path).std() > 0
    panels = figures[0].axes
    assert [(axes.get_title(), axes.get_yscale()) for axes in panels] == [
        ("forward KL", "log"),
        ("agreement", "linear"),
    ]
    for axes in panels:
        drawn = [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines]
        assert drawn == [
            ([step for step, _ in curve], [measures[axes.get_title()] for _, measures in curve])
            for curve in CURVES.values()
        ]
    legend = [text.get_text() for text in panels[0].get_legend().get_texts()]
    assert legend == ["off-policy: 1.67", "mixed: 1.91"]


def test_a_run_without_a_measurement_does_not_break_the_plot(tmp_path, figures):
    path = tmp_path / "stages.svg"
    plot_curves({"too short": [], "mixed": CURVES["mixed"]}, path)
    assert [len(line.get_xdata()) for line in figures[0].axes[0].lines] == [0, 3]
    plot_curves({}, path)
    assert path.stat().st_size > 0


def test_without_matplotlib_the_error_says_what_to_install_and_the_tables_need_none(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        GKDConfigError, match=r'plot_curves needs matplotlib: pip install "\.\[plots\]" in a clone'
    ) as error:
        plot_curves(CURVES, tmp_path / "stages.png")
    assert isinstance(error.value.__cause__, ImportError)
    assert not list(tmp_path.iterdir())
    print_stages(STAGES, "On 8 held-out prompts", console=recording())
