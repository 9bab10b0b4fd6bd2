"""What the type checker (`spmd_types`) is told: types of parameters, and of functions that it cannot follow.

The checker follows collectives and ordinary operators by itself. It does not follow a reshape or a split of a dim
that is sharded, an attention kernel, or arithmetic with this rank's index; such code stands in a function of its
own, marked `typed_as`, whose body is still checked per rank (no nonlinearity of a
partial value, no sum of a partial and a full one) and whose result is given the type that the mark states. Without a
checker running the marks cost one test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import spmd_types as spmd
from spmd_types import rules
from spmd_types.types import I, PartitionSpec, R, Shard, V
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from meshpeft.parallel.layout import TensorLayout
from meshpeft.parallel.mesh import ParallelAxis, parallel_group_info

__all__ = ["SpmdTypeOf", "assert_state", "dims_follow", "parameter_type", "typed_as", "typed_linear"]

P = ParamSpec("P")
T = TypeVar("T")


class SpmdTypeOf(NamedTuple):
    """A type as `spmd_types.assert_type` takes it: the local state per axis, and which axes shard each dim."""

    local: dict[Any, Any]
    spec: PartitionSpec | None


def parameter_type(layout: TensorLayout) -> SpmdTypeOf:
    """The type that a parameter's layout stands for, on the axes of the dense mesh (or of the expert mesh).

    An axis that shards the parameter: S. One on which its gradient is partial (also token axes): R. Any other:
    I, whose gradient is already the same on every rank.
    """
    info = parallel_group_info()
    token_axes = info.token_axes(expert=layout.expert)
    dims: list[list[Any]] = [[] for _ in layout.global_shape]
    local: dict[Any, Any] = {}
    for axis in info.weight_axes(expert=layout.expert):
        if axis.world_size == 1:
            continue
        local[axis.process_group] = R if axis in token_axes or axis in layout.grad_partial else I
        for dim, sharding in layout.shards:
            if sharding is axis:
                local[axis.process_group] = V
                dims[dim].append(axis.process_group)
    return SpmdTypeOf(local, _partition(dims))


def _partition(dims: Sequence[Sequence[Any]]) -> PartitionSpec:
    return PartitionSpec(*(None if not names else names[0] if len(names) == 1 else tuple(names) for names in dims))


def dims_follow(source: Tensor, dims: Sequence[int | None] | None = None, **changes: Any) -> SpmdTypeOf:
    """The type of a result whose dims are sharded like those of `source`.

    Args:
        source: Typed.
        dims: For each dim of the result, the dim of `source` whose sharding it has; `None` for one that is not sharded.
            By default the dims of `source`.
        changes: `axis=ParallelAxis, state=..`: the result's state on one axis, if not that of `source`.
    """
    spec = spmd.get_partition_spec(source)
    entries = [None] * source.dim() if spec is None else list(spec)
    taken = entries if dims is None else [None if dim is None else entries[dim] for dim in dims]
    local: dict[Any, Any] = dict(spmd.get_local_type(source))
    axis: ParallelAxis | None = changes.get("axis")
    if axis is not None and axis.world_size > 1:
        local[spmd.normalize_axis(axis.process_group)] = changes["state"]
    return SpmdTypeOf(local, PartitionSpec(*taken))


def assert_state(x: Tensor, state: Any, axis: ParallelAxis) -> None:
    """Check the state of x on an axis, where the checker runs; `S(dim)` is checked with its dim.

    Another axis may shard the same dim: context parallel shards tokens, and sequence parallel each of its parts.
    """
    if axis.world_size == 1 or not spmd.is_type_checking():
        return
    if isinstance(state, Shard):
        entry = (spmd.get_partition_spec(x) or PartitionSpec(*[None] * x.dim()))[state.dim]
        if spmd.normalize_axis(axis.process_group) in (entry if isinstance(entry, tuple) else (entry,)):
            return
    spmd.assert_type(x, {axis.process_group: state})


def typed_as(rule: Callable[..., SpmdTypeOf]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator: `rule`, called with the function's own arguments, gives the type of its result (or of each)."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            if not spmd.is_type_checking():
                return function(*args, **kwargs)
            declared = rule(*args, **kwargs)
            with spmd.local():
                result = function(*args, **kwargs)
            for value in result if isinstance(result, tuple) else (result,):
                tensor: Any = value
                spmd.assert_type(tensor, declared.local, partition_spec=declared.spec)
            return result

        return call

    return decorate


class _TypedLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return functional.linear(x, weight)

    @staticmethod
    def spmd_typecheck(*, x: Tensor, weight: Tensor) -> Any:
        return rules.einsum("...k,nk->...n", x, weight, linear_in=(0, 1))


def typed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [*, in] Wᵀ + b -> [*, out], also where context parallel shards the first dim of x, as a product of the checker.

    Its own rule for `linear` refuses such an x.
    """
    if not spmd.is_type_checking():
        return functional.linear(x, weight, bias)
    y: Tensor = _TypedLinear.apply(x, weight)
    return y if bias is None else y + bias
