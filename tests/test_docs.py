"""The documentation names what there is, and its Python runs as it stands there."""

import ast
import dataclasses
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import datasets
import pytest
import torch

from gkd_trainer import GKDArguments, GKDConfig
from gkd_trainer.report.metrics import SAMPLE_SUMS, TOKEN_SUMS, EvaluationMeter, TrainingMeter

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")])

CONVERSATION = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]}


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found = []
    for heading in re.findall(r"^#+ +(.*?) *#*$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\]\(.*?\)", "", heading.lower())).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return found


def test_options_page_lists_every_option_with_its_default():
    listed = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", (ROOT / "docs" / "options.md").read_text(), re.MULTILINE)
    own = {"model_init_kwargs", "trust_remote_code", "dataset_num_proc", "dataset_kwargs"}
    options = [*dataclasses.fields(GKDArguments), *(f for f in dataclasses.fields(GKDConfig) if f.name in own)]
    assert sorted(listed) == sorted((option.name, repr(option.default)) for option in options)


@pytest.fixture
def hub(tmp_path, monkeypatch, tiny_model, byte_level):
    """A working directory in which the documentation's names of models and data sets are folders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # Padded differently, as the heads of these two are.
    sizes = {"Qwen/Qwen2.5-0.5B-Instruct": {}, "Qwen/Qwen2.5-7B-Instruct": {"hidden": 48, "vocab": 384, "seed": 1}}
    for name, size in sizes.items():
        tiny_model("qwen2", **size).save_pretrained(tmp_path / name)
        byte_level().save_pretrained(tmp_path / name)
    (tmp_path / "trl-lib" / "Capybara").mkdir(parents=True)
    lines = [json.dumps(CONVERSATION)] * 8
    (tmp_path / "trl-lib" / "Capybara" / "train.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.name)
def test_python_of_a_page_runs_its_trainers_train_and_its_comments_are_true(page, hub, capsys, monkeypatch):
    # A block may go on from those before: all are one module, which can be found where a class in it is pickled.
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    names = vars(module)
    for block in python_blocks(page):
        exec(compile(block, page.name, "exec"), names)
        printed = capsys.readouterr().out
        for call, comment in re.findall(r"^ *(\S.*)  # (.+)$", block, re.MULTILINE):
            if call.startswith("print("):
                assert comment in printed
            elif re.fullmatch(r"\".*\"|True|False", comment):
                assert eval(call, names) == ast.literal_eval(comment), call
        if trainer := names.pop("trainer", None):
            trainer.args.max_steps = 1
            assert trainer.train().global_step == 1


@pytest.mark.parametrize("path", [*PAGES, *(ROOT / "gkd_trainer").rglob("*.py")], ids=lambda path: path.name)
def test_the_package_is_installed_from_a_clone_since_no_index_has_it(path):
    assert not re.search(r'pip install "?gkd[-_]trainer', path.read_text())


def test_anchors_are_those_of_github():
    of_migrating = anchors(ROOT / "docs" / "migrating.md")
    assert {"from-trls-gkdtrainer", "in-front-of-sfttrainer-or-your-own-trainer"} <= set(of_migrating)
    assert "formatting_func" in anchors(ROOT / "docs" / "data.md")
    assert "the-divergence-on-a-cpu" in anchors(ROOT / "docs" / "performance.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


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
