"""Models of a few layers that cost, added up, what the whole one does.

Layers of one kind cost the same. So a count that is made of a sum over layers follows from that of a model with two
layers, or one of each kind where there are several, and from what one more of each kind adds. The kinds are found in
the layers themselves: the shapes of their parameters, the classes of their modules, and the numbers, names and switches
that these hold.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import PretrainedConfig

from meshpeft.models import Decoder, DecoderConfig, LanguageModel
from meshpeft.models.base_blocks import layer_stacks
from meshpeft.parallel import MeshPEFTError

__all__ = ["few_layers", "with_layers"]

Config: TypeAlias = DecoderConfig | PretrainedConfig

# Layers without experts, before those with.
DENSE_BEFORE_EXPERTS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
# Attributes that number the layers.
_NUMBERS = ("layer", "layer_idx", "layer_index", "layer_number", "layer_id")


def few_layers(config: Config) -> list[tuple[int, Config]]:
    """Return models of few layers, and how often each counts: the whole model costs the sum.

    The first has one layer of each kind, or two of one kind, the last ones, so that what is alive at a time is most
    where it is in the whole model. Where no such models can be made, that is the whole one itself. Outside of a mesh.
    """
    whole = [(1, config)]
    kinds = _kinds(config)
    if kinds is None:
        return whole
    places: dict[Hashable, list[int]] = {}
    for layer, kind in enumerate(kinds):
        places.setdefault(kind, []).append(layer)
    # Of one layer alone both passes meet the same block of a sharded base.
    of_each = 1 if len(places) > 1 else 2
    kept = sorted(layer for own in places.values() for layer in own[-of_each:])
    more = {own[-of_each - 1]: len(own) - of_each for own in places.values() if own[:-of_each]}
    if not more or len(kept) + 1 >= len(kinds):
        return whole
    found = [(1 - sum(more.values()), kept), *((count, sorted([*kept, layer])) for layer, count in more.items())]
    models = []
    for count, layers in found:
        try:
            small = with_layers(config, layers)
            if _kinds(small) != [kinds[layer] for layer in layers]:
                return whole
        except (MeshPEFTError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return whole  # their code has other fields that number layers
        models.append((count, small))
    return models


def with_layers(config: Config, layers: Sequence[int]) -> Config:
    """Keep some layers of a configuration, given by their numbers, in order."""
    if isinstance(config, DecoderConfig):
        windows, moe = config.sliding_windows, config.moe
        if windows is not None:
            windows = tuple(windows[layer] for layer in layers)
        if moe is not None:
            dense = tuple(place for place, layer in enumerate(layers) if not config.has_experts(layer))
            moe = replace(moe, sparse_step=1, dense_layers=dense)
        return replace(config, num_layers=len(layers), sliding_windows=windows, moe=moe)
    small = copy.deepcopy(config)
    text: Any = small.get_text_config()
    count = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == count:
            setattr(text, name, [value[layer] for layer in layers])
    for name in DENSE_BEFORE_EXPERTS:
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, sum(layer < getattr(text, name) for layer in layers))
    text.num_hidden_layers = len(layers)
    return small


def _kinds(config: Config) -> list[Hashable] | None:
    """Tell the layers of a model apart; `None` where it has not one stack of them."""
    if isinstance(config, DecoderConfig):
        model: LanguageModel = Decoder(config, device="meta")
        lists: list[Sequence[Any]] = [[config.sliding_window(layer) for layer in range(config.num_layers)]]
        count = config.num_layers
    else:
        from meshpeft.models.transformers_model import make_transformers_model  # takes seconds

        model = make_transformers_model(config, torch.bfloat16, device="meta")
        text: Any = config.get_text_config()
        count = text.num_hidden_layers
        lists = [value for value in vars(text).values() if isinstance(value, list) and len(value) == count]
    stacks = [[layer for _, layer in stack] for stack in layer_stacks(model)]
    if [len(stack) for stack in stacks] != [count]:
        return None
    of_lists = zip(*(map(repr, values) for values in lists), strict=True) if lists else [()] * count
    return [(_kind(layer), own) for layer, own in zip(stacks[0], of_lists, strict=True)]


def _kind(layer: nn.Module) -> Hashable:
    return tuple(
        (
            name,
            type(module).__qualname__,
            tuple((own, tuple(p.shape), p.dtype) for own, p in module._parameters.items() if p is not None),
            tuple(
                (attribute, value)
                for attribute, value in vars(module).items()
                if attribute not in _NUMBERS and isinstance(value, int | float | str | None)
            ),
        )
        for name, module in layer.named_modules()
    )
