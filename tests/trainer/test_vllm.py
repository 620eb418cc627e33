"""The trainer with a real vLLM: rollouts in process and from a server, a served teacher, and servers that fail."""

import json
import threading
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from gkd_trainer import (
    FrozenTeacher,
    GKDRolloutError,
    GKDServerError,
    HiddenStateServerTeacher,
    VLLMColocateRollouts,
    VLLMServerTeacher,
)
from gkd_trainer.cli import main
from gkd_trainer.rollouts import HFRollouts
from tests.serving import FaultyProxy, changed, delayed, status
from tests.trainer.conftest import make_rows
from tests.trainer.run import FSDP
from tests.versions import IN_ORDER

PROMPTS = [[5, 6, 7, 8], [30, 31], [100, 120, 140, 160, 180]]
# Large steps, so that the weights of one step give other completions than those of the next.
RUN = {
    "lmbda": 1.0,
    "beta": 1.0,
    "learning_rate": 1e-2,
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
}
TIMEOUTS = {"vllm_server_timeout": 1.5, "vllm_request_timeout": 10.0}


class At(TrainerCallback):
    """Does something once a step is complete."""

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.do()


@pytest.fixture
def student(tiny_model):
    """A student of the shape that the server holds, with other weights."""
    return tiny_model(hidden=128, seed=7)


