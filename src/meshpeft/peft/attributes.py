"""What a base linear says about itself to an adapter, in the five fields that the field knows."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from meshpeft.parallel import layout_of

__all__ = ["AdapterAttributes", "get_adapter_attributes_from_linear"]


class AdapterAttributes(NamedTuple):
    """Attributes of a base linear layer. What they cannot say (groups, partial outputs) is in its layout.

    Attributes:
        input_is_parallel: the layer is row parallel: its weight is divided along the input features.
        in_features, out_features: of the unsharded layer.
        disable_sequence_parallel_comm: the adapter makes no sequence-parallel collective: there is no sequence
            parallel, or the input comes gathered already.
        base_linear_is_parallel: the layer's weight is divided at all.
    """

    input_is_parallel: bool
    in_features: int
    out_features: int
    disable_sequence_parallel_comm: bool
    base_linear_is_parallel: bool


def get_adapter_attributes_from_linear(m: nn.Module) -> AdapterAttributes:
    """Returns attributes from the base layer, read from its registered layout.

    Args:
        m: the linear module.

    Raises:
        NotImplementedError: no layout is registered for the layer's type; the message names it.
    """
    layout = layout_of(m)
    parallel = layout.shard is not None
    communicates = layout.sequence_parallel and parallel and not layout.input_grad_is_reduced_outside
    return AdapterAttributes(
        input_is_parallel=layout.shard == "in",
        in_features=layout.in_features,
        out_features=layout.out_features,
        disable_sequence_parallel_comm=not communicates,
        base_linear_is_parallel=parallel,
    )
