"""What the packed layers of a model store."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import nn

from meshpeft.quantization.layers import packed_form

__all__ = ["PackedSize", "packed_size"]


class PackedSize(NamedTuple):
    """What the packed layers of a model store, over all ranks that share it.

    Attributes:
        layers: packed layers.
        parameters: of their weights.
        bytes: of the codes and scales, and of principal parts that are still beside them, as the ranks hold them.
        formats: their names.
    """

    layers: int
    parameters: int
    bytes: int
    formats: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.parameters:,} parameters of {self.layers} layers as {' and '.join(self.formats)} in {self.bytes:,} "
            f"bytes, {self.bytes / max(1, self.parameters):.4f} a parameter"
        )


def packed_size(model: nn.Module) -> PackedSize:
    """Count the packed weights of a model; not a collective."""
    parameters = stored = 0
    layers = [form for form in map(packed_form, model.modules()) if form is not None]
    for layer in layers:
        weight = layer.blocks.weight
        ranks = math.prod(axis.world_size for axis in weight.shard_axes)
        parameters += weight.size
        stored += ranks * sum(tensor.nbytes for tensor in layer.stored_tensors())
    return PackedSize(len(layers), parameters, stored, tuple(sorted({layer.storage.name for layer in layers})))
