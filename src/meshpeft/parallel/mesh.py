"""The mesh: which process groups exist, and where this rank stands in each.

The world is factored twice. Dense layers see `pp x dp x cp x tp`; expert layers see
`pp x edp x ep x etp`. Both run over the same ranks, the last axis fastest:

    rank = ((pp * dp_size + dp) * cp_size + cp) * tp_size + tp
         = ((pp * edp_size + edp) * ep_size + ep) * etp_size + etp

Nothing else in the package asks torch.distributed who it is: layers take a
`ParallelAxis`, and every slice follows from a layout that holds one.

To add an axis: its name at its place in `DENSE_AXES` or `EXPERT_AXES`; its field in `ParallelGroupInfo`, which
`engines/megatron.py` fills, too; its size in `init_parallelism` and in the shape of the mesh that `_build` makes; and

* if its ranks see different tokens, `token_axes`: the sums of gradients and losses, dropout's masks and checkpoints
  follow;
* if it shards weights, `weight_axes`, and the `LinearLayout` of the layers that it shards (`models/sharding.py`).

Outside of parallel/, the sizes of a layout stand in `LayoutConfig` (`training/config.py`, the command line) and in
`Layout` (`verify/oracle.py`), and are handed on by name: a search for `cp` and `context_parallel` finds the lines, in
`ModelParallelConfig`, `ModelSharding.of`, training's launcher and report, and the files of verify/. Rows of a batch are
sharded over `dp` alone (`data/batches.py`), and the tokens of every row over `cp` (`data/context.py`).

The module also knows that all ranks of a small mesh can be simulated in one process
(`torch.distributed._local_tensor.LocalTensorMode`): there an axis's rank is a symbolic integer,
and `on_each_rank` runs a function once per simulated rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import wraps
from itertools import combinations
from typing import Any, ParamSpec, TypeVar

import torch.distributed as dist
from torch.distributed._local_tensor import (
    enabled_local_tensor_mode,
    maybe_disable_local_tensor_mode,
    maybe_run_for_local_tensor,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from meshpeft.parallel.class_registry import load_engines_in_use
from meshpeft.parallel.errors import ParallelError
from meshpeft.parallel.launcher_world import launcher_world, start_process_group

__all__ = [
    "ParallelAxis",
    "ParallelGroupInfo",
    "check_shards",
    "destroy_parallelism",
    "init_parallelism",
    "is_simulated",
    "on_each_rank",
    "parallel_group_info",
    "register_mesh_provider",
]

DENSE_AXES = ("pp", "dp", "cp", "tp")
EXPERT_AXES = ("pp", "edp", "ep", "etp")
AXES = tuple(dict.fromkeys((*DENSE_AXES, *EXPERT_AXES)))


def _sets_of(axes: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [names for count in range(2, len(axes) + 1) for names in combinations(axes, count)]


# Sets of axes over which one gradient can be partial at once. Their joined groups are made with the mesh, in this order
# on every rank, so that no rank can create one later than another and hang. Stages share no parameter.
JOINED_AXES = (*_sets_of(DENSE_AXES[1:]), *_sets_of(EXPERT_AXES[1:]))

Arguments = ParamSpec("Arguments")
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class ParallelAxis:
    """One axis of the mesh as this rank sees it.

    Attributes:
        name: One of `AXES`, or names joined by `+` for a flattened axis.
        group: The process group of the axis; `None` if torch.distributed is not in use.
        rank: This rank's index on the axis, in `[0, world_size)`. Symbolic under simulation: use it only
            to slice (through a layout), never in python control flow.
        world_size: Number of ranks on the axis.
    """

    name: str
    group: dist.ProcessGroup | None = None
    rank: int = 0
    world_size: int = 1

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The group, where there must be one.

        Raises:
            ParallelError: Torch.distributed is not in use.
        """
        if self.group is None:
            raise ParallelError(f"axis {self.name} has no process group; call init_parallelism in a started world")
        return self.group

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelAxis:
        """Copies of a module talk over the same group: process groups are never copied."""
        return self

    def __repr__(self) -> str:
        return f"ParallelAxis({self.name}, rank={self.rank}, world_size={self.world_size})"