@pytest.fixture
def server_options(vllm_server):
    return {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": vllm_server.base_url}


@pytest.fixture
def run(make_trainer, tiny_model):
    """Make a trainer, train it, and return it."""

    def run(model=None, callbacks=None, resume=False, rollouts=None, **options):
        model = model if model is not None else tiny_model(hidden=128, seed=7)
        arguments = {"callbacks": callbacks, "model": model, "rollouts": rollouts}
        trainer = make_trainer(trainer_args=arguments, **{**RUN, **options})
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def greedy(engine):
    return [list(completion.token_ids) for completion in engine.generate(PROMPTS, engine.greedy_sampling(12), [0] * 3)]


def greedy_by_transformers(model):
    engine = HFRollouts([2], pad_token_id=2, vocab_size=360)
    engine.sync(model)
    return greedy(engine)


def assert_same_weights(trainer, other):
    for (name, weight), expected in zip(trainer.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(weight, expected), name


def test_both_modes_train_alike_and_follow_the_student(run, server_options, student, tiny_model, monkeypatch):
    before = greedy_by_transformers(student)
    colocated = run(use_vllm=True, vllm_engine_kwargs={"enforce_eager": True}, vllm_max_model_length=64, model=student)
    served = run(**server_options)
    assert isinstance(colocated.rollouts, VLLMColocateRollouts)
    # To the last digit that is logged: same seeds, same weights, same numerics.
    assert losses(served) == losses(colocated)
    for trainer in (colocated, served):  # the engines also normalise over rows of the head that are no tokens
        assert len(logged(trainer, "sampling_logp_difference")) == 4
        assert max(logged(trainer, "sampling_logp_difference")) < 0.1
    assert len(set(losses(served))) == 4
    for trainer in (colocated, served):
        after = greedy_by_transformers(trainer.model)
        assert after != before
        trainer.rollouts.sync(trainer.model)
        assert greedy(trainer.rollouts) == after
    assert all(seconds > 0 for seconds in logged(served, "seconds_sync"))
    # Another student, whose weights never arrive in the engines.
    for trainer in (colocated, served):
        monkeypatch.setattr(type(trainer.rollouts), "sync", lambda engine, model: None)
        with pytest.raises(GKDRolloutError, match=r"does not compute the student: .* differ by .* nats"):
            run(tiny_model(hidden=128, seed=8), rollouts=trainer.rollouts, max_new_tokens=32)
    folder = colocated.rollouts._folder.path
    assert folder.exists()
    for _ in range(2):
        colocated.rollouts.close()
        assert not folder.exists()


def test_weights_pass_only_when_they_have_changed(run, vllm_server, student):
    with FaultyProxy(vllm_server.base_url) as proxy:
        options = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": proxy.base_url}
        trainer = run(model=student, max_steps=2, **options)
        loads = [request for request in proxy.requests if request.path == "/collective_rpc"]
        assert len(loads) == 2
        rows = [{"prompt": "one two"}, {"prompt": "three"}]
        trainer.evaluate(rows)  # the weights after the last step
        trainer.evaluate(rows)
        assert len([request for request in proxy.requests if request.path == "/collective_rpc"]) == 3


@pytest.mark.parametrize(
    ("options", "staleness"),
    [
        ({"rollout_steps": 2}, {2: 1.0, 4: 1.0}),
        ({"rollout_overlap": True}, {2: 1.0, 3: 1.0, 4: 1.0}),
        ({"rollout_steps": 2, "rollout_overlap": True}, {2: 1.0, 3: 2.0, 4: 3.0}),
    ],
)
def test_completions_are_as_old_as_the_options_say(run, server_options, options, staleness):
    trainer = run(**server_options, **options)
    entries = enumerate((entry for entry in trainer.state.log_history if "loss" in entry), start=1)
    assert {step: entry["rollout_staleness"] for step, entry in entries if "rollout_staleness" in entry} == staleness
    again = run(**server_options, **options)
    assert losses(again) == losses(trainer)
    assert_same_weights(again, trainer)


def test_a_block_of_steps_makes_one_call(run, vllm_server):
    with FaultyProxy(vllm_server.base_url) as proxy:
        options = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": proxy.base_url}
        run(rollout_steps=4, **options)
        assert proxy.paths().count("/collective_rpc") == 1
        assert proxy.paths().count("/v1/completions") == 1 + 16  # one at first contact


# 16 rows in windows of 4 make 4 steps an epoch: in the middle of the first, at its end, in the middle of the second.
@pytest.mark.parametrize("options", [{"rollout_overlap": True}, {"rollout_steps": 3}], ids=["overlap", "steps"])
def test_a_resumed_run_trains_on_the_completions_that_were_running(run, server_options, tmp_path, options):
    options = {**server_options, **options, "max_steps": 7, "lmbda": 0.7}
    unbroken = run(save_strategy="steps", save_steps=1, output_dir=str(tmp_path / "unbroken"), **options)
    for step in (2, 4, 5):
        checkpoint = tmp_path / "unbroken" / f"checkpoint-{step}"
        resumed = run(resume=str(checkpoint), output_dir=str(tmp_path / f"resumed-{step}"), **options)
        assert losses(resumed) == losses(unbroken)
        assert_same_weights(resumed, unbroken)
    kept = {step: (tmp_path / f"unbroken/checkpoint-{step}/rollouts-rank0.json").exists() for step in range(1, 8)}
    # None over an epoch's end, nor after the last step.
    expected = {"rollout_overlap": {1, 2, 3, 5, 6}, "rollout_steps": {1, 2, 5, 6}}
    assert {step for step, exists in kept.items() if exists} == expected[
        next(name for name in expected if name in options)
    ]


# Several ranks


RANKS = {
    "lmbda": 1.0,
    "max_steps": 3,
    "save_strategy": "no",
    "learning_rate": 1e-2,
    **IN_ORDER,
    "optim": "sgd",
    "max_grad_norm": 0.0,
}


def assert_two_ranks_do_as_one(full_run, student, folder, options, *, one, **further):
    two, actual, process = full_run(
        folder, ranks=2, student=student, per_device_train_batch_size=2, **RANKS, **options, **further
    )
    assert two is not None, process.stderr
    result, expected, _ = one
    steps = [[entry["loss"] for entry in each["log"] if "loss" in entry] for each in (result, two)]
    assert steps[1] == pytest.approx(steps[0], rel=1e-4)
    for name, tensor in expected.items():
        assert torch.allclose(actual[name], tensor, rtol=0, atol=1e-5), name


def test_two_ranks_roll_out_as_one_by_servers_and_by_one_engine_over_both(
    full_run, tiny_model, server_options, tmp_path
):
    student = tiny_model(hidden=128, seed=7)
    one = full_run(tmp_path / "one", student=student, per_device_train_batch_size=4, **RANKS, **server_options)
    assert_two_ranks_do_as_one(full_run, student, tmp_path / "servers", server_options, one=one)
    over_both = {"use_vllm": True, "vllm_tensor_parallel_size": 2, "vllm_engine_kwargs": {"enforce_eager": True}}
    assert_two_ranks_do_as_one(full_run, student, tmp_path / "tensor-parallel", over_both, one=one)


@pytest.mark.servers
def test_servers_get_the_weights_of_a_student_that_is_sharded_by_fsdp(full_run, tiny_model, server_options, tmp_path):
    student = tiny_model(hidden=128, seed=7)
    one = full_run(tmp_path / "one", student=student, per_device_train_batch_size=4, **RANKS, **server_options)
    options = {**server_options, **FSDP}
    assert_two_ranks_do_as_one(full_run, student, tmp_path / "sharded", options, one=one, names_teacher=True)


def test_a_server_that_fails_one_rank_stops_both_and_saves(full_run, tiny_model, server_options, tmp_path):
    folder, student = tmp_path / "two", tiny_model(hidden=128, seed=7)
    began = time.monotonic()
    result, _, process = full_run(
        folder,
        ranks=2,
        student=student,
        per_device_train_batch_size=2,
        loses_server_on_rank=1,
        **RANKS,
        **server_options,
    )
    assert result is None
    assert time.monotonic() - began < 90
    assert "http://127.0.0.1:9 did not complete" in process.stderr
    assert "stopped, since another rank failed" in process.stderr
    assert (folder / "run" / "checkpoint-1" / "trainer_state.json").exists()


# A teacher behind a server


@pytest.fixture
def teacher_model(served_model, vllm_server, served_dir):
    """The model that the server started with, served again: rollouts of the tests before replaced its weights."""
    import httpx

    load = {"method": "reload_weights", "kwargs": {"weights_path": str(served_dir)}}
    httpx.post(f"{vllm_server.base_url}/collective_rpc", json=load, trust_env=False, timeout=60).raise_for_status()
    httpx.post(f"{vllm_server.base_url}/reset_prefix_cache", trust_env=False, timeout=60).raise_for_status()
    return served_model


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_a_served_teacher_trains_as_the_same_one_in_this_process(run, make_trainer, teacher_model, vllm_server, tail):
    options = {**RUN, "lmbda": 0.5, "beta": 0.5, "teacher_tail": tail}
    local = make_trainer(
        trainer_args={"teacher": FrozenTeacher(teacher_model, top_k=16)}, **{**options, "teacher_top_k": None}
    )
    local.train()
    served = make_trainer(
        trainer_args={"teacher_model": None}, teacher_server_base_url=vllm_server.base_url, teacher_top_k=16, **options
    )
    served.train()
    assert losses(served) == pytest.approx(losses(local), rel=1e-4)
    assert isinstance(served.teacher, VLLMServerTeacher)
    assert served.teacher_model is None
    for name in ("teacher_top_k_mass", "student_top_k_mass"):
        assert logged(served, name) == pytest.approx(logged(local, name), rel=1e-3)
        assert all(0 < mass < 1 for mass in logged(served, name))


def test_the_full_vocabulary_as_top_k_is_the_full_divergence(run, make_trainer, teacher_model):
    options = {**RUN, "lmbda": 0.0, "beta": 0.5}
    whole = make_trainer(trainer_args={"teacher_model": teacher_model}, **options)
    whole.train()
    top = make_trainer(trainer_args={"teacher_model": teacher_model}, teacher_top_k=368, **options)
    top.train()
    assert losses(top) == pytest.approx(losses(whole), rel=1e-5)


def hidden_options(base_url, served_dir):
    return {
        "teacher_server_base_url": base_url,
        "teacher_server_signal": "hidden_states",
        "teacher_model_name_or_path": str(served_dir),
    }


def test_hidden_states_of_a_server_train_as_the_same_teacher_in_this_process(
    make_trainer, served_model, hidden_server, served_dir
):
    options = {**RUN, "lmbda": 0.5, "beta": 0.5, "loss_temperature": 2.0}
    local = make_trainer(trainer_args={"teacher_model": served_model}, **options)
    local.train()
    served = make_trainer(
        trainer_args={"teacher_model": None}, **hidden_options(hidden_server.base_url, served_dir), **options
    )
    served.train()
    assert losses(served) == pytest.approx(losses(local), rel=1e-4)
    assert isinstance(served.teacher, HiddenStateServerTeacher)
    assert not logged(served, "teacher_top_k_mass")


def test_the_command_trains_from_hidden_states_of_a_server(hidden_server, served_dir, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, make_rows(4))))
    places = {"model": served_dir, "dataset": tmp_path / "rows.jsonl", "output_dir": tmp_path / "output"}
    options = {**places, **hidden_options(hidden_server.base_url, served_dir), "max_steps": 1, "max_length": 64}
    command = ["train", "--use_cpu", "--report_to", "none", "--logging_steps", "1"]
    main([*command, *(part for name, value in options.items() for part in (f"--{name}", str(value)))])
    log = json.loads((tmp_path / "output" / "trainer_state.json").read_text())["log_history"]
    # The student is the teacher.
    assert log[0]["divergence_off_policy"] == pytest.approx(0.0, abs=1e-5)
    assert log[0]["acceptance"] == pytest.approx(1.0, abs=1e-3)


