"""A gated MLP and an output layer whose sizes divide into quantisation blocks at every layout of the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from helpers.simulate import the_same
from torch import Tensor, nn

from meshpeft.parallel import (
    ColumnParallelLinear,
    FusedParts,
    RowParallelLinear,
    TensorLayout,
    finalize_gradients,
    layout_of,
    layout_of_tensor,
    named_init_,
)

HIDDEN, WIDTH = 128, 256

# Drawn here: inside a simulation every rank would draw its own.
_GENERATOR = torch.Generator().manual_seed(3)
INPUT = torch.randn(8, 3, HIDDEN, generator=_GENERATOR, dtype=torch.float64)
OUTPUT_WEIGHT = 0.1 * torch.randn(64, HIDDEN, generator=_GENERATOR, dtype=torch.float64)


class GatedMLP(nn.Module):
    """output_layer(linear_fc2(silu(gate) * up)); weights are those of one seed at every layout."""

    def __init__(self, dtype: torch.dtype = torch.float64, bias: bool = True) -> None:
        super().__init__()
        options: dict[str, Any] = {"dtype": dtype, "bias": bias, "perform_initialization": False}
        fused_parts = FusedParts(("gate", "up"), (WIDTH, WIDTH))
        self.linear_fc1 = ColumnParallelLinear(
            HIDDEN, 2 * WIDTH, gather_output=False, fused_parts=fused_parts, **options
        )
        self.linear_fc2 = RowParallelLinear(WIDTH, HIDDEN, input_is_parallel=True, **options)
        self.output_layer = nn.Linear(HIDDEN, 64, dtype=dtype, bias=bias)
        self.fused_parts, self.shards = fused_parts, self.linear_fc1.layout.axis.world_size
        for name, parameter in self.named_parameters():
            if layout_of_tensor(parameter) is not None:
                named_init_(parameter, lambda full: full.normal_(std=0.1), 0, name)
        with torch.no_grad():
            self.output_layer.weight.copy_(OUTPUT_WEIGHT)
            if bias:
                self.output_layer.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.fused_parts.split(self.linear_fc1(x), -1, self.shards)
        return self.output_layer(self.linear_fc2(F.silu(gate) * up))


def full_weight(layer: nn.Module, weight: Tensor) -> Tensor:
    """What is laid out like a layer's weight, whole."""
    return the_same(layout_of(layer).weight().gather(weight.detach()))


def train(model: nn.Module, steps: int, x: Tensor = INPUT, lr: float = 0.01) -> None:
    """A few steps of SGD towards zero outputs."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        finalize_gradients(model)
        optimizer.step()


def adapters_of(model: nn.Module) -> dict[str, Tensor]:
    """Every adapter parameter, whole."""
    whole = TensorLayout((), ())
    found = {}
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            gather: Callable[[Tensor], Tensor] = (layout_of_tensor(parameter) or whole).gather
            found[name] = the_same(gather(parameter.detach()))
    return found
