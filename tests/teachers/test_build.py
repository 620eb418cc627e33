"""Options and arguments become one teacher, or an error that says which to keep."""

from pathlib import Path

import pytest
import torch

from gkd_trainer import GKDArguments
from gkd_trainer.errors import GKDTeacherError
from gkd_trainer.teachers import (
    CachedTeacher,
    FrozenTeacher,
    HiddenStateServerTeacher,
    RoutedTeachers,
    SelfTeacher,
    VLLMServerTeacher,
    WeightedTeachers,
    build_teacher,
)
from tests.teachers.cache.rows import make_rows, source, write

URL = "http://127.0.0.1:9"


@pytest.fixture
def folder(tiny_model, tmp_path):
    tiny_model(seed=1).save_pretrained(tmp_path)
    return tmp_path


def is_the_saved_one(teacher, tiny_model):
    return torch.equal(teacher.model.lm_head.weight, tiny_model(seed=1).lm_head.weight)


def test_a_teacher_is_returned_as_it_is(tiny_model):
    teacher = FrozenTeacher(tiny_model())
    assert build_teacher(GKDArguments(), teacher=teacher) is teacher


def test_a_model_becomes_a_teacher(tiny_model):
    model = tiny_model()
    teacher = build_teacher(GKDArguments(teacher_top_k=5), teacher_model=model)
    assert isinstance(teacher, FrozenTeacher)
    assert teacher.model is model
    assert teacher.top_k == 5


def test_a_name_is_loaded_with_the_options(folder, tiny_model):
    options = {"teacher_model_init_kwargs": {"dtype": "bfloat16"}, "teacher_top_k": 5}
    for teacher in (
        build_teacher(GKDArguments(**options), teacher_model=folder),
        build_teacher(GKDArguments(**options, teacher_model_name_or_path=str(folder))),
        build_teacher(GKDArguments(**options, teacher_model_name_or_path=str(folder)), teacher_model=f"{folder}/"),
    ):
        assert teacher.model.dtype == torch.bfloat16
        assert teacher.top_k == 5
    assert is_the_saved_one(build_teacher(GKDArguments(), teacher_model=str(folder)), tiny_model)


def test_servers_become_a_teacher_with_the_options():
    teacher = build_teacher(GKDArguments(teacher_server_base_url=[URL, "http://127.0.0.1:8"], teacher_top_k=7))
    assert isinstance(teacher, VLLMServerTeacher)
    assert list(teacher.base_urls) == [URL, "http://127.0.0.1:8"]
    assert teacher.top_k == 7
    assert build_teacher(GKDArguments(teacher_server_base_url=URL)).top_k == VLLMServerTeacher(URL).top_k
    assert teacher.model_name is None
    named = build_teacher(GKDArguments(teacher_server_base_url=URL, teacher_server_model="tuned"))
    assert named.model_name == "tuned"


def test_names_by_name_become_several_teachers_with_the_options(folder):
    paths = {"math": str(folder), "code": str(folder)}
    options = {"teacher_model_init_kwargs": {"dtype": "bfloat16"}, "teacher_top_k": 5}
    routed = build_teacher(GKDArguments(teachers=paths, teacher_column="domain", **options))
    assert isinstance(routed, RoutedTeachers)
    assert routed.names == ("math", "code")
    assert routed.column == "domain"
    assert {each.model.dtype for each in routed.teachers} == {torch.bfloat16}
    assert routed.top_k == 5
    weighted = build_teacher(GKDArguments(teachers=paths, teacher_weights={"code": 1, "math": 3}))
    assert isinstance(weighted, WeightedTeachers)
    assert weighted.weights == {"math": 0.75, "code": 0.25}


def test_servers_of_hidden_states_become_a_teacher_with_the_head_of_the_named_checkpoint(folder, tiny_model):
    options = {
        "teacher_server_base_url": [URL, "http://127.0.0.1:8"],
        "teacher_server_signal": "hidden_states",
        "teacher_model_name_or_path": str(folder),
    }
    init_kwargs = {"local_files_only": True}
    teacher = build_teacher(
        GKDArguments(**options, teacher_server_model="tuned", teacher_model_init_kwargs=init_kwargs)
    )
    assert isinstance(teacher, HiddenStateServerTeacher)
    assert teacher.base_urls == options["teacher_server_base_url"]
    assert teacher._servers.model_name == "tuned"
    assert (teacher.checkpoint, teacher.top_k) == (str(folder), None)
    assert teacher.vocab_size == len(tiny_model().lm_head.weight)
    with pytest.raises(GKDTeacherError, match=r"can only say where it is stored .*; got dtype: give the others"):
        build_teacher(GKDArguments(**options, teacher_model_init_kwargs={"dtype": "bfloat16"}))
    with pytest.raises(GKDTeacherError, match="got more than one of teacher, teacher_model,"):
        build_teacher(GKDArguments(**options), teacher_model=tiny_model())


@pytest.mark.parametrize("source", ["base", "ema", "reference"])
def test_the_student_becomes_its_own_teacher(source):
    teacher = build_teacher(GKDArguments(self_teacher=source, self_teacher_ema_decay=0.5))
    assert isinstance(teacher, SelfTeacher)
    assert teacher.source == source


