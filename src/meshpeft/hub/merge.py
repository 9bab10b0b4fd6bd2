"""Merge the adapters of a model into its weights: computed in float32 or wider, rounded once."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from meshpeft.hub.adapter_tensors import refuse_sharded
from meshpeft.hub.save import held_model, refuse_adapter_directory, save_pretrained
from meshpeft.hub.tensor_files import CheckpointError
from meshpeft.models import Decoder, LanguageModel
from meshpeft.parallel.agreement import all_or_none
from meshpeft.parallel.finite import check_finite
from meshpeft.peft import AdapterError, AdapterWrapper, adapter_wrappers
from meshpeft.peft.wrapper import parameter_like

__all__ = ["merge_adapter"]

Model = TypeVar("Model", bound=nn.Module)


def merge_adapter(model: Model, directory: str | Path | None = None, *, overwrite: bool = False) -> Model:
    """Add the adapters to the weights of their layers and take them off the model; in place.

    Each layer's weight is computed in float32, or wider where weight or adapter are, and rounded once to the weight's
    type. One layer at a time: besides the model there is room for one merged weight. A tied output layer with an
    adapter gets a weight of its own.

    Args:
        model: With adapters; changed in place.
        directory: Write the merged model there, for transformers; every rank then calls this. Only a
            `LanguageModel` can be written.
        overwrite: Replace a model that is there.

    Returns:
        The model, without adapters.

    Raises:
        CheckpointError: There is no adapter, or one that a weight cannot take (a quantised weight, an activation
            between the factors) or that is not finite or switched off, or the directory holds a model; nothing is
            changed. Or a sum is too large for its type; then nothing is written.
        ModelError: The directory cannot be written.
    """
    wrappers = dict(adapter_wrappers(model))
    with all_or_none("merging", CheckpointError):
        _check(wrappers)
        refuse_sharded(model, "merge before fully_shard; or export the adapter, which gathers it, and merge the files")
        if directory is not None:
            _check_target(model, Path(directory), overwrite)
    _check_finite_adapters(model, "merging")
    for name, wrapper in wrappers.items():
        wrapper.merge(keep_base=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, wrapper.to_wrap)
    _check_merged(wrappers)
    _state_untied(model)
    if directory is not None:
        assert isinstance(model, LanguageModel)
        save_pretrained(model, directory, overwrite=overwrite)
    return model


def _check(wrappers: Mapping[str, AdapterWrapper]) -> None:
    if not wrappers:
        raise CheckpointError("the model carries no adapter")
    for name, wrapper in wrappers.items():
        try:
            wrapper.check_mergeable()
        except AdapterError as error:
            raise CheckpointError(f"{name}: {error}") from error


def _check_finite_adapters(model: nn.Module, what: str) -> None:
    """Check that every value of the adapters is finite. A collective.

    Args:
        model: With adapters.
        what: What is about to be done, for the message.

    Raises:
        CheckpointError: On every rank, if one is not on any.
    """
    parameters = (
        (f"{name}.{own}".lstrip("."), parameter)
        for name, wrapper in adapter_wrappers(model)
        for own, parameter in wrapper.adapter.named_parameters(prefix="adapter")
    )
    check_finite(parameters, what, CheckpointError)


def _check_merged(wrappers: Mapping[str, AdapterWrapper]) -> None:
    """Check that no sum is too large for its type. A collective."""
    merged = (
        (f"{name}.{own}", parameter)
        for name, wrapper in wrappers.items()
        for own, parameter in wrapper.to_wrap.named_parameters()
    )
    advice = "the model is of no use any more: load it again in a wider type, such as float32, and merge there"
    check_finite(merged, "merging", CheckpointError, advice=advice)


def _check_target(model: nn.Module, directory: Path, overwrite: bool) -> None:
    if not isinstance(model, LanguageModel):
        raise CheckpointError(
            f"a {type(model).__name__} has its own way of being saved: merge it without a directory, then call that "
            "(model.save_pretrained of transformers, on every rank; megatron.core.dist_checkpointing)"
        )
    refuse_adapter_directory(directory, CheckpointError)
    if held_model(directory) is not None and not overwrite:
        raise CheckpointError(f"{directory} holds a model; choose another directory or overwrite it")


def _state_untied(model: nn.Module) -> None:
    """Set `tie_word_embeddings` to false where embedding and head have two weights now, so that loading keeps them."""
    if isinstance(model, Decoder):
        if model.config.tie_word_embeddings and model.output_layer.weight is not model.embedding.weight:
            model.config = replace(model.config, tie_word_embeddings=False)
        return
    config: Any = getattr(model, "config", None)
    tied = _embedding(model, "input") is _embedding(model, "output")
    if getattr(config, "tie_word_embeddings", False) and not tied:
        own = copy(config)  # the caller's may belong to other models
        own.tie_word_embeddings = False
        model.config = own
        _untie(model)


def _untie(model: nn.Module) -> None:
    """Give every name of a tied parameter a parameter of its own.

    What is tied beside the head's weight, such as its bias in BERT, is untied by the same configuration.
    """
    owners: dict[int, nn.Module] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        module_name, _, attribute = name.rpartition(".")
        module = model.get_submodule(module_name)
        if owners.setdefault(id(parameter), module) is not module:
            setattr(module, attribute, parameter_like(parameter, parameter.clone()))


def _embedding(model: nn.Module, which: str) -> Tensor | None:
    """The weight of a transformers model's input or output embedding."""
    get = getattr(model, f"get_{which}_embeddings", None)
    return getattr(get(), "weight", None) if callable(get) else None
