"""A run resumes only from a complete checkpoint."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from gkd_trainer import GKDConfigError
from gkd_trainer.trainer.checkpoints import (
    checkpoint_to_resume,
    damage,
    last_complete_checkpoint,
    load_rollouts,
    require_one_step,
    required_complete,
    save_rollouts,
)


def write_checkpoint(folder):
    folder.mkdir(parents=True)
    shards = {"model-1-of-2.safetensors": "a", "model-2-of-2.safetensors": "b"}
    for file, name in shards.items():
        save_file({name: torch.ones(1000)}, folder / file)
    index = {"weight_map": {name: file for file, name in shards.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save({"state": torch.ones(1000)}, folder / "optimizer.pt")
    torch.save({"cpu": torch.get_rng_state()}, folder / "rng_state_1.pth")
    (folder / "rollouts-rank1.json").write_text(json.dumps([{"weights_step": 3, "windows": []}]))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    for name in ("notes.json", "ggml.bin", "scores.pt", "vectors.safetensors"):
        (folder / name).write_text("{ somebody else's")
    return folder


def cut(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def test_a_complete_checkpoint_has_no_damage_whatever_other_files_it_has(tmp_path):
    assert damage(write_checkpoint(tmp_path / "checkpoint-3")) is None


@pytest.mark.parametrize(
    "name",
    [
        "model-1-of-2.safetensors",
        "model.safetensors.index.json",
        "optimizer.pt",
        "rng_state_1.pth",
        "rollouts-rank1.json",
        "trainer_state.json",
    ],
)
def test_a_file_that_was_cut_off_is_named(tmp_path, name):
    checkpoint = write_checkpoint(tmp_path / "checkpoint-3")
    cut(checkpoint / name)
    assert damage(checkpoint).startswith(name)


@pytest.mark.parametrize("name", ["model-2-of-2.safetensors", "trainer_state.json"])
def test_a_file_that_is_missing_is_named(tmp_path, name):
    checkpoint = write_checkpoint(tmp_path / "checkpoint-3")
    (checkpoint / name).unlink()
    assert name in damage(checkpoint)


def test_the_last_complete_checkpoint_is_taken_by_its_step_and_the_damage_of_newer_ones_logged(tmp_path, caplog):
    for step in (9, 10, 11):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-12-copy").mkdir()
    (tmp_path / "checkpoint-11" / "trainer_state.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert "checkpoint-11: it has no trainer_state.json" in caplog.text


def test_without_damage_nothing_is_logged(tmp_path, caplog):
    write_checkpoint(tmp_path / "checkpoint-3")
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-3"
    assert not caplog.records


@pytest.mark.parametrize("is_there", [True, False])
def test_no_complete_checkpoint_is_an_error_that_says_what_was_found(tmp_path, is_there):
    if is_there:
        cut(write_checkpoint(tmp_path / "run" / "checkpoint-3") / "trainer_state.json")
    match = "checkpoint-3: trainer_state.json" if is_there else "no folder of the form"
    with pytest.raises(GKDConfigError, match=match):
        last_complete_checkpoint(tmp_path / "run")


def test_a_damaged_checkpoint_that_is_named_is_refused_with_the_one_to_take(tmp_path):
    write_checkpoint(tmp_path / "checkpoint-2")
    damaged = write_checkpoint(tmp_path / "checkpoint-3")
    cut(damaged / "optimizer.pt")
    with pytest.raises(GKDConfigError, match=r"optimizer\.pt is truncated.*checkpoint-2"):
        required_complete(damaged)
    assert required_complete(tmp_path / "checkpoint-2") == tmp_path / "checkpoint-2"
    with pytest.raises(GKDConfigError, match="there is no such folder"):
        required_complete(tmp_path / "checkpoint-4")


def test_a_run_resumes_from_the_last_complete_checkpoint_the_given_one_or_none(tmp_path):
    for step in (2, 3):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    assert checkpoint_to_resume(True, tmp_path) == str(tmp_path / "checkpoint-3")
    assert checkpoint_to_resume(tmp_path / "checkpoint-2", tmp_path) == str(tmp_path / "checkpoint-2")
    assert [checkpoint_to_resume(none, tmp_path) for none in (None, False, "")] == [None] * 3
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.raises(GKDConfigError, match="can't resume from the checkpoint"):
        checkpoint_to_resume(str(tmp_path / "checkpoint-2"), tmp_path)
    with pytest.raises(GKDConfigError, match="no folder of the form checkpoint-STEP"):
        checkpoint_to_resume(True, tmp_path / "elsewhere")


def test_each_rank_finds_the_rollouts_that_it_kept(tmp_path):
    states = [[{"weights_step": 3, "windows": [{"step": rank}]}] for rank in range(2)]
    for rank, of_rank in enumerate(states):
        save_rollouts(tmp_path / "checkpoint-3", rank, of_rank)
    assert [load_rollouts(tmp_path / "checkpoint-3", rank) for rank in range(3)] == [*states, []]
    assert load_rollouts(tmp_path / "checkpoint-4", 0) == load_rollouts(None, 0) == []


def test_rollouts_of_an_older_run_in_the_same_folder_are_forgotten(tmp_path):
    save_rollouts(tmp_path, 0, [{"weights_step": 3, "windows": []}])
    for _ in range(2):
        save_rollouts(tmp_path, 0, [])
        assert load_rollouts(tmp_path, 0) == []
    assert not list(tmp_path.iterdir())


def test_ranks_that_would_resume_from_different_steps_are_refused(two_ranks, ranks):
    require_one_step("run/checkpoint-30", two_ranks(30))
    with pytest.raises(GKDConfigError, match=r"different steps \(20, 30\): .* such as checkpoint-20"):
        require_one_step("run/checkpoint-30", two_ranks(20))
    require_one_step("run/checkpoint-30", ranks)
    require_one_step(None, two_ranks())
