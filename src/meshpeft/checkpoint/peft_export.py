"""Adapters in the format of Hugging Face PEFT, which `peft` and serving systems load unchanged.

A layer of ours that is fused is several modules there: an adapter on `linear_qkv` is written as those of `q_proj`,
`k_proj` and `v_proj`, which share A and have their own rows of B.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._local_tensor import LocalTensor

from meshpeft.checkpoint.errors import CheckpointError
from meshpeft.checkpoint.linears import AdaptedLinear, adapted_linears, hub_linears, stated_layout
from meshpeft.checkpoint.peft_config import CONFIG_NAME, PREFIX, WEIGHTS_NAME, describe
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
        if linear.use_rslora != first.use_rslora:
            raise CheckpointError(
                f"{first.module} and {linear.module} scale by different rules (use_rslora), which "
                f"{CONFIG_NAME} cannot express"
            )
    return describe(
        {name: linear.shape for linear in adapted for name in linear.names},
        [linear.name for linear in hub_linears(model)],
        use_rslora=first.use_rslora,
        use_dora=False,
        dropout=first.dropout,
        base_model_name_or_path=base_model_name_or_path,
    )


# The two below say the same in the same order: every A, then the rows of B.


def _declared(linear: AdaptedLinear) -> Iterator[Declared]:
    a, b = stated_layout(linear.a, linear.module), stated_layout(linear.b, linear.module)
    rows = (b.global_shape[0],) if b.packing is None else b.packing.sizes
    for name in linear.names:
        yield Declared(f"{PREFIX}{name}.lora_A.weight", linear.a.dtype, a.global_shape)
    for name, size in zip(linear.names, rows, strict=True):
        yield Declared(f"{PREFIX}{name}.lora_B.weight", linear.b.dtype, (size, *b.global_shape[1:]))


def _gathered(linear: AdaptedLinear) -> Iterator[Tensor]:
    a = _plain(stated_layout(linear.a, linear.module).gather(linear.a))
    for _ in linear.names:
        yield a
    layout = stated_layout(linear.b, linear.module)
    yield from linear.parts_of(_plain(layout.gather(linear.b)), layout)


def _plain(full: Tensor) -> Tensor:
    return full.reconcile() if isinstance(full, LocalTensor) else full
