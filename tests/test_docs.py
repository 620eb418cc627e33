"""The documentation matches the code, and its Python runs as written."""

import ast
import dataclasses
import inspect
import json
import math
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import datasets
import pytest
import torch

from gkd_trainer import GKDArguments, GKDConfig, VLLMServerTeacher
from gkd_trainer.cli.train_options import parse
from gkd_trainer.divergence import token_divergence
from gkd_trainer.divergence.objective import DIVERGENCES
from gkd_trainer.divergence.workspace import CPU_WORKSPACE_MB, CUDA_WORKSPACE_MB, WORKSPACE_MB
from gkd_trainer.report.interval import MAX_STEPS
from gkd_trainer.report.metrics import SAMPLE_SUMS, TOKEN_SUMS, EvaluationMeter, TrainingMeter
from tests.vision import make_pair

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")])

CONVERSATION = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found = []
    for heading in re.findall(r"^#+ +(.*?) *#*$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\]\(.*?\)", "", heading.lower())).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return found


PLAIN_OPTIONS = {"model_init_kwargs", "trust_remote_code", "dataset_num_proc", "dataset_kwargs"}
PLAIN_OPTIONS |= {"logging_steps", "logging_nan_inf_filter"}
OWN_OPTIONS = [
    *dataclasses.fields(GKDArguments),
    *(option for option in dataclasses.fields(GKDConfig) if option.name in PLAIN_OPTIONS),
]


def test_options_page_lists_every_option_with_its_default():
    listed = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", (ROOT / "docs" / "options.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted((option.name, repr(option.default)) for option in OWN_OPTIONS)


def default_of(function, name):
    return inspect.signature(function).parameters[name].default


def test_options_page_repeats_the_help_of_each_option():
    rows = re.findall(r"^\| `(\w+)` \| `.*?` \| (.*) \|$", (ROOT / "docs" / "options.md").read_text(), re.MULTILINE)
    expected = {}
    for option in OWN_OPTIONS:
        choices = option.metadata.get("choices")
        listed = f" One of {', '.join(f'`{choice!r}`' for choice in choices)}." if choices else ""
        expected[option.name] = option.metadata["help"] + listed
    assert dict(rows) == expected


# The numbers that a help text calls a default, from where the code has them.
DEFAULTS_IN_HELP = {
    "logging_steps": [float(MAX_STEPS)],
    "loss_workspace_mb": [CPU_WORKSPACE_MB, CPU_WORKSPACE_MB, CUDA_WORKSPACE_MB, WORKSPACE_MB],
    "teacher_top_k": [default_of(VLLMServerTeacher.__init__, "top_k")],
}


def test_numbers_that_a_help_text_calls_defaults_are_those_of_the_code():
    found = {}
    for option in OWN_OPTIONS:
        sentences = re.findall(r"by default[^.;]*", option.metadata["help"], re.IGNORECASE)
        numbers = [float(number) for sentence in sentences for number in re.findall(r"\b\d[\d.]*\b", sentence)]
        if numbers:
            found[option.name] = numbers
    assert found == DEFAULTS_IN_HELP


def test_numbers_that_other_prose_calls_defaults_are_those_of_the_code():
    migrating = (ROOT / "docs" / "migrating.md").read_text()
    config = {option.name: option.default for option in OWN_OPTIONS}
    assert f"the defaults of `GKDConfig`: λ = {config['lmbda']}, β = {config['beta']}" in migrating
    assert f"| `temperature` | 0.9 by default | {config['temperature']} by default" in migrating
    assert f"`loss_temperature`, {config['loss_temperature']} by default" in migrating
    assert f"| unset `max_new_tokens` | {config['max_new_tokens']}, for which a `max_length` of 128 or" in migrating
    docstring = " ".join((token_divergence.__doc__ or "").split())
    of_cuda = f"a 24th of the memory on CUDA ({CPU_WORKSPACE_MB} to {CUDA_WORKSPACE_MB})"
    assert f"None for {CPU_WORKSPACE_MB} on the CPU, {of_cuda}, and {WORKSPACE_MB} elsewhere" in docstring


def test_divergence_page_has_a_line_for_each_divergence():
    rows = re.findall(
        r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \|$", (ROOT / "docs" / "divergence.md").read_text(), re.MULTILINE
    )
    expected = []
    for name, divergence in DIVERGENCES.items():
        options = [
            f"{option} in (0, {'∞' if math.isinf(number.below) else f'{number.below:g}'}), {number.default:g}"
            for option, number in divergence.options.items()
        ]
        expected.append((name, divergence.formula, "; ".join(options) or "none", divergence.source or "none"))
    assert rows == expected