def test_hidden_states_that_fail_to_come_leave_a_checkpoint_that_resumes(
    make_trainer, tiny_model, hidden_proxy, served_dir, tmp_path
):
    options = {**RUN, **TIMEOUTS, **hidden_options(hidden_proxy.base_url, served_dir), "lmbda": 0.5}

    def trainer_of(folder, callbacks=None):
        return make_trainer(
            trainer_args={"model": tiny_model(seed=7), "teacher_model": None, "callbacks": callbacks},
            output_dir=str(tmp_path / folder),
            **options,
        )

    expected = trainer_of("expected")
    expected.train()

    def fail_at_the_second_micro_batch():
        hidden_proxy.next(lambda request, forward: forward(), path="/pooling")
        hidden_proxy.next(status(500), times=None, path="/pooling")

    with pytest.raises(GKDServerError, match=r"POST /pooling.*status 500.*checkpoint-2"):
        trainer_of("run", [At(2, fail_at_the_second_micro_batch)]).train()
    hidden_proxy.heal()
    resumed = trainer_of("run")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == pytest.approx(losses(expected), rel=1e-5)


# When servers fail


def test_a_server_that_is_killed_and_comes_back_disturbs_nothing(run, server_options, vllm_server):
    expected = run(**server_options)
    restart = threading.Thread(target=vllm_server.start)

    def kill():
        vllm_server.kill()
        restart.start()

    disturbed = run(callbacks=[At(2, kill)], **server_options, vllm_server_timeout=180.0)
    restart.join()
    assert losses(disturbed) == losses(expected)
    assert_same_weights(disturbed, expected)


