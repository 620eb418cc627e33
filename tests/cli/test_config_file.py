"""Options in YAML mean the same as on the command line, which overrides them."""

import json
from pathlib import Path

import pytest

from gkd_trainer.cli.train import checkpoint_to_resume
from gkd_trainer.cli.train_options import parse
from gkd_trainer.config import Unset
from tests.cli.command import ROWS, exit_of, write_rows, write_yaml


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
    monkeypatch.setattr("gkd_trainer.cli.train.require_model", lambda *_: None)
    monkeypatch.setattr("gkd_trainer.data.sources.RowSource.load", lambda source: source.split)
    monkeypatch.setattr("gkd_trainer.data.sources.in_format", lambda source, rows: rows)
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
    file.write_text(
        "use_peft: true\nlora_target_modules: [on, 1e-4, q]\n"
        "model_init_kwargs: {use_cache: no, n: 3, a: 1e-6, b: -2E3, c: 1.5e+2, d: 2024-e1}\n"
    )
    given = given_to_trainer("--config", file, *pair, *data)
    assert given["peft_config"].target_modules == {"on", "1e-4", "q"}
    numbers = {"n": 3, "a": 1e-6, "b": -2000.0, "c": 150.0}
    assert given["args"].model_init_kwargs == {"use_cache": False, **numbers, "d": "2024-e1"}


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "a.yaml"
    names = ("model", "dataset", "eval_dataset", "resume_from_checkpoint", "output_dir")
    file.write_text("teachers: {a: ~/a, b: org/b}\n" + "".join(f"{name}: ~/{name}\n" for name in names))
    options = parse(["--config", "~/a.yaml"])
    found = (options.student.model_name_or_path, options.data.dataset, options.data.eval_dataset)
    found += (options.config.resume_from_checkpoint, options.config.output_dir)
    assert found == tuple(str(tmp_path / name) for name in names)
    assert options.config.teachers == {"a": str(tmp_path / "a"), "b": "org/b"}
    given = parse(["--model=~/m", '--teachers={"a": "~/a"}', "--dataset=org/~", "--output_dir=~/o"])
    assert given.config.teachers == {"a": str(tmp_path / "a")}
    assert (given.student.model_name_or_path, given.data.dataset) == (str(tmp_path / "m"), "org/~")
    paths = ("teacher_tokenizer_name_or_path", "teacher_model_name_or_path")
    one = ["--model=m", "--dataset=d", "--teacher_vocabulary_mode=matched", "--output_dir=o"]
    config = parse([*one, *(f"--{name}=~/t" for name in paths)]).config
    assert [getattr(config, name) for name in paths] == [str(tmp_path / "t")] * 2
    run = ["--model=m", "--dataset=d", "--lmbda=0", "--output_dir=o"]
    config = parse([*run, "--teacher_cache_dir=~/c"]).config
    assert config.teacher_cache_dir == [str(tmp_path / "c")]
    assert parse([*run, "--teacher_cache_dir", "~/c", "d"]).config.teacher_cache_dir == [str(tmp_path / "c"), "d"]
    (tmp_path / "b.yaml").write_text("teacher_cache_dir: [~/c, d]\n")
    config = parse([*run, "--config", "~/b.yaml"]).config
    assert config.teacher_cache_dir == [str(tmp_path / "c"), "d"]


@pytest.mark.parametrize("written", ["false", "no", "off", "False", "null"])
def test_yaml_resumes_from_nothing_where_it_says_so(written, pair, data, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(f"resume_from_checkpoint: {written}\n")
    config = parse([*pair, *data, "--config", str(file)]).config
    assert checkpoint_to_resume(config) is None


@pytest.mark.parametrize("written", ["true", "yes", "on", "True"])
def test_yaml_resumes_from_the_last_checkpoint_where_it_says_so(written, pair, data, tmp_path):
    for step in (2, 10):
        checkpoint = tmp_path / "output" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text("{}")
    file = tmp_path / "a.yaml"
    file.write_text(f"resume_from_checkpoint: {written}\n")
    config = parse([*pair, *data, "--config", str(file)]).config
    assert checkpoint_to_resume(config) == str(tmp_path / "output" / "checkpoint-10")


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
        ("beta: [0.5]\n", "beta takes one value; got a list of 1"),
        ("dataset: {train: [a, b]}\n", "dataset takes one value; got a mapping"),
        ("lora_target_modules: {q: k}\n", "lora_target_modules takes a list; got a mapping"),
        ("teachers: [a, b]\n", "teachers takes a mapping; got a list of 2"),
        ("beta: null\n", "beta can't be unset; leave the line out for its default (0.5)"),
        ("save_strategy:\n", "save_strategy can't be unset; leave the line out for its default (steps)"),
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
    file = Path(__file__).parents[2] / "examples" / "train.yaml"
    own = ["--eval_split", "train", "--teacher_model_init_kwargs", "{}"]
    args = given_to_trainer("--config", file, *pair, *data, *own)["args"]
    assert args.gradient_accumulation_steps == 8


def test_several_teacher_servers_are_a_list_in_yaml_and_joined_by_commas_elsewhere(given_to_trainer, pair, tmp_path):
    urls = ["http://127.0.0.1:8001", "http://127.0.0.1:8002"]
    common = ["--model", pair[1], "--dataset", write_rows(tmp_path / "rows.csv", ROWS), *pair[4:]]
    assert (
        given_to_trainer(*common, "--teacher_server_base_url", ",".join(urls))["args"].teacher_server_base_url == urls
    )
    file = write_yaml(tmp_path / "a.yaml", teacher_server_base_url=urls)
    assert given_to_trainer(*common, "--config", file)["args"].teacher_server_base_url == urls


def test_several_teachers_are_a_mapping_in_yaml_and_json_elsewhere(given_to_trainer, pair, tmp_path):
    teachers, weights = {"math": pair[3], "code": pair[3]}, {"math": 2, "code": 1}
    common = ["--model", pair[1], "--dataset", write_rows(tmp_path / "rows.csv", ROWS), *pair[4:]]
    options = ["--teachers", json.dumps(teachers), "--teacher_weights", json.dumps(weights)]
    file = write_yaml(tmp_path / "a.yaml", teachers=teachers, teacher_weights=weights)
    for args in (given_to_trainer(*common, *options)["args"], given_to_trainer(*common, "--config", file)["args"]):
        assert args.teachers == teachers
        assert args.teacher_weights == weights


def test_an_empty_file_gives_no_options_and_a_merged_mapping_gives_its_own(given_to_trainer, pair, data, tmp_path):
    empty, merged = tmp_path / "empty.yaml", tmp_path / "merged.yaml"
    empty.write_text("# nothing\n")
    merged.write_text("teacher_model_init_kwargs: &base\n  beta: 0.125\n<<: {beta: 0.25, lmbda: 0.75}\nlmbda: 1\n")
    assert given_to_trainer("--config", empty, *pair, *data)["args"].beta == 0.5
    args = given_to_trainer("--config", merged, *pair, *data)["args"]
    assert (args.beta, args.lmbda) == (0.25, 1.0)