@pytest.fixture
def hub(tmp_path, monkeypatch, tiny_model, tiny_encoder_decoder, byte_level):
    """A working directory in which the documentation's names of models and datasets are folders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # Padded differently, as the heads of these two are.
    larger = {"hidden": 48, "vocab": 384, "seed": 1}
    sizes = {"Qwen/Qwen2.5-0.5B-Instruct": {}, "Qwen/Qwen2.5-7B-Instruct": larger, "draft": {}}
    for name, size in sizes.items():
        tiny_model("qwen2", **size).save_pretrained(tmp_path / name)
        byte_level().save_pretrained(tmp_path / name)
    for name, size in {"google/flan-t5-small": {}, "google/flan-t5-xl": {"hidden": 48, "seed": 1}}.items():
        tiny_encoder_decoder(**size).save_pretrained(tmp_path / name)
        byte_level(None).save_pretrained(tmp_path / name)
    (tmp_path / "trl-lib" / "Capybara").mkdir(parents=True)
    pair = make_pair("llava")
    for name, model in (("llava-1.5-7b-hf", pair.student), ("llava-1.5-13b-hf", pair.teacher)):
        for part in (model, pair.processor):
            part.save_pretrained(tmp_path / "llava-hf" / name)
    lines = [json.dumps(CONVERSATION)] * 8
    (tmp_path / "trl-lib" / "Capybara" / "train.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_of_a_page_runs_its_trainers_train_and_its_comments_are_true(page, hub, capsys, monkeypatch):
    # A block may go on from those before: all are one module, which can be found where a class in it is pickled.
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    names = vars(module)
    for block in blocks(page, "python"):
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
    sums = [2.0 if name in ("tokens", "divergence") else 1.0 for name in TOKEN_SUMS]
    meter.add_tokens(torch.tensor([sums, sums], dtype=torch.float64))
    meter.add_samples(**dict.fromkeys(SAMPLE_SUMS, 1.0))
    meter.add_router_loss(torch.tensor(1.0))
    with meter.measure("rollout"), meter.measure("step"):
        pass
    logged = meter.read(lambda sums: sums)
    assert len(logged) == 24
    for metric in logged:
        assert f"`{metric}`" in page, metric


def test_metrics_page_names_what_an_evaluation_gives():
    page = (ROOT / "docs" / "metrics.md").read_text()
    meter = EvaluationMeter()
    meter.add(torch.ones(2, len(TOKEN_SUMS), dtype=torch.float64), torch.tensor(1.0), lambda sums: sums)
    measured = meter.read()
    assert len(measured) == 10
    for metric in measured:
        assert f"`eval_{metric}`" in page, metric


def commands(page):
    """The arguments of a page's `gkd-trainer train` commands, but for those that read a file."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").split("\n")
    command = re.compile(r"^(?:[A-Z_]+=\S* )*gkd-trainer train ")
    calls = [shlex.split(command.sub("", line), comments=True) for line in lines if command.match(line)]
    return [call for call in calls if "--config" not in call]


RUNS = [
    *((page, arguments) for page in PAGES for arguments in commands(page)),
    *((page, text) for page in PAGES for text in blocks(page, "yaml")),
]


@pytest.mark.parametrize(("page", "run"), RUNS, ids=lambda value: value.name if isinstance(value, Path) else "")
def test_options_of_a_page_are_accepted_by_the_command(page, run, tmp_path):
    if isinstance(run, str):
        (tmp_path / "run.yaml").write_text(run)
        run = ["--config", str(tmp_path / "run.yaml")]
    # A page may be about GPUs.
    parse([*run, "--bf16", "false", "--optim", "adamw_torch"])


def test_pages_have_commands_and_configurations():
    assert len(RUNS) >= 10


def messages_of_the_package():
    """All strings of the package but docstrings, as their constant parts, joined."""
    parts = []
    for path in (ROOT / "gkd_trainer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts.append("…".join(part.value for part in node.values if isinstance(part, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts.append(re.sub(r"%\w", "…", node.value))
    return parts


def test_messages_on_the_troubleshooting_page_are_those_of_the_package():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    symptoms = re.findall(r"^\| (.*?) \| .*? \| .*? \|$", page, re.MULTILINE)
    quoted = [quote for symptom in symptoms for quote in re.findall(r"`(.*?)`", symptom) if " " in quote]
    assert len(quoted) > 30
    known = "\n".join(messages_of_the_package())
    for quote in quoted:
        for part in quote.split("…"):
            assert part.strip() in known, quote
