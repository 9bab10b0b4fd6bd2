"""Transformer Engine's linear layers, plain and as Megatron-Core wraps them: the layouts that their attributes state.

Their sizes are this rank's. Their forwards hide their collectives, so adapters run standalone.

| `parallel_mode` | layout |
|---|---|
| `column` | sharded along out |
| `row` | sharded along in, the input comes sharded |
| `None`, of a column class | sharded along out without collectives: its dx is reduced outside |
| `None`, of a row class | sharded along in without collectives: its output is partial |
| `None`, of another class | replicated; tokens are sharded under sequence parallel |

The fused layer norm and column layer (with `return_layernorm_output`) returns the output of its norm too, which is
what an adapter of its linear part takes. Under sequence parallel it returns it gathered where it can: it then reduces
the gradient of that itself, and the adapter communicates nothing.

Tested with stand-ins that have these attributes and make these collectives; it has not been run on the real layers.

`HAVE_TE` states whether they are there as Megatron-Core wraps them, and `TECL` and `TERL` are its column- and
row-parallel classes, empty where Transformer Engine or Megatron-Core is not installed. Where both are, importing this
file enters them into the registry. Megatron-Core is imported only when layers are entered.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from meshpeft.engines import axis_of_group
from meshpeft.parallel import (
    I,
    LayerType,
    LinearLayout,
    P,
    ParallelAxis,
    ParallelError,
    R,
    Shard,
    State,
    TensorLayout,
    fused_parts_of,
    parallel_group_info,
    register_layer_type,
)
from meshpeft.parallel.registry import in_surroundings

__all__ = ["HAVE_TE", "TECL", "TERL", "register_te_layers"]

_EXTENSION = "megatron.core.extensions.transformer_engine"
_COLUMN = ("TEColumnParallelLinear", "TELayerNormColumnParallelLinear", "TEColumnParallelGroupedLinear")
_ROW = ("TERowParallelLinear", "TERowParallelGroupedLinear")


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # its parent is not there
        return False


HAVE_TE: bool = _installed("transformer_engine") and _installed("megatron.core")


def _classes(names: tuple[str, ...]) -> tuple[type[nn.Module], ...]:
    if not HAVE_TE:
        return ()
    extension = importlib.import_module(_EXTENSION)
    return tuple(getattr(extension, name) for name in names if getattr(extension, name, None) is not None)


TECL: tuple[type[nn.Module], ...] = _classes(_COLUMN)
TERL: tuple[type[nn.Module], ...] = _classes(_ROW)


def register_te_layers(
    bases: Sequence[type[nn.Module]], columns: Sequence[type[nn.Module]] = (), rows: Sequence[type[nn.Module]] = ()
) -> None:
    """Enter Transformer Engine's classes into the registry.

    Args:
        bases: Its linear layers: plain, with a layer norm, grouped.
        columns, rows: Subclasses of these that are column or row parallel whatever their `parallel_mode` is.
    """
    from meshpeft.engines.megatron_checkpoint import megatron_entries

    sides: dict[Literal["out", "in"] | None, Sequence[type[nn.Module]]] = {None: bases, "out": columns, "in": rows}
    for side, classes in sides.items():
        for cls in classes:
            register_layer_type(
                cls,
                LayerType(
                    layout=partial(_layout, side=side),
                    weight=_weight,
                    store=_store,
                    bias=_bias,
                    checkpoint=megatron_entries,
                    call=_with_layernorm_output,
                ),
            )


def _side(layer: Any, side: Literal["out", "in"] | None) -> Literal["out", "in"] | None:
    stated: dict[Any, Literal["out", "in"]] = {"column": "out", "row": "in"}
    return side or stated.get(layer.parallel_mode)


def _layout(layer: Any, side: Literal["out", "in"] | None = None) -> LinearLayout:
    shard = _side(layer, side)
    if hasattr(layer, "return_layernorm_output") and not hasattr(layer, "te_return_bias"):
        raise ParallelError(
            f"a {type(layer).__name__} with a layer norm, outside Megatron-Core's wrapper, cannot carry an adapter: "
            "what it returns cannot be told apart; use TELayerNormColumnParallelLinear, or separate layers"
        )
    grouped = hasattr(layer, "num_gemms")
    # Layers without collectives of their own are experts': their dispatcher makes them.
    hidden = shard is not None and layer.parallel_mode is None
    axis = _axis(layer, grouped or hidden)
    expert, size = axis.name == "etp", axis.world_size
    gathered = _returns_gathered_norm(layer)
    expert_axis, data_axis = _expert_axes(layer)
    sequence_parallel = bool(getattr(getattr(layer, "config", None), "sequence_parallel", False))
    token_shards = _sequence_parallel(layer, shard) and not expert and not gathered
    outside: State = Shard(0) if token_shards else I
    states: dict[str | None, tuple[State, State]] = {
        "out": (R if hidden or gathered else outside, Shard(-1)),
        "in": (Shard(-1), P if hidden else outside),
        None: (outside, outside),
    }
    layout = LinearLayout(
        layer.in_features * (size if shard == "in" else 1),
        layer.out_features * (size if shard == "out" else 1),
        shard=shard,
        axis=axis,
        x=states[shard][0],
        y=states[shard][1],
        fused_parts=fused_parts_of(layer),
        experts=layer.num_gemms * expert_axis.world_size if grouped else None,
        expert_axis=expert_axis if grouped else None,
        data_axis=data_axis if expert else parallel_group_info().token_axis(),
        marks=partial(_marks, allreduce=_reduced_as_dense(layer, expert), grouped=grouped),
        engine_sums_gradient=partial(_is_summed, sequence_parallel=sequence_parallel) if grouped else None,
    )
    # Outside Megatron-Core's wrapper a replicated layer has no record of which tokens it meets.
    return layout if shard is not None or grouped or hasattr(layer, "config") else in_surroundings(layer, layout)


def _axis(layer: Any, expert: bool) -> ParallelAxis:
    info = parallel_group_info()
    group = getattr(layer, "_tp_group", None) or getattr(layer, "tp_group", None)
    if group is None:
        return info.etp if expert else info.tp
    # An expert that is not sharded at all keeps its mode; only its group identifies it.
    expert = expert or (group is info.etp.group and group is not info.tp.group)
    return axis_of_group("etp" if expert else "tp", group)


def _expert_axes(layer: Any) -> tuple[ParallelAxis, ParallelAxis]:
    """Return expert parallel, and the data parallel of experts."""
    info, groups = parallel_group_info(), getattr(layer, "_pg_collection", None)
    ep, edp = getattr(groups, "ep", None), getattr(groups, "expt_dp", None)
    return (
        info.ep if ep is None else axis_of_group("ep", ep),
        info.edp if edp is None else axis_of_group("edp", edp),
    )


def _sequence_parallel(layer: Any, shard: str | None) -> bool:
    # Replicated layers have it off, and their tokens may be sharded all the same.
    if shard is None:
        return bool(getattr(getattr(layer, "config", None), "sequence_parallel", False))
    return bool(layer.sequence_parallel)


def _returns_gathered_norm(layer: Any) -> bool:
    """Whether a fused layer norm's output is returned with all tokens; overlapped communication never has them."""
    overlaps = getattr(getattr(layer, "config", None), "tp_comm_overlap", False)
    return hasattr(layer, "return_layernorm_output_gathered") and bool(layer.sequence_parallel) and not overlaps