@dataclass(frozen=True, eq=False)
class ParallelGroupInfo:
    """The axes of the mesh, each with `.group`, `.rank` and `.world_size`."""

    tp: ParallelAxis
    pp: ParallelAxis
    dp: ParallelAxis
    cp: ParallelAxis
    ep: ParallelAxis
    etp: ParallelAxis
    edp: ParallelAxis
    world: ParallelAxis
    joined_axes: dict[frozenset[str], ParallelAxis]
    mesh: DeviceMesh | None = None
    expert_mesh: DeviceMesh | None = None
    # Simulation remembers each mesh's ranks by the id of the object: one that was collected could lend its ranks
    # to the next.
    submeshes: tuple[DeviceMesh, ...] = ()
    # Made when a base is sharded over some of its replicas: number of these -> the axes, and their meshes.
    base_axes: dict[int, tuple[ParallelAxis, ParallelAxis, list[DeviceMesh]]] = field(default_factory=dict)

    def axis(self, name: str) -> ParallelAxis:
        """The axis called `name`: one of `AXES`, or `world`."""
        if name not in (*AXES, "world"):
            raise ParallelError(f"no mesh axis {name!r}; the axes are {', '.join(AXES)} and world")
        found: ParallelAxis = getattr(self, name)
        return found

    @property
    def axes(self) -> tuple[ParallelAxis, ...]:
        """Every axis, dense ones first, and every joined one."""
        return (*map(self.axis, AXES), *self.joined_axes.values())

    def token_axes(self, *, expert: bool = False) -> tuple[ParallelAxis, ...]:
        """The axes whose ranks see different tokens of a batch, so that gradients are partial over them.

        Args:
            expert: Whether experts' parameters are meant: they factor the ranks another way.
        """
        return (self.edp,) if expert else (self.dp, self.cp)

    def token_axis(self, *, expert: bool = False) -> ParallelAxis:
        """One axis over all ranks of `token_axes`."""
        axes = self.token_axes(expert=expert)
        return axes[0] if len(axes) == 1 else self.joined(axis.name for axis in axes)

    def weight_axes(self, *, expert: bool = False) -> tuple[ParallelAxis, ...]:
        """The axes over which a stage's parameters are sharded or replicated, token axes first."""
        return (*self.token_axes(expert=expert), *((self.ep, self.etp) if expert else (self.tp,)))

    def replica_axes(self, shards: int | None = None) -> tuple[ParallelAxis, ParallelAxis]:
        """The axes over which a frozen base is sharded: the one of its dense parameters, and the one of its experts.

        Their ranks are next to each other, so that those of a node share a base. A collective where a number is given:
        the groups are made.

        Args:
            shards: Over how many of the replicas of dense parameters, dp * cp; `None`: all. Experts, which expert
                parallel shards already, are sharded over as many ranks as are left in such a group.

        Raises:
            ParallelError: The number does not divide that of replicas.
        """
        dense, expert = self.token_axis(), self.token_axis(expert=True)
        replicas = dense.world_size
        if shards is None or shards == replicas:
            return dense, expert
        check_shards(shards, replicas)
        if shards == 1:
            return ParallelAxis("none"), ParallelAxis("none")
        if shards not in self.base_axes:
            of_experts = max(1, shards * expert.world_size // replicas)
            if expert.world_size % of_experts:
                raise ParallelError(
                    f"shard_base={shards}: experts have {expert.world_size} replicas, and {of_experts} of them would "
                    "share a base, which does not divide; use another number"
                )
            self.base_axes[shards] = _replica_axes(self, shards, of_experts)
        return self.base_axes[shards][:2]

    def joined(self, names: Iterable[str]) -> ParallelAxis:
        """One axis that runs over all ranks of the axes named; axes of size 1 are left out."""
        names = tuple(dict.fromkeys(names))
        wanted = [name for name in names if self.axis(name).world_size > 1]
        if not wanted:
            return ParallelAxis("+".join(names) or "none")
        if len(wanted) == 1:
            return self.axis(wanted[0])
        found = self.joined_axes.get(frozenset(wanted))
        if found is None:
            raise ParallelError(
                f"the axes {', '.join(wanted)} cannot be joined: only dense axes ({', '.join(DENSE_AXES[1:])}) with "
                f"each other, or expert axes ({', '.join(EXPERT_AXES[1:])}), which factor the same ranks another way"
            )
        return found


_ALONE: dict[str, Any] = {name: ParallelAxis(name) for name in (*AXES, "world")}
_SERIAL = ParallelGroupInfo(**_ALONE, joined_axes={})
_current: ParallelGroupInfo = _SERIAL
_providers: list[Callable[[], ParallelGroupInfo | None]] = []


def register_mesh_provider(provider: Callable[[], ParallelGroupInfo | None]) -> None:
    """Let an engine say which groups its package has made, where `init_parallelism` made none.

    Args:
        provider: The groups, with the same axes while anything holds them; or `None` if there are none.
    """
    _providers.append(provider)


def check_shards(shards: int, replicas: int) -> None:
    """Check that a base can be sharded over so many of its replicas.

    Raises:
        ParallelError: The number does not divide theirs.
    """
    if shards < 1 or replicas % shards:
        fitting = " or ".join(str(size) for size in range(1, replicas + 1) if replicas % size == 0)
        raise ParallelError(
            f"shard_base={shards}: dp times cp is {replicas}, the number of copies of the base, which {shards} does "
            f"not divide; use {fitting}, or another dp"
        )


def parallel_group_info() -> ParallelGroupInfo:
    """The groups made by `init_parallelism`.

    Before it they are those that an engine's package has made (Megatron's `parallel_state`); else all of size 1.
    """
    if _current is _SERIAL:
        load_engines_in_use()
        for provider in _providers:
            provided = provider()
            if provided is not None:
                return provided
    return _current


def init_parallelism(
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    expert_parallel: int = 1,
    expert_tensor_parallel: int | None = None,
    context_parallel: int = 1,
) -> ParallelGroupInfo:
    """Factor the world into mesh axes and make their process groups. Every rank calls it, with equal arguments.

    Uses the process group that exists, else starts one from `RANK` and `WORLD_SIZE` (nccl where CUDA is
    available, else gloo), else (world size 1) works without torch.distributed.

    Args:
        tensor_parallel: Ranks that share one dense layer.
        pipeline_parallel: Stages.
        expert_parallel: Ranks that shard the experts of one layer.
        expert_tensor_parallel: Ranks that share one expert; `None` means `tensor_parallel`.
        context_parallel: Ranks that share the tokens of every row.

    Returns:
        The groups. Data parallel is what is left: `dp = world / (pp * cp * tp)`, `edp = world / (pp * ep * etp)`.

    Raises:
        ParallelError: a size is below 1, or the world does not factor; the message names the sizes that would.
    """
    global _current
    etp = tensor_parallel if expert_tensor_parallel is None else expert_tensor_parallel
    sizes = {
        "tensor_parallel": tensor_parallel,
        "pipeline_parallel": pipeline_parallel,
        "expert_parallel": expert_parallel,
        "expert_tensor_parallel": etp,
        "context_parallel": context_parallel,
    }
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ParallelError(f"{name}={size!r}: expected an integer of at least 1")
    dense = pipeline_parallel * context_parallel * tensor_parallel
    expert = pipeline_parallel * expert_parallel * etp
    world_size = _world_size()
    stages = f"pipeline_parallel={pipeline_parallel}"
    context = f" x context_parallel={context_parallel}" if context_parallel > 1 else ""
    for product, text in (
        (dense, f"{stages}{context} x tensor_parallel={tensor_parallel}"),
        (expert, f"{stages} x expert_parallel={expert_parallel} x expert_tensor_parallel={etp}"),
    ):
        if world_size % product:
            raise ParallelError(
                f"{text} = {product} does not divide the world of {world_size} processes; "
                f"start a multiple of {math.lcm(dense, expert)} processes"
            )
    started = start_process_group()
    dense_sizes = (pipeline_parallel, world_size // dense, context_parallel, tensor_parallel)
    expert_sizes = (pipeline_parallel, world_size // expert, expert_parallel, etp)
    _current = _build(dense_sizes, expert_sizes) if started else _SERIAL
    return _current


def destroy_parallelism() -> None:
    """Forget the mesh; the process group itself, and layers that already hold an axis, are untouched."""
    global _current
    _current = _SERIAL


def _world_size() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    world = launcher_world()
    return 1 if world is None else world.world_size


def _build(dense_sizes: tuple[int, ...], expert_sizes: tuple[int, ...]) -> ParallelGroupInfo:
    device_type = "cuda" if dist.get_backend() == "nccl" else "cpu"
    # Simulated ranks share the meshes, and differ only in where they stand, which is asked for below.
    with maybe_disable_local_tensor_mode():
        dense = init_device_mesh(device_type, dense_sizes, mesh_dim_names=DENSE_AXES)
        expert = init_device_mesh(device_type, expert_sizes, mesh_dim_names=EXPERT_AXES)

        def part(*names: str) -> DeviceMesh:
            mesh = dense if set(names) <= set(DENSE_AXES) else expert
            return mesh[names[0]] if len(names) == 1 else mesh[names]._flatten("_".join(names))

        meshes = {(name,): part(name) for name in AXES}
        joined = {names: part(*names) for names in JOINED_AXES if all(meshes[(name,)].size() > 1 for name in names)}
        world = dense._flatten("world")

    def axis(names: tuple[str, ...], mesh: DeviceMesh) -> ParallelAxis:
        return ParallelAxis("+".join(names), mesh.get_group(), mesh.get_local_rank(), mesh.size())

    axes: dict[str, Any] = {names[0]: axis(names, mesh) for names, mesh in meshes.items()}
    return ParallelGroupInfo(
        **axes,
        world=axis(("world",), world),
        joined_axes={frozenset(names): axis(names, mesh) for names, mesh in joined.items()},
        mesh=dense,
        expert_mesh=expert,
        submeshes=(*meshes.values(), *joined.values(), world),
    )


def _replica_axes(
    info: ParallelGroupInfo, dense: int, expert: int
) -> tuple[ParallelAxis, ParallelAxis, list[DeviceMesh]]:
    device_type = "cuda" if dist.get_backend() == "nccl" else "cpu"
    meshes, axes = [], []
    for size, replicas, inner in (
        (dense, info.dp.world_size * info.cp.world_size, info.tp.world_size),
        (expert, info.edp.world_size, info.ep.world_size * info.etp.world_size),
    ):
        sizes = (info.pp.world_size, replicas // size, size, inner)
        with maybe_disable_local_tensor_mode():
            whole = init_device_mesh(device_type, sizes, mesh_dim_names=("pp", "copies", "base", "inner"))
            mesh = whole["base"]
        meshes += [whole, mesh]
        axes.append(ParallelAxis("base", mesh.get_group(), mesh.get_local_rank(), size))
    return axes[0], axes[1], meshes


def is_simulated() -> bool:
    """Whether all ranks run in this process under `LocalTensorMode`."""
    return enabled_local_tensor_mode() is not None


def on_each_rank(function: Callable[Arguments, T]) -> Callable[Arguments, T]:
    """Decorator: under simulation run `function` once per simulated rank, otherwise just call it.

    Tensors become that rank's local tensor and symbolic integers that rank's value, so the body may slice by
    a rank and seed a generator. It must not communicate, and no gradient flows through it.
    """
    simulated = maybe_run_for_local_tensor(function)

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> T:
        if is_simulated():
            return simulated(*args, **kwargs)
        return function(*args, **kwargs)

    return call
