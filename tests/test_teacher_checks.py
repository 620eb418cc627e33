"""Options of the teacher that have no meaning together."""

import pytest

from gkd_trainer.config import GKDArguments
from gkd_trainer.config_checks import check_combinations
from gkd_trainer.config_effects import Run
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.teacher_checks import check_cache, check_loss_temperature

NAN, INF = float("nan"), float("inf")

HIDDEN_STATES = {
    "teacher_server_base_url": "http://a:1",
    "teacher_server_signal": "hidden_states",
    "teacher_model_name_or_path": "a/teacher",
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"teacher_server_base_url": "http://a:1", "teacher_model_name_or_path": "a/teacher"},
            "got both teacher_server_base_url and teacher_model_name_or_path.*or teacher_server_signal='hidden_states'",
        ),
        (
            {"teacher_server_signal": "hidden_states"},
            "'hidden_states' needs .*: set teacher_server_base_url and teacher_model_name_or_path$",
        ),
        (
            {"teacher_server_signal": "hidden_states", "teacher_model_name_or_path": "a/teacher"},
            "set teacher_server_base_url$",
        ),
        (
            {"teacher_server_signal": "hidden_states", "teacher_server_base_url": "http://a:1"},
            "set teacher_model_name_or_path$",
        ),
        ({**HIDDEN_STATES, "teacher_top_k": 5}, "teacher_top_k=5 has no effect under teacher_server_signal='hidden_st"),
        (
            {"self_teacher": "base", "teacher_model_name_or_path": "a/teacher"},
            "self_teacher='base' makes the student its own teacher, .*so teacher_model_name_or_path has no meaning",
        ),
        ({"self_teacher": "ema", "teacher_server_base_url": "http://a:1"}, "so teacher_server_base_url has no meaning"),
        ({"self_teacher": "base", "teacher_top_k": 5}, "so teacher_top_k has no meaning"),
        ({"self_teacher": "base", "teachers": {"a": "b"}}, "so teachers has no meaning"),
        ({"self_teacher": "base", "teacher_cache_dir": "/a"}, "so teacher_cache_dir has no meaning"),
        (
            {"teacher_top_k": 1, "teacher_tail": "renormalize"},
            "teacher_tail='renormalize' .* top k of 1 .* nothing is trained: set teacher_tail to 'bucket'",
        ),
        ({"teacher_top_k": 5, "loss_temperature": 2.0}, r"loss_temperature=2\.0 can't be applied to a teacher's top"),
        ({"teacher_server_base_url": "http://a:1", "loss_temperature": 0.5}, "their log-probs are at temperature 1"),
        ({"teacher_offload": True, "seq_kd": True}, "its weights must stay on the device, but teacher_offload=True"),
    ],
)
def test_sources_and_options_of_a_teacher_that_exclude_one_another_are_refused(options, message):
    with pytest.raises(GKDConfigError, match=message):
        GKDArguments(**options)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_hidden_states_of_servers_take_any_loss_temperature(temperature):
    args = GKDArguments(**HIDDEN_STATES, loss_temperature=temperature)
    check_loss_temperature(Run(args, has_top_tokens=False))


@pytest.mark.parametrize("options", [{}, {"lmbda": 0.0, "eval_on_policy": True}])
def test_a_top_k_that_only_the_trainer_knows_of_is_checked_like_one_of_the_configuration(options):
    args = GKDArguments(loss_temperature=2.0, **options)
    check_loss_temperature(Run(args, has_top_tokens=False))
    for check in (check_loss_temperature, check_combinations):
        with pytest.raises(GKDConfigError, match=r"loss_temperature=2\.0 can't be applied to a teacher's top tokens"):
            check(Run(args, has_top_tokens=True))
    check_loss_temperature(Run(GKDArguments(**options), has_top_tokens=True))


@pytest.mark.parametrize("teachers", [{}, {"math": 3}, {"math": ""}, {"": "a/b"}, {"math": None}])
def test_teachers_that_are_not_names_or_folders_by_name_are_refused(teachers):
    with pytest.raises(GKDConfigError, match="teachers must be names of models or folders by a name of your own"):
        GKDArguments(teachers=teachers)


