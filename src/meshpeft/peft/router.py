"""LoRA on the router of a mixture of experts: on its logits, before tokens are assigned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from meshpeft.peft.errors import AdapterError
from meshpeft.peft.lora_linear import LoRALinear

__all__ = ["LoRATopKRouter"]


class LoRATopKRouter(LoRALinear):
    """Adapter wrapper that applies LoRA to router gating logits.

    The router is a module whose `forward` calls its `gating(x)` -> logits [*, experts], as Megatron's `TopKRouter`.
    Only `gating` is replaced, for the length of a call: whatever else the router does before and after (jitter,
    random logits for benchmarks, losses, biases, masks), it does. One without a `forward` has `routing(logits)`.

    Args:
        to_wrap: the router.
        adapter: its adapter; in the router's state, which is replicated or on token shards, nothing communicates.
    """

    @property
    def starts_from_weight(self) -> bool:
        """Whether the adapter may start from the router's weight: never, for routers are not quantised."""
        return False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the router returns for x, with adapted logits.

        Args:
            x: [*, hidden].
            args, kwargs: handed to the router.

        Raises:
            AdapterError: the router's `forward` does not call `gating`, so that its adapter would be left out.
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
        """Logits [*, experts] of x [*, hidden] -> those with the adapter's change.

        The adapter computes in the type of the logits where that is wider: routers of narrow models use float32.
        """
        delta: Tensor = self.adapter(x.to(torch.promote_types(x.dtype, logits.dtype)))
        return logits + delta.to(logits.dtype)


@contextmanager
def _attribute(module: nn.Module, name: str, value: object) -> Iterator[None]:
    """Let an instance have an attribute of its own, in the place of its class's."""
    own = vars(module)
    before = {name: own[name]} if name in own else {}
    own[name] = value
    try:
        yield
    finally:
        del own[name]
        own.update(before)
