"""Rows of logits are compared eagerly or compiled, a tile at a time, with the same result."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from gkd_trainer.divergence import reference_jsd, rows, token_divergence
from tests.divergence.test_engine import V, assert_close_in_norm, leaves, logits, signal, teacher, top_teacher


def test_without_what_launches_kernels_there_are_none_and_a_warning_says_what_to_install(monkeypatch, caplog):
    triton = pytest.importorskip("gkd_trainer.divergence.triton")

    def build_launcher():
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    monkeypatch.setattr(triton, "build_launcher", build_launcher)
    assert rows._triton_kinds.__wrapped__() == frozenset()
    assert "apt install gcc python3-dev). RuntimeError: Failed to find C compiler" in caplog.text
    monkeypatch.setattr(triton, "build_launcher", lambda: None)
    assert rows._triton_kinds.__wrapped__() == triton.KINDS


@pytest.mark.parametrize(("make", "temperature"), [(teacher, 2.0), (top_teacher, 1.0)])
def test_compiled_and_eager_agree_and_one_compilation_serves_any_size(monkeypatch, make, temperature):
    def run(engine, N, V, beta=0.3):
        monkeypatch.setattr(rows, "_engine", engine)
        student, other = signal(N=N, V=V), make(N=N, V=V)
        student = replace(student, head=replace(student.head, softcap=9.0))
        labels_N, weight_N = torch.arange(N) % V, torch.linspace(0, 1, N)
        result = token_divergence(
            student,
            other,
            beta=beta,
            temperature=temperature,
            labels_N=labels_N,
            label_weight_N=weight_N,
            token_block=9,
        )
        return result, torch.autograd.grad(result.loss_N.sum(), leaves(student))

    compiled = 0
    for tokens, vocabulary in ((11, 67), (8, 67), (20, 300)):
        (actual, gradients), (expected, wanted) = run("compiled", tokens, vocabulary), run("eager", tokens, vocabulary)
        for name, expected_N in vars(expected).items():
            torch.testing.assert_close(getattr(actual, name), expected_N, rtol=1e-5, atol=1e-6, msg=name)
        for gradient, other in zip(gradients, wanted, strict=True):
            assert_close_in_norm(gradient, other)
        compiled = compiled or counters["stats"]["unique_graphs"]
        assert counters["stats"]["unique_graphs"] == compiled > 0
    run("compiled", 20, 300, beta=0.7)
    assert counters["stats"]["unique_graphs"] == compiled


@pytest.mark.parametrize(("largest", "sizes"), [(2, {1}), (3, {2, 3})])
def test_no_tile_is_a_single_row_unless_all_are(largest, sizes, monkeypatch):
    monkeypatch.setattr(rows, "_CPU_TILE_ELEMENTS", largest * V)
    seen = set()
    compare = rows._compare
    monkeypatch.setattr(
        rows, "_compare", lambda *inputs, **options: (seen.add(len(inputs[0])), compare(*inputs, **options))[1]
    )
    token_divergence(signal(), teacher(), beta=0.5)
    assert seen == sizes


@pytest.mark.parametrize(
    ("N", "largest", "multiple", "sizes"),
    [
        (10, 4, 1, [3, 3, 4]),
        (8192, 2176, 128, [2048] * 4),
        (1000, 384, 128, [256, 384, 360]),
        (100, 384, 128, [100]),
        (0, 384, 128, [0]),
    ],
)
def test_tiles_of_a_multiple_differ_by_one_unit_and_cover_all_tokens(N, largest, multiple, sizes):
    found = list(rows.tiles(N, largest, multiple))
    assert [tile.stop - tile.start for tile in found] == sizes
    assert found[0].start == 0
    assert all(tile.stop == after.start for tile, after in itertools.pairwise(found))
    assert found[-1].stop == N


def test_without_a_compiler_the_same_is_computed_with_one_warning(monkeypatch, caplog):
    def compile_nothing(*args, **options):
        def fail(*inputs, **options):
            raise RuntimeError("no C++ compiler")

        return fail

    rows._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", compile_nothing)
    monkeypatch.setattr(rows, "_engine", "compiled")
    student, other = signal(), teacher()
    actual_N = token_divergence(student, other, beta=0.5, token_block=4).values_N
    rows._compiled.cache_clear()
    expected_N = reference_jsd(logits(student), logits(other), beta=0.5)
    torch.testing.assert_close(actual_N.double(), expected_N, rtol=1e-5, atol=1e-6)
    assert [record.message for record in caplog.records] == [
        "The divergence can't be compiled, and will be slower: RuntimeError: no C++ compiler"
    ]
