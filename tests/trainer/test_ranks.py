"""The ranks' exchanges, and how the student's weights are sharded over them."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from gkd_trainer.trainer.ranks import Ranks


def test_one_rank_exchanges_only_with_itself(ranks):
    assert (ranks.size, ranks.index) == (1, 0)
    assert [ranks.count(flag) for flag in (True, False)] == [1, 0]
    assert [ranks.any(flag) for flag in (True, False)] == [True, False]
    assert ranks.largest(-3) == -3
    assert torch.equal(ranks.sum(torch.tensor([1.5, 2.0])), torch.tensor([1.5, 2.0]))
    assert ranks.gather(torch.tensor([[1, 2], [3, 4]])).tolist() == [[1, 2], [3, 4]]


def test_gathered_scalars_are_a_vector_on_one_rank_too(ranks):
    assert ranks.gather(torch.tensor(3)).tolist() == [3]


@pytest.mark.parametrize(("own", "other", "count"), [(True, 1, 2), (True, 0, 1), (False, 1, 1), (False, 0, 0)], ids=str)
def test_flags_are_counted_over_ranks(two_ranks, own, other, count):
    assert two_ranks(other).count(own) == count
    assert two_ranks(other).any(own) is (count > 0)


@pytest.mark.parametrize(("own", "other", "largest"), [(2, 5, 5), (5, 2, 5), (-2, -5, -2)])
def test_the_largest_number_is_that_of_any_rank(two_ranks, own, other, largest):
    assert two_ranks(other).largest(own) == largest


def ranks_of(distributed_type, **plugins):
    return Ranks(SimpleNamespace(distributed_type=distributed_type, state=SimpleNamespace(**plugins)))


@pytest.mark.parametrize(
    ("distributed_type", "plugins", "sharding"),
    [
        (DistributedType.NO, {}, None),
        (DistributedType.MULTI_GPU, {"fsdp_plugin": None}, None),
        (DistributedType.FSDP, {"fsdp_plugin": SimpleNamespace(fsdp_version=1)}, "fsdp1"),
        (DistributedType.FSDP, {"fsdp_plugin": SimpleNamespace(fsdp_version=2)}, "fsdp2"),
        (DistributedType.DEEPSPEED, {"deepspeed_plugin": SimpleNamespace(zero_stage=2)}, None),
        (DistributedType.DEEPSPEED, {"deepspeed_plugin": SimpleNamespace(zero_stage=3)}, "zero3"),
    ],
)
def test_the_sharding_is_named(distributed_type, plugins, sharding):
    assert ranks_of(distributed_type, **plugins).sharding == sharding


def test_a_real_accelerator_shards_nothing(ranks):
    assert ranks.sharding is None


def test_except_under_zero3_the_model_is_yielded_as_it_is(ranks):
    model, wrapped = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    for each in (ranks, ranks_of(DistributedType.FSDP, fsdp_plugin=SimpleNamespace(fsdp_version=2))):
        with each.gathered(model, wrapped) as student:
            assert student is model


def test_under_zero3_the_model_is_gathered_from_the_wrapped_one(monkeypatch):
    model, wrapped, whole, calls = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), []

    @contextmanager
    def unwrap(given, accelerator):
        calls.append((given, accelerator))
        yield whole
        model.gradient_checkpointing, model._gradient_checkpointing_func = True, "another"
        calls.append("left")

    monkeypatch.setattr("gkd_trainer.trainer.ranks.unwrap_model_for_generation", unwrap)
    ranks = ranks_of(DistributedType.DEEPSPEED, deepspeed_plugin=SimpleNamespace(zero_stage=3))
    model.gradient_checkpointing, model._gradient_checkpointing_func = True, "the user's"
    with ranks.gathered(model, wrapped) as student:
        assert student is whole
        assert calls == [(wrapped, ranks.accelerator)]
    assert calls[1:] == ["left"]
    assert model._gradient_checkpointing_func == "the user's"


@pytest.mark.parametrize(
    ("kind", "handler", "awaits"),
    [
        (DistributedType.DEEPSPEED, None, True),
        (DistributedType.MULTI_GPU, None, False),
        (DistributedType.MULTI_GPU, SimpleNamespace(static_graph=False), False),
        (DistributedType.MULTI_GPU, SimpleNamespace(static_graph=True), True),
    ],
)
def test_what_wraps_the_student_awaits_its_outputs_under_deepspeed_and_with_a_static_graph(kind, handler, awaits):
    ranks = Ranks(SimpleNamespace(distributed_type=kind, ddp_handler=handler))
    assert ranks.awaits_outputs is awaits
