"""Megatron-Core: its groups as a mesh, the layouts of its layers, its marks, and what its modules need for adapters.

The layers' forwards hide their collectives, so adapters run standalone. Process groups are the layers' own; those that
a layer does not hold are `parallel_state`'s.

| layer | layout |
|---|---|
| `ColumnParallelLinear` | sharded along out |
| ... with `explicit_expert_comm`, or `disable_grad_reduce` without sequence parallel | its dx is reduced outside |
| `RowParallelLinear` | sharded along in |
| ... with `explicit_expert_comm` | its output is partial |
| `TopKRouter` | replicated; tokens are sharded under sequence parallel |
| ModelOpt's `Linear` (of MLA's down-projections) | replicated, on token shards under sequence parallel |
| a class without a config of Megatron's (`nn.Linear`) | replicated; its weight's mark states which tokens it meets |

For plain layers Megatron's own mark decides: a parameter with `sequence_parallel=True` has a partial gradient on each
rank, which Megatron's finalisation sums. Nothing else in a sequence-parallel model tells a plain layer on token shards
from one that meets all tokens, and one mistaken for the other trains a different adapter on every rank. A plain layer
without the mark is refused there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig, parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.hooks import RemovableHandle

from meshpeft.engines import axis_of_group
from meshpeft.engines.megatron_checkpoint import megatron_entries, place_among_copies
from meshpeft.parallel import (
    ContainerType,
    FusedParts,
    I,
    LayerType,
    LinearLayout,
    P,
    ParallelAxis,
    ParallelError,
    ParallelGroupInfo,
    R,
    Shard,
    TensorLayout,
    fused_parts_of,
    layer_type_of,
    mp_copy,
    mp_gather,
    mp_scatter,
    parallel_group_info,
    register_container_type,
    register_layer_type,
    register_mesh_provider,
)
from meshpeft.parallel.init import stride_parts
from meshpeft.parallel.registry import register_description, set_surroundings

__all__ = ["megatron_marks", "megatron_mesh"]


def megatron_mesh() -> ParallelGroupInfo | None:
    """Return the mesh of `parallel_state`, if that is initialised.

    Its axes are the same while anything holds them; nothing here does, so that Megatron's groups end when it and the
    models let go of them. Ranks of context parallel hold different tokens of the same sequences: they are part of data
    parallel here.
    """
    if not parallel_state.is_initialized():
        return None
    world = dist.group.WORLD
    assert world is not None
    joined = {
        ("dp", "tp"): parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
        ("ep", "etp"): parallel_state.get_expert_tensor_and_model_parallel_group(),
    }
    return ParallelGroupInfo(
        tp=axis_of_group("tp", parallel_state.get_tensor_model_parallel_group()),
        pp=axis_of_group("pp", parallel_state.get_pipeline_model_parallel_group()),
        # Megatron's context parallel is part of this axis: it sums gradients over both at once.
        dp=axis_of_group("dp", parallel_state.get_data_parallel_group(with_context_parallel=True)),
        cp=ParallelAxis("cp"),
        ep=axis_of_group("ep", parallel_state.get_expert_model_parallel_group()),
        etp=axis_of_group("etp", parallel_state.get_expert_tensor_parallel_group()),
        edp=axis_of_group("edp", parallel_state.get_expert_data_parallel_group()),
        world=axis_of_group("world", world),
        joined_axes={frozenset(names): axis_of_group("+".join(names), group) for names, group in joined.items()},
    )


def model_axis(group: ProcessGroup | None, expert: bool) -> ParallelAxis:
    """Return the model axis of a layer: expert-tensor parallel for experts, else tensor parallel.

    Args:
        group: Group of the layer; `None` means that of `parallel_state`.
        expert: Whether the layer is an expert's.
    """
    if group is not None:
        return axis_of_group("etp" if expert else "tp", group)
    return parallel_group_info().etp if expert else parallel_group_info().tp


def data_axis(expert: bool) -> ParallelAxis:
    """Return the axis over which gradients of different tokens are summed, which no layer holds."""
    return parallel_group_info().token_axis(expert=expert)


def reduced_as_dense(expert_parallel: bool) -> bool:
    """Whether Megatron may sum the gradients of an expert's parameters over the data parallel of dense layers.

    Its own mark is set so for all experts without expert parallel. That leaves gradients unsummed where expert-tensor
    parallel differs from tensor parallel, whose ranks then hold different tokens of one expert.
    """
    return not expert_parallel and data_axis(True).world_size == data_axis(False).world_size


def megatron_marks(layout: TensorLayout, *, allreduce: bool, sequence_parallel: bool | None = None) -> dict[str, Any]:
    """Return the attributes that Megatron's data parallel, finalisation, norm and optimizer read on parameters.

    Its norm takes a parameter that is not `tensor_model_parallel` from the first rank of dense tensor parallel only,
    also of experts, whose ranks are arranged otherwise: theirs count everywhere, except copies, which are `shared`.

    Args:
        layout: Layout of the parameter.
        allreduce: Whether it is summed over the data parallel of dense layers, not of experts.
        sequence_parallel: Whether it is summed over dense tensor parallel; `None`: where the gradient is partial.
    """
    # Experts that are not sharded may be on several ranks of dense tensor parallel.
    dims = [dim for dim, axis in layout.shards if axis.name == "tp" or (axis.name == "etp" and axis.world_size > 1)]
    fused_parts = layout.fused_parts
    interleaved = fused_parts is not None and fused_parts.blocks is None and layout.fused_dim in dims
    return {
        "allreduce": allreduce,
        "sequence_parallel": bool(layout.grad_partial) if sequence_parallel is None else sequence_parallel,
        "tensor_model_parallel": bool(dims) or not allreduce,
        "shared": not allreduce and place_among_copies(layout) > 0,
        "partition_dim": dims[0] if dims else -1,
        "partition_stride": len(fused_parts.names) if fused_parts is not None and interleaved else 1,
    }


def _reduced_as_dense(layer: Any) -> bool:
    return not layer.is_expert or reduced_as_dense(layer.expert_parallel)


def _column(layer: ColumnParallelLinear) -> LinearLayout:
    axis = model_axis(layer.tp_group, layer.is_expert)
    token_shards = layer.sequence_parallel and not layer.explicit_expert_comm
    grad_reduced_outside = layer.explicit_expert_comm or layer.disable_grad_reduce
    return LinearLayout(
        layer.input_size,
        layer.output_size,
        shard="out",
        axis=axis,
        x=Shard(0) if token_shards else R if grad_reduced_outside else I,
        y=I if layer.gather_output else Shard(-1),
        fused_parts=fused_parts_of(layer) or _stride_parts(layer, layer.output_size, axis),
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
        x=Shard(-1) if layer.input_is_parallel else I,
        y=P if layer.explicit_expert_comm else Shard(0) if layer.sequence_parallel else I,
        in_fused_parts=_stride_parts(layer, layer.input_size, axis),
        data_axis=data_axis(layer.is_expert),
        marks=partial(megatron_marks, allreduce=_reduced_as_dense(layer)),
    )


def _router(router: TopKRouter) -> LinearLayout:
    return LinearLayout(
        router.config.hidden_size,
        router.config.num_moe_experts,
        axis=model_axis(router.tp_group, expert=False),
        x=Shard(0) if router.config.sequence_parallel else I,
        data_axis=data_axis(expert=False),
        marks=partial(megatron_marks, allreduce=True),
    )


def _stride_parts(layer: Any, size: int, axis: ParallelAxis) -> FusedParts | None:
    """Return the parts that the layer's `stride` stands for, of which only its weight keeps a record."""
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


