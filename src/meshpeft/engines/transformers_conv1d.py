"""How `Conv1D` of transformers (GPT-2), a linear layer that stores its weight transposed, lies on the mesh: whole."""

from __future__ import annotations

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from meshpeft.parallel import LayerType, LinearLayout, register_layer_type

__all__: list[str] = []


def _transposed(module: Conv1D) -> Tensor:
    weight: Tensor = module.weight
    return weight.T


register_layer_type(
    Conv1D,
    LayerType(
        layout=lambda module: LinearLayout(module.nx, module.nf),
        weight=_transposed,
        enter=lambda module, x: x,
        exit=lambda module, y: y + module.bias.to(y.dtype),
        store=lambda module, local: {"weight": local.T.contiguous()},
    ),
)
