"""Load a transformers model of any architecture; each rank reads its own slices.

Apart from `load`, because importing the models of transformers takes seconds.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from meshpeft.hub.coded_files import coding_of, model_files, quantization_of
from meshpeft.hub.config import check_fields, few_modules
from meshpeft.hub.load import check_shapes, common_dtype, fill, has_two_values
from meshpeft.hub.names import name_in_transformers, stored_forms
from meshpeft.hub.tensor_files import MODEL_DIRECTORY, TensorFiles, read_json
from meshpeft.models import ModelError
from meshpeft.models.base_blocks import ShardBase
from meshpeft.models.language_model import PartsInFiles, layout_or_replicated
from meshpeft.models.recompute import ActivationCheckpointing
from meshpeft.models.towers import towers_in_place
from meshpeft.models.transformers_model import TransformersModel, make_transformers_model
from meshpeft.parallel.errors import blamed_on, first_few
from meshpeft.quantization import BaseQuantizer

__all__ = ["load_transformers", "name_as_in_files", "transformers_config"]


def transformers_config(directory: str | Path) -> PretrainedConfig:
    """Read the configuration in a directory, without the network.

    Raises:
        ModelError: It cannot be read; transformers does not know the architecture; the weights are in
            codes that are not known.
    """
    path = Path(directory) / "config.json"
    # Its messages are clearer, and these classes make lists of as many layers as the file names.
    check_fields(read_json(path, expected=MODEL_DIRECTORY), path)
    with blamed_on(f"{path} cannot be used", ModelError):
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if getattr(config, "quantization_config", None):
        with blamed_on(str(directory), ModelError):
            coding_of(quantization_of(Path(directory)))
        del config.quantization_config  # what is read are numbers
    # A file may name a kernel of the Hub as its attention, which transformers would fetch and run.
    config._attn_implementation = config._experts_implementation = None
    found: PretrainedConfig = config
    return found


def load_transformers(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    activation_checkpointing: bool | ActivationCheckpointing = False,
    *,
    device: torch.device | str | None = None,
    quantize: BaseQuantizer | None = None,
    sequence_parallel: bool = False,
    shard_base: ShardBase = "none",
) -> TransformersModel:
    """Load a model of transformers as it is, sharded over tensor parallel by its architecture's plan.

    Memory, files, and whether it is a collective: as for `load_pretrained`.

    Args:
        directory: Holds `config.json` and safetensors weights in one or several files.
        dtype: Dtype of the parameters and activations; by default that of the weights in the files.
        activation_checkpointing: What is kept of a layer and computed again; `True` is full. See `recompute.py`.
        device: Device of the parameters; torch's default device by default.
        quantize: Pack each layer as soon as it is read.
        sequence_parallel: Shard the tokens of a row between blocks.
        shard_base: As for `load_pretrained`.

    Raises:
        QuantizationError: See `quantize_base`.
        ModelError: A file is missing, truncated, or holds tensors other than the model has; transformers does not know
            the architecture.
        ParallelError: The model cannot be sharded over so many ranks.
    """
    directory = Path(directory)
    config = transformers_config(directory)
    target = torch.get_default_device() if device is None else torch.device(device)
    with model_files(directory) as files:
        if dtype is None:
            dtype = common_dtype(files, files.names())
        with few_modules(len(files.names()), directory):
            model = make_transformers_model(config, dtype, device=target, sequence_parallel=sequence_parallel)
        found = _found(model, files)
        groups = _tied_names(model)
        if any(
            has_two_values(files, [found.single[name] for name in names if name in found.single]) for names in groups
        ):
            model = make_transformers_model(_untied(config), dtype, device=target, sequence_parallel=sequence_parallel)
        _set_names(model, files, found, groups)
        model.left_in_files = (directory.resolve(), _left_in_files(model, files, found))
        stored = {
            name: stored_forms(model, name, layout_or_replicated(tensor))[0]
            for name, tensor in model.stored_tensors().items()
        }
        check_shapes(files, stored)
        fill(model, files, stored, None, target, quantize, shard_base)
    _name_tied_by_own(model, found)
    model.set_activation_checkpointing(activation_checkpointing)
    return model


def name_as_in_files(model: TransformersModel, directory: str | Path) -> None:
    """Give a model without weights the names that the files of a directory have for its parameters.

    Raises:
        ModelError: See `load_transformers`.
    """
    with model_files(Path(directory)) as files:
        found = _found(model, files)
        _set_names(model, files, found, _tied_names(model))
    _name_tied_by_own(model, found)


def _set_names(model: TransformersModel, files: TensorFiles, found: _Found, groups: list[list[str]]) -> None:
    # What is tied beside the head, such as its bias, has one value in the files then, and two places in the model.
    tied = {name: names for names in groups for name in names}
    model.stored_parts = _stored_parts(model, files, found)
    model.stored_names = _stored_names(model, files, found, tied)


def _left_in_files(model: Any, files: TensorFiles, found: _Found) -> tuple[str, ...]:
    """List the tensors of the files that hold what is not in memory.

    Raises:
        ModelError: One is missing.
    """
    names = {f"{prefix}.{name}" for prefix, tower in model.towers.items() for name in tower.state_dict()}
    missing = sorted(names - found.single.keys() - found.parts.keys())
    if missing:
        raise ModelError(f"{files.path} lacks {first_few(missing)}, which a {model.config.model_type} model has")
    single = [found.single[name] for name in names & found.single.keys()]
    parts = [key for name in names & found.parts.keys() for part in found.parts[name] for key in part.values()]
    return tuple(sorted(single + parts))


def _name_tied_by_own(model: TransformersModel, found: _Found) -> None:
    """Let a tied parameter that the files hold under another's name be written under its own."""
    theirs = {name: name_in_transformers(model, name) for name in model.stored_names}
    model.stored_names = {name: found.single.get(own, own) for name, own in theirs.items()}


