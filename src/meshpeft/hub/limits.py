"""Sizes that no model has: refused before a number from a fetched `config.json` decides over memory and time.

transformers' configuration classes make a list of their layers, and models make modules, tables and tensors, before
any weight is looked at. What the files hold is compared with the configuration as soon as they are open; these limits
are for what happens before, and for `plan`, which has no files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from meshpeft.models.errors import ModelError
from meshpeft.parallel.errors import shown

__all__ = ["MOST_EXPERTS", "MOST_LAYERS", "check_fields", "few_modules"]

MOST_LAYERS = 1_024
"""The deepest models that were published have 1,000 layers, the deepest in use 126."""
MOST_EXPERTS = 8_192
"""Of a layer; the most in use are 2,048."""
_LARGEST = 2**31 - 1
_DEEPEST = 16
_MODULES_OF_A_TENSOR = 16


def check_fields(fields: Mapping[str, Any], source: object = "the configuration") -> None:
    """Check that no number of a parsed `config.json` is beyond what any model has.

    Args:
        fields: the content, with nested configurations.
        source: the file, for messages.

    Raises:
        ModelError: a number of layers or experts, or another size, is too large or negative; a number is NaN;
            configurations are nested deep.
    """
    for name, value in fields.items():
        _check_value(name, value, source, 1)


def _check_value(name: str, value: Any, source: object, depth: int) -> None:
    if depth > _DEEPEST:
        raise ModelError(f"{source}: {shown(name)} is nested more than {_DEEPEST} deep; no configuration is")
    if isinstance(value, Mapping):
        for inner, part in value.items():
            _check_value(str(inner), part, source, depth + 1)
    elif isinstance(value, list):
        for part in value:
            _check_value(name, part, source, depth + 1)
    elif isinstance(value, float) and math.isnan(value):
        raise ModelError(f"{source}: {shown(name)} is NaN; expected a number")
    elif isinstance(value, int) and abs(value) > _most(name):
        raise ModelError(f"{source}: {name}={shown(value)}: no model has more than {_most(name):,}")


def _most(name: str) -> float:
    """The largest integer in a field of this name; without a bound where it is no size."""
    if "theta" in name or name in ("max_length", "model_max_length"):
        return math.inf
    # Sizes per layer are sizes.
    if "layer" in name and "size" not in name:
        return MOST_LAYERS
    return MOST_EXPERTS if "experts" in name else _LARGEST


@contextmanager
def few_modules(tensors: int, source: object) -> Iterator[None]:
    """Stop a model that is being made from a configuration when it has far more modules than its files have tensors.

    Which of a configuration's fields are numbers of layers, heads or experts, only the model's own code says.

    Args:
        tensors: how many the files hold.
        source: the directory, for the message.

    Raises:
        ModelError: there are too many.
    """
    most, made = 2_000 + _MODULES_OF_A_TENSOR * tensors, 0

    def count(*_: nn.Module | str | None) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise ModelError(
                f"{source}: its config.json describes a model of more than {most:,} modules, and its weights are "
                f"{tensors:,} tensors; one of them is of another model"
            )

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
