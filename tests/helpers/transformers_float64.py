"""transformers' models as a float64 reference.

Their code casts to float32 in places (RMSNorm, rotary tables and frequencies, router softmax), whatever the type of
the model, so a float64 model of theirs is off by 1e-7. Here those casts are lifted: while such a model runs,
`torch.float32`, `torch.float` and `Tensor.float()` mean float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel


@contextmanager
def lifted_float32() -> Iterator[None]:
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch, "float", torch.float64),
        mock.patch.object(Tensor, "float", Tensor.double),
    ):
        yield


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, cast to float64 with its float32 islands lifted; its forward does that by itself."""
    model.double()
    model.config._experts_implementation = "eager"  # the grouped kernel refuses float64
    with lifted_float32():
        for module in model.modules():
            if hasattr(module, "inv_freq") and hasattr(module, "original_inv_freq"):
                # Rebuilt, not cast: the frequencies themselves were computed in float32.
                rebuilt = type(module)(module.config)
                module.inv_freq = rebuilt.inv_freq
                module.original_inv_freq = rebuilt.original_inv_freq
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with lifted_float32():
            return original(*args, **kwargs)

    model.forward = forward  # type: ignore[method-assign]
    return model
