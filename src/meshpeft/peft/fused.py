"""The adapted GEMMs: base layer and low-rank term in one autograd function, for LoRA and for DoRA.

LoRA, with x' = x, or x after dropout:

    y = x Wᵀ + s (x' Aᵀ) Bᵀ

DoRA (Liu et al. 2024, equation 5), with g = m / |W + s B A| per row (the norm is a constant of the backward pass) and
z(x) = x Wᵀ + s (x Aᵀ) Bᵀ:

    y = g * z(x)                                  without dropout
    y = x Wᵀ - x' Wᵀ + g * z(x')                  with x' = dropout(x)

The last is the documented formula `W_0 x + (g - 1) W_0 x' + g s B A x'`. The functions join the adapter to the base
between a layer's `enter` and `exit`, where its output is in the base's state and nothing communicates; g scales
partial outputs (row) and shards (column) alike:

| on the axis that shards W | x | W | A | h = x Aᵀ | B | y |
|---|---|---|---|---|---|---|
| column parallel | R | S(0) | R | R | S(0) | S(-1) |
| row parallel | S(-1) | S(1) | S(1) | P | R | P |

On grouped experts W is a stack [experts, out, in], and so are A and B, or they are matrices that serve every expert;
`offsets` then are the ends of the experts' rows in x [tokens, in]. No stack of products is ever made.

What it saves over the plain operations: B's product is added into y, and A's part of the input gradient into the
base's, without an activation-sized temporary; LoRA keeps only x' and h [tokens, r] for the backward pass. DoRA's scale
is applied in place to the product, and the gradient of m is a sum over tokens of dy * y / m: one extra pass forward,
two backward, and y (with dropout z(x')) is kept for it. Under sequence parallel x' is the gathered sequence, on every
rank; with `token_axis` each rank keeps its own tokens of it, and the backward pass reduce-scatters dh [tokens, r] to
them.

Types: the products run in x's type. Factors of a wider type than x (float32 factors on a bfloat16 base) are rounded
to it for the product, as in any mixed-precision training, and their gradients are returned in their own type;
narrower factors are widened. g stays in the type of the norms, float32 or wider, whatever x has: rounded to bfloat16,
a change of m below 0.4% would not reach the output at all, while a merge would write it into the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from spmd_types import rules
from spmd_types.types import PartitionSpec, V
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from meshpeft.parallel import ParallelAxis, group_of_rows, grouped_add_mm_, grouped_mm, grouped_outer, grouped_sum
from meshpeft.parallel.states import reduce_scatter, take_slice
from meshpeft.parallel.typing import SpmdTypeOf, dims_follow, typed_as

__all__ = [
    "Term",
    "WeightSource",
    "apply_outside_autocast",
    "fused_dora",
    "fused_dora_reference",
    "fused_lora",
    "fused_lora_reference",
    "magnitude_scale",
    "product",
    "rows_for",
]

WeightSource = Tensor | Callable[[], Tensor]
"""W [out, in] or [experts, out, in]; or a function that makes it, called again in the backward pass so that nothing
keeps it (dequantised weights)."""


class Term(NamedTuple):
    """The low-rank term s (x' Aᵀ) Bᵀ of one call.

    Attributes:
        a: A [r, in]; on grouped experts also [experts, r, in].
        b: B [out, r]; on grouped experts also [experts, out, r].
        scale: s.
        dropped: x' [*, in], x after dropout; `None` where the term takes x itself.
        token_axis: Axis of which the backward pass keeps this rank's share of x' [N, .., in] along dim 0, in a column
            whose input was gathered over it. Costs one reduce-scatter of [tokens, r] in the backward pass.
        offsets: On grouped experts [experts] int32: the end of each one's rows in x [tokens, in].
    """

    a: Tensor
    b: Tensor
    scale: float
    dropped: Tensor | None = None
    token_axis: ParallelAxis | None = None
    offsets: Tensor | None = None


def fused_lora(x: Tensor, weight: WeightSource, term: Term) -> Tensor:
    """y = x Wᵀ + s (x' Aᵀ) Bᵀ, in the states of the module's table; under autocast in autocast's type.

    Args:
        x: [*, in], after the base's `enter`.
        weight: W.
        term: Low-rank term.

    Returns:
        [*, out], before the base's `exit`. Gradients reach every tensor that requires one; those of A and B are
        partial where their layout states it.
    """
    stored, source = _stored_or_source(weight)
    a, b, scale, dropped, axis, offsets = term
    return apply_outside_autocast(_FusedLoRA, [x, dropped, stored], source, a, b, scale, axis, offsets)


def fused_dora(
    x: Tensor,
    weight: WeightSource,
    term: Term,
    magnitude: Tensor,
    norm: Tensor,
    after_backward: Callable[[], None] | None = None,
) -> Tensor:
    """y = g * (x Wᵀ + s (x Aᵀ) Bᵀ), or with dropout the module's formula; states and types as in `fused_lora`.

    Args:
        x: [*, in], after the base's `enter`.
        weight: W.
        term: Low-rank term.
        magnitude: m [out]; on grouped experts [experts, out], also where A and B serve every expert.
        norm: |W + s B A| per row, shaped like the magnitude, a constant.
        after_backward: Called in each backward pass.

    Returns:
        [*, out], before the base's `exit`; it contains no bias, so none is scaled.
    """
    stored, source = _stored_or_source(weight)
    a, b, scale, dropped, axis, offsets = term
    arguments = (source, a, b, magnitude, norm, scale, after_backward, axis, offsets)
    return apply_outside_autocast(_FusedDoRA, [x, dropped, stored], *arguments)


def fused_lora_reference(x: Tensor, weight: Tensor, term: Term) -> Tensor:
    """Compute `fused_lora` in plain operations: its twin for tests and for the type checker, which sees inside it."""
    a, b, scale, dropped, _, offsets = term
    adapter_input = x if dropped is None else dropped
    if offsets is not None:
        h = product(adapter_input, a.to(x.dtype), offsets)
        return product(x, weight, offsets) + product(h * scale, b.to(x.dtype), offsets)
    # Products rather than F.linear, whose optional bias makes the checker refuse a partial.
    h = adapter_input @ a.to(x.dtype).t()
    return x @ weight.t() + (h * scale) @ b.to(x.dtype).t()


def fused_dora_reference(x: Tensor, weight: Tensor, term: Term, magnitude: Tensor, norm: Tensor) -> Tensor:
    """Compute `fused_dora` in plain operations, with g in x's type."""
    a, b, scale, dropped, _, offsets = term
    adapter_input = x if dropped is None else dropped
    if offsets is not None:
        h = product(adapter_input, a.to(x.dtype), offsets) * scale
        z = product(adapter_input, weight, offsets) + product(h, b.to(x.dtype), offsets)
        y = z * rows_for(magnitude_scale(magnitude, norm), z, offsets).to(x.dtype)
        return y if dropped is None else y + product(x - dropped, weight, offsets)
    z = adapter_input @ weight.t() + (adapter_input @ a.to(x.dtype).t() * scale) @ b.to(x.dtype).t()
    y = z * magnitude_scale(magnitude, norm).to(x.dtype)
    return y if dropped is None else y + (x - dropped) @ weight.t()


def product(x: Tensor, w: WeightSource, offsets: Tensor | None = None) -> Tensor:
    """x wᵀ in x's type (under autocast in its), for factors in any state: x [*, in], w [out, in] -> [*, out].

    With `offsets` w may be a stack [experts, out, in], one matrix for each group of rows of x [tokens, in]. Where w is
    a function that makes the matrix, the backward pass calls it again, and it gets no gradient.

    One of x and w may be partial; a sharded `in` gives a partial. (The type checker refuses partials in `F.linear`,
    for its optional bias, and sharded leading dims in `matmul`.)
    """
    return apply_outside_autocast(_Product, [x], *_stored_or_source(w), offsets)


def apply_outside_autocast(function: type[Function], cast: Sequence[Tensor | None], *others: Any) -> Tensor:
    """Run an autograd function; under autocast in autocast's type, which a backward pass would not be run in.

    Args:
        function: Takes the tensors of `cast`, then `others`.
        cast: The input, and what has its type; converted to autocast's type.
        others: Further arguments, given as they are.
    """
    assert cast[0] is not None
    device = cast[0].device.type
    out: Tensor
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            out = function.apply(*(None if tensor is None else tensor.to(dtype) for tensor in cast), *others)
    else:
        out = function.apply(*cast, *others)
    return out


def magnitude_scale(magnitude: Tensor, norm: Tensor) -> Tensor:
    """g = m / norm [.., out] in the wider of the two types; m itself, and so finite, for a row of norm zero.

    Such a row has no direction. Real checkpoints have them; there m starts at zero too, and the row stays zero.
    """
    return magnitude / torch.where(norm > 0, norm, torch.ones_like(norm))


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
        w = _read_weight(weight, source, x.dtype)
        # The scale goes on to h, the smallest tensor here; h is kept scaled, as dB needs it.
        h = _times(_flat(x if dropped is None else dropped), a.to(x.dtype), offsets, transpose=True).mul_(scale)
        y = _times(_flat(x), w, offsets, transpose=True)
        _add_times_(y, h, b.to(x.dtype), offsets, transpose=True)
        _, _, need_w, _, need_a, need_b, *_ = ctx.needs_input_grad
        ctx.source, ctx.scale, ctx.has_dropout, ctx.x_shape = source, scale, dropped is not None, x.shape
        ctx.token_axis = token_axis
        ctx.save_for_backward(
            x if need_w else None,
            _tokens_to_keep(x if dropped is None else dropped, token_axis) if need_a else None,
            h if need_b else None,
            weight,
            a,
            b,
            offsets,
        )
        return _shaped_like(x, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, kept, h, weight, a, b, offsets = ctx.saved_tensors
        need_x, need_dropped, need_w, _, need_a, need_b, *_ = ctx.needs_input_grad
        dy = _dense_gradient(grads[0])
        dx = d_dropped = dw = da = db = None
        if need_b:
            db = _factor_gradient(dy, h, b, offsets).to(b.dtype)
        if need_w:
            dw = _factor_gradient(dy, _flat(x), weight, offsets)
        if need_x:
            dx = _times(dy, _read_weight(weight, ctx.source, dy.dtype), offsets, transpose=False)
        if need_a or need_x or need_dropped:
            dh = _times(dy, b.to(dy.dtype), offsets, transpose=False).mul_(ctx.scale)
            if need_a:
                da = _gradient_of_a(dh, kept, a, ctx.token_axis, offsets).to(a.dtype)
            if ctx.has_dropout:
                d_dropped = _times(dh, a.to(dy.dtype), offsets, transpose=False) if need_dropped else None
            elif dx is not None:
                _add_times_(dx, dh, a.to(dy.dtype), offsets, transpose=False)
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
        _ignore_offsets(offsets)
        base = _product_type(x, _read_weight(weight, source))
        delta = _product_type(_product_type(x if dropped is None else dropped, a), b)
        return rules.einsum("...o,...o->...o", base, delta, linear_in=((0, 1),))


def _invertible(g: Tensor, dtype: torch.dtype) -> Tensor:
    """Replace zeros of g [out] by the root of the smallest number of `dtype` (y's), so that z is y / g everywhere.

    What such a row then adds to the output is below the rounding of any other; float16 has no number that small,
    and keeps its zeros.
    """
    if dtype == torch.float16:
        return g
    return torch.where(g == 0, torch.full_like(g, torch.finfo(dtype).tiny ** 0.5), g)


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
        after_backward: Callable[[], None] | None,
        token_axis: ParallelAxis | None,
        offsets: Tensor | None,
    ) -> Tensor:
        w = _read_weight(weight, source, x.dtype)
        adapter_input = x if dropped is None else dropped
        h = _times(_flat(adapter_input), a.to(x.dtype), offsets, transpose=True).mul_(scale)
        z = _times(_flat(adapter_input), w, offsets, transpose=True)
        _add_times_(z, h, b.to(x.dtype), offsets, transpose=True)
        g = rows_for(_invertible(magnitude_scale(magnitude, norm), x.dtype), z, offsets)
        if dropped is None:
            # The output itself is kept: autograd then sees whether anyone changes it.
            y = kept = _shaped_like(x, z.mul_(g))
        else:
            y = _shaped_like(x, _times(_flat(x) - _flat(dropped), w, offsets, transpose=True).addcmul_(z, g))
            kept = z
        _, _, need_w, _, need_a, need_b, need_m, *_ = ctx.needs_input_grad
        ctx.source, ctx.scale, ctx.has_dropout, ctx.after_backward = source, scale, dropped is not None, after_backward
        ctx.save_for_backward(
            x if need_w else None,
            adapter_input if need_w and dropped is not None else None,
            _tokens_to_keep(adapter_input, token_axis) if need_a else None,
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
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, dropped, tokens, h, kept, weight, a, b, magnitude, norm, offsets = ctx.saved_tensors
        need_x, need_dropped, need_w, _, need_a, need_b, need_m, *_ = ctx.needs_input_grad
        if ctx.after_backward is not None:
            ctx.after_backward()
        dy = _dense_gradient(grads[0])
        g = magnitude_scale(magnitude, norm)
        dx = d_dropped = dw = da = db = dm = None
        dz = torch.empty_like(dy) if not need_m else dy * _flat(kept)
        if need_m:
            per_row = _sum_of_rows(dz, g, offsets)
            divisor = norm if ctx.has_dropout else _invertible(g, dy.dtype) * norm
            dm = (per_row / torch.where(divisor != 0, divisor, torch.ones_like(divisor))).to(magnitude.dtype)
        # Reuse dz's memory: fresh pages would cost more than the product.
        torch.mul(dy, rows_for(g, dy, offsets), out=dz)
        if need_w:
            dw = _factor_gradient(dz, _flat(dropped if ctx.has_dropout else x), weight, offsets)
            if ctx.has_dropout:
                dw += _factor_gradient(dy, _flat(x) - _flat(dropped), weight, offsets)
        if need_b:
            db = _factor_gradient(dz, h, b, offsets).to(b.dtype)
        if need_a or need_x or need_dropped:
            dh = _times(dz, b.to(dy.dtype), offsets, transpose=False).mul_(ctx.scale)
            if need_a:
                da = _gradient_of_a(dh, tokens, a, ctx.token_axis, offsets).to(a.dtype)
            if need_x or need_dropped:
                w = _read_weight(weight, ctx.source, dy.dtype)
                if ctx.has_dropout:
                    dx = _times(dy, w, offsets, transpose=False) if need_x else None
                    # One product for both of W's gradients of x'.
                    into = d_dropped = _times(dz.sub_(dy), w, offsets, transpose=False) if need_dropped else None
                else:
                    into = dx = _times(dz, w, offsets, transpose=False)
                if into is not None:
                    _add_times_(into, dh, a.to(dy.dtype), offsets, transpose=False)
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
        _ignore_offsets(offsets)
        w = _read_weight(weight, source)
        adapter_input = x if dropped is None else dropped
        base = _product_type(adapter_input, w)
        delta = _product_type(_product_type(adapter_input, a), b)
        z = rules.einsum("...o,...o->...o", base, delta, linear_in=((0, 1),))
        names = "...o,o->...o" if magnitude.dim() == 1 else "to,_o->to"
        y = rules.einsum(names, z, magnitude, linear_in=(0, 1))
        if dropped is None:
            return y
        plain = _product_type(x, w)
        return rules.einsum("...o,...o->...o", plain, y, linear_in=((0, 1),))


class _Product(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, source: Callable[[], Tensor] | None, offsets: Tensor | None
    ) -> Tensor:
        ctx.source, ctx.x_shape = source, x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, offsets)
        y = _times(_flat(x), _read_weight(weight, source).to(x.dtype), offsets, transpose=True)
        return _shaped_like(x, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, weight, offsets = ctx.saved_tensors
        need_x, need_w, *_ = ctx.needs_input_grad
        dy = _dense_gradient(grads[0])
        dx = dw = None
        if need_x:
            w = _read_weight(weight, ctx.source).to(dy.dtype)
            dx = _times(dy, w, offsets, transpose=False).view(ctx.x_shape)
        if need_w:
            dw = _factor_gradient(dy, _flat(x), weight, offsets).to(weight.dtype)
        return dx, dw, None, None

    @staticmethod
    def spmd_typecheck(
        *, x: Tensor, weight: Tensor | None, source: Callable[[], Tensor] | None, offsets: Tensor | None
    ) -> Any:
        _ignore_offsets(offsets)
        return _product_type(x, _read_weight(weight, source))


def _stored_or_source(weight: WeightSource) -> tuple[Tensor | None, Callable[[], Tensor] | None]:
    return (weight, None) if isinstance(weight, Tensor) else (None, weight)


def _read_weight(
    weight: Tensor | None, source: Callable[[], Tensor] | None, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the stored weight, or the one that `source` makes, in the type of the product (autocast's may differ)."""
    if weight is not None:
        return weight
    assert source is not None
    return source().detach().to(dtype=dtype)


def _flat(x: Tensor) -> Tensor:
    """[*, n] -> [tokens, n]."""
    return x.reshape(-1, x.shape[-1])


def _shaped_like(x: Tensor, y: Tensor) -> Tensor:
    """y [tokens, n] of x [*, m] -> [*, n]; no view, which autograd would let nobody change in place."""
    if x.dim() == 2:
        return y
    shaped: Tensor = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))
    return shaped


def _tokens_to_keep(x: Tensor, axis: ParallelAxis | None) -> Tensor:
    """Return what is kept of x [N, .., in] for the gradient of A: all of it, or this rank's share of dim 0."""
    return x if axis is None else take_slice(x, axis, 0)


def _gradient_of_a(dh: Tensor, kept: Tensor, a: Tensor, axis: ParallelAxis | None, offsets: Tensor | None) -> Tensor:
    """Compute dA, shaped like A and partial over the axis either way.

    Args:
        dh: [tokens, r], partial over the axis.
        kept: Result of `_tokens_to_keep`.
        a: A [r, in], or [experts, r, in].
        axis: Axis over which tokens are kept; its ranks' dh are summed where their tokens are.
        offsets: As in `Term`.
    """
    if axis is not None:
        dh = reduce_scatter(dh.view(kept.shape[0] * axis.world_size, -1, dh.shape[-1]), axis, 0).flatten(0, 1)
    return _factor_gradient(dh, _flat(kept), a, offsets)


def _dense_gradient(grad: Tensor) -> Tensor:
    """[*, n] -> [tokens, n], contiguous: an expanded gradient (of a sum) would be copied by every product."""
    return _flat(grad).contiguous()


# Products of rows x [T, K] with one matrix [N, K], or with a stack [E, N, K], one for each group of rows. `offsets` [E]
# int32 are the ends of the groups (`group_offsets`), read only where there is a stack. Differentiable: `rows_for` only.


def _times(x: Tensor, w: Tensor, offsets: Tensor | None, *, transpose: bool) -> Tensor:
    """x wᵀ (`transpose`: x [T, K] -> [T, N]), or x w (x [T, N] -> [T, K])."""
    if w.dim() == 2:
        return torch.mm(x, w.t() if transpose else w)
    return grouped_mm(x, w, _ends(offsets), transpose=transpose)


def _add_times_(y: Tensor, x: Tensor, w: Tensor, offsets: Tensor | None, *, transpose: bool) -> Tensor:
    """Add `_times(x, w, ..)` to y in place, and return y."""
    if w.dim() == 2:
        return y.addmm_(x, w.t() if transpose else w)
    grouped_add_mm_(y, x, w, _ends(offsets), transpose=transpose)
    return y


def _factor_gradient(dy: Tensor, x: Tensor, w: Tensor, offsets: Tensor | None) -> Tensor:
    """Compute the gradient of w in y = x wᵀ: dyᵀ x [N, K] over all rows; or [E, N, K], over each group's."""
    if w.dim() == 3:
        return grouped_outer(dy, x, _ends(offsets))
    if dy.shape[-1] > x.shape[-1]:
        # The transpose of xᵀ dy, twice as fast as dyᵀ x on tall dy.
        return torch.mm(x.t(), dy).t()
    return torch.mm(dy.t(), x)


def _type_of_rows(values: Tensor, like: Tensor, offsets: Tensor | None) -> SpmdTypeOf:
    """Return the type of `rows_for`: sharded like the rows of `like` and like the values, else in the values' state."""
    if values.dim() == 1:
        return dims_follow(values)
    (rows, _), (_, columns) = dims_follow(like).spec or (None, None), dims_follow(values).spec or (None, None)
    local = dict(dims_follow(values).local)
    for axis in rows if isinstance(rows, tuple) else () if rows is None else (rows,):
        local[axis] = V
    return SpmdTypeOf(local, PartitionSpec(rows, columns))


@typed_as(_type_of_rows)
def rows_for(values: Tensor, like: Tensor, offsets: Tensor | None) -> Tensor:
    """Return what multiplies the rows of `like` [T, N]: values [N] themselves, or for values [E, N] each row's."""
    return values if values.dim() == 1 else values.index_select(0, group_of_rows(like, _ends(offsets)))


def _sum_of_rows(t: Tensor, like: Tensor, offsets: Tensor | None) -> Tensor:
    """Sum the rows of t [T, N], in the type of `like`: to [N], or to [E, N] group by group, as `like` is."""
    if like.dim() == 1:
        return t.sum(0, dtype=like.dtype)
    return grouped_sum(t.to(like.dtype), _ends(offsets))


def _product_type(x: Any, w: Tensor) -> Any:
    """Return the type of x wᵀ for the type checker."""
    if w.dim() == 2:
        return rules.einsum("...k,nk->...n", x, w, linear_in=(0, 1))
    # The rows of each group meet one matrix: a product over k for every row.
    return rules.einsum("tk,_nk->tn", x, w, linear_in=(0, 1))


def _ignore_offsets(offsets: Tensor | None) -> None:
    """Let the type checker ignore offsets, which count rows and have no state."""
    if offsets is not None:
        rules.ignore(offsets)


def _ends(offsets: Tensor | None) -> Tensor:
    assert offsets is not None, "a stack of matrices needs the ends of the groups"
    return offsets
