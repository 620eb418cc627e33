"""Two processes over gloo do the same as one."""

import json

import pytest
import torch
from datasets import Dataset

from gkd_trainer import CachedTeacher, FrozenTeacher, GKDConfig
from gkd_trainer.trainer.caching import cache_predictions
from tests.forks import run_ranks
from tests.trainer.conftest import make_rows
from tests.trainer.run import FSDP
from tests.versions import CHECKPOINTING, IN_ORDER

OPTIONS = {
    "max_steps": 3,
    "save_strategy": "no",
    "learning_rate": 1e-2,
    **IN_ORDER,
    "per_device_eval_batch_size": 2,
    "optim": "sgd",
    "max_grad_norm": 0.0,
}


def steps(result):
    return [entry for entry in result["log"] if "learning_rate" in entry]


@pytest.mark.parametrize(
    ("tied", "extra"),
    [
        (True, {"evaluates_first": True}),
        (
            False,
            {CHECKPOINTING: True, "ddp_static_graph": True, "accelerator_config": {"even_batches": False}},
        ),
        (False, {"evaluates_stream": True, "gradient_accumulation_steps": 2, "ce_weight": 0.3, "eval_on_policy": True}),
    ],
    ids=["tied", "untied-checkpointing-static-graph-uneven-batches", "untied-accumulation-cross-entropy"],
)
def test_two_ranks_train_and_evaluate_like_one(full_run, tiny_model, tmp_path, tied, extra):
    def student():
        return tiny_model(tie_word_embeddings=tied)

    options = {**OPTIONS, "lmbda": 0.5, **extra}
    one, expected, _ = full_run(tmp_path / "one", student=student(), per_device_train_batch_size=4, **options)
    two, actual, process = full_run(
        tmp_path / "two", ranks=2, student=student(), per_device_train_batch_size=2, **options
    )
    assert two is not None, process.stderr

    for name, tensor in expected.items():
        assert torch.allclose(actual[name], tensor, rtol=0, atol=1e-5), name
    for first, second in zip(steps(one), steps(two), strict=True):
        for metric in ("loss", "on_policy_share", "completion_length", "student_entropy", "top_token_agreement"):
            assert second[metric] == pytest.approx(first[metric], rel=1e-4), metric
    # 7 rows do not divide evenly over ranks and batches.
    for metric, value in one["evaluation"].items():
        if "runtime" not in metric and "per_second" not in metric and "preparation" not in metric:
            assert two["evaluation"][metric] == pytest.approx(value, rel=1e-4), metric


