"""The promise, for adapters on grouped experts: their numbers are those of one process at every layout."""

from __future__ import annotations

import pytest
from helpers.expert_oracle import METHODS, half_empty, one_rank, run
from helpers.oracle_runs import TOLERANCE
from helpers.thinned import thinned

from meshpeft.verify.oracle import Layout, compare


def layout(tp: int, ep: int, etp: int, dp: int, sequence_parallel: bool = False, recompute: bool = False) -> Layout:
    return Layout(tp, dp, ep, etp, sequence_parallel, recompute, micro_batch_size=2)


# Between them: expert-data parallel 2 with and without expert-TP, both expert axes at once, sequence parallel.
CROSS_SECTION = (
    layout(1, 2, 1, 4),
    layout(2, 2, 2, 2, sequence_parallel=True),
    layout(2, 1, 2, 2, sequence_parallel=True, recompute=True),
)
MATRIX = tuple(
    layout(*sizes, sequence_parallel, recompute)
    for sizes in (
        (1, 1, 1, 1),
        (1, 2, 1, 2),
        (1, 2, 1, 4),
        (2, 2, 1, 1),
        (2, 2, 1, 2),
        (2, 2, 2, 2),
        (1, 4, 1, 4),
        (2, 1, 2, 1),
        (2, 1, 2, 2),
    )
    for sequence_parallel in ((False, True) if sizes[0] > 1 else (False,))
    # Once for each kind of layout: layers are computed again in the backward pass wherever they lie.
    for recompute in ((False, True) if sizes in ((1, 2, 1, 4), (2, 2, 2, 2)) else (False,))
)
FUSED = [name for name in METHODS if "standalone" not in name]
# On experts Canonical LoRA is LoRA: once is enough.
RUNS = [
    (layout, method)
    for method in FUSED
    for layout in CROSS_SECTION
    if "canonical" not in method or (layout is CROSS_SECTION[1] and "shared" in method)
]


@pytest.mark.parametrize(("layout", "method"), thinned(reversed(RUNS), 2), ids=str)
def test_the_fine_tune_does_not_depend_on_the_layout(layout: Layout, method: str) -> None:
    errors = compare(one_rank(method, 2), run(layout, method, steps=2))
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", MATRIX, ids=str)
def test_the_fine_tune_does_not_depend_on_the_layout_full_matrix(layout: Layout, method: str) -> None:
    errors = compare(one_rank(method, 2), run(layout, method, steps=2))
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("method", ("lora, shared", "dora, per expert"))
def test_experts_and_ranks_without_a_token_change_nothing(method: str) -> None:
    """Half of the experts get no token: all those of two of four ranks."""
    expected = one_rank(method, 2, half_empty)
    errors = compare(expected, run(layout(1, 4, 1, 4), method, steps=2, make=half_empty))
    assert max(errors.values()) < TOLERANCE, errors
    for name, gradient in expected.gradients.items():
        if ".experts." in name and gradient.shape[0] == 8:
            assert not gradient[:4].any()
            assert all(expert.any() for expert in gradient[4:])


@pytest.mark.parametrize("method", thinned([name for name in METHODS if "standalone" in name], 2))
def test_an_adapter_beside_the_experts_is_the_one_inside(method: str) -> None:
    errors = compare(one_rank(method.removesuffix(", standalone"), 2), run(CROSS_SECTION[1], method, steps=2))
    assert max(errors.values()) < TOLERANCE, errors
