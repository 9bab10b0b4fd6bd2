"""`PEFT`: apply an adapter method to a model, and steer the adapters on it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor, nn

from meshpeft.parallel import COMPILED, container_type_of, describe_layers, global_names
from meshpeft.peft.counting import trainable_parameters
from meshpeft.peft.errors import AdapterError
from meshpeft.peft.matching import ModuleMatcher
from meshpeft.peft.same_tokens import watch_tokens
from meshpeft.peft.walk import Place, adapter_wrappers, chunks_of, walk
from meshpeft.peft.wrapper import AdapterWrapper, base_of, wrapper_of

__all__ = ["PEFT", "Model"]

Model = TypeVar("Model", bound="nn.Module | list[nn.Module] | tuple[nn.Module, ...]")


@dataclass
class _Found:
    """What a pass over a model found: modules with what takes their place, and the places to change."""

    adapted: dict[nn.Module, nn.Module] = field(default_factory=dict)
    replacements: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)


@dataclass
class PEFT(ABC):
    """Base of the adapter methods. A subclass says in `transform` what becomes of one module.

    Called on a model, it freezes every parameter, replaces the modules that `transform` changes, and leaves only the
    adapters' parameters trainable. Calling it again changes nothing.

    Attributes:
        params_to_save: names (state-dict keys) of the trainable parameters, and of running statistics, of the
            model it was last applied to.
    """

    params_to_save: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    @abstractmethod
    def transform(self, m: nn.Module, name: str | None = None, prefix: str | None = None) -> nn.Module:
        """The module that takes the place of `m`; `m` itself where nothing is to be done.

        Args:
            m: a module of the model.
            name: its own name.
            prefix: the full name of its parent.
        """

    def __call__(self, model: Model, training: bool = True) -> Model:
        """Apply the method.

        Args:
            model: a module, or a list (or tuple) of model chunks; changed in place.
            training: leave the adapters trainable and put the model in training mode. Otherwise everything is
                frozen and the model is in evaluation mode.

        Returns:
            The model (the chunks), with adapters.

        Raises:
            AdapterError: a target matched nothing; a layer carries an adapter made with other options, or is compiled
                by itself. The model is as it was then.
        """
        chunks = chunks_of(model)
        for chunk in chunks:
            describe_layers(chunk)
        self._survey(chunks)
        found = _Found()
        chunks = [self._visit(chunk, Place(), global_names(chunk), found) for chunk in chunks]
        # Only now: an error before this leaves the model as it was.
        for parent, attribute, module in found.replacements:
            setattr(parent, attribute, module)
        for chunk in chunks:
            self.freeze_model(chunk, training=training)
            chunk.train(training)
            watch_tokens(chunk, [wrapper.adapter for _, wrapper in adapter_wrappers(chunk)])
        _tell_containers(chunks)
        self.set_params_to_save(chunks)
        if isinstance(model, list):
            model[:] = chunks
            return model
        if isinstance(model, tuple):
            return tuple(chunks)  # type: ignore[return-value]
        return chunks[0]  # type: ignore[return-value]  # a module that was adapted itself is of another class

    def _survey(self, chunks: list[nn.Module]) -> None:
        """Check that the method can be applied, before the first module is changed."""
        if not isinstance(self, ModuleMatcher):
            return
        self._init_target_match_state()
        for chunk in chunks:
            for place, module in walk(chunk):
                found, wrapper = self.match(base_of(module), place.name, place.prefix), wrapper_of(module)
                made_by = None if wrapper is None else wrapper.applied_by
                if found is not None and made_by is not None and made_by != self:
                    raise AdapterError(
                        f"{found[1]} already carries an adapter, made by {made_by}; now {self} was asked for. Use the "
                        "same options, or other targets, or start from the base model"
                    )
        self._check_matches()

    def _visit(self, m: nn.Module, place: Place, names: Mapping[nn.Module, str], found: _Found) -> nn.Module:
        """What takes the place of `m`; if `m` stays, its children are visited and their replacements noted."""
        if wrapper_of(m) is not None:
            return m
        if m in found.adapted:  # it is in several places: it has one adapter, in those that are targets
            wanted = not isinstance(self, ModuleMatcher) or self.match(m, place.name, place.prefix) is not None
            return found.adapted[m] if wanted else m
        result = self.transform(m, place.name, place.prefix)
        if result is not m:
            found.adapted[m] = result
            wrapper = wrapper_of(result)
            if wrapper is not None:
                # A copy: the options at this time, whatever becomes of `self`.
                wrapper.applied_by = copy.copy(self)
            return result
        for attribute, child_place, child in place.children(m, names):
            new = self._visit(child, child_place, names, found)
            if new is not child:
                if attribute == COMPILED:
                    raise AdapterError(
                        f"{child_place.full_name or 'the model'} is a layer compiled by itself, which would be called "
                        "without its adapter; adapt the model before compiling it"
                    )
                found.replacements.append((m, attribute, new))
        return m

    def freeze_model(self, model: nn.Module, training: bool = True) -> None:
        """Freeze every parameter but the adapters'; those too, if not training."""
        model.requires_grad_(False)
        if training:
            for _, wrapper in adapter_wrappers(model):
                wrapper.adapter.requires_grad_(True)

    def set_params_to_save(self, model: nn.Module | list[nn.Module]) -> None:
        """Note what belongs into an adapter checkpoint: trainable parameters, and running statistics."""
        self.params_to_save = set()
        for chunk in chunks_of(model):
            adapters = {f"{name}.".lstrip(".") + "adapter." for name, _ in adapter_wrappers(chunk)}
            for name, parameter in chunk.named_parameters():
                if parameter.requires_grad or name.startswith(tuple(adapters)):
                    self.params_to_save.add(name)
            for name, module in chunk.named_modules():
                if getattr(module, "track_running_stats", False):
                    self.params_to_save.update(f"{name}.{buffer}".lstrip(".") for buffer, _ in module.named_buffers())

    def adapter_key_filter(self, key: str | tuple[str, Tensor]) -> bool:
        """Whether a state-dict key belongs into an adapter checkpoint.

        Args:
            key: the key; or the key with its tensor, which then belongs if it requires a gradient.
        """
        if isinstance(key, tuple):
            return key[1].requires_grad
        return key in self.params_to_save or ".adapter." in key or key.endswith(".adapters")

    def enable_adapter_layers(self, model: nn.Module | list[nn.Module]) -> None:
        """Let every adapter of the model take part."""
        for _, wrapper in adapter_wrappers(model):
            wrapper.enable_adapter_layers()

    def disable_adapter_layers(self, model: nn.Module | list[nn.Module]) -> None:
        """Make the model the base model, until the adapters are enabled again.

        Raises:
            AdapterError: an adapter is merged into its layer's weight; nothing is changed.
        """
        _for_every(model, AdapterWrapper.check_switchable)
        _for_every(model, AdapterWrapper.disable_adapter_layers)

    @contextmanager
    def disable_adapter(self, model: nn.Module | list[nn.Module]) -> Iterator[None]:
        """Inside the context the model is the base model; after it each adapter is as it was."""
        states = [(wrapper, wrapper.adapter_enabled) for _, wrapper in adapter_wrappers(model)]
        self.disable_adapter_layers(model)
        try:
            yield
        finally:
            for wrapper, enabled in states:
                if enabled:
                    wrapper.enable_adapter_layers()

    def merge(self, model: nn.Module | list[nn.Module], *, keep_base: bool = True) -> None:
        """Give every adapted layer its merged weight; see `AdapterWrapper.merge`.

        Raises:
            AdapterError: an adapter is switched off, or cannot be merged; nothing is changed.
        """
        _for_every(model, AdapterWrapper.check_mergeable)
        for _, wrapper in adapter_wrappers(model):
            wrapper.merge(keep_base=keep_base)

    def unmerge(self, model: nn.Module | list[nn.Module]) -> None:
        """Undo `merge`, bit for bit.

        Raises:
            AdapterError: the base's weight was not kept; nothing is changed.
        """
        _for_every(model, lambda wrapper: wrapper.is_merged and wrapper.check_unmergeable())
        _for_every(model, AdapterWrapper.unmerge)

    def print_trainable_parameters(self, model: nn.Module | list[nn.Module]) -> None:
        """Print how many parameters train, in all ranks together (on rank 0; chunks of other stages not counted)."""
        trainable_parameters(model).print()


def _for_every(model: nn.Module | list[nn.Module], action: Callable[[AdapterWrapper], object]) -> None:
    """Do something with every adapted layer; an error names the layer."""
    for name, wrapper in adapter_wrappers(model):
        try:
            action(wrapper)
        except AdapterError as error:
            raise AdapterError(f"{name}: {error}") from error


def _tell_containers(chunks: list[nn.Module]) -> None:
    """Let modules that were made before the adapters adjust to them."""
    for module in [module for chunk in chunks for module in chunk.modules()]:
        container = container_type_of(module)
        if container is not None and container.adapted is not None:
            container.adapted(module)
