"""Reports: logged metrics, completions, heat-maps of them, the report of a run, and the model card."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gkd_trainer.report.heat_maps import HeatMap, heat_map

__all__ = ["HeatMap", "heat_map"]


def __getattr__(name: str) -> Any:
    # Imported when it is used: the trainer's other reports need none of its dependencies.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("gkd_trainer.report.heat_maps"), name)
