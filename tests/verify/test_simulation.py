"""The simulation's own way of running an operator on every rank gives what PyTorch's `LocalTensorMode` gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode

from meshpeft.verify.simulation import Ranks, fake_world

WORLD = 3


def even(rank: int) -> Tensor:
    return torch.arange(12.0, dtype=torch.float64).view(3, 4) * (rank + 1)


def uneven(rank: int) -> Tensor:
    return even(rank)[: rank + 1]


def write_into_a_view(x: Tensor) -> Tensor:
    y = x.clone()
    y[1:].t()[0].mul_(2)
    return y


def write_into_a_buffer(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    torch.mul(x, 3, out=y)
    return y


def gradient(x: Tensor) -> Tensor:
    y = x.detach().clone().requires_grad_()
    z = y * 1.0
    z[0] += z[1].exp() * 1e-3
    (z.reshape(-1)[2:].square().sum() + torch.cat([z, y]).sum()).backward()
    assert y.grad is not None
    return y.grad


def sizes_of_each_rank(x: Tensor) -> Tensor:
    return x.new_zeros(x.shape[0] + 1, x.shape[1]).narrow(0, 1, x.shape[0]) + x


def draws(x: Tensor) -> Tensor:
    torch.manual_seed(3)
    first = torch.nn.functional.dropout(x, 0.5)
    return first + torch.randn_like(x) + torch.empty_like(x).uniform_()


OPERATIONS: dict[str, tuple[Callable[[int], Tensor], Callable[[Tensor], Any]]] = {
    "a view and in place": (even, write_into_a_view),
    "out=": (even, write_into_a_buffer),
    "autograd": (even, gradient),
    "autograd of views": (even, lambda x: gradient(x.t().contiguous().t())),
    "lists of tensors": (even, lambda x: torch.cat([x, x.flip(0)]) + torch.stack([x, x]).sum()),
    "indices": (even, lambda x: x[torch.tensor([2, 0]), :][:, [1, 3]]),
    "several results": (even, lambda x: x.topk(2, dim=1).values + x.aminmax(dim=1).max[:, None]),
    "chunks": (even, lambda x: x.chunk(2, dim=1)[1] - x.split(3, dim=1)[0][:, :2]),
    "draws": (even, draws),
    "resizing": (even, lambda x: x.clone().unsqueeze_(0).squeeze_(0).t_()),
    "another tensor": (even, lambda x: x @ torch.ones(4, 2, dtype=torch.float64)),
    "sizes of each rank": (uneven, sizes_of_each_rank),
    "chunks of uneven ranks": (uneven, lambda x: x.split(2)[0]),
    "a shape": (uneven, lambda x: x.reshape(x.shape[0] * 2, 2).sum(0)),
}


def on_every_rank(
    mode: type[LocalTensorMode], start: Callable[[int], Tensor], operation: Callable[[Tensor], Tensor]
) -> dict[int, Tensor]:
    torch.manual_seed(0)
    with fake_world(WORLD), mode(WORLD) as simulated:
        result = operation(simulated.rank_map(start))
        assert isinstance(result, LocalTensor)
        return {rank: value.clone() for rank, value in result._local_tensors.items()}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_what_pytorchs_own_mode_gives(name: str) -> None:
    start, operation = OPERATIONS[name]
    expected = on_every_rank(LocalTensorMode, start, operation)
    given = on_every_rank(Ranks, start, operation)
    assert given.keys() == expected.keys()
    for rank, value in expected.items():
        torch.testing.assert_close(given[rank], value, rtol=0, atol=0)
