"""Dropout's masks at a layout: seen as they are drawn, held against the rule, and given to one rank.

The rule itself is in `parallel/random.py`:

| activation | masks |
|---|---|
| the same on two ranks | agree |
| other values on two ranks (token or feature shards, data parallel) | differ |

Two proofs. The values of every dropped activation are compared between the ranks, and so are the masks. Then one rank
takes the step that the layout took, on all of its rows, with the masks that the layout drew, put together: where every
rank used its part of one mask, forward and backward, loss and gradients are those of the layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from meshpeft.parallel import ParallelAxis, ParallelGroupInfo
from meshpeft.peft import LowRankAdapter, adapter_wrappers
from meshpeft.verify.simulation import index_on_rank, on_rank, ranks

__all__ = ["MaskFault", "MasksOfALayout", "set_dropout"]

# Masks of fewer elements are too often alike by chance.
_FEWEST = 64


class MaskFault(Exception):
    """Masks that break the rule."""


def set_dropout(model: nn.Module, p: float) -> list[LowRankAdapter]:
    """Give every adapter of a model this dropout; return the adapters."""
    adapters = [term.adapter for _, wrapper in adapter_wrappers(model) for term in wrapper.terms()]
    for adapter in adapters:
        adapter.dropout = p
    return adapters


@dataclass
class _Drawn:
    """One mask of all ranks, and the activation that it met; `shown` counts how often."""

    values: dict[int, Tensor]
    masks: dict[int, Tensor]
    shown: int = 1


@dataclass
class MasksOfALayout:
    """The masks of one training step, in the order in which they were first drawn.

    Attributes:
        p: Dropout probability.
        mesh: Mesh of the layout.
        rows_dim: Dim of activations, 0 or 1, that counts rows of the micro-batch; the other one counts their tokens.
    """

    p: float
    mesh: ParallelGroupInfo
    rows_dim: int
    _drawn: dict[tuple[int, ...], _Drawn] = field(default_factory=dict)
    _order: dict[int, int] = field(default_factory=dict)
    _places: dict[int, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # While the ranks are simulated: their places are not to be had afterwards.
        self._places = {
            rank: {axis.name: index_on_rank(axis.rank, rank) for axis in self.mesh.weight_axes()} for rank in ranks()
        }

    def __len__(self) -> int:
        return len(self._drawn)

    def record(self, seed: int, x: Tensor, mask: Tensor) -> Tensor:
        """Keep a mask of the layout; an observer for `masks_seen_by`."""
        key = tuple(index_on_rank(seed, rank) for rank in ranks())
        if key in self._drawn:
            self._drawn[key].shown += 1
        else:
            values = {rank: on_rank(x, rank).detach().clone() for rank in ranks()}
            self._drawn[key] = _Drawn(values, {rank: on_rank(mask, rank) for rank in ranks()})
        return mask

    def replay(self, seed: int, x: Tensor, mask: Tensor) -> Tensor:
        """On one rank, return the mask that the layout drew in this place; an observer for `masks_seen_by`."""
        number = self._order.setdefault(seed, len(self._order))
        if number >= len(self._drawn):
            raise MaskFault(f"one rank draws more masks than the layout's {len(self._drawn)}")
        return self._assembled(list(self._drawn.values())[number].masks, tuple(mask.shape))

    def check(self, most_shown: int) -> None:
        """Check the masks against the rule.

        Args:
            most_shown: How often one mask may be used: in the forward pass, and where it is made again.

        Raises:
            MaskFault: A rule is broken; the message names it.
        """
        kept = total = 0
        for drawn in self._drawn.values():
            if drawn.shown > most_shown:
                raise MaskFault(f"{drawn.shown} draws have one seed: layers or micro-batches share a mask")
            self._check_ranks(drawn)
            kept += sum(int(mask.sum()) for mask in drawn.masks.values())
            total += sum(mask.numel() for mask in drawn.masks.values())
        spread = 6 * math.sqrt(self.p * (1 - self.p) / max(1, total)) * math.sqrt(len(self._places))
        if total and abs(kept / total - (1 - self.p)) > spread:
            raise MaskFault(f"masks keep {kept / total:.3f} of the elements, not {1 - self.p:.3f}")

    def _check_ranks(self, drawn: _Drawn) -> None:
        # One rank of each set that holds the same activation, and its mask.
        seen: list[int] = []
        for rank, values in drawn.values.items():
            mask = drawn.masks[rank]
            for other in seen:
                if _alike(values, drawn.values[other]):
                    if not torch.equal(mask, drawn.masks[other]):
                        raise MaskFault(f"ranks {other} and {rank} hold the same activation, and their masks differ")
                    break
                if _equal_beginning(mask, drawn.masks[other]):
                    raise MaskFault(f"ranks {other} and {rank} hold other activations, and their masks agree")
            else:
                seen.append(rank)

    def _assembled(self, masks: Mapping[int, Tensor], shape: tuple[int, ...]) -> Tensor:
        """Assemble the mask of the global activation of this shape."""
        local = next(iter(masks.values())).shape
        if len(local) != len(shape):
            raise MaskFault(f"a mask of shape {tuple(local)} has its place in {shape} on one rank")
        axes = [self._axes_of(dim, size, of_all) for dim, (size, of_all) in enumerate(zip(local, shape, strict=True))]
        counts = [math.prod(axis.world_size for axis in sharding) for sharding in axes]
        # Under sequence parallel tokens were added so that they divide: one rank has none of these.
        full = torch.zeros([size * count for size, count in zip(local, counts, strict=True)], dtype=torch.bool)
        for rank, mask in masks.items():
            part = full
            for dim, (size, sharding) in enumerate(zip(local, axes, strict=True)):
                place = 0
                for axis in sharding:
                    place = place * axis.world_size + self._places[rank][axis.name]
                part = part.narrow(dim, place * size, size)
            part.copy_(mask)
        for dim, size in enumerate(shape):
            if full.shape[dim] < size:
                raise MaskFault(f"masks of shape {tuple(local)} do not make up one of {shape}")
            full = full.narrow(dim, 0, size)
        return full

    def _axes_of(self, dim: int, size: int, of_all: int) -> tuple[ParallelAxis, ...]:
        """Find the axes that shard a dim of an activation, which has `size` here and `of_all` on one rank."""
        if dim == self.rows_dim:
            return (self.mesh.dp,)
        outer = (self.mesh.cp,) if dim == 1 - self.rows_dim else ()
        is_sharded = size * math.prod(axis.world_size for axis in outer) < of_all
        return (*outer, self.mesh.tp) if is_sharded else outer


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=0)


def _equal_beginning(a: Tensor, b: Tensor) -> bool:
    """Return whether two masks are equal as far as both reach."""
    length = min(a.numel(), b.numel())
    return length >= _FEWEST and torch.equal(a.flatten()[:length], b.flatten()[:length])
