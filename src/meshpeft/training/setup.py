"""What finetune, evaluate and generate have in common: where to run, and the base model."""

from __future__ import annotations

from pathlib import Path

import torch

from meshpeft.checkpoint import load_peft_adapter
from meshpeft.models import Decoder, DecoderConfig, check_divisible, load_pretrained
from meshpeft.models.weights import WeightFiles, read_json
from meshpeft.parallel.config import ModelParallelConfig
from meshpeft.parallel.mesh import ParallelGroupInfo, init_parallelism, parallel_group_info
from meshpeft.quantization import BaseQuantizer
from meshpeft.training.config import ConfigError, FinetuneConfig, LayoutConfig, TensorType, tensor_type
from meshpeft.training.embedded import embedded_model_dir
from meshpeft.training.launch import number_of_workers
from meshpeft.training.quantized_base import base_quantizer

__all__ = [
    "base_directory",
    "check_base",
    "device",
    "join_mesh",
    "load_base",
    "load_base_and_adapter",
    "workers_for",
]


def base_directory(model: Path | None) -> Path:
    """The directory of the base model: the one asked for, or the embedded one."""
    return embedded_model_dir() if model is None else model


def device() -> torch.device:
    """This worker's GPU, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def workers_for(layout: LayoutConfig) -> int:
    """How many processes the options ask for; see [`number_of_workers`][meshpeft.training.launch.number_of_workers]."""
    return number_of_workers(layout.tp, layout.dp, expert_parallel=layout.ep, expert_tensor_parallel=layout.etp)


def join_mesh(layout: LayoutConfig) -> ParallelGroupInfo:
    """Make the groups that the options ask for. Every worker calls it."""
    return init_parallelism(tensor_parallel=layout.tp, expert_parallel=layout.ep, expert_tensor_parallel=layout.etp)


def check_base(model: Path | None, layout: LayoutConfig) -> DecoderConfig:
    """Everything about a base model that can be known without reading its weights; starts no process.

    Raises:
        ModelError: its configuration is not one of ours, a file is missing or truncated, or its sizes do not
            divide.
        ConfigError: a layout of experts for a model without them.
    """
    directory = base_directory(model)
    config = DecoderConfig.from_hf(read_json(directory / "config.json"))
    if config.moe is None and layout.etp not in (None, layout.tp):
        raise ConfigError(f"etp={layout.etp}: a {config.model_type} model has no experts; leave it out")
    parallel = ModelParallelConfig(
        tensor_model_parallel_size=layout.tp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )
    check_divisible(config, parallel)
    with WeightFiles(directory):
        pass
    return config


def load_base(
    model: Path | None,
    dtype: TensorType,
    *,
    quantize: BaseQuantizer | None = None,
    sequence_parallel: bool,
    activation_checkpointing: bool = False,
) -> Decoder:
    """This rank's share of the base model, packed as it is read if asked for.

    Raises:
        QuantizationError: a layer that cannot be packed.
        ModelError: see [`load_pretrained`][meshpeft.models.load_pretrained].
    """
    info = parallel_group_info()
    parallel = ModelParallelConfig(
        tensor_model_parallel_size=info.tp.world_size,
        expert_model_parallel_size=info.ep.world_size,
        expert_tensor_parallel_size=info.etp.world_size,
        sequence_parallel=sequence_parallel,
    )
    return load_pretrained(
        base_directory(model),
        tensor_type(dtype),
        parallel,
        activation_checkpointing,
        device=device(),
        quantize=quantize,
    )


def load_base_and_adapter(run: FinetuneConfig, adapter: Path | None, *, sequence_parallel: bool) -> Decoder:
    """This rank's share of a run's base model, with the adapter that a directory holds, if one is given.

    Raises:
        MeshPEFTError: the model or the adapter cannot be read.
    """
    decoder = load_base(run.model, run.dtype, quantize=base_quantizer(run), sequence_parallel=sequence_parallel)
    if adapter is not None:
        load_peft_adapter(decoder, adapter)
    return decoder
