"""Transformer Engine's linear layers, plain and as Megatron-Core wraps them: what their attributes say.

Their sizes are this rank's. Their forwards hide their collectives, so adapters run beside them.

| `parallel_mode` | layout |
|---|---|
| `column` | divided along out |
| `row` | divided along in, the input comes divided |
| `None`, of a column class | divided along out without collectives: its dx is reduced outside |
| `None`, of a row class | divided along in without collectives: its output is a summand |
| `None`, of another class | undivided; tokens are divided under sequence parallel |

The fused layer norm and column layer (with `return_layernorm_output`) returns the output of its norm too, which is
what an adapter of its linear part takes. Under sequence parallel it returns it gathered where it can: it then reduces
the gradient of that itself, and the adapter communicates nothing.

Tested with stand-ins that have these attributes and make these collectives; it has not been run on the real layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from meshpeft.engines.megatron_checkpoint import megatron_entries
from meshpeft.engines.megatron_core import megatron_marks
from meshpeft.engines.process_groups import axis_of_group
from meshpeft.parallel import (
    LayerType,
    LinearLayout,
    ParallelAxis,
    ParallelError,
    TensorLayout,
    packing_of,
    parallel_group_info,
    register_layer_type,
)

__all__ = ["register_te_layers"]


def register_te_layers(
    bases: Sequence[type[nn.Module]], columns: Sequence[type[nn.Module]] = (), rows: Sequence[type[nn.Module]] = ()
) -> None:
    """Enter Transformer Engine's classes into the registry.

    Args:
        bases: its linear layers: plain, with a layer norm, grouped.
        columns, rows: subclasses of these that are column or row parallel whatever their `parallel_mode` says.
    """
    sides: dict[Literal["out", "in"] | None, Sequence[type[nn.Module]]] = {None: bases, "out": columns, "in": rows}
    for side, classes in sides.items():
        for cls in classes:
            register_layer_type(
                cls,
                LayerType(
                    layout=partial(_layout, side=side),
                    weight=_weight,
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
    # Layers of experts are those without collectives of their own: their dispatcher makes them.
    hidden = shard is not None and layer.parallel_mode is None
    expert = grouped or hidden
    axis = _axis(layer, expert)
    size = axis.world_size
    gathered = _returns_gathered_norm(layer)
    return LinearLayout(
        layer.in_features * (size if shard == "in" else 1),
        layer.out_features * (size if shard == "out" else 1),
        shard=shard,
        axis=axis,
        sequence_parallel=_sequence_parallel(layer, shard) and not hidden and not gathered and not grouped,
        input_is_parallel=shard == "in",
        packing=packing_of(layer),
        experts=layer.num_gemms * parallel_group_info().ep.world_size if grouped else None,
        expert_axis=parallel_group_info().ep if grouped else None,
        output_is_partial=hidden and shard == "in",
        input_grad_is_reduced_outside=shard == "out" and (hidden or gathered),
        data_axis=parallel_group_info().edp if expert else parallel_group_info().dp,
        marks=partial(_marks, grouped=grouped, allreduce=_reduced_as_dense(layer, grouped)),
    )


def _axis(layer: Any, expert: bool) -> ParallelAxis:
    group = getattr(layer, "_tp_group", None) or getattr(layer, "tp_group", None)
    if group is None:
        return parallel_group_info().etp if expert else parallel_group_info().tp
    return axis_of_group("etp" if expert else "tp", group)


def _sequence_parallel(layer: Any, shard: str | None) -> bool:
    # Undivided layers have it off, and their tokens may be divided all the same.
    if shard is None:
        return bool(getattr(getattr(layer, "config", None), "sequence_parallel", False))
    return bool(layer.sequence_parallel)


def _returns_gathered_norm(layer: Any) -> bool:
    """Whether a fused layer norm's output is asked for with all tokens; overlapped communication never has them."""
    overlaps = getattr(getattr(layer, "config", None), "tp_comm_overlap", False)
    return hasattr(layer, "return_layernorm_output_gathered") and bool(layer.sequence_parallel) and not overlaps


def _reduced_as_dense(layer: Any, grouped: bool) -> bool:
    """What Megatron's own mark says of the layer's weight."""
    return bool(getattr(layer.weight0 if grouped else layer.weight, "allreduce", True))


def _marks(layout: TensorLayout, *, grouped: bool, allreduce: bool) -> Mapping[str, Any]:
    if grouped and layout.grad_partial:
        axes = ", ".join(f"{axis.name}={axis.world_size}" for axis in layout.grad_partial)
        raise ParallelError(
            f"the gradient of an adapter on grouped experts is a summand over {axes}, which Megatron does not sum; "
            "give each expert its own adapter (share_expert_adapters=False), without expert-tensor parallel"
        )
    return megatron_marks(layout, allreduce=allreduce)


def _weight(layer: Any) -> Tensor:
    if hasattr(layer, "num_gemms"):
        return torch.stack([getattr(layer, f"weight{index}") for index in range(layer.num_gemms)])
    weight: Tensor = layer.weight
    return weight


def _with_layernorm_output(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the layer so that it also returns the output of a layer norm in it; other callers get what they expect."""
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
