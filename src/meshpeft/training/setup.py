"""What finetune, evaluate and generate have in common: where to run, and the base model."""

from __future__ import annotations

from pathlib import Path

import torch

from meshpeft.checkpoint import load_peft_adapter
from meshpeft.models import Decoder, DecoderConfig, check_divisible, load_pretrained
from meshpeft.models.weights import WeightFiles, read_json
from meshpeft.parallel.config import ModelParallelConfig
from meshpeft.parallel.mesh import parallel_group_info
from meshpeft.training.config import TensorType, tensor_type
from meshpeft.training.embedded import embedded_model_dir

__all__ = [
    "base_directory",
    "check_base",
    "device",
    "load_base",
    "load_base_and_adapter",
]


def base_directory(model: Path | None) -> Path:
    """The directory of the base model: the one asked for, or the embedded one."""
    return embedded_model_dir() if model is None else model


def device() -> torch.device:
    """This worker's GPU, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def check_base(model: Path | None, tensor_parallel: int) -> DecoderConfig:
    """Everything about a base model that can be known without reading its weights; starts no process.

    Raises:
        ModelError: its configuration is not one of ours, a file is missing or truncated, or its sizes do not
            divide.
    """
    directory = base_directory(model)
    config = DecoderConfig.from_hf(read_json(directory / "config.json"))
    check_divisible(config, ModelParallelConfig(tensor_model_parallel_size=tensor_parallel))
    with WeightFiles(directory):
        pass
    return config


def load_base(
    model: Path | None, dtype: TensorType, *, sequence_parallel: bool, activation_checkpointing: bool = False
) -> Decoder:
    """This rank's share of the base model.

    Raises:
        ModelError: see [`load_pretrained`][meshpeft.models.load_pretrained].
    """
    parallel = ModelParallelConfig(
        tensor_model_parallel_size=parallel_group_info().tp.world_size, sequence_parallel=sequence_parallel
    )
    return load_pretrained(
        base_directory(model), tensor_type(dtype), parallel, activation_checkpointing, device=device()
    )


def load_base_and_adapter(
    model: Path | None, adapter: Path | None, dtype: TensorType, *, sequence_parallel: bool
) -> Decoder:
    """This rank's share of the base model, with the adapter that a directory holds, if one is given.

    Raises:
        MeshPEFTError: the model or the adapter cannot be read.
    """
    decoder = load_base(model, dtype, sequence_parallel=sequence_parallel)
    if adapter is not None:
        load_peft_adapter(decoder, adapter)
    return decoder
