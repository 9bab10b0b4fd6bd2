"""How a parameter of an adapter is spread over the tensors of a file, written and read.

A parameter of ours is of a whole layer: of all parts of a fused one, of all experts of a stack. In a file its parts,
and its experts, may be tensors of their own; what they share is then written again for each. peft's form of stacked
experts is two matrices, A [experts * r, in], which has one expert's rows after the other's, and B [out, r * experts],
in whose columns the experts take turns.

Shapes: A [r, in] and B [out, r] of a layer, [experts, r, in] and [experts, out, r] of stacked experts; an adapter that
the experts share has the first. A magnitude is [out], or [experts, out].

A file may hold matrices of a larger rank R than the parameter's r: A's rows, and B's columns, from r on are zeros then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from meshpeft.hub.errors import CheckpointError
from meshpeft.hub.tensor_file import TensorFileReader
from meshpeft.parallel.tensor_layout import TensorLayout

__all__ = ["Matrix", "SeparateA", "SeparateB", "StackedA", "StackedB", "StoredFactor", "StoredMatrices"]

Declaration = tuple[str, tuple[int, ...]]


class StoredFactor:
    """One parameter in a file.

    Attributes:
        layout: of the parameter.
    """

    layout: TensorLayout

    def declared(self) -> list[Declaration]:
        """Key and shape of every tensor."""
        raise NotImplementedError

    def split(self, full: Tensor) -> Iterator[Tensor]:
        """The tensors, in the same order, of the whole parameter in its canonical order."""
        raise NotImplementedError

    def check_copies(self, file: TensorFileReader) -> None:
        """Whether what the parameter holds once is the same wherever the file repeats it.

        Raises:
            CheckpointError: two tensors differ.
        """

    def read(self, file: TensorFileReader) -> Tensor:
        """This rank's slice, in packed order; only its own part of the file is read."""
        raise NotImplementedError


class Matrix(NamedTuple):
    """A tensor of a file.

    Attributes:
        key: its name.
        part: which part of the parameter's packed dim it holds; `None` for all of them.
        expert: which expert it is of; `None` in a layer without experts.
    """

    key: str
    part: int | None = None
    expert: int | None = None


