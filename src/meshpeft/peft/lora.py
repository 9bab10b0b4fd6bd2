"""LoRA (Hu et al. 2021): y = x Wᵀ + s (x Aᵀ) Bᵀ on linear layers, fused ones included, and on routers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meshpeft.parallel import mp_gather
from meshpeft.peft.adapter import LowRankAdapter
from meshpeft.peft.errors import AdapterError
from meshpeft.peft.fused import Term, fused_lora, product
from meshpeft.peft.method import LowRankPEFT
from meshpeft.peft.wrapper import AdapterTerm, AdapterWrapper, RowProduct, check_ours

__all__ = ["LoRA", "LoRALinear", "LoRATopKRouter", "LowRankWrapper"]


class LowRankWrapper(AdapterWrapper):
    """A linear layer with its terms s (x Aᵀ) Bᵀ added to its output; they run as one term with joint factors."""

    def active_terms(self) -> list[AdapterTerm]:
        """Return the terms that take part in `forward`."""
        return self.terms()

    @property
    def one_adapter(self) -> LowRankAdapter:
        """Adapter of the first active term, whose scale, dropout and layout apply to the joint factors."""
        return self.active_terms()[0].adapter

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A [sum r, in] and B [out, sum r], local, of the one adapter that equals the active terms together."""
        adapters = [term.adapter for term in self.active_terms()]
        scale = adapters[0].scale
        a: list[Tensor] = [adapter.linear_in.weight for adapter in adapters]
        b: list[Tensor] = [
            adapter.linear_out.weight if adapter.scale == scale else adapter.linear_out.weight * (adapter.scale / scale)
            for adapter in adapters
        ]
        return self.join_factors(a, b)

    def join_factors(self, a: list[Tensor], b: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Join the factors of terms on the same rows: A = [A_1; A_2; ..], B = [B_1 B_2 ..]."""
        return (a[0], b[0]) if len(a) == 1 else (torch.cat(a, -2), torch.cat(b, -1))

    @property
    def joins(self) -> bool:
        """Whether the adapter runs between the base's `enter` and `exit`."""
        return self.one_adapter.fused

    def run_fused(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [*, in] after the base's `enter` -> [*, out] before its `exit`."""
        adapter, source, offsets = self.one_adapter, self.weight_source(), self.offsets(args, kwargs)
        if adapter.drops_output:
            return product(x, source, offsets) + adapter.delta(x, *self.factors(), offsets)
        return fused_lora(x, source, adapter.term(x, offsets, self.factors()))

    @property
    def runs_by_rows(self) -> bool:
        """Whether the adapter joins the base's GEMM, and its output is not dropped: that mask is one of all rows."""
        return self.joins and not self.one_adapter.drops_output

    def row_product(self, x: Tensor) -> RowProduct:
        """See `AdapterWrapper`."""
        adapter, source = self.one_adapter, self.weight_source()

        def run(rows: Tensor, dropped: Tensor | None) -> Tensor:
            return fused_lora(rows, source, Term(*self.factors(), adapter.scale, dropped))

        return RowProduct(run, adapter.drop_input(x))

    def run_standalone(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the base and the standalone adapter, and add their outputs."""
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

    A `LinearAdapter` runs inside the layer's GEMM; a `ParallelLinearAdapter` runs standalone, and its output, in the
    state of the layer's own, is added.

    Args:
        to_wrap: Base layer.
        adapter: Adapter on it.

    Raises:
        AdapterError: The adapter is not one of this package.
    """

    adapter: LowRankAdapter

    def __init__(self, to_wrap: nn.Module, adapter: LowRankAdapter) -> None:
        check_ours(type(self), adapter, LowRankAdapter)
        super().__init__(to_wrap, adapter)

    def terms(self) -> list[AdapterTerm]:
        """Return the one term."""
        return [AdapterTerm(self.adapter)]


class LoRATopKRouter(LoRALinear):
    """Adapter wrapper that applies LoRA to router gating logits.

    The router is a module whose `forward` calls its `gating(x)` -> logits [*, experts], as Megatron's `TopKRouter`.
    Only `gating` is replaced, during the call: whatever else the router does before and after (jitter, random logits
    for benchmarks, losses, biases, masks), it does. One without a `forward` has `routing(logits)`.

    Args:
        to_wrap: Router.
        adapter: Adapter on it; in the router's state, which is replicated or on token shards, nothing communicates.
    """

    @property
    def starts_from_weight(self) -> bool:
        """Whether the adapter may start from the router's weight: never, for routers are not quantised."""
        return False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the router on x with adapted logits.

        Args:
            x: [*, hidden].
            args, kwargs: Further arguments of the router.

        Raises:
            AdapterError: The router's `forward` does not call `gating`, so that its adapter would be left out.
        """
        router: Any = self.to_wrap
        own, adapted = router.gating, self._adapter_enabled and not self._is_merged
        calls = 0

        def gating(tokens: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return self._adapted_logits(own(tokens), tokens)

        if type(router).forward is nn.Module.forward:
            return router.routing((gating if adapted else own)(x), *args, **kwargs)
        if not adapted:
            return router(x, *args, **kwargs)
        with _attribute(router, "gating", gating):
            routed = router(x, *args, **kwargs)
        if not calls:
            raise AdapterError(
                f"the forward of {type(router).__name__} does not call its gating, which the adapter joins; "
                "leave the router out of target_modules"
            )
        return routed

    def _adapted_logits(self, logits: Tensor, x: Tensor) -> Tensor:
        """Add the adapter's change to the logits [*, experts] of x [*, hidden].

        The adapter computes in the type of the logits where that is wider: routers of narrow models use float32.
        """
        delta: Tensor = self.adapter(x.to(torch.promote_types(x.dtype, logits.dtype)))
        return logits + delta.to(logits.dtype)


@contextmanager
def _attribute(module: nn.Module, name: str, value: object) -> Iterator[None]:
    """Set an attribute on an instance inside the context; it shadows that of the class."""
    own = vars(module)
    before = {name: own[name]} if name in own else {}
    own[name] = value
    try:
        yield
    finally:
        del own[name]
        own.update(before)


@dataclass
class LoRA(LowRankPEFT):
    """Low-rank adaptation: one adapter on each target layer, fused layers included.

    By default these are `linear_qkv`, `linear_proj`, `linear_fc1` and `linear_fc2` of every block, those of experts
    included (`ModuleMatcher.target_modules`). On `linear_qkv` and `linear_fc1` the parts (q, k, v; gate, up) share A
    and have their own rows of B. Routers that are targets get a `LoRATopKRouter`. Options as in `LowRankPEFT`.

    Example:
        >>> model = LoRA(target_modules=["*.layers.0.*.linear_qkv"], dim=8)(model)
    """

    def adapt(self, base: nn.Module, full_name: str) -> AdapterWrapper:
        """Return a `LoRALinear`."""
        return LoRALinear(base, self.make_adapter(base, full_name))

    def adapt_router(self, router: nn.Module, full_name: str) -> AdapterWrapper:
        """Return a `LoRATopKRouter`."""
        return LoRATopKRouter(router, self.make_adapter(router, full_name))
