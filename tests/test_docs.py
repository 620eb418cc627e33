"""The documentation names what there is."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from gkd_trainer import GKDArguments, GKDConfig
from gkd_trainer.report.metrics import SAMPLE_SUMS, TOKEN_SUMS, EvaluationMeter, TrainingMeter

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def test_options_page_lists_every_option_with_its_default():
    listed = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", (ROOT / "docs" / "options.md").read_text(), re.MULTILINE)
    own = {"model_init_kwargs", "trust_remote_code", "dataset_num_proc", "dataset_kwargs", "logging_steps"}
    options = [*dataclasses.fields(GKDArguments), *(f for f in dataclasses.fields(GKDConfig) if f.name in own)]
    assert sorted(listed) == sorted((option.name, repr(option.default)) for option in options)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_a_page_compiles(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        compile(block, page.name, "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_figures_of_the_divergence_page_are_what_its_snippets_give():
    page = (ROOT / "docs" / "divergence.md").read_text()
    names: dict[str, object] = {}
    n_figures = 0
    for snippet in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(snippet, names)
        for call, figure in re.findall(r"^((?:generalized_jsd|kl_div)\(.*?)  # (\d\.\d+)", snippet, re.MULTILINE):
            assert eval(call, names).item() == pytest.approx(float(figure), abs=5e-5), call
            n_figures += 1
    assert n_figures == 10


def test_metrics_page_names_what_a_run_logs():
    page = (ROOT / "docs" / "metrics.md").read_text()
    meter = TrainingMeter(torch.device("cpu"))
    meter.add_tokens(torch.tensor([[2.0, 2.0] + [1.0] * (len(TOKEN_SUMS) - 2)] * 2, dtype=torch.float64))
    meter.add_samples(**dict.fromkeys(SAMPLE_SUMS, 1.0))
    with meter.measure("step"):
        pass
    logged = meter.read(lambda sums: sums)
    assert len(logged) == 17
    for metric in logged:
        assert f"`{metric}`" in page, metric


def test_metrics_page_names_what_an_evaluation_gives():
    page = (ROOT / "docs" / "metrics.md").read_text()
    meter = EvaluationMeter()
    meter.add(torch.ones(2, len(TOKEN_SUMS), dtype=torch.float64), torch.tensor(1.0), lambda sums: sums)
    measured = meter.read()
    assert len(measured) == 6
    for metric in measured:
        assert f"`eval_{metric}`" in page, metric
