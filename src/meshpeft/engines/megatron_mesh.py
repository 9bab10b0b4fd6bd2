"""The groups of Megatron-Core's `parallel_state` as this package's mesh, and its marks on parameters."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from meshpeft.engines.megatron_checkpoint import place_among_copies
from meshpeft.engines.process_groups import axis_of_group
from meshpeft.parallel import ParallelAxis, ParallelGroupInfo, TensorLayout, parallel_group_info

__all__ = ["data_axis", "megatron_marks", "megatron_mesh", "model_axis", "reduced_as_dense"]


def megatron_mesh() -> ParallelGroupInfo | None:
    """The mesh that `parallel_state` has made, if it has.

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
        dp=axis_of_group("dp", parallel_state.get_data_parallel_group(with_context_parallel=True)),
        ep=axis_of_group("ep", parallel_state.get_expert_model_parallel_group()),
        etp=axis_of_group("etp", parallel_state.get_expert_tensor_parallel_group()),
        edp=axis_of_group("edp", parallel_state.get_expert_data_parallel_group()),
        world=axis_of_group("world", world),
        joined_axes={frozenset(names): axis_of_group("+".join(names), group) for names, group in joined.items()},
    )


def model_axis(group: ProcessGroup | None, expert: bool) -> ParallelAxis:
    """Return the model axis of a layer: expert-tensor parallel for experts, else tensor parallel.

    Args:
        group: the layer's own group; `None` means that of `parallel_state`.
        expert: whether the layer is an expert's.
    """
    if group is not None:
        return axis_of_group("etp" if expert else "tp", group)
    return parallel_group_info().etp if expert else parallel_group_info().tp


def data_axis(expert: bool) -> ParallelAxis:
    """Return the axis over which gradients of different tokens are summed, which no layer holds."""
    return parallel_group_info().edp if expert else parallel_group_info().dp


def reduced_as_dense(expert_parallel: bool) -> bool:
    """Whether Megatron may sum the gradients of an expert's parameters over the data parallel of dense layers.

    Its own mark says so for all experts without expert parallel. That leaves gradients unsummed where expert-tensor
    parallel differs from tensor parallel, whose ranks then hold different tokens of one expert.
    """
    return not expert_parallel and data_axis(True).world_size == data_axis(False).world_size


def megatron_marks(layout: TensorLayout, *, allreduce: bool, sequence_parallel: bool | None = None) -> dict[str, Any]:
    """The attributes that Megatron's data parallel, finalisation, gradient norm and optimizer read on parameters.

    Its norm takes a parameter that is not `tensor_model_parallel` from the first rank of dense tensor parallel only,
    also of experts, whose ranks lie otherwise: theirs count everywhere, but for copies, which are `shared`.

    Args:
        allreduce: summed over the data parallel of dense layers, not of experts.
        sequence_parallel: summed over dense tensor parallel; `None` means where the gradient is partial.
    """
    # Undivided experts may lie on several ranks of dense tensor parallel.
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
