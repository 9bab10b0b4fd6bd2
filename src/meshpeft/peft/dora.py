"""DoRA, weight-decomposed low-rank adaptation (Liu et al. 2024): y = m / |W + s B A| * (W + s B A) x."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meshpeft.parallel import LinearLayout, gather_features, layout_of
from meshpeft.peft.dora_functional import fused_dora, magnitude_scale, scale_of
from meshpeft.peft.errors import AdapterError
from meshpeft.peft.functional import WeightSource
from meshpeft.peft.low_rank import LowRankPEFT
from meshpeft.peft.magnitude import AdapterWithMagnitude, GroupedExpertDoRAAdapter, ParallelLinearDoRAAdapter
from meshpeft.peft.products import rows_for
from meshpeft.peft.row_norms import RowNorms
from meshpeft.peft.wrapper import AdapterTerm, AdapterWrapper, check_ours

__all__ = ["DoRA", "DoRALinear"]


class DoRALinear(AdapterWrapper):
    """An adapter wrapper that is designed to be used with DoRA.

    Works on every layer type: inside the base's GEMM where the adapter is a fused one, else beside the base. A bias is
    never scaled. Dropout follows the documented formula; beside a base it calls the base a second time.

    Args:
        to_wrap: the base linear module.
        adapter: its adapter; the magnitude is set to the row norms of the weight (and the adapter's product).
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
        """Switch between training and evaluation; weights may be swapped on that occasion, so norms are forgotten."""
        if mode != self.training:
            self._norms.clear()
        super().train(mode)
        return self

    def _get_weight_norm(self) -> Tensor:
        """Calculate the norm of the combined weight matrix (W_0 + B A): its full rows, [out] or [experts, out] local.

        Cached (see `RowNorms`); a collective of [out] where the input features are divided, and it is computed anew.
        """
        adapter, source = self.adapter, self.weight_source()
        identity = source if isinstance(source, Tensor) else next(self.to_wrap.parameters(), adapter.linear_in.weight)
        a, b = adapter.linear_in.weight, adapter.linear_out.weight
        return self._norms.get(source, identity, a, b, adapter.scale, self._norm_axis, _read)

    def terms(self) -> list[AdapterTerm]:
        """Return the one term, with a magnitude."""
        return [AdapterTerm(self.adapter)]

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """Set m to the row norms as they are now, so that the layer multiplies by W + s B A."""
        self._norms.clear()  # a packed weight may have given up a part: its codes are as they were
        self.adapter.weight_magnitude.copy_(self._get_weight_norm())

    def forget_norms(self) -> None:
        """Recompute the norms when they are needed next: a parameter was written without a trace (see `RowNorms`)."""
        self._norms.clear()

    def inside(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [*, in] after the base's `enter` -> [*, out] before its `exit`."""
        adapter, norm = self.adapter, self._get_weight_norm()
        return fused_dora(
            x,
            self.weight_source(),
            adapter.linear_in.weight,
            adapter.linear_out.weight,
            adapter.get_weight_magnitude(),
            norm,
            adapter.scale,
            adapter.drop_input(x),
            self._norms,
            adapter.token_axis,
            self.offsets(args, kwargs),
        )

    def beside(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """W x + (g - 1) W x' + g s B A x', from the outputs of base and adapter."""
        adapter = self.adapter
        if self.gathers_now(kwargs):
            raise AdapterError("DoRA beside a layer that gathers its output is not possible; gather it afterwards")
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
        g = self._as_output(scale_of(adapter.get_weight_magnitude(), self._get_weight_norm(), self._norms))
        g = rows_for(g, delta, offsets)
        # In the type of g, and rounded once; see dora_functional.
        return base.rebuild((base.linear + (g - 1) * again + g * delta).to(base.linear.dtype))

    def _as_output(self, local: Tensor) -> Tensor:
        """What multiplies the output features beside the base, or is added to them: whole where the base gathers."""
        layout = self.adapter.layout
        return gather_features(local, layout) if layout.gather_output else local

    def merged_weights(self) -> Iterator[Tensor]:
        """Yield m / |W + s B A| * (W + s B A), local, in float32 or wider; the norms are made anew."""
        self.forget_norms()
        adapter, norm = self.adapter, self._get_weight_norm()
        g = magnitude_scale(adapter.weight_magnitude.detach(), norm).unsqueeze(-1)
        for weight, a, b, rows in self.matrices(adapter.linear_in.weight, adapter.linear_out.weight, g):
            combined = torch.addmm(weight.to(norm.dtype), b.to(norm.dtype), a.to(norm.dtype), alpha=adapter.scale)
            yield combined.mul_(rows)


def _read(source: WeightSource) -> Tensor:
    return source if isinstance(source, Tensor) else source()


@dataclass
class DoRA(LowRankPEFT):
    """Weight-decomposed low-rank adaptation, on the targets of `LoRA`. Options as in `LowRankPEFT`; alpha is 64.

    Raises:
        AdapterError: `dropout_position` is not `pre`; `a2a_experimental`.
    """

    alpha: float = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout_position != "pre":
            raise AdapterError(f"dropout_position={self.dropout_position!r}: DoRA drops its input; use 'pre'")
        if self.a2a_experimental:
            raise AdapterError("a2a_experimental divides the rows of B, of which DoRA's norm needs all; leave it off")

    def make_adapter(
        self,
        base: nn.Module,
        full_name: str,
        layout: LinearLayout | None = None,
        path: str = "adapter",
        target: str | None = None,
    ) -> AdapterWithMagnitude:
        """The adapter module for one layer; see `LowRankPEFT`."""
        options = self.adapter_options(base, full_name, target)
        if layout_of(base).is_stacked:
            shared, fused = self.share_expert_adapters, self.joins(base)
            return GroupedExpertDoRAAdapter(base, share_expert_adapters=shared, fused=fused, path=path, **options)
        return ParallelLinearDoRAAdapter(
            **self.parallel_options(base, options, layout), path=path, fused=self.joins(base)
        )

    def adapt(self, base: nn.Module, full_name: str) -> AdapterWrapper:
        """A `DoRALinear`."""
        return DoRALinear(base, self.make_adapter(base, full_name))
