"""Reading adapters that Hugging Face PEFT, or `export_peft_adapter`, wrote."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from meshpeft.checkpoint.errors import CheckpointError
from meshpeft.checkpoint.linears import HubLinear, adapted_linears, hub_linears
from meshpeft.checkpoint.peft_config import CONFIG_NAME, PREFIX, WEIGHTS_NAME, AdapterShape, PeftConfig
from meshpeft.checkpoint.tensor_file import TensorFileReader
from meshpeft.parallel.agreement import all_or_none
from meshpeft.parallel.tensor_layout import TensorLayout
from meshpeft.peft import AdapterWrapper, LoRA

__all__ = ["load_peft_adapter"]

Model = TypeVar("Model", bound=nn.Module)

_KEY = re.compile(re.escape(PREFIX) + r"(.+)\.lora_(A|B)\.weight")


@dataclass(frozen=True)
class _Incoming:
    """An adapter in a file, for one layer of ours: the file's names of A and of the parts of B."""

    module: str
    shape: AdapterShape
    layout_a: TensorLayout
    layout_b: TensorLayout
    keys_a: tuple[str, ...]
    keys_b: tuple[str, ...]


def load_peft_adapter(
    model: Model, directory: str | Path, *, trainable: bool = False, dtype: torch.dtype | None = None
) -> Model:
    """Put the adapter of a directory on a model. Every rank calls it, and reads its own slices of the file.

    Modules of the file that are one fused layer here must share A.

    Args:
        model: without adapters; or with adapters of the same ranks, scales and targets, whose values are replaced.
        directory: with `adapter_config.json` and `adapter_model.safetensors`.
        trainable: leave the adapters trainable, the rest frozen and the model in training mode; otherwise
            everything is frozen and the model in evaluation mode. Ignored where the model has adapters.
        dtype: of the adapters' parameters; that of the file by default.

    Returns:
        The model, changed in place.

    Raises:
        CheckpointError: a file is missing, cut or damaged, or is not of an adapter for this model; the message names
            the first difference, on every rank, and the model is as it was.
    """
    directory = Path(directory)
    with all_or_none(f"reading {directory}", CheckpointError):
        config = PeftConfig.read(directory / CONFIG_NAME)
        with TensorFileReader(_weights(directory)) as file:
            file.check_values()
            incoming = _plan(model, config, file)
            existing = _existing(model, config, incoming)
            values = {plan.module: _read(file, plan) for plan in incoming}
            types = {file.tensors[plan.keys_a[0]].dtype for plan in incoming}
            if dtype is None and len(types) > 1:
                raise CheckpointError(
                    f"{file.path} holds tensors of several types ({_list(types)}); choose one with dtype="
                )
    if not existing:
        model = _with_adapters(model, config, incoming, types.pop() if dtype is None else dtype, trainable)
    with torch.no_grad():
        for linear in adapted_linears(model):
            for parameter, value in zip((linear.a, linear.b), values[linear.module], strict=True):
                parameter.copy_(value)
    return model


def _weights(directory: Path) -> Path:
    path = directory / WEIGHTS_NAME
    if not path.exists() and (directory / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{directory} holds adapter_model.bin, a pickle, which could run any program; save it as safetensors"
        )
    return path


def _plan(model: nn.Module, config: PeftConfig, file: TensorFileReader) -> list[_Incoming]:
    """Match the file with the model: every module, shape and type, before anything is read."""
    if config.use_dora:
        raise CheckpointError(f"{file.path.parent}: DoRA (use_dora) is not implemented")
    linears = {linear.name: linear for linear in hub_linears(model)}
    held = _modules_of(file, linears)
    expected = config.targets(linears)
    # Of numbered layers only the file itself says which.
    missing = set() if config.some_layers_only else expected - held
    if missing:
        raise CheckpointError(f"{file.path} lacks {PREFIX}{min(missing)}.lora_A.weight, though its config targets it")
    if held - expected:
        raise CheckpointError(
            f"{file.path} holds an adapter for {min(held - expected)}, which its config does not target"
        )
    by_module: dict[str, list[HubLinear]] = {}
    for linear in linears.values():
        if linear.name in held:
            by_module.setdefault(linear.module, []).append(linear)
    return [_plan_module(module, parts, linears, config, file) for module, parts in by_module.items()]


def _modules_of(file: TensorFileReader, linears: Mapping[str, HubLinear]) -> set[str]:
    halves: dict[str, set[str]] = {}
    for key in sorted(file.tensors):
        found = _KEY.fullmatch(key)
        if found is None:
            raise CheckpointError(f"{file.path} holds {key!r}, which is not a tensor of a LoRA adapter")
        if found[1] not in linears:
            raise CheckpointError(f"{file.path} holds {key!r}, but the model has no linear layer {found[1]}")
        halves.setdefault(found[1], set()).add(found[2])
    if not halves:
        raise CheckpointError(f"{file.path} holds no tensors")
    for name, half in halves.items():
        if len(half) == 1:
            other = "B" if "A" in half else "A"
            raise CheckpointError(f"{file.path} lacks {PREFIX}{name}.lora_{other}.weight")
    return set(halves)


