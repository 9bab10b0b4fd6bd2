"""Which modules of a model an adapter method adapts: names by patterns, and the walk over a model that gives the names.

By default these are `linear_qkv`, `linear_proj`, `linear_fc1` and `linear_fc2`; a model that has none of them (one with
`q_proj`, say) needs `target_modules`. Full names leave out the wrappers around a model or its parts.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

from torch import nn

from meshpeft.parallel import global_names, is_held, layer_type_of
from meshpeft.peft.errors import AdapterError
from meshpeft.peft.wrapper import AdapterWrapper, wrapper_of

__all__ = [
    "ModuleMatcher",
    "ModulePath",
    "adapted_layers",
    "adapter_wrappers",
    "chunks_of",
    "default_targets",
    "is_expert_linear",
    "is_router",
    "is_target",
    "named_value",
    "nearest_names",
    "walk",
    "wildcard_match",
]


Value = TypeVar("Value")

# What looks alike is found in quadratic time.
_COMPARED_CHARACTERS, _COMPARED_NAMES = 200, 5_000


def wildcard_match(pattern: str, key: str | None) -> bool | None:
    """Whether the pattern (target module to add LoRA) matches the key (a module's full name).

    `*` stands for any substring, also an empty one; every other character is literal, and the whole key must
    match. A pattern with an empty component, such as `.layers.0..linear_qkv`, has lost its `*`: it matches
    nothing, with a warning.

    Returns:
        `None` if key is `None`.

    Example:
        >>> wildcard_match("*.layers.0.*.linear_qkv", "decoder.layers.0.self_attention.linear_qkv")
        True
        >>> wildcard_match("*.layers.0.*.linear_qkv", "decoder.layers.1.self_attention.linear_qkv")
        False
    """
    if key is None:
        return None
    if _lost_its_star(pattern):
        warnings.warn(f"pattern {_advice_on_lost_star(pattern)}", stacklevel=2)
        return False
    first, *others = pattern.split("*")
    if not others:
        return key == first
    *middle, last = others
    # Each piece at its first place leaves the most to the others: linear, where an expression would go back.
    at, end = len(first), len(key) - len(last)
    if at > end or not key.startswith(first) or not key.endswith(last):
        return False
    for piece in middle:
        found = key.find(piece, at, end)
        if found < 0:
            return False
        at = found + len(piece)
    return True


def is_target(pattern: str, full_name: str) -> bool:
    """Whether a pattern is a module's own name, or matches its full name; without a warning about a lost `*`."""
    own_name = full_name.rpartition(".")[2]
    return own_name == pattern or (not _lost_its_star(pattern) and bool(wildcard_match(pattern, full_name)))


def _lost_its_star(pattern: str) -> bool:
    return "" in pattern.split(".")


def _advice_on_lost_star(pattern: str) -> str:
    repaired = ".".join(part or "*" for part in pattern.split("."))
    return (
        f"{pattern!r} has an empty name between its dots and matches nothing; did it lose its '*'? Perhaps "
        f"{repaired!r} was meant"
    )


def is_expert_linear(fqn: str) -> bool:
    """Return whether the current base module is an expert linear module.

    Shared experts are not experts: every token passes through them, on the dense axes.

    Example:
        >>> is_expert_linear("model.layers.0.mlp.experts.0.linear_fc1")
        True
        >>> is_expert_linear("model.layers.0.mlp.linear_fc1")
        False
        >>> is_expert_linear("model.layers.0.mlp.shared_experts.linear_fc1")
        False
    """
    *containers, _ = fqn.split(".")
    return "experts" in containers


def is_router(module: nn.Module) -> bool:
    """Whether a module routes tokens to experts in two steps, logits and choice, as Megatron's `TopKRouter`."""
    return callable(getattr(module, "gating", None)) and callable(getattr(module, "routing", None))


def decides(module: nn.Module) -> bool:
    """Whether a module is a router, or a gate of shared experts: only targets that name it mean it."""
    layer_type = layer_type_of(module)
    return is_router(module) or (layer_type is not None and layer_type.decides)


def nearest_names(pattern: str, names: Sequence[str], count: int = 4) -> list[str]:
    """Return up to `count` of the names that look most like the pattern; the first ones if none does."""
    wanted = pattern[:_COMPARED_CHARACTERS].replace("*", "").strip(".")
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    candidates = (list(names) if "." in wanted else leaves)[:_COMPARED_NAMES]
    return difflib.get_close_matches(wanted, candidates, count, cutoff=0.5) or candidates[:count]


class _DefaultTargets(list[str]):
    """Default targets, some of which may be absent from a model."""


def default_targets(*names: str) -> Callable[[], list[str]]:
    """Make a default factory of targets that may match only partly, because no caller named them."""
    return partial(_DefaultTargets, names)


@dataclass
class ModuleMatcher:
    """Matches modules by name. A pattern is a module's own name, or its full name with `*` for any substring.

    Routers, and the gates of shared experts, are reached only by a target whose last component names them
    (`router`, `*.layers.0.mlp.router`, `*.shared_experts.gate`): not by `*.mlp.*`, and not by exclusions.

    Attributes:
        target_modules: Patterns of the layers to adapt; by default `linear_qkv`, `linear_proj`, `linear_fc1` and
            `linear_fc2` (Canonical LoRA: their parts, `peft/canonical.py`).
        exclude_modules: Patterns of the layers to leave alone; every other linear layer that can carry an adapter
            gets one. Not together with `target_modules`.
        canonical_mapping: In methods that adapt the parts of fused layers, pattern of the fused layer -> names of the
            parts. Made from `target_modules`.
    """

    target_modules: list[str] = field(
        default_factory=default_targets("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    )
    exclude_modules: list[str] = field(default_factory=list, kw_only=True)
    canonical_mapping: dict[str, set[str]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _adaptable: dict[str, None] = field(default_factory=dict, init=False, repr=False, compare=False)
    _chosen: dict[str, None] = field(default_factory=dict, init=False, repr=False, compare=False)
    _met: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    _refused: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check_targets()

    def _check_targets(self) -> None:
        for option in ("target_modules", "exclude_modules"):
            patterns = getattr(self, option)
            if isinstance(patterns, str):
                raise AdapterError(f"{option} is a string; give a list of patterns: [{patterns!r}]")
            for pattern in patterns or ():
                if not isinstance(pattern, str):
                    raise AdapterError(f"{option}: {pattern!r} is no pattern of layer names; give strings")
        if self.exclude_modules and self.target_modules and not self._targets_are_default:
            raise AdapterError(
                f"target_modules={list(self.target_modules)} and exclude_modules={list(self.exclude_modules)} were "
                "both given; name the layers to adapt, or those to leave alone, and leave the other empty"
            )
        if not self.target_modules and not self.exclude_modules:
            raise AdapterError(
                "target_modules is empty: name the layers to adapt, for instance ['linear_qkv'], or name those to "
                "leave alone in exclude_modules"
            )

    @property
    def _targets_are_default(self) -> bool:
        return isinstance(self.target_modules, _DefaultTargets)

    def _patterns(self) -> dict[str, list[str]]:
        """Return the patterns that are compared with module names, each with the requests that it stands for."""
        return {pattern: [pattern] for pattern in self.target_modules}

    def _init_target_match_state(self) -> None:
        """Reset the record of matches, and read the options again: they may have changed since construction."""
        self._check_targets()
        self._adaptable, self._chosen, self._met, self._refused = {}, {}, set(), {}

    def match(self, m: nn.Module, name: str | None = None, prefix: str | None = None) -> tuple[str, str] | None:
        """Whether a module is to be adapted.

        Args:
            m: Module.
            name: Its own name.
            prefix: Full name of its parent.

        Returns:
            The first pattern that it matches (its own name, where only exclusions are given) and its full name; or
            `None`.
        """
        name = name or ""
        full_name = f"{prefix}.{name}" if prefix else name
        adaptable = layer_type_of(m) is not None or is_router(m)
        is_named_only = decides(m)
        if adaptable:
            self._adaptable[full_name] = None
        if self.exclude_modules:
            excluded = [pattern for pattern in self.exclude_modules if is_target(pattern, full_name)]
            self._met.update(excluded)
            if not adaptable or excluded or is_named_only:
                return None
            self._chosen[full_name] = None
            return name, full_name
        matching = [
            pattern
            for pattern in self._patterns()
            if is_target(pattern, full_name) and (not is_named_only or pattern.rpartition(".")[2].strip("*"))
        ]
        if adaptable:
            self._met.update(matching)
            if not matching:
                return None
            self._chosen[full_name] = None
            return matching[0], full_name
        for pattern in matching:
            self._refused.setdefault(pattern, f"{full_name} ({type(m).__name__})")
        return None

    def _check_matches(self) -> None:
        """Check that every request was met, after a pass over the full model.

        Raises:
            AdapterError: A requested target matched no layer that can carry an adapter.
        """
        if self.exclude_modules:
            unmet = [pattern for pattern in self.exclude_modules if pattern not in self._met]
            if unmet:
                warnings.warn(f"exclude_modules: {self._explain(unmet)}", stacklevel=4)
            return
        unmet = [
            request
            for pattern, requests in self._patterns().items()
            if pattern not in self._met
            for request in requests
        ]
        if not unmet:
            return
        message = f"target_modules: {self._explain(unmet)}"
        if not self._targets_are_default or not self._met:
            raise AdapterError(message)
        warnings.warn(f"default {message}", stacklevel=4)

    def _explain(self, unmet: Sequence[str]) -> str:
        names = list(self._adaptable)
        if not names:
            return f"{', '.join(map(repr, unmet))} match nothing: the model has no layer that can carry an adapter"
        return "; ".join(self._reason(pattern, names) for pattern in unmet)

    def _reason(self, pattern: str, names: Sequence[str]) -> str:
        """Explain why a pattern matches none of these layers, and which names are nearest."""
        if _lost_its_star(pattern):
            return _advice_on_lost_star(pattern)
        nearest = ", ".join(nearest_names(pattern, names))
        if pattern in self._refused:
            refused = self._refused[pattern]
            return f"{pattern!r} matches only {refused}, which cannot carry an adapter; layers that can: {nearest}"
        return f"{pattern!r} matches no layer; nearest: {nearest}"


def named_value(patterns: Mapping[str, Value], full_name: str) -> Value | None:
    """Return the value of the first pattern that a full name matches, or `None`."""
    return next((value for pattern, value in patterns.items() if is_target(pattern, full_name)), None)


class ModulePath(NamedTuple):
    """Full name of a module's parent, and its own name. Both are empty for the model."""

    prefix: str = ""
    name: str = ""

    @property
    def full_name(self) -> str:
        """Full name of the module."""
        return f"{self.prefix}.{self.name}" if self.prefix else self.name

    def children(self, m: nn.Module, names: Mapping[nn.Module, str]) -> Iterator[tuple[str, ModulePath, nn.Module]]:
        """Yield (attribute, path, module) of every child of `m`, the module at this path.

        A module that a wrapper around a model holds has the path of the wrapper.

        Args:
            m: Module at this path.
            names: Own names that differ from those of attributes, see `global_names`.
        """
        for attribute, child in m._modules.items():
            if child is None:
                continue
            if is_held(attribute, self.full_name):
                yield attribute, self, child
            else:
                yield attribute, ModulePath(self.full_name, names.get(child, attribute)), child


def walk(model: nn.Module) -> Iterator[tuple[ModulePath, nn.Module]]:
    """Yield every module of a model with its path, top down; adapted layers are one module each."""
    names = global_names(model)

    def below(path: ModulePath, m: nn.Module) -> Iterator[tuple[ModulePath, nn.Module]]:
        yield path, m
        if wrapper_of(m) is None:
            for _, child_path, child in path.children(m, names):
                yield from below(child_path, child)

    return below(ModulePath(), model)


def adapted_layers(model: nn.Module | list[nn.Module]) -> Iterator[tuple[str, AdapterWrapper]]:
    """Yield every adapted layer of a model or its chunks with its full name, which no wrapper around it changes."""
    for chunk in chunks_of(model):
        for path, module in walk(chunk):
            wrapper = wrapper_of(module)
            if wrapper is not None:
                yield path.full_name, wrapper


def adapter_wrappers(model: nn.Module | list[nn.Module]) -> Iterator[tuple[str, AdapterWrapper]]:
    """Yield every adapted layer of a model or its chunks with its path below the chunk, as `get_submodule` takes it."""
    for chunk in chunks_of(model):
        for name, module in chunk.named_modules():
            wrapper = wrapper_of(module)
            if wrapper is not None:
                yield name, wrapper


def chunks_of(model: Any) -> list[nn.Module]:
    """Return a model, or its chunks, as a list.

    Raises:
        AdapterError: It is neither a module nor a list of modules.
    """
    chunks = list(model) if isinstance(model, (list, tuple)) else [model]
    for chunk in chunks:
        if not isinstance(chunk, nn.Module):
            raise AdapterError(
                f"expected a model (torch.nn.Module) or a list of its chunks, got {type(chunk).__name__}"
            )
    return chunks
