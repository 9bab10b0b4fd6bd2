"""Faults of gradient sums, put in where the rule stands: `LinearLayout.partial_axes`."""

from __future__ import annotations

import pytest

from meshpeft.parallel import I, LinearLayout, ParallelAxis, State


def complete_beside(patch: pytest.MonkeyPatch, *states: State) -> None:
    """Take the gradient of a replicated tensor for complete where the activation beside it is in one of `states`."""
    right = LinearLayout.partial_axes

    def wrong(self: LinearLayout, beside: State) -> tuple[ParallelAxis, ...]:
        return right(self, I if beside in states else beside)

    patch.setattr(LinearLayout, "partial_axes", wrong)


def not_summed_over(patch: pytest.MonkeyPatch, name: str) -> None:
    """Take every gradient for complete over the axis called `name`."""
    right = LinearLayout.partial_axes

    def wrong(self: LinearLayout, beside: State) -> tuple[ParallelAxis, ...]:
        return tuple(axis for axis in right(self, beside) if axis.name != name)

    patch.setattr(LinearLayout, "partial_axes", wrong)
