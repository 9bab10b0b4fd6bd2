"""The adapted GEMM of LoRA: y = x W^T + s (x' A^T) B^T, in one autograd function.

x' is x, or x after dropout. The function joins the adapter to the base between a layer's `enter` and `exit`, where
its output is in the base's state and nothing communicates:

| on the axis that divides W | x | W | A | h = x A^T | B | y |
|---|---|---|---|---|---|---|
| column parallel | R | S(0) | R | R | S(0) | S(-1) |
| row parallel | S(-1) | S(1) | S(1) | P | R | P |

What it saves over the plain operations: B's product is added into y, and A's part of the input gradient into the
base's, without an activation-sized temporary; only x' and h [tokens, r] are kept for the backward pass. Under sequence
parallel that x' is the gathered sequence, on every rank; with `token_axis` each keeps its own tokens of it, and the
backward pass reduce-scatters dh [tokens, r] to them.

Types: the products run in x's type. Factors of a wider type than x (float32 factors on a bfloat16 base) are rounded
to it for the product, as in any mixed-precision training, and their gradients are returned in their own type;
narrower factors are widened.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from spmd_types import rules
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from meshpeft.parallel import ParallelAxis
from meshpeft.parallel.communication import reduce_scatter, take_slice

__all__ = ["WeightSource", "fused_lora", "fused_lora_reference", "product", "read_weight"]

WeightSource = Tensor | Callable[[], Tensor]


def read_weight(weight: Tensor | None, source: Callable[[], Tensor] | None, dtype: torch.dtype | None = None) -> Tensor:
    """The stored weight, or the one that `source` makes, in the type of the product (another one under autocast)."""
    if weight is not None:
        return weight
    assert source is not None
    return source().detach().to(dtype=dtype)


def flat(x: Tensor) -> Tensor:
    """[*, n] -> [tokens, n]."""
    return x.reshape(-1, x.shape[-1])


def tokens_to_keep(x: Tensor, axis: ParallelAxis | None) -> Tensor:
    """What is kept of x [N, .., in] for the gradient of A: all of it, or this rank's share of dim 0 on `axis`."""
    return x if axis is None else take_slice(x, axis, 0)


def gradient_of_a(dh: Tensor, kept: Tensor, axis: ParallelAxis | None) -> Tensor:
    """dA [r, in], a summand over the axis either way.

    Args:
        dh: [tokens, r], a summand over the axis.
        kept: what `tokens_to_keep` left.
        axis: the axis over which tokens are kept; its ranks' dh are summed where their tokens are.
    """
    if axis is not None:
        dh = reduce_scatter(dh.view(kept.shape[0] * axis.world_size, -1, dh.shape[-1]), axis, 0).flatten(0, 1)
    return torch.mm(dh.t(), flat(kept))


def dense_gradient(grad: Tensor) -> Tensor:
    """[*, n] -> [tokens, n], contiguous: an expanded gradient (of a sum) would be copied by every product."""
    return flat(grad).contiguous()


