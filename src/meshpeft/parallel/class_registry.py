"""What is known about classes of modules, and where it is said about those of optional packages.

A module that describes the classes of an optional package (an engine) is imported when the first instance of such a
class is met, and never where the package is absent. The engines introduce themselves by
`register_engine`: no engine is named here.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from torch import nn

__all__ = ["ClassRegistry", "load_engines_in_use", "register_engine"]

T = TypeVar("T")

# Package whose classes are described elsewhere -> the module that describes them; taken out once it is imported.
_engines: dict[str, str] = {}
_asked: set[type] = set()


def register_engine(package: str, module: str) -> None:
    """Let classes that are defined in `package` be described by `module`, imported when the first one is met.

    Args:
        package: For instance `megatron.core`.
        module: Full name; its import registers layer types.
    """
    _engines[package] = module
    _asked.clear()


def _load_engines(cls: type) -> None:
    """Import the engines that describe this class or one of its bases."""
    if cls in _asked:
        return
    _asked.add(cls)
    for base in cls.__mro__:
        for package in [package for package in _engines if _is_inside(base.__module__, package)]:
            _load_engine(package)


def load_engines_in_use() -> None:
    """Import the engines whose packages the program has imported."""
    for package in [package for package in _engines if package in sys.modules]:
        _load_engine(package)


def _load_engine(package: str) -> None:
    # Taken out first: the engine's own import may ask for its classes.
    importlib.import_module(_engines.pop(package))


def _is_inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


class ClassRegistry(Generic[T]):
    """One entry per class of modules; a subclass without one has that of its nearest base.

    A class may have further entries for those of its instances that something was done to; and what a package makes of
    layers of many classes, by subclassing them, may have theirs, changed.
    """

    def __init__(self) -> None:
        self._entries: dict[type[nn.Module], T] = {}
        self._changed: dict[type[nn.Module], list[tuple[Callable[[nn.Module], bool], T]]] = {}
        self._derived: dict[type[nn.Module], Callable[[T], T]] = {}

    def add(self, cls: type[nn.Module], entry: T, when: Callable[[nn.Module], bool] | None = None) -> None:
        """Set the entry of a class, or of its instances for which `when` holds."""
        if when is None:
            self._entries[cls] = entry
        else:
            self._changed.setdefault(cls, []).append((when, entry))

    def derive(self, cls: type[nn.Module], change: Callable[[T], T]) -> None:
        """Let what is also a `cls` have the entry of its other classes, changed."""
        self._derived[cls] = change

    def find(self, module: nn.Module) -> T | None:
        """The entry of the nearest class of `module` that has one, or `None`."""
        found = self._nearest(module)
        if found is None:
            return None
        entry = found[1]
        for cls, change in self._derived.items():
            if isinstance(module, cls):
                entry = change(entry)
        return entry

    def class_of(self, module: nn.Module) -> type[nn.Module] | None:
        """The class whose entry `module` has; `None` for no entry, or one of what was done to the instance."""
        found = self._nearest(module)
        return None if found is None else found[0]

    def _nearest(self, module: nn.Module) -> tuple[type[nn.Module] | None, T] | None:
        _load_engines(type(module))
        for cls in type(module).__mro__:
            for when, entry in self._changed.get(cls, ()):
                if when(module):
                    return None, entry
            if cls in self._entries:
                return cls, self._entries[cls]
        return None

    def classes(self) -> Iterable[type[nn.Module]]:
        """Every class with an entry."""
        return self._entries.keys()
