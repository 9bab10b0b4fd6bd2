"""Parts of a model that text does not reach, such as the tower of images: named, and not in memory.

A checkpoint of images and text is fine-tuned on text. What is beside the text model then has no gradient and computes
nothing, and a process need not hold it: in its place is a module without parameters. Its tensors stay in the files that
the model was read from, from which a merged model copies them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from meshpeft.models.config import ModelError

__all__ = ["LeftOut", "leave_out_towers", "towers_in_place"]


class LeftOut(nn.Module):
    """What stands in the place of a part that is not in memory."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse the call.

        Raises:
            ModelError: Always.
        """
        raise ModelError(
            f"{self.name} is not in memory: this model was read for text, and its input has more than text"
        )


def leave_out_towers(model: Any) -> dict[str, nn.Module]:
    """Take out of a model on the meta device what stands beside its text model, in place.

    Args:
        model: A model of transformers. One for text alone keeps all it has.

    Returns:
        What was taken out, by full name.
    """
    text = model.get_decoder()
    ends = {model.get_input_embeddings(), model.get_output_embeddings()} - {None}
    taken: dict[str, nn.Module] = {}

    def visit(prefix: str, module: nn.Module) -> None:
        for own, child in module.named_children():
            name, inside = f"{prefix}{own}", set(child.modules())
            if child is text or child in ends:
                continue
            if text in inside:
                visit(f"{name}.", child)
            elif not inside & ends and next(child.parameters(), None) is not None:
                taken[name] = child

    if text is not None and text is not model and model.config.get_text_config() is not model.config:
        visit("", model)
    _put(model, {name: LeftOut(name) for name in taken})
    return taken


@contextmanager
def towers_in_place(model: Any) -> Iterator[None]:
    """Put what was taken out, on the meta device, back for as long as the context lasts."""
    instead = {name: model.get_submodule(name) for name in model.towers}
    _put(model, model.towers)
    try:
        yield
    finally:
        _put(model, instead)


def _put(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, module)
