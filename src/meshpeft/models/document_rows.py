"""Packed documents before blocks that mix the tokens of a row: each in a row of its own.

A convolution or a state over the sequence runs on from one document of a packed row into the next, and not every kernel
takes the boundaries. So such a block is called with a row for each document, filled up with zeros behind, which a
causal block does not see: documents up to twice as long as others are one call. What it gives is put back in order.
The documents are those of the forward pass (`documents_are`); with a cache, or a mask of padding, the block is called
as it is.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from meshpeft.models.spans import Spans, SpansOfRanks
from meshpeft.models.transformers_attention import documents_of_call
from meshpeft.parallel import parallel_group_info
from meshpeft.parallel.mesh import on_each_rank

__all__ = ["DocumentRows", "give_document_rows"]


class DocumentRows(nn.Module):
    """Base class that is added to the class of a block of transformers that mixes the tokens of a row."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """hidden_states [batch, seq, hidden] -> what the block gives, with each document computed by itself."""
        theirs: Any = super().forward
        spans = documents_of_call()
        # A cache, or a mask.
        others = [value for value in (*args, *kwargs.values()) if value is not None and not _is_plain(value)]
        lengths = None if spans is None or others else _lengths(spans, hidden_states.shape[0])
        if lengths is None:
            return theirs(hidden_states, *args, **kwargs)
        tokens = hidden_states.flatten(0, 1)
        tokens = torch.cat((tokens, tokens.new_zeros(1, tokens.shape[-1])))  # the last fills rows up
        rank, found = parallel_group_info().world.rank, []
        groups = _groups(lengths)
        for group in groups:
            taken = _places(rank, group, tokens.shape[0] - 1, tokens.device)
            result = theirs(tokens.index_select(0, taken).unflatten(0, (-1, group.width)), *args, **kwargs)
            found.append((result[0] if isinstance(result, tuple) else result).flatten(0, 1))
        order = _order(rank, groups, tokens.shape[0] - 1, tokens.device)
        y = torch.cat(found).index_select(0, order).view(*hidden_states.shape[:2], -1)
        return (y, *(None for _ in result[1:])) if isinstance(result, tuple) else y


@dataclass(frozen=True)
class _Group:
    """Documents of one call.

    Attributes:
        of: Each rank's, as (first token, length); as many on every rank. Of one entry where all ranks have the same.
        width: Length of the longest.
    """

    of: Mapping[int, Sequence[tuple[int, int]]]
    width: int

    def on(self, rank: int) -> Sequence[tuple[int, int]]:
        """List those of a rank."""
        return self.of[rank if rank in self.of else 0]


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str))


def _lengths(spans: Spans | SpansOfRanks, batch: int) -> dict[int, list[int]] | None:
    """Read the documents' lengths of every rank that has other ones; `None` where each row is one, or they are cut."""
    of = dict(spans.of) if isinstance(spans, SpansOfRanks) else {0: spans}
    if any(one.is_reordered or not one.is_square for one in of.values()):
        return None
    lengths = {rank: [block.queries for block in one.blocks] for rank, one in of.items()}
    return None if all(len(own) == batch for own in lengths.values()) else lengths


def _groups(lengths: Mapping[int, Sequence[int]]) -> list[_Group]:
    """Sort documents into groups of those up to twice as long as others.

    Where a rank has fewer documents of these lengths than another, it has empty ones.
    """
    by_size: dict[int, dict[int, list[tuple[int, int]]]] = {}
    for rank, own in lengths.items():
        first = 0
        for length in own:
            group = by_size.setdefault(length.bit_length(), {})
            group.setdefault(rank, []).append((first, length))
            first += length
    found = []
    for _, group in sorted(by_size.items()):
        count = max(map(len, group.values()))
        width = max(length for rows in group.values() for _, length in rows)
        filled = {rank: [*group.get(rank, []), *[(0, 0)] * (count - len(group.get(rank, [])))] for rank in lengths}
        found.append(_Group(filled, width))
    return found


@on_each_rank
def _places(rank: int, group: _Group, zero: int, device: torch.device) -> Tensor:
    """Indices of the tokens of a group's rows, [rows * width]; `zero` behind the end of a document."""
    starts, lengths = torch.tensor(group.on(rank)).unbind(1)
    place = torch.arange(group.width)
    return torch.where(place < lengths[:, None], starts[:, None] + place, zero).flatten().to(device)


@on_each_rank
def _order(rank: int, groups: Sequence[_Group], tokens: int, device: torch.device) -> Tensor:
    """Index of every token, [tokens], among the rows of all groups, one group after the other."""
    order, first = torch.zeros(tokens, dtype=torch.long), 0
    for group in groups:
        for row, (start, length) in enumerate(group.on(rank)):
            order[start : start + length] = torch.arange(length) + first + row * group.width
        first += len(group.on(rank)) * group.width
    return order.to(device)


def give_document_rows(model: nn.Module) -> None:
    """Give the blocks of a model that have a convolution over the sequence their documents in rows, in place."""
    for module in model.modules():
        if any(isinstance(child, nn.Conv1d) for child in module.children()) and not isinstance(module, DocumentRows):
            cls: Any = type(module)
            module.__class__ = _with_rows(cls)


@cache
def _with_rows(cls: type[Any]) -> type[Any]:
    made = types.new_class(cls.__name__, (DocumentRows, cls))
    made.__module__ = cls.__module__
    return made
