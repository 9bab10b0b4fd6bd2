"""Adapters in the format of Hugging Face PEFT, which `peft` and serving systems load unchanged.

A layer of ours that is fused is several modules there: LoRA or DoRA on `linear_qkv` is written as adapters of
`q_proj`, `k_proj` and `v_proj`, which share A and have their own rows of B, and their own magnitudes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._local_tensor import LocalTensor

from meshpeft.checkpoint.errors import CheckpointError
from meshpeft.checkpoint.linears import AdaptedLinear, Factor, adapted_linears, hub_linears
from meshpeft.checkpoint.peft_config import CONFIG_NAME, FACTOR_A, FACTOR_B, MAGNITUDE, PREFIX, WEIGHTS_NAME, describe
from meshpeft.checkpoint.staging import StagedFiles, write_flushed
from meshpeft.checkpoint.tensor_file import Declared, TensorFileWriter
from meshpeft.parallel.agreement import kept, raise_everywhere

__all__ = ["export_peft_adapter"]


def export_peft_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    base_model_name_or_path: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`. A collective: every rank calls it.

    The factors are gathered one by one and keep their type; one process writes them as they come, so that no
    process holds more than its share and one tensor. The files appear together, when both are whole.

    Args:
        model: with adapters; a [`Decoder`][meshpeft.models.Decoder], or any model of layers under their own names.
        directory: made if it does not exist; other files in it are left alone.
        base_model_name_or_path: where readers find the base model.
        overwrite: replace an adapter that is there.

    Raises:
        CheckpointError: there is no adapter, or one that the format cannot express; the directory holds an
            adapter; or it cannot be written.
    """
    directory = Path(directory)
    adapted = adapted_linears(model)
    config = _config(model, adapted, base_model_name_or_path)
    # Under simulation there is one process, and torch.distributed calls it rank 0.
    writes = not dist.is_initialized() or dist.get_rank() == 0
    what = f"writing {directory}"
    failures: list[Exception] = []
    staged: StagedFiles | None = None
    writer: TensorFileWriter | None = None
    with kept(failures):
        if writes:
            if (directory / CONFIG_NAME).exists() and not overwrite:
                raise CheckpointError(f"{directory} holds an adapter; choose another directory or overwrite it")
            staged = StagedFiles(directory, [WEIGHTS_NAME, CONFIG_NAME])
            declared = [tensor for linear in adapted for tensor in _declared(linear)]
            writer = TensorFileWriter(staged.folder / WEIGHTS_NAME, declared)
    try:
        raise_everywhere(failures, what, CheckpointError)
        for linear in adapted:
            for tensor in _gathered(linear):
                with kept(failures):
                    if writer is not None and not failures:
                        writer.write(tensor)
        with kept(failures):
            if writer is not None and staged is not None and not failures:
                writer.close()
                write_flushed(staged.folder / CONFIG_NAME, (json.dumps(config, indent=2) + "\n").encode())
                staged.publish()
        raise_everywhere(failures, what, CheckpointError)
    finally:
        if writer is not None:
            writer.abandon()
        if staged is not None:
            staged.clean_up()


def _config(model: nn.Module, adapted: list[AdaptedLinear], base_model_name_or_path: str | None) -> dict[str, object]:
    first = adapted[0]
    for linear in adapted:
        for option, (a, b) in {
            "use_rslora": (first.use_rslora, linear.use_rslora),
            "use_dora": (first.magnitude is not None, linear.magnitude is not None),
        }.items():
            if a != b:
                raise CheckpointError(
                    f"{option} is {a} on {first.module}, {b} on {linear.module}; a file has one value"
                )
    return describe(
        {name: linear.shape for linear in adapted for name in linear.names},
        [linear.name for linear in hub_linears(model)],
        use_rslora=first.use_rslora,
        use_dora=first.magnitude is not None,
        dropout=first.dropout,
        base_model_name_or_path=base_model_name_or_path,
    )


# The two below say the same in the same order: every A, then the parts of B, then those of the magnitude.


def _declared(linear: AdaptedLinear) -> Iterator[Declared]:
    for name in linear.names:
        yield Declared(f"{PREFIX}{name}.{FACTOR_A}", linear.a.values.dtype, linear.a.layout.global_shape)
    for factor, suffix in _divided(linear):
        for name, piece in zip(linear.names, factor.layout.pieces(), strict=True):
            yield Declared(f"{PREFIX}{name}.{suffix}", factor.values.dtype, piece.global_shape)


def _gathered(linear: AdaptedLinear) -> Iterator[Tensor]:
    a = _plain(linear.a.layout.gather(linear.a.values))
    for _ in linear.names:
        yield a
    for factor, _ in _divided(linear):
        full, packing = _plain(factor.layout.gather(factor.values)), factor.layout.packing
        yield from [full] if packing is None else full.split(list(packing.sizes), factor.layout.packed_dim)


def _divided(linear: AdaptedLinear) -> list[tuple[Factor, str]]:
    """What has a part for each of the linear's names, and how it is called."""
    magnitudes = [] if linear.magnitude is None else [(linear.magnitude, MAGNITUDE)]
    return [(linear.b, FACTOR_B), *magnitudes]


def _plain(full: Tensor) -> Tensor:
    return full.reconcile() if isinstance(full, LocalTensor) else full
