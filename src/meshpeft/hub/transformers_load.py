"""Load a transformers model of any architecture; each rank reads its own slices.

Apart from `load`, because importing the models of transformers takes seconds.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from meshpeft.hub.config import check_fields, few_modules
from meshpeft.hub.load import check_shapes, common_dtype, fill, has_two_values
from meshpeft.hub.names import stored_forms
from meshpeft.hub.tensor_files import MODEL_DIRECTORY, TensorFiles, model_files, read_json
from meshpeft.models import ModelError
from meshpeft.models.language_model import layout_or_replicated
from meshpeft.models.recompute import ActivationCheckpointing
from meshpeft.models.transformers_model import TransformersModel, make_transformers_model
from meshpeft.parallel.errors import blamed_on, first_few
from meshpeft.quantization import BaseQuantizer

__all__ = ["load_transformers", "transformers_config"]


def transformers_config(directory: str | Path) -> PretrainedConfig:
    """Read the configuration in a directory, without the network.

    Raises:
        ModelError: It cannot be read; transformers does not know the architecture; the weights are quantised.
    """
    path = Path(directory) / "config.json"
    # Its messages are clearer, and these classes make lists of as many layers as the file names.
    check_fields(read_json(path, expected=MODEL_DIRECTORY), path)
    with blamed_on(f"{path} cannot be used", ModelError):
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"{directory} holds weights that are quantised already; give the model in full, and --quantize"
        )
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
) -> TransformersModel:
    """Load a model of transformers as it is, sharded over tensor parallel by its architecture's plan.

    Memory, files, and whether it is a collective: as for `load_pretrained`.

    Args:
        directory: Holds `config.json` and safetensors weights in one or several files.
        dtype: Dtype of the parameters and activations; by default that of the weights in the files.
        activation_checkpointing: What is kept of a layer and computed again; `True` is full. See `recompute.py`.
        device: Device of the parameters; torch's default device by default.
        quantize: Pack each layer as soon as it is read.

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
            model = make_transformers_model(config, dtype, device=target)
        found = _found(model, files)
        groups = _tied_names(model)
        if any(has_two_values(files, [found[name] for name in names if name in found]) for names in groups):
            model = make_transformers_model(_untied(config), dtype, device=target)
        # What is tied beside the head, such as its bias, has one value in the files then, and two places in the model.
        tied = {name: names for names in groups for name in names}
        model.stored_names = _stored_names(model, files, found, tied)
        stored = {
            name: stored_forms(model, name, layout_or_replicated(tensor))[0]
            for name, tensor in model.stored_tensors().items()
        }
        check_shapes(files, stored)
        fill(model, files, stored, dtype, target, quantize)
    own = {name: held for name, held in model.stored_names.items() if found.get(name) == held}
    model.stored_names = {name: own.get(name, name) for name in model.stored_names}
    model.set_activation_checkpointing(activation_checkpointing)
    return model


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


def _found(model: Any, files: TensorFiles) -> dict[str, str]:
    """Map each parameter and persistent buffer in the files to its name there, by transformers' table of old names.

    Raises:
        ModelError: The files hold one twice, with different values; in another form; or one that the model has not.
    """
    own = set(model.state_dict())
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    conversions: list[Any] = [transform for transform in transforms if not isinstance(transform, WeightRenaming)]
    found: dict[str, str] = {}
    for name in sorted(files.names()):
        ours, conversion = rename_source_key(
            name, renamings, conversions, model.base_model_prefix, dict.fromkeys(own, True)
        )
        if conversion is not None:
            raise ModelError(
                f"{files.path} holds {name} in another form than the {model.config.model_type} model has it, "
                "which is not implemented"
            )
        if ours in found and not files.same(found[ours], name):
            raise ModelError(
                f"{files.path} holds {found[ours]} and {name}, two names of the model's {ours}, with other "
                "values; take one of them out"
            )
        found[ours] = name
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    extra = [name for name in found if name not in own and not any(re.search(pattern, name) for pattern in ignored)]
    if extra:
        raise ModelError(f"{files.path} holds {first_few(extra)}, which a {model.config.model_type} model has not")
    return found


def _stored_names(
    model: Any, files: TensorFiles, found: Mapping[str, str], tied: Mapping[str, list[str]]
) -> dict[str, str]:
    """Map each parameter and persistent buffer of the model to its name in the files.

    Args:
        found: Name of a parameter -> the files', for those that have one of their own.
        tied: Name of a parameter -> all names by which the configuration ties it.
    """
    names, missing = {}, []
    for name in model.stored_tensors():
        held = next((found[other] for other in (name, *tied.get(name, ())) if other in found), None)
        if held is None:
            missing.append(name)
        else:
            names[name] = held
    if missing:
        raise ModelError(f"{files.path} lacks {first_few(missing)}, which a {model.config.model_type} model has")
    return names
