"""The configuration of a decoder: its sizes, and which of the variations between families it has.

A `DecoderConfig` holds everything that changes a number in the forward pass
under a name that says what it does, so that no module depends on its family. How the families'
`config.json` files are read and written is in `meshpeft.hub.config`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import PretrainedConfig

from meshpeft.parallel import MeshPEFTError
from meshpeft.parallel.errors import shown

__all__ = ["DecoderConfig", "MoEConfig", "ModelError", "RopeConfig", "UnsupportedModelError"]

_LARGEST_FLOAT = float(torch.finfo(torch.float32).max)


class ModelError(MeshPEFTError):
    """A model that cannot be built, read or written as asked; the text says what was given and what to do."""


class UnsupportedModelError(ModelError):
    """A model that has something which the native decoder does not have; another engine may run it."""


@dataclass(frozen=True)
class RopeConfig:
    """The frequencies of the rotary position embedding.

    Attributes:
        theta: Base of the geometric series of frequencies.
        kind: `default`; `linear` divides every frequency by `factor`; `llama3` divides the low ones only, and
            interpolates in between (Llama 3.1).
        factor: Stretch of the wavelengths, for `linear` and `llama3`.
        low_freq_factor, high_freq_factor: For `llama3`; wavelengths above `original_max_position_embeddings /
            low_freq_factor` are stretched, those below `original_max_position_embeddings / high_freq_factor` kept.
        original_max_position_embeddings: For `llama3`; the context of the first training, in tokens.
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
        num_experts: Experts of one layer, over all ranks.
        moe_router_topk: Experts that each token is sent to.
        intermediate_size: Channels of one expert.
        normalize_weights: Whether the weights of a token's experts are divided by their sum.
        softmax_first: Whether the weights are a softmax over all experts, of which the largest are taken; else a
            softmax over the largest logits (which is the same once the weights are normalised).
        shared_intermediate_size: Channels of the shared experts, through which every token passes, behind a sigmoid
            gate; `None` for a layer without.
        sparse_step: Layer n has experts if n + 1 is a multiple.
        dense_layers: Layers that have an ordinary MLP nevertheless.
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


# The package above this one: a face offers its functions, and imports it when they are called.
_FORMAT = "meshpeft.hub.config"


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer with RMSNorm, rotary embedding, grouped-query attention and gated MLPs or experts.

    Attributes:
        model_type: Hugging Face family it is written back as: `llama mistral qwen2 qwen3 mixtral qwen2_moe
            qwen3_moe`.
        vocab_size, hidden_size, intermediate_size, num_layers: Global sizes.
        num_attention_heads: Query heads.
        num_query_groups: Key and value heads; each serves `num_attention_heads / num_query_groups` query heads.
        head_dim: Channels of one head.
        rope: Rotary frequencies.
        rms_norm_eps: Added to the mean square.
        tie_word_embeddings: Whether the output layer multiplies by the embedding's own weight.
        qkv_bias, projection_bias: Biases of `linear_qkv` and of `linear_proj`.
        mlp_bias: Biases of `linear_fc1` and `linear_fc2`.
        qk_norm: RMSNorm over the channels of each query and key head, before the rotation (Qwen3).
        sliding_windows: For each layer how many tokens back it attends, itself included, or `None` for all;
            `None` instead of the tuple means all, everywhere.
        initializer_range: Standard deviation of the weights of a decoder that is not loaded.
        moe: Experts; `None` for a dense model.
        other: Fields of `config.json` that change no number here (token ids, position limits), written back as
            they were read.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    model_type: str = "llama"
    rope: RopeConfig = field(default_factory=RopeConfig)
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    projection_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] | None = None
    initializer_range: float = 0.02
    moe: MoEConfig | None = None
    other: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_attention_heads",
            "num_query_groups",
            "head_dim",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ModelError(f"{name}={shown(value)}: expected an integer of at least 1")
        for name in ("rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e30:
                raise ModelError(f"{name}={shown(value)}: expected a number of at least 0")
        if self.num_attention_heads % self.num_query_groups:
            raise ModelError(
                f"{self.num_attention_heads} attention heads cannot share {self.num_query_groups} key/value heads; "
                f"use a divisor of {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim={self.head_dim}: the rotary embedding needs an even number")
        if self.sliding_windows is not None:
            if len(self.sliding_windows) != self.num_layers:
                raise ModelError(f"{len(self.sliding_windows)} sliding windows for {self.num_layers} layers")
            for window in self.sliding_windows:
                if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
                    raise ModelError(f"sliding window {shown(window)}: expected at least 1 token, or None")

    def sliding_window(self, layer: int) -> int | None:
        """Tokens that layer number `layer` attends back, itself included; `None` for all."""
        return None if self.sliding_windows is None else self.sliding_windows[layer]

    def has_experts(self, layer: int) -> bool:
        """Whether layer number `layer` has experts in the place of an MLP."""
        moe = self.moe
        return moe is not None and layer not in moe.dense_layers and (layer + 1) % moe.sparse_step == 0

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Numbers of the layers with experts."""
        return tuple(layer for layer in range(self.num_layers) if self.has_experts(layer))

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | PretrainedConfig) -> DecoderConfig:
        """Read the decoder of a parsed `config.json`, or of a transformers configuration.

        Raises:
            UnsupportedModelError: The family is unknown, or a field would change numbers in a way that is not
                implemented.
            ModelError: A value is invalid.
        """
        return cls(**importlib.import_module(_FORMAT).options_of(source))

    def to_hf(self) -> PretrainedConfig:
        """Write the transformers configuration of `model_type` that describes this decoder.

        Raises:
            ModelError: The family cannot express it.
        """
        hf: PretrainedConfig = importlib.import_module(_FORMAT).hf_config_of(self)
        if DecoderConfig.from_hf(hf) != self:
            raise ModelError(f"a {self.model_type} configuration cannot express {self}")
        return hf
