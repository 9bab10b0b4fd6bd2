"""Grouped-query self-attention over the query groups that this rank holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshpeft.models.attention_mask import AttentionMask
from meshpeft.models.cache import KVCache
from meshpeft.models.config import DecoderConfig
from meshpeft.models.norm import RMSNorm
from meshpeft.models.rotary import apply_rotary
from meshpeft.parallel.linear import ColumnParallelLinear, RowParallelLinear
from meshpeft.parallel.mesh import ParallelAxis
from meshpeft.parallel.tensor_layout import Packing
from meshpeft.parallel.typing import dims_follow, typed_as

__all__ = ["AttentionContext", "SelfAttention"]


@dataclass(frozen=True)
class AttentionContext:
    """What all layers of one forward pass share; replicated over tensor parallel.

    Attributes:
        cosines, sines: rotary tables [seq, batch, 1, head_dim].
        masks: by sliding window.
        cache: keys and values of earlier tokens, which this pass extends.
        rows: [own tokens, batch], the row that each token a rank routes belongs to, where the load of experts is
            asked for; see [`rows_of_tokens`][meshpeft.models.moe.rows_of_tokens].
    """

    cosines: Tensor
    sines: Tensor
    masks: dict[int | None, AttentionMask]
    cache: KVCache | None = None
    rows: Tensor | None = None


class SelfAttention(nn.Module):
    """Queries, keys and values from one packed projection, attention per head, an output projection.

    `linear_qkv` is packed per query group, `[q .. q k v]`, and divided over tensor parallel by whole groups; the
    heads never communicate.
    """

    def __init__(
        self,
        config: DecoderConfig,
        layer: int,
        tp: ParallelAxis,
        sequence_parallel: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.window = config.sliding_window(layer)
        self.shards = tp.world_size
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_query_groups * config.head_dim
        self.packing = Packing(("q", "k", "v"), (queries, keys, keys), blocks=config.num_query_groups)
        self.linear_qkv = ColumnParallelLinear(
            config.hidden_size,
            queries + 2 * keys,
            bias=config.qkv_bias,
            gather_output=False,
            sequence_parallel=sequence_parallel,
            packing=self.packing,
            axis=tp,
            device=device,
            dtype=dtype,
        )
        self.linear_proj = RowParallelLinear(
            queries,
            config.hidden_size,
            bias=config.projection_bias,
            input_is_parallel=True,
            sequence_parallel=sequence_parallel,
            axis=tp,
            device=device,
            dtype=dtype,
        )
        self.q_layernorm: RMSNorm | None = None
        self.k_layernorm: RMSNorm | None = None
        if config.qk_norm:
            # The ranks normalise different heads.
            self.q_layernorm = RMSNorm(config.head_dim, config.rms_norm_eps, (tp,), device, dtype)
            self.k_layernorm = RMSNorm(config.head_dim, config.rms_norm_eps, (tp,), device, dtype)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """x [seq, batch, hidden] -> [seq, batch, hidden]; [seq / tp, ..] of both under sequence parallel."""
        queries, keys, values = split_heads(self.linear_qkv(x), self.packing, self.shards, self.head_dim)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            queries, keys = self.q_layernorm(queries), self.k_layernorm(keys)
        queries = apply_rotary(queries, context.cosines, context.sines)
        keys = apply_rotary(keys, context.cosines, context.sines)
        if context.cache is not None:
            keys, values = context.cache.update(self.layer, keys, values)
        return self.linear_proj(attend(queries, keys, values, context.masks[self.window]))


@typed_as(lambda qkv, packing, shards, head_dim: dims_follow(qkv, (0, 1, 2, None)))
def split_heads(qkv: Tensor, packing: Packing, shards: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The heads of a packed projection.

    Args:
        qkv: [seq, batch, packed / tp], `S(-1)` over tensor parallel.

    Returns:
        Queries [seq, batch, heads / tp, head_dim], keys and values [seq, batch, groups / tp, head_dim], `S(2)`.
    """
    queries, keys, values = (part.unflatten(-1, (-1, head_dim)) for part in packing.unpack(qkv, -1, shards))
    return queries, keys, values


@typed_as(lambda queries, keys, values, mask: dims_follow(queries, (0, 1, 2)))
def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: AttentionMask) -> Tensor:
    """Scaled dot product attention, head by head.

    Args:
        queries: [seq, batch, heads / tp, head_dim], `S(2)` over tensor parallel.
        keys, values: [past + seq, batch, groups / tp, head_dim], `S(2)`; group g serves heads
            `g * heads / groups` and those after it.

    Returns:
        [seq, batch, heads / tp * head_dim], `S(2)`.
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
