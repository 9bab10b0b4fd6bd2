"""The adapted GEMM of LoRA: y = x W^T + s (x' A^T) B^T, in one autograd function.

x' is x, or x after dropout. The function joins the adapter to the base between a layer's `enter` and `exit`, where
its output is in the base's state and nothing communicates:

| on the axis that divides W | x | W | A | h = x A^T | B | y |
|---|---|---|---|---|---|---|
| column parallel | R | S(0) | R | R | S(0) | S(-1) |
| row parallel | S(-1) | S(1) | S(1) | P | R | P |

Of grouped experts W is a stack [experts, out, in], and so are A and B, or they are matrices that serve every expert;
`offsets` then are the ends of the experts' rows in x [tokens, in]. No stack of products is ever made.

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
from meshpeft.peft.products import add_times_, factor_gradient, ignore_offsets, product_type, times

__all__ = [
    "WeightSource",
    "dense_gradient",
    "flat",
    "fused_lora",
    "fused_lora_reference",
    "gradient_of_a",
    "product",
    "read_weight",
    "tokens_to_keep",
]

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


def gradient_of_a(dh: Tensor, kept: Tensor, a: Tensor, axis: ParallelAxis | None, offsets: Tensor | None) -> Tensor:
    """dA, shaped like A; a summand over the axis either way.

    Args:
        dh: [tokens, r], a summand over the axis.
        kept: what `tokens_to_keep` left.
        a: A [r, in], or [experts, r, in].
        axis: the axis over which tokens are kept; its ranks' dh are summed where their tokens are.
        offsets: of grouped experts, as in `fused_lora`.
    """
    if axis is not None:
        dh = reduce_scatter(dh.view(kept.shape[0] * axis.world_size, -1, dh.shape[-1]), axis, 0).flatten(0, 1)
    return factor_gradient(dh, flat(kept), a, offsets)


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
        offsets: Tensor | None,
    ) -> Tensor:
        w = read_weight(weight, source, x.dtype)
        # The scale goes on to h, the smallest tensor here; h is kept scaled, as dB needs it.
        h = times(flat(x if dropped is None else dropped), a.to(x.dtype), offsets, transpose=True).mul_(scale)
        y = times(flat(x), w, offsets, transpose=True)
        add_times_(y, h, b.to(x.dtype), offsets, transpose=True)
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
            offsets,
        )
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, kept, h, weight, a, b, offsets = ctx.saved_tensors
        need_x, need_dropped, need_w, _, need_a, need_b, *_ = ctx.needs_input_grad
        dy = dense_gradient(grads[0])
        dx = d_dropped = dw = da = db = None
        if need_b:
            db = factor_gradient(dy, h, b, offsets).to(b.dtype)
        if need_w:
            dw = factor_gradient(dy, flat(x), weight, offsets)
        if need_x:
            dx = times(dy, read_weight(weight, ctx.source, dy.dtype), offsets, transpose=False)
        if need_a or need_x or need_dropped:
            dh = times(dy, b.to(dy.dtype), offsets, transpose=False).mul_(ctx.scale)
            if need_a:
                da = gradient_of_a(dh, kept, a, ctx.token_axis, offsets).to(a.dtype)
            if ctx.has_dropout:
                d_dropped = times(dh, a.to(dy.dtype), offsets, transpose=False) if need_dropped else None
            elif dx is not None:
                add_times_(dx, dh, a.to(dy.dtype), offsets, transpose=False)
        dx, d_dropped = (None if grad is None else grad.view(ctx.x_shape) for grad in (dx, d_dropped))
        return dx, d_dropped, dw, None, da, db, None, None, None

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
        offsets: Tensor | None,
    ) -> Any:
        ignore_offsets(offsets)
        base = product_type(x, read_weight(weight, source))
        delta = product_type(product_type(x if dropped is None else dropped, a), b)
        return rules.einsum("...o,...o->...o", base, delta, linear_in=((0, 1),))


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, offsets: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w, offsets)
        y = times(flat(x), w.to(x.dtype), offsets, transpose=True)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, w, offsets = ctx.saved_tensors
        dy = dense_gradient(grads[0])
        dx = times(dy, w.to(dy.dtype), offsets, transpose=False).view(x.shape) if ctx.needs_input_grad[0] else None
        dw = factor_gradient(dy, flat(x), w, offsets).to(w.dtype) if ctx.needs_input_grad[1] else None
        return dx, dw, None

    @staticmethod
    def spmd_typecheck(*, x: Tensor, w: Tensor, offsets: Tensor | None) -> Any:
        ignore_offsets(offsets)
        return product_type(x, w)


def product(x: Tensor, w: Tensor, offsets: Tensor | None = None) -> Tensor:
    """x w^T in x's type (under autocast in its), for factors in any state: x [*, in], w [out, in] -> [*, out].

    With `offsets` w may be a stack [experts, out, in], one matrix for each group of rows of x [tokens, in].

    One of x and w may be a summand; a divided `in` gives a summand. (The type checker refuses summands in
    `F.linear`, for its optional bias, and divided leading dims in `matmul`.)
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            cast: Tensor = _Product.apply(x.to(torch.get_autocast_dtype(device)), w, offsets)
            return cast
    out: Tensor = _Product.apply(x, w, offsets)
    return out


def fused_lora(
    x: Tensor,
    weight: WeightSource,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropped: Tensor | None = None,
    token_axis: ParallelAxis | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """y = x W^T + scale (x' A^T) B^T, with x' = `dropped` if it is given, else x.

    States as in the module's table; under autocast the products run in autocast's type.

    Args:
        x: [*, in], after the base's `enter`.
        weight: W [out, in], or [experts, out, in]; or a function that makes it, called again in the backward pass so
            that nothing keeps it (dequantised weights).
        a: A [r, in]; or, of grouped experts, [experts, r, in].
        b: B [out, r]; or [experts, out, r].
        scale: s.
        dropped: [*, in], x after dropout.
        token_axis: keep only this axis' share of x' [N, .., in] for the backward pass, along dim 0, of a column whose
            input was gathered over it. One reduce-scatter of [tokens, r] in the backward pass.
        offsets: [experts] int32, of grouped experts: the end of each one's rows in x [tokens, in].

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
            return _apply(x, dropped, stored, source, a, b, scale, token_axis, offsets)
    return _apply(x, dropped, stored, source, a, b, scale, token_axis, offsets)


def fused_lora_reference(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropped: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """`fused_lora` in plain operations: what it computes, and what the type checker sees inside it."""
    adapter_input = x if dropped is None else dropped
    if offsets is not None:
        h = product(adapter_input, a.to(x.dtype), offsets)
        return product(x, weight, offsets) + product(h * scale, b.to(x.dtype), offsets)
    # Products rather than F.linear, whose optional bias makes the checker refuse a summand.
    h = adapter_input @ a.to(x.dtype).t()
    return x @ weight.t() + (h * scale) @ b.to(x.dtype).t()


def _apply(*args: Any) -> Tensor:
    out: Tensor = _FusedLoRA.apply(*args)
    return out
