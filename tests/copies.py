"""Copies from the host to a device that would make a GPU's host wait."""

import sys

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gkd_trainer.divergence.rows import _as_tensors
from gkd_trainer.transfer import to_device

# The first copies from pinned memory on CUDA; the divergence's numbers are copied once in a run.
_ALLOWED = {to_device.__code__, _as_tensors.__wrapped__.__code__}


class NoOrdinaryCopies(TorchFunctionMode):
    """Fails where values go to the meta device from the host's ordinary memory: CUDA waits before it copies these."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        target = args[0] if function in (torch.Tensor.__setitem__, torch.Tensor.copy_) else result
        if isinstance(target, torch.Tensor) and target.is_meta and _has_host_values(function, args, kwargs):
            frame, places = sys._getframe(1), []
            while frame is not None and frame.f_code not in _ALLOWED:
                places.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
                frame = frame.f_back
            assert frame is not None, f"{function.__name__} copies from ordinary memory: {places[:4]}"
        return result


def _has_host_values(function, args, kwargs):
    if function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
        return True
    return any(isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" for leaf in tree_leaves((args, kwargs)))
