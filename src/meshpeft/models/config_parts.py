"""The parts of a decoder's configuration: how positions are rotated, and what the experts are like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from meshpeft.models.errors import ModelError
from meshpeft.parallel.errors import shown

__all__ = ["MoEConfig", "RopeConfig"]

_LARGEST_FLOAT = float(torch.finfo(torch.float32).max)


@dataclass(frozen=True)
class RopeConfig:
    """The frequencies of the rotary position embedding.

    Attributes:
        theta: base of the geometric series of frequencies.
        kind: `default`; `linear` divides every frequency by `factor`; `llama3` divides the low ones only, and
            interpolates in between (Llama 3.1).
        factor: of `linear` and `llama3`.
        low_freq_factor, high_freq_factor: of `llama3`: wavelengths above `original_max_position_embeddings /
            low_freq_factor` are stretched, those below `original_max_position_embeddings / high_freq_factor` kept.
        original_max_position_embeddings: of `llama3`, in tokens: the context of the first training.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("default", "linear", "llama3"):
            raise ModelError(f"rope type {shown(self.kind)} is not implemented; implemented: default, linear, llama3")
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            value = getattr(self, name)
            if not (0 < value < _LARGEST_FLOAT):
                raise ModelError(f"rope: {name}={shown(value)}: expected a number above 0")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ModelError(
                f"rope: high_freq_factor={self.high_freq_factor} must be above low_freq_factor={self.low_freq_factor}"
            )


@dataclass(frozen=True)
class MoEConfig:
    """The experts of the layers that have them, and how tokens choose.

    Attributes:
        num_experts: of one layer, over all ranks.
        moe_router_topk: experts that each token is sent to.
        intermediate_size: channels of one expert.
        normalize_weights: the weights of a token's experts are divided by their sum.
        softmax_first: the weights are a softmax over all experts, of which the largest are taken; otherwise a softmax
            over the largest logits (which is the same once the weights are normalised).
        shared_intermediate_size: channels of the shared experts, through which every token passes, behind a sigmoid
            gate; `None` for a layer without.
        sparse_step: every so many layers have experts: layer n if n + 1 is a multiple.
        dense_layers: layers that have an ordinary MLP nevertheless.
    """

    num_experts: int
    moe_router_topk: int
    intermediate_size: int
    normalize_weights: bool = True
    softmax_first: bool = True
    shared_intermediate_size: int | None = None
    sparse_step: int = 1
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_experts", "moe_router_topk", "intermediate_size", "shared_intermediate_size", "sparse_step"):
            value = getattr(self, name)
            if name == "shared_intermediate_size" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ModelError(f"{name}={shown(value)} of the experts: expected an integer of at least 1")
        if self.moe_router_topk > self.num_experts:
            raise ModelError(
                f"the router chooses {self.moe_router_topk} experts per token, and there are {self.num_experts}; "
                f"use a top-k of at most {self.num_experts}"
            )
