"""The divergence of a student's next-token distribution from a teacher's; needs only torch."""

from gkd_trainer.divergence.loss import (
    generalized_jsd,
    linear_generalized_jsd,
    linear_topk_generalized_jsd,
    token_divergence,
    topk_generalized_jsd,
)
from gkd_trainer.divergence.reference import reference_divergence, reference_jsd, reference_topk_jsd
from gkd_trainer.divergence.result import TokenDivergence
from gkd_trainer.divergence.trl_loss import trl_generalized_jsd_loss

__all__ = [
    "TokenDivergence",
    "generalized_jsd",
    "linear_generalized_jsd",
    "linear_topk_generalized_jsd",
    "reference_divergence",
    "reference_jsd",
    "reference_topk_jsd",
    "token_divergence",
    "topk_generalized_jsd",
    "trl_generalized_jsd_loss",
]
