"""Whether the adapter that the options ask for fits the model, before any weight is read."""

from __future__ import annotations

import re
import warnings

import torch

from meshpeft.checkpoint import CheckpointError, check_exportable
from meshpeft.models import LanguageModel
from meshpeft.parallel import layout_of
from meshpeft.peft import LoRATopKRouter, adapter_wrappers
from meshpeft.training.adapters import adapter_method
from meshpeft.training.base_model import BaseModel
from meshpeft.training.config import ConfigError, FinetuneConfig
from meshpeft.training.default_layers import default_layers
from meshpeft.training.quantized_base import base_quantizer

__all__ = ["check_adapter"]


def check_adapter(base: BaseModel, config: FinetuneConfig) -> None:
    """Whether the adapter fits the model, found out on a model without weights; warns of what is doubtful, once.

    Raises:
        AdapterError: a target matches no layer; a rank that does not divide.
        ConfigError: an option for experts, and the model has none; an adapter that could not start, or be written, as
            asked.
        QuantizationError: the base cannot be packed as asked.
    """
    if not base.has_experts:
        for name in ("normalize_moe_lora", "router_aux_loss_coef"):
            if getattr(config, name):
                raise ConfigError(
                    f"{name}: this {base.config.model_type} model has no layer with experts; leave it out"
                )
    model = base.empty(torch.float32)
    layers = default_layers(model)
    quantizer = base_quantizer(config, layers)
    packed = {} if quantizer is None else quantizer.layers_of(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapter_method(config, layers.adapted)(model)
    try:
        check_exportable(model, config.adapter_format)
    except CheckpointError as error:
        raise ConfigError(f"adapter_format={config.adapter_format!r}: {error}") from error
    _check_started(model, {id(layer) for layer in packed.values()}, config)
    for sentence in _one_of_each_kind([str(warning.message) for warning in caught]):
        warnings.warn(sentence, stacklevel=2)


def _one_of_each_kind(sentences: list[str]) -> list[str]:
    """The first of those that say the same of different layers and sizes, with the number of the others."""
    kinds: dict[str, list[str]] = {}
    for sentence in sentences:
        layer, _, what = sentence.partition(": ")
        kinds.setdefault(re.sub(r"\d+", "", what or layer), []).append(sentence)
    return [f"{first} (and {len(others)} more of the kind)" if others else first for first, *others in kinds.values()]


def _check_started(model: LanguageModel, packed: set[int], run: FinetuneConfig) -> None:
    """Whether every adapter can start from its layer's weight, or from its residual.

    Args:
        model: with its adapters, on the meta device.
        packed: ids of the layers that the run packs.
        run: the options.

    Raises:
        ConfigError: an adapter that starts from what quantising lost, on a layer that stays as it is or for all
            experts together.
    """
    if run.lora_init_method not in ("svdquant", "pissa"):
        return
    for name, wrapper in adapter_wrappers(model):
        if isinstance(wrapper, LoRATopKRouter):
            continue
        if run.lora_init_method == "svdquant" and id(wrapper.to_wrap) not in packed:
            raise ConfigError(
                f"lora_init_method=svdquant: {name} is not quantised, and its adapter could not train; leave it out "
                "of the adapted layers"
            )
        if run.share_expert_adapters and layout_of(wrapper.to_wrap).experts is not None:
            raise ConfigError(
                f"lora_init_method={run.lora_init_method}: {name} has one adapter for all experts, whose weights "
                "differ; give each its own with --no-share-expert-adapters"
            )
