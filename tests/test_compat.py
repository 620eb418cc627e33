"""The same on every supported version of transformers and TRL."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import Trainer

import gkd_trainer
from gkd_trainer.compat import checkpoints_activations, find_unused_parameters, mark_loss_as_scaled

PACKAGE = Path(gkd_trainer.__file__).parent


@pytest.mark.parametrize(
    ("is_read", "is_scaled", "marked"), [(False, True, True), (False, None, False), (True, True, False)]
)
def test_a_trainer_that_ignores_the_mark_is_kept_from_dividing_the_loss(monkeypatch, is_read, is_scaled, marked):
    monkeypatch.delattr(Trainer, "loss_is_scaled_for_ga", raising=False)
    if is_read:
        monkeypatch.setattr(Trainer, "loss_is_scaled_for_ga", None, raising=False)
    accelerator = SimpleNamespace(gradient_accumulation_steps=4)
    trainer = SimpleNamespace(loss_is_scaled_for_ga=is_scaled, model_accepts_loss_kwargs=False, accelerator=accelerator)
    mark_loss_as_scaled(trainer)
    assert trainer.model_accepts_loss_kwargs is marked
    assert accelerator.gradient_accumulation_steps == (1 if marked else 4)


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_checkpointing_is_read_by_either_name(name):
    other = {"activation_checkpointing": "gradient_checkpointing"}.get(name, "activation_checkpointing")
    assert checkpoints_activations(SimpleNamespace(**{name: True}))
    assert checkpoints_activations(SimpleNamespace(**{name: True, other: None}))
    assert not checkpoints_activations(SimpleNamespace(**{name: False}))


@pytest.mark.parametrize(
    ("given", "options", "expected"),
    [
        (None, None, True),
        (None, {"use_reentrant": False}, True),
        (None, {"use_reentrant": True}, None),
        (False, None, False),
    ],
)
@pytest.mark.parametrize("name", ["activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"])
def test_ddp_looks_for_unused_parameters_unless_told_otherwise(name, given, options, expected):
    args = SimpleNamespace(ddp_find_unused_parameters=given, **{name: options})
    find_unused_parameters(args)
    assert args.ddp_find_unused_parameters is expected


def test_no_other_module_asks_an_option_of_several_names():
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("gradient_checkpointing", "activation_checkpointing"):
                of_options = isinstance(node.value, ast.Name | ast.Attribute) and "args" in ast.unparse(node.value)
                assert not of_options, f"{path.name}:{node.lineno}: use compat.checkpoints_activations"