def _plan_module(
    module: str, parts: list[HubLinear], linears: Mapping[str, HubLinear], config: PeftConfig, file: TensorFileReader
) -> _Incoming:
    absent = [other.name for other in linears.values() if other.module == module and other not in parts]
    if absent:
        raise CheckpointError(
            f"{file.path} has an adapter for {parts[0].name} but none for {absent[0]}; both are parts of {module}, and "
            "LoRA adapts all of it"
        )
    shapes = {config.shape_of(part.name) for part in parts}
    if len(shapes) > 1:
        raise CheckpointError(f"{file.path}: the parts of {module} have different ranks or alphas ({_list(shapes)})")
    shape = shapes.pop()
    layout = parts[0].layout
    plan = _Incoming(
        module,
        shape,
        layout.factor_a(shape.rank),
        layout.factor_b(shape.rank),
        tuple(f"{PREFIX}{part.name}.lora_A.weight" for part in parts),
        tuple(f"{PREFIX}{part.name}.lora_B.weight" for part in parts),
    )
    for key in plan.keys_a:
        _check_shape(file, key, plan.layout_a.global_shape)
    for key, piece in zip(plan.keys_b, plan.layout_b.pieces(), strict=True):
        _check_shape(file, key, piece.global_shape)
    shared = file.read(plan.keys_a[0])
    for key in plan.keys_a[1:]:
        if not torch.equal(shared, file.read(key)):
            raise CheckpointError(
                f"{file.path}: {plan.keys_a[0]} and {key} differ, but {module} is one layer here, whose parts share A"
            )
    return plan


def _check_shape(file: TensorFileReader, key: str, shape: tuple[int, ...]) -> None:
    stored = file.tensors[key]
    if stored.shape != shape:
        raise CheckpointError(
            f"{file.path}: {key} has shape {stored.shape}; the model and the config's rank say {shape}"
        )
    if not stored.dtype.is_floating_point:
        raise CheckpointError(f"{file.path}: {key} is stored as {stored.dtype}; expected a floating-point type")


def _read(file: TensorFileReader, plan: _Incoming) -> tuple[Tensor, Tensor]:
    """This rank's slices of A and B, in packed order."""
    a = [file.read_box(plan.keys_a[0], piece.offset, piece.shape) for piece in plan.layout_a.pieces()]
    b = [
        file.read_box(key, piece.offset, piece.shape)
        for key, piece in zip(plan.keys_b, plan.layout_b.pieces(), strict=True)
    ]
    return plan.layout_a.join_parts(a), plan.layout_b.join_parts(b)


def _existing(model: nn.Module, config: PeftConfig, incoming: list[_Incoming]) -> bool:
    """Whether the model has adapters: then they must be the file's, but for their values."""
    if not any(isinstance(module, AdapterWrapper) for module in model.modules()):
        return False
    adapters = {linear.module: linear for linear in adapted_linears(model)}
    plans = {plan.module: plan for plan in incoming}
    for module in (*adapters, *plans):
        if module not in plans:
            raise CheckpointError(f"the model has an adapter on {module}, the file has none")
        if module not in adapters:
            raise CheckpointError(f"the file has an adapter on {module}, the model has none")
        found, wanted = adapters[module].shape, plans[module].shape
        if found != wanted:
            raise CheckpointError(
                f"{module}: the file's adapter has rank {wanted.rank} and alpha {wanted.alpha:g}, "
                f"the model's rank {found.rank} and alpha {found.alpha:g}"
            )
        if adapters[module].use_rslora != config.use_rslora:
            raise CheckpointError(f"{module}: use_rslora is {config.use_rslora} in the file, not so in the model")
    return True


def _with_adapters(
    model: Model, config: PeftConfig, incoming: list[_Incoming], dtype: torch.dtype, trainable: bool
) -> Model:
    groups: dict[AdapterShape, list[str]] = {}
    for plan in incoming:
        groups.setdefault(plan.shape, []).append(plan.module)
    for shape, modules in groups.items():
        method = LoRA(
            target_modules=modules,
            dim=shape.rank,
            alpha=shape.alpha,
            dropout=config.dropout,
            use_rslora=config.use_rslora,
            lora_dtype=dtype,
        )
        model = method(model, training=trainable)
    return model


def _list(items: Iterable[object]) -> str:
    return ", ".join(sorted(map(str, items)))