_MARK = "sequence_parallel"


def _duplicated(layer: Any) -> LinearLayout:
    """Return the layout of Megatron's own linear layer without tensor parallel."""
    # The only record of being an expert's: parameters of other layers have the mark, true or false.
    expert = hasattr(layer.weight, "allreduce") and not hasattr(layer.weight, _MARK)
    return LinearLayout(
        layer.in_features,
        layer.out_features,
        axis=model_axis(layer.tp_group, expert),
        x=Shard(0) if layer.config.sequence_parallel and not expert else I,
        data_axis=data_axis(expert),
        marks=partial(megatron_marks, allreduce=not expert or reduced_as_dense(not layer.weight.allreduce)),
    )


def _describe(model: nn.Module) -> None:
    """Set the surroundings of plain layers: the config of the nearest module of Megatron's around them."""
    _describe_below(model, "", None)


def _describe_below(module: nn.Module, name: str, config: ModelParallelConfig | None) -> None:
    own = getattr(module, "config", None)
    if isinstance(own, ModelParallelConfig):
        config = own
    elif config is not None and layer_type_of(module) is not None:
        set_surroundings(module, partial(_in_megatron, config=config, name=name))
    for child_name, child in module.named_children():
        _describe_below(child, f"{name}.{child_name}".lstrip("."), config)


