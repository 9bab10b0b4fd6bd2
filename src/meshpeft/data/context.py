"""Which tokens of a row are whose under context parallel: every document is dealt out, so that all have as much to do.

Under a causal mask, late tokens see more keys than early ones. So a document is cut into `2 * size` chunks, and rank r
gets chunk r and chunk `2 * size - 1 - r`, an early and a late one. Every rank gets equally many tokens of a row: what
does not come out even, and padding, goes to whoever has the fewest. All of it follows from the lengths of the documents
and needs no communication.

A rank keeps its tokens in the order of the row. Attention gathers the keys of all ranks and puts them in that order,
too (`Spans.key_order`), so each chunk sees the first keys of its document, up to its own last token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from meshpeft.models.spans import Block, Spans
from meshpeft.parallel import parallel_group_info

__all__ = ["ContextShard"]


class _Chunk(NamedTuple):
    """Places `start` to `end` of a row, of the document that begins at `document`."""

    document: int
    start: int
    end: int


@dataclass(frozen=True)
class ContextShard:
    """One rank's part of every row.

    Attributes:
        rank: This rank's place on the axis; `None` for all tokens, in the order in which ranks have them.
        size: Size of the axis; 1 leaves rows as they are.
        multiple: A part has a multiple of so many tokens: the size of tensor parallel, over which sequence parallel
            shards them further.
    """

    rank: int | None = 0
    size: int = 1
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.size < 1 or self.multiple < 1 or not 0 <= (self.rank or 0) < self.size:
            raise ValueError(f"context-parallel rank {self.rank} of {self.size}: ranks count from 0 to the size less 1")

    @classmethod
    def here(cls) -> ContextShard:
        """Return this process's part, by the mesh."""
        info = parallel_group_info()
        return cls(info.cp.rank, info.cp.world_size, info.tp.world_size)

    def padded(self, width: int) -> int:
        """Return the places of a row of `width` once it is padded so that it divides."""
        step = 1 if self.size == 1 else self.size * self.multiple
        return math.ceil(width / step) * step

    def of_rows(self, rows: Sequence[Sequence[int]], width: int) -> tuple[NDArray[np.int64], Spans]:
        """Find this rank's tokens.

        Args:
            rows: For each row the lengths of its documents, which fill its first places.
            width: Places of a row, a multiple as `padded` gives.

        Returns:
            places: [rows, width / size], the place in its row of each token, increasing; of all ranks, one after the
                other, [rows, width].
            spans: Which keys these tokens see, among those of all ranks.
        """
        blocks: list[Block] = []
        places = np.empty((len(rows), self.size, width // self.size), dtype=np.int64)
        for row, lengths in enumerate(rows):
            for rank, chunks in enumerate(_deal(lengths, width, self.size)):
                places[row, rank] = np.concatenate([np.arange(chunk.start, chunk.end) for chunk in chunks])
                if self.rank in (rank, None):
                    blocks += [
                        Block(chunk.end - chunk.start, row * width + chunk.document, chunk.end - chunk.document)
                        for chunk in chunks
                    ]
        if self.size == 1:
            return places[:, 0], Spans(tuple(blocks))
        of_all = places.reshape(len(rows), width)
        order = np.empty_like(of_all)
        np.put_along_axis(order, of_all, np.arange(len(rows) * width).reshape(len(rows), width), axis=1)
        own = of_all if self.rank is None else places[:, self.rank]
        return own, Spans(tuple(blocks), key_order=tuple(order.reshape(-1).tolist()))


def _deal(lengths: Sequence[int], width: int, ranks: int) -> list[list[_Chunk]]:
    """Return the chunks of a row that each rank gets, in the order of the row."""
    chunks: list[list[_Chunk]] = [[] for _ in range(ranks)]
    held = [0] * ranks
    start = 0
    for length in lengths:
        for rank, chunk in _cut(start, length, held):
            own = chunks[rank]
            held[rank] += chunk.end - chunk.start
            if own and own[-1].document == chunk.document and own[-1].end == chunk.start:
                own[-1] = own[-1]._replace(end=chunk.end)
            else:
                own.append(chunk)
        start += length
    for own, tokens in zip(chunks, held, strict=True):
        missing = width // ranks - tokens
        if missing:  # padding, which sees this rank's own only
            own.append(_Chunk(start, start, start + missing))
            start += missing
    return chunks


def _cut(start: int, length: int, held: Sequence[int]) -> list[tuple[int, _Chunk]]:
    """Cut one document into chunks, each with its rank, given how many tokens every rank has of those before it."""
    ranks = len(held)
    size, rest = divmod(length, 2 * ranks)
    sizes, extra = [size] * (2 * ranks), [0] * ranks
    for _ in range(rest):
        rank = min(range(ranks), key=lambda one: (held[one] + extra[one], extra[one], one))
        sizes[rank if extra[rank] == 0 else 2 * ranks - 1 - rank] += 1
        extra[rank] += 1
    ends = list(accumulate(sizes, initial=start))
    owners = [*range(ranks), *reversed(range(ranks))]
    return [
        (rank, _Chunk(start, *bounds))
        for rank, bounds in zip(owners, pairwise(ends), strict=True)
        if len(set(bounds)) > 1
    ]
