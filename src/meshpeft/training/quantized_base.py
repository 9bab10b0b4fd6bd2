"""A base stored in few bits, as the options ask for it, and adapters that start from the base's weights."""

from __future__ import annotations

from meshpeft.models import Decoder
from meshpeft.parallel import layout_of
from meshpeft.peft import LoRATopKRouter, adapter_wrappers
from meshpeft.quantization import BaseQuantizer, forget_residuals, keep_starts, pissa_init, svdquant_init
from meshpeft.training.config import ConfigError, FinetuneConfig

__all__ = ["base_quantizer", "check_started", "reserve_start", "start_adapter"]


def base_quantizer(run: FinetuneConfig, *, residuals: bool = False) -> BaseQuantizer | None:
    """What packs the base of a run as it is read; `None` where it is kept in full.

    Args:
        run: the options.
        residuals: the adapter is about to start, from residuals if the options say so. Otherwise none are kept.

    Raises:
        QuantizationError: a block size that cannot be.
    """
    if run.quantize is None:
        return None
    rank = run.rank if residuals and run.lora_init_method == "svdquant" else None
    return BaseQuantizer(run.quantize, run.quantize_block_size or BaseQuantizer.block_size, residual_rank=rank)


def start_adapter(model: Decoder, run: FinetuneConfig) -> None:
    """Give a new adapter the values that it starts from, where these depend on the base. Collectives."""
    if run.lora_init_method == "svdquant":
        svdquant_init(model)
        forget_residuals(model)
    elif run.lora_init_method == "pissa":
        pissa_init(model)


def reserve_start(model: Decoder, run: FinetuneConfig) -> None:
    """Make room for what `start_adapter` would give an adapter beside its factors, where a checkpoint holds it."""
    if run.lora_init_method == "pissa":
        keep_starts(model)


def check_started(model: Decoder, packed: set[int], run: FinetuneConfig) -> None:
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
