"""The row norms of W + s B A, without W + s B A.

    |w_i + s b_i A|^2 = |w_i|^2 + 2 s b_i . (A w_i) + s^2 b_i (A A^T) b_i^T

Every term is a sum over the input features: where these are divided, the three local terms are added up first and
one all-reduce of [out] completes them. Computed in float32 or the widest type of the operands, clamped at zero
before the root (rounding may leave it a little below), never differentiated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from meshpeft.parallel import ParallelAxis
from meshpeft.parallel.communication import all_reduce
from meshpeft.peft.functional import WeightSource

__all__ = ["RowNorms", "adapted_row_norms"]

# Rows of a narrow weight that are widened at a time.
_ROWS = 4096


def _wide(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _pieces(weight: Tensor) -> tuple[Tensor, ...]:
    """Some rows of a matrix, or some experts of a stack, at a time: nothing is made of the size of all of them."""
    return weight.split(_ROWS if weight.dim() == 2 else max(1, _ROWS // weight.shape[1]))


def _squared_norms(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """|w_i|^2 [.., out], of the local columns."""
    return torch.cat([rows.to(dtype).square().sum(-1) for rows in _pieces(weight)])


def _products(weight: Tensor, a: Tensor) -> Tensor:
    """A w_i for every row, [.., out, r], of the local columns; `a` has the wide type."""
    if weight.dtype == a.dtype:
        return weight @ a.mT
    pieces = _pieces(weight)
    factors = a.split([len(piece) for piece in pieces]) if a.dim() == 3 else [a] * len(pieces)
    return torch.cat([piece.to(a.dtype) @ factor.mT for piece, factor in zip(pieces, factors, strict=True)])


@torch.no_grad()
def adapted_row_norms(
    weight: Tensor, a: Tensor, b: Tensor, scale: float, axis: ParallelAxis | None, squared: Tensor | None = None
) -> Tensor:
    """|w_i + s b_i A| for every local row.

    Args:
        weight: W [out, in], local; S(-1) on `axis`, if one is given; or a stack [experts, out, in].
        a: A [r, in], S(-1) likewise; of a stack, one or [experts, r, in].
        b: B [out, r], R on `axis`; likewise.
        scale: s.
        axis: the axis that divides the input features, or `None`.
        squared: |w_i|^2 [out] of the local columns, if they are known.

    Returns:
        [out], or [experts, out], float32 or wider; the same on every rank of `axis`. A collective over it.
    """
    dtype = _wide(weight, a, b)
    a, b = a.to(dtype), b.to(dtype)
    if squared is None:
        squared = _squared_norms(weight, dtype)
    # s b_i . (2 A w_i + s (A A^T) b_i)
    change = _products(weight, a).mul_(2).add_(b @ (a @ a.mT), alpha=scale).mul_(b).sum(-1)
    total = torch.add(squared.to(dtype), change, alpha=scale)
    if axis is not None:
        total = all_reduce(total, axis)
    return total.clamp_(min=0).sqrt_()


class RowNorms:
    """Row norms of one adapted layer, computed anew only when something they depend on may have changed.

    That is: another tensor, storage, type or version (the counter of in-place changes) of W, A or B, or another
    scale. Some optimizers and engines write parameters behind that counter's back, so a backward pass through the
    layer (`after_backward`) counts as a change too once the gradients it left have been taken away, as an optimizer
    step does; and parameters that are views of a larger buffer, into which others may write, are never trusted.
    """

    def __init__(self) -> None:
        self._key: tuple[object, ...] | None = None
        self._norms: Tensor | None = None
        self._weight_key: tuple[object, ...] | None = None
        self._squared: Tensor | None = None
        self._held: tuple[Tensor, ...] = ()
        self._trained = False

    def __deepcopy__(self, memo: dict[int, object]) -> RowNorms:
        return RowNorms()

    def __reduce__(self) -> tuple[type[RowNorms], tuple[()]]:
        return RowNorms, ()

    def clear(self) -> None:
        """Forget everything: a parameter was written in a way that leaves no trace."""
        self.__init__()  # type: ignore[misc]  # back to the start, whatever the fields are

    def after_backward(self) -> None:
        """A backward pass went through the layer: an optimizer step may follow."""
        self._trained = True

    def get(
        self,
        weight: WeightSource,
        identity: Tensor,
        a: Tensor,
        b: Tensor,
        scale: float,
        axis: ParallelAxis | None,
        read: Callable[[WeightSource], Tensor],
    ) -> Tensor:
        """The norms [out] of W + s B A.

        Args:
            weight: W, or a function that makes it, which `read` calls.
            identity: the stored tensor whose change means another W.
        """
        weight_key = _fingerprint(identity)
        key = (weight_key, _fingerprint(a), _fingerprint(b), scale)
        stepped = self._trained and a.grad is None and b.grad is None
        if self._norms is None or stepped or None in key or key != self._key:
            local = read(weight)
            dtype = _wide(local, a, b)
            if self._squared is None or weight_key is None or self._weight_key != (weight_key, dtype):
                self._squared, self._weight_key = _squared_norms(local.detach(), dtype), (weight_key, dtype)
            self._norms = adapted_row_norms(local.detach(), a, b, scale, axis, self._squared)
            # The factors are held so that no other tensor can come to lie at their address.
            self._key, self._held, self._trained = key, (a.detach(), b.detach()), False
        return self._norms


def _fingerprint(tensor: Tensor) -> tuple[object, ...] | None:
    """What changes when a tensor's values do; `None` if that cannot be told."""
    try:
        address = tensor.data_ptr()
        if tensor.untyped_storage().nbytes() > tensor.nbytes:
            return None
    except RuntimeError:  # wrapper tensors have no storage of their own
        address = 0
    return id(tensor), address, tensor._version, tensor.dtype, tensor.device
