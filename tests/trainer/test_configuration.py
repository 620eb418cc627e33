"""Any configuration becomes one with the options of distillation, or is refused with what would be lost."""

from dataclasses import dataclass, field

import pytest
from transformers import TrainingArguments
from trl import DPOConfig, SFTConfig
from trl.experimental.gkd import GKDConfig as TRLGKDConfig

from gkd_trainer import GKDArguments, GKDConfig, GKDConfigError
from gkd_trainer.config import Unset
from gkd_trainer.trainer.configuration import completed_args


def test_a_configuration_with_the_options_of_distillation_is_taken_as_it_is():
    args = GKDConfig(output_dir="x")
    assert completed_args(args, True) is completed_args(args, False) is args
    assert completed_args(None, True).output_dir == "tmp_trainer"


def test_another_trainer_than_the_plain_one_needs_a_configuration_of_its_own():
    for args in (None, TrainingArguments(output_dir="x", use_cpu=True)):
        with pytest.raises(GKDConfigError, match=r"args must have the options of distillation; got .*class MyConfig"):
            completed_args(args, False)


def test_plain_training_arguments_keep_what_was_chosen():
    args = completed_args(TrainingArguments(output_dir="x", use_cpu=True, max_steps=3, logging_steps=7), True)
    assert type(args) is GKDConfig
    assert (args.output_dir, args.max_steps, args.logging_steps, args.use_cpu) == ("x", 3, 7, True)
    assert isinstance(completed_args(TrainingArguments(output_dir="x", use_cpu=True), True).logging_steps, Unset)


def test_options_of_another_configuration_are_taken_at_their_defaults_and_else_refused():
    def configured(config_class=SFTConfig, **options):
        return completed_args(config_class(output_dir="x", use_cpu=True, bf16=False, **options), True)

    assert configured(max_length=70).max_length == 70
    assert configured(loss_type="nll").max_length == SFTConfig.max_length
    with pytest.raises(GKDConfigError, match=r"^packing: options of SFTConfig .*MyConfig\(GKDArguments, SFTConfig\)"):
        configured(packing=True)
    assert isinstance(configured(TRLGKDConfig).max_new_tokens, Unset)
    assert configured(TRLGKDConfig, max_new_tokens=9).max_new_tokens == 9


@dataclass
class WithOptions(TrainingArguments):
    alpha: float = 0.1
    stages: list[str] = field(default_factory=list)
    seen: int = field(init=False, default=0)


class WithMembers(TrainingArguments):
    scale = 2

    @property
    def doubled(self):
        return 2 * self.learning_rate


@dataclass
class OnSFT(SFTConfig):
    alpha: float = 0.1


@pytest.mark.parametrize(
    ("config_class", "options", "lost"),
    [
        (WithOptions, {}, "alpha, stages, seen"),
        (WithOptions, {"alpha": 0.2}, "alpha, stages, seen"),
        (WithMembers, {}, "scale, doubled"),
        (OnSFT, {"bf16": False}, "alpha"),
    ],
)
def test_what_a_class_of_ones_own_defines_is_refused_at_any_value(config_class, options, lost):
    name = config_class.__name__
    expected = rf"^{lost} of {name}: .*Derive {name} from GKDConfig, or pass a `class MyConfig\(GKDArguments, {name}\)`"
    with pytest.raises(GKDConfigError, match=expected):
        completed_args(config_class(output_dir="x", use_cpu=True, **options), True)


def test_a_class_of_ones_own_with_other_defaults_is_taken():
    @dataclass
    class Slower(TrainingArguments):
        learning_rate: float = 1e-6

    assert completed_args(Slower(output_dir="x", use_cpu=True), True).learning_rate == 1e-6


def test_a_class_that_has_the_options_of_distillation_keeps_its_own():
    @dataclass
    class Both(GKDArguments, WithOptions):
        pass

    args = Both(output_dir="x", use_cpu=True, alpha=0.3)
    assert completed_args(args, True) is args


def test_attributes_that_were_set_on_a_configuration_are_taken_over():
    args = TrainingArguments(output_dir="x", use_cpu=True)
    args.note = "kept"
    assert completed_args(args, True).note == "kept"


@dataclass
class GOLDConfig(SFTConfig):
    """Like TRL's, which can't be imported without all of its trainer."""

    beta: float = 0.0


GOLDConfig.__module__ = "trl.experimental.gold.gold_config"


@pytest.mark.parametrize("config_class", [GOLDConfig, DPOConfig])
def test_configurations_of_other_trainers_of_trl_are_refused_by_name(config_class):
    with pytest.raises(GKDConfigError, match=rf"^args is a {config_class.__name__} of trl, .*: use GKDConfig \(docs/"):
        completed_args(config_class(output_dir="x", use_cpu=True, bf16=False), True)
