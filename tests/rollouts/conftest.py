"""A tiny model to generate with, and the calls of its `generate`."""

import pytest


@pytest.fixture
def ranks_of_one_process(monkeypatch):
    """Let syncs in this process hear what the one of rank 0 said last, as if each were another rank's."""
    said = [None]

    def exchange(text):
        said.append(said[-1] if text is None else text)
        return said[-1]

    monkeypatch.setattr("gkd_trainer.rollouts.vllm_sync._from_rank_0", exchange)


@pytest.fixture
def model(tiny_model):
    return tiny_model()


def calls_of(model, monkeypatch):
    """Record the rows and lengths of each call of `generate`, and whether it waits for other ranks; none is there."""
    calls = []
    generate = model.generate

    def record(**options):
        calls.append((*options["input_ids"].shape, options["synced_gpus"]))
        return generate(**{**options, "synced_gpus": False})

    monkeypatch.setattr(model, "generate", record)
    return calls


@pytest.fixture
def calls(model, monkeypatch):
    return calls_of(model, monkeypatch)
