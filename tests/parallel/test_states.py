"""The collectives of a forward pass: states in, states out, and the same of their gradients.

Each of them leaves the *global* value alone and only changes who holds what, so one statement covers all, forward
and backward. Values are small integers: sums are exact in every type, and nothing needs a tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from helpers.simulate import per_rank, rank_values, simulate
from helpers.workers import run_on_ranks
from torch import Tensor
from torch.distributed import ReduceOp

from meshpeft.parallel import (
    I,
    P,
    ParallelError,
    R,
    Shard,
    all2all_hp2sp,
    convert,
    init_parallelism,
    mp_copy,
    mp_gather,
    mp_reduce,
    mp_scatter,
    parallel_group_info,
    sp_gather,
    sp_reduce_scatter,
)
from meshpeft.parallel.states import _All2AllHp2Sp
from meshpeft.verify.simulation import Collective, count_collectives

DUAL = {"I": "I", "R": "P", "P": "R", "S": "S"}


class Case(NamedTuple):
    """`function` takes a tensor from state `source` to state `target`; S is divided along the dim given."""

    function: Callable[..., Tensor]
    source: str
    target: str
    takes_dim: bool
    forward: list[str]
    backward: list[str]


def sum_everywhere(x: Tensor) -> Tensor:
    return convert(x, P, R, parallel_group_info().tp)


CASES = {
    "mp_copy": Case(mp_copy, "I", "R", False, [], ["allreduce"]),
    "mp_reduce": Case(mp_reduce, "P", "I", False, ["allreduce"], []),
    "mp_scatter": Case(mp_scatter, "I", "S", True, [], ["allgather"]),
    "mp_gather": Case(mp_gather, "S", "I", True, ["allgather"], []),
    "sp_gather": Case(sp_gather, "S", "R", True, ["allgather"], ["reduce_scatter"]),
    "sum-everywhere": Case(sum_everywhere, "P", "R", False, ["allreduce"], ["allreduce"]),
    "sp_reduce_scatter": Case(sp_reduce_scatter, "P", "S", True, ["reduce_scatter"], ["allgather"]),
}
# Global shapes, and every dim of each that can be divided over 4 ranks.
DIMS = [((8,), 0), ((8, 4, 12), 0), ((8, 4, 12), 1), ((8, 4, 12), -1), ((8, 4, 12), -3), ((3, 8, 1), -2)]


def integers(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def local(state: str, dim: int, seed: int, shape: tuple[int, ...], dtype: torch.dtype, ranks: int) -> Tensor:
    """A tensor of global shape `shape` in a state, on each rank."""
    if state == "P":
        return per_rank(lambda rank: integers(seed + rank, shape, dtype))
    full = integers(seed, shape, dtype)
    if state == "S":
        return per_rank(lambda rank: full.chunk(ranks, dim)[rank].clone())
    return per_rank(lambda rank: full.clone())


def whole(state: str, dim: int, values: list[Tensor]) -> Tensor:
    """The global value; an error if ranks that must agree do not."""
    if state == "P":
        return torch.stack(values).sum(0)
    if state == "S":
        return torch.cat(values, dim)
    assert all(torch.equal(values[0], value) for value in values)
    return values[0]


class Run(NamedTuple):
    x: Tensor
    y: Tensor
    y_grad: Tensor
    x_grad: Tensor


def run(name: str, shape: tuple[int, ...], dim: int, dtype: torch.dtype, ranks: int) -> Run:
    case = CASES[name]
    x = local(case.source, dim, 10, shape, dtype, ranks).requires_grad_()
    y = case.function(x, dim=dim) if case.takes_dim else case.function(x)
    y_grad = local(DUAL[case.target], dim, 20, shape, dtype, ranks)
    y.backward(y_grad)
    assert x.grad is not None
    return Run(x.detach(), y.detach(), y_grad, x.grad)


def check(name: str, dim: int, ranks: list[Run]) -> None:
    case = CASES[name]
    x, y, y_grad, x_grad = ([getattr(values, field) for values in ranks] for field in Run._fields)
    assert all(tensor.dtype == x[0].dtype for tensor in (*y, *x_grad))
    assert torch.equal(whole(case.target, dim, y), whole(case.source, dim, x))
    assert torch.equal(whole(DUAL[case.source], dim, x_grad), whole(DUAL[case.target], dim, y_grad))


def by_rank(simulated: Run) -> list[Run]:
    return [Run(*values) for values in zip(*(rank_values(tensor) for tensor in simulated), strict=True)]


@pytest.mark.parametrize(("shape", "dim"), DIMS)
@pytest.mark.parametrize("tp", (2, 4))
@pytest.mark.parametrize("name", CASES)
def test_only_the_holder_of_a_value_changes(name: str, tp: int, shape: tuple[int, ...], dim: int) -> None:
    with simulate(tp=tp):
        check(name, dim, by_rank(run(name, shape, dim, torch.float64, tp)))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", CASES)
def test_types_are_kept(name: str, dtype: torch.dtype) -> None:
    with simulate(tp=2):
        check(name, 1, by_rank(run(name, (2, 4, 2), 1, dtype, 2)))


@pytest.mark.parametrize("name", CASES)
def test_groups_do_not_mix(name: str) -> None:
    """With dp=2 the two tensor-parallel groups each hold values of their own."""
    with simulate(tp=2, dp=2):
        case = CASES[name]
        x = per_rank(lambda rank: torch.full((4, 2), float(rank // 2))).requires_grad_()
        y = case.function(x, dim=0) if case.takes_dim else case.function(x)
        y.backward(per_rank(lambda rank: torch.full(rank_values(y)[rank].shape, float(rank // 2))))
        for rank, (value, grad) in enumerate(zip(rank_values(y), rank_values(x.grad), strict=True)):
            if rank < 2:
                assert value.abs().max() == 0 and grad.abs().max() == 0
            else:
                assert value.abs().min() > 0 and grad.abs().min() > 0


@pytest.mark.parametrize("name", CASES)
def test_a_second_derivative_is_refused(name: str) -> None:
    """Autograd does not see what a collective does to a gradient: the second would be wrong, in silence."""
    with simulate(tp=2):
        case = CASES[name]
        x = local(case.source, 0, 0, (4, 3), torch.float64, 2).requires_grad_()
        y = case.function(x, dim=0) if case.takes_dim else case.function(x)
        (first,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="marked with @once_differentiable"):
            first.sum().backward()


@pytest.mark.parametrize("name", CASES)
def test_what_is_sent(name: str) -> None:
    """One collective or none each way; a rank gives its slice to a gather, the whole to the others."""
    with simulate(tp=2):
        case = CASES[name]
        x = local(case.source, 0, 0, (4, 3), torch.float32, 2).requires_grad_()
        with count_collectives() as calls:
            y = case.function(x, dim=0) if case.takes_dim else case.function(x)
            forward = list(calls)
            y.backward(y.detach())
        size = {"allgather": 6, "allreduce": 12, "reduce_scatter": 12}
        assert forward == [Collective(kind, size[kind], itemsize=4) for kind in case.forward]
        assert calls[len(forward) :] == [Collective(kind, size[kind], itemsize=4) for kind in case.backward]


@pytest.mark.parametrize("tp", (2, 4))
@pytest.mark.parametrize("shape", ((4, 8), (4, 3, 8)))
@pytest.mark.parametrize("exchange", (all2all_hp2sp, _All2AllHp2Sp.apply))
def test_hidden_to_sequence_parallel(tp: int, shape: tuple[int, ...], exchange: Callable[[Tensor], Tensor]) -> None:
    """S(-1) -> S(0), and the gradient goes back the way it came."""
    with simulate(tp=tp):
        x = local("S", -1, 0, shape, torch.float64, tp).requires_grad_()
        y = exchange(x)
        assert torch.equal(whole("S", 0, rank_values(y)), whole("S", -1, rank_values(x)))
        y_grad = local("S", 0, 1, shape, torch.float64, tp)
        with count_collectives() as calls:
            y.backward(y_grad)
        assert torch.equal(whole("S", -1, rank_values(x.grad)), whole("S", 0, rank_values(y_grad)))
        assert [call.name for call in calls] == ["alltoall"]


REDUCED: dict[str, Callable[[Tensor], Tensor]] = {
    "SUM": lambda stacked: stacked.sum(0),
    "AVG": lambda stacked: stacked.mean(0),
    "PRODUCT": lambda stacked: stacked.prod(0),
    "MIN": lambda stacked: stacked.amin(0),
    "MAX": lambda stacked: stacked.amax(0),
}


@pytest.mark.parametrize("tp", (2, 4))
@pytest.mark.parametrize("op", REDUCED)
def test_every_op_reduces_the_gradient_of_a_copy_and_the_value_of_a_reduction(op: str, tp: int) -> None:
    with simulate(tp=tp):
        grads = local("P", 0, 0, (5, 3), torch.float64, tp)
        expected = REDUCED[op](torch.stack(rank_values(grads)))
        x = local("I", 0, 1, (5, 3), torch.float64, tp).requires_grad_()
        mp_copy(x, getattr(ReduceOp, op)).backward(grads)
        assert all(torch.equal(value, expected) for value in rank_values(x.grad))
        reduced = mp_reduce(grads, getattr(ReduceOp, op))
        assert all(torch.equal(value, expected) for value in rank_values(reduced))


def test_the_gradient_of_an_average_is_divided() -> None:
    with simulate(tp=4):
        x = local("P", 0, 0, (3,), torch.float64, 4).requires_grad_()
        mp_reduce(x, ReduceOp.AVG).backward(torch.ones(3, dtype=torch.float64))
        assert all(torch.equal(value, torch.full((3,), 0.25, dtype=torch.float64)) for value in rank_values(x.grad))


@pytest.mark.parametrize("op", ("PRODUCT", "MIN", "MAX", "BAND"))
def test_a_reduction_without_a_gradient_is_refused_where_one_is_needed(op: str) -> None:
    with simulate(tp=2):
        x = local("P", 0, 0, (3,), torch.float64, 2).requires_grad_()
        with pytest.raises(ParallelError, match="has no gradient here and x requires one; use SUM or AVG"):
            mp_reduce(x, getattr(ReduceOp, op))
        if op != "BAND":  # of integers only
            with torch.no_grad():
                mp_reduce(x, getattr(ReduceOp, op))


@pytest.mark.parametrize("op", ("BAND", "BOR", "BXOR"))
@pytest.mark.parametrize("tp", (1, 2))
def test_a_gradient_has_no_bits_to_combine(tp: int, op: str) -> None:
    with simulate(tp=tp), pytest.raises(ParallelError, match=r"mp_copy: op .* is of integers, unlike gradients"):
        mp_copy(torch.ones(3, requires_grad=True), getattr(ReduceOp, op))


@pytest.mark.parametrize("function", (mp_scatter, sp_reduce_scatter, all2all_hp2sp))
def test_sizes_that_do_not_divide_are_named(function: Callable[..., Tensor]) -> None:
    arguments: dict[str, Any] = {} if function is all2all_hp2sp else {"dim": 0}
    with (
        simulate(tp=4),
        pytest.raises(ParallelError, match=r"dim 0 of shape \(6, 4\) cannot be split over tp=4; pad .* multiple of 4"),
    ):
        function(torch.zeros(6, 4), **arguments)


@pytest.mark.parametrize("name", [*CASES, "all2all_hp2sp"])
def test_one_rank_returns_its_argument(name: str) -> None:
    """Without a process group nothing is sent and nothing copied; the op and the shape do not matter."""
    x = torch.randn(3, 5, requires_grad=True)
    functions = {**{key: case.function for key, case in CASES.items()}, "all2all_hp2sp": all2all_hp2sp}
    with count_collectives() as calls:
        assert functions[name](x) is x
    assert mp_reduce(x, ReduceOp.MAX) is x
    assert mp_copy(x, ReduceOp.MAX) is x
    assert calls == []


def test_an_axis_of_one_rank_in_a_larger_world_returns_its_argument() -> None:
    with simulate(tp=1, dp=2):
        x = per_rank(lambda rank: torch.randn(3, 5))
        for case in CASES.values():
            assert case.function(x) is x


def every_case_on_gloo() -> dict[str, Run]:
    init_parallelism(tensor_parallel=2)
    runs = {
        f"{name} {dtype}": run(name, (4, 3, 2), -3, dtype, 2)
        for name in CASES
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    }
    x = local("S", -1, 0, (4, 3, 2), torch.float64, 2).requires_grad_()
    y = all2all_hp2sp(x)
    y_grad = local("S", 0, 1, (4, 3, 2), torch.float64, 2)
    y.backward(y_grad)
    runs["all2all_hp2sp"] = Run(x.detach(), y.detach(), y_grad, x.grad)
    for op in REDUCED:
        grads = local("P", 0, 0, (5,), torch.float64, 2)
        x = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        mp_copy(x, getattr(ReduceOp, op)).backward(grads)
        runs[op] = Run(x.detach(), mp_reduce(grads, getattr(ReduceOp, op)), grads, x.grad)
    assert dist.get_backend() == "gloo"
    return runs


def test_real_processes_agree_with_the_simulation() -> None:
    ranks = run_on_ranks(2, every_case_on_gloo)
    for key in ranks[0]:
        runs = [rank[key] for rank in ranks]
        if key in REDUCED:
            expected = REDUCED[key](torch.stack([values.y_grad for values in runs]))
            assert all(torch.equal(values.x_grad, expected) and torch.equal(values.y, expected) for values in runs)
        elif key == "all2all_hp2sp":
            assert torch.equal(whole("S", 0, [v.y for v in runs]), whole("S", -1, [v.x for v in runs]))
            assert torch.equal(whole("S", -1, [v.x_grad for v in runs]), whole("S", 0, [v.y_grad for v in runs]))
        else:
            check(key.split()[0], -3, runs)


def test_nothing_leads_from_a_replicated_value_to_another_state() -> None:
    with simulate(tp=2) as info:
        for dst in (I, P, Shard(0)):
            with pytest.raises(
                ParallelError, match=r"no collective leads from R to .* on tp; those from I lead to R and shards"
            ):
                convert(torch.ones(2), R, dst, info.tp)
