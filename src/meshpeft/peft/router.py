"""LoRA on the router of a mixture of experts: on its logits, before tokens are assigned."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from meshpeft.peft.lora_linear import LoRALinear

__all__ = ["LoRATopKRouter"]


class LoRATopKRouter(LoRALinear):
    """Adapter wrapper that applies LoRA to router gating logits.

    The router is a module with `gating(x)` -> logits [*, experts] and `routing(logits)` -> what it returns, as
    Megatron's `TopKRouter`; its `apply_input_jitter` and `_maintain_float32_expert_bias` are used if it has them.

    Args:
        to_wrap: the router.
        adapter: its adapter; in the router's state, which is replicated or on token shards, nothing communicates.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the router returns for x, with adapted logits.

        Args:
            x: [*, hidden].
            args, kwargs: handed to the router's `routing`.
        """
        router: Any = self.to_wrap
        if not self._adapter_enabled or self._is_merged:
            return router(x, *args, **kwargs)
        if callable(getattr(router, "_maintain_float32_expert_bias", None)):
            router._maintain_float32_expert_bias()
        if callable(getattr(router, "apply_input_jitter", None)):
            x = router.apply_input_jitter(x)
        logits = router.gating(x)
        return router.routing(logits + self.adapter(x).to(logits.dtype), *args, **kwargs)
