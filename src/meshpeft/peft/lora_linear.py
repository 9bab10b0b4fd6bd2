"""Layers with a LoRA adapter (Hu et al. 2021): y = x W^T + s (x A^T) B^T."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from meshpeft.parallel import mp_gather
from meshpeft.peft.adapters import LowRankAdapter
from meshpeft.peft.functional import fused_lora, product
from meshpeft.peft.wrapper import AdapterTerm, AdapterWrapper, check_ours

__all__ = ["LoRALinear", "LowRankWrapper"]


class LowRankWrapper(AdapterWrapper):
    """A linear layer to whose output s (x A^T) B^T is added; a subclass says where A and B come from."""

    @property
    def one_adapter(self) -> LowRankAdapter:
        """The adapter whose scale, dropout and place count."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r], local."""
        raise NotImplementedError

    @property
    def joins(self) -> bool:
        """Whether the adapter runs between the base's `enter` and `exit`."""
        return self.one_adapter.fused

    def inside(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [*, in] after the base's `enter` -> [*, out] before its `exit`."""
        a, b = self.factors()
        adapter, source, offsets = self.one_adapter, self.weight_source(), self.offsets(args, kwargs)
        if adapter.drops_output:
            weight = source if isinstance(source, Tensor) else source()
            return product(x, weight, offsets) + adapter.delta(x, a, b, offsets)
        dropped = adapter.drop_input(x)
        return fused_lora(x, source, a, b, adapter.scale, dropped, adapter.token_axis, offsets)

    def beside(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base's output plus the adapter's."""
        base = self.base_linear_forward(x, *args, **kwargs)
        adapter_input = x if base.layernorm is None else base.layernorm
        delta = self.one_adapter.delta(adapter_input, *self.factors(), self.offsets(args, kwargs))
        if self.gathers_now(kwargs):
            delta = mp_gather(delta, -1, self.one_adapter.layout.axis)
        return base.rebuild(base.linear + delta)

    def merged_weights(self) -> Iterator[Tensor]:
        """W + s B A, local, in float32 or wider; of grouped experts one after the other."""
        scale = self.one_adapter.scale
        for weight, a, b in self.matrices(*self.factors()):
            wide = torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.float32)
            yield torch.addmm(weight.to(wide), b.to(wide), a.to(wide), alpha=scale)


class LoRALinear(LowRankWrapper):
    """A linear layer and its LoRA adapter.

    A `LinearAdapter` joins the layer between `enter` and `exit`; a `ParallelLinearAdapter` runs beside it and its
    output, in the state of the layer's own, is added.

    Args:
        to_wrap: the base layer.
        adapter: its adapter.

    Raises:
        AdapterError: the adapter is not one of this package.
    """

    adapter: LowRankAdapter

    def __init__(self, to_wrap: nn.Module, adapter: LowRankAdapter) -> None:
        check_ours(type(self), adapter, LowRankAdapter)
        super().__init__(to_wrap, adapter)

    def terms(self) -> list[AdapterTerm]:
        """Return the one term."""
        return [AdapterTerm(self.adapter)]

    @property
    def one_adapter(self) -> LowRankAdapter:
        """The adapter itself."""
        return self.adapter

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r], local."""
        return self.adapter.linear_in.weight, self.adapter.linear_out.weight
