"""Models that a device map placed: on which devices they are, and what accelerate's hooks do there.

Shapes: V vocabulary, H hidden width.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from torch import Tensor, nn

from gkd_trainer.errors import GKDConfigError
from gkd_trainer.models.loading import base_model
from gkd_trainer.signals import Head


def is_hooked(module: nn.Module) -> bool:
    """Return whether accelerate has a hook on a module."""
    return hasattr(module, "_hf_hook")


def has_own_forward(module: nn.Module) -> bool:
    """Return whether a module's forward is that of its class, apart from accelerate's hook."""
    forward = vars(module).get("forward")
    if forward is None:
        return True
    is_hooks = isinstance(forward, functools.partial) and forward.func.__module__ == ModelHook.__module__
    hooked = getattr(vars(module).get("_old_forward"), "__func__", None)
    return is_hooks and hooked is type(module).forward


def only_moves_tensors(module: nn.Module) -> bool:
    """Return whether accelerate's hook on a module does no more than move its inputs and outputs between devices."""
    hook: Any = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if type(hook) is SequentialHook else [hook]
    return all(type(each) is AlignDevicesHook and not each.offload for each in hooks)


def input_device(model: nn.Module) -> torch.device | None:
    """Return the device to which a model's inputs must be moved; None if it has a hook that moves them."""
    model = base_model(model)
    weight = next(model.parameters(), None)
    return None if is_hooked(model) or weight is None else weight.device


def is_placed(model: nn.Module) -> bool:
    """Return whether loading a model put it where it is, so that it is not to be moved: by a map, or quantised."""
    return getattr(model, "hf_device_map", None) is not None or bool(getattr(model, "is_quantized", False))


def accelerators_of(model: nn.Module) -> set[torch.device]:
    """Return the devices other than the CPU on which loading put weights of a model; none if they are still to move."""
    if not is_placed(model):
        return set()
    return {weight.device for weight in model.parameters() if weight.device.type not in ("cpu", "meta")}


def refuse_offloaded(model: nn.Module) -> None:
    """Raise GKDConfigError if weights to be trained are offloaded: they would get no gradients."""
    offloaded = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.is_meta]
    if offloaded and is_hooked(base_model(model)):
        raise GKDConfigError(
            f"the student's device map offloads weights that would be trained ({', '.join(offloaded[:3])}), but "
            "accelerate loads copies of them for each forward, so they would never change: load the student onto GPUs "
            "(device_map=None for one), or freeze it and train an adapter (peft_config)"
        )


class HeadCopy:
    """The copy of a frozen model's head on another device.

    It is made when it is first asked for, and again only if the weight was written to in place or is another.
    """

    def __init__(self) -> None:
        self._weight_VH: Tensor | None = None
        self._copied: tuple[Tensor, int] | None = None

    def on(self, device: torch.device, head: Head) -> Head:
        """Return the head on a device; itself if its weight is there."""
        weight_VH = head.weight_VH
        if weight_VH.device == device:
            return head
        version = -1 if weight_VH.is_inference() else weight_VH._version
        is_current = self._copied is not None and self._copied[0] is weight_VH and self._copied[1] == version
        if self._weight_VH is None or not is_current or self._weight_VH.device != device:
            self._weight_VH = None  # its memory, before another is made
            self._weight_VH, self._copied = weight_VH.detach().to(device), (weight_VH, version)
        bias_V = None if head.bias_V is None else head.bias_V.detach().to(device)
        return replace(head, weight_VH=self._weight_VH, bias_V=bias_V)
