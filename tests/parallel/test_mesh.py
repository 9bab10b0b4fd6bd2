"""The mesh: which ranks share which axis, and what is refused."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import coordinates, expected_group
from helpers.simulate import rank_values, simulate, standing_at
from torch import Tensor

from meshpeft.parallel import (
    ParallelAxis,
    ParallelError,
    ParallelGroupInfo,
    destroy_parallelism,
    init_parallelism,
    is_simulated,
    on_each_rank,
    parallel_group_info,
)
from meshpeft.parallel.mesh import AXES

# world, tp, pp, ep, etp, cp
LAYOUTS = [
    (4, 4, 1, 1, None, 1),
    (4, 1, 1, 4, 1, 1),
    (8, 2, 1, 2, 2, 2),
    (8, 2, 1, 4, 1, 1),
    (8, 4, 1, 2, 1, 2),
    (12, 2, 3, 2, 1, 2),
    (16, 2, 2, 2, None, 2),
    (16, 4, 2, 4, 2, 1),
]
JOINED = [
    ("dp", "tp"),
    ("dp", "cp"),
    ("cp", "tp"),
    ("dp", "cp", "tp"),
    ("edp", "ep"),
    ("edp", "etp"),
    ("ep", "etp"),
    ("edp", "ep", "etp"),
]


def factorisations(
    world: int, tp: int, pp: int, ep: int, etp: int | None, cp: int
) -> tuple[dict[str, int], dict[str, int]]:
    etp = tp if etp is None else etp
    return (
        {"pp": pp, "dp": world // (pp * cp * tp), "cp": cp, "tp": tp},
        {"pp": pp, "edp": world // (pp * ep * etp), "ep": ep, "etp": etp},
    )


@pytest.mark.parametrize(("world", "tp", "pp", "ep", "etp", "cp"), LAYOUTS)
def test_every_rank_finds_its_groups(world: int, tp: int, pp: int, ep: int, etp: int | None, cp: int) -> None:
    dense, expert = factorisations(world, tp, pp, ep, etp, cp)
    for rank in range(world):
        with standing_at(rank, world):
            info = init_parallelism(tp, pp, ep, etp, cp)
            assert info is parallel_group_info()
            for name in AXES:
                sizes = dense if name in dense else expert
                axis = info.axis(name)
                assert (axis.name, axis.world_size) == (name, sizes[name])
                assert axis.rank == coordinates(rank, sizes)[name]
                assert dist.get_process_group_ranks(axis.process_group) == expected_group(rank, (name,), sizes)
            assert dist.get_process_group_ranks(info.world.process_group) == list(range(world))
            assert info.world.rank == rank
            for names in JOINED:
                sizes = dense if set(names) <= set(dense) else expert
                axis = info.joined(names)
                large = tuple(name for name in names if sizes[name] > 1)
                assert axis.world_size == math.prod(sizes[name] for name in large)
                if large:
                    group = expected_group(rank, large, sizes)
                    assert dist.get_process_group_ranks(axis.process_group) == group
                    assert axis.rank == group.index(rank)


@pytest.mark.parametrize(("world", "tp", "pp", "ep", "etp", "cp"), LAYOUTS)
def test_simulated_ranks_stand_where_real_ones_do(
    world: int, tp: int, pp: int, ep: int, etp: int | None, cp: int
) -> None:
    dense, expert = factorisations(world, tp, pp, ep, etp, cp)
    number = on_each_rank(lambda rank: torch.tensor(int(rank)))
    with simulate(tp=tp, dp=dense["dp"], pp=pp, ep=ep, etp=etp, cp=cp) as info:
        assert is_simulated()
        for sizes, name in [*((dense, name) for name in dense), *((expert, name) for name in expert)]:
            ranks = [coordinates(rank, sizes)[name] for rank in range(world)]
            if len(set(ranks)) == 1:
                assert info.axis(name).rank == 0
            else:
                assert [int(rank) for rank in rank_values(number(info.axis(name).rank))] == ranks


def test_without_a_process_group_every_axis_has_one_rank() -> None:
    info = init_parallelism()
    assert not dist.is_initialized()
    for name in ("tp", "pp", "dp", "ep", "etp", "edp", "world"):
        axis = info.axis(name)
        assert (axis.group, axis.rank, axis.world_size) == (None, 0, 1)
    assert info.joined(("dp", "tp")).world_size == 1
    with pytest.raises(ParallelError, match="axis tp has no process group; call init_parallelism"):
        _ = info.tp.process_group


def test_a_launcher_of_one_process_needs_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert init_parallelism().tp.group is None


def test_a_process_group_is_started_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    try:
        info = init_parallelism()
        assert dist.get_backend() == ("nccl" if torch.cuda.is_available() else "gloo")
        assert dist.get_process_group_ranks(info.tp.process_group) == [0]
    finally:
        destroy_parallelism()
        dist.destroy_process_group()


def test_the_process_group_that_exists_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("WORLD_SIZE", "9")
    with standing_at(1, 2):
        group = dist.group.WORLD
        assert init_parallelism(tensor_parallel=2).tp.rank == 1
        assert dist.group.WORLD is group


def test_destroying_forgets_the_mesh_but_not_the_process_group() -> None:
    with standing_at(0, 2):
        first = init_parallelism(tensor_parallel=2)
        destroy_parallelism()
        assert parallel_group_info().tp.world_size == 1
        assert dist.is_initialized()
        again = init_parallelism()
        assert (again.tp.world_size, again.dp.world_size, first.tp.world_size) == (1, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"tensor_parallel": 0}, "tensor_parallel=0: expected an integer of at least 1"),
        ({"pipeline_parallel": -1}, "pipeline_parallel=-1: expected"),
        ({"expert_parallel": 1.5}, "expert_parallel=1.5: expected"),
        ({"expert_tensor_parallel": 0}, "expert_tensor_parallel=0: expected"),
        ({"context_parallel": 0}, "context_parallel=0: expected"),
        (
            {"tensor_parallel": 2, "context_parallel": 2},
            "context_parallel=2 x tensor_parallel=2 = 4 does not divide .* 6 .*; start a multiple of 4",
        ),
        (
            {"tensor_parallel": 4},
            "tensor_parallel=4 = 4 does not divide the world of 6 processes; start a multiple of 4",
        ),
        (
            {"tensor_parallel": 2, "pipeline_parallel": 2},
            "pipeline_parallel=2 x tensor_parallel=2 = 4 does not divide .* 6 .*; start a multiple of 4",
        ),
        # The dense axes fit here, the expert axes do not: both have a say in what would.
        (
            {"tensor_parallel": 3, "expert_parallel": 4, "expert_tensor_parallel": 1},
            "expert_parallel=4 x expert_tensor_parallel=1 = 4 does not divide .* 6 .*; start a multiple of 12",
        ),
    ),
)
def test_sizes_that_do_not_fit_are_named_with_what_would(arguments: dict[str, int], message: str) -> None:
    with standing_at(0, 6), pytest.raises(ParallelError, match=message):
        init_parallelism(**arguments)


def test_axes_that_do_not_exist_or_do_not_join() -> None:
    with standing_at(0, 4):
        info: ParallelGroupInfo = init_parallelism(tensor_parallel=2, expert_parallel=2, expert_tensor_parallel=1)
        with pytest.raises(ParallelError, match="no mesh axis 'xp'; the axes are pp, dp, cp, tp, edp,"):
            info.axis("xp")
        with pytest.raises(ParallelError, match="the axes tp, ep cannot be joined"):
            info.joined(("tp", "ep"))
        assert info.joined(("tp", "etp")) is info.tp  # etp has one rank
        assert info.joined(("tp", "tp")) is info.tp


def test_copies_of_a_module_share_its_groups() -> None:
    with standing_at(0, 2):
        axis = init_parallelism(tensor_parallel=2).tp
        assert copy.deepcopy(axis) is axis


def test_on_each_rank_gives_every_rank_its_own_values() -> None:
    @on_each_rank
    def scaled(x: Tensor, rank: int, *, by: list[int]) -> tuple[Tensor, Tensor]:
        assert type(x) is Tensor
        return x * int(rank), x + by[0]

    assert torch.equal(scaled(torch.ones(2), 3, by=[1])[0], torch.full((2,), 3.0))
    with simulate(tp=2) as info:
        product, total = scaled(torch.ones(2), info.tp.rank, by=[5])
        assert [value.tolist() for value in rank_values(product)] == [[0.0, 0.0], [1.0, 1.0]]
        assert [value.tolist() for value in rank_values(total)] == [[6.0, 6.0]] * 2


def test_axes_are_told_apart_by_identity() -> None:
    """Layouts are compared and used as keys: an axis of an earlier mesh is not that of the next."""
    axes = [ParallelAxis("tp"), ParallelAxis("tp")]
    assert len(set(axes)) == 2
    assert all(one != other for one, other in itertools.combinations(axes, 2))
