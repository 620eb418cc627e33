"""Generalised knowledge distillation as a plugin for the Hugging Face Trainer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gkd_trainer.config import GKDArguments, GKDConfig
    from gkd_trainer.divergence import generalized_jsd, linear_generalized_jsd, topk_generalized_jsd
    from gkd_trainer.errors import (
        GKDConfigError,
        GKDDataError,
        GKDError,
        GKDNumericsError,
        GKDRolloutError,
        GKDServerError,
        GKDTeacherError,
    )
    from gkd_trainer.rollouts import HFRollouts, RolloutEngine, VLLMColocateRollouts, VLLMServerRollouts
    from gkd_trainer.teachers import (
        CachedTeacher,
        ContextTeacher,
        FrozenTeacher,
        HiddenStateServerTeacher,
        OtherTokenizerTeacher,
        RoutedTeachers,
        SelfTeacher,
        Teacher,
        VLLMServerTeacher,
        WeightedTeachers,
    )
    from gkd_trainer.trainer import GKDMixin, GKDTrainer, cache_predictions

__version__ = "0.1.0"

# Each name is imported when it is first used: `gkd_trainer.divergence` works where only torch is installed.
_MODULES = {
    "GKDArguments": "config",
    "GKDConfig": "config",
    "GKDConfigError": "errors",
    "GKDDataError": "errors",
    "GKDError": "errors",
    "GKDMixin": "trainer",
    "GKDNumericsError": "errors",
    "GKDRolloutError": "errors",
    "GKDServerError": "errors",
    "GKDTeacherError": "errors",
    "GKDTrainer": "trainer",
    "CachedTeacher": "teachers",
    "ContextTeacher": "teachers",
    "FrozenTeacher": "teachers",
    "HFRollouts": "rollouts",
    "HiddenStateServerTeacher": "teachers",
    "OtherTokenizerTeacher": "teachers",
    "RolloutEngine": "rollouts",
    "RoutedTeachers": "teachers",
    "SelfTeacher": "teachers",
    "Teacher": "teachers",
    "VLLMColocateRollouts": "rollouts",
    "VLLMServerRollouts": "rollouts",
    "VLLMServerTeacher": "teachers",
    "WeightedTeachers": "teachers",
    "cache_predictions": "trainer",
    "generalized_jsd": "divergence",
    "linear_generalized_jsd": "divergence",
    "topk_generalized_jsd": "divergence",
}

__all__ = [
    "CachedTeacher",
    "ContextTeacher",
    "FrozenTeacher",
    "GKDArguments",
    "GKDConfig",
    "GKDConfigError",
    "GKDDataError",
    "GKDError",
    "GKDMixin",
    "GKDNumericsError",
    "GKDRolloutError",
    "GKDServerError",
    "GKDTeacherError",
    "GKDTrainer",
    "HFRollouts",
    "HiddenStateServerTeacher",
    "OtherTokenizerTeacher",
    "RolloutEngine",
    "RoutedTeachers",
    "SelfTeacher",
    "Teacher",
    "VLLMColocateRollouts",
    "VLLMServerRollouts",
    "VLLMServerTeacher",
    "WeightedTeachers",
    "cache_predictions",
    "generalized_jsd",
    "linear_generalized_jsd",
    "topk_generalized_jsd",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with importlib.import_module(f"{__name__}.quiet").quiet_imports():
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
