"""Grouped-query self-attention over the query groups that this rank holds: rotary embedding, cache, layer.

Training and evaluation go through `attend`, which takes the documents of packed rows as they are (`spans.py`). The
dense masks here are for the key-value cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshpeft.models.config import DecoderConfig, RopeConfig
from meshpeft.models.mlp import RMSNorm
from meshpeft.models.sharding import ModelSharding
from meshpeft.models.spans import Spans, SpansOfRanks, attend, gather_keys
from meshpeft.parallel import FusedParts
from meshpeft.parallel.typing import dims_follow, typed_as

__all__ = [
    "AttentionContext",
    "AttentionMask",
    "KVCache",
    "SelfAttention",
    "apply_rotary",
    "attend_by_mask",
    "attention_masks",
    "inverse_frequencies",
    "positions_in_documents",
    "rotary_tables",
]


@dataclass(frozen=True)
class AttentionMask:
    """The mask arguments of `scaled_dot_product_attention`.

    Attributes:
        allowed: bool [1 or batch, 1, queries, keys], `True` where a query sees a key; `None` where `is_causal`
            is enough, or every key is seen.
        is_causal: Plain causal attention of equally many queries and keys, the kernels' fast path.
    """

    allowed: Tensor | None
    is_causal: bool


def attention_masks(
    windows: Iterable[int | None],
    queries: int,
    past: int,
    device: torch.device,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
) -> dict[int | None, AttentionMask]:
    """Make the masks of a forward pass, one for each different sliding window among the layers.

    Args:
        windows: Tokens that a layer looks back, itself included; `None` for all.
        queries: Number of query tokens; the keys are `past` tokens and these.
        past: Tokens in the cache.
        device: Device of the masks.
        query_documents: [batch, queries]; attention is confined to tokens of the same id. Padding (id -1) sees
            padding only, so that no row of the softmax is empty.
        key_documents: [batch, past + queries].
    """
    keys = past + queries
    masks: dict[int | None, AttentionMask] = {}
    for window in set(windows):
        is_unbounded = window is None or window >= keys
        if query_documents is None and is_unbounded and (past == 0 or queries == 1):
            masks[window] = AttentionMask(None, is_causal=past == 0)
            continue
        key_index = torch.arange(keys, device=device)
        query_index = torch.arange(past, keys, device=device)[:, None]
        allowed = key_index <= query_index
        if window is not None and not is_unbounded:
            allowed = allowed & (key_index > query_index - window)
        allowed = allowed[None, None]
        if query_documents is not None and key_documents is not None:
            allowed = allowed & (query_documents[:, None, :, None] == key_documents[:, None, None, :])
        masks[window] = AttentionMask(allowed, is_causal=False)
    return masks


def positions_in_documents(document_ids: Tensor) -> Tensor:
    """Count the position of each token in its own run of equal ids: [batch, seq] -> [batch, seq], from 0."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    is_first = torch.ones_like(document_ids, dtype=torch.bool)
    is_first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    first = torch.where(is_first, index, torch.zeros_like(index)).cummax(dim=1).values
    return index - first


