"""What cells of the tests measure; the worker process imports this."""

import json
import os
import time
from pathlib import Path

import torch

from benchmarks.gpu.cells import NotMeasuredError


def double(where, number):
    return {"double": 2 * number, "device": where.device}


def fail(where):
    raise ValueError("a typing error\nwith details")


def crash(where):
    os._exit(3)


def fill_the_memory(where):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def need_a_package(where):
    import no_such_package  # noqa: F401


def need_a_tool(where):
    raise NotMeasuredError("the tool is not there")


def hang(where):
    time.sleep(600)


def see_statuses(where, file):
    return {"statuses": [cell["status"] for cell in json.loads(Path(file).read_text())["cells"]]}
