"""The modules of a model and their full names, which no wrapper around the model or a part of it changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from meshpeft.parallel import global_names, is_held
from meshpeft.peft.errors import AdapterError
from meshpeft.peft.wrapper import AdapterWrapper, wrapper_of

__all__ = ["Place", "adapted_layers", "adapter_wrappers", "chunks_of", "walk"]


class Place(NamedTuple):
    """Where a module is: its parent's full name, and its own. Both are empty for the model."""

    prefix: str = ""
    name: str = ""

    @property
    def full_name(self) -> str:
        """Of the module there."""
        return f"{self.prefix}.{self.name}" if self.prefix else self.name

    def children(self, m: nn.Module, names: Mapping[nn.Module, str]) -> Iterator[tuple[str, Place, nn.Module]]:
        """(Attribute, place, module) of every child of `m`, which is here.

        A module that a wrapper holds is in the wrapper's place.

        Args:
            names: own names that are not those of attributes, see `global_names`.
        """
        for attribute, child in m._modules.items():
            if child is None:
                continue
            if is_held(attribute, self.full_name):
                yield attribute, self, child
            else:
                yield attribute, Place(self.full_name, names.get(child, attribute)), child


def walk(model: nn.Module) -> Iterator[tuple[Place, nn.Module]]:
    """Yield every module of a model with its place, top down; adapted layers are one module each."""
    names = global_names(model)

    def below(place: Place, m: nn.Module) -> Iterator[tuple[Place, nn.Module]]:
        yield place, m
        if wrapper_of(m) is None:
            for _, child_place, child in place.children(m, names):
                yield from below(child_place, child)

    return below(Place(), model)


def adapted_layers(model: nn.Module | list[nn.Module]) -> Iterator[tuple[str, AdapterWrapper]]:
    """Yield every adapted layer of a model or its chunks with its full name, which no wrapper around it changes."""
    for chunk in chunks_of(model):
        for place, module in walk(chunk):
            wrapper = wrapper_of(module)
            if wrapper is not None:
                yield place.full_name, wrapper


def adapter_wrappers(model: nn.Module | list[nn.Module]) -> Iterator[tuple[str, AdapterWrapper]]:
    """Yield every adapted layer of a model or its chunks with its path below the chunk, as `get_submodule` takes it."""
    for chunk in chunks_of(model):
        for name, module in chunk.named_modules():
            wrapper = wrapper_of(module)
            if wrapper is not None:
                yield name, wrapper


def chunks_of(model: Any) -> list[nn.Module]:
    """A model, or its chunks, as a list.

    Raises:
        AdapterError: it is neither a module, nor modules.
    """
    chunks = list(model) if isinstance(model, (list, tuple)) else [model]
    for chunk in chunks:
        if not isinstance(chunk, nn.Module):
            raise AdapterError(
                f"expected a model (torch.nn.Module) or a list of its chunks, got {type(chunk).__name__}"
            )
    return chunks
