"""Where the parameters of an adapter beside its base lie, and who sums their gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from meshpeft.parallel import FusedParts, LinearLayout, ParallelAxis, TensorLayout, mp_copy, parallel_group_info

__all__ = ["copied", "gate_and_up", "layout_of_flags", "parameter_type", "place", "place_for_experts"]


def place(stated: TensorLayout, summed_later: bool) -> tuple[TensorLayout, tuple[ParallelAxis, ...]]:
    """Where a parameter lies, and the axes over which its gradient is summed inside the backward pass.

    Args:
        stated: the layout that the base's layout gives the parameter.
        summed_later: a partial gradient stays so, for `finalize_gradients` or the engine's own finalisation.
    """
    return (stated, ()) if summed_later else (replace(stated, grad_partial=()), stated.grad_partial)


def place_for_experts(
    stated: TensorLayout, base: LinearLayout, fused: bool
) -> tuple[TensorLayout, tuple[ParallelAxis, ...]]:
    """The same for an adapter on grouped experts, whose layer makes no collectives: its layout says who sums."""
    return place(stated, fused or base.sums is None or base.sums(stated))


def copied(parameter: Tensor, axes: tuple[ParallelAxis, ...]) -> Tensor:
    """A parameter as it enters the forward pass: over these axes its gradient is summed in the backward pass."""
    for axis in axes:
        parameter = mp_copy(parameter, axis=axis)
    return parameter


def parameter_type(config: Any) -> torch.dtype:
    """Type of new parameters by a parallel config, ours or Megatron's."""
    if config.bf16:
        return torch.bfloat16
    return torch.float16 if config.fp16 else config.params_dtype


def gate_and_up(base_linear_name: str, out_features: int, config: Any) -> FusedParts | None:
    """The parts of a `linear_fc1`, which is divided as two matrices, `[gate shard; up shard]`; else `None`.

    It is gated unless its config (Megatron's) says otherwise, or its size cannot be halved.
    """
    gated = getattr(config, "gated_linear_unit", True) and out_features % 2 == 0
    if not gated or base_linear_name.rpartition(".")[2] != "linear_fc1":
        return None
    return FusedParts(("gate", "up"), (out_features // 2, out_features // 2))


def layout_of_flags(
    in_features: int,
    out_features: int,
    input_is_parallel: bool,
    is_expert: bool,
    sequence_parallel: bool,
    disable_sequence_parallel_comm: bool,
    base_linear_is_parallel: bool,
    fused_parts: FusedParts | None = None,
) -> LinearLayout:
    """The layout that the documented flags describe, with the parts of the output features if there are any."""
    info = parallel_group_info()
    axis = info.etp if is_expert else info.tp
    if not base_linear_is_parallel:
        of_tokens = sequence_parallel and not is_expert
        return LinearLayout(in_features, out_features, None, axis, sequence_parallel=of_tokens, fused_parts=fused_parts)
    # Experts see gathered tokens and leave their sums to the token dispatcher.
    gathered = is_expert or (sequence_parallel and disable_sequence_parallel_comm)
    return LinearLayout(
        in_features,
        out_features,
        "in" if input_is_parallel else "out",
        axis,
        sequence_parallel=sequence_parallel and not disable_sequence_parallel_comm and not is_expert,
        input_is_parallel=input_is_parallel,
        fused_parts=fused_parts,
        output_is_partial=input_is_parallel and is_expert,
        input_grad_is_reduced_outside=not input_is_parallel and gathered,
    )