@dataclass(frozen=True)
class StoredMatrices(StoredFactor):
    """A tensor for each part, or for each expert, or for each of both.

    Attributes:
        matrices: in the order in which they are written.
        stacked: the parameter has a matrix for each expert too, in its first dim; otherwise experts share it.
        rank_dim: which dim of a matrix is the rank: -2 of A, -1 of B; `None` of a magnitude.
        rank: R, the rank in the file; `None` for the parameter's own.
    """

    layout: TensorLayout
    matrices: Sequence[Matrix]
    stacked: bool = False
    rank_dim: int | None = None
    rank: int | None = None

    def declared(self) -> list[Declaration]:
        """Key and shape of every tensor."""
        lead = int(self.stacked)
        whole = self._in_file(self.layout.global_shape[lead:])
        parts = [self._in_file(piece.global_shape[lead:]) for piece in self.layout.pieces()]
        return [(matrix.key, whole if matrix.part is None else parts[matrix.part]) for matrix in self.matrices]

    def _in_file(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.rank is None or self.rank_dim is None:
            return shape
        sizes = list(shape)
        sizes[self.rank_dim] = self.rank
        return tuple(sizes)

    def split(self, full: Tensor) -> Iterator[Tensor]:
        """The tensors of the whole parameter."""
        sizes = None if self.layout.fused_parts is None else list(self.layout.fused_parts.sizes)
        parts = (full,) if sizes is None else full.split(sizes, self.layout.fused_dim)
        fused_parts = self.layout.fused_parts
        whole = full if fused_parts is None else fused_parts.fuse(parts, self.layout.fused_dim, 1)
        for matrix in self.matrices:
            values = whole if matrix.part is None else parts[matrix.part]
            values = values[matrix.expert] if self.stacked and matrix.expert is not None else values
            yield values if self.rank_dim is None else _padded(values, self.rank_dim, self.rank)

    def check_copies(self, file: TensorFileReader) -> None:
        """Compare what is repeated."""
        same: dict[tuple[int | None, int | None], list[str]] = {}
        for matrix in self.matrices:
            same.setdefault((matrix.part, matrix.expert if self.stacked else None), []).append(matrix.key)
        for first, *others in same.values():
            expected = file.read(first) if others else None
            for other in others:
                if expected is not None and not torch.equal(expected, file.read(other)):
                    raise CheckpointError(f"{first} and {other} differ, but one parameter holds both")

    def read(self, file: TensorFileReader) -> Tensor:
        """This rank's slice."""
        fused_parts = self.layout.fused_parts
        if (
            fused_parts is not None
            and fused_parts.blocks is not None
            and [matrix.part for matrix in self.matrices] == [None]
        ):
            # Blocks lie one after the other in the file's matrix as they do here.
            (box,) = replace(self.layout, fused_parts=None).pieces()
            return file.read_box(self.matrices[0].key, box.offset, box.shape)
        keys: dict[tuple[int | None, int | None], str] = {}
        for matrix in self.matrices:
            keys.setdefault((matrix.part, matrix.expert if self.stacked else None), matrix.key)
        parts = []
        for number, (piece, start) in enumerate(zip(self.layout.pieces(), _starts(self.layout), strict=True)):
            part = number if (number, 0 if self.stacked else None) in keys else None
            offset = piece.offset if part is not None else _moved(self.layout, piece.offset, start)
            if self.stacked:
                by_expert = [keys[part, expert] for expert in range(self.layout.global_shape[0])]
                parts.append(file.read_stack(by_expert, offset, piece.shape))
            else:
                parts.append(file.read_box(keys[part, None], offset, piece.shape))
        return self.layout.join_parts(parts)


@dataclass(frozen=True)
class StackedA(StoredFactor):
    """A of stacked experts as one tensor [experts * r, in].

    Attributes:
        key: its name.
        experts: their number over all ranks.
        stacked: the parameter is [experts, r, in]; otherwise the experts share [r, in].
        rank: R, the rows that each expert has in the file; `None` for r.
    """

    layout: TensorLayout
    key: str
    experts: int
    stacked: bool
    rank: int | None = None

    def declared(self) -> list[Declaration]:
        """Key and shape of every tensor."""
        *_, rank, features = self.layout.global_shape
        return [(self.key, (self.experts * (self.rank or rank), features))]

    def split(self, full: Tensor) -> Iterator[Tensor]:
        """The tensors of the whole parameter."""
        full = _padded(full, -2, self.rank)
        yield full.expand(self.experts, *full.shape[-2:]).reshape(-1, full.shape[-1])

    def check_copies(self, file: TensorFileReader) -> None:
        """Compare what is repeated."""
        if not self.stacked:
            _check_same(file.read(self.key).view(self.experts, -1), self.key)

    def read(self, file: TensorFileReader) -> Tensor:
        """This rank's slice."""
        (piece,) = self.layout.pieces()
        *lead, rank, features = piece.shape
        first_expert = piece.offset[0] if self.stacked else 0
        each, experts = self.rank or rank, lead[0] if lead else 1
        # Each expert's rows are whole: A is never divided over its rank.
        box = file.read_box(self.key, (first_expert * each, piece.offset[-1]), (experts * each, features))
        return box.view(experts, each, features)[:, :rank].reshape(piece.shape)


@dataclass(frozen=True)
class StackedB(StoredFactor):
    """B of stacked experts as one tensor [out, r * experts]. Attributes as of `StackedA`."""

    layout: TensorLayout
    key: str
    experts: int
    stacked: bool
    rank: int | None = None

    def declared(self) -> list[Declaration]:
        """Key and shape of every tensor."""
        *_, features, rank = self.layout.global_shape
        return [(self.key, (features, (self.rank or rank) * self.experts))]

    def split(self, full: Tensor) -> Iterator[Tensor]:
        """The tensors of the whole parameter."""
        full = _padded(full, -1, self.rank)
        yield full.expand(self.experts, *full.shape[-2:]).permute(1, 2, 0).reshape(full.shape[-2], -1)

    def check_copies(self, file: TensorFileReader) -> None:
        """Compare what is repeated."""
        if not self.stacked:
            columns = file.read(self.key)
            _check_same(columns.view(columns.shape[0], -1, self.experts).permute(2, 0, 1).flatten(1), self.key)

    def read(self, file: TensorFileReader) -> Tensor:
        """This rank's slice."""
        parts = []
        for piece, start in zip(self.layout.pieces(), _starts(self.layout), strict=True):
            *lead, features, rank = piece.shape
            first_expert = piece.offset[0] if self.stacked else 0
            experts = lead[0] if lead else 1
            columns = [
                file.read_box(
                    self.key, (piece.offset[-2] + start, column * self.experts + first_expert), (features, experts)
                )
                for column in range(rank)
            ]
            parts.append(torch.stack(columns, -1).transpose(0, 1).reshape(piece.shape))
        return self.layout.join_parts(parts)


@dataclass(frozen=True)
class SeparateA(StoredFactor):
    """A [experts, sum r, in] of experts whose parts (gate, up) have an A each: one above the other. Only read.

    Attributes:
        parts: for each part, each expert's key.
        ranks: of the parts.
    """

    layout: TensorLayout
    parts: Sequence[Sequence[str]]
    ranks: Sequence[int]

    def declared(self) -> list[Declaration]:
        """Key and shape of every tensor."""
        features = self.layout.global_shape[-1]
        return [(key, (rank, features)) for keys, rank in zip(self.parts, self.ranks, strict=True) for key in keys]

    def read(self, file: TensorFileReader) -> Tensor:
        """This rank's slice."""
        (piece,) = self.layout.pieces()
        experts, _, features = piece.shape
        return torch.cat(
            [
                file.read_stack(keys, piece.offset, (experts, rank, features))
                for keys, rank in zip(self.parts, self.ranks, strict=True)
            ],
            1,
        )


@dataclass(frozen=True)
class SeparateB(StoredFactor):
    """B [experts, out, sum r] of the same: each part's rows have that part's columns, and zeros beside. Only read.

    Attributes:
        factors: what each part is multiplied with, where their adapters' scales differ.
    """

    layout: TensorLayout
    parts: Sequence[Sequence[str]]
    ranks: Sequence[int]
    factors: Sequence[float]

    def declared(self) -> list[Declaration]:
        """Key and shape of every tensor."""
        shapes = [
            (*piece.global_shape[1:-1], rank) for piece, rank in zip(self.layout.pieces(), self.ranks, strict=True)
        ]
        return [(key, shape) for keys, shape in zip(self.parts, shapes, strict=True) for key in keys]

    def read(self, file: TensorFileReader) -> Tensor:
        """This rank's slice."""
        parts, column = [], 0
        for keys, rank, factor, piece in zip(self.parts, self.ranks, self.factors, self.layout.pieces(), strict=True):
            own = file.read_stack(keys, piece.offset, (*piece.shape[:-1], rank))
            own = own if factor == 1 else own * factor
            parts.append(torch.nn.functional.pad(own, (column, sum(self.ranks) - column - rank)))
            column += rank
        return self.layout.join_parts(parts)


def _padded(values: Tensor, dim: int, rank: int | None) -> Tensor:
    """The values, and zeros behind them along `dim` up to `rank`."""
    missing = 0 if rank is None else rank - values.shape[dim]
    return torch.nn.functional.pad(values, (0, 0) * (-dim - 1) + (0, missing)) if missing else values


def _check_same(experts: Tensor, key: str) -> None:
    if not bool((experts == experts[:1]).all()):
        raise CheckpointError(f"{key} differs between the experts, but the model's experts share one adapter")


def _starts(layout: TensorLayout) -> list[int]:
    """Where each part begins in the global tensor."""
    sizes = (0,) if layout.fused_parts is None else layout.fused_parts.sizes
    return [sum(sizes[:number]) for number in range(len(sizes))]


def _moved(layout: TensorLayout, offset: tuple[int, ...], start: int) -> tuple[Any, ...]:
    """An offset in a part as one in the global tensor."""
    return tuple(place + start if dim == layout.fused_dim else place for dim, place in enumerate(offset))
