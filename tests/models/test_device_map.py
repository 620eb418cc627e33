"""Models that a device map placed: which hooks only move tensors, and the copy of a head on another device."""

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, CpuOffload, ModelHook, SequentialHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import nn

from gkd_trainer.errors import GKDConfigError
from gkd_trainer.models.device_map import (
    HeadCopy,
    accelerators_of,
    has_own_forward,
    input_device,
    is_hooked,
    is_placed,
    only_moves_tensors,
    refuse_offloaded,
)
from gkd_trainer.signals import Head

META = torch.device("meta")


class Doubling(ModelHook):
    def post_forward(self, module, output):
        return 2 * output


class DoublingToo(AlignDevicesHook):
    def post_forward(self, module, output):
        return 2 * output


@pytest.mark.parametrize(
    ("hook", "is_harmless"),
    [
        (lambda: AlignDevicesHook("cpu"), True),
        (lambda: AlignDevicesHook("cpu", io_same_device=True), True),
        (lambda: SequentialHook(AlignDevicesHook("cpu"), AlignDevicesHook(io_same_device=True)), True),
        (lambda: AlignDevicesHook("cpu", offload=True), False),
        (lambda: SequentialHook(AlignDevicesHook("cpu"), AlignDevicesHook("cpu", offload=True)), False),
        (lambda: SequentialHook(AlignDevicesHook("cpu"), Doubling()), False),
        (CpuOffload, False),
        (Doubling, False),
        (lambda: DoublingToo("cpu"), False),
    ],
)
def test_only_a_hook_that_aligns_devices_without_offloading_moves_no_more_than_tensors(hook, is_harmless):
    module = nn.Linear(2, 2)
    assert not is_hooked(module)
    add_hook_to_module(module, hook())
    assert is_hooked(module)
    assert only_moves_tensors(module) is is_harmless
    assert has_own_forward(module)


def test_a_forward_replaced_before_or_behind_a_hook_is_not_the_modules_own():
    plain, before, behind = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    before.forward = lambda hidden: 2 * hidden
    assert has_own_forward(plain)
    assert not has_own_forward(before)
    for module in (before, behind):
        add_hook_to_module(module, AlignDevicesHook("cpu"))
    hooked = behind.forward
    assert has_own_forward(behind)
    behind.forward = lambda hidden: 2 * hooked(hidden)
    assert not has_own_forward(before)
    assert not has_own_forward(behind)


def test_inputs_go_to_a_models_own_device_unless_a_hook_moves_them(tiny_model):
    model = get_peft_model(tiny_model().to(META), LoraConfig(target_modules=["q_proj"]))
    assert input_device(model) == META
    assert input_device(nn.Identity()) is None
    hooked = dispatch_model(tiny_model(), {"": "cpu"}, force_hooks=True)
    assert input_device(hooked) is None
    assert input_device(get_peft_model(hooked, LoraConfig(target_modules=["q_proj"]))) is None


def test_a_model_is_placed_by_a_device_map_or_quantised(tiny_model):
    assert not is_placed(tiny_model())
    assert is_placed(get_peft_model(dispatch_model(tiny_model(), {"": "cpu"}), LoraConfig(target_modules=["q_proj"])))
    quantised = tiny_model()
    quantised.is_quantized = True
    assert is_placed(quantised)


def test_neither_the_cpu_nor_offloaded_weights_are_on_accelerators(tiny_model):
    model = tiny_model()
    model.lm_head.to(META)
    assert accelerators_of(model) == set()


def test_weights_to_be_trained_may_not_be_offloaded(tiny_model, tmp_path):
    refuse_offloaded(dispatch_model(tiny_model(), {"": "cpu"}, force_hooks=True))
    model = dispatch_model(tiny_model(), {"model": "cpu", "lm_head": "disk"}, offload_dir=str(tmp_path))
    with pytest.raises(GKDConfigError, match=r"weights that would be trained \(lm_head\.weight\).*never change"):
        refuse_offloaded(model)
    refuse_offloaded(get_peft_model(model, LoraConfig(target_modules=["q_proj"])))


def head_of(module):
    return Head(module.weight, module.bias, scale=0.5, softcap=30.0, vocab_size=5)


def test_a_head_on_the_device_is_not_copied():
    head = head_of(nn.Linear(3, 6))
    assert HeadCopy().on(torch.device("cpu"), head) is head


def test_a_head_is_copied_to_another_device_once():
    module, copy = nn.Linear(3, 6).requires_grad_(False), HeadCopy()
    first, again = (copy.on(META, head_of(module)) for _ in range(2))
    assert (first.weight_VH.device, first.bias_V.device) == (META, META)
    assert (first.scale, first.softcap, first.vocab_size) == (0.5, 30.0, 5)
    assert again.weight_VH is first.weight_VH
    assert module.weight.device.type == "cpu"


def test_a_head_is_copied_again_if_it_was_written_to_or_is_another():
    module, copy = nn.Linear(3, 6).requires_grad_(False), HeadCopy()
    first = copy.on(META, head_of(module))
    module.weight.mul_(2)
    second = copy.on(META, head_of(module))
    assert second.weight_VH is not first.weight_VH
    module.weight = nn.Parameter(module.weight.clone(), requires_grad=False)
    assert copy.on(META, head_of(module)).weight_VH is not second.weight_VH
