"""Parameters that PyTorch's `fully_shard` (FSDP2) sharded over data parallel: each is a DTensor, gathered one by one.

Between two steps every parameter of such a model is a DTensor, in the place of the one that had a layout. Each rank
holds 1 / world of its rows; only the gathered tensor is the adapter's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from meshpeft.hub.errors import CheckpointError

__all__ = ["gathered", "refuse_sharded", "reshard", "sharded_like", "sharded_parameters"]


def sharded_parameters(model: nn.Module) -> frozenset[int]:
    """The ids of the parameters that `fully_shard` manages and that are sharded now."""
    return frozenset(
        id(parameter.sharded_param)
        for module in model.modules()
        if isinstance(module, FSDPModule)
        for group in module._get_fsdp_state()._fsdp_param_groups
        for parameter in group.fsdp_params
    )


def refuse_sharded(model: nn.Module, instead: str) -> None:
    """Refuse a model with sharded parameters where their slices have no place.

    Args:
        model: the model.
        instead: what to do, for the message.

    Raises:
        CheckpointError: it has some.
    """
    sharded = sharded_parameters(model)
    for name, parameter in model.named_parameters():
        if id(parameter) in sharded:
            raise CheckpointError(f"{name} is sharded by PyTorch's fully_shard, whose slices are not ours: {instead}")


def reshard(model: nn.Module) -> None:
    """Free what a forward pass left gathered, in the type that it computes in; the sharded values are the real ones."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gathered(values: Tensor) -> Tensor:
    """The full tensor of a DTensor, a collective; another tensor as it is."""
    return values.full_tensor() if isinstance(values, DTensor) else values


def sharded_like(values: Tensor, target: Tensor) -> Tensor:
    """A tensor that every rank holds, as `target` is sharded."""
    if not isinstance(target, DTensor):
        return values
    values = values.to(target.device, target.dtype)
    with torch.no_grad():
        return distribute_tensor(values, target.device_mesh, target.placements, src_data_rank=None)
