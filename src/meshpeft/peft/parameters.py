"""The parameters of a model with adapters: how many train, at any layout, and optimizer groups for LoRA+."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import nn

from meshpeft.parallel import layout_of_tensor
from meshpeft.peft.errors import AdapterError
from meshpeft.peft.matching import adapter_wrappers, chunks_of

__all__ = ["ParameterCount", "lora_plus_parameter_groups", "print_trainable_parameters", "trainable_parameters"]


class ParameterCount(NamedTuple):
    """Numbers of parameters over all ranks that share the model."""

    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        return f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {share:.4f}"

    def print(self) -> None:
        """Print the counts, once per run."""
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(self)


def trainable_parameters(model: nn.Module | list[nn.Module]) -> ParameterCount:
    """Count the parameters of a model or its chunks: a sharded one with its full size, a shared one once.

    A packed weight counts as the parameters that it stores, not as its bytes.
    """
    parameters = {id(parameter): parameter for chunk in chunks_of(model) for parameter in chunk.parameters()}
    sizes = []
    for parameter in parameters.values():
        layout = layout_of_tensor(parameter)
        sizes.append((parameter.numel() if layout is None else layout.size, parameter.requires_grad))
    return ParameterCount(sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes))


def print_trainable_parameters(model: nn.Module | list[nn.Module]) -> None:
    """Print `trainable_parameters` in the words of Hugging Face PEFT."""
    trainable_parameters(model).print()


def lora_plus_parameter_groups(
    model: nn.Module | list[nn.Module], lr: float, lr_ratio: float = 16.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: B at `lr * lr_ratio`, every other trainable parameter at `lr`.

    Args:
        model: Module with adapters, or its chunks.
        lr: Learning rate of A, magnitudes, and whatever else trains.
        lr_ratio: Ratio of B's learning rate to it; 16 is the paper's choice, 1 is ordinary LoRA.
        weight_decay: Weight decay of all groups.

    Returns:
        One or two groups, with a `name` each; no empty one.

    Raises:
        AdapterError: A ratio that is not a positive number; a model in which nothing trains.
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