def _in_megatron(layer: Any, layout: LinearLayout, *, config: ModelParallelConfig, name: str) -> LinearLayout:
    """Return the layout of a layer without a config of Megatron's, in a model of Megatron's."""
    expert = not getattr(layer.weight, "allreduce", True)
    axis, marked = model_axis(None, expert), getattr(layer.weight, _MARK, None)
    marks = partial(megatron_marks, allreduce=not expert)
    known = expert or marked is not None or not config.sequence_parallel or axis.world_size == 1
    state = Shard(0) if config.sequence_parallel and bool(marked) and not expert else I
    return replace(
        layout,
        axis=axis,
        x=state,
        y=state,
        data_axis=data_axis(expert),
        # Refused where it gets an adapter, not before: it may be no target.
        marks=marks if known else partial(_refuse, name=name, kind=type(layer).__name__),
    )


def _refuse(layout: TensorLayout, *, name: str, kind: str) -> NoReturn:
    raise ParallelError(
        f"{name} is a plain {kind} in a model of Megatron's with sequence parallel, without a mark whether it meets "
        "this rank's tokens or all of them: the gradients of its adapter may be partial or complete. Set "
        "layer.weight.sequence_parallel = True where each rank has its own tokens, False where all have the same; or "
        "leave the layer out"
    )


def _register_replicated() -> None:
    try:
        from megatron.core.post_training.modelopt.layers import Linear
    except ImportError:  # other versions of Megatron-Core have it elsewhere, or not at all
        return
    register_layer_type(
        Linear, LayerType(layout=_duplicated, weight=lambda layer: layer.weight, checkpoint=megatron_entries)
    )


def _qkv_parts(attention: SelfAttention) -> dict[str, FusedParts]:
    config = attention.config
    q, kv = config.kv_channels * config.num_attention_heads, config.kv_channels * config.num_query_groups
    if not hasattr(attention, "linear_qkv"):
        return {}
    parts = {"q": q, "gate": q, "k": kv, "v": kv} if config.attention_output_gate else {"q": q, "k": kv, "v": kv}
    return {"linear_qkv": FusedParts(tuple(parts), tuple(parts.values()), blocks=config.num_query_groups)}


def _gate_up_parts(module: MLP | TEGroupedMLP, width: str = "ffn_hidden_size") -> dict[str, FusedParts]:
    size = getattr(module.config, width)
    return {"linear_fc1": FusedParts(("gate", "up"), (size, size))} if module.config.gated_linear_unit else {}


def _layer_numbers(block: TransformerBlock) -> dict[nn.Module, str]:
    # They count from one, over all pipeline stages.
    return {layer: str(layer.layer_number - 1) for layer in block.layers}


def _expert_numbers(experts: SequentialMLP) -> dict[nn.Module, str]:
    first = experts.ep_group.rank() * experts.num_local_experts
    return {expert: str(first + index) for index, expert in enumerate(experts.local_experts)}


_SUMMED = "meshpeft_sums_rotary_gradients"


def sum_rotary_gradients(attention: MLASelfAttention) -> None:
    """Sum the gradient of multi-latent attention's rotary key over the heads of all ranks.

    Every rank rotates the same key for its own heads, so its gradient is partial. Megatron (0.16) sums it in one
    of four cases, a replicated down-projection under sequence parallel. In the others all gradients below an
    attention layer, of its weights and of adapters, are wrong by what the other ranks' heads add. From now on the
    down-projection returns what Megatron takes from a replicated one, with a summed gradient.

    It is called again after each adapter method, which may have replaced the layer that returns.
    """
    axis = model_axis(attention.pg_collection.tp, expert=False)
    if axis.world_size == 1:
        return
    hook: RemovableHandle | None = getattr(attention, _SUMMED, None)
    if hook is not None:
        hook.remove()
    config = attention.config

    def summed(layer: nn.Module, args: tuple[Any, ...], returned: tuple[Tensor, Tensor | None]) -> Any:
        latent, bias = returned
        if latent.shape[-1] != config.kv_lora_rank + config.qk_pos_emb_head_dim:  # a column-parallel layer
            latent = mp_gather(latent, -1, axis)
            latent = mp_scatter(latent, 0, axis) if config.sequence_parallel else latent
        if not config.sequence_parallel:  # otherwise Megatron gathers the key's tokens, whose gradients it then sums
            key = latent[..., config.kv_lora_rank :]
            latent = torch.cat([latent[..., : config.kv_lora_rank], mp_copy(key, axis=axis)], -1)
        return latent, bias

    setattr(attention, _SUMMED, attention.linear_kv_down_proj.register_forward_hook(summed))


