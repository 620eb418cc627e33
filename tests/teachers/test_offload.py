"""Weights that wait on the CPU: where they are, and when."""

import logging

import pytest
import torch

from gkd_trainer.models.heads import find_head
from gkd_trainer.signals import GroupedSignal, Head, HiddenSignal, LogitsSignal, SummedSignal
from gkd_trainer.teachers import FrozenTeacher, RoutedTeachers, VLLMServerTeacher, offload
from gkd_trainer.teachers.offload import WaitingWeights
from gkd_trainer.types import TokenBatch

ELSEWHERE = torch.device("meta")
"""A device that is not the CPU; nothing is computed there."""


@pytest.fixture
def moved(monkeypatch):
    """The copies of weights that went to the device, which are really in other memory of the CPU."""
    copies = []

    def move(copy, device):
        assert device == ELSEWHERE
        copies.append(copy.clone())
        return copies[-1]

    monkeypatch.setattr(offload, "_on_device", move)
    return copies


def addresses(tensors):
    return {tensor.data_ptr() for tensor in tensors}


def test_weights_are_on_their_device_only_while_they_work(tiny_model, moved):
    model = tiny_model()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    waiting = WaitingWeights.of(FrozenTeacher(model), "math", ELSEWHERE)
    at_rest = addresses(model.parameters())
    assert moved == []
    with waiting.at_work():
        assert addresses(model.parameters()) == addresses(moved)
    assert addresses(model.parameters()) == at_rest
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])


def test_weights_leave_after_a_failure_too(tiny_model, moved):
    model = tiny_model()
    waiting = WaitingWeights.of(FrozenTeacher(model), "math", ELSEWHERE)
    at_rest = addresses(model.parameters())
    with pytest.raises(RuntimeError, match="out of memory"), waiting.at_work():
        raise RuntimeError("out of memory")
    assert addresses(model.parameters()) == at_rest


def test_the_head_of_a_signal_stays_when_the_weights_leave(tiny_model, moved):
    model = tiny_model()
    waiting = WaitingWeights.of(FrozenTeacher(model), "math", ELSEWHERE)
    with waiting.at_work():
        hidden = HiddenSignal(torch.zeros(2, 32), Head(model.lm_head.weight))
        there = model.lm_head.weight.data_ptr()
        kept = waiting.detached(hidden)
        nested = waiting.detached(GroupedSignal(torch.arange(2), (SummedSignal((hidden,), (1.0,)),)))
    assert hidden.head.weight_VH.data_ptr() != there
    assert kept.head.weight_VH.data_ptr() == there
    assert nested.groups[0].terms[0].head.weight_VH.data_ptr() == there
    logits = LogitsSignal(torch.zeros(2, 5))
    assert waiting.detached(logits) is logits


def test_tied_weights_move_once_and_stay_tied(tiny_model, moved):
    model = tiny_model(tie_word_embeddings=True)
    waiting = WaitingWeights.of(FrozenTeacher(model), "math", ELSEWHERE)
    with waiting.at_work():
        assert len(moved) == len(list(model.parameters()))
        assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_teachers_take_turns_and_one_without_samples_is_not_moved(tiny_model, moved, monkeypatch):
    models = {"math": tiny_model(seed=1), "code": tiny_model(seed=2), "chat": tiny_model(seed=3)}
    plain = RoutedTeachers({name: FrozenTeacher(model) for name, model in models.items()})
    plain.prepare(torch.device("cpu"))
    ids_BL = torch.arange(18).reshape(3, 6)
    rows = {"input_ids": ids_BL, "labels": ids_BL, "teacher_index": torch.tensor([2, 0, 2])}
    expected = plain.score(TokenBatch.from_inputs(rows))
    waiting = RoutedTeachers({name: FrozenTeacher(model) for name, model in models.items()}, offload=True)
    monkeypatch.setattr(FrozenTeacher, "prepare", lambda self, *args: setattr(self, "_head", find_head(self.model)))
    waiting.prepare(ELSEWHERE)
    at_rest = {name: addresses(model.parameters()) for name, model in models.items()}
    signal = waiting.score(TokenBatch.from_inputs(rows))
    assert len(moved) == 2 * len(list(models["math"].parameters()))
    assert {name: addresses(model.parameters()) for name, model in models.items()} == at_rest
    for group, other in zip(signal.groups, (expected.groups[0], expected.groups[2]), strict=True):
        assert torch.equal(group.hidden_NH, other.hidden_NH)
    assert torch.equal(signal.order_N, expected.order_N)


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [("is_quantized", True, "they are quantised"), ("hf_device_map", {"": 0}, "a device map placed them")],
)
def test_models_that_were_placed_are_left_alone_with_one_warning(tiny_model, caplog, attribute, value, reason):
    model = tiny_model()
    setattr(model, attribute, value)
    with caplog.at_level(logging.WARNING):
        assert WaitingWeights.of(FrozenTeacher(model), "math", ELSEWHERE) is None
    [record] = caplog.records
    assert f"Teacher math is not offloaded: {reason}" in record.getMessage()


