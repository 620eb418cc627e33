"""The properties of a teacher, also of one that implements only the abstract methods."""

import torch

from gkd_trainer.teachers import FrozenTeacher, Teacher, VLLMServerTeacher


class Remote(Teacher):
    """A teacher of a user's, elsewhere."""

    vocab_size, vocabulary, model, top_k = 368, None, None, 7

    def score(self, batch):
        raise AssertionError

    def prepare(self, device, tokenizer=None, max_length=None):
        raise AssertionError


class Local(Remote):
    """A teacher of a user's, in this process."""

    def __init__(self, model):
        self.model = model


def test_a_teacher_in_this_process_is_local_and_can_generate(tiny_model):
    for teacher in (FrozenTeacher(tiny_model()), Local(tiny_model())):
        assert teacher.is_local
        assert teacher.can_generate


def test_a_remote_teacher_is_not_local_and_can_not_generate():
    for teacher in (Remote(), VLLMServerTeacher("http://127.0.0.1:9")):
        assert not teacher.is_local
        assert not teacher.can_generate


def test_a_model_that_can_not_generate_makes_a_teacher_that_can_not(tiny_model, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(model, "can_generate", lambda: False)
    assert not Local(model).can_generate
    assert not Local(torch.nn.Linear(2, 2)).can_generate


def test_a_teacher_shares_no_weights_by_default(tiny_model):
    class AdapterOff(Local):
        shares_weights = True

    assert not any(teacher.shares_weights for teacher in (Remote(), FrozenTeacher(tiny_model())))
    assert AdapterOff(tiny_model()).shares_weights
