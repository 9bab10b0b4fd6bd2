"""Who shares an axis with whom, by the definition: rank = ((pp * dp_size + dp) * tp_size) + tp, and so on."""

from __future__ import annotations

import math

__all__ = ["coordinates", "expected_group"]


def coordinates(rank: int, sizes: dict[str, int]) -> dict[str, int]:
    """A rank's place on each axis; the last axis is the fastest."""
    found = {}
    for name, size in reversed(sizes.items()):
        rank, found[name] = divmod(rank, size)
    return found


def expected_group(rank: int, names: tuple[str, ...], sizes: dict[str, int]) -> list[int]:
    """The ranks that differ from `rank` on the axes named only."""
    mine = coordinates(rank, sizes)
    others = [name for name in sizes if name not in names]
    world = range(math.prod(sizes.values()))
    return [r for r in world if all(coordinates(r, sizes)[name] == mine[name] for name in others)]
