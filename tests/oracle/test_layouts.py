"""The promise: loss, gradients, weights, gradient norm and exported file are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.oracle_runs import METHODS, TOLERANCE, one_rank, run

from meshpeft.verify.oracle import Layout, compare

# A cross-section in which every axis and option meets another; the full matrix is `slow`.
CROSS_SECTION = (
    Layout(tp=2, micro_batch_size=2),
    Layout(tp=4, sequence_parallel=True, micro_batch_size=4),
    Layout(tp=2, dp=2, sequence_parallel=True, activation_checkpointing=True, micro_batch_size=2),
    # 4 rows over 3 ranks: one gets a row of padding, and the numbers of target tokens differ.
    Layout(dp=3, micro_batch_size=2),
    Layout(activation_checkpointing=True, micro_batch_size=3),
)
MATRIX = tuple(
    Layout(tp, dp, 1, None, sequence_parallel, recompute, micro_batch)
    for tp in (1, 2, 4)
    for dp in (1, 2)
    for sequence_parallel in ((False, True) if tp > 1 else (False,))
    for recompute in (False, True)
    for micro_batch in (1, 2)
)


def runs(layouts: tuple[Layout, ...]) -> list[Any]:
    """Every method at every layout; token shards are only kept under sequence parallel."""
    return [
        pytest.param(layout, method, id=f"{layout}-{method}")
        for method in METHODS
        for layout in layouts
        if layout.sequence_parallel or "token shards" not in method
    ]


def assert_same_fine_tune(layout: Layout, method: str) -> None:
    expected = one_rank(method)
    assert len(set(expected.losses)) == 5
    errors = compare(expected, run(layout, method))
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize(("layout", "method"), runs(CROSS_SECTION))
def test_the_fine_tune_does_not_depend_on_the_layout(layout: Layout, method: str) -> None:
    assert_same_fine_tune(layout, method)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "method"), runs(MATRIX))
def test_the_fine_tune_does_not_depend_on_the_layout_full_matrix(layout: Layout, method: str) -> None:
    assert_same_fine_tune(layout, method)
