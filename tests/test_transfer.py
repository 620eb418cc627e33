"""Copies between the host and a device."""

import pytest
import torch

from gkd_trainer.transfer import HostCopy, all_to_device, integers_to_host, to_device
from tests.copies import NoOrdinaryCopies

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_a_tensor_that_is_there_is_not_copied():
    tensor = torch.arange(5)
    assert to_device(tensor, torch.device("cpu")) is tensor
    assert HostCopy(tensor).read() is tensor


def test_a_tensor_goes_to_another_device():
    moved = to_device(torch.zeros(2, 3), torch.device("meta"))
    assert (moved.device.type, moved.shape) == ("meta", (2, 3))


def test_of_several_values_tensors_are_moved_and_integers_read():
    values = {"ids": torch.arange(3), "pixels": torch.rand(2), "is_real": torch.tensor([True]), "note": "kept"}
    moved = all_to_device(values, torch.device("meta"))
    assert moved["note"] == "kept"
    assert {name: value.device.type for name, value in moved.items() if name != "note"} == {
        "ids": "meta",
        "pixels": "meta",
        "is_real": "meta",
    }
    read = integers_to_host({"ids": values["ids"], "pixels": moved["pixels"], "note": "kept"})
    assert read == {"ids": values["ids"], "pixels": moved["pixels"], "note": "kept"}  # the very same
    with pytest.raises(NotImplementedError, match="no data"):
        integers_to_host({"is_real": moved["is_real"]})


@pytest.mark.parametrize(
    "copy",
    [
        lambda there_N: torch.tensor(1.0, device="meta"),
        lambda there_N: there_N.new_tensor([1.0]),
        lambda there_N: torch.ones(3).to("meta"),
        lambda there_N: there_N.copy_(torch.ones(3)),
        lambda there_N: there_N[torch.tensor([1])],
        lambda there_N: there_N.__setitem__(slice(2), torch.ones(2)),
    ],
)
def test_copies_from_ordinary_memory_are_found(copy):
    there_N = torch.ones(3, device="meta")
    with NoOrdinaryCopies():
        to_device(torch.ones(3), torch.device("meta"))
        with pytest.raises(AssertionError, match=r"copies from ordinary memory: \['.*test_transfer.py:\d+"):
            copy(there_N)


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("is_pinned", [False, True])
def test_copies_to_and_from_a_gpu_are_queued_in_order_without_waiting(is_pinned):
    given = torch.arange(1000)
    given = given.pin_memory() if is_pinned else given
    device = torch.device("cuda")
    to_device(given, device)  # allocates pinned memory, which may wait the first time
    try:
        torch.cuda.set_sync_debug_mode("error")
        busy = torch.ones(4096, 4096, device=device)
        for _ in range(20):
            busy = busy @ busy / 4096
        moved = to_device(given, device)
        copy = HostCopy(moved * 2 + busy[0, 0].long())
        moved.zero_()  # must not reach the copy
        assert to_device(torch.empty(0), device).device.type == "cuda"
        expanded = to_device(torch.arange(3).expand(2, 3), device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(copy.read(), 2 * torch.arange(1000) + 1)
    assert expanded.tolist() == [[0, 1, 2]] * 2