def _untied(config: PretrainedConfig) -> PretrainedConfig:
    changed = copy.deepcopy(config)
    for part in (changed, changed.get_text_config()):
        part.tie_word_embeddings = False
    return changed


def _tied_names(model: nn.Module) -> list[list[str]]:
    """List the names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    return [group for group in names.values() if len(group) > 1]


@dataclass
class _Found:
    """What the files hold of a model, by the names of transformers' parameters and persistent buffers.

    Attributes:
        single: Name of the one tensor that is the parameter.
        parts: For each part of the parameter (gate, up; one for a parameter without parts) the names of its tensors:
            one for each expert, or one.
    """

    single: dict[str, str] = field(default_factory=dict)
    parts: dict[str, list[dict[int, str]]] = field(default_factory=dict)


def _found(model: Any, files: TensorFiles) -> _Found:
    """Find each parameter and persistent buffer in the files, by transformers' table of conversions.

    Raises:
        ModelError: The files hold one twice, with different values; in a form that cannot be read; or one that the
            model has not.
    """
    with towers_in_place(model):
        own = {name_in_transformers(model, name) for name in model.state_dict()}
        transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    conversions: list[Any] = [transform for transform in transforms if not isinstance(transform, WeightRenaming)]
    found = _Found()
    for name in sorted(files.names()):
        theirs, pattern = rename_source_key(
            name, renamings, conversions, model.base_model_prefix, dict.fromkeys(own, True)
        )
        if pattern is not None:
            _add_part(model, files, found, name, theirs, _source(conversions, pattern))
            continue
        if theirs in found.single and not files.same(found.single[theirs], name):
            raise ModelError(
                f"{files.path} holds {found.single[theirs]} and {name}, two names of the model's {theirs}, with other "
                "values; take one of them out"
            )
        found.single[theirs] = name
    twice = sorted(found.single.keys() & found.parts.keys())
    if twice:
        raise ModelError(f"{files.path} holds {first_few(twice)} both as one tensor and in parts; take one of them out")
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    held = [*found.single, *found.parts]
    extra = [name for name in held if name not in own and not any(re.search(pattern, name) for pattern in ignored)]
    if extra:
        raise ModelError(f"{files.path} holds {first_few(extra)}, which a {model.config.model_type} model has not")
    return found


def _source(conversions: list[Any], pattern: str) -> tuple[Any, int]:
    """Find the conversion that a pattern of source names belongs to, and the pattern's number in it."""
    conversion = next(one for one in conversions if pattern in one.source_patterns)
    return conversion, conversion.source_patterns.index(pattern)


