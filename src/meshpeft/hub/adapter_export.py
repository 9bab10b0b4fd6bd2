"""Write adapters in the format of Hugging Face PEFT.

`linear_qkv` becomes `q_proj`, `k_proj` and `v_proj`: the fused rows of B and of DoRA's magnitude are gathered in
canonical order and cut at the parts; A has no parts, and is written under each name. The tables of names are in
`meshpeft.hub.names`; the two forms of experts in `meshpeft.hub.adapter_tensors`; one rank and scale for adapters that
have several in `meshpeft.hub.adapter_scales`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch.distributed as dist
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from meshpeft.hub.adapter_config import CONFIG_NAME, WEIGHTS_NAME, AdapterShape, describe
from meshpeft.hub.adapter_scales import AS_THEY_ARE, FileScale, OwnAdapter, Written
from meshpeft.hub.adapter_tensors import (
    AdaptedLinear,
    AdapterFormat,
    Factor,
    FactorsInFile,
    WrittenNames,
    adapted_linears,
    has_our_names,
    hub_linears,
    is_adapted_as_parameter,
    reshard,
    sharded_parameters,
    stored_factors,
)
from meshpeft.hub.names import Stored, plain
from meshpeft.hub.staging import StagedFiles
from meshpeft.hub.tensor_files import CheckpointError, Declared, TensorFileWriter
from meshpeft.models import LanguageModel
from meshpeft.parallel.agreement import kept, raise_everywhere
from meshpeft.parallel.finite import check_finite
from meshpeft.parallel.registry import layer_type_of
from meshpeft.parallel.sharded_tensor import held_module
from meshpeft.peft import adapter_wrappers, base_of, walk
from meshpeft.peft.matching import decides

__all__ = ["check_exportable", "export_peft_adapter", "serving_note"]


def export_peft_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    base_model_name_or_path: str | None = None,
    overwrite: bool = False,
    format: AdapterFormat = "peft",
    adapter_name: str | None = None,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`. A collective: every rank calls it.

    The factors are gathered one by one and keep their type; one process writes them as they come, so that no
    process holds more than its share and one tensor. The files appear together, when both are whole.

    Args:
        model: With adapters; a `Decoder`, or any model of layers under their own names.
        directory: Made if it does not exist; other files in it are left alone.
        base_model_name_or_path: Where readers find the base model; by default where the model was loaded from.
        overwrite: Replace an adapter that is there.
        format: How stacked experts are written: `peft`, as peft adapts the parameters of transformers' models; or
            `peft-per-expert`, every expert by itself under the names of the family's checkpoints on the hub, as
            serving systems read them. Of models without experts both are the same.
        adapter_name: Name of the adapter of `update_model` to write, where these
            have several names.

    Raises:
        CheckpointError: There is no adapter, or one that the format cannot express, or that is not finite; the
            directory holds an adapter; or it cannot be written.
    """
    directory = Path(directory)
    described = _described(model, format, base_model_name_or_path, adapter_name)
    check_finite(described.values(), f"writing {directory}", CheckpointError)
    # Under simulation there is one process, and torch.distributed calls it rank 0.
    writes = not dist.is_initialized() or dist.get_rank() == 0
    # What PyTorch shards over all processes is gathered from them, whether the mesh knows of them or not.
    sharded, what = bool(sharded_parameters(model)), f"writing {directory}"
    failures: list[Exception] = []
    staged: StagedFiles | None = None
    writer: TensorFileWriter | None = None
    with kept(failures):
        if writes:
            if (directory / CONFIG_NAME).exists() and not overwrite:
                raise CheckpointError(f"{directory} holds an adapter; choose another directory or overwrite it")
            staged = StagedFiles(directory)
            declared = [tensor for linear in described.adapted for tensor in described.declared(linear)]
            writer = TensorFileWriter(staged.folder / WEIGHTS_NAME, declared, metadata=described.metadata)
    try:
        raise_everywhere(failures, what, CheckpointError, beyond_mesh=sharded)
        for linear in described.adapted:
            for tensor in described.gathered(linear):
                with kept(failures):
                    if writer is not None and not failures:
                        writer.write(tensor)
        with kept(failures):
            if writer is not None and staged is not None and not failures:
                writer.close()
                (staged.folder / CONFIG_NAME).write_text(
                    json.dumps(described.config, indent=2, allow_nan=False) + "\n", encoding="utf-8"
                )
                staged.publish([WEIGHTS_NAME, CONFIG_NAME])
        raise_everywhere(failures, what, CheckpointError, beyond_mesh=sharded)
    finally:
        if writer is not None:
            writer.abandon()
        if staged is not None:
            staged.clean_up()