def test_sharded_weights_and_the_student_s_own_are_left_alone(tiny_model):
    model = tiny_model()
    model.lm_head.weight.ds_id = 0
    assert WaitingWeights.of(FrozenTeacher(model), "math", ELSEWHERE) is None
    shared = FrozenTeacher(tiny_model())
    shared.shares_weights = True
    assert WaitingWeights.of(shared, "math", ELSEWHERE) is None


def test_nothing_waits_on_a_cpu_or_behind_a_server(tiny_model):
    assert WaitingWeights.of(FrozenTeacher(tiny_model()), "math", torch.device("cpu")) is None
    assert WaitingWeights.of(VLLMServerTeacher("http://127.0.0.1:9"), "math", ELSEWHERE) is None


@pytest.mark.parametrize("top_k", [None, 3])
def test_one_teacher_s_weights_are_on_their_device_only_while_it_scores(tiny_model, moved, monkeypatch, top_k):
    ids_BL = torch.arange(12).reshape(2, 6)
    batch = TokenBatch.from_inputs({"input_ids": ids_BL, "labels": ids_BL})
    plain = FrozenTeacher(tiny_model(), top_k=top_k)
    plain.prepare(torch.device("cpu"))
    expected = plain.score(batch)
    model = tiny_model()
    monkeypatch.setattr(model, "to", lambda device: model)  # nothing is computed on that device
    teacher = FrozenTeacher(model, top_k=top_k, offload=True)
    teacher.prepare(ELSEWHERE)
    at_rest = addresses(model.parameters())
    at_work = []
    model.lm_head.register_forward_pre_hook(lambda *args: at_work.append(addresses(model.parameters())))
    model.model.register_forward_pre_hook(lambda *args: at_work.append(addresses(model.parameters())))
    for turn in (1, 2):
        signal = teacher.score(batch)
        assert len(moved) == turn * len(list(model.parameters()))
        assert len(at_work) > 0
        assert all(not found & at_rest for found in at_work)
        assert addresses(model.parameters()) == at_rest
    if top_k is None:
        assert signal.head.weight_VH.data_ptr() in addresses(moved)
        assert torch.equal(signal.head.logits(signal.hidden_NH), expected.head.logits(expected.hidden_NH))
    else:
        assert torch.equal(signal.log_p_NK, expected.log_p_NK)
    assert plain.can_generate
    assert not teacher.can_generate


def devices(model):
    return {weight.device.type for weight in model.parameters()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_only_one_teacher_is_there_at_a_time_and_scores_do_not_change(tiny_model):
    cuda = torch.device("cuda")
    batch = {"input_ids": torch.arange(12, device=cuda).reshape(2, 6)}
    batch = {**batch, "labels": batch["input_ids"], "teacher_index": torch.tensor([0, 1], device=cuda)}
    batch = TokenBatch.from_inputs(batch)
    signals = []
    for is_offloaded in (False, True):
        models = [tiny_model(seed=1), tiny_model(seed=2)]
        names = ("math", "code")
        teacher = RoutedTeachers(dict(zip(names, map(FrozenTeacher, models), strict=True)), offload=is_offloaded)
        teacher.prepare(cuda)
        signals.append(teacher.score(batch))
        assert [devices(model) for model in models] == [{"cpu" if is_offloaded else "cuda"}] * 2
    for group, expected in zip(signals[1].groups, signals[0].groups, strict=True):
        torch.testing.assert_close(group.head.logits(group.hidden_NH), expected.head.logits(expected.hidden_NH))
    assert all(weight.is_pinned() for weight in models[0].parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_one_teacher_leaves_the_device_and_scores_the_same(tiny_model):
    cuda = torch.device("cuda")
    ids_BL = torch.arange(12, device=cuda).reshape(2, 6)
    batch = TokenBatch.from_inputs({"input_ids": ids_BL, "labels": ids_BL})
    signals = []
    for is_offloaded in (False, True):
        model = tiny_model()
        teacher = FrozenTeacher(model, offload=is_offloaded)
        teacher.prepare(cuda)
        signals.append(teacher.score(batch))
        assert devices(model) == {"cpu" if is_offloaded else "cuda"}
    first, second = (signal.head.logits(signal.hidden_NH) for signal in signals)
    torch.testing.assert_close(second, first)
