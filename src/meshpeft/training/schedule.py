"""When a run does what: the learning rate of each step, and the steps after which it measures."""

from __future__ import annotations

import math

__all__ = ["learning_rate", "steps_between_measurements", "warmup_steps"]

# Measurements take this part of the time of training, are at least so many steps apart, and in a run long enough for
# it there are at least so many of them between the first and the last.
_SHARE_OF_MEASURING = 0.1
_FEWEST_STEPS_BETWEEN = 50
_FEWEST_BETWEEN = 3


def warmup_steps(warmup: float, steps: int) -> int:
    """`warmup` as a number of steps: below 1 it is a part of `steps`, rounded; else a number, cut at `steps`."""
    return min(round(warmup * steps) if warmup < 1 else int(warmup), steps)


def learning_rate(step: int, *, peak: float, steps: int, warmup: int) -> float:
    """Linear warm-up to `peak`, then half a cosine (SGDR, arXiv 1608.03983) down to 0.

    Step `step` (from 0) of the warm-up has `peak * (step + 1) / warmup`, so that no step is wasted at 0; 0 itself
    would come one step after the last.

    Args:
        step: from 0 to `steps - 1`.
        peak: reached in the last step of the warm-up.
        steps: of the whole run.
        warmup: steps of the warm-up.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.5 * peak * (1 + math.cos(math.pi * progress))


def steps_between_measurements(steps: int, batch_size: int, measured_rows: int) -> int:
    """Space the measurements of a run so that they take about a tenth of the time of its training.

    Args:
        steps: of the whole run.
        batch_size: rows of a step, which take about three times as long as rows that are only measured.
        measured_rows: rows of one measurement.

    Returns:
        Steps from one measurement to the next; the first comes before the first step, the last after the last.
    """
    affordable = int(_SHARE_OF_MEASURING * 3 * steps * batch_size / measured_rows) - 2
    return max(_FEWEST_STEPS_BETWEEN, math.ceil(steps / (max(_FEWEST_BETWEEN, affordable) + 1)))
