"""The adapter that the options ask for."""

from __future__ import annotations

import warnings

import torch

from meshpeft.models import Decoder, DecoderConfig
from meshpeft.peft import LoRA
from meshpeft.training.config import FinetuneConfig, tensor_type

__all__ = ["add_adapter", "check_adapter"]


def add_adapter(model: Decoder, config: FinetuneConfig) -> None:
    """Freeze `model` and put adapters on the layers that match, in place.

    The adapters are float32, or float64 on a float64 base. Warnings are left to
    [`check_adapter`][meshpeft.training.adapters.check_adapter], which gives each once and not on every worker.

    Raises:
        AdapterError: a target matches no layer.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        _method(config)(model)


def check_adapter(base: DecoderConfig, config: FinetuneConfig) -> None:
    """Whether the adapter fits the model, found out on a model without weights; warns of what is doubtful, once.

    Raises:
        AdapterError: a target matches no layer.
    """
    model = Decoder(base, device="meta")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _method(config)(model)
    if caught:
        others = len(caught) - 1
        also = f" (and {others} more of the kind)" if others else ""
        warnings.warn(f"{caught[0].message}{also}", stacklevel=2)


def _method(config: FinetuneConfig) -> LoRA:
    return LoRA(
        target_modules=list(config.target_modules),
        dim=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        lora_dtype=torch.promote_types(tensor_type(config.dtype), torch.float32),
        seed=config.seed,
    )
