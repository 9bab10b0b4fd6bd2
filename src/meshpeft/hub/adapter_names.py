"""Which layers the tensors of a Hugging Face PEFT file are for, and under which names it has them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from meshpeft.hub.adapter_config import FACTOR_A, FACTOR_B, MAGNITUDE, PREFIX, PeftConfig
from meshpeft.hub.base_copies import BASE_COPY
from meshpeft.hub.errors import CheckpointError
from meshpeft.hub.linears import HubLinear, has_our_names
from meshpeft.hub.names import hf_module_name, our_module_name
from meshpeft.hub.places import parts_of, wrapper_of
from meshpeft.hub.tensor_file import TensorFileReader
from meshpeft.models import ModelError

__all__ = ["FoundNames"]

_WRAPPER = re.compile(r"(.*\.experts)(\.base_layer)?")


class FoundNames:
    """The names in a file; see [`Names`][meshpeft.hub.places.Names]. Every module of the file is complete.

    Attributes:
        held: the layers, and parameters of stacked experts, that the file has adapters for, by their names in
            transformers.
        per_expert: whether experts have tensors of their own.
        base_copies: layers whose own weight is in the file, with its key.

    Raises:
        CheckpointError: a tensor is of no layer of the model, or is missing.
    """

    def __init__(
        self, model: nn.Module, config: PeftConfig, file: TensorFileReader, linears: Mapping[str, HubLinear]
    ) -> None:
        self._linears, self._config, self._file = linears, config, file
        self._has_our_names = has_our_names(model)
        self._modules: dict[str, str] = {}
        self.base_copies: dict[str, str] = {}
        self._experts: dict[tuple[str, str | None, int], str] = {}
        stacks = [name for name, linear in linears.items() if linear.experts is not None]
        self._stacks = config.parameters(stacks)
        suffixes = [FACTOR_A, FACTOR_B, *([MAGNITUDE] if config.use_dora else [])]
        found = self._modules_with_tensors(suffixes)
        self.held = {self._recognise(path) for path in found}
        self.per_expert = bool(self._experts)
        if self.per_expert and any(_WRAPPER.fullmatch(path) for path in found):
            raise CheckpointError(f"{file.path} holds experts both stacked and one by one")
        for path, held in found.items():
            for suffix in suffixes:
                if suffix not in held:
                    raise CheckpointError(f"{file.path} lacks {PREFIX}{path}.{suffix}")
        for name in sorted(self.held):
            self._check_every_expert(name)

    def _modules_with_tensors(self, suffixes: list[str]) -> dict[str, set[str]]:
        """Every module that has tensors in the file, with how they are called."""
        found: dict[str, set[str]] = {}
        for key in sorted(self._file.tensors):
            module = key.removeprefix(PREFIX).removesuffix(f".{BASE_COPY}")
            if module in self._linears and key == f"{PREFIX}{module}.{BASE_COPY}":
                self.base_copies[module] = key
                continue
            suffix = next((suffix for suffix in suffixes if key.endswith(f".{suffix}")), None)
            if suffix is None or not key.startswith(PREFIX):
                method = "DoRA" if self._config.use_dora else "LoRA"
                raise CheckpointError(f"{self._file.path} holds {key!r}, which is not a tensor of a {method} adapter")
            found.setdefault(key.removeprefix(PREFIX).removesuffix(f".{suffix}"), set()).add(suffix)
        if not found:
            raise CheckpointError(f"{self._file.path} holds no tensors")
        return found

    def _recognise(self, path: str) -> str:
        """The name in transformers of what a file has an adapter for."""
        linear = self._linears.get(path)
        if linear is not None and linear.experts is None:
            self._modules[path] = path
            return path
        for stack in self._stacks:
            if wrapper_of(stack, self._stacks) == path:
                return stack
        if self._has_our_names:
            try:
                ours = our_module_name(path)
                if ours.expert is None:
                    name = hf_module_name(ours.module, ours.part)
                    if name in self._linears and self._linears[name].experts is None:
                        self._modules[name] = path
                        return name
                else:
                    name = hf_module_name(ours.module)
                    if name in self._linears:
                        self._experts[name, ours.part, ours.expert] = path
                        return name
            except ModelError:
                pass
        if _WRAPPER.fullmatch(path):
            raise CheckpointError(
                f"{self._file.path} has an adapter for {path}, but its config's target_parameters do not say for which "
                "of its parameters"
            )
        raise CheckpointError(
            f"{self._file.path} holds {PREFIX}{path}.{FACTOR_A!r}, but the model has no linear layer {path}"
        )

    def _check_every_expert(self, name: str) -> None:
        linear = self._linears[name]
        if linear.experts is None or not self.per_expert:
            return
        for expert in range(linear.experts):
            for part in parts_of(linear.layout):
                if (name, part, expert) not in self._experts:
                    missing = hf_module_name(linear.module, part, expert=expert)
                    raise CheckpointError(f"{self._file.path} lacks {PREFIX}{missing}.{FACTOR_A}")
        for other, part, expert in self._experts:
            if other == name and expert >= linear.experts:
                raise CheckpointError(
                    f"{self._file.path} holds an adapter for {self._experts[other, part, expert]}; the model has "
                    f"{linear.experts} experts"
                )

    def of_module(self, name: str) -> str:
        """A layer's name in the file, by its name in transformers."""
        return self._modules.get(name, name)

    def of_stack(self, name: str) -> str:
        """Likewise for a parameter of stacked experts: what stands before `lora_A`."""
        return wrapper_of(name, self._stacks)

    def of_expert(self, name: str, part: str | None, expert: int) -> str:
        """Likewise for one expert's part of it."""
        return self._experts[name, part, expert]

    def keys_by_part(self, name: str, suffix: str) -> list[list[str]]:
        """For each part of stacked experts, every expert's key."""
        linear = self._linears[name]
        return [
            [f"{PREFIX}{self.of_expert(name, part, expert)}.{suffix}" for expert in range(linear.experts or 0)]
            for part in parts_of(linear.layout)
        ]

    def in_config(self, name: str) -> str:
        """The name by which the config's patterns know it."""
        linear = self._linears[name]
        if linear.experts is None:
            weight = f"{name}.weight"
            return weight if self._config.parameters([weight]) else self.of_module(name)
        return self.of_expert(name, parts_of(linear.layout)[0], 0) if self.per_expert else name

    def targets(self) -> set[str]:
        """The layers and parameters that the config says the adapter is on."""
        found = set()
        for name, linear in self._linears.items():
            if linear.experts is None:
                names = [self.of_module(name)]
                targeted = self._config.targets(names) or self._config.parameters([f"{name}.weight"])
            elif self.per_expert:
                paths = [self._experts.get((name, part, 0)) for part in parts_of(linear.layout)]
                targeted = self._config.targets([path for path in paths if path is not None])
            else:
                targeted = self._config.parameters([name])
            found |= {name} if targeted else set()
        return found