@pytest.mark.parametrize("options", [{}, {"rollout_overlap": True}], ids=["now", "overlap"])
def test_a_rollout_server_that_does_not_return_leaves_a_checkpoint_that_resumes(run, vllm_server, tmp_path, options):
    with FaultyProxy(vllm_server.base_url) as proxy:
        options = {
            **options,
            "use_vllm": True,
            "vllm_mode": "server",
            "vllm_server_base_url": proxy.base_url,
            "output_dir": str(tmp_path / "run"),
            **TIMEOUTS,
        }
        expected = run(**{**options, "output_dir": str(tmp_path / "expected")})
        began = time.monotonic()
        with pytest.raises(GKDServerError) as raised:
            run(callbacks=[At(2, proxy.stop)], **options)
        assert time.monotonic() - began < 30
        message = str(raised.value)
        assert proxy.base_url in message
        assert "ConnectError" in message
        assert "checkpoint-" in message
        assert "train(resume_from_checkpoint=True)" in message
        proxy.start()
        resumed = run(resume=True, **options)
        # With overlap, what failed to be generated in time is generated again from newer weights.
        if not options.get("rollout_overlap"):
            assert losses(resumed) == losses(expected)
            assert_same_weights(resumed, expected)
        assert resumed.state.global_step == 4


