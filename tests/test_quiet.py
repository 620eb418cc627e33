"""One message of another library is left out inside a block, and nothing else."""

import importlib
import logging

import pytest

from gkd_trainer.quiet import quiet_imports, quiet_padding

HINT = "Failed to load CPU gemm_4bit_forward from kernels-community: %s"


def test_the_hint_is_left_out_while_importing_and_nothing_else_is(caplog):
    library = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with quiet_imports():
        library.warning(HINT, "No module named 'kernels'")
        library.warning("this CPU is too old")
        logging.getLogger("somebody.else").warning(HINT, "x")
    library.warning(HINT, "later")
    assert caplog.messages == ["this CPU is too old", HINT % "x", HINT % "later"]


def test_the_hint_is_heard_again_after_an_import_that_fails(caplog):
    library = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with pytest.raises(ModuleNotFoundError), quiet_imports():
        importlib.import_module("no_such_module")
    library.warning(HINT, "later")
    assert caplog.messages == [HINT % "later"]
    assert library.filters == []


def test_the_warning_of_right_padding_is_left_out_and_nothing_else_is(caplog):
    library = logging.getLogger("transformers.generation.utils")
    library.addHandler(caplog.handler)  # transformers' loggers do not propagate
    warning = "A decoder-only architecture is being used, but right-padding was detected!"
    with quiet_padding():
        library.warning(warning)
        library.warning("another")
    library.warning(warning)
    library.removeHandler(caplog.handler)
    assert [*dict.fromkeys(caplog.messages)] == ["another", warning]
