"""Fused layers of transformers models, which pack several parts, and the code around them that takes the parts apart.

Divided part by part, each rank's output holds its slice of every part, and its code finds them there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from meshpeft.parallel import FusedParts

__all__ = ["FusedLayer", "fused_layers"]


@dataclass(frozen=True)
class FusedLayer:
    """A layer whose output packs several parts, in a module whose code takes them apart.

    Attributes:
        fused_parts: made from the module that holds the layer.
        partner: the layer after it, which then takes its input divided.
        localise: lets the holder's code count the heads of one rank.
    """

    fused_parts: Callable[[Any], FusedParts]
    partner: str
    localise: Callable[[Any, int], None] = lambda holder, shards: None


def _qkv_of_phi3(attention: Any) -> FusedParts:
    q, kv = (
        heads * attention.head_dim for heads in (attention.config.num_attention_heads, attention.num_key_value_heads)
    )
    return FusedParts(("q", "k", "v"), (q, kv, kv))


def _local_heads_of_phi3(attention: Any, shards: int) -> None:
    # It finds the end of the queries by its config, which it shares with the whole model.
    attention.config = copy.copy(attention.config)
    attention.config.num_attention_heads //= shards
    attention.num_key_value_heads //= shards


def _qkv_of_neox(attention: Any) -> FusedParts:
    # Head after head: its query, its key, its value.
    size = attention.query_key_value.out_features // 3
    return FusedParts(("q", "k", "v"), (size,) * 3, blocks=size // attention.head_size)


def _gate_up(mlp: Any) -> FusedParts:
    size = mlp.gate_up_proj.out_features // 2
    return FusedParts(("gate", "up"), (size, size))


# (Class of the module that holds the layer, the layer) -> how it is packed.
_FUSED: dict[tuple[str, str], FusedLayer] = {
    ("Phi3Attention", "qkv_proj"): FusedLayer(_qkv_of_phi3, "o_proj", _local_heads_of_phi3),
    ("GPTNeoXAttention", "query_key_value"): FusedLayer(_qkv_of_neox, "dense"),
} | {(f"{family}MLP", "gate_up_proj"): FusedLayer(_gate_up, "down_proj") for family in ("Phi3", "Glm", "Glm4")}


def fused_layers(model: nn.Module, styles: Mapping[str, str]) -> dict[str, FusedLayer]:
    """Those of the layers named in `styles` whose parts are known, by full name."""
    found = {}
    for name in styles:
        parent, _, own = name.rpartition(".")
        for cls in type(model.get_submodule(parent)).__mro__:
            if (cls.__name__, own) in _FUSED:
                found[name] = _FUSED[cls.__name__, own]
    return found
