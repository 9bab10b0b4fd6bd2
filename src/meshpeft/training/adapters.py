"""The adapter that the options ask for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from meshpeft.models import Decoder, LanguageModel
from meshpeft.peft import CanonicalLoRA, DoRA, GroupedExpertLinearAdapter, LoRA, LowRankPEFT
from meshpeft.training.config import FinetuneConfig, tensor_type
from meshpeft.training.default_layers import default_layers

__all__ = ["adapter_method", "add_adapter", "describe_experts", "describe_targets"]

_METHODS: dict[str, type[LoRA | CanonicalLoRA | DoRA]] = {
    "lora": LoRA,
    "canonical_lora": CanonicalLoRA,
    "dora": DoRA,
}


def add_adapter(model: LanguageModel, config: FinetuneConfig) -> None:
    """Freeze `model` and put adapters on the layers that match, in place.

    The adapters are of `config.lora_dtype`; by default float32, or float64 on a float64 base. Warnings are left to
    [`check_adapter`][meshpeft.training.adapter_check.check_adapter], which gives each once and not on every worker.

    Raises:
        AdapterError: a target matches no layer.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        adapter_method(config, default_layers(model).adapted)(model)


def adapter_method(config: FinetuneConfig, targets: Sequence[str] | None = None) -> LowRankPEFT:
    """The method with the options of a run.

    Args:
        config: the options.
        targets: the layers that get adapters if the options name none; the method's own by default.

    Raises:
        AdapterError: options that do not go together.
    """
    named: dict[str, Any] = {} if targets is None or config.exclude_modules else {"target_modules": list(targets)}
    if config.target_modules:
        named["target_modules"] = list(config.target_modules)
    if config.exclude_modules:
        named["exclude_modules"] = list(config.exclude_modules)
    init_a, init_b = config.lora_a_init_method, config.lora_b_init_method
    if config.lora_init_method == "kaiming_zeros":
        init_a, init_b = "kaiming", "zero"
    return _METHODS[config.method](
        **named,
        dim=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        dropout_position=config.dropout_position,
        dropout_recompute=config.dropout_recompute,
        keep_token_shards=config.keep_token_shards,
        lora_A_init_method=init_a,
        lora_B_init_method=init_b,
        use_rslora=config.rslora,
        normalize_moe_lora=config.normalize_moe_lora,
        share_expert_adapters=config.share_expert_adapters,
        fused=config.fused,
        a2a_experimental=config.a2a_experimental,
        lora_dtype=config.lora_dtype or torch.promote_types(tensor_type(config.dtype), torch.float32),
        seed=config.seed,
    )


def describe_targets(config: FinetuneConfig, targets: Sequence[str] | None = None) -> str:
    """The layers that get adapters, for the report of a run; arguments as for `adapter_method`."""
    if config.exclude_modules:
        return f"every linear layer but {', '.join(config.exclude_modules)}"
    return ", ".join(adapter_method(config, targets).target_modules)


def describe_experts(model: LanguageModel) -> str | None:
    """What the experts of a model got, for the report of a run; `None` where they have no adapter."""
    moe = model.config.moe if isinstance(model, Decoder) else None
    found = next((module for module in model.modules() if isinstance(module, GroupedExpertLinearAdapter)), None)
    if moe is None or found is None:
        return None
    adapters = "one adapter for all" if found.share_expert_adapters else "an adapter each"
    return f"{moe.num_experts} a layer, {moe.moe_router_topk} a token; {adapters}, rank {found.dim}"
