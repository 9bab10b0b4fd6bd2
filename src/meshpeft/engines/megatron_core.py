"""Megatron-Core's layers: what they say about themselves, in this package's words.

Their forwards hide their collectives, so adapters run beside them. Process groups are the layers' own; those that a
layer does not hold are `parallel_state`'s.

| layer | layout |
|---|---|
| `ColumnParallelLinear` | divided along out |
| ... with `explicit_expert_comm`, or `disable_grad_reduce` without sequence parallel | its dx is reduced outside |
| `RowParallelLinear` | divided along in |
| ... with `explicit_expert_comm` | its output is a summand |
| `TopKRouter` | undivided; tokens are divided under sequence parallel |

Layers without tensor parallel are in `megatron_plain.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from meshpeft.engines.megatron_checkpoint import megatron_entries
from meshpeft.engines.megatron_mesh import data_axis, megatron_marks, megatron_mesh, model_axis, reduced_as_dense
from meshpeft.engines.megatron_training import let_gradients_enter, remake_buffers, sum_rotary_gradients
from meshpeft.parallel import (
    ContainerType,
    FusedParts,
    LayerType,
    LinearLayout,
    ParallelAxis,
    ParallelError,
    fused_parts_of,
    register_container_type,
    register_layer_type,
    register_mesh_provider,
)
from meshpeft.parallel.init import stride_parts

__all__: list[str] = []


def _reduced_as_dense(layer: Any) -> bool:
    return not layer.is_expert or reduced_as_dense(layer.expert_parallel)


def _column(layer: ColumnParallelLinear) -> LinearLayout:
    axis = model_axis(layer.tp_group, layer.is_expert)
    sequence_parallel = layer.sequence_parallel and not layer.explicit_expert_comm
    return LinearLayout(
        layer.input_size,
        layer.output_size,
        shard="out",
        axis=axis,
        sequence_parallel=sequence_parallel,
        gather_output=layer.gather_output,
        fused_parts=fused_parts_of(layer) or _stride_parts(layer, layer.output_size, axis),
        input_grad_is_reduced_outside=not sequence_parallel
        and (layer.explicit_expert_comm or layer.disable_grad_reduce),
        data_axis=data_axis(layer.is_expert),
        marks=partial(megatron_marks, allreduce=_reduced_as_dense(layer)),
    )


def _row(layer: RowParallelLinear) -> LinearLayout:
    axis = model_axis(layer.tp_group, layer.is_expert)
    return LinearLayout(
        layer.input_size,
        layer.output_size,
        shard="in",
        axis=axis,
        sequence_parallel=layer.sequence_parallel and not layer.explicit_expert_comm,
        input_is_parallel=layer.input_is_parallel,
        in_fused_parts=_stride_parts(layer, layer.input_size, axis),
        output_is_partial=layer.explicit_expert_comm,
        data_axis=data_axis(layer.is_expert),
        marks=partial(megatron_marks, allreduce=_reduced_as_dense(layer)),
    )


def _router(router: TopKRouter) -> LinearLayout:
    return LinearLayout(
        router.config.hidden_size,
        router.config.num_moe_experts,
        axis=model_axis(router.tp_group, expert=False),
        sequence_parallel=router.config.sequence_parallel,
        data_axis=data_axis(expert=False),
        marks=partial(megatron_marks, allreduce=True),
    )


def _stride_parts(layer: Any, size: int, axis: ParallelAxis) -> FusedParts | None:
    """The parts that the layer's `stride` stands for, which only its weight still knows."""
    return stride_parts(size, getattr(layer.weight, "partition_stride", 1), axis)


def _weight(layer: Any) -> Tensor:
    if layer.weight is None:
        raise ParallelError(
            f"a {type(layer).__name__} without a weight of its own (skip_weight_param_allocation, as the output layer "
            "of a model with tied embeddings) cannot carry an adapter; leave it out of target_modules"
        )
    return layer.weight


def _gathers(layer: ColumnParallelLinear, kwargs: Mapping[str, Any]) -> bool:
    asked = kwargs.get("runtime_gather_output")
    return layer.gather_output if asked is None else bool(asked)


def _qkv_parts(attention: SelfAttention) -> dict[str, FusedParts]:
    config = attention.config
    q, kv = config.kv_channels * config.num_attention_heads, config.kv_channels * config.num_query_groups
    if not hasattr(attention, "linear_qkv"):
        return {}
    parts = {"q": q, "gate": q, "k": kv, "v": kv} if config.attention_output_gate else {"q": q, "k": kv, "v": kv}
    return {"linear_qkv": FusedParts(tuple(parts), tuple(parts.values()), blocks=config.num_query_groups)}


def _gate_up_parts(mlp: MLP) -> dict[str, FusedParts]:
    if not mlp.config.gated_linear_unit:
        return {}
    width = mlp.config.ffn_hidden_size
    return {"linear_fc1": FusedParts(("gate", "up"), (width, width))}


def _gate_up_parts_of_experts(experts: TEGroupedMLP) -> dict[str, FusedParts]:
    if not experts.config.gated_linear_unit:
        return {}
    width = experts.config.moe_ffn_hidden_size
    return {"linear_fc1": FusedParts(("gate", "up"), (width, width))}


def _layer_numbers(block: TransformerBlock) -> dict[nn.Module, str]:
    # They count from one, over all pipeline stages.
    return {layer: str(layer.layer_number - 1) for layer in block.layers}


def _expert_numbers(experts: SequentialMLP) -> dict[nn.Module, str]:
    first = experts.ep_group.rank() * experts.num_local_experts
    return {expert: str(first + index) for index, expert in enumerate(experts.local_experts)}


register_mesh_provider(megatron_mesh)
importlib.import_module("meshpeft.engines.megatron_plain")
register_layer_type(
    ColumnParallelLinear,
    LayerType(layout=_column, weight=_weight, gathers=_gathers, checkpoint=megatron_entries),
)
register_layer_type(RowParallelLinear, LayerType(layout=_row, weight=_weight, checkpoint=megatron_entries))
register_layer_type(TopKRouter, LayerType(layout=_router, weight=_weight, checkpoint=megatron_entries, decides=True))
register_container_type(SelfAttention, ContainerType(fused_parts=_qkv_parts))
register_container_type(MLASelfAttention, ContainerType(adapted=sum_rotary_gradients))
register_container_type(MLP, ContainerType(fused_parts=_gate_up_parts))
register_container_type(TEGroupedMLP, ContainerType(fused_parts=_gate_up_parts_of_experts))
register_container_type(SequentialMLP, ContainerType(names=_expert_numbers))
register_container_type(TransformerBlock, ContainerType(names=_layer_numbers, adapted=let_gradients_enter))
register_container_type(DistributedDataParallel, ContainerType(adapted=remake_buffers))
