"""The properties of a teacher, also of one that implements only the abstract members."""

import pytest

from gkd_trainer.teachers import FrozenTeacher, Teacher, VLLMServerTeacher


class Remote(Teacher):
    """A teacher of a user's, elsewhere."""

    vocab_size, vocabulary, model, top_k = 368, None, None, 7
    is_local = can_generate = False

    def score(self, batch):
        raise AssertionError

    def prepare(self, device, tokenizer=None, max_length=None):
        raise AssertionError


def test_a_teacher_in_this_process_is_local_and_can_generate(tiny_model):
    teacher = FrozenTeacher(tiny_model())
    assert teacher.is_local
    assert teacher.can_generate


def test_a_teacher_behind_a_server_is_not_local_and_can_not_generate():
    teacher = VLLMServerTeacher("http://127.0.0.1:9")
    assert not teacher.is_local
    assert not teacher.can_generate


def test_a_model_that_can_not_generate_makes_a_teacher_that_can_not(tiny_model, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(model, "can_generate", lambda: False)
    assert not FrozenTeacher(model).can_generate


@pytest.mark.parametrize("name", ["is_local", "can_generate"])
def test_a_teacher_has_to_say_what_it_can_do(name):
    silent = type("Silent", (Remote,), {name: getattr(Teacher, name)})
    silent.__abstractmethods__ = frozenset({name})
    with pytest.raises(TypeError, match=name):
        silent()


def test_a_teacher_shares_no_weights_by_default(tiny_model):
    class AdapterOff(Remote):
        shares_weights = True

    assert not any(teacher.shares_weights for teacher in (Remote(), FrozenTeacher(tiny_model())))
    assert AdapterOff().shares_weights
