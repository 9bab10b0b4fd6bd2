"""The oracle can fail: each invariant is broken on purpose, and it says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.faults import complete_beside
from helpers.oracle_runs import TOLERANCE, one_rank, run

import meshpeft.parallel.init as parallel_init
import meshpeft.training.step as training_step
from meshpeft.data.batches import IGNORED_LABEL, MicroBatch
from meshpeft.models import Decoder
from meshpeft.parallel import P, ParallelAxis, R, TensorLayout, gradients, parallel_group_info, states
from meshpeft.parallel.layout import FusedParts
from meshpeft.verify.oracle import Layout, compare

Patch = pytest.MonkeyPatch


def dropped_sum_of_a(patch: Patch) -> None:
    complete_beside(patch, R)


def dropped_sum_of_b(patch: Patch) -> None:
    complete_beside(patch, P)


def summed_twice(patch: Patch) -> None:
    right = gradients.finalize_gradients
    patch.setattr(training_step, "finalize_gradients", lambda parameters: (right(parameters), right(parameters)))


def fans_of_the_shard(patch: Patch) -> None:
    """Each rank draws its own shard, as if it were a matrix of its own."""

    def init_(parameter: torch.Tensor, init_fn: Callable[[torch.Tensor], Any], seed: int, name: str) -> None:
        local = TensorLayout(tuple(parameter.shape))
        parallel_init._fill_(parameter, local, init_fn, seed)

    import meshpeft.peft.adapter as adapter_module

    patch.setattr(adapter_module, "named_init_", init_)


def swapped_q_and_k(patch: Patch) -> None:
    """Packed in the wrong order when sharded, as frameworks do whose conversion knows one layout only."""
    right = FusedParts.split

    def split(self: FusedParts, tensor: torch.Tensor, dim: int, shards: int) -> list[torch.Tensor]:
        parts = right(self, tensor, dim, shards)
        return [*parts[:-2], parts[-1], parts[-2]] if shards > 1 and len(parts) == 3 else parts

    patch.setattr(FusedParts, "split", split)


def norm_counts_every_copy(patch: Patch) -> None:
    everywhere = property(lambda self: tuple(a for a in (parallel_group_info().tp,) if a.world_size > 1))
    patch.setattr(TensorLayout, "shard_axes", everywhere)


def dropped_sum_over_data_parallel(patch: Patch) -> None:
    right = gradients.gradient_axes
    patch.setattr(gradients, "gradient_axes", lambda layout: right(layout)[:-1])


def means_of_ranks_averaged(patch: Patch) -> None:
    """Every rank divides by its own number of target tokens, and the gradients are averaged."""
    right = training_step.summed_loss

    def summed_loss(model: Decoder, batch: MicroBatch) -> torch.Tensor:
        dp, targets = parallel_group_info().dp, (batch.labels != IGNORED_LABEL).sum()
        return right(model, batch) * states.all_reduce(targets, dp) / (dp.world_size * targets)

    patch.setattr(training_step, "summed_loss", summed_loss)


def reduction_forgotten(patch: Patch) -> None:
    def all_reduce(x: torch.Tensor, axis: ParallelAxis, *args: Any) -> torch.Tensor:
        return x

    patch.setattr(states, "all_reduce", all_reduce)


TP, SP, DP = (
    Layout(tp=2, micro_batch_size=4),
    Layout(tp=2, sequence_parallel=True, micro_batch_size=4),
    Layout(dp=2, micro_batch_size=2),
)
# 4 rows over 3 ranks: 14, 1 and 1 target tokens in the first step.
UNEQUAL = Layout(dp=3, micro_batch_size=2)
FAULTS = (
    (dropped_sum_of_a, TP, "gradient"),
    (dropped_sum_of_b, TP, "gradient"),
    (dropped_sum_of_a, SP, "gradient"),
    (summed_twice, TP, "gradient"),
    (fans_of_the_shard, TP, "loss"),
    (swapped_q_and_k, TP, "loss"),
    (norm_counts_every_copy, TP, "grad_norm"),
    (dropped_sum_over_data_parallel, DP, "gradient"),
    (means_of_ranks_averaged, UNEQUAL, "gradient"),
    (reduction_forgotten, TP, "loss"),
)


@pytest.mark.parametrize(
    ("fault", "layout", "seen_in"), FAULTS, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_a_fault_is_seen(fault: Callable[[Patch], None], layout: Layout, seen_in: str, monkeypatch: Patch) -> None:
    expected = one_rank(steps=1)
    fault(monkeypatch)
    found = run(layout, steps=1)
    assert compare(expected, found)[seen_in] > 1e4 * TOLERANCE


def test_without_a_fault_nothing_is_seen() -> None:
    errors = compare(one_rank(steps=1), run(TP, steps=1))
    assert max(errors.values()) < TOLERANCE
