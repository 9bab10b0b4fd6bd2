"""Whether Transformer Engine's layers are there, as Megatron-Core wraps them.

`TECL` and `TERL` are its column- and row-parallel linear classes; empty where Transformer Engine or Megatron-Core is
not installed. Where both are, importing this file enters Transformer Engine's layers into the registry.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec

from torch import nn

__all__ = ["HAVE_TE", "TECL", "TERL"]

_EXTENSION = "megatron.core.extensions.transformer_engine"
_COLUMN = ("TEColumnParallelLinear", "TELayerNormColumnParallelLinear", "TEColumnParallelGroupedLinear")
_ROW = ("TERowParallelLinear", "TERowParallelGroupedLinear")


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # its parent is not there
        return False


HAVE_TE: bool = _installed("transformer_engine") and _installed("megatron.core")


def _classes(names: tuple[str, ...]) -> tuple[type[nn.Module], ...]:
    if not HAVE_TE:
        return ()
    extension = importlib.import_module(_EXTENSION)
    return tuple(getattr(extension, name) for name in names if getattr(extension, name, None) is not None)


TECL: tuple[type[nn.Module], ...] = _classes(_COLUMN)
TERL: tuple[type[nn.Module], ...] = _classes(_ROW)


def _register() -> None:
    from meshpeft.engines.te_layers import register_te_layers

    te = importlib.import_module("transformer_engine.pytorch")
    register_te_layers([te.Linear, te.LayerNormLinear, te.GroupedLinear], columns=TECL, rows=TERL)


if HAVE_TE:
    _register()
