"""What is summed between the backward pass and the optimizer, and the norm of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.ranks import expected_group
from helpers.simulate import per_rank, rank_values, simulate, the_same
from helpers.small_network import SmallNetwork
from torch import Tensor, nn

from meshpeft.parallel import (
    ParallelAxis,
    ParallelGroupInfo,
    TensorLayout,
    clip_gradients_,
    finalize_gradients,
    gradient_axes,
    gradient_norm,
    layout_of_tensor,
    set_layout,
)
from meshpeft.verify.simulation import Collective, count_collectives

DENSE = {"pp": 1, "dp": 4, "tp": 2}
EXPERT = {"pp": 1, "edp": 2, "ep": 2, "etp": 2}
MESH = {"tp": 2, "dp": 4, "ep": 2, "etp": 2}


def parameter(layout: TensorLayout | None, shape: tuple[int, ...] = (4,), dtype: torch.dtype = torch.float64) -> Any:
    made = nn.Parameter(torch.zeros(shape if layout is None else layout.local_shape, dtype=dtype))
    if layout is not None:
        set_layout(made, layout)
    return made


def layouts(info: ParallelGroupInfo) -> dict[str, tuple[TensorLayout | None, tuple[str, ...]]]:
    """Parameters of each kind, and the axes over which their gradients are summands."""
    return {
        "of a module that states no layout": (None, ("dp",)),
        "replicated": (TensorLayout((4,)), ("dp",)),
        "divided": (TensorLayout((8,), ((0, info.tp),)), ("dp",)),
        "replicated on token shards": (TensorLayout((4,), grad_partial=(info.tp,)), ("dp", "tp")),
        "of experts": (TensorLayout((4, 8), ((0, info.ep), (1, info.etp)), expert=True), ("edp",)),
        "of experts, replicated over etp": (
            TensorLayout((4, 4), ((0, info.ep),), grad_partial=(info.etp,), expert=True),
            ("edp", "etp"),
        ),
        "shared by all experts": (
            TensorLayout((8,), ((0, info.etp),), grad_partial=(info.ep,), expert=True),
            ("edp", "ep"),
        ),
        "shared by all experts, replicated": (
            TensorLayout((4,), grad_partial=(info.etp, info.ep), expert=True),
            ("edp", "ep", "etp"),
        ),
        "with a data axis of its own": (TensorLayout((4,), data_axis=info.edp), ("edp",)),
        "with no data axis": (TensorLayout((4,), data_axis=ParallelAxis("none")), ()),
    }


def test_every_gradient_is_summed_once_over_exactly_its_axes() -> None:
    """Rank r contributes 2^r: the binary digits of the sum say which ranks are in it, and how often."""
    with simulate(**MESH) as info:
        cases = layouts(info)
        parameters = {name: parameter(layout) for name, (layout, _) in cases.items()}
        for each in parameters.values():
            each.grad = per_rank(lambda rank, shape=each.shape: torch.full(shape, 2.0**rank, dtype=torch.float64))
        with count_collectives() as calls:
            finalize_gradients(parameters.values())
        for name, (layout, axes) in cases.items():
            assert {axis.name for axis in gradient_axes(layout)} == set(axes), name
            sizes = DENSE if set(axes) <= set(DENSE) else EXPERT
            for rank, value in enumerate(rank_values(parameters[name].grad)):
                expected = sum(2.0**other for other in expected_group(rank, axes, sizes))
                assert bool((value == expected).all()), (name, rank)
        # One buffer for each distinct set of axes, of all its gradients one after the other.
        assert sorted(calls) == sorted(
            Collective("allreduce", elements) for elements in (4 + 4 + 4, 4, 2 * 4 + 4, 2 * 4, 4, 4)
        )


def test_other_parameters_are_left_alone_and_missing_gradients_become_zero() -> None:
    """The optimizer then does the same at every layout, whichever rank's tokens reached a parameter."""
    with simulate(tp=2, dp=2):
        frozen, missing, reached = (nn.Parameter(torch.zeros(3)) for _ in range(3))
        frozen.requires_grad_(False)
        frozen.grad = torch.ones(3)
        reached.grad = torch.ones(3)
        with count_collectives() as calls:
            finalize_gradients([frozen, missing, reached, reached])
        assert torch.equal(the_same(missing.grad), torch.zeros(3))
        assert torch.equal(the_same(reached.grad), torch.full((3,), 2.0))
        assert torch.equal(the_same(frozen.grad), torch.ones(3))
        assert calls == [Collective("allreduce", 6, itemsize=4)]


def test_one_rank_communicates_nothing_and_keeps_its_gradients() -> None:
    weight, missing = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    grad = weight.grad = torch.ones(3)
    with count_collectives() as calls:
        finalize_gradients([weight, missing])
        gradient_norm([weight, missing])
    assert weight.grad is grad
    assert torch.equal(missing.grad, torch.zeros(3))
    assert calls == []


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_small_types_are_summed_in_float32(dtype: torch.dtype) -> None:
    """In bfloat16 256 + 1 is 256; in float16 60000 + 60000 - 60000 overflows on the way."""
    values, expected = {torch.bfloat16: ((256, 1, 1, 1), 260.0), torch.float16: ((6e4, 6e4, -6e4, 0), 6e4)}[dtype]
    with simulate(dp=4):
        weight, wide = parameter(None, (1,), dtype), parameter(None, (2,), torch.float32)
        weight.grad = per_rank(lambda rank: torch.full((1,), values[rank], dtype=dtype))
        with count_collectives() as calls:
            finalize_gradients([weight, wide])
        assert the_same(weight.grad).item() == expected
        assert weight.grad.dtype == dtype
        assert calls == [Collective("allreduce", 3, itemsize=4)]  # with the float32 ones, in one buffer


