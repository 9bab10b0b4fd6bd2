"""Grouped experts: the GEMM behind its door, the layers, and tokens on their way there and back."""

from __future__ import annotations

import pytest
import torch
from helpers.expert_jobs import (
    EXPERTS,
    Case,
    ExpertMLP,
    Result,
    dense_loop,
    gathered_gradient,
    make_case,
    run_uneven,
)
from helpers.simulate import simulate, the_same
from helpers.workers import run_on_ranks
from torch import Tensor

from meshpeft.parallel import (
    FusedParts,
    GroupedColumnParallelLinear,
    GroupedRowParallelLinear,
    ParallelAxis,
    ParallelError,
    TensorLayout,
    dispatch_tokens,
    finalize_gradients,
    group_offsets,
    grouped_linear,
    layout_of,
)

LAYOUTS = [
    (1, 1, 1, 1),
    (1, 2, 1, 2),
    (1, 2, 1, 4),
    (2, 2, 1, 1),
    (2, 2, 1, 2),
    (2, 2, 2, 2),
    (1, 4, 1, 4),
    (2, 1, 2, 1),
    (2, 1, 2, 2),
]
# Every expert; only the first ones, which leaves experts and the other ranks of ep=4 empty; only the last one's rank.
ROUTINGS = {"all": list(range(EXPERTS)), "first": [0, 1], "last": [6, 7]}


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


@pytest.mark.parametrize("counts", ([3, 0, 5, 1], [0, 0, 0, 9], [0, 0, 0, 0]))
@pytest.mark.parametrize(("inner", "outer"), ((8, 16), (5, 3), (1, 7)))
# Rounding of the products: float32 over a few summands; bfloat16 keeps 8 bits of the result.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), ((torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 8e-3))
)
def test_grouped_linear_is_one_product_per_group(
    dtype: torch.dtype, tolerance: float, inner: int, outer: int, counts: list[int]
) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = sum(counts)
    x = torch.randn(tokens, inner, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(len(counts), outer, inner, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(tokens, outer, generator=generator).to(dtype)
    y = grouped_linear(x, weight, group_offsets(torch.tensor(counts)))
    assert y.dtype == dtype
    y.backward(grad)
    groups = [part @ matrix.t() for part, matrix in zip(x.double().split(counts), weight.double(), strict=True)]
    expected = torch.cat(groups)
    expected_grads = torch.autograd.grad(expected, (x, weight), grad.double())
    assert relative_error(y.double(), expected) < tolerance
    assert x.grad is not None and weight.grad is not None
    assert relative_error(x.grad.double(), expected_grads[0].double()) < tolerance
    assert relative_error(weight.grad.double(), expected_grads[1].double()) < tolerance
    assert not weight.grad[torch.tensor(counts) == 0].any()


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_an_expanded_gradient_is_taken(dtype: torch.dtype) -> None:
    x = torch.ones(4, 6, dtype=dtype, requires_grad=True)
    weight = torch.ones(2, 3, 6, dtype=dtype, requires_grad=True)
    grouped_linear(x, weight, group_offsets(torch.tensor([1, 3]))).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3))
    assert torch.equal(weight.grad, torch.tensor([1.0, 3.0], dtype=dtype)[:, None, None].expand(2, 3, 6))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_a_frozen_weight_keeps_no_activation(dtype: torch.dtype) -> None:
    x = torch.ones(4, 8, dtype=dtype, requires_grad=True)
    weight = torch.ones(2, 4, 8, dtype=dtype)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        grouped_linear(x, weight, group_offsets(torch.tensor([1, 3]))).sum().backward()
    assert all(tensor is not x for tensor in kept)
    assert torch.equal(x.grad, torch.full_like(x, 4))


def run(layout: tuple[int, int, int, int], case: Case) -> Result:
    """The case on a simulated mesh; every result whole."""
    tp, ep, etp, dp = layout
    with simulate(tp=tp, dp=dp, ep=ep, etp=etp) as info:

        def divided(full: Tensor) -> TensorLayout:
            return TensorLayout(tuple(full.shape), ((0, info.world),))

        def mine(full: Tensor) -> Tensor:
            return divided(full).slice(full)

        def whole(full: Tensor, local: Tensor) -> Tensor:
            return the_same(divided(full).gather(local)).detach()

        x, probabilities = mine(case.x.clone()).requires_grad_(), mine(case.probabilities.clone()).requires_grad_()
        model = ExpertMLP(case.fc1, case.fc2)
        y = model(x, mine(case.experts), probabilities, info)
        (y * mine(case.grad)).sum().backward()
        finalize_gradients(model)
        assert x.grad is not None and probabilities.grad is not None
        return Result(
            whole(case.x, y),
            whole(case.x, x.grad),
            whole(case.probabilities, probabilities.grad),
            the_same(gathered_gradient(model.linear_fc1.weight)),
            the_same(gathered_gradient(model.linear_fc2.weight)),
        )


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_experts_equal_a_dense_loop(layout: tuple[int, int, int, int], routing: str) -> None:
    case = make_case(24, ROUTINGS[routing])
    expected, found = dense_loop(case), run(layout, case)
    for name in Result._fields:
        # Float64 leaves only rounding.
        assert relative_error(getattr(found, name), getattr(expected, name)) < 1e-12, name


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_no_token_at_all_gives_zero_gradients(layout: tuple[int, int, int, int]) -> None:
    found = run(layout, make_case(0, ROUTINGS["all"]))
    assert found.y.shape == found.x_grad.shape == (0, 6)
    assert found.fc1_grad.shape == (EXPERTS, 20, 6)
    assert not found.fc1_grad.any() and not found.fc2_grad.any()


