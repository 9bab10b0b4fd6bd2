"""Dropout: masks agree where the activation does, differ where it does, and come back when they are asked to."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers.simulate import per_rank, rank_values, simulate, the_same
from helpers.workers import run_on_ranks
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from meshpeft.parallel import (
    ParallelAxis,
    ParallelError,
    draw_seed,
    dropout,
    dropout_mask,
    init_parallelism,
    mp_reduce,
    set_seed,
)


def kept(y: Tensor) -> list[list[bool]]:
    """Each simulated rank's mask, of an input without zeros."""
    return [(value != 0).flatten().tolist() for value in rank_values(y)]


# World of tp=2 x dp=2: ranks 0 1 are one data-parallel rank's, 0 2 hold the same slice of tensor parallel.
@pytest.mark.parametrize(
    ("varying", "groups"),
    (
        ((), [[0, 1, 2, 3]]),
        (("dp",), [[0, 1], [2, 3]]),
        (("tp",), [[0, 2], [1, 3]]),
        (("dp", "tp"), [[0], [1], [2], [3]]),
        (("tp", "dp"), [[0], [1], [2], [3]]),
        (("ep", "dp"), [[0, 1], [2, 3]]),  # ep has one rank here
    ),
)
def test_masks_agree_where_the_activation_is_replicated_and_differ_where_it_varies(
    varying: tuple[str, ...], groups: list[list[int]]
) -> None:
    with simulate(tp=2, dp=2) as info:
        x = per_rank(lambda rank: torch.ones(64))
        masks = kept(dropout(x, 0.5, varying=[info.axis(name) for name in varying]))
    for group in groups:
        assert all(masks[rank] == masks[group[0]] for rank in group)
    assert len({tuple(mask) for mask in masks}) == len(groups)


def test_seeds_of_all_ranks_of_a_large_mesh_are_distinct() -> None:
    """Two axes of 96 ranks: with a small multiplier (0, 32) and (1, 0) would meet."""
    seeds = set()
    firsts = (0, 1, 2, 31, 95)
    for first in firsts:
        for second in range(96):
            torch.manual_seed(0)
            seeds.add(draw_seed((ParallelAxis("tp", None, first, 96), ParallelAxis("dp", None, second, 96))))
    assert len(seeds) == len(firsts) * 96
    # What torch's CPU generator does not read would make them equal again.
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_ranks_stay_in_step_whatever_they_draw() -> None:
    """A rank that consumed more of the shared generator would disagree with the others from then on."""
    states = []
    for varying in ((), (ParallelAxis("tp", None, 3, 4),)):
        for recompute in (False, True):
            torch.manual_seed(0)
            x = torch.ones(7, requires_grad=True)
            dropout(x, 0.3, varying=varying, recompute=recompute).sum().backward()
            states.append(torch.get_rng_state())
    assert all(torch.equal(state, states[0]) for state in states)


@pytest.mark.parametrize("p", (0.1, 0.5, 0.9))
def test_the_mean_is_preserved(p: float) -> None:
    y = dropout(torch.ones(100_000, dtype=torch.float64), p)
    assert set(y.unique().tolist()) == {0.0, 1 / (1 - p)}
    # Six standard errors of the mean of 100,000 kept or dropped ones.
    assert y.mean().item() == pytest.approx(1.0, abs=6 * (p / (1 - p) / 100_000) ** 0.5)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("recompute", (False, True))
def test_the_gradient_has_the_mask_of_the_output(recompute: bool, dtype: torch.dtype) -> None:
    x = torch.randn(50, 3).to(dtype).requires_grad_()
    y = dropout(x, 0.25, recompute=recompute)
    assert (y.grad_fn.mask is None) == recompute
    torch.manual_seed(123)  # the mask comes back from its own seed
    y.backward(torch.ones_like(y))
    assert y.dtype == x.grad.dtype == dtype
    torch.testing.assert_close(x.grad, (y != 0).to(dtype) * (1 / 0.75))
    torch.testing.assert_close(y.detach(), x.detach() * x.grad)


