"""The layers, the loss and the gradients on two real processes, which share nothing but gloo."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from helpers.small_network import SmallNetwork
from helpers.workers import run_on_ranks
from torch import Tensor

from meshpeft.parallel import (
    TensorLayout,
    clip_gradients_,
    finalize_gradients,
    init_parallelism,
    initialize_model_parallel_affine_weight_,
    layout_of_tensor,
)

SHAPE = (8, 4)


class Step(NamedTuple):
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    norm: float
    loss: float


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 32, SHAPE, generator=torch.Generator().manual_seed(7))
    labels = ids.roll(-1, 0)
    labels[5:, 0] = -100  # columns hold different numbers of targets
    return ids, labels


def step(network: SmallNetwork, data: TensorLayout) -> Step:
    """One step on this rank's columns, with everything gathered."""

    def whole(values: dict[str, Tensor]) -> dict[str, Tensor]:
        layouts = {name: layout_of_tensor(parameter) for name, parameter in network.named_parameters()}
        return {name: layouts[name].gather(value).clone() for name, value in values.items()}

    ids, labels = batch()
    weights = whole({name: parameter.detach() for name, parameter in network.named_parameters()})
    loss = network(data.slice(ids), data.slice(labels)).sum() / (labels != -100).sum()
    loss.backward()
    finalize_gradients(network)
    norm = clip_gradients_(network, 0.1)
    gradients = whole({name: parameter.grad for name, parameter in network.named_parameters()})
    return Step(weights, gradients, norm.item(), loss.item())


def on_two_ranks(tp: int, sequence_parallel: bool) -> Step:
    info = init_parallelism(tensor_parallel=tp)
    torch.manual_seed(100 + dist.get_rank())  # ranks that never agreed on a seed
    return step(SmallNetwork(sequence_parallel=sequence_parallel), TensorLayout(SHAPE, ((1, info.dp),)))


@pytest.mark.parametrize(("tp", "sequence_parallel"), ((2, False), (2, True), (1, False)))
def test_two_processes_compute_what_one_does(tp: int, sequence_parallel: bool) -> None:
    ranks = run_on_ranks(2, on_two_ranks, tp, sequence_parallel)
    network = SmallNetwork()
    network.load_state_dict(ranks[0].weights)
    expected = step(network, TensorLayout(SHAPE))
    for found in ranks:
        assert found.norm == pytest.approx(expected.norm, rel=1e-13)
        for name, weight in expected.weights.items():
            # Drawn together although the ranks were seeded apart.
            assert torch.equal(found.weights[name], weight)
            error = (found.gradients[name] - expected.gradients[name]).abs().max() / expected.gradients[
                name
            ].abs().max()
            assert error.item() < 1e-13, name
    losses = [found.loss for found in ranks]
    assert (losses[0] if tp == 2 else sum(losses)) == pytest.approx(expected.loss, rel=1e-13)


def drawn_by(seed: int) -> Tensor:
    info = init_parallelism(tensor_parallel=2)
    torch.manual_seed(seed + dist.get_rank())
    weight = torch.empty(3, 4)
    initialize_model_parallel_affine_weight_(weight, 6, 4, 3, 0, "xavier_normal")
    return TensorLayout((6, 4), ((0, info.tp),)).gather(weight)


def test_the_values_are_those_of_the_first_ranks_generator() -> None:
    first, second = run_on_ranks(2, drawn_by, 40)
    assert torch.equal(first, second)
    torch.manual_seed(40)
    alone = torch.empty(6, 4)
    initialize_model_parallel_affine_weight_(alone, 6, 4, 6, 0, "xavier_normal")
    assert torch.equal(first, alone)
