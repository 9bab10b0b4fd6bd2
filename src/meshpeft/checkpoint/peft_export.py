"""Adapters in the format of Hugging Face PEFT, which `peft` and serving systems load unchanged.

A layer of ours that is fused is several modules there: LoRA or DoRA on `linear_qkv` is written as adapters of
`q_proj`, `k_proj` and `v_proj`, which share A and have their own rows of B, and their own magnitudes. For the forms of
stacked experts see `meshpeft.checkpoint.places`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import get_args

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._local_tensor import LocalTensor

from meshpeft.checkpoint.errors import CheckpointError
from meshpeft.checkpoint.linears import AdaptedLinear, Factor, adapted_linears, has_our_names, hub_linears
from meshpeft.checkpoint.peft_config import CONFIG_NAME, WEIGHTS_NAME, AdapterShape, describe
from meshpeft.checkpoint.places import AdapterFormat, Place, WrittenNames, is_adapted_as_parameter, stored_factors
from meshpeft.checkpoint.tensor_file import Declared, TensorFileWriter
from meshpeft.models import Decoder
from meshpeft.models.staging import StagedFiles
from meshpeft.parallel.agreement import kept, raise_everywhere
from meshpeft.parallel.held_modules import held_module
from meshpeft.parallel.layer_types import layer_type_of
from meshpeft.peft import AdapterWrapper
from meshpeft.peft.walk import walk

__all__ = ["check_exportable", "export_peft_adapter"]


def export_peft_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    base_model_name_or_path: str | None = None,
    overwrite: bool = False,
    format: AdapterFormat = "peft",
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`. A collective: every rank calls it.

    The factors are gathered one by one and keep their type; one process writes them as they come, so that no
    process holds more than its share and one tensor. The files appear together, when both are whole.

    Args:
        model: with adapters; a [`Decoder`][meshpeft.models.Decoder], or any model of layers under their own names.
        directory: made if it does not exist; other files in it are left alone.
        base_model_name_or_path: where readers find the base model.
        overwrite: replace an adapter that is there.
        format: how stacked experts are written: `peft`, as peft adapts the parameters of transformers' models; or
            `peft-per-expert`, every expert by itself under the names of the family's checkpoints on the hub, as
            serving systems read them. Of models without experts both are the same.

    Raises:
        CheckpointError: there is no adapter, or one that the format cannot express; the directory holds an
            adapter; or it cannot be written.
    """
    directory = Path(directory)
    adapted, names, config = _described(model, format, base_model_name_or_path)
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
            staged = StagedFiles(directory)
            declared = [tensor for linear in adapted for tensor in _declared(linear, names)]
            writer = TensorFileWriter(staged.folder / WEIGHTS_NAME, declared)
    try:
        raise_everywhere(failures, what, CheckpointError)
        for linear in adapted:
            for tensor in _gathered(linear, names):
                with kept(failures):
                    if writer is not None and not failures:
                        writer.write(tensor)
        with kept(failures):
            if writer is not None and staged is not None and not failures:
                writer.close()
                (staged.folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
                staged.publish([WEIGHTS_NAME, CONFIG_NAME])
        raise_everywhere(failures, what, CheckpointError)
    finally:
        if writer is not None:
            writer.abandon()
        if staged is not None:
            staged.clean_up()


def check_exportable(model: nn.Module, format: AdapterFormat) -> None:
    """Whether a format can express the adapters of a model; their values are not read.

    Raises:
        CheckpointError: it cannot; see [`export_peft_adapter`][meshpeft.checkpoint.export_peft_adapter].
    """
    _described(model, format, None)


def _described(
    model: nn.Module, format: AdapterFormat, base_model_name_or_path: str | None
) -> tuple[list[AdaptedLinear], WrittenNames, dict[str, object]]:
    """The adapters as they are written, their names, and the content of `adapter_config.json`."""
    if format not in get_args(AdapterFormat):
        raise CheckpointError(f"format={format!r}: expected one of {', '.join(get_args(AdapterFormat))}")
    model = held_module(model)
    adapted = adapted_linears(model)
    if format == "peft-per-expert":
        adapted = _of_one_scale(adapted)
    names = _names(model, adapted, format)
    return adapted, names, _config(model, adapted, names, base_model_name_or_path)


def _names(model: nn.Module, adapted: list[AdaptedLinear], format: AdapterFormat) -> WrittenNames:
    linears = {linear.name: linear for linear in hub_linears(model)}
    stacks = {linear.names[0]: linears[linear.names[0]] for linear in adapted if linear.experts is not None}
    return WrittenNames(format, linears, stacks, model.config.model_type if isinstance(model, Decoder) else None)


def _config(
    model: nn.Module, adapted: list[AdaptedLinear], names: WrittenNames, base_model_name_or_path: str | None
) -> dict[str, object]:
    first = adapted[0]
    use_dora = first.magnitude is not None
    for linear in adapted:
        for option, (a, b) in {
            "use_rslora": (first.use_rslora, linear.use_rslora),
            "use_dora": (use_dora, linear.magnitude is not None),
        }.items():
            if a != b:
                raise CheckpointError(
                    f"{option} is {a} on {first.module}, {b} on {linear.module}; a file has one value"
                )
    modules: list[str] = []
    parameters: list[str] = []
    shapes: dict[str, AdapterShape] = {}
    for linear in adapted:
        own_modules, own_parameters, patterns = _addressed(model, linear, names)
        modules += own_modules
        parameters += own_parameters
        shapes |= dict.fromkeys(patterns, linear.shape)
    if use_dora and parameters:
        raise CheckpointError(
            f"{min(parameters)}: peft adapts this parameter with LoRA only, not with DoRA; export in the form "
            "'peft-per-expert', or merge the adapter and save the model"
        )
    # Servers allot room for the rank that stands there.
    largest, most = max(shapes.values(), key=attrgetter("rank")), Counter(shapes.values()).most_common(1)[0][0]
    others = names.of_all(skip={parameter.removesuffix(".weight") for parameter in parameters})
    if not has_our_names(model):  # peft has a say on modules of every kind
        others += [
            place.full_name
            for place, module in walk(model)
            if layer_type_of(module) is None and not isinstance(module, AdapterWrapper)
        ]
    return describe(
        modules,
        others,
        parameters,
        shapes,
        usual=largest if names.per_expert else most,
        use_rslora=first.use_rslora,
        use_dora=use_dora,
        dropout=first.dropout,
        base_model_name_or_path=base_model_name_or_path,
    )


def _addressed(model: nn.Module, linear: AdaptedLinear, names: WrittenNames) -> tuple[list[str], list[str], list[str]]:
    """The modules, and the parameters, that a reader is to adapt; and the patterns by which it knows their shape."""
    modules: list[str] = []
    parameters: list[str] = []
    for name in linear.names:
        if linear.experts is not None and names.per_expert:
            return names.of_experts(name), [], names.patterns_of_experts(name)
        if linear.experts is not None:
            parameters.append(name)
        elif is_adapted_as_parameter(model, name) and not names.per_expert:
            parameters.append(f"{name}.weight")
        else:
            modules.append(names.of_module(name))
    return modules, parameters, [*modules, *parameters]


def _of_one_scale(adapted: list[AdaptedLinear]) -> list[AdaptedLinear]:
    """The same adapters, all scaled alike: what their scales differ by becomes part of B, when it is written.

    Serving systems take one scale for the whole file, `lora_alpha / r`, whatever its patterns say.
    """
    largest = max(adapted, key=lambda linear: linear.shape.rank)
    scale = largest.shape.scale(largest.use_rslora)
    found = []
    for linear in adapted:
        own = linear.shape.scale(linear.use_rslora)
        shape = AdapterShape.of_scale(linear.shape.rank, scale, linear.use_rslora)
        found.append(linear if own == scale else replace(linear, shape=shape, b_factor=own / scale))
    return found


# The two below say the same in the same order: A, then B, then the magnitude.


def _declared(linear: AdaptedLinear, names: WrittenNames) -> Iterator[Declared]:
    for factor, stored in zip(_factors(linear), stored_factors(Place.of(linear), names), strict=True):
        for key, shape in stored.declared():
            yield Declared(key, factor.values.dtype, shape)


def _gathered(linear: AdaptedLinear, names: WrittenNames) -> Iterator[Tensor]:
    for factor, stored in zip(_factors(linear), stored_factors(Place.of(linear), names), strict=True):
        full = _plain(factor.layout.gather(factor.values))
        changed = factor is linear.b and linear.b_factor != 1
        yield from stored.split(full * linear.b_factor if changed else full)


def _factors(linear: AdaptedLinear) -> list[Factor]:
    return [linear.a, linear.b, *([] if linear.magnitude is None else [linear.magnitude])]


def _plain(full: Tensor) -> Tensor:
    return full.reconcile() if isinstance(full, LocalTensor) else full
