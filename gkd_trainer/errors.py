"""The errors of gkd_trainer; each also derives from the standard error that a caller would catch."""

from gkd_trainer.redaction import redacted


class GKDError(Exception):
    """Base of every error that gkd_trainer raises on purpose. Its message shows no secrets."""

    def __init__(self, *args: object) -> None:
        """Take the arguments of any exception, and replace the secrets in them."""
        super().__init__(*map(redacted, args))


class GKDConfigError(GKDError, ValueError):
    """An invalid option, or a meaningless combination of options or arguments."""


class GKDDataError(GKDError, ValueError):
    """A dataset, a row format, a chat template or a collator that can't be used."""


class GKDTeacherError(GKDError, ValueError):
    """A teacher that doesn't fit the student, or can't do what is asked of it."""


class GKDRolloutError(GKDError, RuntimeError):
    """Completions that could not be generated, or weights that could not be sent to a rollout engine."""


class GKDNumericsError(GKDError, ArithmeticError):
    """Logits or a divergence that are not finite where they must be."""


class GKDServerError(GKDError, ConnectionError):
    """A server that did not answer in time, or gave an invalid answer, after all retries."""
