"""Dropout whose masks agree where an activation is replicated or partial, and differ where it is sharded.

A mask is a function of one integer. That integer comes from the default CPU generator, which every rank seeds
alike (`set_seed`) and which activation checkpointing saves and restores, mixed with this rank's index on each axis over
which the activation varies. So the mask can also be thrown away and made again in the backward pass
(`recompute=True`).

Between ranks, masks differ over the axes that shard tokens (dp, cp; edp of experts), over expert parallel, and over the
layer's own axis where it shards the activation; over every other axis they agree. `LowRankAdapter._drop`
(`peft/adapter.py`) has the table by layer. Between layouts, masks agree only where both hold the activation in full: a
mask is drawn in the shape that the rank holds. So dropout draws other masks at another layout, of the same
distribution.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import spmd_types as spmd
import torch
from spmd_types import rules
from spmd_types.types import V
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd import Function

from meshpeft.parallel.errors import ParallelError
from meshpeft.parallel.mesh import ParallelAxis, on_each_rank

__all__ = ["MaskWitness", "draw_seed", "dropout", "dropout_mask", "masks_seen_by", "set_seed"]

MaskWitness: TypeAlias = "Callable[[int, Tensor, Tensor], Tensor]"
"""Gets a mask's seed, what it drops (or a gradient) and the mask; returns the mask to use."""

# Seeds are numbers modulo a prime below 2^31 (torch's CPU generator reads 32 bits). An axis is a digit to a base
# larger than any axis: ranks that differ on one or two axes can't meet, whatever those axes' sizes.
_SEED_RANGE = 2**31 - 1
_BASE = 46_337


def set_seed(seed: int) -> None:
    """Seed python, numpy and torch alike on every rank; dropout tells the ranks apart by itself."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def draw_seed(varying: Sequence[ParallelAxis] = ()) -> int:
    """The next mask's seed: equal on ranks that differ only on axes not in `varying`.

    Args:
        varying: The axes over which the activation holds different values, token axes included.
    """
    # The draw is not part of the model, and has a value also where the model's tensors have none.
    with spmd.no_typecheck(), unset_fake_temporarily():
        seed: int = int(torch.empty((), dtype=torch.int64).random_(0, _SEED_RANGE))
    for axis in varying:
        if axis.world_size > 1:
            seed = (seed * _BASE + axis.rank + 1) % _SEED_RANGE
    return seed


@on_each_rank
def dropout_mask(like: Tensor, p: float, seed: int) -> Tensor:
    """Which elements are kept: a bool tensor shaped like `like`, a function of (seed, shape, device)."""
    if like.is_meta:
        return torch.empty_like(like, dtype=torch.bool)
    generator = torch.Generator(device=like.device).manual_seed(int(seed))
    return torch.rand(like.shape, generator=generator, dtype=torch.float32, device=like.device) >= p


_witnesses: list[MaskWitness] = []


@contextmanager
def masks_seen_by(witness: MaskWitness) -> Iterator[None]:
    """Show `witness` every mask that is drawn inside, and use what it returns: for proofs about masks.

    A mask that is made again, by a backward pass or by activation checkpointing, is shown again, with its seed.
    """
    _witnesses.append(witness)
    try:
        yield
    finally:
        _witnesses.remove(witness)


def _mask(like: Tensor, p: float, seed: int) -> Tensor:
    mask = dropout_mask(like, p, seed)
    for witness in _witnesses:
        mask = witness(seed, like, mask)
    return mask


class _Dropout(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int, recompute: bool) -> Tensor:
        mask = _mask(x, p, seed)
        ctx.p, ctx.seed = p, seed
        ctx.mask = None if recompute else mask
        return x * mask * (1 / (1 - p))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        mask = _mask(grads[0], ctx.p, ctx.seed) if ctx.mask is None else ctx.mask
        return grads[0] * mask * (1 / (1 - ctx.p)), None, None, None

    @staticmethod
    def spmd_typecheck(*, x: Tensor) -> Any:
        # Linear in x for a given mask, so a partial value stays one as long as the masks agree.
        names = "abcdefgh"[: x.dim()]
        return rules.einsum(f"{names}->{names}", x, linear_in=(0,))


def dropout(
    x: Tensor,
    p: float,
    *,
    training: bool = True,
    varying: Sequence[ParallelAxis] = (),
    recompute: bool = False,
) -> Tensor:
    """Inverted dropout: x * mask / (1 - p). The state of x is kept.

    Args:
        x: [*]; R, I or P on the axes not in `varying`, V on those in it.
        p: The probability that an element is dropped, in [0, 1).
        varying: The axes over which x holds different values (token axes; the axis that shards x).
        recompute: Make the mask again in the backward pass instead of keeping it.

    Raises:
        ParallelError: p outside [0, 1).
    """
    if not 0 <= p < 1:
        raise ParallelError(f"dropout={p}: expected a probability of at least 0 and below 1")
    if not training or p == 0:
        return x
    if spmd.is_type_checking():
        _check_masks(x, varying)
    out: Tensor = _Dropout.apply(x, p, draw_seed(varying), recompute)
    return out


def _check_masks(x: Tensor, varying: Sequence[ParallelAxis]) -> None:
    """Under the type checker: masks must differ exactly where x does."""
    states = spmd.get_local_type(x)
    differing = {spmd.normalize_axis(axis.process_group) for axis in varying if axis.world_size > 1}
    if not differing <= states.keys():
        return  # x is typed on the other factorisation of the ranks
    for axis, state in states.items():
        if (state is V) != (axis in differing):
            masks = "differ" if axis in differing else "agree"
            raise spmd.SpmdTypeError(f"dropout: masks {masks} over {axis}, where x is {state}")
