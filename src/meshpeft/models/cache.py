"""The keys and values of the tokens seen so far, for generation."""

from __future__ import annotations

from torch import Tensor

__all__ = ["KVCache"]


class KVCache:
    """Keys and values of each layer, [seq, batch, heads / tp, head_dim], growing as tokens come.

    Attributes:
        length: tokens held.
        document_ids: [batch, length] of those tokens, or `None` if none were given.
    """

    def __init__(self) -> None:
        self.length = 0
        self.document_ids: Tensor | None = None
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values behind the tokens held; no gradient flows through the cache.

        Tokens count as held only after [`advance`][meshpeft.models.cache.KVCache.advance], so padding behind the
        last real token is overwritten by the next call.

        Args:
            layer: the layer's global number.
            keys, values: [seq, batch, heads / tp, head_dim].

        Returns:
            Keys and values [length + seq, batch, heads / tp, head_dim].
        """
        return self._write(self._keys, layer, keys), self._write(self._values, layer, values)

    def advance(self, tokens: int, document_ids: Tensor | None) -> None:
        """Count `tokens` more as held, once every layer has written them."""
        self.length += tokens
        self.document_ids = document_ids

    def _write(self, buffers: dict[int, Tensor], layer: int, new: Tensor) -> Tensor:
        end = self.length + new.shape[0]
        held = buffers.get(layer)
        if held is None or held.shape[0] < end:
            # Doubling makes the copies of a long generation cost as much as its tokens.
            grown = new.new_empty((max(end, 2 * self.length), *new.shape[1:]))
            if held is not None:
                grown[: self.length] = held[: self.length]
            buffers[layer] = held = grown
        held[self.length : end] = new.detach()
        return held[:end]
