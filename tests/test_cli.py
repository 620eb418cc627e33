"""`gkd-trainer train` as a user calls it: options and YAML, data of every kind, runs on tiny models, bad input."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from gkd_trainer import GKDConfig
from gkd_trainer.cli import _checkpoint, _parse_train, main
from gkd_trainer.config import Unset
from tests.serving import MAX_MODEL_LENGTH

ROWS = [{"prompt": f"{word} and one is", "completion": f" {word} one"} for word in ("one", "two", "three", "four")]


@pytest.fixture(autouse=True)
def _own_dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def pair(tmp_path, tiny_model, byte_level):
    """The options that name a student, a wider teacher and the output folder."""
    tokenizer = byte_level()
    for name, hidden, seed in (("student", 32, 0), ("teacher", 48, 1)):
        tiny_model(hidden=hidden, seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    paths = {"--model": "student", "--teacher": "teacher", "--output_dir": "output"}
    return [text for option, name in paths.items() for text in (option, str(tmp_path / name))]


@pytest.fixture
def rows_file(tmp_path):
    """A JSON-lines file of four rows."""
    return write_rows(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def data(rows_file):
    """The options that name a data set and keep a run short."""
    return ["--dataset", str(rows_file), "--max_new_tokens", "4", "--max_steps", "2", "--report_to", "none"]


@pytest.fixture
def given_to_trainer(monkeypatch):
    """Run main up to the trainer, and return what the trainer is given."""
    given = {}

    class TrainerReachedError(Exception):
        pass

    def record(model, args, **kwargs):
        given.update(model=model, args=args, **kwargs)
        raise TrainerReachedError

    def run(*argv):
        monkeypatch.setattr("gkd_trainer.trainer.GKDTrainer", record)
        with pytest.raises(TrainerReachedError):
            main(["train", *map(str, argv)])
        return given

    return run


def write_rows(path, rows):
    dataset = Dataset.from_list(rows)
    {".csv": dataset.to_csv, ".parquet": dataset.to_parquet}.get(path.suffix, dataset.to_json)(str(path))
    return path


def write_yaml(path, **options):
    path.write_text(yaml.safe_dump(options))
    return path


def exit_of(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in argv])
    return stopped.value.code, capsys.readouterr().err


def weights_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_help_imports_neither_torch_nor_transformers():
    script = (
        "import sys; from gkd_trainer.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stopped: assert stopped.code == 0\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'trl'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "distil a teacher into a student" in result.stdout
    assert result.stdout.splitlines()[-1] == "[]"


def test_train_help_groups_every_option_of_gkd_config_behind_our_own(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    titles = ["\nstudent:", "\ndata:", "\nLoRA", "\ndistillation", "\ntraining (transformers.TrainingArguments)"]
    positions = [text.index(title) for title in titles]
    assert positions == sorted(positions)
    assert [option.name for option in fields(GKDConfig) if option.init and f"  --{option.name}" not in text] == []
    distillation = text[positions[3] : positions[4]]
    assert "  --lmbda FLOAT" in distillation
    assert "--teacher_model_name_or_path, --teacher TEXT" in distillation
    assert "--learning_rate" not in distillation


@pytest.mark.parametrize("argv", [[], ["trian"], ["train", "--betta", "1"], ["train", "--beta", "much"]])
def test_arguments_that_cannot_be_parsed_exit_2(argv, capsys):
    code, error = exit_of(argv, capsys)
    assert code == 2
    assert "usage: gkd-trainer" in error


def test_every_required_option_that_is_missing_is_named(capsys):
    code, error = exit_of(["train", "--beta", "1"], capsys)
    assert code == 2
    teacher = "--teacher_model_name_or_path or --teacher_server_base_url"
    assert f"required: --model_name_or_path, {teacher}, --dataset" in error


def test_command_line_wins_over_the_yaml_file(given_to_trainer, pair, rows_file, tmp_path):
    config = write_yaml(tmp_path / "a.yaml", dataset=str(rows_file), beta=0.9, lmbda=0.25, learning_rate="3e-4")
    args = given_to_trainer("--config", config, *pair, "--beta", "0.1")["args"]
    assert (args.beta, args.lmbda, args.learning_rate) == (0.1, 0.25, 3e-4)


def test_yaml_holds_aliases_mappings_lists_null_and_a_bare_no(given_to_trainer, pair, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        f"model: {pair[1]}\nteacher: {pair[3]}\ndataset: {write_rows(tmp_path / 'rows.csv', ROWS)}\n"
        "teacher_model_init_kwargs:\n  dtype: bfloat16\n  attn_implementation: eager\n"
        "report_to: [none]\nmax_length: null\nsave_strategy: no\nuse_peft: yes\nlora_target_modules: [q_proj, v_proj]\n"
    )
    given = given_to_trainer(f"--config={file}", "--output_dir", tmp_path / "output")
    args = given["args"]
    assert given["model"] == pair[1]
    assert args.teacher_model_name_or_path == pair[3]
    assert args.teacher_model_init_kwargs == {"dtype": "bfloat16", "attn_implementation": "eager"}
    assert args.max_length is None
    assert args.save_strategy == "no"
    assert given["peft_config"].target_modules == {"q_proj", "v_proj"}


def test_the_logging_interval_is_unset_or_what_is_given_on_the_command_line_and_in_yaml(
    given_to_trainer, pair, data, tmp_path
):
    file = write_yaml(tmp_path / "a.yaml", logging_steps=500)
    given = [[], ["--logging_steps", "500"], ["--config", file], ["--config", file, "--logging_steps", "0.25"]]
    steps = [given_to_trainer(*pair, *data, *own)["args"].logging_steps for own in given]
    assert steps == [500, 500, 500, 0.25]
    assert [isinstance(each, Unset) for each in steps] == [True, False, False, False]


def test_dictionary_options_are_json_on_the_command_line(given_to_trainer, pair, data):
    args = given_to_trainer(*pair, *data, "--model-init-kwargs", '{"dtype": "bfloat16"}')["args"]
    assert args.model_init_kwargs == {"dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("option", "written"),
    [
        *[("run_name", text) for text in ("no", "on", "1e-4", "2024-01-01", "2024-13-45", ".5", "1:30", "0x10", "007")],
        ("run_name", "1_000"),
        ("teacher_model_name_or_path", "1.0"),
        ("train_split", "2024-01-01"),
        ("hub_model_id", "true"),
    ],
)
def test_yaml_gives_text_as_it_is_written(option, written, given_to_trainer, pair, data, tmp_path, monkeypatch):
    monkeypatch.setattr("gkd_trainer.cli._require_model", lambda *_: None)
    monkeypatch.setattr("gkd_trainer.data.sources.RowSource.load", lambda source: source.split)
    file = tmp_path / "a.yaml"
    file.write_text(f"{option}: {written}\n")
    own = [*pair[:2], *pair[4:], "--config", file]
    own += [] if option.startswith("teacher") else pair[2:4]
    own += [*data[2:], "--dataset", "somebody/something"]
    given = given_to_trainer(*own)
    assert {**vars(given["args"]), "train_split": given["train_dataset"]}[option] == written


@pytest.mark.parametrize(
    ("written", "is_on"), [("on", True), ("off", False), ("yes", True), ('"true"', True), ("n", False)]
)
def test_yaml_switches_are_on_and_off_in_every_spelling(written, is_on, given_to_trainer, pair, data, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(f"gradient-checkpointing: {written}\ndisable_dropout: {written}\n")
    args = given_to_trainer("--config", file, *pair, *data)["args"]
    assert (args.gradient_checkpointing, args.disable_dropout) == (is_on, is_on)


def test_yaml_lists_hold_text_as_it_is_written_and_mappings_hold_values(given_to_trainer, pair, data, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("use_peft: true\nlora_target_modules: [on, 1e-4, q]\nmodel_init_kwargs: {use_cache: no, n: 3}\n")
    given = given_to_trainer("--config", file, *pair, *data)
    assert given["peft_config"].target_modules == {"on", "1e-4", "q"}
    assert given["args"].model_init_kwargs == {"use_cache": False, "n": 3}


@pytest.mark.parametrize("written", ["false", "no", "off", "False", "null"])
def test_yaml_resumes_from_nothing_where_it_says_so(written, pair, data, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(f"resume_from_checkpoint: {written}\n")
    _, _, config = _parse_train([*pair, *data, "--config", str(file)])
    assert _checkpoint(config) is None


@pytest.mark.parametrize("written", ["true", "yes", "on", "True"])
def test_yaml_resumes_from_the_last_checkpoint_where_it_says_so(written, pair, data, tmp_path):
    for step in (2, 10):
        checkpoint = tmp_path / "output" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text("{}")
    file = tmp_path / "a.yaml"
    file.write_text(f"resume_from_checkpoint: {written}\n")
    _, _, config = _parse_train([*pair, *data, "--config", str(file)])
    assert _checkpoint(config) == str(tmp_path / "output" / "checkpoint-10")


@pytest.mark.parametrize(
    ("argv", "suggestion"),
    [
        (["--betta", "1"], "--betta (did you mean --beta?)"),
        (["--lambda=1"], "--lambda (did you mean --lmbda?)"),
        (["--learning-rat", "1"], "--learning-rat (did you mean --learning_rate?)"),
        (["--studnet", "x", "--qqqqqq", "y"], "arguments: --studnet, --qqqqqq\n"),
        (["x"], "unrecognized arguments: x\n"),
    ],
)
def test_a_misspelt_option_is_told_with_the_one_that_is_meant(argv, suggestion, capsys):
    code, error = exit_of(["train", *argv], capsys)
    assert code == 2
    assert suggestion in error


@pytest.mark.parametrize(
    "options",
    [
        ["--teacher_server_api_tokn=hidden-31337"],
        ["--beta", "https://user:hidden-31337@host"],
        ["--model", "https://user:hidden-31337@host/model"],
        ["--teacher", "https://user:hidden-31337@host/model"],
        ["--dataset", "https://user:hidden-31337@host/rows.jsonl"],
        ["--dataset", "https://host/rows.jsonl?sig=hidden-31337&token=hidden-31337"],
        ["--model_init_kwargs", '["hf_hidden31337"]'],
    ],
)
def test_an_error_of_the_command_line_shows_no_secret(options, pair, data, capsys):
    code, error = exit_of(["train", *pair, *data, *options], capsys)
    assert code in (1, 2)
    assert "error: " in error
    assert "hidden" not in error


@pytest.mark.parametrize(
    "text", ["hub_token: {a: hidden-31337}\n", "hub_token: hidden-31337: x\n", "- {token: hidden-31337}\n"]
)
def test_an_error_of_a_yaml_file_shows_no_secret(text, tmp_path, capsys):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    code, error = exit_of(["train", "--config", file], capsys)
    assert code == 2
    assert str(file) in error
    assert "hidden" not in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("betta: 0.5\nlambda: 1\n", "unknown options: betta (did you mean beta?), lambda (did you mean lmbda?)"),
        ("teacher: a\nbeta: 0\nteacher_model_name_or_path: b\n", "more than once: teacher_model_name_or_path"),
        ("save_strategy: false\n", "invalid choice: 'false' (choose from 'no', 'steps', 'epoch', 'best')"),
        ("teacher_model_init_kwargs: {day: 2024-13-45}\n", "could not read"),
        ("beta: much\n", "argument --beta: invalid float value: 'much'"),
        ("beta: [0.5]\n", "beta can't be ['0.5']"),
        ("beta: null\n", "beta can't be None"),
        ("max_steps: 2.5\n", "argument --max_steps"),
        ("train_on: first_turn\n", "invalid choice: 'first_turn' (choose from 'all_turns', 'last_turn')"),
        ("- beta\n", "expected options by name"),
        ("beta: [\n", "could not read"),
        (None, "could not read"),
    ],
)
def test_a_yaml_file_that_cannot_be_used_exits_2_and_says_why(text, message, tmp_path, capsys):
    file = tmp_path / "a.yaml"
    if text is not None:
        file.write_text(text)
    code, error = exit_of(["train", "--config", file], capsys)
    assert code == 2
    assert message in error


def test_the_yaml_example_names_options_that_exist(given_to_trainer, pair, data):
    file = Path(__file__).parents[1] / "examples" / "train.yaml"
    own = ["--eval_split", "train", "--teacher_model_init_kwargs", "{}"]
    args = given_to_trainer("--config", file, *pair, *data, *own)["args"]
    assert args.gradient_accumulation_steps == 8


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_a_file_of_rows_is_read_by_its_suffix(suffix, given_to_trainer, pair, tmp_path):
    file = write_rows(tmp_path / f"rows{suffix}", ROWS)
    given = given_to_trainer(*pair, "--dataset", file, "--train_split", "train[:3]")
    assert given["train_dataset"].to_list() == ROWS[:3]
    assert given["eval_dataset"] is None


def test_evaluation_on_the_training_file_is_refused_unless_it_is_a_part_of_it(pair, data, capsys):
    code, error = exit_of(["train", *pair, *data, "--eval_split", "test"], capsys)
    assert code == 1
    assert "--eval_split: " in error
    assert "is one file, which has no split 'test': name another file with --eval_dataset" in error


def test_two_parts_of_one_file_are_trained_and_evaluated_on(given_to_trainer, pair, data, caplog):
    given = given_to_trainer(*pair, *data, "--train_split", "train[:75%]", "--eval_split", "train[75%:]")
    assert (given["train_dataset"].to_list(), given["eval_dataset"].to_list()) == (ROWS[:3], ROWS[3:])
    assert "overlap" not in caplog.text


@pytest.mark.parametrize("options", [["--eval_split", "train[:1]"], ["--eval_dataset", "rows.jsonl"]])
def test_evaluation_rows_that_are_trained_on_are_warned_of(options, given_to_trainer, pair, data, tmp_path, caplog):
    own = [str(tmp_path / option) if option == "rows.jsonl" else option for option in options]
    given_to_trainer(*pair, *data, *own)
    assert "overlap, so that rows which are trained on are evaluated on too" in caplog.text


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


def test_a_folder_holds_its_splits(given_to_trainer, pair, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_rows(folder / "train.jsonl", ROWS[:3])
    write_rows(folder / "test.jsonl", ROWS[3:])
    given = given_to_trainer(*pair, "--dataset", folder, "--eval_split", "test")
    assert given["train_dataset"].to_list() == ROWS[:3]
    assert given["eval_dataset"].to_list() == ROWS[3:]


def test_an_evaluation_file_of_its_own_needs_no_split(given_to_trainer, pair, data, tmp_path):
    file = write_rows(tmp_path / "held_out.parquet", ROWS[:1])
    assert given_to_trainer(*pair, *data, "--eval_dataset", file)["eval_dataset"].to_list() == ROWS[:1]


def test_streaming_reads_rows_one_by_one(given_to_trainer, pair, data):
    given = given_to_trainer(*pair, *data, "--streaming")
    assert not hasattr(given["train_dataset"], "__len__")
    assert next(iter(given["train_dataset"])) == ROWS[0]


def test_a_run_trains_evaluates_and_saves_a_student_that_loads(pair, data, rows_file, tmp_path, capsys):
    main(["train", *pair, *data, "--eval_dataset", str(rows_file), "--learning_rate", "1e-2", "--save_strategy", "no"])
    before, after = weights_of(tmp_path / "student"), weights_of(tmp_path / "output")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert AutoTokenizer.from_pretrained(tmp_path / "output").eos_token == "<|im_end|>"
    results = json.loads((tmp_path / "output" / "all_results.json").read_text())
    assert {"train_loss", "eval_loss"} <= results.keys()
    assert (tmp_path / "output" / "trainer_state.json").exists()
    assert "***** eval metrics *****" in capsys.readouterr().out
    card = (tmp_path / "output" / "README.md").read_text()
    assert "`student`, distilled from `teacher` by generalised knowledge distillation" in card
    assert "| data | `rows.jsonl`, 4 rows |" in card
    assert str(tmp_path) not in card


def test_a_readme_that_somebody_wrote_is_kept(pair, data, tmp_path, caplog):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "README.md").write_text("Mine.\n")
    main(["train", *pair, *data, "--save_strategy", "no", "--max_steps", "1"])
    assert (tmp_path / "output" / "README.md").read_text() == "Mine.\n"
    assert "README.md is not replaced by a model card" in caplog.text
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


def test_several_teacher_servers_are_a_list_in_yaml_and_joined_by_commas_elsewhere(given_to_trainer, pair, tmp_path):
    urls = ["http://127.0.0.1:8001", "http://127.0.0.1:8002"]
    common = ["--model", pair[1], "--dataset", write_rows(tmp_path / "rows.csv", ROWS), *pair[4:]]
    assert (
        given_to_trainer(*common, "--teacher_server_base_url", ",".join(urls))["args"].teacher_server_base_url == urls
    )
    file = write_yaml(tmp_path / "a.yaml", teacher_server_base_url=urls)
    assert given_to_trainer(*common, "--config", file)["args"].teacher_server_base_url == urls


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
            "teacher_model_init_kwargs load a teacher by name",
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


@pytest.mark.parametrize("source", ["true", "folder"])
def test_a_resumed_run_ends_with_the_weights_of_the_unbroken_one(source, pair, data, tmp_path):
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
        (["--lora_r", "8"], "lora_r without effect: set use_peft"),
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


def test_an_error_in_the_middle_of_a_run_exits_1_and_says_how_to_go_on(pair, data, tmp_path, capsys):
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
    assert last.endswith("is saved: to go on from it, add --resume_from_checkpoint true")


@pytest.mark.parametrize("command", [["-m", "gkd_trainer"], ["-m", "gkd_trainer.cli"]])
def test_the_package_is_run_like_the_command(command):
    result = subprocess.run([sys.executable, *command, "train", "--betta", "1"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("gkd-trainer train: error: unrecognized arguments: --betta")


def run_until(argv, is_reached, number):
    """Run the command in a process of its own, send a signal when something is reached; return how it ended."""
    command = [sys.executable, "-m", "gkd_trainer", "train", *argv]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not is_reached() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        _, error = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, error


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_with_one_line_that_says_how_to_resume_it(number, status, pair, data, tmp_path):
    output = tmp_path / "output"
    own = [*pair, *data, "--max_steps", "100000", "--save_steps", "5", "--save_only_model"]
    code, error = run_until(own, lambda: (output / "checkpoint-10" / "trainer_state.json").exists(), number)
    assert code == status
    assert "Traceback" not in error
    last = error.splitlines()[-1]
    assert last.startswith(
        f"gkd-trainer train: {'interrupted' if status == 130 else 'terminated'}: {output}/checkpoint-"
    )
    assert last.endswith(" is saved: to go on from it, add --resume_from_checkpoint true")


def test_a_signal_before_the_first_checkpoint_says_that_none_was_saved(pair, data, tmp_path):
    own = [*pair, *data, "--max_steps", "100000", "--save_strategy", "no", "--report_to", "tensorboard"]
    code, error = run_until(own, lambda: (tmp_path / "output" / "runs").exists(), signal.SIGINT)
    assert code == 130
    assert "no checkpoint was saved in" in error.splitlines()[-1]


def test_a_run_on_a_cpu_writes_nothing_to_stderr_but_its_progress(pair, data, tmp_path):
    own = [*pair, *data, "--train_split", "train[:2]", "--eval_split", "train[2:]", "--use_peft", "--save_steps", "1"]
    command = [sys.executable, "-m", "gkd_trainer", "train", *own, "--eval_strategy", "steps", "--eval_steps", "1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [line.strip() for line in re.split(r"[\r\n]|\x1b\[A", result.stderr)]
    progress = re.compile(r"[^|]*\d+%\|.*\|.*\[.*\]$|.*examples/s\]$")
    assert [line for line in lines if line and not progress.match(line)] == []


def test_a_mistake_prints_no_traceback(pair, data):
    command = [Path(sys.executable).with_name("gkd-trainer"), "train", *pair, *data, "--temperature", "0"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("gkd-trainer train: error: temperature must be above 0")
    assert "Traceback" not in result.stderr
