"""The order of the data: which records are held out, which rows documents share, which rows a step trains on.

The seed decides it, and nothing else: no layout, no number of processes.

| what | drawn from | where |
|---|---|---|
| records held out | seed | `split_held_out` |
| order of equally long documents, so which share a row | seed, 1 | `pack_documents` |
| order of the rows in epoch e | seed, 2, e | `RowSampler` |

Every rank has all rows and takes its own of each global batch, a pure function of (seed, step). So each knows, without
communication, the number of targets in the global batch (`GlobalBatchSlice.global_target_tokens`), by which
`training/step.py` divides the loss.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray

from meshpeft.data.context import ContextShard
from meshpeft.data.documents import Document
from meshpeft.data.files import DataError
from meshpeft.data.records import Record
from meshpeft.models.spans import Spans, SpansOfRanks
from meshpeft.parallel.loss import count_targets

__all__ = [
    "IGNORED_LABEL",
    "PADDING_DOCUMENT",
    "GlobalBatchSlice",
    "MicroBatch",
    "PackedRows",
    "RowSampler",
    "eval_batches",
    "pack_documents",
    "seeded_permutation",
    "split_held_out",
]

IGNORED_LABEL = -100
"""Label of a position on which no loss is taken (the `ignore_index` of PyTorch's cross entropy)."""

PADDING_DOCUMENT = -1
"""Document id of padding, which is no document's."""

_FULL_ROWS = ContextShard()

# Independent uses of the run's seed.
_ROWS_STREAM, _STEPS_STREAM = 1, 2


def seeded_permutation(count: int, seed: int, *stream: int) -> NDArray[np.int64]:
    """Draw a permutation of `range(count)` that depends on the arguments alone.

    It must not change with the version of NumPy, or a resumed run would see other data: the legacy
    `RandomState` and `SeedSequence` are the generators whose streams NumPy has frozen (NEP 19).

    Args:
        count: Number of elements.
        seed: Seed of the run, not negative.
        stream: Further non-negative integers that separate independent uses of one seed.
    """
    if seed < 0:
        raise DataError(f"seed: {seed} is negative; use 0 or more.")
    source = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, *stream])))
    return source.permutation(count).astype(np.int64, copy=False)


