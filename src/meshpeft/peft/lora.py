"""LoRA (Hu et al. 2021): one low-rank adapter per layer, also on fused ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from meshpeft.peft.lora_linear import LoRALinear
from meshpeft.peft.low_rank import LowRankPEFT
from meshpeft.peft.router import LoRATopKRouter
from meshpeft.peft.wrapper import AdapterWrapper

__all__ = ["LoRA"]


@dataclass
class LoRA(LowRankPEFT):
    """Low-rank adaptation: one adapter on each target layer, fused layers included.

    On `linear_qkv` and `linear_fc1` the parts (q, k, v; gate, up) share A and have their own rows of B. Routers that
    are targets get a `LoRATopKRouter`. Options as in `LowRankPEFT`.

    Example:
        >>> model = LoRA(target_modules=["*.layers.0.*.linear_qkv"], dim=8)(model)
    """

    def adapt(self, base: nn.Module, full_name: str) -> AdapterWrapper:
        """A `LoRALinear`."""
        return LoRALinear(base, self.make_adapter(base, full_name))

    def adapt_router(self, router: nn.Module, full_name: str) -> AdapterWrapper:
        """A `LoRATopKRouter`."""
        return LoRATopKRouter(router, self.make_adapter(router, full_name))
