"""Importing an engine right after the package that it is for, for packages that must know our layers beforehand."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["import_after"]


def import_after(package: str, engine: str) -> None:
    """Import `engine` as soon as `package` is imported; at once, if it is already. It need not be installed."""
    if package in sys.modules:
        importlib.import_module(engine)
    elif not any(isinstance(finder, _Watch) and finder.engine == engine for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch(package, engine))


class _Watch(MetaPathFinder):
    def __init__(self, package: str, engine: str) -> None:
        self.package, self.engine = package, engine

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the other finders find; it imports the engine when it is done."""
        if fullname != self.package:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_both(module: ModuleType) -> None:
                execute(module)
                importlib.import_module(self.engine)

            vars(spec.loader)["exec_module"] = execute_both
        return spec
