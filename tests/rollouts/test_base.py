"""The contract of every rollout engine."""

import pytest

from gkd_trainer import RolloutEngine
from gkd_trainer.types import Sampling


class Engine(RolloutEngine):
    def generate(self, prompts, sampling, seeds):
        return []

    def sync(self, model):
        pass

    def close(self):
        pass


def test_greedy_sampling_takes_the_most_probable_token_without_any_restriction():
    assert Engine().greedy_sampling(7) == Sampling(7, temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0)


@pytest.mark.parametrize("missing", ["generate", "sync", "close"])
def test_an_engine_has_to_generate_take_weights_and_close(missing):
    methods = {name: vars(Engine)[name] for name in ("generate", "sync", "close") if name != missing}
    with pytest.raises(TypeError, match=f"abstract.* '?{missing}"):
        type("Partial", (RolloutEngine,), methods)()
