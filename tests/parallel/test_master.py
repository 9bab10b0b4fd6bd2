"""Full tensors gathered from parameters: what uses them trains the parameters, as it would on one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.simulate import per_rank, simulate, the_same
from torch import Tensor, nn

from meshpeft.parallel import (
    ColumnParallelLinear,
    FusedParts,
    GroupedColumnParallelLinear,
    ParallelEmbedding,
    RowParallelLinear,
    VocabParallelEmbedding,
    finalize_gradients,
    layout_of_tensor,
)
from meshpeft.verify.simulation import count_collectives

QKV = FusedParts(("q", "k", "v"), (8, 4, 4), blocks=4)
LAYERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "column": ("master_weight", lambda: ColumnParallelLinear(8, 16, dtype=torch.float64)),
    "column, packed": ("master_weight", lambda: ColumnParallelLinear(8, 16, fused_parts=QKV, dtype=torch.float64)),
    "bias of a column": ("master_bias", lambda: ColumnParallelLinear(8, 16, fused_parts=QKV, dtype=torch.float64)),
    "row": ("master_weight", lambda: RowParallelLinear(8, 16, stride=2, dtype=torch.float64)),
    "bias of a row": ("master_bias", lambda: RowParallelLinear(8, 16, dtype=torch.float64)),
    "bias of a row, sequence": (
        "master_bias",
        lambda: RowParallelLinear(8, 16, input_is_parallel=True, sequence_parallel=True, dtype=torch.float64),
    ),
    "table, hidden": ("master_weight", lambda: ParallelEmbedding(8, 16, dtype=torch.float64)),
    "table, vocabulary": ("master_weight", lambda: VocabParallelEmbedding(8, 16, dtype=torch.float64)),
}
EXPERTS: list[dict[str, int]] = [{}, {"tp": 2}, {"dp": 2, "ep": 2}, {"tp": 2, "ep": 2, "etp": 1}, {"tp": 2, "dp": 2}]


def gradient_of_sum(layer: nn.Module, name: str, rows: int) -> tuple[Tensor, Tensor]:
    """(Finalised gradient, expected one) of a sum of squares of a master tensor, on each of `rows` data ranks."""
    master = getattr(layer, name)
    factors = torch.linspace(-1, 2, master.numel(), dtype=torch.float64).view(master.shape)
    (master.square() * factors / rows).sum().backward()
    finalize_gradients(layer)
    parameter = getattr(layer, name.removeprefix("master_"))
    return the_same(layout_of_tensor(parameter).gather(parameter.grad)), 2 * the_same(master.detach()) * factors


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_master_tensor_has_the_gradient_of_a_full_parameter(kind: str, tp: int) -> None:
    name, make = LAYERS[kind]
    with simulate(tp=tp):
        layer = make()
        if name == "master_bias":
            nn.init.ones_(layer.bias)
        found, expected = gradient_of_sum(layer, name, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("sizes", EXPERTS, ids=str)
def test_experts_too_whatever_their_ranks_are_otherwise(sizes: dict[str, int]) -> None:
    with simulate(**sizes):
        layer = GroupedColumnParallelLinear(
            4, 6, 8, fused_parts=FusedParts(("gate", "up"), (4, 4)), dtype=torch.float64
        )
        found, expected = gradient_of_sum(layer, "master_weight", sizes.get("dp", 1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("kind", [ParallelEmbedding, VocabParallelEmbedding])
def test_a_tied_head_trains_its_table(kind: type[nn.Module], tp: int) -> None:
    ids = torch.tensor([[0, 3, 3, 7], [5, 3, 1, 7]])

    def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden.tanh(), weight).flatten(0, 1), ids.roll(1, 1).flatten())

    with simulate(tp=tp):
        torch.manual_seed(0)
        layer = kind(8, 16, dtype=torch.float64)
        same_ids = per_rank(lambda rank: ids)
        table = the_same(layer.master_weight.detach()).clone().requires_grad_()
        loss_of(layer(same_ids), layer.master_weight).backward()
        finalize_gradients(layer)
        found = the_same(layout_of_tensor(layer.weight).gather(layer.weight.grad))
    loss_of(F.embedding(ids, table), table).backward()
    torch.testing.assert_close(found, table.grad, rtol=0, atol=1e-14)


def test_frozen_parameters_and_callers_without_gradients_keep_no_graph() -> None:
    with simulate(tp=2):
        layer = ColumnParallelLinear(8, 16)
        with torch.no_grad():
            assert not layer.master_weight.requires_grad and layer.weight.grad is None
        layer.requires_grad_(False)
        with count_collectives() as calls:
            assert layer.master_weight.grad_fn is None
        assert len(calls) == 1
