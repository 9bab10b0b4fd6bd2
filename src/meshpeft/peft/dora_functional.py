"""The adapted GEMM of DoRA (Liu et al. 2024, equation 5), in one autograd function.

With g = m / |W + s B A| per row (the norm is a constant of the backward pass) and z(x) = x W^T + s (x A^T) B^T:

    y = g * z(x)                                  without dropout
    y = x W^T - x' W^T + g * z(x')                with x' = dropout(x)

The second is the documented formula `W_0 x + (g - 1) W_0 x' + g s B A x'`. The scale is applied in place to the
product, and the gradient of m is a sum over tokens of dy * y / m: one extra pass forward, two backward, no
activation-sized tensor but the output itself is kept. States are those of `fused_lora`; g scales summands (row) and
shards (column) alike.

Types: g stays in the type of the norms, float32 or wider, whatever x has. Rounded to bfloat16, a change of m below
0.4% would not reach the output at all, while a merge would write it into the weight.
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
from meshpeft.peft.functional import WeightSource, dense_gradient, flat, gradient_of_a, read_weight, tokens_to_keep
from meshpeft.peft.row_norms import RowNorms

__all__ = ["fused_dora", "fused_dora_reference", "magnitude_scale", "scale_of"]


def magnitude_scale(magnitude: Tensor, norm: Tensor) -> Tensor:
    """g = m / norm [out], in the wider of the two types; m itself, and so finite, for a row of norm zero.

    Such a row has no direction. Real checkpoints have them; there m starts at zero too, and the row stays zero.
    """
    return magnitude / torch.where(norm > 0, norm, torch.ones_like(norm))


def _invertible(g: Tensor, dtype: torch.dtype) -> Tensor:
    """g [out] with zeros replaced by the root of the smallest number of `dtype`, y's, so that z is y / g everywhere.

    What such a row then adds to the output is below the rounding of any other; float16 has no number that small,
    and keeps its zeros.
    """
    if dtype == torch.float16:
        return g
    return torch.where(g == 0, torch.full_like(g, torch.finfo(dtype).tiny ** 0.5), g)


class _MagnitudeScale(Function):
    """`magnitude_scale` as the type checker takes it: the norm has no type, being made outside the model."""

    @staticmethod
    def forward(ctx: Any, magnitude: Tensor, norm: Tensor, norms: RowNorms) -> Tensor:
        ctx.save_for_backward(norm)
        ctx.dtype, ctx.norms = magnitude.dtype, norms
        return magnitude_scale(magnitude, norm)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (norm,) = ctx.saved_tensors
        ctx.norms.after_backward()
        return magnitude_scale(grads[0], norm).to(ctx.dtype), None, None

    @staticmethod
    def spmd_typecheck(*, magnitude: Tensor, norm: Tensor) -> Any:
        rules.ignore(norm)
        return rules.einsum("o->o", magnitude, linear_in=(0,))


def scale_of(magnitude: Tensor, norm: Tensor, norms: RowNorms) -> Tensor:
    """`magnitude_scale`, differentiable in the magnitude, of whose state it is; tells `norms` of the backward pass."""
    g: Tensor = _MagnitudeScale.apply(magnitude, norm, norms)
    return g


class _FusedDoRA(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor | None,
        source: Callable[[], Tensor] | None,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor,
        norm: Tensor,
        scale: float,
        norms: RowNorms | None,
        token_axis: ParallelAxis | None,
    ) -> Tensor:
        w = read_weight(weight, source, x.dtype)
        adapter_input = x if dropped is None else dropped
        h = torch.mm(flat(adapter_input), a.to(x.dtype).t()).mul_(scale)
        z = torch.mm(flat(adapter_input), w.t()).addmm_(h, b.to(x.dtype).t())
        g = _invertible(magnitude_scale(magnitude, norm), x.dtype)
        if dropped is None:
            y = kept = z.mul_(g).view(*x.shape[:-1], w.shape[0])
        else:
            y = torch.mm(flat(x) - flat(dropped), w.t()).addcmul_(z, g).view(*x.shape[:-1], w.shape[0])
            kept = z
        _, _, need_w, _, need_a, need_b, need_m, *_ = ctx.needs_input_grad
        ctx.source, ctx.scale, ctx.has_dropout, ctx.norms = source, scale, dropped is not None, norms
        ctx.save_for_backward(
            x if need_w else None,
            adapter_input if need_w and dropped is not None else None,
            tokens_to_keep(adapter_input, token_axis) if need_a else None,
            h if need_b else None,
            kept if need_m else None,
            weight,
            a,
            b,
            magnitude,
            norm,
        )
        ctx.x_shape, ctx.token_axis = x.shape, token_axis
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, dropped, tokens, h, kept, weight, a, b, magnitude, norm = ctx.saved_tensors
        need_x, need_dropped, need_w, _, need_a, need_b, need_m, *_ = ctx.needs_input_grad
        if ctx.norms is not None:
            ctx.norms.after_backward()
        dy = dense_gradient(grads[0])
        g = magnitude_scale(magnitude, norm)
        dx = d_dropped = dw = da = db = dm = None
        dz = torch.empty_like(dy) if not need_m else dy * flat(kept)
        if need_m:
            per_row = dz.sum(0, dtype=g.dtype)
            divisor = norm if ctx.has_dropout else _invertible(g, dy.dtype) * norm
            dm = (per_row / torch.where(divisor != 0, divisor, torch.ones_like(divisor))).to(magnitude.dtype)
        # The same memory again: fresh pages would cost more than the product.
        torch.mul(dy, g, out=dz)
        if need_w:
            dw = torch.mm(dz.t(), flat(dropped if ctx.has_dropout else x))
            if ctx.has_dropout:
                dw += torch.mm(dy.t(), flat(x) - flat(dropped))
        if need_b:
            db = torch.mm(h.t(), dz).t().to(b.dtype)
        if need_a or need_x or need_dropped:
            dh = torch.mm(dz, b.to(dy.dtype)).mul_(ctx.scale)
            if need_a:
                da = gradient_of_a(dh, tokens, ctx.token_axis).to(a.dtype)
            if need_x or need_dropped:
                w = read_weight(weight, ctx.source, dy.dtype)
                if ctx.has_dropout:
                    dx = torch.mm(dy, w) if need_x else None
                    # One product for both of W's gradients of x'.
                    d_dropped = torch.mm(dz.sub_(dy), w).addmm_(dh, a.to(dy.dtype)) if need_dropped else None
                else:
                    dx = torch.mm(dz, w).addmm_(dh, a.to(dy.dtype))
        shaped = [None if grad is None else grad.view(ctx.x_shape) for grad in (dx, d_dropped)]
        return *shaped, dw, None, da, db, dm, None, None, None, None

    @staticmethod
    def spmd_typecheck(
        *,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor | None,
        source: Callable[[], Tensor] | None,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor,
        norm: Tensor,
        token_axis: ParallelAxis | None,
    ) -> Any:
        rules.ignore(norm)  # a constant in the state of the magnitude
        w = read_weight(weight, source)
        adapter_input = x if dropped is None else dropped
        base = rules.einsum("...i,oi->...o", adapter_input, w, linear_in=(0, 1))
        h = rules.einsum("...i,ri->...r", adapter_input, a, linear_in=(0, 1))
        delta = rules.einsum("...r,or->...o", h, b, linear_in=(0, 1))
        z = rules.einsum("...o,...o->...o", base, delta, linear_in=((0, 1),))
        y = rules.einsum("...o,o->...o", z, magnitude, linear_in=(0, 1))
        if dropped is None:
            return y
        plain = rules.einsum("...i,oi->...o", x, w, linear_in=(0, 1))
        return rules.einsum("...o,...o->...o", plain, y, linear_in=((0, 1),))


def fused_dora(
    x: Tensor,
    weight: WeightSource,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    scale: float,
    dropped: Tensor | None = None,
    norms: RowNorms | None = None,
    token_axis: ParallelAxis | None = None,
) -> Tensor:
    """DoRA's adapted GEMM; see the module.

    Args:
        x: [*, in], after the base's `enter`.
        weight: W [out, in]; or a function that makes it, as in `fused_lora`.
        a: A [r, in]; b: B [out, r]; scale: s.
        magnitude: m [out].
        norm: |W + s B A| per row [out], a constant.
        dropped: [*, in], x after dropout.
        norms: told of each backward pass.
        token_axis: as in `fused_lora`.

    Returns:
        [*, out], before the base's `exit`; no bias is in it, so none is scaled.
    """
    stored, source = (weight, None) if isinstance(weight, Tensor) else (None, weight)
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, stored = x.to(dtype), None if stored is None else stored.to(dtype)
        dropped = None if dropped is None else dropped.to(dtype)
        with torch.autocast(device, enabled=False):
            return _apply(x, dropped, stored, source, a, b, magnitude, norm, scale, norms, token_axis)
    return _apply(x, dropped, stored, source, a, b, magnitude, norm, scale, norms, token_axis)


def fused_dora_reference(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    scale: float,
    dropped: Tensor | None = None,
) -> Tensor:
    """`fused_dora` in plain operations, with g in x's type."""
    adapter_input = x if dropped is None else dropped
    z = adapter_input @ weight.t() + (adapter_input @ a.to(x.dtype).t() * scale) @ b.to(x.dtype).t()
    y = z * magnitude_scale(magnitude, norm).to(x.dtype)
    return y if dropped is None else y + (x - dropped) @ weight.t()


def _apply(*args: Any) -> Tensor:
    out: Tensor = _FusedDoRA.apply(*args)
    return out
