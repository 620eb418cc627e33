"""The processes that train together: their exchanges, and how the student's weights are sharded over them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from torch import Tensor, nn
from trl.models import unwrap_model_for_generation

_CHECKPOINTING = frozenset({"gradient_checkpointing", "_gradient_checkpointing_func"})
"""The attributes by which transformers' modules checkpoint activations."""


class Ranks:
    """All ranks of a run, as seen from one of them; all must call a method that exchanges values."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return int(self.accelerator.num_processes)

    @property
    def index(self) -> int:
        """The number of this rank, from 0."""
        return int(self.accelerator.process_index)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        return self.count(flag) > 0

    def count(self, flag: bool) -> int:
        """Return on how many ranks the flag is set."""
        if self.size == 1:
            return int(flag)
        return int(self.sum(torch.tensor(int(flag), device=self.accelerator.device)))

    def largest(self, number: int) -> int:
        """Return the largest of the ranks' numbers."""
        if self.size == 1:
            return number
        return int(self.gather(torch.tensor([number], device=self.accelerator.device)).max())

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of the ranks' tensors."""
        total: Tensor = self.accelerator.reduce(tensor, "sum")
        return total

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the ranks' tensors joined along their first axis, scalars as a vector."""
        gathered: Tensor = self.accelerator.gather(tensor if tensor.dim() else tensor[None])
        return gathered

    def gather_samples(self, values_BK: Tensor) -> Tensor:
        """Return values of samples of all ranks to be summed, without those of samples that only pad the last batch."""
        if self.accelerator.even_batches:
            samples: Tensor = self.accelerator.gather_for_metrics(values_BK)
            return samples
        return self.gather(values_BK.sum(dim=0, keepdim=True))  # nothing pads, and batches may differ in size

    @property
    def sharding(self) -> Literal["fsdp1", "fsdp2", "zero3"] | None:
        """How the student's weights are sharded over ranks; None if each rank has all of them."""
        state = self.accelerator.state
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return "zero3" if state.deepspeed_plugin.zero_stage == 3 else None
        plugin = getattr(state, "fsdp_plugin", None)
        if plugin is None:
            return None
        return "fsdp1" if plugin.fsdp_version == 1 else "fsdp2"

    @property
    def compiles_student(self) -> bool:
        """Whether Accelerate will compile the student, asked by `torch_compile`, its launcher or the environment."""
        return bool(self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO)

    @property
    def awaits_outputs(self) -> bool:
        """Whether what wraps the student acts once the gradient of its output is there.

        DeepSpeed's engine prepares its optimizer then, and DDP with a static graph queues the exchange of gradients.
        """
        handler = self.accelerator.ddp_handler
        is_static = handler is not None and bool(handler.static_graph)
        return is_static or self.accelerator.distributed_type == DistributedType.DEEPSPEED

    @contextmanager
    def saving_whole(self) -> Iterator[None]:
        """Have Trainer's `save_model` write the whole student, though FSDP's checkpoints keep it in shards."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None:
            yield
            return
        from torch.distributed.fsdp import StateDictType

        of_checkpoints, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
        try:
            yield
        finally:
            plugin.state_dict_type = of_checkpoints

    @contextmanager
    def gathered(self, model: nn.Module, wrapped: nn.Module) -> Iterator[nn.Module]:
        """Yield the student to generate with or to take weights from; under ZeRO-3 it is gathered in the block.

        Args:
            model: The student, Trainer's `model`.
            wrapped: The same as Trainer's `model_wrapped`.
        """
        if self.sharding == "zero3":
            # TRL switches checkpointing of activations off, and on again with other options.
            checkpointing = [
                (module, {name: vars(module)[name] for name in _CHECKPOINTING & vars(module).keys()})
                for module in model.modules()
            ]
            try:
                with unwrap_model_for_generation(wrapped, self.accelerator) as student:
                    yield student
            finally:
                for module, options in checkpointing:
                    vars(module).update(options)
        else:
            yield model