def split_held_out(
    records: Sequence[Record], fraction: float = 0.05, seed: int = 0
) -> tuple[list[Record], list[Record]]:
    """Set records aside for evaluation.

    Args:
        records: Records; at least two.
        fraction: Part to set aside, between 0 and 1; at least one record goes to each side.
        seed: Seed of the run.

    Returns:
        The training records and the held-out records, each in the order given.

    Raises:
        DataError: The fraction is not between 0 and 1, or there are fewer than two records.
    """
    if not 0.0 < fraction < 1.0:
        raise DataError(f"held-out fraction: {fraction} is not between 0 and 1.")
    count = len(records)
    if count < 2:
        raise DataError(f"number of records: {count} cannot be split into training and held-out data; use 2 or more.")
    held = min(max(1, round(count * fraction)), count - 1)
    is_held = np.zeros(count, dtype=bool)
    is_held[seeded_permutation(count, seed)[:held]] = True
    return (
        [record for record, out in zip(records, is_held, strict=True) if not out],
        [record for record, out in zip(records, is_held, strict=True) if out],
    )


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one forward takes; the tensors are int64 `[micro, width]`.

    Attributes:
        input_ids: Token ids.
        labels: `labels[b, i]` is the token to predict at i, the next one of the same document if that is
            a target, else `IGNORED_LABEL`. Already shifted.
        position_ids: Position in the document; 0 in padding.
        document_ids: 0, 1, … in the order of the row's documents, `PADDING_DOCUMENT` in padding.
            A token may attend to those of its own run of equal ids only.
        spans: The same, on the host, so that attention waits for no device; for a simulation, of every rank.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor
    spans: Spans | SpansOfRanks

    @cached_property
    def target_count(self) -> int:
        """Number of labels of which a loss is taken; under simulation the largest of any rank."""
        return count_targets(self.labels, IGNORED_LABEL)

    def to(self, device: torch.device | str) -> MicroBatch:
        """Copy the micro-batch to another device; `target_count` is known there without waiting for it."""
        moved = MicroBatch.of((tensor.to(device, non_blocking=True) for tensor in self.tensors), self.spans)
        vars(moved)["target_count"] = self.target_count
        return moved

    @classmethod
    def of(cls, tensors: Iterable[torch.Tensor], spans: Spans | SpansOfRanks) -> MicroBatch:
        """Make a micro-batch of its four tensors, in the order of `tensors`."""
        input_ids, labels, position_ids, document_ids = tensors
        return cls(input_ids, labels, position_ids, document_ids, spans)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors, in the order of the attributes."""
        return self.input_ids, self.labels, self.position_ids, self.document_ids


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Documents laid out in rows, stored flat and made into tensors only when asked for.

    Attributes:
        seq_length: Positions per row.
        pad_token_id: Token of the positions that no document fills.
        tokens: `[all tokens]` int32, document after document.
        targets: `[all tokens]` bool (see `Document`).
        document_starts: `[documents + 1]` where each document begins in `tokens`.
        row_documents: `[documents]` document numbers, row after row.
        row_starts: `[rows + 1]` where each row begins in `row_documents`.
        row_tokens: `[rows]` positions filled.
        row_targets: `[rows]` targets of the loss.
    """

    seq_length: int
    pad_token_id: int
    tokens: NDArray[np.int32]
    targets: NDArray[np.bool_]
    document_starts: NDArray[np.int64]
    row_documents: NDArray[np.int64]
    row_starts: NDArray[np.int64]
    row_tokens: NDArray[np.int64]
    row_targets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.row_tokens)

    @cached_property
    def digest(self) -> str:
        """A checksum of everything that training reads."""
        digest = hashlib.sha256(json.dumps([self.seq_length, self.pad_token_id]).encode())
        for name in ("tokens", "targets", "document_starts", "row_documents", "row_starts"):
            digest.update(np.ascontiguousarray(getattr(self, name)).data)
        return digest.hexdigest()

    @property
    def documents(self) -> int:
        """How many documents the rows hold."""
        return len(self.row_documents)

    @property
    def fill(self) -> float:
        """The part of all positions that documents fill, up to 1."""
        return len(self.tokens) / (len(self) * self.seq_length)

    def gather(
        self, rows: NDArray[np.int64], width: int | None = None, context: ContextShard = _FULL_ROWS
    ) -> MicroBatch:
        """Make tensors of some rows.

        Args:
            rows: `[micro]` row numbers; -1 stands for a row of padding.
            width: Positions per row, no fewer than the longest of these rows fills; default `seq_length`.
            context: The tokens of the rows that are taken.
        """
        width = context.padded(self.seq_length if width is None else width)
        out = np.empty((4, len(rows), width), dtype=np.int64)
        out[:] = np.array([self.pad_token_id, IGNORED_LABEL, 0, PADDING_DOCUMENT]).reshape(4, 1, 1)
        lengths: list[list[int]] = []
        for at, row in enumerate(rows):
            column = 0
            lengths.append([])
            documents = self.row_documents[self.row_starts[row] : self.row_starts[row + 1]] if row >= 0 else ()
            for place, number in enumerate(documents):
                start, end = self.document_starts[number : number + 2]
                stop = column + end - start
                tokens, targets = self.tokens[start:end], self.targets[start:end]
                out[0, at, column:stop] = tokens
                out[1, at, column : stop - 1] = np.where(targets[1:], tokens[1:], IGNORED_LABEL)
                out[2, at, column:stop] = np.arange(end - start)
                out[3, at, column:stop] = place
                lengths[-1].append(int(end - start))
                column = stop
        places, spans = context.of_rows(lengths, width)
        return MicroBatch.of(torch.from_numpy(np.take_along_axis(out, places[None], axis=2)), spans)


