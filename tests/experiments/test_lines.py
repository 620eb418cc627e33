"""Results outlive a kill: whole lines stay, a broken one is left out, and what is added comes after it."""

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

from experiments.lines import Lines, commit


def test_results_are_found_by_their_fields(tmp_path):
    lines = Lines(tmp_path / "deep" / "results.jsonl")
    assert lines.read() == []
    lines.add({"arm": "sft", "seed": 0, "factors": {"width": 32}})
    lines.add({"arm": "sft", "seed": 1, "factors": {"width": 32}})
    assert lines.find(arm="sft", seed=1, factors={"width": 32})["seed"] == 1
    assert lines.find(arm="sft", seed=1, factors={"width": 16}) is None
    [line, _] = lines.read()
    assert {"torch", "transformers", "python"} <= line["versions"].keys()
    assert datetime.now(UTC) - datetime.fromisoformat(line["finished"]) < timedelta(minutes=1)


def test_a_result_names_the_commit_of_the_code_or_none_outside_a_checkout(monkeypatch, tmp_path):
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    monkeypatch.setattr("experiments.lines.__file__", str(tmp_path / "lines.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit.__wrapped__() is None
    for command in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "--message", "first"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=tmp_path, text=True)
    assert commit.__wrapped__() == head[:12]


def test_a_line_cut_short_is_left_out_and_the_next_one_is_whole(tmp_path):
    lines = Lines(tmp_path / "results.jsonl")
    lines.add({"seed": 0})
    with lines.file.open("a") as file:
        file.write('{"seed": 1, "poi')
    lines.add({"seed": 2})
    assert [line["seed"] for line in lines.read()] == [0, 2]


def test_lines_of_several_writers_do_not_mix(tmp_path):
    lines = Lines(tmp_path / "results.jsonl")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: lines.add({"seed": seed, "text": "x" * 10_000}), range(40)))
    found = [json.loads(line) for line in lines.file.read_text().splitlines()]
    assert sorted(line["seed"] for line in found) == list(range(40))
