"""The learning rate of each step."""

from __future__ import annotations

import math

__all__ = ["learning_rate", "warmup_steps"]


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
