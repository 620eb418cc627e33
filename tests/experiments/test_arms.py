"""The arms are what their names say, and each pair differs in one thing."""

import pytest

from experiments.arms import ARMS, FEW, LOSS_PAIRS, PAIRS
from gkd_trainer import GKDConfig


@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if arm.loss == "divergence"])
def test_each_arm_is_a_configuration(name, tmp_path):
    args = GKDConfig(output_dir=str(tmp_path), **ARMS[name].options)
    source = name.partition("-")[0]
    assert args.seq_kd == (source == "fresh")
    assert args.is_always_on_policy == (source == "own")
    assert args.generates == (source != "fixed")
    if args.divergence == "jsd":
        assert args.beta == {"forward": 0.0, "jsd": 0.5, "reverse": 1.0}[name.partition("-")[2]]


def test_pairs_and_reduced_grids_name_arms():
    assert {*FEW} <= ARMS.keys()
    assert {name for pair in (*PAIRS, *LOSS_PAIRS) for name in pair} <= ARMS.keys()
    assert all(arm.as_long_as in (None, *ARMS) for arm in ARMS.values())


@pytest.mark.parametrize(("arm", "control"), [pair for pair in PAIRS if "sft" not in " ".join(pair)])
def test_a_pair_differs_in_the_samples_alone(arm, control):
    def loss(name):
        return {key: value for key, value in ARMS[name].options.items() if key in ("beta", "divergence")}

    assert loss(arm) == loss(control)


@pytest.mark.parametrize(("arm", "control"), LOSS_PAIRS)
def test_a_pair_of_losses_differs_in_the_loss_alone(arm, control):
    one, other = (dict(ARMS[name].options) for name in (arm, control))
    assert one.pop("beta") != other.pop("beta")
    assert one == other
    assert (ARMS[arm].data, ARMS[arm].loss) == (ARMS[control].data, ARMS[control].loss)
