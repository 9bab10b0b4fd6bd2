"""Which keys each query sees: causal, within a sliding window, within its own document."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["AttentionMask", "attention_masks", "positions_in_documents"]


@dataclass(frozen=True)
class AttentionMask:
    """What `scaled_dot_product_attention` is told.

    Attributes:
        allowed: bool [1 or batch, 1, queries, keys], `True` where a query sees a key; `None` where `is_causal`
            says it all, or every key is seen.
        is_causal: plain causal attention of equally many queries and keys, the kernels' fast path.
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
    """The masks of a forward pass, one for each different sliding window among the layers.

    Args:
        windows: tokens a layer looks back, itself included; `None` for all.
        queries: number of query tokens; the keys are `past` tokens and these.
        past: tokens in the cache.
        device: of the masks.
        query_documents: [batch, queries]: attention is confined to tokens of the same id. Padding (id -1) sees
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
    """Position of each token in its own run of equal ids: [batch, seq] -> [batch, seq], from 0."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    is_first = torch.ones_like(document_ids, dtype=torch.bool)
    is_first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    first = torch.where(is_first, index, torch.zeros_like(index)).cummax(dim=1).values
    return index - first