def check_exportable(model: nn.Module, format: AdapterFormat) -> None:
    """Check that a format can express the adapters of a model; their values are not read.

    Raises:
        CheckpointError: It cannot; see `export_peft_adapter`.
    """
    _described(model, format, None, None)


@dataclass(frozen=True)
class _Described:
    """The adapters of a model as they are written.

    Attributes:
        adapted: The adapters.
        names: Their names in the file.
        scale: The rank and scale of the file, where not all adapters have these.
        config: Content of `adapter_config.json`.
    """

    adapted: list[AdaptedLinear]
    names: WrittenNames
    scale: FileScale | None
    config: dict[str, object]

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """Yield this rank's slices of all parameters."""
        for linear in self.adapted:
            for name, factor in {"linear_in": linear.a, "linear_out": linear.b, "magnitude": linear.magnitude}.items():
                if factor is not None:
                    yield f"{linear.module}.{name}", factor.values

    @property
    def metadata(self) -> dict[str, str]:
        """Additional entries in the header of the weights' file."""
        return {} if self.scale is None else self.scale.as_metadata()

    # The next two keep one order: A, then B, then the magnitude.

    def declared(self, linear: AdaptedLinear) -> Iterator[Declared]:
        """Yield names, types and shapes of an adapter's tensors."""
        for factor, written, stored in self._factors(linear):
            for key, shape in stored.declared():
                yield Declared(key, written.b_dtype(factor.values.dtype), shape)

    def gathered(self, linear: AdaptedLinear) -> Iterator[Tensor]:
        """Yield the tensors. A collective."""
        for factor, written, stored in self._factors(linear):
            yield from stored.split(written.b_in_file(plain(factor.full())))

    def _factors(self, linear: AdaptedLinear) -> Iterator[tuple[Factor, Written, Stored]]:
        """Yield each parameter, how its values are written (those of A and the magnitude unchanged), and where."""
        pair = FactorsInFile.of(linear, _written(linear, self.scale))
        factors = [linear.a, linear.b, *([] if linear.magnitude is None else [linear.magnitude])]
        for factor, stored in zip(factors, stored_factors(pair, self.names), strict=True):
            yield factor, pair.written if factor is linear.b else AS_THEY_ARE, stored


def _written(linear: AdaptedLinear, scale: FileScale | None) -> Written:
    return AS_THEY_ARE if scale is None else scale.written(linear.shape)


def _described(
    model: nn.Module, format: AdapterFormat, base_model_name_or_path: str | None, adapter_name: str | None
) -> _Described:
    if format not in get_args(AdapterFormat):
        raise CheckpointError(f"format={format!r}: expected one of {', '.join(get_args(AdapterFormat))}")
    model = held_module(model)
    reshard(model)
    adapted = adapted_linears(model, adapter_name)
    names = _names(model, adapted, format)
    _check_alike(adapted)
    addressed = [_addressed(model, linear, names) for linear in adapted]
    scale = _file_scale(adapted, addressed)
    shape = adapted[0].shape if scale is None else scale.shape
    return _Described(adapted, names, scale, _config(model, adapted, addressed, names, shape, base_model_name_or_path))


def _names(model: nn.Module, adapted: list[AdaptedLinear], format: AdapterFormat) -> WrittenNames:
    linears = {linear.name: linear for linear in hub_linears(model)}
    stacks = {linear.names[0]: linears[linear.names[0]] for linear in adapted if linear.is_stacked}
    return WrittenNames(format, linears, stacks, model)


def _check_alike(adapted: list[AdaptedLinear]) -> None:
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


class _Addressed(NamedTuple):
    """The modules and parameters that a reader of the config adapts, and their names in its patterns."""

    modules: list[str]
    parameters: list[str]
    known_as: list[str]