@pytest.mark.parametrize("rollout_steps", [1, 2])
def test_a_teacher_server_that_does_not_return_during_a_window_leaves_one_too(
    make_trainer, tiny_model, teacher_model, vllm_server, tmp_path, rollout_steps
):
    # Dropout draws from the global random state, which the first micro-batch of the lost step has moved already.
    options = {**RUN, "lmbda": 0.5, "disable_dropout": False, **TIMEOUTS, "teacher_top_k": 8}
    options["rollout_steps"] = rollout_steps
    student = tiny_model(attention_dropout=0.3)
    student.save_pretrained(tmp_path / "student")

    def trainer_of(proxy, folder, callbacks=None):
        return make_trainer(
            trainer_args={"model": str(tmp_path / "student"), "teacher_model": None, "callbacks": callbacks},
            teacher_server_base_url=proxy.base_url,
            output_dir=str(tmp_path / folder),
            **options,
        )

    with FaultyProxy(vllm_server.base_url) as proxy:
        expected = trainer_of(proxy, "expected")
        expected.train()

        def fail_at_the_second_micro_batch():
            proxy.next(lambda request, forward: forward(), path="/v1/completions")
            proxy.next(status(500), times=None, path="/v1/completions")

        with pytest.raises(GKDServerError, match=r"status 500.*checkpoint-2") as raised:
            trainer_of(proxy, "run", [At(2, fail_at_the_second_micro_batch)]).train()
        assert "/v1/completions" in str(raised.value)
        proxy.heal()
        kept = tmp_path / "run" / "checkpoint-2" / "rollouts-rank0.json"
        assert kept.exists()  # of the window that was lost, and what is left of its block
        resumed = trainer_of(proxy, "run")
        resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(expected)
    assert_same_weights(resumed, expected)


def test_a_trainer_that_failed_continues_when_its_server_is_back(run, vllm_server, tmp_path):
    with FaultyProxy(vllm_server.base_url) as proxy:
        options = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": proxy.base_url, **TIMEOUTS}
        trainer = run(max_steps=1, rollout_overlap=True, output_dir=str(tmp_path / "run"), **options)
        trainer.args.max_steps = 4
        trainer.add_callback(At(2, proxy.stop))
        with pytest.raises(GKDServerError):
            trainer.train()
        proxy.start()
        trainer.evaluate([{"prompt": "one two"}])
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 4


def test_a_checkpoint_of_an_older_run_is_not_taken_for_this_ones(run, vllm_server, tmp_path):
    with FaultyProxy(vllm_server.base_url) as proxy:
        options = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": proxy.base_url, **TIMEOUTS}
        folder = tmp_path / "run"
        run(max_steps=2, save_strategy="steps", save_steps=2, output_dir=str(folder), learning_rate=1e-4, **options)
        older = load_file(folder / "checkpoint-2" / "model.safetensors")
        with pytest.raises(GKDServerError, match="checkpoint-2"):
            run(callbacks=[At(2, proxy.stop)], output_dir=str(folder), **options)
    newer = load_file(folder / "checkpoint-2" / "model.safetensors")
    assert any(not torch.equal(newer[name], weight) for name, weight in older.items())


def test_a_failure_before_the_first_step_leaves_no_checkpoint(run, vllm_server, tmp_path):
    with FaultyProxy(vllm_server.base_url) as proxy:
        proxy.next(lambda request, forward: forward(), path="/v1/completions")  # at first contact
        proxy.next(status(500), times=None, path="/v1/completions")
        options = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": proxy.base_url, **TIMEOUTS}
        with pytest.raises(GKDServerError, match="status 500"):
            run(output_dir=str(tmp_path / "run"), **options)
        assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_mistakes_that_pass_change_nothing(run, server_options, vllm_server):
    expected = run(**server_options)

    def lose_a_token(answer):
        answer["choices"][0]["token_ids"].pop()

    with FaultyProxy(vllm_server.base_url) as proxy:
        proxy.next(lambda request, forward: forward(), path="/v1/completions")  # at first contact
        proxy.next(status(500), times=3, path="/v1/completions")
        proxy.next(delayed(0.3), times=5, path="/v1/completions")
        proxy.next(changed(lose_a_token), times=2, path="/v1/completions")
        disturbed = run(**{**server_options, "vllm_server_base_url": proxy.base_url})
    assert losses(disturbed) == losses(expected)
    assert_same_weights(disturbed, expected)


def test_a_checkpoint_of_a_failed_run_is_not_written_twice(run, vllm_server, tmp_path):
    with FaultyProxy(vllm_server.base_url) as proxy:
        options = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": proxy.base_url, **TIMEOUTS}
        folder = tmp_path / "run"
        with pytest.raises(GKDServerError, match="checkpoint-2"):
            run(
                callbacks=[At(2, proxy.stop)],
                output_dir=str(folder),
                save_strategy="steps",
                save_steps=2,
                **options,
            )
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert load_file(folder / "checkpoint-2" / "model.safetensors")