@pytest.mark.parametrize("other", ["teacher_model_name_or_path", "teacher_server_base_url"])
def test_several_teachers_beside_another_source_are_refused(other):
    with pytest.raises(GKDConfigError, match=f"got both teachers and {other}: set one of them"):
        GKDArguments(teachers={"math": "a/b"}, **{other: "http://127.0.0.1:9"})


def test_weights_of_teachers_must_be_positive_and_for_each_of_them():
    teachers = {"math": "a/b", "code": "c/d"}
    assert GKDArguments(teachers=teachers, teacher_weights='{"code": 1, "math": 0.5}').teacher_weights["math"] == 0.5
    for weight in (0, -1, INF, NAN, "1", True):
        with pytest.raises(GKDConfigError, match="teacher_weights of code must be positive and finite"):
            GKDArguments(teachers=teachers, teacher_weights={"math": 1, "code": weight})
    with pytest.raises(GKDConfigError, match="a weight for each of the teachers math, code; got math, chat"):
        GKDArguments(teachers=teachers, teacher_weights={"math": 1, "chat": 1})


@pytest.mark.parametrize(
    ("options", "generates"),
    [
        ({}, "lmbda above 0"),
        ({"lmbda": 0.0, "lmbda_end": 0.5, "lmbda_schedule": "linear"}, "lmbda above 0"),
        ({"lmbda": 0.0, "seq_kd": True}, "seq_kd=True"),
        ({"lmbda": 0.0, "eval_on_policy": True}, "eval_on_policy=True"),
    ],
)
def test_completions_for_a_teacher_that_is_only_a_cache_are_refused(options, generates):
    problem = f"{generates} generates completions, for which a cached teacher has no predictions: set lmbda=0"
    with pytest.raises(GKDConfigError, match=problem):
        GKDArguments(teacher_cache_dir="cache", **options)
    GKDArguments(teacher_cache_dir="cache", teacher_cache_miss="teacher", **options)
    GKDArguments(teacher_cache_dir="cache", lmbda=0.0)
    args = GKDArguments(**options)
    check_cache(Run(args, has_only_cache=False))
    with pytest.raises(GKDConfigError, match=problem):  # known only to the trainer
        check_cache(Run(args, has_only_cache=True))


@pytest.mark.parametrize("teacher", ["teacher_model_name_or_path", "teacher_server_base_url"])
def test_a_teacher_that_a_cache_replaces_is_refused(teacher):
    options = {"teacher_cache_dir": "cache", teacher: "http://a:1", "lmbda": 0.0}
    with pytest.raises(GKDConfigError, match="teacher_cache_dir replaces the teacher: leave teacher_model_name"):
        GKDArguments(**options)
    GKDArguments(**options, teacher_cache_miss="teacher")


def test_a_cache_beside_several_teachers_is_refused():
    for miss in ("error", "teacher"):
        with pytest.raises(GKDConfigError, match="teacher_cache_dir holds the predictions of one teacher"):
            GKDArguments(teacher_cache_dir="cache", teacher_cache_miss=miss, teachers={"math": "a/b"}, lmbda=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_kd": True, "lmbda": 0.0}, "it can't complete the student's prompts: set seq_kd=False"),
        ({"teachers": {"math": "a/b"}}, "but teachers needs the student's: leave one of them out"),
        ({"teacher_cache_dir": "cache", "lmbda": 0.0}, "but teacher_cache_dir needs the student's"),
        ({"teacher_top_k": 5, "teacher_vocabulary_mode": "uld"}, "needs the teacher's full distributions"),
        (
            {"teacher_server_base_url": "http://a:1", "teacher_vocabulary_mode": "next_byte"},
            "needs the teacher's full distributions",
        ),
        (
            {"divergence": "skew_kl", "teacher_vocabulary_mode": "gold"},
            "teacher_vocabulary_mode='gold' needs divergence='jsd'",
        ),
    ],
)
def test_what_a_teacher_with_another_tokenizer_can_not_do_is_refused(options, message):
    with pytest.raises(GKDConfigError, match=message):
        GKDArguments(**{"teacher_vocabulary_mode": "matched", **options})


@pytest.mark.parametrize("options", [{"teacher_top_k": 5}, {"teacher_server_base_url": "http://a:1"}])
def test_top_tokens_of_another_vocabulary_are_matched(options):
    GKDArguments(teacher_vocabulary_mode="matched", **options)
