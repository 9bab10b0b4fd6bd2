"""How many parameters a model has, and how many of them train, independent of the layout."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch import nn

from meshpeft.parallel import layout_of_tensor
from meshpeft.peft.walk import chunks_of

__all__ = ["ParameterCount", "print_trainable_parameters", "trainable_parameters"]


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
    """Count the parameters of a model or of its chunks: a divided one with its full size, a shared one once.

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
