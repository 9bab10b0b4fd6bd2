"""Rows to the batches of each rank.

:class:`RowSampler` says which rows make up the global batch of step k, a pure function of (seed, k), and
which of them a data-parallel rank computes. Every rank knows all rows, so the number of targets in the
global batch, by which its loss is divided, needs no communication.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np
from numpy.typing import NDArray

from meshpeft.data.packing import MicroBatch, PackedRows
from meshpeft.data.records import DataError, seeded_permutation

__all__ = ["GlobalBatchSlice", "RowSampler", "eval_batches"]

_STREAM = 2  # of the run's seed


@dataclass(frozen=True, eq=False)
class GlobalBatchSlice(Sequence[MicroBatch]):
    """One data-parallel rank's micro-batches of a global batch, each made when it is asked for.

    The rows are dealt to the ranks in turn. Where they do not come out even, a rank gets a row of padding,
    which has no targets: every rank runs equally many forwards, of equal shapes.

    Attributes:
        source: all rows of the data set.
        rows: row numbers of the *whole* batch.
        micro_batch_size: rows of one micro-batch; the last may have fewer.
        dp_rank: this rank's place on the data-parallel axis.
        dp_size: size of that axis.
        pad_to_longest: whether the padding that all rows computed at one time have in common is cut.
        global_target_tokens: targets of the *whole* batch, the divisor of its loss; the same on every rank.
        global_tokens: tokens of the *whole* batch, without padding.
    """

    source: PackedRows = field(repr=False)
    rows: NDArray[np.int64]
    micro_batch_size: int
    dp_rank: int
    dp_size: int
    pad_to_longest: bool
    global_target_tokens: int = field(init=False)
    global_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        filled = self.source.row_tokens[self.rows]
        object.__setattr__(self, "global_tokens", int(filled.sum()))
        object.__setattr__(self, "global_target_tokens", int(self.source.row_targets[self.rows].sum()))
        if self.pad_to_longest:  # rows of like length meet in a micro-batch; their order has no meaning
            object.__setattr__(self, "rows", self.rows[np.argsort(-filled, kind="stable")])

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / (self.dp_size * self.micro_batch_size))

    @overload
    def __getitem__(self, index: int) -> MicroBatch: ...
    @overload
    def __getitem__(self, index: slice) -> list[MicroBatch]: ...
    def __getitem__(self, index: int | slice) -> MicroBatch | list[MicroBatch]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"micro-batch {index} of {len(self)}")
        # What all ranks compute at one time is a run of consecutive rows, so that each knows the longest.
        together = self.micro_batch_size * self.dp_size
        start = index % len(self) * together
        run = self.rows[start : start + together]
        width = int(self.source.row_tokens[run].max()) if self.pad_to_longest else self.source.seq_length
        run = np.concatenate([run, np.full(-len(run) % self.dp_size, -1, dtype=np.int64)])
        return self.source.gather(run[self.dp_rank :: self.dp_size], width)


@dataclass(frozen=True, eq=False, kw_only=True)
class RowSampler:
    """Which rows each step trains on.

    The rows are read in one order after another, epoch e's drawn from (seed, e), without a break: step k
    takes places ``k·batch_size`` to ``(k+1)·batch_size`` of that stream. So each epoch has each row exactly
    once; where the batch size does not divide the rows, one step takes the last rows of an epoch and the
    first of the next, and no row is left out or repeated to fill up. The step's number is all the state
    there is: a run resumes exactly by asking for the next step.

    Attributes:
        rows: all rows, the same on every rank.
        batch_size: rows of the *global* batch.
        micro_batch_size: rows of one forward on one data-parallel rank.
        dp_rank: this rank's place on the data-parallel axis, 0 to ``dp_size - 1``.
        dp_size: size of that axis.
        seed: the run's seed.
        pad_to_longest: cut the padding that all rows computed at one time have in common. Worth it where
            rows are mostly padding (``packing=False``); the shapes then change from step to step.

    Raises:
        DataError: a batch or micro-batch size below 1.
    """

    rows: PackedRows
    batch_size: int
    micro_batch_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    seed: int = 0
    pad_to_longest: bool = False
    _orders: dict[int, NDArray[np.int64]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise DataError(f"batch size: {self.batch_size} rows; use 1 or more.")
        _check_split(self.micro_batch_size, self.dp_rank, self.dp_size)

    def __len__(self) -> int:
        return self.steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every row was seen once, rounded up."""
        return self.steps(1)

    def steps(self, epochs: float) -> int:
        """Steps until the rows were read ``epochs`` times, rounded up; at least 1."""
        return max(1, math.ceil(epochs * len(self.rows) / self.batch_size))

    def epochs(self, step: int) -> float:
        """How many times the rows were read before step ``step``."""
        return step * self.batch_size / len(self.rows)

    def global_rows(self, step: int) -> NDArray[np.int64]:
        """``[batch_size]`` row numbers of step ``step`` (from 0); the same on every rank."""
        if step < 0:
            raise ValueError(f"step: {step} is negative; steps count from 0.")
        parts = []
        place, wanted = step * self.batch_size, self.batch_size
        while wanted:
            epoch, start = divmod(place, len(self.rows))
            part = self._order(epoch)[start : start + wanted]
            parts.append(part)
            place, wanted = place + len(part), wanted - len(part)
        return np.concatenate(parts)

    def micro_batches(self, step: int) -> GlobalBatchSlice:
        """This rank's micro-batches of step ``step`` (from 0)."""
        return GlobalBatchSlice(
            source=self.rows,
            rows=self.global_rows(step),
            micro_batch_size=self.micro_batch_size,
            dp_rank=self.dp_rank,
            dp_size=self.dp_size,
            pad_to_longest=self.pad_to_longest,
        )

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            self._orders.clear()  # steps go forwards: one order at a time is enough
            self._orders[epoch] = seeded_permutation(len(self.rows), self.seed, _STREAM, epoch)
        return self._orders[epoch]


def eval_batches(
    rows: PackedRows,
    micro_batch_size: int = 1,
    dp_rank: int = 0,
    dp_size: int = 1,
    *,
    pad_to_longest: bool = True,
    most: int = 0,
) -> GlobalBatchSlice:
    """Every row once, as one global batch (other arguments as for :class:`RowSampler`).

    Args:
        most: take at most this many rows, evenly spaced: packing has sorted them by the length of their documents.
            0 takes all.
    """
    _check_split(micro_batch_size, dp_rank, dp_size)
    count = min(most, len(rows)) if most else len(rows)
    taken = np.arange(count, dtype=np.int64) * len(rows) // max(1, count)
    return GlobalBatchSlice(rows, taken, micro_batch_size, dp_rank, dp_size, pad_to_longest)


def _check_split(micro_batch_size: int, dp_rank: int, dp_size: int) -> None:
    if micro_batch_size < 1:
        raise DataError(f"micro-batch size: {micro_batch_size} rows; use 1 or more.")
    if dp_size < 1 or not 0 <= dp_rank < dp_size:
        raise ValueError(f"data-parallel rank {dp_rank} of {dp_size}: ranks count from 0 to the size less 1.")
