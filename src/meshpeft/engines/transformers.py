"""Layers of transformers: those that it sharded itself, by its tensor-parallel plan, and `Conv1D` (GPT-2).

Sharded layers stay `nn.Linear`: their parameters become DTensors, and their `forward` is replaced by one that makes the
collectives of a *style* from the plan. Adapters run standalone. Activations are plain tensors between layers.

| style | layout |
|---|---|
| `colwise` | sharded along out, the output stays sharded |
| `colwise_gather_output`, `colwise_rep` | the same, the output is gathered |
| `packed_colwise` | sharded along out part by part (gate, up) |
| `rowwise` | sharded along in, the input comes sharded |
| `rowwise_split_input`, `rowwise_rep` | the same, the input comes full |
| any on a replicated weight (`mla_kv_a_proj`, `replicate`, ..) | a plain linear whose adapter joins inside the style |

The layout is read from what is installed (placements, mesh and style of each layer), not from the plan's patterns: a
plan can be overridden when the model is loaded. Gradients are complete after the backward pass, as the optimizer loop
of such a model expects. It is imported by itself: as soon as `transformers.distributed.tensor_parallel` is.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.tensor_parallel import (
    ColwiseParallel,
    PackedColwiseParallel,
    RowwiseParallel,
    TensorParallelLayer,
)
from transformers.pytorch_utils import Conv1D

from meshpeft.engines import axis_of_group
from meshpeft.parallel import (
    FusedParts,
    I,
    LayerType,
    LinearLayout,
    ParallelAxis,
    ParallelError,
    parallel_group_info,
    register_layer_type,
    states,
)
from meshpeft.parallel.init import stride_parts

__all__ = []


class _Installed(NamedTuple):
    """Style and mesh that transformers put on a layer."""

    style: TensorParallelLayer
    mesh: DeviceMesh


def _installed(module: nn.Module) -> _Installed | None:
    """Read the style from the closure of the layer's own `forward`, the only record of it on the layer."""
    forward = vars(module).get("forward")
    if not inspect.isfunction(forward):
        return None
    held = inspect.getclosurevars(forward).nonlocals
    style, mesh = held.get("self"), held.get("mesh")
    if isinstance(style, TensorParallelLayer) and isinstance(mesh, DeviceMesh):
        return _Installed(style, mesh)
    return None


def _style_of(module: nn.Module) -> _Installed:
    found = _installed(module)
    if found is None:
        raise ParallelError(
            f"a {type(module).__name__} whose weight is a DTensor, or whose forward is replaced, not by a style of "
            "transformers' tensor-parallel plan: how it communicates is not known. Load the model with tp_plan='auto', "
            "or apply adapters before it is sharded"
        )
    return found


def _is_sharded(module: nn.Module) -> bool:
    return isinstance(vars(module).get("_parameters", {}).get("weight"), DTensor)


def _is_replicated(module: nn.Module) -> bool:
    return "_is_hooked" in vars(module) and not _is_sharded(module)


def _axis(group: ProcessGroup) -> ParallelAxis:
    """Return the mesh's tensor parallel, if it is over the same ranks; else an axis of the group."""
    info = parallel_group_info()
    ranks = dist.get_process_group_ranks(group)
    if info.tp.group is not None and dist.get_process_group_ranks(info.tp.group) == ranks:
        return info.tp
    if len(ranks) < dist.get_world_size() and info.world.world_size == 1:
        raise ParallelError(
            f"the model is sharded over {len(ranks)} of {dist.get_world_size()} processes, and the mesh does not state "
            f"what the others do; call meshpeft.parallel.init_parallelism(tensor_parallel={len(ranks)}) first"
        )
    return axis_of_group("tp", group)


def _sharded_layout(module: nn.Linear) -> LinearLayout:
    weight, style = module.weight, _style_of(module).style
    assert isinstance(weight, DTensor)
    sharded = [(index, place) for index, place in enumerate(weight.placements) if not isinstance(place, Replicate)]
    if not sharded:
        return LinearLayout(module.in_features, module.out_features)
    if len(sharded) > 1:
        raise ParallelError(
            f"a weight with placements {weight.placements}: expected one that a single axis, tensor parallel, shards"
        )
    [(index, place)] = sharded
    axis = _axis(weight.device_mesh.get_group(index))
    rows = isinstance(place, Shard) and place.dim % weight.dim() == 0
    options: dict[str, Any]
    if isinstance(style, ColwiseParallel) and rows and style.input_layouts == Replicate():
        options = {"shard": "out", "y": I if style.output_layouts == Replicate() else states.Shard(-1)}
        supported = style.output_layouts in (Replicate(), Shard(-1))
    elif isinstance(style, PackedColwiseParallel):
        options = {"shard": "out", "fused_parts": _fused_parts(module.out_features, style.split_factor, axis)}
        supported = True
    elif isinstance(style, RowwiseParallel) and not rows and style.output_layouts == Replicate():
        options = {"shard": "in", "x": states.Shard(-1) if style.input_layouts == Shard(-1) else I}
        supported = style.input_layouts in (Replicate(), Shard(-1))
    else:
        supported = False
    if not supported or not getattr(style, "use_local_output", True):
        raise ParallelError(
            f"a weight placed {place} under the style {type(style).__name__}({vars(style)}) cannot carry an adapter; "
            "expected colwise, colwise_gather_output, packed_colwise, rowwise or rowwise_split_input"
        )
    return LinearLayout(module.in_features, module.out_features, axis=axis, **options)


def _fused_parts(size: int, parts: int, axis: ParallelAxis) -> FusedParts | None:
    if parts == 2:
        return FusedParts(("gate", "up"), (size // 2, size // 2))
    return stride_parts(size, parts, axis)


def _local(parameter: Tensor | None) -> Tensor | None:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _local_weight(module: nn.Linear) -> Tensor:
    weight = _local(module.weight)
    assert weight is not None
    return weight


def _store(module: nn.Linear, local: Tensor) -> dict[str, Tensor]:
    weight = module.weight
    assert isinstance(weight, DTensor)
    sharded = DTensor.from_local(
        local, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )
    return {"weight": sharded}


def _enter(module: nn.Linear, x: Tensor) -> Tensor:
    style, mesh = _style_of(module)
    (entered,), _ = style.transform_inputs_pre_forward(module, (x,), {}, mesh)
    return entered


def _exit(module: nn.Linear, y: Tensor) -> Tensor:
    style, mesh = _style_of(module)
    biased = y if module.bias is None else y + module.bias.to(y.dtype)
    left: Tensor = style.transform_output_post_forward(module, biased, mesh)
    return left


register_layer_type(
    nn.Linear,
    LayerType(layout=_sharded_layout, weight=_local_weight, store=_store, bias=lambda module: _local(module.bias)),
    when=_is_sharded,
)
register_layer_type(
    nn.Linear,
    LayerType(
        layout=lambda module: LinearLayout(module.in_features, module.out_features),
        weight=lambda module: module.weight,
        enter=_enter,
        exit=_exit,
    ),
    when=_is_replicated,
)


def _transposed(module: Conv1D) -> Tensor:
    weight: Tensor = module.weight
    return weight.T


register_layer_type(
    Conv1D,
    LayerType(
        layout=lambda module: LinearLayout(module.nx, module.nf),
        weight=_transposed,
        enter=lambda module, x: x,
        exit=lambda module, y: y + module.bias.to(y.dtype),
        store=lambda module, local: {"weight": local.T.contiguous()},
    ),
)
