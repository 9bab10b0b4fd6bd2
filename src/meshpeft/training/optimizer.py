"""AdamW over the adapter's parameters, and the loss scale that float16 needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meshpeft.parallel.errors import MeshPEFTError
from meshpeft.peft import lora_plus_parameter_groups

__all__ = ["LossScale", "NothingToTrain", "adamw", "parameters_to_train"]


class NothingToTrain(MeshPEFTError):
    """A model all of whose parameters are frozen."""


def parameters_to_train(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient, each once, in the order of the modules (the same on every rank).

    Raises:
        NothingToTrain: there are none.
    """
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not found:
        raise NothingToTrain("every parameter of the model is frozen; add an adapter first")
    return found


def adamw(model: nn.Module, *, lr: float, weight_decay: float = 0.01, lr_ratio: float = 1.0) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over the trainable parameters of `model`, with betas 0.9 and 0.999.

    Args:
        model: with its adapters.
        lr: learning rate.
        weight_decay: decoupled.
        lr_ratio: the learning rate of B factors over `lr` (LoRA+). Every group keeps its own as `lr_ratio`, so
            that a schedule can change them together.
    """
    parameters: list[nn.Parameter] | list[dict[str, Any]] = parameters_to_train(model)
    if lr_ratio != 1:
        parameters = lora_plus_parameter_groups(model, lr, lr_ratio, weight_decay)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    for group in optimizer.param_groups:
        group["lr_ratio"] = group["lr"] / lr
    return optimizer


@dataclass
class LossScale:
    """The factor on a float16 loss that keeps small gradients from vanishing (arXiv 1710.03740).

    It is halved by a step whose gradients overflow, which is then skipped, and doubled after `growth_interval`
    steps without one. The verdict comes from the global gradient norm, so every rank has the same scale.

    Attributes:
        value: the current factor, a power of two.
        growth_interval: good steps before the next doubling.
        good_steps: since the factor last changed.
    """

    value: float = 2.0**15
    growth_interval: int = 500
    good_steps: int = 0

    def unscale_(self, parameters: list[nn.Parameter]) -> None:
        """Divide the gradients, in place, by the factor that their loss was multiplied by."""
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(1 / self.value)

    def accept(self, grad_norm: Tensor) -> bool:
        """Whether a step with this norm (of unscaled gradients, over all ranks) is taken; adapts the factor."""
        if not bool(grad_norm.isfinite()):
            self.value = max(1.0, self.value / 2)
            self.good_steps = 0
            return False
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.value *= 2
            self.good_steps = 0
        return True
