"""Products with a weight that is made when it is needed, and made again in the backward pass.

PyTorch's own `linear` would keep the dequantised weight for the input gradient, which would cost the memory that
packing saved. The weight itself gets no gradient. States as for any linear, see docs/parallel.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from meshpeft.parallel import grouped_mm

__all__ = ["grouped_linear_from", "linear_from"]

Source = Callable[[], Tensor]


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Source) -> Tensor:
        ctx.source = source
        return torch.matmul(x, source().to(x.dtype).t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return torch.matmul(grads[0], ctx.source().to(grads[0].dtype)), None


class _GroupedLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Source, offsets: Tensor) -> Tensor:
        ctx.source = source
        ctx.save_for_backward(offsets)
        return grouped_mm(x, source().to(x.dtype), offsets, transpose=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (offsets,) = ctx.saved_tensors
        dy = grads[0].contiguous()
        return grouped_mm(dy, ctx.source().to(dy.dtype), offsets, transpose=False), None, None


def linear_from(x: Tensor, source: Source) -> Tensor:
    """y = x W^T. x [*, in], `source()` -> W [out, in]; y [*, out] in x's type, or in autocast's."""
    out: Tensor = _without_autocast(_Linear, x, source)
    return out


def grouped_linear_from(x: Tensor, source: Source, offsets: Tensor) -> Tensor:
    """y = x W_e^T for the rows of each group e. x [T, in], `source()` -> W [E, out, in], offsets [E] int32."""
    out: Tensor = _without_autocast(_GroupedLinear, x, source, offsets)
    return out


def _without_autocast(function: type[Function], x: Tensor, *arguments: Any) -> Tensor:
    """Under autocast, run in its type: inside a custom function it would not be in force in the backward pass."""
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return function.apply(x, *arguments)
    with torch.autocast(device, enabled=False):
        return function.apply(x.to(torch.get_autocast_dtype(device)), *arguments)