def _addressed(model: nn.Module, linear: AdaptedLinear, names: WrittenNames) -> _Addressed:
    modules: list[str] = []
    parameters: list[str] = []
    for name in linear.names:
        if linear.is_stacked and names.per_expert:
            return _Addressed(names.of_experts(name), [], names.of_first_expert(name))
        if linear.is_stacked:
            parameters.append(name)
        elif is_adapted_as_parameter(model, name) and not names.per_expert:
            parameters.append(f"{name}.weight")
        else:
            modules.append(names.of_module(name))
    return _Addressed(modules, parameters, [*modules, *parameters])


def _file_scale(adapted: list[AdaptedLinear], addressed: list[_Addressed]) -> FileScale | None:
    use_rslora = adapted[0].use_rslora
    shape = FileScale.common([linear.shape for linear in adapted], use_rslora)
    if shape is None:
        return None
    own: dict[str, OwnAdapter] = {}
    scale = FileScale(shape, use_rslora, own)
    for linear, names in zip(adapted, addressed, strict=True):
        dtype = linear.b.values.dtype
        changed = scale.written(linear.shape).b_dtype(dtype) != dtype
        own |= dict.fromkeys(names.known_as, OwnAdapter(linear.shape, dtype if changed else None))
    return scale


def _config(
    model: nn.Module,
    adapted: list[AdaptedLinear],
    addressed: list[_Addressed],
    names: WrittenNames,
    shape: AdapterShape,
    base_model_name_or_path: str | None,
) -> dict[str, object]:
    first = adapted[0]
    use_dora = first.magnitude is not None
    modules = [name for each in addressed for name in each.modules]
    parameters = [name for each in addressed for name in each.parameters]
    if use_dora and parameters:
        raise CheckpointError(
            f"{min(parameters)}: peft adapts this parameter with LoRA only, not with DoRA; export in the form "
            "'peft-per-expert', or merge the adapter and save the model"
        )
    others = names.of_all(skip={parameter.removesuffix(".weight") for parameter in parameters})
    if not has_our_names(model):  # peft matches modules of every kind
        others += [path.full_name for path, module in walk(model) if layer_type_of(base_of(module)) is None]
    return describe(
        modules,
        others,
        parameters,
        shape,
        use_dora=use_dora,
        dropout=first.dropout,
        base_model_name_or_path=base_model_name_or_path or getattr(model, "name_or_path", None) or None,
        task=_task_of(model),
    )


def _task_of(model: nn.Module) -> dict[str, object]:
    """Fields from which peft derives how to load the base model, and which class of its own to use.

    A task that the model does not have keeps `PeftModel.from_pretrained` from loading the adapter; of a model without
    one `AutoPeftModel` goes by the class.
    """
    config_class: Any = type(getattr(model, "config", None))
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class, ())
    if has_our_names(model) or isinstance(model, (LanguageModel, causal)):
        return {"task_type": "CAUSAL_LM"}
    # The class itself: sharded data parallel puts one of its own before it.
    for cls in type(model).__mro__:
        if cls.__module__.startswith("transformers.models."):
            mapping = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
            return {"task_type": None, "auto_mapping": mapping}
    return {"task_type": None}


_DEFAULT_RANK = 16
"""The largest rank that vLLM has room for, unless `--max-lora-rank` says another."""


def serving_note(model: nn.Module, format: AdapterFormat, adapter_name: str | None = None) -> str | None:
    """Describe what vLLM and SGLang do not serve of an adapter as it is written, and what to do; `None` for nothing.

    Args:
        model: With the adapter.
        format, adapter_name: See `export_peft_adapter`.
    """
    model = held_module(model)
    adapted = adapted_linears(model, adapter_name)
    refused = []
    if any(linear.magnitude is not None for linear in adapted):
        refused.append("DoRA")
    if any(decides(wrapper.to_wrap) for _, wrapper in adapter_wrappers(model)):
        refused.append("adapters on routers and gates (vLLM does in some families)")
    notes = []
    if refused:
        notes.append(f"vLLM and SGLang do not serve {', '.join(refused)}; meshpeft merge writes a model that they do")
    elif format == "peft" and any(linear.is_stacked for linear in adapted):
        notes.append(
            "vLLM and SGLang serve adapters of experts in the form peft-per-expert, which meshpeft export --format "
            "peft-per-expert writes of a checkpoint"
        )
    rank = max(linear.shape.rank for linear in adapted)
    if not refused and rank > _DEFAULT_RANK:
        notes.append(f"vLLM needs --max-lora-rank {rank} or more for this adapter, whose rank is above {_DEFAULT_RANK}")
    return "; ".join(notes) or None
