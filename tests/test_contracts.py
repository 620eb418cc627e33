"""Methods are abstract or final: no class replaces a concrete method that it inherits in the package."""

import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from importlib.util import find_spec
from typing import final

import pytest

import gkd_trainer

# It replaces methods of Trainer's: hooks.
EXEMPT = {"gkd_trainer.trainer.trainer"}
REPLACEABLE = {
    # GKDConfig adds the JSON fields that it has beyond GKDArguments.
    "gkd_trainer.config.GKDArguments._json_fields",
}


def classes_of_the_package():
    """Every class that a module of the package defines at its top level."""
    names = [module.name for module in pkgutil.walk_packages(gkd_trainer.__path__, "gkd_trainer.")]
    left_out = ("gkd_trainer.__main__", *(() if find_spec("triton") else ("gkd_trainer.divergence.triton",)))
    modules = [importlib.import_module(name) for name in names if not name.startswith(left_out)]
    found = {cls for module in modules for _, cls in inspect.getmembers(module, inspect.isclass)}
    return sorted((cls for cls in found if is_ours(cls)), key=full_name)


def is_ours(cls):
    return cls.__module__.split(".")[0] == "gkd_trainer"


def full_name(cls):
    return f"{cls.__module__}.{cls.__qualname__}"


def is_exempt(cls):
    return any(cls.__module__ == name or cls.__module__.startswith(f"{name}.") for name in EXEMPT)


def own_methods(cls):
    """A class's own methods and properties by name; Python and dataclasses call the special ones, not a contract."""
    kinds = (property, classmethod, staticmethod)
    return {
        name: method
        for name, method in vars(cls).items()
        if (inspect.isfunction(method) or isinstance(method, kinds)) and not name.startswith("__")
    }


def is_abstract(method):
    return getattr(method, "__isabstractmethod__", False)


def is_final(method):
    function = getattr(method, "fget", None) or getattr(method, "__func__", method)
    return getattr(function, "__final__", False)


def replaced(cls, is_contract):
    """The concrete methods of the class's bases that it replaces, as "base.method"."""
    return [
        f"{full_name(base)}.{name}"
        for base in cls.__mro__[1:]
        if is_contract(base)
        for name, method in own_methods(base).items()
        if name in vars(cls) and not is_abstract(method)
    ]


def left_open(cls):
    """The methods of a class with abstract ones that are neither abstract nor final."""
    methods = own_methods(cls)
    if not any(map(is_abstract, methods.values())):
        return []
    return [name for name, method in methods.items() if not is_abstract(method) and not is_final(method)]


CLASSES = [cls for cls in classes_of_the_package() if not is_exempt(cls)]


class Contract(ABC):
    @abstractmethod
    def answer(self):
        """Return the answer."""

    @final
    def twice(self):
        return 2 * self.answer()

    @property
    @final
    def name(self):
        return "contract"

    def open(self):
        return None


class Keeps(Contract):
    def answer(self):
        return 21


class Replaces(Keeps):
    answer = 42
    name = "another"


def test_replaced_and_abstract_methods_are_found():
    ours = (Contract, Keeps, Replaces)
    assert replaced(Keeps, ours.__contains__) == []
    assert replaced(Replaces, ours.__contains__) == [f"{full_name(Keeps)}.answer", f"{full_name(Contract)}.name"]
    assert left_open(Contract) == ["open"]


def test_the_classes_of_the_package_are_found():
    names = {full_name(cls).removeprefix("gkd_trainer.") for cls in CLASSES}
    assert {"rollouts.base.RolloutEngine", "teachers.base.Teacher", "rollouts.vllm_sync.AdapterSync"} <= names


@pytest.mark.parametrize("cls", CLASSES, ids=full_name)
def test_no_class_replaces_a_concrete_method_of_another_class_of_the_package(cls):
    assert set(replaced(cls, is_ours)) <= REPLACEABLE


@pytest.mark.parametrize("cls", CLASSES, ids=full_name)
def test_what_a_contract_does_not_leave_to_its_implementations_is_final(cls):
    assert left_open(cls) == []
