"""Reading adapters that Hugging Face PEFT, or `export_peft_adapter`, wrote."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from meshpeft.hub.adapter_config import CONFIG_NAME, WEIGHTS_NAME, PeftConfig
from meshpeft.hub.adapter_plan import AdapterPlan
from meshpeft.hub.errors import CheckpointError
from meshpeft.hub.fsdp import reshard
from meshpeft.hub.linears import adapted_linears, is_adapted
from meshpeft.hub.tensor_file import TensorFileReader
from meshpeft.parallel.agreement import all_or_none

__all__ = ["load_peft_adapter"]

Model = TypeVar("Model", bound=nn.Module)


def load_peft_adapter(
    model: Model,
    directory: str | Path,
    *,
    trainable: bool = False,
    dtype: torch.dtype | None = None,
    adapter_name: str | None = None,
) -> Model:
    """Put the adapter of a directory on a model. Every rank calls it, and reads its own slices of the file.

    Args:
        model: without adapters; or with adapters of the same method, ranks, scales and targets, whose values are
            replaced.
        directory: with `adapter_config.json` and `adapter_model.safetensors`.
        trainable: leave the adapters trainable, the rest frozen and the model in training mode; otherwise
            everything is frozen and the model in evaluation mode. Ignored where the model has adapters.
        dtype: Type of A and B. By default each keeps its own, that of the file. Magnitudes keep theirs, and are float32
            at least. Ignored where the model has adapters.
        adapter_name: which of the model's named adapters takes the values, where these have several names.

    Returns:
        The model, changed in place, with `LoRA`, `CanonicalLoRA` or `DoRA`.

    Raises:
        CheckpointError: a file is missing, cut or damaged, or is not of an adapter for this model; the message names
            the first difference, on every rank, and the model is as it was.
    """
    directory = Path(directory)
    reshard(model)
    with all_or_none(f"reading {directory}", CheckpointError):
        config = PeftConfig.read(directory / CONFIG_NAME)
        with TensorFileReader(_weights(directory)) as file:
            file.check_values()
            plan = AdapterPlan(model, config, file, adapter_name)
            values = {(place.module, place.names): plan.read(place) for place in plan.places}
    if not is_adapted(model):
        model = plan.adapted(model, dtype, trainable)
        for linear in adapted_linears(model):
            a, b, magnitude = values[linear.module, linear.names]
            linear.cast(dtype or a.dtype, dtype or b.dtype, None if magnitude is None else magnitude.dtype)
    with torch.no_grad():
        for linear in adapted_linears(model, adapter_name):
            factors = (linear.a, linear.b, linear.magnitude)
            for factor, value in zip(factors, values[linear.module, linear.names], strict=True):
                if factor is not None and value is not None:
                    factor.fill(value)
    return model


def _weights(directory: Path) -> Path:
    path = directory / WEIGHTS_NAME
    if not path.exists() and (directory / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{directory} holds adapter_model.bin, a pickle, which could run any program; save it as safetensors"
        )
    return path
