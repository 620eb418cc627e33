"""`gkd-trainer cache` as users call it, and the runs that train from its folder."""

import pytest

from gkd_trainer import GKDTrainer
from gkd_trainer.cli import main
from gkd_trainer.teachers.cache import read_manifest
from tests.cli.command import exit_of


@pytest.fixture
def command(tmp_path, pair, rows_file):
    """The command that caches the teacher's predictions for the rows."""
    teacher = str(tmp_path / "teacher")
    return ["cache", "--teacher", teacher, "--dataset", str(rows_file), "--output_dir", str(tmp_path / "cache")]


@pytest.fixture
def losses(monkeypatch):
    """The losses of the runs that train."""
    found = []
    train = GKDTrainer.train

    def recording(trainer, *args, **kwargs):
        output = train(trainer, *args, **kwargs)
        found.append(output.training_loss)
        return output

    monkeypatch.setattr(GKDTrainer, "train", recording)
    return found


def test_a_run_from_a_cache_trains_as_with_the_teacher(command, pair, data, tmp_path, losses, capsys):
    main([*command, "--use_cpu"])
    manifest = read_manifest(tmp_path / "cache")
    assert f"{tmp_path / 'cache'}: 4 rows, {manifest.shards[0].positions} tokens" in capsys.readouterr().out
    run = [*data, "--lmbda", "0", "--save_strategy", "no", "--use_cpu"]
    main(["train", *pair, *run])
    without_teacher = [*pair[:2], *pair[4:]]
    main(["train", *without_teacher, *run, "--teacher_cache_dir", str(tmp_path / "cache")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert "distilled from `teacher`" in (tmp_path / "output" / "README.md").read_text()


def test_rows_are_prepared_for_the_student_that_is_named(command, tmp_path, byte_level):
    main([*command, "--model", str(tmp_path / "student"), "--kind", "topk", "--use_cpu", "--max_length", "30"])
    manifest = read_manifest(tmp_path / "cache")
    assert (manifest.kind, manifest.width, manifest.source.max_length) == ("topk", 64, 30)
    assert "teacher" in manifest.source.teacher


def test_the_same_command_continues_and_another_is_refused(command, capsys, tmp_path):
    main([*command, "--use_cpu", "--train_split", "train[:2]"])
    main([*command, "--use_cpu"])
    assert [shard.rows for shard in read_manifest(tmp_path / "cache").shards] == [2, 2]
    code, error = exit_of([*command, "--use_cpu", "--max_length", "99"], capsys)
    assert code == 1
    assert "was made with another max_length: 1024 there, 99 now" in error


def test_parts_are_trained_from_as_one_folder_once_all_are_written(command, pair, data, tmp_path, losses, capsys):
    folder = tmp_path / "cache"
    main([*command, "--use_cpu", "--part", "1/2"])
    printed = capsys.readouterr().out
    assert f"{folder}/part-1-of-2: 2 rows, " in printed
    assert f"{folder}: 1 of 2 parts are complete; still to be written: 2/2" in printed
    run = [*pair[:2], *pair[4:], *data, "--lmbda", "0", "--save_strategy", "no", "--use_cpu"]
    code, error = exit_of(["train", *run, "--teacher_cache_dir", str(folder)], capsys)
    assert code == 1
    assert f"the cache in {folder} lacks 2/2 of 2 parts" in error
    code, error = exit_of([*command, "--use_cpu"], capsys)
    assert code == 1
    assert f"{folder} holds a cache in 2 parts: write each with --part" in error
    main([*command, "--use_cpu", "--part", "2/2"])
    assert f"{folder}: 2 of 2 parts are complete\n" in capsys.readouterr().out
    main([*command[:-1], str(tmp_path / "whole"), "--use_cpu"])
    for cache in (tmp_path / "whole", folder):
        main(["train", *run, "--teacher_cache_dir", str(cache)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_model_or_file_that_is_not_there_is_named(command, capsys, rows_file):
    code, error = exit_of([*command, "--model", "nowhere", "--use_cpu"], capsys)
    assert code == 1
    assert "could not load the student from 'nowhere'" in error
    with rows_file.open("a") as file:
        file.write("{")
    code, error = exit_of([*command, "--use_cpu"], capsys)
    assert code == 1
    assert "line 5 is not JSON" in error


@pytest.mark.vllm
def test_a_servers_top_tokens_are_cached(vllm_server, served_dir, rows_file, tmp_path):
    folder = tmp_path / "cache"
    served = ["--teacher_server_base_url", vllm_server.base_url, "--model", str(served_dir)]
    rest = ["--dataset", str(rows_file), "--output_dir", str(folder), "--teacher_top_k", "16", "--use_cpu"]
    rest += ["--max_length", "64"]
    main(["cache", *served, *rest])
    manifest = read_manifest(folder)
    assert (manifest.kind, manifest.width, manifest.source.vocab_size, manifest.source.weights) == (
        "topk",
        16,
        None,
        None,
    )
    main(
        [
            *("train", "--model", str(served_dir), "--teacher_cache_dir", str(folder), "--dataset", str(rows_file)),
            *("--lmbda", "0", "--max_steps", "1", "--output_dir", str(tmp_path / "out"), "--report_to", "none"),
            *("--use_cpu", "--save_strategy", "no", "--max_length", "64"),
        ]
    )
    assert (tmp_path / "out" / "model.safetensors").exists()