class _FusedLoRA(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor | None,
        source: Callable[[], Tensor] | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        token_axis: ParallelAxis | None,
    ) -> Tensor:
        w = read_weight(weight, source, x.dtype)
        # The scale goes on to h, the smallest tensor here; h is kept scaled, as dB needs it.
        h = torch.mm(flat(x if dropped is None else dropped), a.to(x.dtype).t()).mul_(scale)
        y = torch.mm(flat(x), w.t()).addmm_(h, b.to(x.dtype).t())
        _, _, need_w, _, need_a, need_b, *_ = ctx.needs_input_grad
        ctx.source, ctx.scale, ctx.has_dropout, ctx.x_shape = source, scale, dropped is not None, x.shape
        ctx.token_axis = token_axis
        ctx.save_for_backward(
            x if need_w else None,
            tokens_to_keep(x if dropped is None else dropped, token_axis) if need_a else None,
            h if need_b else None,
            weight,
            a,
            b,
        )
        return y.view(*x.shape[:-1], w.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, kept, h, weight, a, b = ctx.saved_tensors
        need_x, need_dropped, need_w, _, need_a, need_b, *_ = ctx.needs_input_grad
        dy = dense_gradient(grads[0])
        dx = d_dropped = dw = da = db = None
        if need_b:
            # The transpose of h^T dy, twice as fast as dy^T h on tall dy.
            db = torch.mm(h.t(), dy).t().to(b.dtype)
        if need_w:
            dw = torch.mm(dy.t(), flat(x))
        if need_x:
            dx = torch.mm(dy, read_weight(weight, ctx.source, dy.dtype))
        if need_a or need_x or need_dropped:
            dh = torch.mm(dy, b.to(dy.dtype)).mul_(ctx.scale)
            if need_a:
                da = gradient_of_a(dh, kept, ctx.token_axis).to(a.dtype)
            if ctx.has_dropout:
                d_dropped = torch.mm(dh, a.to(dy.dtype)).view(ctx.x_shape) if need_dropped else None
            elif dx is not None:
                dx.addmm_(dh, a.to(dy.dtype))
        return None if dx is None else dx.view(ctx.x_shape), d_dropped, dw, None, da, db, None, None

    @staticmethod
    def spmd_typecheck(
        *,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor | None,
        source: Callable[[], Tensor] | None,
        a: Tensor,
        b: Tensor,
        token_axis: ParallelAxis | None,
    ) -> Any:
        base = rules.einsum("...i,oi->...o", x, read_weight(weight, source), linear_in=(0, 1))
        h = rules.einsum("...i,ri->...r", x if dropped is None else dropped, a, linear_in=(0, 1))
        delta = rules.einsum("...r,or->...o", h, b, linear_in=(0, 1))
        return rules.einsum("...o,...o->...o", base, delta, linear_in=((0, 1),))


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return torch.mm(flat(x), w.to(x.dtype).t()).view(*x.shape[:-1], w.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        dy = dense_gradient(grads[0])
        dx = torch.mm(dy, w.to(dy.dtype)).view(x.shape) if ctx.needs_input_grad[0] else None
        dw = torch.mm(dy.t(), flat(x)).to(w.dtype) if ctx.needs_input_grad[1] else None
        return dx, dw

    @staticmethod
    def spmd_typecheck(*, x: Tensor, w: Tensor) -> Any:
        return rules.einsum("...i,oi->...o", x, w, linear_in=(0, 1))


def product(x: Tensor, w: Tensor) -> Tensor:
    """x w^T in x's type, for factors in any state: x [*, in], w [out, in] -> [*, out].

    One of x and w may be a summand; a divided `in` gives a summand. (The type checker refuses summands in
    `F.linear`, for its optional bias, and divided leading dims in `matmul`.)
    """
    out: Tensor = _Product.apply(x, w)
    return out


def fused_lora(
    x: Tensor,
    weight: WeightSource,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropped: Tensor | None = None,
    token_axis: ParallelAxis | None = None,
) -> Tensor:
    """y = x W^T + scale (x' A^T) B^T, with x' = `dropped` if it is given, else x.

    States as in the module's table; under autocast the products run in autocast's type.

    Args:
        x: [*, in], after the base's `enter`.
        weight: W [out, in]; or a function that makes it, called again in the backward pass so that nothing keeps
            it (dequantised weights).
        a: A [r, in].
        b: B [out, r].
        scale: s.
        dropped: [*, in], x after dropout.
        token_axis: keep only this axis' share of x' [N, .., in] for the backward pass, along dim 0, of a column whose
            input was gathered over it. One reduce-scatter of [tokens, r] in the backward pass.

    Returns:
        [*, out], before the base's `exit`. Gradients reach every tensor that requires one; the gradient of A or B
        is a summand where their layout says so.
    """
    stored, source = (weight, None) if isinstance(weight, Tensor) else (None, weight)
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, stored = x.to(dtype), None if stored is None else stored.to(dtype)
        dropped = None if dropped is None else dropped.to(dtype)
        with torch.autocast(device, enabled=False):
            return _apply(x, dropped, stored, source, a, b, scale, token_axis)
    return _apply(x, dropped, stored, source, a, b, scale, token_axis)


def fused_lora_reference(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, dropped: Tensor | None = None
) -> Tensor:
    """`fused_lora` in plain operations: what it computes, and what the type checker sees inside it."""
    adapter_input = x if dropped is None else dropped
    # Products rather than F.linear, whose optional bias makes the checker refuse a summand.
    h = adapter_input @ a.to(x.dtype).t()
    return x @ weight.t() + (h * scale) @ b.to(x.dtype).t()


def _apply(*args: Any) -> Tensor:
    out: Tensor = _FusedLoRA.apply(*args)
    return out