def pack_documents(
    documents: Sequence[Document],
    seq_length: int,
    *,
    seed: int = 0,
    packing: bool = True,
    pad_token_id: int = 0,
) -> PackedRows:
    """Lay documents into rows of `seq_length` positions, none of them cut.

    Best-fit decreasing (Johnson et al., 1974): from the longest document to the shortest, each goes to the
    fullest row that still holds it. Documents of equal length come in an order drawn from the seed, so that
    neighbours in the file are not neighbours in a row. The rows depend on the documents' order and the seed
    alone.

    Args:
        documents: Documents of 1 to `seq_length` tokens; at least one.
        seq_length: Positions per row.
        seed: The run's seed.
        packing: Put several documents into a row; otherwise each gets its own, in the order given.
        pad_token_id: Token that fills rows, any of the vocabulary; padding is neither attended to nor predicted.

    Raises:
        DataError: No documents, or one that does not fit a row.
    """
    if not documents:
        raise DataError("no training targets: every record was empty or had none within the sequence length.")
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    if lengths.min() < 1 or lengths.max() > seq_length:
        wrong = int(lengths.min() if lengths.min() < 1 else lengths.max())
        raise DataError(f"a document of {wrong} tokens cannot be packed into rows of {seq_length}.")

    if packing:
        row_documents, row_starts = _best_fit_decreasing(lengths, seq_length, seed)
    else:
        row_documents, row_starts = np.arange(len(lengths)), np.arange(len(lengths) + 1)
    document_targets = np.array([document.targets.sum() for document in documents], dtype=np.int64)
    return PackedRows(
        seq_length=seq_length,
        pad_token_id=pad_token_id,
        tokens=np.concatenate([document.tokens for document in documents]),
        targets=np.concatenate([document.targets for document in documents]),
        document_starts=np.concatenate([[0], np.cumsum(lengths)]),
        row_documents=row_documents,
        row_starts=row_starts,
        row_tokens=np.add.reduceat(lengths[row_documents], row_starts[:-1]),
        row_targets=np.add.reduceat(document_targets[row_documents], row_starts[:-1]),
    )


