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
from meshpeft.peft.functional import (
    WeightSource,
    dense_gradient,
    flat,
    gradient_of_a,
    product,
    read_weight,
    tokens_to_keep,
)
from meshpeft.peft.products import (
    add_times_,
    factor_gradient,
    ignore_offsets,
    product_type,
    rows_for,
    sum_of_rows,
    times,
)
from meshpeft.peft.row_norms import RowNorms

__all__ = ["fused_dora", "fused_dora_reference", "magnitude_scale", "scale_of"]


def magnitude_scale(magnitude: Tensor, norm: Tensor) -> Tensor:
    """g = m / norm [.., out] in the wider of the two types; m itself, and so finite, for a row of norm zero.

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
        names = "o->o" if magnitude.dim() == 1 else "eo->eo"
        return rules.einsum(names, magnitude, linear_in=(0,))


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
        offsets: Tensor | None,
    ) -> Tensor:
        w = read_weight(weight, source, x.dtype)
        adapter_input = x if dropped is None else dropped
        h = times(flat(adapter_input), a.to(x.dtype), offsets, transpose=True).mul_(scale)
        z = times(flat(adapter_input), w, offsets, transpose=True)
        add_times_(z, h, b.to(x.dtype), offsets, transpose=True)
        g = rows_for(_invertible(magnitude_scale(magnitude, norm), x.dtype), z, offsets)
        if dropped is None:
            y = kept = z.mul_(g)
        else:
            y = times(flat(x) - flat(dropped), w, offsets, transpose=True).addcmul_(z, g)
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
            offsets,
        )
        ctx.x_shape, ctx.token_axis = x.shape, token_axis
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, dropped, tokens, h, kept, weight, a, b, magnitude, norm, offsets = ctx.saved_tensors
        need_x, need_dropped, need_w, _, need_a, need_b, need_m, *_ = ctx.needs_input_grad
        if ctx.norms is not None:
            ctx.norms.after_backward()
        dy = dense_gradient(grads[0])
        g = magnitude_scale(magnitude, norm)
        dx = d_dropped = dw = da = db = dm = None
        dz = torch.empty_like(dy) if not need_m else dy * flat(kept)
        if need_m:
            per_row = sum_of_rows(dz, g, offsets)
            divisor = norm if ctx.has_dropout else _invertible(g, dy.dtype) * norm
            dm = (per_row / torch.where(divisor != 0, divisor, torch.ones_like(divisor))).to(magnitude.dtype)
        # The same memory again: fresh pages would cost more than the product.
        torch.mul(dy, rows_for(g, dy, offsets), out=dz)
        if need_w:
            dw = factor_gradient(dz, flat(dropped if ctx.has_dropout else x), weight, offsets)
            if ctx.has_dropout:
                dw += factor_gradient(dy, flat(x) - flat(dropped), weight, offsets)
        if need_b:
            db = factor_gradient(dz, h, b, offsets).to(b.dtype)
        if need_a or need_x or need_dropped:
            dh = times(dz, b.to(dy.dtype), offsets, transpose=False).mul_(ctx.scale)
            if need_a:
                da = gradient_of_a(dh, tokens, a, ctx.token_axis, offsets).to(a.dtype)
            if need_x or need_dropped:
                w = read_weight(weight, ctx.source, dy.dtype)
                if ctx.has_dropout:
                    dx = times(dy, w, offsets, transpose=False) if need_x else None
                    # One product for both of W's gradients of x'.
                    into = d_dropped = times(dz.sub_(dy), w, offsets, transpose=False) if need_dropped else None
                else:
                    into = dx = times(dz, w, offsets, transpose=False)
                if into is not None:
                    add_times_(into, dh, a.to(dy.dtype), offsets, transpose=False)
        shaped = [None if grad is None else grad.view(ctx.x_shape) for grad in (dx, d_dropped)]
        return *shaped, dw, None, da, db, dm, None, None, None, None, None

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
        offsets: Tensor | None,
    ) -> Any:
        rules.ignore(norm)  # a constant in the state of the magnitude
        ignore_offsets(offsets)
        w = read_weight(weight, source)
        adapter_input = x if dropped is None else dropped
        base = product_type(adapter_input, w)
        delta = product_type(product_type(adapter_input, a), b)
        z = rules.einsum("...o,...o->...o", base, delta, linear_in=((0, 1),))
        names = "...o,o->...o" if magnitude.dim() == 1 else "to,_o->to"
        y = rules.einsum(names, z, magnitude, linear_in=(0, 1))
        if dropped is None:
            return y
        plain = product_type(x, w)
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
    offsets: Tensor | None = None,
) -> Tensor:
    """DoRA's adapted GEMM; see the module.

    Args:
        x: [*, in], after the base's `enter`.
        weight: W [out, in]; or a function that makes it, as in `fused_lora`.
        a: A [r, in]; b: B [out, r]; scale: s.
        magnitude: m [out]; of grouped experts [experts, out], also where A and B serve every expert.
        norm: |W + s B A| per row, shaped like the magnitude, a constant.
        dropped: [*, in], x after dropout.
        norms: told of each backward pass.
        token_axis: as in `fused_lora`.
        offsets: of grouped experts, as in `fused_lora`.

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
            return _apply(x, dropped, stored, source, a, b, magnitude, norm, scale, norms, token_axis, offsets)
    return _apply(x, dropped, stored, source, a, b, magnitude, norm, scale, norms, token_axis, offsets)


def fused_dora_reference(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    scale: float,
    dropped: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """`fused_dora` in plain operations, with g in x's type."""
    adapter_input = x if dropped is None else dropped
    if offsets is not None:
        h = product(adapter_input, a.to(x.dtype), offsets) * scale
        z = product(adapter_input, weight, offsets) + product(h, b.to(x.dtype), offsets)
        y = z * rows_for(magnitude_scale(magnitude, norm), z, offsets).to(x.dtype)
        return y if dropped is None else y + product(x - dropped, weight, offsets)
    z = adapter_input @ weight.t() + (adapter_input @ a.to(x.dtype).t() * scale) @ b.to(x.dtype).t()
    y = z * magnitude_scale(magnitude, norm).to(x.dtype)
    return y if dropped is None else y + (x - dropped) @ weight.t()


def _apply(*args: Any) -> Tensor:
    out: Tensor = _FusedDoRA.apply(*args)
    return out