def _reduced_as_dense(layer: Any, expert: bool) -> bool:
    """Return Megatron's own mark on the layer's weight, where that sums all; see `engines.megatron`."""
    marked = bool(getattr(next(layer.parameters()), "allreduce", True))
    info = parallel_group_info()
    return marked and (not expert or info.edp.world_size == info.dp.world_size)


def _is_summed(layout: TensorLayout, *, sequence_parallel: bool) -> bool:
    """Whether Megatron's finalisation can sum a gradient over all of `grad_partial`, of adapters on grouped experts."""
    return _dense_sum(layout, sequence_parallel) is not None


def _dense_sum(layout: TensorLayout, sequence_parallel: bool) -> Literal["dp", "dp and tp"] | None:
    """Return Megatron's sums for dense parameters that together sum over all of `grad_partial` and `edp`.

    The ranks of tensor and data parallel are those of experts, expert-tensor and expert-data parallel, arranged
    otherwise. The sum over tensor parallel is made with sequence parallel only.
    """
    info, axes = parallel_group_info(), layout.grad_partial
    ranks = info.edp.world_size * math.prod(axis.world_size for axis in axes)
    if ranks == info.dp.world_size * info.tp.world_size and info.tp.world_size == 1:
        return "dp"
    if ranks == info.dp.world_size * info.tp.world_size and sequence_parallel:
        return "dp and tp"
    if [axis.name for axis in axes] == ["ep"] and info.etp.world_size == info.tp.world_size:
        return "dp"
    return None


def _marks(layout: TensorLayout, *, grouped: bool, allreduce: bool) -> Mapping[str, Any]:
    from meshpeft.engines.megatron import megatron_marks

    if not (grouped and layout.grad_partial):
        return megatron_marks(layout, allreduce=allreduce)
    # Still partial: the adapter left it to the sums of dense parameters.
    return megatron_marks(layout, allreduce=True, sequence_parallel=_dense_sum(layout, True) == "dp and tp")


def _weight(layer: Any) -> Tensor:
    if hasattr(layer, "num_gemms"):
        return torch.stack([getattr(layer, f"weight{index}") for index in range(layer.num_gemms)])
    weight: Tensor = layer.weight
    return weight


def _store(layer: Any, local: Tensor) -> dict[str, Tensor]:
    if not hasattr(layer, "num_gemms"):
        return {"weight": local}
    return {f"weight{index}": matrix.clone() for index, matrix in enumerate(local)}


def _bias(layer: Any) -> Tensor | None:
    """Return the local bias [out]; of grouped experts [experts, out]."""
    if not hasattr(layer, "num_gemms"):
        return getattr(layer, "bias", None)
    biases = [getattr(layer, f"bias{index}", None) for index in range(layer.num_gemms)]
    held = [bias for bias in biases if isinstance(bias, Tensor) and bias.numel()]
    return torch.stack(held) if held else None


def _with_layernorm_output(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the layer so that it also returns the output of its layer norm, which other callers do not expect."""
    if not hasattr(layer, "return_layernorm_output"):
        return layer(*args, **kwargs)
    with _set(layer, "return_layernorm_output", True):
        if not hasattr(layer, "return_layernorm_output_gathered"):
            return layer(*args, **kwargs)
        with _set(layer, "return_layernorm_output_gathered", _returns_gathered_norm(layer)):
            return layer(*args, **kwargs)


@contextmanager
def _set(layer: Any, name: str, value: bool) -> Iterator[None]:
    before = getattr(layer, name)
    setattr(layer, name, value)
    try:
        yield
    finally:
        setattr(layer, name, before)


def _register() -> None:
    te = importlib.import_module("transformer_engine.pytorch")
    register_te_layers([te.Linear, te.LayerNormLinear, te.GroupedLinear], columns=TECL, rows=TERL)


if HAVE_TE:
    _register()
