"""Activation checkpointing: what the forward pass keeps for the backward pass, and what is computed again.

| mode | kept of a layer | computed again |
|---|---|---|
| none | everything that the backward pass reads | nothing |
| selective | inputs of its halves, of `linear_proj`, of `linear_fc2` | norms, `linear_qkv`, heads, `linear_fc1`, silu |
| full | its input | the layer |

Selective keeps what is narrow, or dear to make again: `linear_proj` and `linear_fc2` and their collectives run once.
With experts it also keeps the tokens as they arrived, so that nothing is routed or exchanged twice.

What is computed again is what was computed: the same operations on the same values, with the same dropout masks.

In any mode, `kept_on_host` moves what is kept of a GPU's activations to host memory until the backward pass reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meshpeft.models.config import ModelError
from meshpeft.parallel.sharded_base import is_stored

__all__ = ["ActivationCheckpointing", "RecomputesParts", "checkpointing_mode", "kept_on_host"]

ActivationCheckpointing = Literal["none", "selective", "full"]
"""A mode of the table."""


def checkpointing_mode(given: bool | ActivationCheckpointing) -> ActivationCheckpointing:
    """Return the mode that was given; `True` means full, `False` none.

    Raises:
        ModelError: There is no such mode.
    """
    if isinstance(given, bool):
        return "full" if given else "none"
    if given not in ("none", "selective", "full"):
        raise ModelError(f"activation_checkpointing={given!r}: expected none, selective or full (or True or False)")
    return given


# Smaller tensors cost more as transfers than they take as memory.
_SMALLEST_MOVED = 1 << 20


@contextmanager
def kept_on_host(model: nn.Module, *, device_type: str = "cuda", smallest: int = _SMALLEST_MOVED) -> Iterator[None]:
    """Inside, keep in host memory what the forward pass of `model` keeps for the backward pass.

    The copies, out in the forward and back in the backward pass, are in the order of the device's stream, so the host
    waits for none. Parameters and buffers stay where they are.

    Args:
        model: Model whose forward pass runs inside.
        device_type: Type of the device whose tensors are moved.
        smallest: Bytes of the smallest tensor that is moved.
    """
    tensors = (tensor for tensor in (*model.parameters(), *model.buffers()) if not is_stored(tensor))
    held = {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def pack(kept: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if is_stored(kept) or kept.device.type != device_type or kept.nbytes < smallest:
            return kept
        if kept.untyped_storage().data_ptr() in held:
            return kept
        host = torch.empty(kept.shape, dtype=kept.dtype, device="cpu", pin_memory=kept.is_cuda)
        return kept.device, host.copy_(kept, non_blocking=True)

    def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, host = packed
        return host.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class RecomputesParts(nn.Module):
    """A module that can compute parts of itself again in the backward pass.

    Attributes:
        recomputes_parts: Whether it does, in training.
    """

    recomputes_parts: bool = False

    def part(self, function: Callable[[Tensor], Tensor], x: Tensor, repeatable: bool = True) -> Tensor:
        """Return `function(x)`; of it only x is kept for the backward pass where parts are computed again.

        Args:
            function: A part of the forward pass.
            x: Its input.
            repeatable: Whether a second call does nothing else (extending a cache).
        """
        if not (self.recomputes_parts and repeatable and torch.is_grad_enabled()):
            return function(x)
        out: Tensor = checkpoint(function, x, use_reentrant=False)
        return out
