"""The examples run as written, on the real small pair and a few problems in GSM8K's format."""

import importlib.util
import json
import re
import subprocess
import sys
import weakref
from pathlib import Path

import datasets
import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

from experiments.report import interval
from tests.vision import make_pair
from tests.vocabularies import sentencepiece_backend, sentencepiece_like

EXAMPLES = Path(__file__).parents[1] / "examples"

PROBLEMS = [
    ("Ann has 3 pens and buys 4 more. How many pens has she?", "She has 3 + 4 = <<3+4=7>>7 pens.\n#### 7"),
    ("A box holds 6 eggs. How many eggs are in 5 boxes?", "There are 5 * 6 = <<5*6=30>>30 eggs.\n#### 30"),
    ("Bo had $20 and spent $8. How much is left?", "He has 20 - 8 = $<<20-8=12>>12 left.\n#### 12"),
    ("Two trains carry 510 people each. How many in all?", "In all 2 * 510 = <<2*510=1020>>1,020.\n#### 1,020"),
]


@pytest.fixture
def gsm8k_dir(tmp_path, monkeypatch):
    """A folder with train.jsonl and test.jsonl."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    for split, problems in (("train", PROBLEMS), ("test", PROBLEMS[:2])):
        lines = [json.dumps({"question": question, "answer": answer}) for question, answer in problems]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def tiny_teacher_dir(tiny_model, byte_level, tmp_path):
    """A teacher with the tokenizer of `served_dir`."""
    folder = tmp_path / "teacher"
    tiny_model(hidden=48, seed=1).save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return folder


def loaded(name, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, example)  # where a class of it is pickled
    spec.loader.exec_module(example)
    return example


@pytest.fixture
def run(smollm2_dir, smollm2_student_dir, gsm8k_dir, tmp_path, monkeypatch, caplog):
    """Run an example's main for two steps; return the folder that it saved to. Later options win.

    It may set no option in vain.
    """

    def run_example(name, *options, teacher=("--teacher", smollm2_dir), data=("--data", gsm8k_dir)):
        example = loaded(name, monkeypatch)
        places = ["--student", smollm2_student_dir, *teacher, *data]
        output_dir = tmp_path / "output"
        small = ["--output_dir", output_dir, "--max_steps", 2, "--batch_size", 2]
        example.main([str(option) for option in (*places, *small, *options)])
        assert "have no effect" not in caplog.text
        return output_dir

    return run_example


def test_off_policy_example_lowers_the_divergence_that_it_prints(run, capsys):
    output_dir = run("off_policy_gsm8k", "--learning_rate", 5e-4, "--max_length", 96, "--num_eval", 2)
    before, after = re.search(r"(\d+\.\d+) before, (\d+\.\d+) after", capsys.readouterr().out).groups()
    assert float(after) < float(before)
    assert AutoModelForCausalLM.from_pretrained(output_dir).config.num_hidden_layers == 15


def test_on_policy_example_prints_completions_and_how_many_problems_were_solved(run, capsys):
    output_dir = run("on_policy_gsm8k", "--max_new_tokens", 8, "--num_eval", 2)
    printed = capsys.readouterr().out
    assert "Solved 0 of 2 test problems" in printed  # the pruned student writes no numbers yet
    assert "step 2" in printed.lower()
    assert (output_dir / "model.safetensors").exists()


@pytest.mark.vllm
@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_on_policy_example_generates_with_vllm(mode, run, capsys, request, served_dir, tiny_teacher_dir):
    options = ["--student", served_dir, "--vllm", mode, "--max_new_tokens", 8, "--num_eval", 2]
    if mode == "server":
        options += ["--vllm_server_base_url", request.getfixturevalue("vllm_server").base_url]
    run("on_policy_gsm8k", *options, teacher=("--teacher", tiny_teacher_dir))
    printed = capsys.readouterr().out
    assert re.search(r"Solved \d of 2 test problems", printed)
    assert "step 2" in printed.lower()


def test_server_teacher_example_prints_the_probability_of_the_top_tokens(run, capsys, vllm_server, served_dir):
    options = ["--student", served_dir, "--teacher_top_k", 32, "--max_new_tokens", 8]
    run("server_teacher", *options, teacher=("--teacher_url", vllm_server.base_url))
    masses = re.findall(r"step (\d): teacher (\d\.\d+), student (\d\.\d+)", capsys.readouterr().out)
    assert [step for step, _, _ in masses] == ["1", "2"]
    assert all(0 < float(teacher) < 1 and 0 < float(student) < 1 for _, teacher, student in masses)


def test_other_vocabulary_example_prints_how_much_was_compared(run, capsys, tiny_model, tmp_path):
    tokenizer = sentencepiece_like(sentencepiece_backend())
    tiny_model(vocab=len(tokenizer)).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    run("other_vocabulary", "--max_new_tokens", 8, teacher=("--teacher", tmp_path / "other"))
    shares = re.findall(r"step (\d): loss \d+\.\d+, compared (\d\.\d+)", capsys.readouterr().out)
    assert [step for step, _ in shares] == ["1", "2"]
    assert all(0.5 < float(share) <= 1 for _, share in shares)


def test_cached_example_prints_the_size_of_the_cache_and_trains_from_it(run, capsys):
    output_dir = run("cached_teacher", "--learning_rate", 5e-4, "--max_length", 96, "--num_train", 3)
    printed = capsys.readouterr().out
    assert re.search(r"\d+ tokens in \d\.\d MB", printed)
    assert re.search(r"Forward KL per token: \d+\.\d+ in the first step, \d+\.\d+ in the last", printed)
    assert (output_dir / "cache" / "manifest.json").exists()
    assert (output_dir / "model.safetensors").exists()


def test_hidden_server_teacher_example_prints_the_divergence_over_all_tokens(run, capsys, hidden_server, served_dir):
    teacher = ("--teacher", served_dir, "--teacher_url", hidden_server.base_url)
    run(
        "hidden_server_teacher",
        "--student",
        served_dir,
        "--max_new_tokens",
        8,
        "--learning_rate",
        1e-3,
        teacher=teacher,
    )
    printed = capsys.readouterr().out
    assert "The server sent float32 hidden states for 368 tokens" in printed
    divergences = [float(value) for value in re.findall(r"step \d: (-?\d\.\d+)", printed)]
    assert divergences[0] == 0.0  # student and teacher are one model before the first update
    assert len(divergences) == 2


def test_lora_example_saves_only_the_adapter_and_generates_with_it(run, capsys):
    output_dir = run("lora_student", "--max_new_tokens", 8, "--rank", 4)
    assert (output_dir / "adapter_model.safetensors").exists()
    assert not (output_dir / "model.safetensors").exists()
    answer = capsys.readouterr().out.partition("The student with its adapter:")[2]
    assert answer.strip()


def test_draft_model_example_prints_acceptance_and_tokens_per_forward(run, capsys):
    options = ["--max_new_tokens", 8, "--num_eval", 2, "--num_assisted", 1, "--learning_rate", 5e-4, "--lmbda", 0]
    run("draft_model", *options)
    found = re.findall(r"^(.*): (\S+) before, (\S+) after$", capsys.readouterr().out, re.MULTILINE)
    printed = {name: (float(before), float(after)) for name, before, after in found}
    before, after = printed["acceptance"]
    assert before < after
    assert all(1 <= rate <= 5 for rate in printed["tokens per forward of the teacher"])


@pytest.mark.parametrize("padding", [-3, 8])
def test_draft_model_example_saves_a_head_of_the_teachers_size(run, capsys, tiny_model, byte_level, tmp_path, padding):
    folders = {"student": tmp_path / "small", "teacher": tmp_path / "large"}
    used = max(byte_level().get_vocab().values()) + 1
    for name, vocab in (("student", used + 3), ("teacher", used + 3 + padding)):
        tiny_model(vocab=vocab, seed=vocab).save_pretrained(folders[name])
        byte_level().save_pretrained(folders[name])
    options = ["--student", folders["student"], "--max_new_tokens", 8, "--num_eval", 2, "--num_assisted", 1]
    options += ["--lmbda", 0, "--divergence", "total_variation"]
    output_dir = run("draft_model", *options, teacher=("--teacher", folders["teacher"]))
    saved = AutoModelForCausalLM.from_pretrained(output_dir)
    assert saved.config.vocab_size == len(saved.get_output_embeddings().weight) == used + 3 + padding
    assert "tokens per forward of the teacher" in capsys.readouterr().out


def test_gsm8k_experiment_adds_a_line_per_arm_and_goes_on_where_it_stopped(run, capsys, served_dir, tiny_teacher_dir):
    teacher = ("--teacher", tiny_teacher_dir)
    options = ["--student", served_dir, "--seeds", 1, "--num_eval", 2, "--max_new_tokens", 4]
    output_dir = run("gsm8k_experiment", *options, "--arms", "sft", "own-1", teacher=teacher)
    lines = (output_dir / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["arm"] for line in lines] == ["teacher", "start", "sft", "own-1"]
    with (output_dir / "results.jsonl").open("a") as file:
        file.write('{"arm": "fresh-0", "seed": 0, "opt\n')  # as a kill leaves it
    run("gsm8k_experiment", *options, "--arms", "own-1", "fresh-0", teacher=teacher)
    longer = (output_dir / "results.jsonl").read_text().splitlines()
    assert longer[:4] == lines
    assert [json.loads(line)["arm"] for line in longer[5:]] == ["fresh-0"]
    measured = [json.loads(line) for line in (*lines, longer[5])]
    assert {line["options"]["max_steps"] for line in measured} == {2}
    assert len({line["acceptance"] for line in measured}) == 5  # the teacher's is 1, and three are trained differently
    assert {len(line["solved"]) for line in measured} == {2}
    assert all(0 < line["length"] <= 4 and 0 <= line["cut"] <= 1 for line in measured)
    assert "fresh-0" in capsys.readouterr().out


def test_gsm8k_experiment_compares_on_policy_with_both_controls(capsys, monkeypatch):
    example = loaded("gsm8k_experiment", monkeypatch)
    others = dict.fromkeys(("length", "cut", "agreement", "acceptance", "seconds"), 1.0)
    lines = [
        {"arm": arm, "seed": seed, "solved": [True, seed == 0, is_solved, False], **others}
        for arm, is_solved in (("own-0.5", True), ("fresh-0.5", False), ("fixed-0.5", True))
        for seed in range(2)
    ]
    example.print_tables(lines)
    printed = " ".join(capsys.readouterr().out.split())
    assert "│ own-0.5 │ 2 │ 0.625 │" in printed
    assert "own-0.5 − fixed-0.5 │ 2 │ +0.000 │ +0.000 to +0.000" in printed
    assert re.search(r"own-0.5 − fresh-0.5 │ 2 │ \+0.250 │ \+0.000 to \+0.[567]", printed)


@pytest.mark.parametrize("n_seeds", [1, 2, 3, 5, 30])
def test_gsm8k_experiment_has_the_intervals_of_the_experiments(n_seeds, monkeypatch):
    differences_SP = np.random.default_rng(n_seeds).normal(0.1, 1.0, size=(n_seeds, 7)) + np.arange(n_seeds)[:, None]
    own = loaded("gsm8k_experiment", monkeypatch).interval(differences_SP)
    assert own == pytest.approx(interval(differences_SP), rel=1e-6)


def test_gsm8k_experiment_neither_skips_nor_prints_an_arm_with_other_options(run, capsys, served_dir, tiny_teacher_dir):
    options = ["--student", served_dir, "--seeds", 1, "--num_eval", 2, "--max_new_tokens", 4]
    teacher = ("--teacher", tiny_teacher_dir)
    run("gsm8k_experiment", *options, "--arms", "sft", teacher=teacher)
    capsys.readouterr()
    output_dir = run("gsm8k_experiment", *options, "--arms", "fixed-0", "--max_steps", 1, teacher=teacher)
    printed = capsys.readouterr().out
    assert "fixed-0" in printed
    assert "sft" not in printed
    run("gsm8k_experiment", *options, "--arms", "sft", "--max_steps", 1, teacher=teacher)
    lines = [json.loads(line) for line in (output_dir / "results.jsonl").read_text().splitlines()]
    trained = [(line["arm"], line["options"]["max_steps"]) for line in lines if line["arm"] not in ("teacher", "start")]
    assert trained == [("sft", 2), ("fixed-0", 1), ("sft", 1)]


@pytest.mark.vllm
def test_gsm8k_experiment_closes_the_engine_of_each_arm(run, caplog, monkeypatch, served_dir, tiny_teacher_dir):
    # Without those of other tests.
    monkeypatch.setattr("gkd_trainer.rollouts.vllm_colocate._LIVE_ENGINES", weakref.WeakSet())
    options = ["--student", served_dir, "--seeds", 1, "--num_eval", 2, "--max_new_tokens", 4, "--vllm"]
    run("gsm8k_experiment", *options, "--arms", "own-0", "own-1", teacher=("--teacher", tiny_teacher_dir))
    assert "already has a vLLM engine" not in caplog.text


def test_seq2seq_example_generates_answers_and_lowers_the_divergence(
    run, capsys, tiny_encoder_decoder, byte_level, tmp_path
):
    for name, hidden in (("small", 32), ("large", 48)):
        tiny_encoder_decoder("t5_untied", hidden=hidden, seed=hidden).save_pretrained(tmp_path / name)
        byte_level(None).save_pretrained(tmp_path / name)
    options = ["--student", tmp_path / "small", "--learning_rate", 0.05, "--max_new_tokens", 8, "--num_eval", 2]
    output_dir = run("seq2seq", *options, teacher=("--teacher", tmp_path / "large"))
    printed = capsys.readouterr().out
    before, after = re.search(r"eval_loss: (\d+\.\d+) before, (\d+\.\d+) after", printed).groups()
    assert float(after) < float(before)
    assert "eval_accuracy: 0.0000 before" in printed
    assert AutoModelForSeq2SeqLM.from_pretrained(output_dir).config.num_layers == 2


def test_images_example_lowers_the_divergence_on_held_out_pictures(run, capsys, tmp_path):
    pair = make_pair("llava")
    for name in ("student", "teacher"):
        getattr(pair, name).save_pretrained(tmp_path / name)
        pair.processor.save_pretrained(tmp_path / name)
    options = ["--student", tmp_path / "student", "--learning_rate", 3e-3, "--max_new_tokens", 6, "--max_steps", 4]
    output_dir = run(
        "images",
        *options,
        "--num_train",
        8,
        "--num_eval",
        3,
        "--size",
        16,
        teacher=("--teacher", tmp_path / "teacher"),
        data=(),
    )
    before, after = re.search(r"eval_loss: (\d+\.\d+) before, (\d+\.\d+) after", capsys.readouterr().out).groups()
    assert float(after) < float(before)
    assert AutoModelForImageTextToText.from_pretrained(output_dir).config.model_type == "llava"


def test_several_teachers_example_lowers_the_divergence_from_each(run, capsys, served_dir, tiny_teacher_dir):
    teachers = ("--math_teacher", tiny_teacher_dir, "--chat_teacher", tiny_teacher_dir)
    options = ["--student", served_dir, "--learning_rate", 3e-3, "--max_length", 64, "--num_eval", 2]
    run("several_teachers", *options, teacher=teachers)
    printed = re.findall(r"the (\w+) teacher: (\d+\.\d+) before, (\d+\.\d+) after", capsys.readouterr().out)
    assert [name for name, _, _ in printed] == ["math", "chat"]
    assert all(float(after) < float(before) for _, before, after in printed)


@pytest.mark.parametrize("source", ["base", "ema"])
def test_self_teacher_example_saves_an_adapter_and_prints_divergences(run, capsys, source):
    output_dir = run("self_teacher", "--max_new_tokens", 8, "--rank", 4, "--source", source, teacher=())
    assert (output_dir / "adapter_model.safetensors").exists()
    printed = capsys.readouterr().out.partition("from itself with the solution:")[2]
    divergences = [float(number) for number in re.findall(r"step \d: (\d+\.\d+)", printed)]
    assert len(divergences) == 2
    assert min(divergences) > 0.001


def test_demo_measures_each_stage_and_a_control_and_writes_its_picture(smollm2_pair, tmp_path):
    places = ["--pair", smollm2_pair[0].parent, "--output", tmp_path]
    # The first step of each run has a learning rate of zero.
    small = ["--off-policy-steps", 2, "--further-steps", 2, "--held-out", 2, "--shown", 1, "--max-new-tokens", 8]
    command = [sys.executable, EXAMPLES / "demo.py", *places, *small]
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    measured = json.loads((tmp_path / "demo.json").read_text())
    stages, curves = measured["stages"], measured["curves"]
    assert list(stages) == ["before", "off-policy", "then λ = 0.5", "then λ = 0"]
    assert len({tuple(stage.values()) for stage in stages.values()}) == 4
    steps = {name: [step for step, _ in curve] for name, curve in curves.items()}
    assert steps == {"off-policy": [0, 1, 2], "then λ = 0.5": [2, 3, 4], "then λ = 0": [2, 3, 4]}
    # Both continue from the same student.
    assert curves["off-policy"][-1] == curves["then λ = 0.5"][0] == curves["then λ = 0"][0]
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    printed = " ".join(finished.stdout.split())
    assert printed.count("student, then λ = 0.5") == 1
    assert "both continue from the second for 2 steps" in printed
    assert (tmp_path / "student" / "model.safetensors").exists()
