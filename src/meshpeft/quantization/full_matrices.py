"""From a rank's slice of a weight to the whole matrices, and from whole factors back to slices.

Singular vectors of a slice are not slices of singular vectors: the decomposition is of the full matrix, gathered over
the axis that divides it. Experts stay where they are; every rank decomposes its own.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from meshpeft.parallel import LinearLayout, TensorLayout
from meshpeft.quantization.svd import LowRank

__all__ = ["full_matrices", "gathered_factors", "local_factors", "of_local_experts"]


def full_matrices(local: Tensor, layout: LinearLayout) -> Tensor:
    """This rank's slice of a weight, or of what is laid out like it -> [out, in], or [local experts, out, in].

    Canonical rows, the same on every rank of the axis that divides the weight. A collective over that axis.
    """
    return of_local_experts(layout.weight(), layout).gather(local)


def local_factors(
    part: LowRank, layout_a: TensorLayout, layout_b: TensorLayout, layout: LinearLayout
) -> tuple[Tensor, Tensor]:
    """This rank's slices of A = V^T [.., r, in] and B = U S [.., out, r].

    Args:
        part: of the matrices that `full_matrices` gave.
        layout_a, layout_b: of the adapter's factors.
        layout: of the layer.
    """
    a = of_local_experts(layout_a, layout).slice(part.right)
    b = of_local_experts(layout_b, layout).slice(part.left)
    return a.contiguous(), b.contiguous()


def gathered_factors(a: Tensor, b: Tensor, layout: LinearLayout) -> LowRank:
    """The inverse of `local_factors`, for factors that are laid out like those of a fused adapter."""
    rank = a.shape[-2]
    layout_a, layout_b = (of_local_experts(each(rank), layout) for each in (layout.factor_a, layout.factor_b))
    return LowRank(layout_b.gather(b), layout_a.gather(a))


def of_local_experts(tensor: TensorLayout, layout: LinearLayout) -> TensorLayout:
    """The layout within one rank's experts: dim 0 counts these, and is not divided."""
    expert_axis = layout.expert_axis
    if expert_axis is None or not tensor.is_stacked:
        return tensor
    experts, *matrix = tensor.global_shape
    shards = tuple((dim, axis) for dim, axis in tensor.shards if dim != 0)
    return replace(tensor, global_shape=(experts // expert_axis.world_size, *matrix), shards=shards)