_HOOKED = "meshpeft_lets_gradients_enter"


def let_gradients_enter(block: TransformerBlock) -> None:
    """Make recomputed layers train although the embedding before them is frozen.

    Megatron recomputes inside an autograd function that returns a gradient only if one of its *inputs* requires one,
    so the adapters of the first layers would get none. From now on, where activations are recomputed, the block's
    input requires a gradient (which nobody reads).
    """
    if not getattr(block, _HOOKED, False):
        setattr(block, _HOOKED, True)
        block.register_forward_pre_hook(_require_gradient, with_kwargs=True)


def _require_gradient(
    block: TransformerBlock, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    states = args[0] if args else kwargs.get("hidden_states")
    recomputes = block.config.recompute_granularity is not None and block.training and torch.is_grad_enabled()
    if not recomputes or not isinstance(states, Tensor) or states.requires_grad:
        return None
    states = states.detach().requires_grad_()
    return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})


def remake_buffers(ddp: DistributedDataParallel) -> None:
    """Make new gradient buffers of a wrapped model, for the parameters that train now.

    They were made for those that trained when the model was wrapped, and gradients of no others would be summed over
    data parallel. An optimizer that was made before must be made again, too.
    """
    trainable = [parameter for parameter in ddp.module.parameters() if parameter.requires_grad]
    if {id(parameter) for parameter in trainable} == {id(parameter) for parameter in ddp.params_with_grad}:
        return
    for handle in ddp.remove_forward_pre_hook_handles.values():
        handle.remove()
    for parameter in ddp.module.parameters():
        if hasattr(parameter, "main_grad"):
            del parameter.main_grad  # keeps the old buffer alive
    disable_bucketing = ddp.bucket_size is None and ddp.ddp_config.bucket_size is not None
    # Its constructor, on the object that the caller holds: there is no other way to its buffers.
    ddp.__init__(
        ddp.config, ddp.ddp_config, ddp.module, disable_bucketing=disable_bucketing, pg_collection=_groups(ddp)
    )


def _groups(ddp: DistributedDataParallel) -> ProcessGroupCollection:
    """Return the process groups that the wrapper was made with."""
    groups = ProcessGroupCollection()
    for name in ("dp", "dp_cp", "intra_dp_cp", "expt_dp", "intra_expt_dp", "tp", "pp", "ep"):
        setattr(groups, name, getattr(ddp, f"{name}_group"))
    if ddp.ddp_config.num_distributed_optimizer_instances > 1:
        groups.inter_dist_opt = ddp.inter_dist_opt_group
    return groups


register_mesh_provider(megatron_mesh)
register_layer_type(
    ColumnParallelLinear,
    LayerType(layout=_column, weight=_weight, gathers=_gathers, checkpoint=megatron_entries),
)
register_layer_type(RowParallelLinear, LayerType(layout=_row, weight=_weight, checkpoint=megatron_entries))
register_layer_type(TopKRouter, LayerType(layout=_router, weight=_weight, checkpoint=megatron_entries, decides=True))
_register_replicated()
register_description(_describe)
register_container_type(SelfAttention, ContainerType(fused_parts=_qkv_parts))
register_container_type(MLASelfAttention, ContainerType(adapted=sum_rotary_gradients))
register_container_type(MLP, ContainerType(fused_parts=_gate_up_parts))
register_container_type(TEGroupedMLP, ContainerType(fused_parts=partial(_gate_up_parts, width="moe_ffn_hidden_size")))
register_container_type(SequentialMLP, ContainerType(names=_expert_numbers))
register_container_type(TransformerBlock, ContainerType(names=_layer_numbers, adapted=let_gradients_enter))
register_container_type(DistributedDataParallel, ContainerType(adapted=remake_buffers))
