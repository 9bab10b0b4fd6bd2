"""Documents to rows.

:func:`pack_documents` lays documents into rows of equal length, once and before anything is known of the
layout; ``batches.py`` deals the rows out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from meshpeft.data.documents import Document
from meshpeft.data.records import DataError, seeded_permutation

__all__ = ["IGNORED_LABEL", "PADDING_DOCUMENT", "MicroBatch", "PackedRows", "pack_documents"]

IGNORED_LABEL = -100
"""Label of a position on which no loss is taken (the ``ignore_index`` of PyTorch's cross entropy)."""

PADDING_DOCUMENT = -1
"""Document id of padding, which is no document's."""

_STREAM = 1  # of the run's seed


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one forward takes, all int64 ``[micro, width]``.

    Attributes:
        input_ids: token ids.
        labels: ``labels[b, i]`` is the token to predict at i, the next one of the same document if that is
            a target, else :data:`IGNORED_LABEL`. Already shifted.
        position_ids: position in the document; 0 in padding.
        document_ids: 0, 1, … in the order of the row's documents, :data:`PADDING_DOCUMENT` in padding.
            A token may attend to those of equal id only.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch on another device."""
        return MicroBatch(*(getattr(self, part.name).to(device, non_blocking=True) for part in fields(self)))


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Documents laid out in rows, stored flat and made into tensors only when asked for.

    Attributes:
        seq_length: positions per row.
        pad_token_id: token of the positions that no document fills.
        tokens: ``[all tokens]`` int32, document after document.
        targets: ``[all tokens]`` bool (see :class:`Document`).
        document_starts: ``[documents + 1]`` where each document begins in ``tokens``.
        row_documents: ``[documents]`` document numbers, row after row.
        row_starts: ``[rows + 1]`` where each row begins in ``row_documents``.
        row_tokens: ``[rows]`` positions filled.
        row_targets: ``[rows]`` targets of the loss.
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

    def gather(self, rows: NDArray[np.int64], width: int | None = None) -> MicroBatch:
        """Make tensors of some rows.

        Args:
            rows: ``[micro]`` row numbers; -1 stands for a row of padding.
            width: positions per row, no fewer than the longest of these rows fills; default ``seq_length``.
        """
        width = self.seq_length if width is None else width
        out = np.empty((4, len(rows), width), dtype=np.int64)
        out[:] = np.array([self.pad_token_id, IGNORED_LABEL, 0, PADDING_DOCUMENT]).reshape(4, 1, 1)
        for at, row in enumerate(rows):
            if row < 0:
                continue
            column = 0
            documents = self.row_documents[self.row_starts[row] : self.row_starts[row + 1]]
            for place, number in enumerate(documents):
                start, end = self.document_starts[number : number + 2]
                stop = column + end - start
                tokens, targets = self.tokens[start:end], self.targets[start:end]
                out[0, at, column:stop] = tokens
                out[1, at, column : stop - 1] = np.where(targets[1:], tokens[1:], IGNORED_LABEL)
                out[2, at, column:stop] = np.arange(end - start)
                out[3, at, column:stop] = place
                column = stop
        return MicroBatch(*torch.from_numpy(out))


def pack_documents(
    documents: Sequence[Document],
    seq_length: int,
    *,
    seed: int = 0,
    packing: bool = True,
    pad_token_id: int = 0,
) -> PackedRows:
    """Lay documents into rows of ``seq_length`` positions, none of them cut.

    Best-fit decreasing (Johnson et al., 1974): from the longest document to the shortest, each goes to the
    fullest row that still holds it. Documents of equal length come in an order drawn from the seed, so that
    neighbours in the file are not neighbours in a row. The rows depend on the documents' order and the seed
    alone.

    Args:
        documents: each of 1 to ``seq_length`` tokens; at least one.
        seq_length: positions per row.
        seed: the run's seed.
        packing: False gives every document a row of its own, in the order given.
        pad_token_id: any token of the vocabulary; padding is neither attended to nor predicted.

    Raises:
        DataError: no documents, or one that does not fit a row.
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
    """``row_documents`` and ``row_starts`` of :class:`PackedRows`."""
    shuffled = seeded_permutation(len(lengths), seed, _STREAM)
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
