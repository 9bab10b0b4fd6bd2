"""Several LoRA adapters on one layer, by name; those that are enabled are summed.

Summed adapters are one adapter whose factors are theirs, side by side: A = [A_1; A_2; ..], B = [B_1 B_2 ..]. It runs
as one, in the same fused function and the same parallel states as a single one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from meshpeft.peft.adapters import LowRankAdapter
from meshpeft.peft.canonical_lora import ModuleDict
from meshpeft.peft.errors import AdapterError
from meshpeft.peft.lora_linear import LowRankWrapper
from meshpeft.peft.wrapper import AdapterTerm, check_ours

__all__ = ["NamedLoRALinear"]


class NamedLoRALinear(LowRankWrapper):
    """A layer with LoRA adapters that have names; without an enabled one it is the base layer.

    Args:
        to_wrap: the base layer.
    """

    adapter: ModuleDict

    def __init__(self, to_wrap: nn.Module) -> None:
        super().__init__(to_wrap, ModuleDict())
        self._disabled: set[str] = set()

    @property
    def adapter_names(self) -> list[str]:
        """Names, in the order in which they were added."""
        return list(self.adapter)

    def named_adapters(self) -> Iterator[tuple[str, LowRankAdapter]]:
        """Every adapter with its name."""
        for name in self.adapter:
            yield name, cast(LowRankAdapter, self.adapter[name])

    def terms(self) -> list[AdapterTerm]:
        """Return one term for each adapter, also for those that are switched off."""
        return [AdapterTerm(adapter, name=name, path=name) for name, adapter in self.named_adapters()]

    def add(self, name: str, adapter: LowRankAdapter) -> None:
        """Add an adapter to those of the layer; errors as in `check_can_add`."""
        check_ours(type(self), adapter, LowRankAdapter)
        super().add(name, adapter)
        self.adapter[name] = adapter

    def check_can_add(self, name: str, fused: bool) -> None:
        """Check that another adapter can be added to the layer.

        Raises:
            AdapterError: The name is taken; the others run inside the layer's GEMM and this one would not, or the
                other way round.
        """
        if name in self.adapter:
            raise AdapterError(f"has an adapter {name!r} already; choose another name")
        if any(other.fused != fused for _, other in self.named_adapters()):
            where = ("inside its GEMM", "standalone")
            raise AdapterError(f"has adapters that run {where[fused]}, and {name!r} would run {where[not fused]}")

    def set_enabled(self, name: str, enabled: bool) -> None:
        """Let the adapter of this name take part in `forward`, or not.

        Raises:
            AdapterError: adapters are merged into the base's weight.
        """
        self.check_switchable()
        if enabled and not self._adapter_enabled:  # the layer was switched off as a whole: the others stay off
            self._disabled.update(self.adapter)
            self.enable_adapter_layers()
        (self._disabled.discard if enabled else self._disabled.add)(name)

    def is_enabled(self, name: str) -> bool:
        """Whether the adapter of this name takes part in `forward`."""
        return self._adapter_enabled and name in self.adapter and name not in self._disabled

    def _enabled(self) -> list[LowRankAdapter]:
        return [adapter for name, adapter in self.named_adapters() if name not in self._disabled]

    @property
    def one_adapter(self) -> LowRankAdapter:
        """The first enabled adapter, whose scale the joint factors have."""
        return self._enabled()[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [sum r, in] and B [out, sum r] of the one adapter that equals the enabled ones together."""
        adapters = self._enabled()
        a: list[Tensor] = [adapter.linear_in.weight for adapter in adapters]
        b: list[Tensor] = [adapter.linear_out.weight for adapter in adapters]
        if len(adapters) == 1:
            return a[0], b[0]
        scale = adapters[0].scale
        scaled = [
            factor if adapter.scale == scale else factor * (adapter.scale / scale)
            for factor, adapter in zip(b, adapters, strict=True)
        ]
        return torch.cat(a, -2), torch.cat(scaled, -1)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output for x, plus that of every enabled adapter."""
        if not self._enabled():
            return self.to_wrap(x, *args, **kwargs)
        return super().forward(x, *args, **kwargs)

    def merged_weights(self) -> Iterator[Tensor]:
        """W + sum of s B A over the enabled adapters, local, in float32 or wider; of grouped experts each."""
        if self._enabled():
            yield from super().merged_weights()
            return
        for (weight,) in self.matrices():
            yield weight.to(torch.promote_types(weight.dtype, torch.float32))
