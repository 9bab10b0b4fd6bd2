"""The oracle can fail on experts: the faults that shipped elsewhere are put back, and it says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers.expert_oracle import one_rank, run
from helpers.faults import not_summed_over
from helpers.oracle_runs import TOLERANCE
from torch import Tensor

import meshpeft.parallel.init as parallel_init
import meshpeft.peft.adapter as adapter_module
import meshpeft.peft.lora as lora
from meshpeft.parallel import ParallelAxis, TensorLayout, gradients, mp_reduce, parallel_group_info
from meshpeft.peft.fused import Term, fused_lora, product
from meshpeft.verify.oracle import Layout, compare

Patch = pytest.MonkeyPatch


def shared_per_rank(patch: Patch) -> None:
    """A "shared" adapter of which every expert-parallel rank trains its own copy [Megatron-Bridge 5484]."""
    not_summed_over(patch, "ep")


def reduced_over_dp(patch: Patch) -> None:
    """Expert adapters summed over ordinary data parallel [Megatron-Bridge 5231]."""
    right = gradients.gradient_axes

    def over_dp(layout: TensorLayout | None) -> tuple[ParallelAxis, ...]:
        info = parallel_group_info()
        return tuple(info.dp if axis is info.edp else axis for axis in right(layout))

    patch.setattr(gradients, "gradient_axes", over_dp)


def counted_once_per_etp_rank(patch: Patch) -> None:
    """The adapter of a row finishes its sum before the token combine sums again [Megatron-Bridge 5634, 5635]."""

    def finished(x: Tensor, weight: Tensor, term: Term) -> Tensor:
        is_row = term.offsets is not None and weight.shape[-2] == 16  # the hidden size
        if not is_row:
            return fused_lora(x, weight, term)
        h = mp_reduce(product(x, term.a, term.offsets), axis=parallel_group_info().etp)
        return product(x, weight, term.offsets) + product(h * term.scale, term.b, term.offsets)

    patch.setattr(lora, "fused_lora", finished)


def etp_sum_forgotten(patch: Patch) -> None:
    """Neither factor sums its gradient over the axis that divides each expert."""
    not_summed_over(patch, "etp")


def every_rank_numbers_its_experts_from_zero(patch: Patch) -> None:
    """Each rank draws the factors of its experts as if they were the first."""

    def init_(parameter: Tensor, init_fn: Callable[[Tensor], Any], seed: int, name: str) -> None:
        layout = TensorLayout(tuple(parameter.shape), expert=parameter.dim() == 3)
        parallel_init._fill_(parameter, layout, init_fn, seed)

    patch.setattr(adapter_module, "named_init_", init_)


EP = Layout(dp=2, ep=2, micro_batch_size=2)
EDP = Layout(dp=4, ep=2, micro_batch_size=2)
ETP = Layout(tp=2, etp=2, micro_batch_size=2)
FAULTS = (
    (shared_per_rank, EP, "lora, shared", "gradient"),
    (reduced_over_dp, EDP, "lora, per expert", "gradient"),
    (counted_once_per_etp_rank, ETP, "lora, per expert", "loss"),
    (counted_once_per_etp_rank, ETP, "lora, shared", "loss"),
    (etp_sum_forgotten, ETP, "lora, shared", "gradient"),
    (every_rank_numbers_its_experts_from_zero, EP, "lora, per expert", "loss"),
)


@pytest.mark.parametrize(
    ("fault", "layout", "method", "seen_in"), FAULTS, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_a_fault_is_seen(
    fault: Callable[[Patch], None], layout: Layout, method: str, seen_in: str, monkeypatch: Patch
) -> None:
    expected = one_rank(method, 1)
    fault(monkeypatch)
    assert compare(expected, run(layout, method, steps=1))[seen_in] > 1e4 * TOLERANCE


@pytest.mark.parametrize(("layout", "method"), {(layout, method): None for _, layout, method, _ in FAULTS}, ids=str)
def test_without_a_fault_nothing_is_seen(layout: Layout, method: str) -> None:
    errors = compare(one_rank(method, 1), run(layout, method, steps=1))
    assert max(errors.values()) < TOLERANCE
