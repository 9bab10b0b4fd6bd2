"""The groups of Megatron-Core's `parallel_state` as this package's mesh."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state

from meshpeft.engines.process_groups import axis_of_group
from meshpeft.parallel import ParallelGroupInfo

__all__ = ["megatron_mesh"]


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
