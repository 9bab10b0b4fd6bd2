"""LoRA+ (Hayou et al. 2024): a larger learning rate for B than for A."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from meshpeft.peft.errors import AdapterError
from meshpeft.peft.walk import adapter_wrappers, chunks_of

__all__ = ["lora_plus_parameter_groups"]


def lora_plus_parameter_groups(
    model: nn.Module | list[nn.Module], lr: float, lr_ratio: float = 16.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: B at `lr * lr_ratio`, every other trainable parameter at `lr`.

    Args:
        model: a module with adapters, or its chunks.
        lr: learning rate of A, magnitudes, and whatever else trains.
        lr_ratio: of B's learning rate to it; 16 is the paper's choice, 1 is ordinary LoRA.
        weight_decay: of all groups.

    Returns:
        One or two groups, with a `name` each; no empty one.

    Raises:
        AdapterError: a ratio that is not a positive number; a model in which nothing trains.
    """
    if not math.isfinite(lr_ratio) or lr_ratio <= 0:
        raise AdapterError(f"lr_ratio={lr_ratio}: expected a positive number, for instance 16")
    outputs = {
        id(parameter)
        for _, wrapper in adapter_wrappers(model)
        for name, parameter in wrapper.adapter.named_parameters()
        if "linear_out" in name.split(".")
    }
    trainable = {id(p): p for chunk in chunks_of(model) for p in chunk.parameters() if p.requires_grad}
    if not trainable:
        raise AdapterError("no parameter requires a gradient; apply an adapter method to the model first")
    groups = (
        ("others", lr, [parameter for key, parameter in trainable.items() if key not in outputs]),
        ("linear_out", lr * lr_ratio, [parameter for key, parameter in trainable.items() if key in outputs]),
    )
    return [
        {"name": name, "params": parameters, "lr": rate, "weight_decay": weight_decay}
        for name, rate, parameters in groups
        if parameters
    ]
