"""The options of `gkd-trainer train`: their groups, what is required, and what has no effect."""

from dataclasses import fields

import pytest

from gkd_trainer import GKDConfig
from gkd_trainer.cli import main
from gkd_trainer.cli.train_options import StudentOptions, parse
from gkd_trainer.errors import GKDConfigError
from tests.cli.command import ROWS, exit_of, write_rows


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


def test_every_required_option_that_is_missing_is_named(capsys):
    code, error = exit_of(["train", "--beta", "1"], capsys)
    assert code == 2
    teacher = "--teacher_model_name_or_path or --teacher_server_base_url or --teachers or --self_teacher"
    teacher += " or --teacher_cache_dir"
    assert f"required: --model_name_or_path, {teacher}, --dataset" in error


def test_a_student_that_teaches_itself_needs_no_other_teacher(given_to_trainer, pair, data):
    [model, output_dir] = pair[:2], pair[4:]
    given = given_to_trainer(*model, *output_dir, *data, "--self_teacher", "ema", "--use_peft")
    assert given["args"].self_teacher == "ema"
    assert given["peft_config"] is not None


def test_dictionary_options_are_json_on_the_command_line(given_to_trainer, pair, data):
    args = given_to_trainer(*pair, *data, "--model-init-kwargs", '{"dtype": "bfloat16"}')["args"]
    assert args.model_init_kwargs == {"dtype": "bfloat16"}


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
    assert "is one file, which has no split 'test': give another file with --eval_dataset" in error


def test_two_parts_of_one_file_are_trained_and_evaluated_on(given_to_trainer, pair, data, caplog):
    given = given_to_trainer(*pair, *data, "--train_split", "train[:75%]", "--eval_split", "train[75%:]")
    assert (given["train_dataset"].to_list(), given["eval_dataset"].to_list()) == (ROWS[:3], ROWS[3:])
    assert "overlap" not in caplog.text


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


def test_a_teacher_behind_a_server_needs_no_name(pair, data):
    options = parse([*pair[:2], *pair[4:], *data, "--teacher_server_base_url", "http://127.0.0.1:8001"])
    assert options.config.teacher_server_base_url == ["http://127.0.0.1:8001"]
    assert options.student == StudentOptions(model_name_or_path=pair[1])
    assert options.data.dataset == data[1]


def test_a_value_that_the_configuration_refuses_is_our_error(pair, data):
    with pytest.raises(GKDConfigError, match="beta must be in"):
        parse([*pair, *data, "--beta", "1.5"])
    with pytest.raises(GKDConfigError, match="load_best_model_at_end requires"):
        parse([*pair, *data, "--load_best_model_at_end"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_r": 8, "use_dora": True}, "^lora_r, use_dora have no effect without use_peft"),
        ({"lora_target_modules": ["q_proj"]}, "^lora_target_modules has no effect"),
        ({"use_peft": True, "lora_dropout": 0.1}, r"lora_dropout=0\.1 has no effect while disable_dropout is on"),
    ],
)
def test_adapter_options_without_effect_are_refused(options, message):
    with pytest.raises(GKDConfigError, match=message):
        StudentOptions("student", **options).lora_config(disable_dropout=True)


def test_the_adapter_has_what_its_options_say():
    assert StudentOptions("student").lora_config(disable_dropout=True) is None
    options = {"lora_r": 2, "lora_alpha": 6, "lora_dropout": 0.25, "use_rslora": True, "use_dora": True}
    adapter = StudentOptions(
        "student", use_peft=True, lora_target_modules=["all-linear"], lora_modules_to_save=["lm_head"], **options
    ).lora_config(disable_dropout=False)
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (2, 6, 0.25)
    assert (adapter.use_rslora, adapter.use_dora, adapter.modules_to_save) == (True, True, ["lm_head"])
    assert adapter.target_modules == "all-linear"
    assert adapter.task_type == "CAUSAL_LM"
