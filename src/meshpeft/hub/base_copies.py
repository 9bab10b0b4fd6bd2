"""Weights of the base that `peft` writes beside the adapters on them: they say nothing new, or they are an error.

It does so for `lm_head` and embeddings, which may have been trained or resized along with the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from meshpeft.hub.errors import CheckpointError
from meshpeft.hub.linears import HubLinear
from meshpeft.hub.tensor_file import TensorFileReader
from meshpeft.parallel.layer_types import layout_of
from meshpeft.peft import AdapterWrapper

__all__ = ["BASE_COPY", "compare_base_copies"]

BASE_COPY = "base_layer.weight"
"""What follows a module's name in the key of a copy of its weight."""


@torch.no_grad()
def compare_base_copies(
    model: nn.Module, linears: Mapping[str, HubLinear], copies: Mapping[str, str], file: TensorFileReader
) -> None:
    """Compare them with this rank's slices of the model's own. A weight that is packed, or has no values, is not.

    Args:
        model: with or without adapters.
        linears: its layers by their names in transformers.
        copies: name of a layer -> key of the copy in the file.
        file: of the adapter.

    Raises:
        CheckpointError: the adapter was made on another base.
    """
    for name, key in copies.items():
        layer = model.get_submodule(linears[name].module)
        base = layer.to_wrap if isinstance(layer, AdapterWrapper) else layer
        weight = getattr(base, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.is_meta:
            continue
        layout = layout_of(base).weight()
        own = dict(zip((piece.part for piece in layout.pieces()), layout.split_parts(weight), strict=True))
        [piece] = [piece for piece in layout.pieces() if piece.part == linears[name].part]
        stored = file.tensors[key].shape
        if stored != piece.global_shape:
            raise CheckpointError(
                f"{file.path}: {key} has shape {stored}, the model's {name}.weight {piece.global_shape}; "
                "the adapter is of another base"
            )
        if bool((file.read_box(key, piece.offset, piece.shape).to(weight) != own[piece.part]).any()):
            raise CheckpointError(
                f"{file.path}: {key} has other values than the model's {name}.weight; the adapter is of another base, "
                "or was trained together with this weight"
            )
