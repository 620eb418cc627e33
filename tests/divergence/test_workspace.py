"""The sizes of tiles and buffers that a budget of memory allows."""

from types import SimpleNamespace

import pytest
import torch

from gkd_trainer.divergence import workspace
from gkd_trainer.divergence.several import Term
from gkd_trainer.divergence.workspace import plan_for, planned_tile
from gkd_trainer.signals import Head, HiddenSignal, TopKSignal

N, V, H = 9, 1000, 8


def signal(dtype=torch.float32):
    return HiddenSignal(torch.zeros(N, H, dtype=dtype), Head(torch.zeros(V, H, dtype=dtype)))


def plan(*groups, student=None, product_dtype=None, token_block=None, workspace_mb=1):
    groups = [tuple(map(Term, group)) for group in groups]
    return plan_for(student or signal(), groups, product_dtype, token_block, workspace_mb)


def top_tokens(K=4):
    return TopKSignal(torch.zeros(N, K, dtype=torch.long), torch.zeros(N, K), V)


def test_two_sides_of_logits_fit_into_the_budget_with_its_reserve():
    tile = plan([signal()]).tile
    assert tile * 2 * V * 4 <= 5 / 6 * 2**20 < (tile + 1) * 2 * V * 4


def test_groups_share_the_buffers_and_a_sum_needs_up_to_two_more():
    one = plan([signal()])
    assert plan([signal()], [signal()], [signal()]).tile == one.tile
    assert [plan([signal()] * terms).copies for terms in (1, 2, 3, 7)] == [0, 1, 2, 2]
    assert plan([signal()] * 3).tile == one.tile // 2


def test_top_tokens_need_no_second_side_unless_another_teacher_does():
    assert plan([top_tokens()]).scratch == 0
    assert plan([top_tokens()], [signal()]).scratch == V
    assert plan([top_tokens()], product_dtype=torch.bfloat16).scratch == V // 2


def test_the_widest_dtype_of_any_teacher_is_that_of_the_logits():
    assert plan([signal()], [signal(torch.float64)]).dtype == torch.float64
    assert plan([signal(torch.bfloat16)], student=signal(torch.bfloat16)).dtype == torch.float32


def test_the_default_tile_is_that_of_the_plan():
    many = planned_tile(10**6, V, torch.device("cpu"))
    assert many <= plan([signal()], workspace_mb=None).tile
    assert planned_tile(7, V, torch.device("cpu")) == 7


GIB = 2**30


@pytest.fixture
def gpu_with(monkeypatch):
    """Make a GPU of some memory."""

    def make(total):
        properties = SimpleNamespace(total_memory=total)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return torch.device("cuda", 0)

    return make


@pytest.mark.parametrize(("total", "budget"), [(24, 1024), (48, 2048), (80, 3072), (4, 256)])
def test_a_gpu_gives_a_24th_of_its_memory_within_limits(gpu_with, total, budget):
    assert workspace.default_workspace_mb(gpu_with(total * GIB)) == budget


@pytest.mark.parametrize(("N", "V", "total", "tile"), [(8192, 151_936, 80, 2048), (1000, 151_936, 80, 1000)])
def test_tiles_on_a_gpu_are_a_multiple_of_128_tokens(gpu_with, N, V, total, tile):
    assert planned_tile(N, V, gpu_with(total * GIB)) == tile


def test_where_128_tokens_do_not_fit_tiles_are_smaller(gpu_with):
    assert planned_tile(1000, 262_144, gpu_with(0)) == 100


def test_rows_are_padded_on_a_gpu_only(monkeypatch):
    assert plan([signal()]).stride(151_665) == 151_665
    assert workspace.row_stride(151_665, torch.device("cpu")) == 151_665
    assert workspace.row_stride(151_665, torch.device("cuda")) == 151_680
    monkeypatch.setattr(workspace, "_padding", lambda device: 16)
    padded = plan([signal()])
    assert [padded.stride(columns) for columns in (151_665, 151_936, 1)] == [151_680, 151_936, 16]
    assert padded.scratch == 1008
