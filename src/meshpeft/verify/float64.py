"""Models of transformers in float64: their code casts to float32 in places, whatever the type of the model.

Norms, rotary tables and the softmax of routers are computed in float32 there, so a float64 model of theirs is exact to
1e-7 only, which is more than the errors that an oracle looks for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["Float64ForFloat32", "lift_float32"]


class Float64ForFloat32(TorchFunctionMode):
    """Calls of torch that name float32 mean float64, and so does `Tensor.float`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        named = {name: _wider(value) for name, value in (kwargs or {}).items()}
        return func(*(_wider(value) for value in args), **named)


def lift_float32(model: nn.Module) -> None:
    """Let the code of transformers' modules in a model compute in float64 what it would in float32, in place.

    A mode of torch is on in the forward of each of these modules, so that it holds for layers that the backward pass
    computes again, too. Tensors that are float32 already stay so.
    """
    for module in model.modules():
        if any(cls.__module__.partition(".")[0] == "transformers" for cls in type(module).__mro__):
            module.forward = _lifted(module.forward)


def _lifted(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def lifted(*args: Any, **kwargs: Any) -> Any:
        with Float64ForFloat32():
            return forward(*args, **kwargs)

    return lifted


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
