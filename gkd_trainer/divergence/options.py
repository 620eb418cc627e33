"""The check of the loss's options, which the configuration calls too."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from numbers import Real

import torch

from gkd_trainer.divergence.objective import DIVERGENCES, Objective, Option
from gkd_trainer.errors import GKDConfigError
from gkd_trainer.signals import MODES

SCALES = ("paper", "continuous")
"""How the JSD is scaled inside 0 < beta < 1: see `loss.token_divergence`."""

TAILS = ("bucket", "renormalize")
"""What happens to the tokens outside a teacher's top k: see `loss.token_divergence`."""

PRODUCT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What the inputs of matrix products may be rounded to, by name."""

_SMALLEST = 1e-12
_LARGEST = 1e12
"""The range of the loss's divisors and factors: numbers outside it would leave float32's range and give NaN."""


def checked_objective(
    divergence: str = "jsd",
    options: Mapping[str, float] | None = None,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    scale: str = "paper",
    dtype: torch.dtype = torch.float32,
    temperature_name: str = "temperature",
) -> Objective:
    """Return the objective to minimise; the arguments are those of `loss.token_divergence`.

    Errors call the temperature `temperature_name`.

    Raises GKDConfigError for an argument outside the range documented there, or so close to its end that a loss
    computed in `dtype` would be infinite or NaN.
    """
    resolution = torch.finfo(dtype).eps
    check_choice("divergence", divergence, DIVERGENCES)
    check_choice("scale", scale, SCALES)
    if not 0 <= beta <= 1:
        raise GKDConfigError(f"beta must be in [0, 1] (0 is forward KL, 1 is reverse KL); got {beta}")
    if beta not in (0, 1) and not resolution <= beta <= 1 - resolution:
        raise GKDConfigError(f"beta must be 0, 1 or at least {resolution:.2g} from both; got {beta}")
    if not 0 < temperature < math.inf:
        raise GKDConfigError(
            f"{temperature_name} must be above 0 and finite (1 compares the models as they are); got {temperature}"
        )
    if not _SMALLEST <= temperature <= _LARGEST:
        raise GKDConfigError(
            f"{temperature_name} must be from {_SMALLEST:g} to {_LARGEST:g}, since the loss divides logits by it; got "
            f"{temperature}"
        )
    return Objective(
        divergence=divergence,
        beta=float(beta),
        options=_checked_options(divergence, options, resolution),
        temperature=float(temperature),
        is_continuous=scale == "continuous",
    )


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise GKDConfigError for a value that is not among the choices."""
    if not isinstance(value, str) or value not in choices:
        raise GKDConfigError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_mode(mode: str, divergence: str, name: str = "mode") -> None:
    """Raise GKDConfigError for a mode that is not one of MODES, or that does not go with the divergence."""
    check_choice(name, mode, MODES)
    if mode == "gold" and divergence != "jsd":
        raise GKDConfigError(
            f"{name}='gold' needs divergence='jsd', which GOLD uses for tokens that match; got {divergence!r}: use "
            f"{name}='matched' for others"
        )


def unit_of(divergence: str, modes: Iterable[str] = ()) -> str:
    """Return the unit of a token's value: "nats", or an empty string for a value without one.

    `modes` are those (of MODES) in which teachers with another vocabulary are compared.
    """
    # Sums of differences between sorted probabilities have no unit.
    has_none = not DIVERGENCES[divergence].is_in_nats or any(mode in ("uld", "gold") for mode in modes)
    return "" if has_none else "nats"


def check_top_k_temperature(temperature: float, name: str = "temperature") -> None:
    """Raise GKDConfigError for a temperature other than 1, at which top tokens can't be compared.

    `name` is the option's name in the error.
    """
    if temperature != 1:
        raise GKDConfigError(
            f"{name}={temperature} can't be applied to a teacher's top tokens: their log-probs are at temperature 1, "
            f"and the rest of the distribution, which is needed to change it, is unknown. Set {name} to 1, or use a "
            "teacher in this process without a top k"
        )


def check_tail(tail: str, K: int | None, name: str = "tail") -> None:
    """Raise GKDConfigError for a tail that leaves nothing to compare of a teacher's K top tokens (None: of all tokens).

    `name` is the option's name in the error.
    """
    if tail == "renormalize" and K == 1:
        raise GKDConfigError(
            f"{name}='renormalize' compares the models over the teacher's top tokens alone, so for a top k of 1 both "
            f"give it probability 1, and nothing is trained: set {name} to 'bucket', or use a larger top k"
        )


def _checked_options(divergence: str, options: Mapping[str, float] | None, resolution: float) -> tuple[float, ...]:
    """Return the values of a divergence's options in the order of its entry."""
    entry = DIVERGENCES[divergence].options
    if options is None:
        options = {}
    if not isinstance(options, Mapping):
        raise GKDConfigError(
            f"the options of the divergence {divergence!r} must be a dictionary of names and numbers; got {options!r}"
        )
    if unknown := [name for name in options if name not in entry]:
        raise GKDConfigError(
            f"the divergence {divergence!r} has the options {list(entry)}; got {unknown}: leave them out"
        )
    what = f"of the divergence {divergence!r}"
    values = tuple(
        _checked_number(f"the option {name!r} {what}", options.get(name, option.default), option, resolution)
        for name, option in entry.items()
    )
    if divergence == "alpha_beta" and sum(values) < 1000 * resolution:
        raise GKDConfigError(
            f"the options 'alpha' and 'beta' {what} must add up to at least {1000 * resolution:.2g}, or rounding would "
            f"hide the loss; got {values[0]:g} and {values[1]:g}: raise one of them, and the other may be small"
        )
    return values


def _checked_number(what: str, number: object, option: Option, resolution: float) -> float:
    if not isinstance(number, Real) or isinstance(number, bool):
        raise GKDConfigError(f"{what} must be a number; got {number!r}")
    try:
        value = float(number)
    except OverflowError:
        value = math.inf
    if not 0 < value < option.below:
        raise GKDConfigError(f"{what} must be in (0, {option.below:g}) ({option.default:g} by default); got {number}")
    lowest, highest = (resolution, 1 - resolution) if option.below == 1 else (_SMALLEST, _LARGEST)
    if not lowest <= value <= highest:
        raise GKDConfigError(
            f"{what} must be from {lowest:.2g} to {highest:.9g}, or the loss would not be finite; got {number}"
        )
    return value
