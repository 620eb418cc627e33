"""The model of costs, on numbers small enough to check by hand."""

import math

import pytest

from benchmarks.gpu.costs import (
    Card,
    Kernel,
    Shape,
    estimate,
    liger_kernel,
    loop_lengths,
    queue_of_pieces,
    trl_products,
)

N, V, H, G = 10, 5, 2, 3
SHAPE = Shape(N, V, H, G, goal=1.0)
KERNEL = Kernel(registers=100, spilled=0, vector_accesses=13, instructions=(16.0, 48.0, 36.0))


def card(*, products=math.inf, bandwidth=math.inf, instructions=math.inf, cache=0.0):
    return Card("made up", products, bandwidth, instructions, cache, programs=2, latency=0.5)


@pytest.mark.parametrize("R", [1, 4, 10])
def test_with_fast_memory_the_products_take_their_floor_in_any_tiles(R):
    seconds = estimate(SHAPE, card(products=1.0), KERNEL, R)
    assert seconds.floor == 2 * N * V * (3 * H + G)
    assert seconds.total == pytest.approx(seconds.floor)


def test_with_fast_products_each_tile_moves_weights_logits_and_gradients():
    seconds = estimate(SHAPE, card(bandwidth=1.0), KERNEL, R=6)
    moved = 0
    for rows, weight_gradient in ((6, 4 * V * H), (4, 8 * V * H)):
        moved += sum(2 * (rows * width + V * width) + 4 * rows * V for width in (H, G))
        moved += 2 * rows * V + 2 * V * H + 8 * rows * H
        moved += 2 * rows * V + 2 * rows * H + weight_gradient
    assert seconds.products == pytest.approx(moved)
    assert seconds.comparison == pytest.approx(N * V * (3 * 8 + 2))
    assert seconds.rest == pytest.approx(4 * N * H + 6 * (N + V) * H)


def test_a_cache_saves_later_passes_as_much_as_it_holds_of_the_rows_in_flight():
    half_of_the_rows = 2 * V * 8 / 2
    seconds = estimate(SHAPE, card(bandwidth=1.0, cache=half_of_the_rows), KERNEL, R=6)
    assert seconds.comparison == pytest.approx(N * V * (8 + 4 + 4 + 2))
    seconds = estimate(SHAPE, card(bandwidth=1.0, cache=math.inf), KERNEL, R=6)
    assert seconds.comparison == pytest.approx(N * V * (8 + 2))


def test_the_comparison_issues_the_instructions_of_all_passes():
    assert estimate(SHAPE, card(instructions=1.0), KERNEL, R=6).comparison == N * V * 100


def test_pieces_of_rows_in_a_queue_fit_into_the_cache_and_wait_for_four_requests_each():
    two_rows = 2 * V * 8
    queue = queue_of_pieces(SHAPE, card(cache=two_rows), passes=3)
    # Five pieces for each of the two programs, in two rows.
    assert queue.piece == V / 5
    assert queue.pieces == N * 3 * 5 / 2
    assert queue.waiting == queue.pieces * 4 * 0.5


def test_trl_projects_both_sides_three_times():
    of_student, of_teacher = 2 * N * V * H, 2 * N * V * G
    assert trl_products(SHAPE, card(products=1.0)) == 3 * (of_student + of_teacher) + 2 * of_student


def test_ligers_kernel_reads_the_weights_for_each_of_its_tiles():
    # V / H is 2.5, so 10 tokens are split by 3, and 4 rounded to a power of two: three tiles.
    of_weights = 3 * 2 * V * (H + G + H + 2 * H)
    assert liger_kernel(SHAPE, card(bandwidth=1.0)) == of_weights + 110 * N * V
    assert liger_kernel(SHAPE, card(products=1.0)) == 3 * 2 * 4 * V * (3 * H + G)


CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/              @!P1 LDG.E.128 R8, desc[UR14][R8.64] ;
        /*0020*/              @!P1 BRA `(.L_x_1) ;
        /*0030*/               @P2 LDG.E R8, desc[UR14][R8.64] ;
        /*0040*/                   MOV R9, R8 ;
.L_x_1:
        /*0050*/                   MUFU.EX2 R9, R8 ;
        /*0060*/               @P0 BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
.L_x_2:
        /*0080*/                   BRA `(.L_x_2);
"""


def test_a_loop_is_counted_without_the_accesses_of_single_numbers_of_its_last_turn():
    assert list(loop_lengths(CODE)) == [4]
