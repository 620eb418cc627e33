"""What the benchmark of the divergence computes besides time and memory."""

from benchmarks.loss import rounding_errors


def test_rounding_a_float32_student_costs_more_the_smaller_the_gap_and_still_more_with_its_logits():
    errors = list(rounding_errors(V=300, H=64).values())
    of_inputs = [first for first, _ in errors]
    assert of_inputs == sorted(of_inputs)
    assert of_inputs[-1] > 10 * of_inputs[0] > 0.01
    assert all(first < second for first, second in errors)
