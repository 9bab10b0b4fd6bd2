"""DoRA, weight-decomposed low-rank adaptation (Liu et al. 2024): y = m / |W + s B A| * (W + s B A) x.

The row norms of W + s B A are computed without W + s B A:

    |w_i + s b_i A|^2 = |w_i|^2 + 2 s b_i . (A w_i) + s^2 b_i (A Aᵀ) b_iᵀ

Every term is a sum over the input features: where these are sharded, the three local terms are added up first and one
all-reduce of [out] completes them. They are computed in float32 or the widest type of the operands, clamped at zero
before the root (rounding may leave a square a little below), never differentiated, and kept until something that they
depend on changes (`RowNorms`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from spmd_types import rules
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from meshpeft.parallel import LinearLayout, ParallelAxis, Shard, TensorLayout, convert_parts, layout_of, set_layout
from meshpeft.parallel.sharded_base import BlockTensor
from meshpeft.parallel.states import all_reduce
from meshpeft.peft.adapter import LowRankAdapter
from meshpeft.peft.errors import AdapterError
from meshpeft.peft.experts import GroupedExpertLinearAdapter
from meshpeft.peft.fused import Term, WeightSource, fused_dora, magnitude_scale, rows_for
from meshpeft.peft.method import LowRankPEFT
from meshpeft.peft.standalone import ParallelLinearAdapter, decide_gradient_sum, summed_in_backward
from meshpeft.peft.wrapper import AdapterTerm, AdapterWrapper, RowProduct, check_ours

__all__ = [
    "AdapterWithMagnitude",
    "DoRA",
    "DoRALinear",
    "GroupedExpertDoRAAdapter",
    "ParallelLinearDoRAAdapter",
    "RowNorms",
    "adapted_row_norms",
]


# Rows of a narrow weight that are widened at a time.
_ROWS = 4096


def _wide(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _pieces(weight: Tensor) -> tuple[Tensor, ...]:
    """Split a matrix into some rows, or a stack into some experts, to make nothing of the size of all of them."""
    return weight.split(_ROWS if weight.dim() == 2 else max(1, _ROWS // weight.shape[1]))


def _squared_norms(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """|w_i|^2 [.., out], of the local columns."""
    return torch.cat([rows.to(dtype).square().sum(-1) for rows in _pieces(weight)])


def _products(weight: Tensor, a: Tensor) -> Tensor:
    """Return A w_i for every row, [.., out, r], of the local columns; `a` has the wide type."""
    if weight.dtype == a.dtype:
        return weight @ a.mT
    pieces = _pieces(weight)
    factors = a.split([len(piece) for piece in pieces]) if a.dim() == 3 else [a] * len(pieces)
    return torch.cat([piece.to(a.dtype) @ factor.mT for piece, factor in zip(pieces, factors, strict=True)])


@torch.no_grad()
def adapted_row_norms(
    weight: Tensor, a: Tensor, b: Tensor, scale: float, axis: ParallelAxis | None, squared: Tensor | None = None
) -> Tensor:
    """Return |w_i + s b_i A| for every local row.

    Args:
        weight: W [out, in], local; S(-1) on `axis`, if one is given; or a stack [experts, out, in].
        a: A [r, in], S(-1) likewise; for a stack, one or [experts, r, in].
        b: B [out, r], R on `axis`; likewise.
        scale: s.
        axis: Axis that shards the input features, or `None`.
        squared: |w_i|^2 [out] of the local columns, if they are known.

    Returns:
        [out], or [experts, out], float32 or wider; the same on every rank of `axis`. A collective over it.
    """
    dtype = _wide(weight, a, b)
    a, b = a.to(dtype), b.to(dtype)
    if squared is None:
        squared = _squared_norms(weight, dtype)
    # s b_i . (2 A w_i + s (A Aᵀ) b_i)
    change = _products(weight, a).mul_(2).add_(b @ (a @ a.mT), alpha=scale).mul_(b).sum(-1)
    total = torch.add(squared.to(dtype), change, alpha=scale)
    if axis is not None:
        total = all_reduce(total, axis)
    return total.clamp_(min=0).sqrt_()


class RowNorms:
    """Row norms |W + s B A| of one adapted layer, kept from one call of the layer to the next.

    A call of the layer (`get`) recomputes them when they may have changed since they were computed:

    * W (of a packed layer, its codes), A or B is another tensor, or has another storage, type, device or version
      (PyTorch's counter of in-place changes); or the scale is another one.
    * W, A or B is a view of a larger buffer: others may write into the buffer, so every call recomputes.
    * A backward pass ran through the layer, and the gradients of A and B are `None` now: an optimizer stepped and
      cleared them. Some optimizers and engines write parameters without counting it in the version.
    * The layer went from `train()` to `eval()` or back: trainers swap weights there, for an average or for those of a
      checkpoint.
    * `clear` was called: by `DoRALinear.forget_norms` and `reset_magnitude`, and before a merge. A copied or unpickled
      layer starts without norms.

    |w_i|^2 alone is kept longer, while W and the type of the sums are the same: a step changes A and B only.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the norms; the next call of the layer recomputes them."""
        self._key: tuple[object, ...] | None = None
        self._norms: Tensor | None = None
        self._weight_key: tuple[object, ...] | None = None
        self._squared: Tensor | None = None
        self._held: tuple[Tensor, ...] = ()
        self._backward_ran = False

    def __deepcopy__(self, memo: dict[int, object]) -> RowNorms:
        return RowNorms()

    def __reduce__(self) -> tuple[type[RowNorms], tuple[()]]:
        return RowNorms, ()

    def after_backward(self) -> None:
        """Record that a backward pass ran through the layer: an optimizer step may follow."""
        self._backward_ran = True

    def get(
        self,
        weight: WeightSource,
        identity: Tensor,
        a: Tensor,
        b: Tensor,
        scale: float,
        axis: ParallelAxis | None,
    ) -> Tensor:
        """Return the norms [out] of W + s B A, computed when one of the tensors may have changed.

        Args:
            weight: W, or a function that makes it.
            identity: Stored tensor whose change means another W.
            a, b, scale, axis: As in `adapted_row_norms`.
        """
        weight_key = _fingerprint(identity)
        key = (weight_key, _fingerprint(a), _fingerprint(b), scale)
        may_have_stepped = self._backward_ran and a.grad is None and b.grad is None
        if self._norms is None or may_have_stepped or None in key or key != self._key:
            local = weight if isinstance(weight, Tensor) else weight()
            dtype = _wide(local, a, b)
            if self._squared is None or weight_key is None or self._weight_key != (weight_key, dtype):
                self._squared, self._weight_key = _squared_norms(local.detach(), dtype), (weight_key, dtype)
            self._norms = adapted_row_norms(local.detach(), a, b, scale, axis, self._squared)
            # The factors are held so that no other tensor can get their address.
            self._key, self._held, self._backward_ran = key, (a.detach(), b.detach()), False
        return self._norms


def _fingerprint(tensor: Tensor) -> tuple[object, ...] | None:
    """Return what changes when a tensor's values do; `None` if nothing is certain to."""
    if isinstance(tensor, BlockTensor):
        return id(tensor.store), tensor.places, tensor.store.changes, tensor.dtype, tensor.device
    try:
        address = tensor.data_ptr()
        if tensor.untyped_storage().nbytes() > tensor.nbytes:
            return None
    except RuntimeError:  # wrapper tensors have no storage of their own
        address = 0
    return id(tensor), address, tensor._version, tensor.dtype, tensor.device


class AdapterWithMagnitude(LowRankAdapter):
    """A low-rank adapter with `weight_magnitude` m [out]; on grouped experts [experts, out].

    m is sharded like the output of a column-parallel base and replicated for a row-parallel one; its checkpoint
    entries follow from that. Its gradient is summed over the axes that shard tokens (dp and cp; edp for experts); and
    over the layer's own axis (tp; etp) where m is replicated and the y that it multiplies is not I. The table: see
    `LinearLayout.magnitude` (`parallel/layout.py`).
    """

    weight_magnitude: nn.Parameter
    magnitude_layout: TensorLayout
    _sum_m: tuple[ParallelAxis, ...] = ()

    def init_weight_magnitude(self, value: Tensor) -> None:
        """Initialize weight_magnitude with shape (d,), where d is the output dim of the linear layer.

        It keeps the type of the values, whatever the factors have: row norms rounded to bfloat16 would change the
        model before its first step, and most optimizer steps would be lost in them.

        Args:
            value: This rank's slice of the initial values, [out] or [experts, out]; row norms are float32 or wider.
        """
        layout, self._sum_m = self._place_magnitude()
        if tuple(value.shape) != layout.local_shape:
            raise AdapterError(f"weight_magnitude has shape {layout.local_shape}; got values of {tuple(value.shape)}")
        self.magnitude_layout = layout
        self.weight_magnitude = nn.Parameter(value.detach().clone())
        set_layout(self.weight_magnitude, layout)

    def _place_magnitude(self) -> tuple[TensorLayout, tuple[ParallelAxis, ...]]:
        """Return the layout of m, and the axes over which its gradient is summed inside the backward pass."""
        return self.layout.magnitude(), ()

    @property
    def magnitude(self) -> nn.Parameter | None:
        """DoRA's m, [out] or [experts, out] local."""
        return self.weight_magnitude

    def get_weight_magnitude(self) -> Tensor:
        """Public function to get the weight magnitude parameter, as it enters the forward pass."""
        return summed_in_backward(self.weight_magnitude, self._sum_m)


class ParallelLinearDoRAAdapter(AdapterWithMagnitude, ParallelLinearAdapter):
    """Adapter class for DoRA to handle the additional weight_magnitude parameter."""

    def init_weight_magnitude(self, value: Tensor) -> None:
        """See `AdapterWithMagnitude`."""
        super().init_weight_magnitude(value)
        self._mark(self.weight_magnitude)

    def _place_magnitude(self) -> tuple[TensorLayout, tuple[ParallelAxis, ...]]:
        stated = self.layout.magnitude(inside=self.fused)
        return decide_gradient_sum(stated, self.layout, inside=self.fused, marked=self._marks)


class GroupedExpertDoRAAdapter(AdapterWithMagnitude, GroupedExpertLinearAdapter):
    """DoRA's adapter of grouped experts: each expert has its own m, also where A and B serve all of them."""

    def _place_magnitude(self) -> tuple[TensorLayout, tuple[ParallelAxis, ...]]:
        return decide_gradient_sum(self.layout.magnitude(), self.layout, inside=self.fused)


class _MagnitudeScale(Function):
    """`magnitude_scale` with a type for the type checker: the norm has none, being made outside the model."""

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


def _scale_of(magnitude: Tensor, norm: Tensor, norms: RowNorms) -> Tensor:
    """`magnitude_scale`, differentiable in the magnitude and in its state; `norms` counts the backward passes."""
    g: Tensor = _MagnitudeScale.apply(magnitude, norm, norms)
    return g


class DoRALinear(AdapterWrapper):
    """An adapter wrapper that is designed to be used with DoRA.

    Works on every layer type: inside the base's GEMM where the adapter is fused, else standalone. A bias is never
    scaled. Dropout follows the documented formula; standalone it calls the base a second time.

    Args:
        to_wrap: Base linear module.
        adapter: Adapter on it; the magnitude is set to the row norms of the weight (and the adapter's product).
    """

    adapter: AdapterWithMagnitude

    def __init__(self, to_wrap: nn.Module, adapter: AdapterWithMagnitude) -> None:
        check_ours(type(self), adapter, AdapterWithMagnitude)
        super().__init__(to_wrap, adapter)
        layout = adapter.layout
        if adapter.dropout_position != "pre":
            raise AdapterError("DoRA needs dropout_position='pre': its formula drops the input")
        if not adapter.is_linear:
            raise AdapterError(
                "DoRA needs activation='identity': it takes the norm of W + s B A, a sum that an activation between A "
                "and B is not part of"
            )
        self._norm_axis = layout.axis if layout.shard == "in" else None
        self._norms = RowNorms()
        adapter.init_weight_magnitude(self._get_weight_norm())

    def train(self, mode: bool = True) -> DoRALinear:
        """Switch between training and evaluation; norms are recomputed then, for weights may be swapped."""
        if mode != self.training:
            self._norms.clear()
        super().train(mode)
        return self

    def _get_weight_norm(self) -> Tensor:
        """Calculate the norm of the combined weight matrix (W_0 + B A): its full rows, [out] or [experts, out] local.

        Cached (see `RowNorms`); recomputing them is a collective of [out] where the input features are sharded.
        """
        adapter, source = self.adapter, self.weight_source()
        identity = source if isinstance(source, Tensor) else next(self.to_wrap.parameters(), adapter.linear_in.weight)
        a, b = adapter.linear_in.weight, adapter.linear_out.weight
        return self._norms.get(source, identity, a, b, adapter.scale, self._norm_axis)

    def terms(self) -> list[AdapterTerm]:
        """Return the one term, with a magnitude."""
        return [AdapterTerm(self.adapter)]

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """Set m to the row norms as they are now, so that the layer multiplies by W + s B A."""
        self._norms.clear()  # PiSSA may have moved a part of a packed weight: its codes are as they were
        self.adapter.weight_magnitude.copy_(self._get_weight_norm())

    def forget_norms(self) -> None:
        """Recompute the norms when they are needed next: a parameter was written without a trace (see `RowNorms`)."""
        self._norms.clear()

    def run_fused(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [*, in] after the base's `enter` -> [*, out] before its `exit`, in one autograd function."""
        adapter, norm = self.adapter, self._get_weight_norm()
        term = adapter.term(x, self.offsets(args, kwargs))
        magnitude = adapter.get_weight_magnitude()
        return fused_dora(x, self.weight_source(), term, magnitude, norm, self._norms.after_backward)

    @property
    def runs_by_rows(self) -> bool:
        """Whether the adapter joins the base's GEMM."""
        return self.joins

    def row_product(self, x: Tensor) -> RowProduct:
        """See `AdapterWrapper`."""
        adapter, source, norm = self.adapter, self.weight_source(), self._get_weight_norm()
        a, b = adapter.linear_in.weight, adapter.linear_out.weight

        def run(rows: Tensor, dropped: Tensor | None) -> Tensor:
            magnitude, term = adapter.get_weight_magnitude(), Term(a, b, adapter.scale, dropped)
            return fused_dora(rows, source, term, magnitude, norm, self._norms.after_backward)

        return RowProduct(run, adapter.drop_input(x))

    def run_standalone(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """W x + (g - 1) W x' + g s B A x', from the outputs of base and adapter."""
        adapter = self.adapter
        if self.gathers_now(kwargs):
            raise AdapterError("DoRA on a foreign layer that gathers its output is not possible; gather it afterwards")
        base = self.base_linear_forward(x, *args, **kwargs)
        adapter_input = x if base.layernorm is None else base.layernorm
        dropped = adapter.drop_input(adapter_input)
        again = base.linear
        if dropped is not None:
            if base.layernorm is not None:
                raise AdapterError(
                    f"DoRA with dropout on {type(self.to_wrap).__name__}, which contains a layer norm: its product "
                    "cannot be had for a dropped input; set dropout=0"
                )
            adapter_input = dropped
            again = self.base_linear_forward(dropped, *args, **kwargs).linear
        bias, offsets = self.layer_type.bias(self.to_wrap), self.offsets(args, kwargs)
        if base.bias is None and isinstance(bias, Tensor) and bias.numel():
            again = again - rows_for(self._as_output(bias), again, offsets)  # the base added it itself
        delta = adapter.delta_of_dropped(adapter_input, adapter.linear_in.weight, adapter.linear_out.weight, offsets)
        g = self._as_output(_scale_of(adapter.get_weight_magnitude(), self._get_weight_norm(), self._norms))
        g = rows_for(g, delta, offsets)
        # In the type of g, and rounded once; see `fused`.
        return base.rebuild((base.linear + (g - 1) * again + g * delta).to(base.linear.dtype))

    def _as_output(self, local: Tensor) -> Tensor:
        """Return values [out] of the local rows for the base's output features: gathered where the base gathers."""
        layout = self.adapter.layout
        if layout.shard != "out":
            return local
        return convert_parts(local, Shard(-1), layout.y, layout.axis, layout.fused_parts)

    def merged_weights(self) -> Iterator[Tensor]:
        """Yield m / |W + s B A| * (W + s B A), local, in float32 or wider; the norms are recomputed."""
        self.forget_norms()
        adapter, norm = self.adapter, self._get_weight_norm()
        g = magnitude_scale(adapter.weight_magnitude.detach(), norm).unsqueeze(-1)
        for weight, a, b, rows in self.matrices(adapter.linear_in.weight, adapter.linear_out.weight, g):
            combined = torch.addmm(weight.to(norm.dtype), b.to(norm.dtype), a.to(norm.dtype), alpha=adapter.scale)
            yield combined.mul_(rows)


@dataclass
class DoRA(LowRankPEFT):
    """Weight-decomposed low-rank adaptation.

    On the default targets of `ModuleMatcher` (`peft/matching.py`); options as in `LowRankPEFT`, but alpha is 64.

    Raises:
        AdapterError: `dropout_position` is not `pre`; `a2a_experimental`.
    """

    alpha: float = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout_position != "pre":
            raise AdapterError(f"dropout_position={self.dropout_position!r}: DoRA drops its input; use 'pre'")
        if self.a2a_experimental:
            raise AdapterError("a2a_experimental shards the rows of B, of which DoRA's norm needs all; leave it off")

    def make_adapter(
        self,
        base: nn.Module,
        full_name: str,
        layout: LinearLayout | None = None,
        path: str = "adapter",
        target: str | None = None,
    ) -> AdapterWithMagnitude:
        """Make the adapter module for one layer; see `LowRankPEFT`."""
        options = self.adapter_options(base, full_name, target)
        if layout_of(base).is_stacked:
            shared, fused = self.share_expert_adapters, self.joins(base)
            return GroupedExpertDoRAAdapter(base, share_expert_adapters=shared, fused=fused, path=path, **options)
        return ParallelLinearDoRAAdapter(
            **self.parallel_options(base, options, layout), path=path, fused=self.joins(base)
        )

    def adapt(self, base: nn.Module, full_name: str) -> AdapterWrapper:
        """Return a `DoRALinear`."""
        return DoRALinear(base, self.make_adapter(base, full_name))
