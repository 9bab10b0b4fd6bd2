"""What Megatron-Core's own modules need to train adapters that were not there when they were made."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

__all__ = ["let_gradients_enter", "remake_buffers"]

_HOOKED = "meshpeft_lets_gradients_enter"


def let_gradients_enter(block: TransformerBlock) -> None:
    """Let recomputed layers train although the embedding before them is frozen.

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
    """Make the gradient buffers of a wrapped model anew, for the parameters that train now.

    They were made for those that trained when the model was wrapped, and gradients of no others would be summed over
    data parallel. An optimizer that was made before is to be made anew, too.
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
    """The process groups that the wrapper was made with."""
    groups = ProcessGroupCollection()
    for name in ("dp", "dp_cp", "intra_dp_cp", "expt_dp", "intra_expt_dp", "tp", "pp", "ep"):
        setattr(groups, name, getattr(ddp, f"{name}_group"))
    if ddp.ddp_config.num_distributed_optimizer_instances > 1:
        groups.inter_dist_opt = ddp.inter_dist_opt_group
    return groups
