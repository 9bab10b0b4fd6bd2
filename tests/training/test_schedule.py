from __future__ import annotations

import itertools

import pytest

from meshpeft.training.schedule import learning_rate, warmup_steps


def test_warm_up_rises_in_equal_steps_to_the_peak_and_the_cosine_falls_to_zero() -> None:
    rates = [learning_rate(step, peak=2.0, steps=12, warmup=4) for step in range(12)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    # Half way down the cosine is half the peak; one step after the last it would be 0.
    assert rates[8] == pytest.approx(1.0)
    assert learning_rate(12, peak=2.0, steps=12, warmup=4) == pytest.approx(0.0)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[4:]))


@pytest.mark.parametrize(("warmup", "steps", "expected"), [(0.1, 50, 5), (0, 50, 0), (1, 50, 1), (80, 50, 50)])
def test_warm_up_is_a_part_of_all_steps_or_a_number(warmup: float, steps: int, expected: int) -> None:
    assert warmup_steps(warmup, steps) == expected


def test_a_run_that_is_all_warm_up_ends_at_the_peak() -> None:
    assert learning_rate(2, peak=3.0, steps=3, warmup=3) == 3.0