def test_one_expert_takes_every_token() -> None:
    case = make_case(8, [5], top_k=1)
    expected, found = dense_loop(case), run((2, 2, 2, 2), case)
    for name in Result._fields:
        assert relative_error(getattr(found, name), getattr(expected, name)) < 1e-12, name


def test_dispatched_tokens_are_sorted_by_expert() -> None:
    x = torch.arange(4.0)[:, None]
    experts = torch.tensor([[3, 0], [0, 1], [3, 1], [0, 3]])
    serial = ParallelAxis("ep")
    rows, plan = dispatch_tokens(x, experts, torch.ones(4, 2), 5, serial, serial)
    assert plan.tokens_per_expert.tolist() == [3, 2, 0, 3, 0]
    assert rows[:, 0].tolist() == [0, 1, 3, 1, 2, 0, 2, 3]


def test_real_processes_exchange_unequal_numbers_of_tokens() -> None:
    case = make_case(10, [0, 1, 2, 5])
    layouts = {
        "one has no token": (2, 1, [[], [7, 3, 0, 9, 4, 8, 1, 5, 2, 6]]),
        "unequal": (2, 1, [[7, 3, 0], [9, 4, 8, 1, 5, 2, 6]]),
        "shared experts": (1, 2, [[7, 3, 0, 9, 4], [8, 1, 5, 2, 6]]),
        "no token": (1, 2, [[], []]),
    }
    results = run_on_ranks(2, run_uneven, layouts, case)
    expected = dense_loop(case)
    nothing = dense_loop(make_case(0, [0, 1]))
    for name, (_, _, tokens) in layouts.items():
        for rank, mine in enumerate(tokens):
            found = results[rank][name]
            for field in ("y", "x_grad", "probabilities_grad"):
                assert relative_error(getattr(found, field), getattr(expected, field)[mine]) < 1e-12, (name, field)
            for field in ("fc1_grad", "fc2_grad"):
                whole = nothing if name == "no token" else expected
                assert relative_error(getattr(found, field), getattr(whole, field)) < 1e-12, (name, field)


def test_weights_are_the_same_at_every_layout_and_each_expert_has_its_own_fans() -> None:
    def weights(**sizes: int) -> list[Tensor]:
        torch.manual_seed(3)
        with simulate(**sizes):
            layers = (
                GroupedColumnParallelLinear(EXPERTS, 64, 48, fused_parts=FusedParts(("gate", "up"), (24, 24))),
                GroupedRowParallelLinear(EXPERTS, 24, 64),
            )
            return [the_same(layer.master_weight) for layer in layers]

    alone = weights()
    for found in (weights(dp=4, ep=4, etp=1), weights(tp=2, dp=2, ep=2, etp=2)):
        assert all(torch.equal(*pair) for pair in zip(alone, found, strict=True))
    # xavier: variance 2 / (in + out) of one expert. 24,576 draws: 5% is more than five standard errors.
    assert alone[0].std().item() == pytest.approx((2 / (64 + 48)) ** 0.5, rel=0.05)


def test_layouts_of_experts() -> None:
    with simulate(tp=2, dp=2, ep=2, etp=2):
        column = GroupedColumnParallelLinear(EXPERTS, 6, 20)
        row = GroupedRowParallelLinear(EXPERTS, 10, 6)
        assert column.weight.shape == (4, 10, 6)
        assert row.weight.shape == (4, 6, 5)
        for layer, partial in ((column, ("factor_a",)), (row, ("factor_b",))):
            layout = layout_of(layer)
            assert layout.is_expert
            for factor in ("factor_a", "factor_b"):
                axes = [axis.name for axis in getattr(layout, factor)(4).grad_partial]
                assert axes == (["etp"] if factor in partial else [])
        assert "experts=8, in_features=6, out_features=20, ep=2, etp=2" in repr(column)


def test_sizes_that_do_not_divide_are_clear_errors() -> None:
    ep, etp = ParallelAxis("ep", world_size=3), ParallelAxis("etp", world_size=4)
    with pytest.raises(ParallelError, match="8 experts cannot be divided over expert_parallel=3; use a divisor of 8"):
        GroupedColumnParallelLinear(8, 6, 20, expert_axis=ep)
    with pytest.raises(ParallelError, match="out_features=10 cannot be split over expert_tensor_parallel=4"):
        GroupedColumnParallelLinear(8, 6, 10, axis=etp)
    with pytest.raises(ParallelError, match="in_features=6 cannot be split over expert_tensor_parallel=4"):
        GroupedRowParallelLinear(8, 6, 10, axis=etp)
