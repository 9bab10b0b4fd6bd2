"""A base stored in few bits, as the options ask for it, and adapters that start from the base's weights."""

from __future__ import annotations

from meshpeft.models import LanguageModel
from meshpeft.quantization import BaseQuantizer, forget_residuals, keep_starts, pissa_init, svdquant_init
from meshpeft.training.adapters import adapter_method
from meshpeft.training.config import FinetuneConfig
from meshpeft.training.default_layers import DefaultLayers

__all__ = ["base_quantizer", "reserve_start", "start_adapter"]

_OF_THE_DECODER = DefaultLayers()


def base_quantizer(
    run: FinetuneConfig, layers: DefaultLayers = _OF_THE_DECODER, *, residuals: bool = False
) -> BaseQuantizer | None:
    """What packs the base of a run as it is read; `None` where it is kept in full.

    Args:
        run: the options.
        layers: what the options do not name.
        residuals: the adapter is about to start, from residuals if the options say so. Otherwise none are kept.

    Raises:
        QuantizationError: a block size that cannot be.
    """
    if run.quantize is None:
        return None
    pissa = run.lora_init_method == "pissa"
    return BaseQuantizer(
        run.quantize,
        run.quantize_block_size or BaseQuantizer.block_size,
        exclude_modules=layers.in_full,
        residual_rank=run.rank if residuals and run.lora_init_method == "svdquant" else None,
        # Also where no adapter starts: the adapter that was trained is a change of the base that is packed so.
        principal_rank=run.rank if pissa else None,
        principal_modules=adapter_method(run, layers.adapted) if pissa else None,
    )


def start_adapter(model: LanguageModel, run: FinetuneConfig) -> None:
    """Give a new adapter the values that it starts from, where these depend on the base. Collectives."""
    if run.lora_init_method == "svdquant":
        svdquant_init(model)
        forget_residuals(model)
    elif run.lora_init_method == "pissa":
        pissa_init(model)


def reserve_start(model: LanguageModel, run: FinetuneConfig) -> None:
    """Make room for what `start_adapter` would give an adapter beside its factors, where a checkpoint holds it."""
    if run.lora_init_method == "pissa":
        keep_starts(model)
