"""The card of a student: what it names, and what it leaves out."""

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers.modelcard import TrainingSummary

from gkd_trainer import GKDConfig
from gkd_trainer.report.model_card import distillation_card, is_on_hub, public_name

STRANGE = [
    "a: b",
    "- x",
    "'\"",
    "a\n---\nb",
    "{{ 1 / 0 }}",
    "# x",
    "a|b`c`",
    "[x](http://y)",
    "<script>",
    "&a *a",
    "é ‖",
]


def card(summary=None, **options):
    facts = {"student": "org/student", "teacher": "org/teacher", **options}
    args = GKDConfig(output_dir="unused", **facts.pop("config", {}))
    return distillation_card(TrainingSummary(**{"model_name": "my-student", **(summary or {})}), args=args, **facts)


def cell(text, name):
    [line] = [line for line in str(text).splitlines() if line.startswith(f"| {name} |")]
    return line.removeprefix(f"| {name} | ").removesuffix(" |")


def test_a_card_names_method_models_data_and_options():
    text = card(
        {"dataset": "org/data", "hyperparameters": {"learning_rate": 1e-3}, "eval_results": {"Loss": 0.123456}},
        config={"beta": 0.25, "lmbda": 0.75, "loss_temperature": 2.0, "max_new_tokens": 99, "top_p": 0.9},
        n_rows=12,
    )
    summary = "[org/student](https://huggingface.co/org/student), distilled from [org/teacher]"
    assert summary in str(text)
    assert "generalised knowledge distillation" in cell(text, "method")
    assert cell(text, "student").endswith("(https://huggingface.co/org/student), all weights")
    assert cell(text, "data") == "[org/data](https://huggingface.co/datasets/org/data), 12 rows"
    assert cell(text, "β").startswith("0.25 (0 is forward KL(teacher‖student), 1 is reverse KL(student‖teacher)")
    assert cell(text, "λ").startswith("0.75 (share of samples that the student generates")
    assert cell(text, "loss temperature") == "2.0"
    assert cell(text, "completions") == "by transformers, at most 99 tokens, top_p 0.9"
    assert "- learning_rate: 0.001" in str(text)
    assert "- Loss: 0.1235" in str(text)
    assert "eprint        = {2306.13649}" in str(text)


@pytest.mark.parametrize(
    ("config", "name", "start"),
    [
        ({"beta": 0.0}, "divergence", "forward KL(teacher‖student)"),
        ({"beta": 1.0}, "divergence", "reverse KL(student‖teacher)"),
        ({"divergence_scale": "continuous"}, "divergence", "generalised Jensen-Shannon divergence, divided by β(1−β)"),
        ({"divergence": "skew_kl", "divergence_options": {"alpha": 0.2}}, "divergence", "skew kl with alpha = 0.2"),
        ({"lmbda": 0.0, "lmbda_end": 1.0, "lmbda_schedule": "linear"}, "λ", "0.0 → 1.0, linear over the run (share"),
        ({"ce_weight": 0.1}, "cross-entropy weight", "0.1"),
        ({"use_vllm": True}, "completions", "by vLLM, at most 128 tokens"),
    ],
)
def test_options_are_shown_as_they_are(config, name, start):
    assert cell(card(config=config), name).startswith(start)


@pytest.mark.parametrize(
    ("mode", "top_k", "divergence", "compared"),
    [
        ("matched", None, "generalised Jensen-Shannon divergence", "those with the same bytes in both tokenizers, one"),
        ("matched", 8, "generalised Jensen-Shannon divergence", "the teacher's 8 most probable that the student has"),
        ("next_byte", None, "generalised Jensen-Shannon divergence", "all, by their first byte"),
        ("gold", None, "generalised Jensen-Shannon divergence, and the sum of the differences", "those with the same"),
        ("uld", None, "sum of the differences between sorted probabilities (ULD)", "all, by their sorted"),
    ],
)
def test_a_teacher_with_another_tokenizer_is_shown_as_it_was_compared(mode, top_k, divergence, compared):
    text = card(vocabulary_mode=mode, teacher_top_k=top_k)
    assert cell(text, "divergence").startswith(divergence)
    assert cell(text, "compared tokens").startswith(compared)
    assert ("| β |" in str(text)) == (mode != "uld")


@pytest.mark.parametrize("name", ["β", "cross-entropy weight", "completions"])
def test_options_without_effect_on_a_run_are_left_out(name):
    text = card(config={"divergence": "total_variation", "lmbda": 0.0})
    assert f"| {name} |" not in str(text)


def test_a_teacher_behind_servers_is_named_without_credentials():
    urls = ["https://user:secret@gpu.example:8001", "http://127.0.0.1:8002/?key=secret"]
    text = card(teacher="org/teacher", teacher_urls=urls, teacher_top_k=64)
    assert cell(text, "teacher").endswith("served at `https://gpu.example:8001`, `http://127.0.0.1:8002`")
    assert cell(text, "compared tokens") == "the teacher's 64 most probable, one bucket for the rest"
    assert "secret" not in str(text)


def test_an_adapter_is_named_with_its_rank():
    assert cell(card(adapter=LoraConfig(r=7)), "student").endswith("LoRA adapter of rank 7")


def test_only_the_last_part_of_a_path_is_shown(tmp_path):
    (tmp_path / "student").mkdir()
    text = str(
        card({"dataset": str(tmp_path / "rows.jsonl")}, student=str(tmp_path / "student"), teacher="/no/where/t")
    )
    assert "`student`, distilled from `t` by" in text
    assert cell(text, "data") == "`rows.jsonl`"
    assert str(tmp_path) not in text
    assert "/no/where" not in text


def test_a_name_that_is_a_folder_here_is_not_linked_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "student").mkdir(parents=True)
    assert not is_on_hub("models/student")
    assert is_on_hub("models/teacher")


@pytest.mark.parametrize("name", STRANGE)
def test_no_name_breaks_the_metadata_or_the_table(name, tmp_path):
    text = card(
        {"model_name": name, "dataset": name, "tags": [name], "license": name, "hyperparameters": {"x": name}},
        student=name,
        teacher=name,
        teacher_urls=["http://127.0.0.1:1"],
    )
    text.save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert (loaded.data.tags, loaded.data.license) == ([name], name)
    lines = str(text).splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == len([line for line in lines if line[-2:] == " |"])
    assert cell(text, "data").count("`") == 2
    assert "\n---\n" not in loaded.text


@pytest.mark.parametrize(
    "name", ["rows.jsonl?token=canary", "https://host/rows.jsonl?sig=canary", "https://user:canary@host/rows.jsonl"]
)
def test_the_name_of_a_file_shows_no_secret(name):
    assert public_name(name).startswith("rows.jsonl")
    assert "canary" not in public_name(name)
