"""What the Hugging Face model families differ in, and where each one's `config.json` says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from meshpeft.models.config import DecoderConfig, MoEConfig
from meshpeft.models.errors import ModelError, UnsupportedModelError

__all__ = ["FAMILIES", "Family"]


@dataclass(frozen=True)
class Family:
    """How one family's configuration class says what the families differ in.

    Attributes:
        architecture: the class name that checkpoints of a language model carry.
        fields: implemented beyond `_COMMON`.
        read: the family's own arguments of `DecoderConfig`, from a transformers configuration.
        write: the inverse: its own fields.
        states_head_dim: the class always gives `head_dim`; elsewhere only one that does not follow from other sizes is
            written.
    """

    architecture: str
    fields: frozenset[str]
    read: Callable[[Any], dict[str, Any]]
    write: Callable[[DecoderConfig], dict[str, Any]]
    states_head_dim: bool = True


def _read_llama(hf: Any) -> dict[str, Any]:
    biased = bool(hf.attention_bias)
    return {"qkv_bias": biased, "projection_bias": biased, "mlp_bias": bool(hf.mlp_bias)}


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


def _read_mistral(hf: Any) -> dict[str, Any]:
    return {"sliding_windows": _windows([hf.sliding_window] * hf.num_hidden_layers)}


def _write_mistral(config: DecoderConfig) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window(0)}


def _read_qwen2(hf: Any) -> dict[str, Any]:
    kinds = {"full_attention": None, "sliding_attention": hf.sliding_window}
    for kind in hf.layer_types:
        if kind not in kinds:
            raise UnsupportedModelError(f"layer_types: {kind!r} is not implemented; implemented: {', '.join(kinds)}")
    if hf.sliding_window is None and "sliding_attention" in hf.layer_types:
        raise ModelError("layer_types names sliding_attention, but sliding_window or use_sliding_window is not set")
    return {"qkv_bias": True, "sliding_windows": _windows([kinds[kind] for kind in hf.layer_types])}


def _write_qwen2(config: DecoderConfig) -> dict[str, Any]:
    windows = config.sliding_windows or (None,) * config.num_layers
    window = next((window for window in windows if window is not None), None)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }


def _read_qwen3(hf: Any) -> dict[str, Any]:
    biased = bool(hf.attention_bias)
    return {**_read_qwen2(hf), "qkv_bias": biased, "projection_bias": biased, "qk_norm": True}


def _write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    return {**_write_qwen2(config), "attention_bias": config.qkv_bias}


def _windows(windows: list[int | None]) -> tuple[int | None, ...] | None:
    return tuple(windows) if any(window is not None for window in windows) else None


def _read_mixtral(hf: Any) -> dict[str, Any]:
    moe = MoEConfig(hf.num_local_experts, hf.num_experts_per_tok, hf.intermediate_size)
    return {**_read_mistral(hf), "moe": moe}


def _write_mixtral(config: DecoderConfig) -> dict[str, Any]:
    moe = _experts_of(config)
    return {
        **_write_mistral(config),
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.moe_router_topk,
    }


def _read_qwen_moe(hf: Any, shared_intermediate_size: int | None = None) -> MoEConfig:
    return MoEConfig(
        hf.num_experts,
        hf.num_experts_per_tok,
        hf.moe_intermediate_size,
        normalize_weights=bool(hf.norm_topk_prob),
        shared_intermediate_size=shared_intermediate_size,
        sparse_step=hf.decoder_sparse_step,
        dense_layers=tuple(hf.mlp_only_layers),
    )


def _write_qwen_moe(config: DecoderConfig) -> dict[str, Any]:
    moe = _experts_of(config)
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.moe_router_topk,
        "moe_intermediate_size": moe.intermediate_size,
        "norm_topk_prob": moe.normalize_weights,
        "decoder_sparse_step": moe.sparse_step,
        "mlp_only_layers": list(moe.dense_layers),
    }


def _read_qwen2_moe(hf: Any) -> dict[str, Any]:
    moe = _read_qwen_moe(hf, hf.shared_expert_intermediate_size)
    return {**_read_qwen2(hf), "qkv_bias": bool(hf.qkv_bias), "moe": moe}


def _write_qwen2_moe(config: DecoderConfig) -> dict[str, Any]:
    return {
        **_write_qwen2(config),
        **_write_qwen_moe(config),
        "qkv_bias": config.qkv_bias,
        "shared_expert_intermediate_size": _experts_of(config).shared_intermediate_size,
    }


def _read_qwen3_moe(hf: Any) -> dict[str, Any]:
    biased = bool(hf.attention_bias)
    return {
        **_read_mistral(hf),
        "qkv_bias": biased,
        "projection_bias": biased,
        "qk_norm": True,
        "moe": _read_qwen_moe(hf),
    }


def _write_qwen3_moe(config: DecoderConfig) -> dict[str, Any]:
    window = config.sliding_window(0)
    return {
        **_write_qwen_moe(config),
        "attention_bias": config.qkv_bias,
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }


def _experts_of(config: DecoderConfig) -> MoEConfig:
    if config.moe is None:
        raise ModelError(f"a {config.model_type} model has experts, and this configuration has none")
    return config.moe


_SLIDING = frozenset({"sliding_window", "use_sliding_window", "layer_types"})
_EXPERTS = frozenset({"num_experts", "num_local_experts", "num_experts_per_tok"})
_QWEN_EXPERTS = _EXPERTS | {"moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", frozenset({"attention_bias", "mlp_bias"}), _read_llama, _write_llama),
    "mistral": Family("MistralForCausalLM", frozenset({"sliding_window"}), _read_mistral, _write_mistral),
    "qwen2": Family("Qwen2ForCausalLM", _SLIDING, _read_qwen2, _write_qwen2, states_head_dim=False),
    "qwen3": Family("Qwen3ForCausalLM", _SLIDING | {"attention_bias"}, _read_qwen3, _write_qwen3),
    "mixtral": Family(
        "MixtralForCausalLM", _EXPERTS | {"sliding_window"}, _read_mixtral, _write_mixtral, states_head_dim=False
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        _QWEN_EXPERTS | _SLIDING | {"qkv_bias", "shared_expert_intermediate_size"},
        _read_qwen2_moe,
        _write_qwen2_moe,
        states_head_dim=False,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        _QWEN_EXPERTS | {"sliding_window", "use_sliding_window", "attention_bias"},
        _read_qwen3_moe,
        _write_qwen3_moe,
        states_head_dim=False,
    ),
}
