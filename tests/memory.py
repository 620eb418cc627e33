"""The memory that torch allocates."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class NewStorages(TorchDispatchMode):
    """Storages made since: `peak` bytes were alive at once, and the largest one has `largest`."""

    def __init__(self):
        super().__init__()
        self.alive = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        outputs = operation(*args, **(kwargs or {}))
        known = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in args if isinstance(tensor, torch.Tensor)}
        for tensor in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
            if isinstance(tensor, torch.Tensor):
                reference = StorageWeakRef(tensor.untyped_storage())
                if reference.cdata not in known:
                    self.alive[reference.cdata] = (reference, tensor.untyped_storage().nbytes())
        self.alive = {key: value for key, value in self.alive.items() if not value[0].expired()}
        sizes = [size for _, size in self.alive.values()]
        self.peak = max(self.peak, sum(sizes))
        self.largest = max(self.largest, *sizes, 0)
        return outputs
