"""Adapters that a run did not train, though they are there: what the loss does not show."""

from __future__ import annotations

import torch
from torch import nn

from meshpeft.peft import adapter_wrappers

__all__ = ["untrained_layers"]


def untrained_layers(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Full names of the layers whose adapters had no gradient in any step, as far as this rank's slices go.

    The output of the model does not depend on such a layer: it is part of something that text does not pass through,
    or of experts that no token was sent to.

    Args:
        model: with its adapters.
        optimizer: an AdamW that has taken the steps: its moments remember gradients.
    """

    def had_gradient(parameter: nn.Parameter) -> bool:
        state = optimizer.state.get(parameter, {})
        return any(bool(state[moment].any()) for moment in ("exp_avg", "exp_avg_sq") if moment in state)

    return [
        name
        for name, wrapper in adapter_wrappers(model)
        if not any(had_gradient(parameter) for parameter in wrapper.adapter.parameters())
    ]
