"""How the layers of foreign packages lie on the mesh: one file for each package, imported when its classes are met.

| classes of | described by |
|---|---|
| `megatron.core` | `meshpeft.engines.megatron` |
| `transformer_engine` | `meshpeft.engines.transformer_engine` |
| `modelopt.torch.quantization` | `meshpeft.engines.modelopt`, imported right after it |
| `transformers.pytorch_utils` | `meshpeft.engines.transformers` |
| `torch.nn`, sharded by `transformers` | `meshpeft.engines.transformers`, imported right after what shards |

Importing this package imports none of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Sequence
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from weakref import WeakValueDictionary

import torch.distributed as dist
from torch.distributed import ProcessGroup

from meshpeft.parallel import ParallelAxis, register_engine

__all__ = ["axis_of_group", "import_after", "register_engines", "source_of"]


def register_engines() -> None:
    """Register the engine of every package, which is imported when a class of the package is met."""
    register_engine("megatron.core", "meshpeft.engines.megatron")
    register_engine("transformer_engine", "meshpeft.engines.transformer_engine")
    register_engine("modelopt.torch.quantization", "meshpeft.engines.modelopt")
    # It quantises layers only if it knew their classes before.
    import_after("modelopt.torch.quantization", "meshpeft.engines.modelopt")
    register_engine("transformers.pytorch_utils", "meshpeft.engines.transformers")
    # The layers keep the class that PyTorch gave them.
    import_after("transformers.distributed.tensor_parallel", "meshpeft.engines.transformers")


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
        """Return the spec that the other finders find, whose loader also imports the engine."""
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


# One axis for each group, so that gradients of one group are summed together. An axis holds its group: while there is
# an entry, no other group can have the same identity.
_axes: WeakValueDictionary[tuple[str, int], ParallelAxis] = WeakValueDictionary()


def axis_of_group(name: str, group: ProcessGroup) -> ParallelAxis:
    """Return the axis called `name` over the ranks of a group."""
    axis = _axes.get((name, id(group)))
    if axis is None:
        axis = ParallelAxis(name, group, dist.get_rank(group), dist.get_world_size(group))
        _axes[name, id(group)] = axis
    return axis


@cache
def source_of(code: Any) -> str:
    """Return the source of a class or function; empty where there is none. Cached: finding it in its file is slow."""
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):
        return ""