def _add_part(model: Any, files: TensorFiles, found: _Found, name: str, theirs: str, source: tuple[Any, int]) -> None:
    """Note a tensor that is a part of a parameter, or one expert's slice of it.

    Raises:
        ModelError: The conversion does something else than to stack experts and to put parts behind each other.
    """
    conversion, part = source
    done = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in conversion.operations]
    stacks = ("MergeModulelist", 0) in done
    joins = [("MergeModulelist", 0), ("Concatenate", 1)] if stacks else [("Concatenate", 0)]
    if len(conversion.target_patterns) > 1 or done not in (joins, [("MergeModulelist", 0)]):
        raise ModelError(
            f"{files.path} holds {name} in another form than the {model.config.model_type} model has it "
            f"({', '.join(kind for kind, _ in done)}), which is not implemented"
        )
    parts = found.parts.setdefault(theirs, [{} for _ in conversion.source_patterns])
    # The last number in `model.layers.3.mlp.experts.7.gate_proj.weight`.
    parts[part][int(re.findall(r"\.(\d+)(?=\.)", name)[-1]) if stacks else 0] = name


def _stored_parts(model: Any, files: TensorFiles, found: _Found) -> dict[str, PartsInFiles]:
    """Map each parameter of the model that the files hold in parts, or expert by expert, to their names.

    Raises:
        ModelError: A part is missing, or there are more experts than the model has.
    """
    stored = {}
    for name, tensor in model.stored_tensors().items():
        parts = found.parts.get(name_in_transformers(model, name))
        if parts is None:
            continue
        layout = layout_or_replicated(tensor)
        if not layout.is_stacked and any(len(part) > 1 for part in parts):
            raise ModelError(
                f"{files.path} holds {name} expert by expert, and a {model.config.model_type} model stacks them in a "
                "class without transformers' use_experts_implementation, which is not implemented"
            )
        numbers = range(layout.global_shape[0]) if layout.is_stacked else range(1)
        for position, part in enumerate(parts, 1):
            if not layout.is_stacked and not part:
                raise ModelError(f"{files.path} lacks part {position} of {len(parts)} of {name}, and holds the others")
            if part.keys() != set(numbers):
                wrong = sorted(part.keys() ^ set(numbers))
                raise ModelError(
                    f"{files.path} holds {len(part):,} experts of {name}; its config says {len(numbers):,} (the first "
                    f"that differs is number {wrong[0]})"
                )
        tensors = [[part[number] for number in numbers] for part in parts]
        sizes = None if layout.is_stacked else tuple(files.shape(names[0])[0] for names in tensors)
        if sizes is not None and sum(sizes) != layout.global_shape[0]:
            raise ModelError(
                f"{files.path}: the parts of {name} have sizes {sizes}; its config says {layout.global_shape[0]} "
                "together"
            )
        stored[name] = PartsInFiles(tensors, sizes)
    return stored


def _stored_names(model: Any, files: TensorFiles, found: _Found, tied: Mapping[str, list[str]]) -> dict[str, str]:
    """Map each other parameter and persistent buffer of the model to its name in the files.

    Args:
        found: What the files hold.
        tied: Name of a parameter -> all names by which the configuration ties it.
    """
    names, missing = {}, []
    for name in model.stored_tensors():
        if name in model.stored_parts:
            continue
        theirs = [name_in_transformers(model, other) for other in (name, *tied.get(name, ()))]
        held = next((found.single[other] for other in theirs if other in found.single), None)
        if held is None:
            missing.append(theirs[0])
        else:
            names[name] = held
    if missing:
        raise ModelError(f"{files.path} lacks {first_few(missing)}, which a {model.config.model_type} model has")
    return names