def inverse_frequencies(rope: RopeConfig, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the angle per position of each channel pair, in radians: [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=dtype, device=device) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


def _llama3(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    """Stretch long wavelengths by `factor`, keep short ones, blend those in between (Llama 3.1)."""
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_max_position_embeddings / wavelengths
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * frequencies / rope.factor + kept * frequencies


def rotary_tables(rope: RopeConfig, head_dim: int, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute the cosines and sines of every position (RoFormer, arXiv 2104.09864), with Llama-family scalings.

    They follow from the configuration alone: there is no buffer that a checkpoint, a meta device or a cast could lose.

    Args:
        position_ids: [batch, seq], replicated.
        dtype: Type of the activations, and of the result; computed in float32 at least.

    Returns:
        Two tensors [seq, batch, 1, head_dim], replicated; the halves of the last dim are equal.
    """
    wide = torch.promote_types(dtype, torch.float32)
    frequencies = inverse_frequencies(rope, head_dim, wide, position_ids.device)
    angles = position_ids.t().to(wide)[..., None] * frequencies
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate the channel pairs (i, i + head_dim / 2) of x [seq, batch, heads, head_dim] by their angles."""
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat((-second, first), dim=-1) * sines


class KVCache:
    """Keys and values of each layer, [seq, batch, heads / tp, head_dim], growing as tokens come.

    Attributes:
        length: Tokens held.
        document_ids: Their documents [batch, length], or `None` if none were given.
    """

    def __init__(self) -> None:
        self.length = 0
        self.document_ids: Tensor | None = None
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values behind the tokens held; no gradient flows through the cache.

        Tokens count as held only after `advance`, so padding behind the
        last real token is overwritten by the next call.

        Args:
            layer: The layer's global number.
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


@dataclass(frozen=True)
class AttentionContext:
    """What all layers of one forward pass share; replicated over tensor parallel.

    Attributes:
        cosines, sines: Rotary tables [seq, batch, 1, head_dim].
        spans: Which keys each query sees, where there is no cache.
        cache: Keys and values of earlier tokens, which this pass extends.
        masks: Mask for each sliding window, with a cache.
        rows: [own tokens, batch], the row of each token that this rank routes, where the router loss is computed;
            see `rows_of_tokens`.
    """

    cosines: Tensor
    sines: Tensor
    spans: Spans | SpansOfRanks | None = None
    cache: KVCache | None = None
    masks: Mapping[int | None, AttentionMask] = field(default_factory=dict)
    rows: Tensor | None = None


class SelfAttention(nn.Module):
    """Queries, keys and values from one fused projection, attention per head, an output projection.

    `linear_qkv` is fused per query group, `[q .. q k v]`, and sharded by groups: the heads never communicate.
    """

    def __init__(self, config: DecoderConfig, layer: int, sharding: ModelSharding) -> None:
        super().__init__()
        self.sharding = sharding
        self.layer = layer
        self.head_dim = config.head_dim
        self.window = config.sliding_window(layer)
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_query_groups * config.head_dim
        self.fused_parts = FusedParts(("q", "k", "v"), (queries, keys, keys), blocks=config.num_query_groups)
        self.linear_qkv = sharding.linear_qkv(
            config.hidden_size, queries + 2 * keys, bias=config.qkv_bias, parts=self.fused_parts
        )
        self.linear_proj = sharding.linear_proj(queries, config.hidden_size, bias=config.projection_bias)
        self.q_layernorm: RMSNorm | None = None
        self.k_layernorm: RMSNorm | None = None
        if config.qk_norm:
            self.q_layernorm = RMSNorm(sharding.head_norm_weight(config.head_dim), config.rms_norm_eps)
            self.k_layernorm = RMSNorm(sharding.head_norm_weight(config.head_dim), config.rms_norm_eps)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """x [seq, batch, hidden] -> the same, in the state of the hidden stream."""
        out: Tensor = self.linear_proj(self.heads(x, context))
        return out

    def heads(self, x: Tensor, context: AttentionContext) -> Tensor:
        """x [seq, batch, hidden] -> what the heads attend to, [seq, batch, heads / tp * head_dim], `Shard(-1)`."""
        queries, keys, values = split_heads(
            self.linear_qkv(x), self.fused_parts, self.sharding.tp.world_size, self.head_dim
        )
        self.sharding.check(queries, self.sharding.heads)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            queries, keys = self.q_layernorm(queries), self.k_layernorm(keys)
        queries = apply_rotary(queries, context.cosines, context.sines)
        keys = apply_rotary(keys, context.cosines, context.sines)
        if context.spans is not None:
            if context.spans.is_of_shards:
                keys, values = gather_keys(keys, values, self.sharding.cp)
            return attend(queries, keys, values, context.spans, window=self.window)
        if context.cache is not None:
            keys, values = context.cache.update(self.layer, keys, values)
        return attend_by_mask(queries, keys, values, context.masks[self.window])


@typed_as(lambda qkv, fused_parts, shards, head_dim: dims_follow(qkv, (0, 1, 2, None)))
def split_heads(qkv: Tensor, fused_parts: FusedParts, shards: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split the fused projection into heads.

    Args:
        qkv: [seq, batch, (q + k + v) / tp], `Shard(-1)` over tensor parallel.

    Returns:
        Queries [seq, batch, heads / tp, head_dim], keys and values [seq, batch, groups / tp, head_dim], `Shard(2)`.
    """
    queries, keys, values = (part.unflatten(-1, (-1, head_dim)) for part in fused_parts.split(qkv, -1, shards))
    return queries, keys, values


@typed_as(lambda queries, keys, values, mask: dims_follow(queries, (0, 1, 2)))
def attend_by_mask(queries: Tensor, keys: Tensor, values: Tensor, mask: AttentionMask) -> Tensor:
    """Apply scaled dot product attention, head by head; `attend`, with a mask of [queries, keys].

    Args:
        queries: [seq, batch, heads / tp, head_dim], `Shard(2)` over tensor parallel.
        keys, values: [past + seq, batch, groups / tp, head_dim], `Shard(2)`; group g serves heads
            `g * heads / groups` and those after it.

    Returns:
        [seq, batch, heads / tp * head_dim], `Shard(2)`.
    """
    repeats = queries.shape[2] // keys.shape[2]
    if repeats > 1 and mask.allowed is not None and queries.is_cuda:
        # No fused CUDA kernel takes both a mask and shared keys; the fallback would hold [queries, keys] scores.
        keys, values = keys.repeat_interleave(repeats, 2), values.repeat_interleave(repeats, 2)
        repeats = 1
    out = functional.scaled_dot_product_attention(
        queries.permute(1, 2, 0, 3),
        keys.permute(1, 2, 0, 3),
        values.permute(1, 2, 0, 3),
        attn_mask=mask.allowed,
        is_causal=mask.is_causal,
        enable_gqa=repeats > 1,
    )
    return out.permute(2, 0, 1, 3).flatten(2)
