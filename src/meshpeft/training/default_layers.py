"""Which layers of a model get adapters, and which a packed base keeps in full, where the options name none."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable
from functools import cache
from typing import Any, NamedTuple

from torch import nn

from meshpeft.models import Decoder, LanguageModel
from meshpeft.parallel import layer_type_of
from meshpeft.peft.matching import is_target
from meshpeft.quantization import DEFAULT_EXCLUDED

__all__ = ["DefaultLayers", "default_layers"]


class DefaultLayers(NamedTuple):
    """Names, or patterns with `*` of full names, of layers of a model.

    Attributes:
        adapted: those that get adapters; `None` for those that the method has.
        in_full: those that a packed base keeps as they are.
    """

    adapted: list[str] | None = None
    in_full: tuple[str, ...] = DEFAULT_EXCLUDED


def default_layers(model: LanguageModel) -> DefaultLayers:
    """Of a model of transformers: adapters on every linear layer of its text model, but for those kept in full.

    These are the vocabulary head, routers, layers whose weight the code around them multiplies by itself, which would
    leave an adapter out, and all that sees no text.

    Args:
        model: without adapters; may be on the meta device.
    """
    if isinstance(model, Decoder):
        return DefaultLayers()
    layers = {name: module for name, module in model.named_modules() if layer_type_of(module) is not None}
    text = _text_model(model)
    in_full = [
        name for name, module in layers.items() if not name.startswith(text) or _stays_in_full(model, name, module)
    ]
    adapted = [name for name in layers if name not in in_full]
    return DefaultLayers(_patterns(adapted, layers.keys() - adapted), (*DEFAULT_EXCLUDED, *in_full))


def _stays_in_full(model: Any, name: str, module: nn.Module) -> bool:
    if module is model.get_output_embeddings() or not set(name.split(".")).isdisjoint(DEFAULT_EXCLUDED):
        return True
    holder, _, own_name = name.rpartition(".")
    code = _source(model.get_submodule(holder).__class__)
    # Not a part of the weight: Bloom multiplies by one where its pretraining was divided, and by all of it elsewhere.
    return re.search(rf"\bself\.{re.escape(own_name)}\.weight\b(?!\[)", code) is not None


@cache
def _source(cls: type[nn.Module]) -> str:
    """The code of a class, which finding in its file takes long; empty where there is none."""
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""


def _text_model(model: Any) -> str:
    """How names begin in the part of the model that sees text, where it has others (images, sound)."""
    if model.config.get_text_config() is model.config:
        return ""
    text = model.get_decoder()
    return "".join(f"{name}." for name, module in model.named_modules() if module is text and name)


def _patterns(names: Iterable[str], others: Collection[str]) -> list[str]:
    """The shortest patterns that match `names` and none of `others`."""

    @cache  # the same patterns serve in every block
    def fits(pattern: str) -> bool:
        return not any(is_target(pattern, other) for other in others)

    found = set()
    for name in names:
        candidates = (name.rpartition(".")[2], re.sub(r"\.\d+(?=\.)", ".*", name), name)
        found.add(next(filter(fits, candidates), name))
    return sorted(found)