def test_recomputing_changes_no_number() -> None:
    def run(recompute: bool) -> list[Tensor]:
        set_seed(3)
        with simulate(tp=2, dp=2) as info:
            x = torch.randn(9, 4, requires_grad=True)
            y = dropout(x, 0.5, varying=(info.dp, info.tp), recompute=recompute)
            (y * y).sum().backward()
            return [*rank_values(y), *rank_values(x.grad)]

    assert all(torch.equal(*pair) for pair in zip(run(False), run(True), strict=True))


def test_each_call_draws_another_mask() -> None:
    x = torch.ones(64)
    assert not torch.equal(dropout(x, 0.5), dropout(x, 0.5))


def test_a_mask_is_a_function_of_seed_and_shape() -> None:
    expected = dropout_mask(torch.ones(5, 6), 0.5, 11)
    assert torch.equal(dropout_mask(torch.zeros(5, 6, dtype=torch.bfloat16), 0.5, 11), expected)
    assert not torch.equal(dropout_mask(torch.ones(5, 6), 0.5, 12), expected)


@pytest.fixture
def _float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_float64_by_default")
def test_a_mask_does_not_depend_on_the_default_type() -> None:
    wide = dropout_mask(torch.ones(40), 0.5, 11)
    torch.set_default_dtype(torch.float32)
    assert torch.equal(dropout_mask(torch.ones(40), 0.5, 11), wide)


def test_a_summand_stays_one() -> None:
    """The masks of all summands agree: dropout of the sum is the sum of the dropouts."""
    with simulate(tp=4):
        x = per_rank(lambda rank: torch.full((32,), float(rank + 1)))
        total = the_same(mp_reduce(dropout(x, 0.5)))
    assert set(total.unique().tolist()) == {0.0, 20.0}


def with_and_without_checkpointing(tp: int) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Outputs and gradients of two steps of a block with two dropouts: plain, and computed twice."""
    info = init_parallelism(tensor_parallel=tp)

    def block(x: Tensor, recompute: bool) -> Tensor:
        h = dropout(x, 0.4, recompute=recompute)
        return dropout(torch.tanh(h * h), 0.4, varying=(info.dp, info.tp), recompute=recompute)

    def run(reentrant: bool | None, recompute: bool) -> list[Tensor]:
        set_seed(5)
        x = torch.randn(6, 8, requires_grad=True)
        for _ in range(2):
            y = block(x, recompute) if reentrant is None else checkpoint(block, x, recompute, use_reentrant=reentrant)
            (y * y).sum().backward()
        return [y.detach(), x.grad]

    return [
        (run(None, recompute), run(reentrant, recompute)) for reentrant in (False, True) for recompute in (False, True)
    ]


# In real processes: a simulated rank's random state is not the one that checkpointing saves and restores.
@pytest.mark.parametrize("tp", (1, 2))
def test_activation_checkpointing_makes_the_same_masks_again(tp: int) -> None:
    ranks = [with_and_without_checkpointing(1)] if tp == 1 else run_on_ranks(tp, with_and_without_checkpointing, tp)
    for pairs in ranks:
        for plain, twice in pairs:
            assert all(torch.equal(*pair) for pair in zip(plain, twice, strict=True))
    if tp == 2:
        (first, _), (second, _) = ranks[0][0], ranks[1][0]
        assert not torch.equal(first[0] != 0, second[0] != 0)  # the last dropout varies


def test_nothing_is_drawn_where_nothing_is_dropped() -> None:
    x = torch.ones(4)
    before = torch.get_rng_state()
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0) is x
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("p", (-0.1, 1.0, 1.5))
def test_impossible_probabilities(p: float) -> None:
    with pytest.raises(ParallelError, match=f"dropout={p}: expected a probability of at least 0 and below 1"):
        dropout(torch.ones(3), p)


def test_one_seed_for_every_generator() -> None:
    drawn = []
    for seed in (1, 1, 2**40):
        set_seed(seed)
        drawn.append((random.random(), float(np.random.rand()), torch.rand(1).item()))
    assert drawn[0] == drawn[1] != drawn[2]