def test_no_teacher_is_refused():
    with pytest.raises(GKDTeacherError, match="no teacher: pass teacher_model"):
        build_teacher(GKDArguments())


def test_more_than_one_teacher_is_refused(tiny_model):
    for args, given in (
        (GKDArguments(), {"teacher": FrozenTeacher(tiny_model()), "teacher_model": tiny_model()}),
        (GKDArguments(teacher_server_base_url=URL), {"teacher_model": tiny_model()}),
        (GKDArguments(teacher_server_base_url=URL), {"teacher": FrozenTeacher(tiny_model())}),
        (GKDArguments(teachers={"math": "a/b"}), {"teacher_model": tiny_model()}),
        (GKDArguments(self_teacher="base"), {"teacher_model": tiny_model()}),
        (GKDArguments(self_teacher="base"), {"teacher": FrozenTeacher(tiny_model())}),
    ):
        with pytest.raises(GKDTeacherError, match="got more than one of teacher, teacher_model,"):
            build_teacher(args, **given)


def test_a_name_beside_another_teacher_is_refused(folder, tiny_model):
    args = GKDArguments(teacher_model_name_or_path=str(folder))
    for given in ({"teacher_model": tiny_model()}, {"teacher": FrozenTeacher(tiny_model())}):
        with pytest.raises(GKDTeacherError, match="that was not loaded from"):
            build_teacher(args, **given)


def test_options_that_do_not_apply_to_a_loaded_teacher_are_refused(tiny_model):
    with pytest.raises(GKDTeacherError, match="teacher_model_init_kwargs is for loading a teacher by name"):
        build_teacher(GKDArguments(teacher_model_init_kwargs={"dtype": "bfloat16"}), teacher_model=tiny_model())
    with pytest.raises(GKDTeacherError, match="teacher_top_k has no effect on a teacher passed as an object"):
        build_teacher(GKDArguments(teacher_top_k=5), teacher=FrozenTeacher(tiny_model()))
    with pytest.raises(GKDTeacherError, match="teacher_offload has no effect on a teacher passed as an object"):
        build_teacher(GKDArguments(teacher_offload=True), teacher=FrozenTeacher(tiny_model()))


@pytest.mark.parametrize("is_named", [False, True])
def test_a_teacher_that_is_to_wait_on_the_cpu_is_built_so(folder, tiny_model, is_named):
    model = str(folder) if is_named else tiny_model()
    assert not build_teacher(GKDArguments(teacher_offload=True), teacher_model=model).can_generate
    assert build_teacher(GKDArguments(), teacher_model=model).can_generate


def test_anything_but_a_model_is_refused(tiny_model):
    with pytest.raises(GKDTeacherError, match="teacher_model is a FrozenTeacher: pass a Teacher as teacher"):
        build_teacher(GKDArguments(), teacher_model=FrozenTeacher(tiny_model()))
    with pytest.raises(GKDTeacherError, match="expected a causal LM as the teacher; got int"):
        build_teacher(GKDArguments(), teacher_model=7)


@pytest.fixture
def cache(tmp_path):
    write(tmp_path / "cache", make_rows(3), source=source(train_on="last_turn"))
    return str(tmp_path / "cache")


def test_a_cache_becomes_a_teacher_with_its_fallback(cache, tiny_model, folder):
    last = {"teacher_cache_dir": cache, "lmbda": 0.0, "train_on": "last_turn"}
    alone = build_teacher(GKDArguments(**last))
    assert isinstance(alone, CachedTeacher)
    assert (*map(str, alone.manifests), alone.fallback) == (cache, None)
    write(Path(cache).parent / "later", make_rows(2, seed=1))
    both = [cache, str(Path(cache).parent / "later")]
    assert list(map(str, build_teacher(GKDArguments(**{**last, "teacher_cache_dir": both})).manifests)) == both
    last["teacher_cache_miss"] = "teacher"
    named = build_teacher(GKDArguments(**last, teacher_model_name_or_path=str(folder)))
    assert is_the_saved_one(named.fallback, tiny_model)
    model = tiny_model()
    assert build_teacher(GKDArguments(**last), teacher_model=model).fallback.model is model


def test_a_cache_that_does_not_fit_the_options_or_the_other_arguments_is_refused(cache, tiny_model):
    last = {"teacher_cache_dir": cache, "lmbda": 0.0, "train_on": "last_turn"}
    with pytest.raises(GKDTeacherError, match="another train_on: 'last_turn' there, 'all_turns' in this run"):
        build_teacher(GKDArguments(teacher_cache_dir=cache, lmbda=0.0))
    with pytest.raises(GKDTeacherError, match="another train_on"):
        build_teacher(GKDArguments(lmbda=0.0), teacher=CachedTeacher(cache))
    with pytest.raises(GKDTeacherError, match="no teacher: pass teacher_model"):
        build_teacher(GKDArguments(**last, teacher_cache_miss="teacher"))
    for given in ({"teacher_model": tiny_model()}, {"teacher": FrozenTeacher(tiny_model())}):
        with pytest.raises(GKDTeacherError, match=r"got a teacher and args\.teacher_cache_dir: keep one"):
            build_teacher(GKDArguments(**last), **given)
