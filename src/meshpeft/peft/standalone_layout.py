"""Where the parameters of an adapter beside its base lie, and who sums their gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from meshpeft.parallel import LinearLayout, Packing, ParallelAxis, TensorLayout, parallel_group_info

__all__ = ["gate_and_up", "layout_of_flags", "parameter_type", "place"]


def place(stated: TensorLayout, summed_later: bool) -> tuple[TensorLayout, ParallelAxis | None]:
    """Where a parameter lies, and the axis over which `mp_copy` sums its gradient inside the backward pass.

    Args:
        stated: the layout that the base's layout gives the parameter.
        summed_later: a partial gradient stays so, for `finalize_gradients` or the engine's own finalisation.
    """
    if summed_later or not stated.grad_partial:
        return stated, None
    (axis,) = stated.grad_partial
    return replace(stated, grad_partial=()), axis


def parameter_type(config: Any) -> torch.dtype:
    """Type of new parameters by a parallel config, ours or Megatron's."""
    if config.bf16:
        return torch.bfloat16
    return torch.float16 if config.fp16 else config.params_dtype


def gate_and_up(base_linear_name: str, out_features: int, config: Any) -> Packing | None:
    """The parts of a `linear_fc1`, which is divided as two matrices, `[gate shard; up shard]`; else `None`.

    It is gated unless its config (Megatron's) says otherwise, or its size cannot be halved.
    """
    gated = getattr(config, "gated_linear_unit", True) and out_features % 2 == 0
    if not gated or base_linear_name.rpartition(".")[2] != "linear_fc1":
        return None
    return Packing(("gate", "up"), (out_features // 2, out_features // 2))


def layout_of_flags(
    in_features: int,
    out_features: int,
    input_is_parallel: bool,
    is_expert: bool,
    sequence_parallel: bool,
    disable_sequence_parallel_comm: bool,
    base_linear_is_parallel: bool,
    packing: Packing | None = None,
) -> LinearLayout:
    """The layout that the documented flags describe, with the parts of the output features if there are any."""
    info = parallel_group_info()
    axis = info.etp if is_expert else info.tp
    if not base_linear_is_parallel:
        of_tokens = sequence_parallel and not is_expert
        return LinearLayout(in_features, out_features, None, axis, sequence_parallel=of_tokens, packing=packing)
    # Experts see gathered tokens and leave their sums to the token dispatcher.
    gathered = is_expert or (sequence_parallel and disable_sequence_parallel_comm)
    return LinearLayout(
        in_features,
        out_features,
        "in" if input_is_parallel else "out",
        axis,
        sequence_parallel=sequence_parallel and not disable_sequence_parallel_comm and not is_expert,
        input_is_parallel=input_is_parallel,
        packing=packing,
        output_is_partial=input_is_parallel and is_expert,
        input_grad_is_reduced_outside=not input_is_parallel and gathered,
    )
