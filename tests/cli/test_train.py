"""`gkd-trainer train` as users call it: runs on tiny models, resumed runs, bad input."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM, LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from gkd_trainer.cli import main
from gkd_trainer.cli.train import require_model
from gkd_trainer.errors import GKDConfigError
from tests.cli.command import ROWS, exit_of, write_rows
from tests.serving import MAX_MODEL_LENGTH


def weights_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("options", [["--eval_split", "train[:1]"], ["--eval_dataset", "rows.jsonl"]])
def test_training_on_evaluation_rows_gives_a_warning(options, given_to_trainer, pair, data, tmp_path, caplog):
    own = [str(tmp_path / option) if option == "rows.jsonl" else option for option in options]
    given_to_trainer(*pair, *data, *own)
    assert "overlap: some rows are both trained on and evaluated on" in caplog.text


def test_a_broken_line_is_named_with_its_file(pair, data, rows_file, capsys):
    with rows_file.open("a") as file:
        file.write('{"prompt": "five and one is", "completion": }\n')
    code, error = exit_of(["train", *pair, *data], capsys)
    assert code == 1
    assert f"error: --dataset: {rows_file}, line 5 is not JSON: Expecting value, at column 45" in error


def test_a_broken_line_of_a_stream_is_named_too(pair, data, rows_file, capsys):
    with rows_file.open("a") as file:
        file.write("{")
    code, error = exit_of(["train", *pair, *data, "--streaming", "--save_strategy", "no"], capsys)
    assert code == 1
    assert f"error: --dataset: {rows_file}, line 5 is not JSON" in error


def test_a_run_trains_evaluates_and_saves_a_student_that_loads(pair, data, rows_file, tmp_path, capsys):
    main(["train", *pair, *data, "--eval_dataset", str(rows_file), "--learning_rate", "1e-2", "--save_strategy", "no"])
    before, after = weights_of(tmp_path / "student"), weights_of(tmp_path / "output")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert AutoTokenizer.from_pretrained(tmp_path / "output").eos_token == "<|im_end|>"
    results = json.loads((tmp_path / "output" / "all_results.json").read_text())
    assert {"train_loss", "eval_loss"} <= results.keys()
    history = json.loads((tmp_path / "output" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_loss" in entry for entry in history)  # for a report
    assert "***** eval metrics *****" in capsys.readouterr().out
    card = (tmp_path / "output" / "README.md").read_text()
    assert "`student`, distilled from `teacher` by generalised knowledge distillation" in card
    assert "| data | `rows.jsonl`, 4 rows |" in card
    assert str(tmp_path) not in card


def test_a_readme_by_the_user_is_kept(pair, data, tmp_path, caplog):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "README.md").write_text("Mine.\n")
    main(["train", *pair, *data, "--save_strategy", "no", "--max_steps", "1"])
    assert (tmp_path / "output" / "README.md").read_text() == "Mine.\n"
    assert "README.md with a model card" in caplog.text
    (tmp_path / "output" / "README.md").unlink()
    main(["train", *pair, *data, "--save_strategy", "no", "--max_steps", "1"])
    main(["train", *pair, *data, "--save_strategy", "no", "--max_steps", "1", "--beta", "0.125"])
    assert "| β | 0.125 (" in (tmp_path / "output" / "README.md").read_text()


def test_a_streamed_run_trains(pair, data, tmp_path):
    main(["train", *pair, *data, "--streaming", "--save_strategy", "no"])
    assert json.loads((tmp_path / "output" / "trainer_state.json").read_text())["global_step"] == 2


def test_a_lora_run_saves_an_adapter_that_loads(pair, data, tmp_path):
    lora = ["--use_peft", "--lora_r", "2", "--lora_alpha", "4", "--lora_target_modules", "all-linear"]
    main(["train", *pair, *data, *lora, "--save_strategy", "no"])
    assert not (tmp_path / "output" / "model.safetensors").exists()
    assert "LoRA adapter of rank 2" in (tmp_path / "output" / "README.md").read_text()
    config = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "output").peft_config["default"]
    assert (config.r, config.lora_alpha) == (2, 4)
    adapted = {name.rpartition(".")[2] for name in config.target_modules}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_adapter_of_an_encoder_decoder_is_saved_so_that_it_loads(pair, data, tiny_encoder_decoder, tmp_path):
    for name, seed in (("student", 0), ("teacher", 1)):
        tiny_encoder_decoder(seed=seed).save_pretrained(tmp_path / name)
    main(["train", *pair, *data, "--use_peft", "--lmbda", "0", "--save_strategy", "no", "--max_steps", "1"])
    assert AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "output").active_adapter == "default"


def test_an_adapter_on_the_hub_is_a_student_and_a_teacher(pair, tmp_path):
    stored = tmp_path / "hub" / "models--org--adapter"
    LoraConfig(base_model_name_or_path=pair[1]).save_pretrained(stored / "snapshots" / "1")
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("1")
    place = {"cache_dir": str(tmp_path / "hub"), "local_files_only": True, "dtype": "bfloat16"}
    require_model("model_name_or_path", "org/adapter", place, trust_remote_code=False)
    with pytest.raises(GKDConfigError, match=r"--teacher_model_name_or_path: expected a folder.*org/other"):
        require_model("teacher_model_name_or_path", "org/other", place, trust_remote_code=False)


def test_an_adapters_folder_whose_model_does_not_exist_exits_1_with_one_message(pair, data, tmp_path, capsys):
    LoraConfig(base_model_name_or_path=str(tmp_path / "nowhere")).save_pretrained(tmp_path / "adapter")
    code, error = exit_of(["train", "--model", tmp_path / "adapter", *pair[2:], *data, "--use_peft"], capsys)
    assert code == 1
    assert "nowhere" in error.partition("gkd-trainer train: error: ")[2]


def test_a_run_from_a_served_teacher_names_no_teacher_model(vllm_server, served_dir, data, tmp_path):
    served = ["--model", str(served_dir), "--teacher_server_base_url", vllm_server.base_url, "--teacher_top_k", "16"]
    served += ["--max_length", str(MAX_MODEL_LENGTH - 1)]
    main(["train", *served, *data, "--output_dir", str(tmp_path / "output"), "--logging_steps", "1"])
    state = json.loads((tmp_path / "output" / "trainer_state.json").read_text())
    assert 0 < state["log_history"][0]["teacher_top_k_mass"] < 1
    card = (tmp_path / "output" / "README.md").read_text()
    assert f"| teacher | `{served_dir.name}`, served at `{vllm_server.base_url}` |" in card
    assert "| compared tokens | the teacher's 16 most probable, one bucket for the rest |" in card
    assert str(served_dir) not in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--teacher_server_base_url", "127.0.0.1:8001"],
            "teacher_server_base_url must be a URL that starts with http:// or https://",
        ),
        (["--teacher_server_base_url", "http://127.0.0.1:1"], "the vLLM server at http://127.0.0.1:1 did not complete"),
        (
            ["--teacher_server_base_url", "http://127.0.0.1:1", "--teacher_model_init_kwargs", "{}"],
            "teacher_model_init_kwargs is for loading a teacher by name",
        ),
        (
            ["--teacher_server_base_url", "http://127.0.0.1:1", "--teacher", "nowhere"],
            "got both teacher_server_base_url and teacher_model_name_or_path",
        ),
    ],
)
def test_a_served_teacher_that_cannot_be_used_exits_1_with_one_message(options, message, pair, data, capsys):
    student = [*pair[:2], *pair[4:]]
    code, error = exit_of(["train", *student, *data, "--vllm_server_timeout", "0.1", *options], capsys)
    assert code == 1
    assert message in error.partition("gkd-trainer train: error: ")[2]


def test_a_teacher_among_several_that_does_not_exist_is_named(pair, data, capsys):
    options = ["--teachers", json.dumps({"math": pair[3], "code": "nowhere"})]
    code, error = exit_of(["train", *pair[:2], *pair[4:], *data, *options], capsys)
    assert code == 1
    assert "--teachers: expected a folder with a model, or the name of one on the hub; got 'nowhere'" in error


@pytest.mark.parametrize("source", ["true", "folder"])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(source, pair, data, tmp_path):
    options = [*pair, *data, "--save_steps", "1", "--learning_rate", "1e-2", "--per_device_train_batch_size", "2"]
    main(["train", *options])
    unbroken = weights_of(tmp_path / "output")
    (tmp_path / "output" / "model.safetensors").unlink()
    (tmp_path / "output" / "checkpoint-2").rename(tmp_path / "aside")
    checkpoint = str(tmp_path / "output" / "checkpoint-1") if source == "folder" else "true"
    main(["train", *options, "--resume_from_checkpoint", checkpoint])
    resumed = weights_of(tmp_path / "output")
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
    first = weights_of(tmp_path / "output" / "checkpoint-1")
    assert any(not torch.equal(first[name], resumed[name]) for name in first)


@pytest.mark.parametrize("config", ["[]", "7", '{"model_type": 3}', "{"])
def test_a_model_whose_config_is_none_is_named_without_a_traceback(config, pair, data, tmp_path, capsys):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(config)
    code, error = exit_of(["train", *pair, *data, "--model", str(tmp_path / "odd")], capsys)
    assert code == 1
    assert "error: --model_name_or_path: expected a folder with a model" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--beta", "1.5"], "beta must be in [0, 1]"),
        (["--dataset", "nowhere.jsonl"], "--dataset: there is no file nowhere.jsonl"),
        (["--dataset", __file__], "expected a file that ends in .json, .jsonl, .parquet, .csv"),
        (["--dataset", "nobody/nothing"], "--dataset: could not load the split 'train' of nobody/nothing"),
        (["--train_split", "train[:x]"], "--dataset: could not load the split 'train[:x]'"),
        (["--model", "./nowhere"], "--model_name_or_path: expected a folder with a model"),
        (["--teacher", "nobody/nothing"], "--teacher_model_name_or_path: expected a folder with a model"),
        (["--streaming", "--max_steps", "-1"], "set max_steps"),
        (["--eval_strategy", "steps"], "set eval_dataset or eval_split"),
        (["--dataset_config", "main"], "dataset_config=main has no effect on a file"),
        (["--dataset", "rows*.jsonl"], "--dataset: there is no file rows*.jsonl, and patterns are not expanded"),
        (["--eval_dataset", "data/*"], "--eval_dataset: there is no file data/*, and patterns are not expanded"),
        (["--lora_r", "8"], "lora_r has no effect without use_peft"),
        (["--use_peft", "--lora_dropout", "0.1"], "lora_dropout=0.1 has no effect while disable_dropout is on"),
        (["--resume_from_checkpoint", "true"], "no folder of the form checkpoint-STEP in"),
        (["--resume_from_checkpoint", "nowhere"], "the checkpoint nowhere: there is no such folder"),
        (["--load_best_model_at_end"], "--load_best_model_at_end requires the save and eval strategy to match"),
        (["--max_length", "5"], "none of the 4 rows can be used"),
        (["--report_to", "nosuch"], "nosuch is not supported"),
        (["--output_dir", __file__], f"File exists: '{__file__}'"),
    ],
)
def test_bad_input_exits_1_with_one_message(options, message, pair, data, capsys):
    code, error = exit_of(["train", *pair, *data, *options], capsys)
    assert code == 1
    _, separator, told = error.partition("gkd-trainer train: error: ")
    assert separator
    assert message in told


def test_unread_columns_are_named_before_any_weights_are_loaded(pair, data, tmp_path, capsys, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("gkd_trainer.trainer.GKDTrainer", load)
    rows = write_rows(tmp_path / "unread.jsonl", [{"instruction": "Hi", "output": "Ho"}])
    code, error = exit_of(["train", *pair, *data, "--dataset", str(rows)], capsys)
    assert code == 1
    assert "--dataset: expected rows with `messages`" in error


def test_an_error_during_a_run_exits_1_and_says_how_to_resume(pair, data, tmp_path, capsys):
    teacher, tokenizer = (kind.from_pretrained(tmp_path / "teacher") for kind in (AutoModelForCausalLM, AutoTokenizer))
    tokens = [set(tokenizer(row["prompt"])["input_ids"]) for row in ROWS]
    of_one_row = tokens[3] - tokens[0] - tokens[1] - tokens[2]
    with torch.no_grad():
        teacher.get_input_embeddings().weight[sorted(of_one_row)] = torch.nan
    teacher.save_pretrained(tmp_path / "teacher")
    own = ["--lmbda", "0", "--per_device_train_batch_size", "1", "--max_steps", "4", "--save_steps", "1"]
    code, error = exit_of(["train", *pair, *data, *own], capsys)
    assert code == 1
    last = error.splitlines()[-1]
    assert last.startswith("gkd-trainer train: error: ")
    assert "the teacher's logits hold NaN" in last
    assert last.endswith("is saved: to resume from it, add --resume_from_checkpoint true")


def test_a_run_on_a_cpu_writes_nothing_to_stderr_but_its_progress(pair, data, tmp_path):
    own = [*pair, *data, "--train_split", "train[:2]", "--eval_split", "train[2:]", "--use_peft", "--save_steps", "1"]
    command = [sys.executable, "-m", "gkd_trainer", "train", *own, "--eval_strategy", "steps", "--eval_steps", "1"]
    # PEFT's own use of a name of before transformers 5.23, as in pyproject.toml.
    ignored = {"PYTHONWARNINGS": "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"}
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | ignored)
    assert result.returncode == 0, result.stderr
    lines = [line.strip() for line in re.split(r"[\r\n]|\x1b\[A", result.stderr)]
    progress = re.compile(r"[^|]*\d+%\|.*\|.*\[.*\]$|.*examples/s\]$")
    assert [line for line in lines if line and not progress.match(line)] == []