def give_gradients(info: ParallelGroupInfo, seed: int, dtype: torch.dtype = torch.float64) -> tuple[list[Any], Tensor]:
    """Parameters with final gradients, and all elements of the global ones."""
    torch.manual_seed(seed)
    parameters, elements = [], []
    for layout, _ in layouts(info).values():
        made = parameter(layout, dtype=dtype)
        layout = TensorLayout(tuple(made.shape)) if layout is None else layout
        full = the_same(torch.randn(layout.global_shape, dtype=torch.float64)).to(dtype)
        made.grad = layout.slice(full).clone()
        parameters.append(made)
        elements.append(full.flatten())
    return parameters, torch.cat(elements)


def test_the_norm_counts_a_replicated_gradient_once_and_a_divided_one_over_its_shards() -> None:
    with simulate(**MESH) as info:
        parameters, elements = give_gradients(info, 0)
        parameters.append(nn.Parameter(torch.zeros(2)))  # without a gradient
        with count_collectives() as calls:
            norm = the_same(gradient_norm([*parameters, parameters[0]]))  # a tied parameter counts once
        assert norm.dtype == torch.float64
        assert norm.item() == pytest.approx(elements.norm().item(), rel=1e-14)
        # One number for each set of axes that divides parameters: tp, ep and etp, ep alone, etp alone.
        assert calls == [Collective("allreduce", 1)] * 4


def test_the_norm_of_small_types_does_not_overflow() -> None:
    weight = nn.Parameter(torch.zeros(100, dtype=torch.float16))
    weight.grad = torch.full((100,), 6e4, dtype=torch.float16)
    assert gradient_norm([weight]).item() == pytest.approx(6e5, rel=1e-3)
    assert gradient_norm([]).item() == 0.0


@pytest.mark.parametrize("max_norm", (0.5, 1e3))
def test_clipping_is_that_of_one_rank(max_norm: float) -> None:
    with simulate(**MESH) as info:
        parameters, elements = give_gradients(info, 1)
        before = [rank_values(each.grad)[0].clone() for each in parameters]
        norm = the_same(clip_gradients_(parameters, max_norm))
        reference = nn.Parameter(torch.zeros_like(elements))
        reference.grad = elements.clone()
        expected = nn.utils.clip_grad_norm_([reference], max_norm)
        assert norm.item() == pytest.approx(expected.item(), rel=1e-14)
        found = torch.cat(
            [
                the_same((layout_of_tensor(each) or TensorLayout(tuple(each.shape))).gather(each.grad)).flatten()
                for each in parameters
            ]
        )
        torch.testing.assert_close(found, reference.grad, rtol=1e-13, atol=0)
        if max_norm > norm:
            after = [rank_values(each.grad)[0] for each in parameters]
            assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_clipping_small_types_reaches_the_norm() -> None:
    """A factor rounded to bfloat16 first would be off by up to 0.2%; rounding the products averages out."""
    weight = nn.Parameter(torch.zeros(20_000, dtype=torch.bfloat16))
    weight.grad = torch.randn(20_000).bfloat16()
    clip_gradients_([weight], 0.7177)
    assert weight.grad.dtype == torch.bfloat16
    assert gradient_norm([weight]).item() == pytest.approx(0.7177, rel=2e-4)


def train_step(tp: int, dp: int, sequence_parallel: bool) -> tuple[dict[str, Tensor], float, float]:
    """Gradients, their norm and the loss of one batch of 4 columns, divided over data parallel."""
    ids = torch.randint(0, 32, (8, 4), generator=torch.Generator().manual_seed(7))
    labels = ids.roll(-1, 0)
    labels[5:, 0] = -100  # columns hold different numbers of targets
    with simulate(tp=tp, dp=dp) as info:
        torch.manual_seed(0)
        network = SmallNetwork(sequence_parallel=sequence_parallel)
        by_column = TensorLayout((8, 4), ((1, info.dp),))
        loss = network(by_column.slice(ids), by_column.slice(labels)).sum() / (labels != -100).sum()
        loss.backward()
        finalize_gradients(network)
        norm = the_same(gradient_norm(network)).item()
        total = sum(value.item() for value in rank_values(loss)[::tp])
        grads = {name: the_same(layout_of_tensor(p).gather(p.grad)) for name, p in network.named_parameters()}
        return grads, norm, total


@pytest.mark.parametrize("sequence_parallel", (False, True))
@pytest.mark.parametrize(("tp", "dp"), ((2, 1), (4, 1), (1, 2), (2, 2), (4, 4)))
def test_a_network_has_the_gradients_of_one_rank(tp: int, dp: int, sequence_parallel: bool) -> None:
    expected, expected_norm, expected_loss = train_step(1, 1, sequence_parallel=False)
    found, norm, loss = train_step(tp, dp, sequence_parallel)
    assert loss == pytest.approx(expected_loss, rel=1e-13)
    assert norm == pytest.approx(expected_norm, rel=1e-13)
    assert math.isfinite(norm) and norm > 0
    for name, grad in expected.items():
        error = (found[name] - grad).abs().max() / grad.abs().max()
        assert error.item() < 1e-13, name
