"""What Megatron-Core's own modules need to train adapters that were not there when they were made."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from meshpeft.engines.megatron_mesh import model_axis
from meshpeft.parallel import mp_copy, mp_gather, mp_scatter

__all__ = ["let_gradients_enter", "remake_buffers", "sum_rotary_gradients"]

_SUMMED = "meshpeft_sums_rotary_gradients"


def sum_rotary_gradients(attention: MLASelfAttention) -> None:
    """Let the gradient of multi-latent attention's rotary key be that of all heads, not of this rank's.

    Every rank rotates the same key for its own heads, so its gradient is partial. Megatron (0.16) sums it in one
    of four cases, a replicated down-projection under sequence parallel. In the others all gradients below an
    attention layer, of its weights and of adapters, are wrong by what the other ranks' heads add. From now on the
    down-projection returns what Megatron takes from a replicated one, with a summed gradient.

    It is called again after each adapter method: the layer that returns may be another one then.
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