@pytest.mark.parametrize(
    ("tied", "extra"),
    [
        (False, {CHECKPOINTING: True}),
        (True, {"gradient_accumulation_steps": 2, "ce_weight": 0.3}),
        (False, {"is_lora": True}),
    ],
    ids=["untied-checkpointing", "tied-accumulation-cross-entropy", "lora"],
)
def test_two_ranks_that_share_the_student_by_fsdp_train_like_one(full_run, tiny_model, tmp_path, tied, extra):
    student = tiny_model(tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    options = {**OPTIONS, "learning_rate": 1.0, "lmbda": 0.5, "names_teacher": True, **extra}
    one, expected, _ = full_run(tmp_path / "one", student=student, per_device_train_batch_size=4, **options)
    two, actual, process = full_run(
        tmp_path / "two", ranks=2, student=student, per_device_train_batch_size=2, **options, **FSDP
    )
    assert two is not None, process.stderr
    assert "full logits" not in process.stderr

    for name, tensor in expected.items():
        assert torch.allclose(actual[name], tensor, rtol=0, atol=1e-5), name
    trained = [name for name in expected if name in before or "lora_B" in name]
    assert max((expected[name] - before.get(name, 0)).abs().max() for name in trained) > 1e-3
    for first, second in zip(steps(one), steps(two), strict=True):
        for metric in ("loss", "completion_length", "student_entropy", "top_token_agreement"):
            assert second[metric] == pytest.approx(first[metric], rel=1e-4), metric
    assert two["evaluation"]["eval_loss"] == pytest.approx(one["evaluation"]["eval_loss"], rel=1e-4)


def test_a_student_whose_checkpoints_are_in_shards_resumes_and_is_saved_whole(full_run, tmp_path):
    folder = tmp_path / "runs"
    options = {
        **OPTIONS,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "lmbda": 0.5,
        "names_teacher": True,
    }
    options |= {**FSDP, "fsdp_config": {**FSDP["fsdp_config"], "state_dict_type": "SHARDED_STATE_DICT"}}
    whole, expected, process = full_run(folder, ranks=2, **options)
    assert whole is not None, process.stderr
    [checkpoint] = (folder / "run").glob("checkpoint-2")
    assert list(checkpoint.glob("pytorch_model_fsdp_0/*.distcp"))
    assert not list(checkpoint.glob("*.safetensors"))
    (folder / "result.json").unlink()
    resumed, actual, process = full_run(folder, ranks=2, resume=True, **options)
    assert resumed is not None, process.stderr
    assert [entry["step"] for entry in steps(resumed)] == [1, 2, 3]
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def require_equal_runs(one, expected, two, actual, process):
    assert two is not None, process.stderr
    for name, tensor in expected.items():
        assert torch.allclose(actual[name], tensor, rtol=0, atol=1e-5), name
    for first, second in zip(steps(one), steps(two), strict=True):
        divergences = {metric for metric in first if metric.startswith("divergence")} | {"loss"}
        for metric in divergences:
            assert second[metric] == pytest.approx(first[metric], rel=1e-4), metric
    for metric in one["evaluation"]:
        if metric.startswith(("eval_loss", "eval_divergence")):
            assert two["evaluation"][metric] == pytest.approx(one["evaluation"][metric], rel=1e-4), metric


@pytest.mark.parametrize("extra", [{}, FSDP], ids=["ddp", "fsdp"])
def test_two_ranks_that_each_have_rows_of_one_teacher_train_like_one(full_run, tiny_model, tmp_path, extra):
    names = {}
    for name, width in (("math", 48), ("code", 32)):
        tiny_model(hidden=width, seed=width).save_pretrained(tmp_path / name)
        names[name] = str(tmp_path / name)
    options = {**OPTIONS, "lmbda": 0.5, "teachers": names}
    one, expected, _ = full_run(tmp_path / "one", per_device_train_batch_size=4, **options)
    two, actual, process = full_run(tmp_path / "two", ranks=2, per_device_train_batch_size=2, **options, **extra)
    require_equal_runs(one, expected, two, actual, process)


def test_two_ranks_that_read_one_cache_train_like_one_with_the_teacher(full_run, tiny_model, tmp_path):
    cache_predictions(
        FrozenTeacher(tiny_model(hidden=48, seed=1)),
        Dataset.from_list(make_rows(20)),
        tmp_path / "cache",
        GKDConfig(output_dir=str(tmp_path), lmbda=0.0, max_length=64, use_cpu=True, report_to=[]),
    )
    options = {**OPTIONS, "lmbda": 0.0}
    one, expected, _ = full_run(tmp_path / "one", per_device_train_batch_size=4, **options)
    options["teacher_cache_dir"] = str(tmp_path / "cache")
    two, actual, process = full_run(tmp_path / "two", ranks=2, per_device_train_batch_size=2, **options)
    require_equal_runs(one, expected, two, actual, process)


def test_ranks_of_the_command_that_caches_write_a_part_each(tiny_model, tmp_path):
    tiny_model(hidden=48, seed=1).save_pretrained(tmp_path / "teacher")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, make_rows(5))))
    paths = {"--teacher": "teacher", "--dataset": "rows.jsonl", "--output_dir": "cache"}
    command = ["cache", "--use_cpu", *(word for name, path in paths.items() for word in (name, str(tmp_path / path)))]
    (tmp_path / "command.json").write_text(json.dumps(command))
    process = run_ranks("tests.cli.ranks", tmp_path, ranks=2)
    assert process.returncode == 0, process.stderr
    folder = tmp_path / "cache"
    assert f"{folder}: 2 of 2 parts are complete\n" in process.stderr
    rows = {
        str(part): sum(shard.rows for shard in each.shards) for part, each in CachedTeacher(folder).manifests.items()
    }
    assert rows == {f"{folder}/part-1-of-2": 3, f"{folder}/part-2-of-2": 2}


STREAM = {**OPTIONS, "max_steps": 5, "per_device_train_batch_size": 2}


@pytest.mark.parametrize(
    "extra",
    [
        {"lmbda": 0.0},
        {"lmbda": 0.5},
        {"lmbda": 0.5, "rollout_steps": 2},
        {"lmbda": 1.0, "gradient_accumulation_steps": 2, "max_steps": 3},
    ],
    ids=["off-policy", "mixed", "blocks", "accumulation"],
)
def test_ranks_whose_shards_of_a_stream_differ_in_length_end_their_epochs_together(full_run, tmp_path, extra):
    # 3 and 6 batches on the two ranks.
    result, _, process = full_run(tmp_path / "run", ranks=2, **{**STREAM, **extra}, shards=[6, 12])
    assert result is not None, process.stderr
    assert len(steps(result)) == extra.get("max_steps", 5)
    assert "differ in length" in process.stderr


def test_a_row_that_one_rank_can_not_complete_stops_both_after_a_checkpoint(full_run, tmp_path):
    options = {**OPTIONS, "max_steps": 4, "per_device_train_batch_size": 2, "lmbda": 1.0, "odd_positions_in": 11}
    result, _, process = full_run(tmp_path / "run", ranks=2, **options)
    assert result is None
    assert "position_ids of a sample to be completed must count up by one" in process.stderr
    assert "stopped, since another rank failed" in process.stderr
    assert process.stderr.count("resume with train(resume_from_checkpoint=True)") >= 2
    assert (tmp_path / "run" / "run" / "checkpoint-2" / "trainer_state.json").exists()


def test_a_rank_without_data_stops_all_with_an_error(full_run, tmp_path):
    result, _, process = full_run(tmp_path / "run", ranks=2, **STREAM, lmbda=0.5, shards=[0, 12])
    assert result is None
    assert process.stderr.count("too small for one step: 1 of 2 ranks had fewer than 1 batches") == 2, process.stderr


def test_a_teacher_whose_weights_only_the_first_rank_has_is_refused(full_run, tmp_path):
    two, _, process = full_run(tmp_path / "two", ranks=2, per_device_train_batch_size=2, **OPTIONS, **FSDP)
    assert two is None
    assert "the teacher's weights must be the same on every rank" in process.stderr


def test_fsdp_version_1_gives_the_gradients_and_completions_of_an_unsharded_student():
    process = run_ranks("tests.trainer.fsdp1", ranks=2)
    assert process.returncode == 0, process.stderr