def _best_fit_decreasing(
    lengths: NDArray[np.int64], seq_length: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Compute `row_documents` and `row_starts` of `PackedRows`."""
    shuffled = seeded_permutation(len(lengths), seed, _ROWS_STREAM)
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    # open_rows[c] are the rows with c free positions; bit c of `free` says that there are any. The lowest bit
    # at or above a length is then the fullest row that holds it, found in seq_length / 64 word operations.
    open_rows: list[list[int]] = [[] for _ in range(seq_length + 1)]
    free = 0
    row_of = np.empty(len(lengths), dtype=np.int64)
    rows = 0
    for place, length in enumerate(lengths[order].tolist()):
        fitting = free >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                free ^= 1 << room
        else:
            room, row = seq_length, rows
            rows += 1
        row_of[place] = row
        if room > length:
            open_rows[room - length].append(row)
            free |= 1 << (room - length)
    row_starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=rows))])
    return order[np.argsort(row_of, kind="stable")], row_starts


@dataclass(frozen=True, eq=False)
class GlobalBatchSlice(Sequence[MicroBatch]):
    """One data-parallel rank's micro-batches of a global batch, each made when it is asked for.

    The rows are dealt to the ranks in turn. Where they do not come out even, a rank gets a row of padding,
    which has no targets: every rank runs equally many forwards, of equal shapes.

    Attributes:
        source: All rows of the data set.
        rows: Row numbers of the *global* batch.
        micro_batch_size: Rows of one micro-batch; the last may have fewer.
        dp_rank: This rank's place on the data-parallel axis.
        dp_size: Size of that axis.
        pad_to_longest: Whether the padding that all rows computed at one time have in common is cut.
        context: The tokens of each row that this rank computes.
        global_target_tokens: Targets of the *global* batch, which its loss is divided by; the same on every rank.
        global_tokens: Tokens of the *global* batch, without padding.
    """

    source: PackedRows = field(repr=False)
    rows: NDArray[np.int64]
    micro_batch_size: int
    dp_rank: int
    dp_size: int
    pad_to_longest: bool
    context: ContextShard = _FULL_ROWS
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
        # All ranks together compute a run of consecutive rows at a time, so each can find the longest of them.
        together = self.micro_batch_size * self.dp_size
        start = index % len(self) * together
        run = self.rows[start : start + together]
        width = int(self.source.row_tokens[run].max()) if self.pad_to_longest else self.source.seq_length
        run = np.concatenate([run, np.full(-len(run) % self.dp_size, -1, dtype=np.int64)])
        return self.source.gather(run[self.dp_rank :: self.dp_size], width, self.context)


@dataclass(frozen=True, eq=False, kw_only=True)
class RowSampler:
    """Which rows each step trains on.

    The rows are read in one order after another, epoch e's drawn from (seed, e), without a break: step k
    takes places `k·batch_size` to `(k+1)·batch_size` of that stream. So each epoch has each row exactly
    once; where the batch size does not divide the rows, one step takes the last rows of an epoch and the
    first of the next, and no row is left out or repeated to fill up. The step's number is all the state
    there is: a run resumes exactly by asking for the next step.

    Attributes:
        rows: All rows, the same on every rank.
        batch_size: Rows of the *global* batch.
        micro_batch_size: Rows of one forward on one data-parallel rank.
        dp_rank: This rank's place on the data-parallel axis, 0 to `dp_size - 1`.
        dp_size: Size of that axis.
        seed: The run's seed.
        pad_to_longest: Cut the padding that all rows computed at one time have in common. Worth it where
            rows are mostly padding (`packing=False`); the shapes then change from step to step.

    Raises:
        DataError: A batch or micro-batch size below 1.
    """

    rows: PackedRows
    batch_size: int
    micro_batch_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    seed: int = 0
    pad_to_longest: bool = False
    context: ContextShard = _FULL_ROWS
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
        """Count the steps until the rows are read `epochs` times, rounded up; at least 1."""
        return max(1, math.ceil(epochs * len(self.rows) / self.batch_size))

    def epochs(self, step: int) -> float:
        """Return how many times the rows are read before step `step`."""
        return step * self.batch_size / len(self.rows)

    def global_rows(self, step: int) -> NDArray[np.int64]:
        """Return the `[batch_size]` row numbers of step `step` (from 0), the same on every rank."""
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
        """Return this rank's micro-batches of step `step` (from 0)."""
        return GlobalBatchSlice(
            source=self.rows,
            rows=self.global_rows(step),
            micro_batch_size=self.micro_batch_size,
            dp_rank=self.dp_rank,
            dp_size=self.dp_size,
            pad_to_longest=self.pad_to_longest,
            context=self.context,
        )

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            self._orders.clear()  # steps go forwards: one order at a time is enough
            self._orders[epoch] = seeded_permutation(len(self.rows), self.seed, _STEPS_STREAM, epoch)
        return self._orders[epoch]


def eval_batches(
    rows: PackedRows,
    micro_batch_size: int = 1,
    dp_rank: int = 0,
    dp_size: int = 1,
    *,
    pad_to_longest: bool = True,
    most: int = 0,
    context: ContextShard = _FULL_ROWS,
) -> GlobalBatchSlice:
    """Make one global batch of every row, each once; arguments as for `RowSampler`.

    Args:
        most: Take at most this many rows, evenly spaced: packing has sorted them by the length of their documents.
            0 takes all.
    """
    _check_split(micro_batch_size, dp_rank, dp_size)
    count = min(most, len(rows)) if most else len(rows)
    taken = np.arange(count, dtype=np.int64) * len(rows) // max(1, count)
    return GlobalBatchSlice(rows, taken, micro_batch_size, dp_rank, dp_size, pad_to_longest, context)


def _check_split(micro_batch_size: int, dp_rank: int, dp_size: int) -> None:
    if micro_batch_size < 1:
        raise DataError(f"micro-batch size: {micro_batch_size} rows; use 1 or more.")
    if dp_size < 1 or not 0 <= dp_rank < dp_size:
        raise ValueError(f"data-parallel rank {dp_rank} of {dp_size}: ranks count from 0 to the size less 1.")
