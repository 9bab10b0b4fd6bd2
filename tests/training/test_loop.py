from __future__ import annotations

import itertools

import pytest

from meshpeft.training.loop import learning_rate, steps_between_measurements, warmup_steps


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


@pytest.mark.parametrize("rows", [1_000, 10_000, 60_000, 1_000_000])
def test_measuring_takes_about_a_tenth_of_the_training(rows: int) -> None:
    """With the default twentieth of the rows held out, of which 512 are measured, and the default batch size."""
    measured = min(512, rows // 20)
    steps = rows // 8
    every = steps_between_measurements(steps, 8, measured)
    measurements = 2 + (steps - 1) // every
    # A row that is only measured takes a third of the time.
    assert measurements * measured / 3 <= 0.11 * rows
    assert measurements >= 4


def test_short_runs_are_measured_as_often_as_their_length_allows() -> None:
    assert steps_between_measurements(20, 8, 500) == 50  # before and after only
    assert steps_between_measurements(80, 8, 130) == 50
    assert steps_between_measurements(2_000, 1, 512) == 500  # three between, though they take longer
