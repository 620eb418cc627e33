"""Errors are ours and standard ones, show no secrets, and cross processes."""

import inspect
import pickle

import pytest

from gkd_trainer import errors
from gkd_trainer.errors import GKDConfigError, GKDError

SUBCLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind is not GKDError]


@pytest.mark.parametrize("kind", SUBCLASSES)
def test_every_error_is_ours_and_one_that_a_caller_would_catch(kind):
    ours, standard = kind.__bases__
    assert ours is GKDError
    assert standard.__module__ == "builtins"
    assert issubclass(standard, Exception)
    assert standard is not Exception


@pytest.mark.parametrize("kind", [GKDError, *SUBCLASSES])
def test_a_message_shows_no_secret(kind):
    error = kind("no answer from https://user:canary-31337@host/v1?token=canary-31337 in 5 s")
    assert str(error) == "no answer from https://<CREDENTIALS>@host/v1?token=<SECRET> in 5 s"


def test_anything_but_a_text_stays_as_it_is():
    assert GKDConfigError("at step", 3).args == ("at step", 3)


@pytest.mark.parametrize("kind", SUBCLASSES)
def test_an_error_crosses_processes_with_its_type_message_and_notes(kind):
    error = kind("beta must be in [0, 1]; got 1.5")
    error.add_note("rank 1 of 2")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert again.args == error.args
    assert again.__notes__ == ["rank 1 of 2"]
