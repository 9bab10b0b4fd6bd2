"""Causal attention inside documents, in memory of O(tokens) and work of the sum of their squared lengths.

A mask says for each query and key whether one sees the other: S² elements, most of them `False` where rows are packed.
Here the same is said by a list of **blocks**, on the host: so many queries in turn, and the consecutive keys that they
see, aligned at the end:

    query i of n_q sees the first n_k - n_q + i + 1 of the block's n_k keys.

| what | its blocks |
|---|---|
| a document | one, n_q = n_k |
| padding at the end of a row | one, n_q = n_k: it sees itself, so that no softmax is empty |
| a part of a document (a context-parallel rank has two) | one: its queries, and the keys up to its end |
| chunked attention (Llama 4) | one for each chunk, see `Spans.chunked` |

A sliding window is an argument of `attend`: it makes the key ranges shorter, and no block more.

Three kernels stand behind `attend`; each is exact, and the first that does the job is taken (`kernel_for`):

| kernel | where | what it does |
|---|---|---|
| varlen | CUDA, 16 bits, heads of up to 256 channels | one call of `torch.nn.attention.varlen` for all blocks |
| causal | blocks with n_q = n_k, no window shorter than a block | one causal `scaled_dot_product_attention` for each |
| tiled | else: windows, parts of documents, sinks, soft caps, float64 on a GPU | plain products, tile by tile |
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from spmd_types import register_local_autograd_function
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed._local_tensor import LocalTensor
from torch.nn import functional
from torch.nn.attention import varlen

from meshpeft.models.config import ModelError
from meshpeft.parallel import ParallelAxis, R, Shard, convert, parallel_group_info
from meshpeft.parallel.mesh import on_each_rank
from meshpeft.parallel.typing import dims_follow, typed_as

__all__ = [
    "Block",
    "Spans",
    "SpansOfRanks",
    "attend",
    "gather_keys",
    "kernel_for",
    "spans_of_documents",
    "tiles_stand_for",
]

# Scores that the tiled kernel holds at a time, over all heads: what a core's cache holds, or what fills a GPU.
_TILE_SCORES = {"cpu": 1 << 20, "cuda": 1 << 24}
_FEWEST_QUERIES = 16


class Block(NamedTuple):
    """Consecutive queries, and the consecutive keys that the last of them sees.

    Attributes:
        queries: Number of queries, n_q; those that follow the queries of the block before.
        first_key: Index of the first key, which is the first token of a document.
        keys: Number of keys, n_k >= n_q. Query i sees the first n_k - n_q + i + 1 of them.
    """

    queries: int
    first_key: int
    keys: int


@dataclass(frozen=True)
class Spans:
    """Which keys each query of a batch sees, known on the host.

    Queries and keys are counted through the batch, row after row: token t of row b of [batch, seq] has the index
    `b * seq + t`. Keys may be more than the queries, and in several blocks.

    Attributes:
        blocks: Blocks whose queries, one after the other, are all queries of the batch.
        key_order: Under context parallel, the index of each key among the keys as they are gathered, rank after rank;
            `None` where queries and keys are of the same tokens.

    Raises:
        ModelError: A block without queries, or with fewer keys than queries.
    """

    blocks: tuple[Block, ...]
    key_order: tuple[int, ...] | None = None
    _derived: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for block in self.blocks:
            if not 0 < block.queries <= block.keys or block.first_key < 0:
                raise ModelError(f"{block}: expected at least one query, and no fewer keys than queries")

    @classmethod
    def of_lengths(cls, lengths: Sequence[int]) -> Spans:
        """Make the spans of documents of these numbers of tokens, one after the other; none is in two rows."""
        starts = accumulate(lengths, initial=0)
        return cls(tuple(Block(length, start, length) for length, start in zip(lengths, starts, strict=False)))

    @classmethod
    def of_documents(cls, document_ids: Tensor) -> Spans:
        """Make the spans of rows whose documents are known by id. Waits for the device of `document_ids`.

        Args:
            document_ids: [batch, seq]. A document is a *run* of equal ids in a row, as it is for
                `positions_in_documents`: equal ids that are apart are two documents. Padding is a run too.
        """
        ids = document_ids.cpu().numpy()
        is_first = np.ones(ids.shape, dtype=bool)
        is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        starts = np.flatnonzero(is_first)
        return cls.of_lengths(np.diff(starts, append=ids.size).tolist())

    @classmethod
    def of_rows(cls, batch: int, seq: int) -> Spans:
        """Make the spans of rows of [batch, seq] that are one document each."""
        return cls.of_lengths([seq] * batch)

    @cached_property
    def queries(self) -> int:
        """Number of queries, over all blocks."""
        return sum(block.queries for block in self.blocks)

    @cached_property
    def last_key(self) -> int:
        """Number of keys up to the last that any query sees."""
        return max(block.first_key + block.keys for block in self.blocks)

    @cached_property
    def longest(self) -> int:
        """Number of keys of the block that has most."""
        return max(block.keys for block in self.blocks)

    @cached_property
    def is_square(self) -> bool:
        """Whether queries and keys are the same tokens, each in one block."""
        ends = accumulate((block.queries for block in self.blocks), initial=0)
        return all(block == (block.queries, end, block.queries) for block, end in zip(self.blocks, ends, strict=False))

    @property
    def is_of_shards(self) -> bool:
        """Whether the queries are a context-parallel rank's, and the keys have to be gathered."""
        return self.key_order is not None and len(self.key_order) > self.queries

    @property
    def is_reordered(self) -> bool:
        """Whether keys come in another order than that of the batch."""
        return self.key_order is not None

    def in_order(self, gathered: Tensor) -> Tensor:
        """Put what was gathered, [keys, ..] rank after rank, in the order of the batch."""
        if self.key_order is None:
            return gathered
        device = gathered.device
        order = self._once(("order", device), lambda: torch.tensor(self.key_order).to(device, non_blocking=True))
        return gathered.index_select(0, order)

    def joined(self, *others: Spans) -> Spans:
        """Return the spans of these rows and those of others after them."""
        blocks: list[Block] = []
        order: list[int] = []
        keys = 0
        for spans in (self, *others):
            blocks += [block._replace(first_key=keys + block.first_key) for block in spans.blocks]
            order += [keys + key for key in spans.key_order or range(spans.last_key)]
            keys = len(order)
        return Spans(tuple(blocks), None if self.key_order is None else tuple(order))

    def padded(self, batch: int, padding: int) -> Spans:
        """Return the spans of the same rows with `padding` tokens more at the end of each, which see one another.

        Raises:
            ModelError: These are not the spans of whole rows.
        """
        if padding == 0:
            return self
        width, rest = divmod(self.queries, batch)
        lengths: list[int] = []
        taken = 0
        for block in self.blocks:
            lengths.append(block.queries)
            taken += block.queries
            if taken % width == 0:
                lengths.append(padding)
        if rest or self.is_of_shards or not self.is_square or sum(lengths) != self.queries + batch * padding:
            raise ModelError(f"these spans are not those of {batch} rows of whole documents; pad the rows first")
        return Spans.of_lengths(lengths)

    def chunked(self, size: int) -> Spans:
        """Return the spans of chunked attention (Llama 4): a query sees the keys of its own chunk of the document only.

        Args:
            size: Tokens of a chunk; chunks are counted from the first token of each document.
        """
        return self._once(("chunked", size), lambda: Spans(tuple(self._chunks(size)), self.key_order))

    def _chunks(self, size: int) -> Iterator[Block]:
        for block in self.blocks:
            start = block.keys - block.queries
            while start < block.keys:
                chunk = start - start % size
                end = min(chunk + size, block.keys)
                yield Block(end - start, block.first_key + chunk, end - chunk)
                start = end

    def passes(self, window: int | None) -> tuple[_Pass, ...]:
        """Group the blocks into passes, in each of which no key is in two blocks; ordinary documents need one.

        Args:
            window: Tokens that a query looks back, itself included; `None` for all.
        """
        return self._once(("passes", window), lambda: tuple(self._passes(window)))

    def _passes(self, window: int | None) -> Iterator[_Pass]:
        members: list[list[tuple[int, int, int]]] = []  # for each pass: block, first and last key
        for number, block in enumerate(self.blocks):
            last = block.first_key + block.keys
            first = last - int(min(block.keys, block.queries + _before(window)))
            fitting = next((one for one in members if one[-1][2] <= first), None)
            if fitting is None:
                members.append([(number, first, last)])
            else:
                fitting.append((number, first, last))
        for found in members:
            queries = [self.blocks[number].queries for number, _, _ in found]
            keys = [last - first for _, first, last in found]
            pieces: list[int] = []  # a gap that no block of this pass sees, keys of a block, a gap, ..
            for _, first, last in found:
                pieces += [first - sum(pieces), last - first]
            yield _Pass(tuple(number for number, _, _ in found), tuple(queries), tuple(keys), tuple(pieces))

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]


@dataclass(frozen=True)
class SpansOfRanks:
    """The spans of every rank of a simulation whose ranks hold different documents.

    Attributes:
        of: Rank in the world -> its spans.
    """

    of: Mapping[int, Spans]

    @property
    def is_of_shards(self) -> bool:
        """See `Spans.is_of_shards`; the same on all ranks."""
        return any(spans.is_of_shards for spans in self.of.values())

    @property
    def is_reordered(self) -> bool:
        """See `Spans.is_reordered`."""
        return any(spans.is_reordered for spans in self.of.values())

    def padded(self, batch: int, padding: int) -> SpansOfRanks:
        """See `Spans.padded`."""
        return SpansOfRanks({rank: spans.padded(batch, padding) for rank, spans in self.of.items()})

    def chunked(self, size: int) -> SpansOfRanks:
        """See `Spans.chunked`."""
        return SpansOfRanks({rank: spans.chunked(size) for rank, spans in self.of.items()})


def spans_of_documents(document_ids: Tensor) -> Spans | SpansOfRanks:
    """Make the spans of rows whose documents are known by id, see `Spans.of_documents`; also of simulated ranks."""
    if not isinstance(document_ids, LocalTensor):
        return Spans.of_documents(document_ids)
    of = {rank: Spans.of_documents(ids) for rank, ids in document_ids._local_tensors.items()}
    first = next(iter(of.values()))
    return first if all(spans == first for spans in of.values()) else SpansOfRanks(of)


@dataclass(frozen=True)
class _Pass:
    """One call of the varlen kernel: some blocks, none of whose keys is in two of them.

    Attributes:
        blocks: Their numbers.
        queries, keys: How many each has; keys without those that are out of a window.
        pieces: Cuts the keys of the batch: a gap, the keys of the first block, a gap, ..; the rest is a gap too.
    """

    blocks: tuple[int, ...]
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    pieces: tuple[int, ...]
    _bounds: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    def bounds(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`cu_seqlens` of queries and keys, int32 [blocks + 1]; made once for all layers, without a wait."""
        if device not in self._bounds:
            queries, keys = (
                torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
                for lengths in (self.queries, self.keys)
            )
            self._bounds[device] = queries, keys
        return self._bounds[device]


def _before(window: int | None) -> float:
    """Keys before its own that a query sees at most."""
    return math.inf if window is None else window - 1


def kernel_for(
    device: torch.device,
    dtype: torch.dtype,
    head_dims: tuple[int, int],
    *,
    whole: bool = True,
    scores_only: bool = True,
) -> Literal["varlen", "causal", "tiled"]:
    """Choose the kernel of `attend`.

    Args:
        device, dtype: Those of the queries.
        head_dims: Channels of a head of the queries and keys, and of the values.
        whole: Whether all blocks are whole documents, and no window is shorter than one.
        scores_only: Whether the softmax is that of the scores, without a soft cap or sinks.
    """
    if not scores_only or head_dims[0] != head_dims[1]:
        return "tiled"
    if device.type in ("cpu", "meta"):
        return "causal" if whole else "tiled"
    if device.type != "cuda" or head_dims[0] % 8:
        return "tiled"
    is_short = dtype in (torch.float16, torch.bfloat16)
    # FlashAttention 2 begins with Ampere. Elsewhere the memory-efficient kernel does it, in up to 32 bits.
    if is_short and head_dims[0] <= 256 and torch.cuda.get_device_capability(device) >= (8, 0):
        return "varlen"
    return "causal" if whole and (is_short or dtype == torch.float32) else "tiled"


def gather_keys(keys: Tensor, values: Tensor, axis: ParallelAxis) -> tuple[Tensor, Tensor]:
    """Gather what attention meets of all tokens of a row, in one collective: Shard(0) -> R; backward P -> Shard(0).

    Args:
        keys, values: [own seq, batch, groups / tp, ..].
        axis: Context parallel.

    Returns:
        [seq, batch, groups / tp, ..], each rank's tokens after those of the rank before (`Spans.key_order`).
    """
    gathered = convert(torch.cat((keys, values), -1), Shard(0), R, axis)
    return gathered[..., : keys.shape[-1]], gathered[..., keys.shape[-1] :]


# The checker follows neither the kernels nor the cut into documents.
@typed_as(lambda queries, keys, values, spans, **options: dims_follow(queries, (0, 1, 2)))
def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    spans: Spans | SpansOfRanks,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Apply causal attention inside the documents of packed rows, head by head.

    Args:
        queries: [seq, batch, heads / tp, head_dim], `Shard(2)` over tensor parallel.
        keys: [key seq, batch, groups / tp, head_dim], `Shard(2)`, gathered over context parallel; group g serves heads
            `g * heads / groups` and those after it. They are never repeated where the kernel can do without.
        values: [key seq, batch, groups / tp, value_dim], `Shard(2)`.
        spans: Which keys each query sees.
        window: Tokens that a query looks back, itself included; `None` for all.
        scale: Factor of the products; 1 / sqrt(head_dim) by default.
        softcap: Scores are `softcap * tanh(score / softcap)` (Gemma 2); `None` for none.
        sinks: [heads / tp], for each head a score in the softmax whose value is zero (gpt-oss); `None` for none.

    Returns:
        [seq, batch, heads / tp * value_dim], `Shard(2)`, in the type of the queries.

    Raises:
        ModelError: The spans are not those of these queries and keys.
    """
    seq, batch = queries.shape[:2]
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    # Row after row: for one row, views.
    q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (queries, keys, values))
    if isinstance(spans, SpansOfRanks):
        rank = parallel_group_info().world.rank
        out = _OnEachRank.apply(q, k, v, sinks, rank, spans, (window, scale, softcap))
    else:
        out = _attend(q, k, v, sinks, spans, (window, scale, softcap))
    return out.unflatten(0, (batch, seq)).transpose(0, 1).flatten(2)


_Options = tuple[int | None, float, float | None]  # window, scale, softcap


def _attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, spans: Spans, options: _Options) -> Tensor:
    """q [queries, heads, head_dim], k [keys, groups, head_dim], v [keys, groups, value_dim] -> [queries, heads, ..]."""
    window, scale, softcap = options
    k, v = spans.in_order(k), spans.in_order(v)
    if spans.queries != q.shape[0] or spans.last_key > k.shape[0]:
        raise ModelError(
            f"spans of {spans.queries} queries over {spans.last_key} keys, for {q.shape[0]} queries and {k.shape[0]} "
            "keys; make them from the documents of this batch"
        )
    whole = spans.is_square and k.shape[0] == q.shape[0] and (window is None or spans.longest <= window)
    kernel = kernel_for(
        q.device,
        q.dtype,
        (q.shape[-1], v.shape[-1]),
        whole=whole,
        scores_only=softcap is None and sinks is None,
    )
    if kernel == "varlen":
        return _varlen(q, k, v, spans, window, scale)
    if kernel == "causal":
        return _causal(q, k, v, [block.queries for block in spans.blocks], scale)
    out: Tensor = _Tiled.apply(q, k, v, sinks, spans, options)
    return out


def _varlen(q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: int | None, scale: float) -> Tensor:
    """All blocks in one call, or in as many as there are passes; see `_attend` for the shapes."""
    passes = spans.passes(window)
    parts_of_q = q.split([block.queries for block in spans.blocks]) if len(passes) > 1 else ()
    outs: dict[int, Tensor] = {}
    for one in passes:
        own_q = torch.cat([parts_of_q[number] for number in one.blocks]) if parts_of_q else q
        own_k, own_v = (_used(x, one.pieces) for x in (k, v))
        q_bounds, k_bounds = one.bounds(q.device)
        out = varlen.varlen_attn(
            own_q,
            own_k,
            own_v,
            q_bounds,
            k_bounds,
            max(one.queries),
            max(one.keys),
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),  # (-1, 0) is causal; both are aligned at the end
            enable_gqa=q.shape[1] != k.shape[1],
        )
        if len(passes) == 1:
            return out  # type: ignore[return-value]
        outs.update(zip(one.blocks, out.split(list(one.queries)), strict=True))  # type: ignore[union-attr]
    return torch.cat([outs[number] for number in range(len(spans.blocks))])


def _used(x: Tensor, pieces: tuple[int, ...]) -> Tensor:
    """Take the keys of a pass: every second piece. A split's backward pass is one `cat`, a slice's fills zeros."""
    if not any(pieces[0::2]) and sum(pieces) == x.shape[0]:
        return x
    return torch.cat(x.split([*pieces, x.shape[0] - sum(pieces)])[1:-1:2])


def _causal(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
    """One causal call for each document; see `_attend` for the shapes."""
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1 and q.is_cuda:
        # No memory-efficient CUDA kernel shares keys; the fallback would hold the scores of a document.
        k, v, repeats = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1), 1
    # The backward pass of a split is one `cat`; that of a slice fills a tensor of the whole batch, for every document.
    of_documents = zip(*(x[None].transpose(1, 2).split(lengths, 2) for x in (q, k, v)), strict=True)
    outs = [
        functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=repeats > 1)
        for q, k, v in of_documents
    ]
    return torch.cat(outs, 2)[0].transpose(0, 1)


@register_local_autograd_function
class _Tiled(Function):
    """Attention in plain products, some queries at a time; the backward pass makes the scores again.

    Kept for it are q, k, v, out and the logarithm of each softmax's sum, `lse` [queries, heads].
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, spans: Spans, options: _Options
    ) -> Tensor:
        out, lse = _tiled_forward(q, k, v, sinks, spans, options)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.spans, ctx.options = spans, options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        dq, dk, dv, dsinks = _tiled_backward(q, k, v, sinks, out, lse, grads[0], ctx.spans, ctx.options)
        return dq, dk, dv, dsinks if ctx.needs_input_grad[3] else None, None, None


class _Tile(NamedTuple):
    """Queries [q_start, q_end), and the keys that any of them sees."""

    q_start: int
    q_end: int
    k_start: int
    k_end: int
    offset: int  # query q_start + i is at the place of key k_start + offset + i

    def hidden(self, window: int | None, device: torch.device) -> Tensor:
        """Bool [queries, keys], `True` where a query does not see a key."""
        keys = torch.arange(self.k_end - self.k_start, device=device)
        own = torch.arange(self.q_end - self.q_start, device=device)[:, None] + self.offset
        later = keys > own
        return later if window is None else later | (keys <= own - window)


def _tiles(spans: Spans, most: float, window: int | None) -> Iterator[_Tile]:
    """Cut every block into tiles of queries, each of `most` scores a head."""
    before, q_end = _before(window), 0
    for block in spans.blocks:
        start, q_end = q_end, q_end + block.queries
        shift = block.first_key + block.keys - q_end  # key at the place of a query, less the query
        # A tile of n queries sees n + before keys, or all: n (n + before) = most, or n keys = most.
        banded = 0.0 if before == math.inf else (math.hypot(before, 2 * most**0.5) - before) / 2
        size = int(max(_FEWEST_QUERIES, most / block.keys, banded))
        for q_start in range(start, q_end, size):
            stop = min(q_start + size, q_end)
            k_start = int(max(block.first_key, q_start + shift - before))
            yield _Tile(q_start, stop, k_start, stop + shift, q_start + shift - k_start)


# Of operations on tiles without values: how many each stands for.
_standing_for: ContextVar[float | None] = ContextVar("standing_for", default=None)


def tiles_stand_for() -> float | None:
    """Return for how many operations on a tile the present one stands, if it has no values; `None` outside of tiles."""
    return _standing_for.get()


def _tiles_of(q: Tensor, k: Tensor, spans: Spans, window: int | None) -> Iterator[_Tile]:
    """Yield the tiles of these queries; of queries without values the one that takes most memory, for all.

    That one comes twice, for a tile is made while some of the one before is still held.
    """
    tiles = _tiles(spans, _TILE_SCORES.get(q.device.type, _TILE_SCORES["cuda"]) / q.shape[1], window)
    if not isinstance(q, FakeTensor):
        yield from tiles
        return
    heads, a_key = q.shape[1], k.shape[1] * k.shape[2]
    sizes = [(tile.q_end - tile.q_start, tile.k_end - tile.k_start, tile) for tile in tiles]
    # Its scores, and its copies of keys.
    queries, keys, largest = max(sizes, key=lambda size: size[1] * (size[0] * heads + a_key))
    scores = sum(queries * keys for queries, keys, _ in sizes)
    token = _standing_for.set(scores / (2 * queries * keys))
    try:
        yield from (largest, largest)
    finally:
        _standing_for.reset(token)


def _by_group(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """[tokens, heads, dim] -> [groups, heads / groups * tokens, dim]: the heads of a group as more tokens."""
    return x.to(dtype).unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _by_head(x: Tensor, tokens: int) -> Tensor:
    """The inverse of `_by_group`: [groups, heads / groups * tokens, ..] -> [tokens, heads, ..]."""
    return x.unflatten(1, (-1, tokens)).movedim(2, 0).flatten(1, 2)


def _scores(q: Tensor, k: Tensor, hidden: Tensor, softcap: float | None) -> Tensor:
    """q [groups, repeats * queries, dim], k [groups, keys, dim] -> scores [groups, repeats * queries, keys]."""
    scores = torch.bmm(q, k.mT)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    scores.unflatten(1, (-1, hidden.shape[0])).masked_fill_(hidden, -torch.inf)
    return scores


@on_each_rank
def _tiled_forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, spans: Spans, options: _Options
) -> tuple[Tensor, Tensor]:
    """Return out, in the type of q, and lse [queries, heads] in float32 or wider."""
    window, scale, softcap = options
    groups, wide = k.shape[1], torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    lse = q.new_empty(q.shape[:2], dtype=wide)
    for tile in _tiles_of(q, k, spans, window):
        size = tile.q_end - tile.q_start
        own_q = _by_group(q[tile.q_start : tile.q_end], groups, wide) * scale
        own_k, own_v = (_by_group(x[tile.k_start : tile.k_end], groups, wide) for x in (k, v))
        scores = _scores(own_q, own_k, tile.hidden(window, q.device), softcap)
        sums = _by_head(scores.logsumexp(-1), size)
        if sinks is not None:
            sums = torch.logaddexp(sums, sinks.to(wide))
        lse[tile.q_start : tile.q_end] = sums
        weights = scores.sub_(_by_group(sums[..., None], groups, wide)).exp_()
        out[tile.q_start : tile.q_end] = _by_head(torch.bmm(weights, own_v), size)
    return out, lse


@on_each_rank
def _tiled_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    spans: Spans,
    options: _Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, and of sinks (zero without any).

    With P the softmax, D = dout . out and dP = dout vᵀ: dv = Pᵀ dout and the gradient of the scores is P (dP - D)
    (FlashAttention-2, arXiv 2307.08691). P and `out` are those after the sinks, whose values are zero: the gradient
    of a sink's score is the sum of -P D.
    """
    window, scale, softcap = options
    groups, wide = k.shape[1], lse.dtype
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    total = (dout.to(wide) * out.to(wide)).sum(-1)  # D, [queries, heads]
    for tile in _tiles_of(q, k, spans, window):
        size = tile.q_end - tile.q_start
        rows, columns = slice(tile.q_start, tile.q_end), slice(tile.k_start, tile.k_end)
        own_q, own_dout = (_by_group(x[rows], groups, wide) for x in (q, dout))
        own_q = own_q * scale
        own_k, own_v = (_by_group(x[columns], groups, wide) for x in (k, v))
        own_lse, own_total = (_by_group(x[rows, :, None], groups, wide) for x in (lse, total))
        scores = _scores(own_q, own_k, tile.hidden(window, q.device), softcap)
        weights = (scores - own_lse).exp_()
        dv[columns] += torch.bmm(weights.mT, own_dout).transpose(0, 1)
        dscores = torch.bmm(own_dout, own_v.mT).sub_(own_total).mul_(weights)
        if softcap is not None:
            # Where a score is hidden, the weight is zero and the slope is not a number.
            slope = 1 - (scores / softcap).square_()
            dscores.mul_(slope.masked_fill_(scores == -torch.inf, 0))
        dq[rows] = _by_head(torch.bmm(dscores, own_k).mul_(scale), size)
        dk[columns] += torch.bmm(dscores.mT, own_q).transpose(0, 1)
    dsinks = total.new_zeros(0) if sinks is None else -((sinks.to(wide) - lse).exp() * total).sum(0).to(sinks.dtype)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dsinks


class _OnEachRank(Function):
    """`_attend` once for every simulated rank, each with its own spans; the backward pass computes it again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        rank: int,
        spans: SpansOfRanks,
        options: _Options,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, sinks)
        ctx.rank, ctx.spans, ctx.options = rank, spans, options
        return _forward_on_rank(q, k, v, sinks, rank, spans, options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        q, k, v, sinks = ctx.saved_tensors
        dq, dk, dv, dsinks = _backward_on_rank(q, k, v, sinks, grads[0], ctx.rank, ctx.spans, ctx.options)
        return dq, dk, dv, dsinks if ctx.needs_input_grad[3] else None, None, None, None


@on_each_rank
def _forward_on_rank(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, rank: int, spans: SpansOfRanks, options: _Options
) -> Tensor:
    return _attend(q, k, v, sinks, spans.of[rank], options)


@on_each_rank
def _backward_on_rank(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    dout: Tensor,
    rank: int,
    spans: SpansOfRanks,
    options: _Options,
) -> tuple[Tensor, ...]:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    sinks = None if sinks is None else sinks.detach().requires_grad_()
    with torch.enable_grad():
        out = _attend(q, k, v, sinks, spans.of[rank], options)
    if sinks is None:
        return *torch.autograd.grad(out, (q, k, v), dout), dout.new_zeros(0)
    return torch.autograd.grad(out, (q, k, v, sinks), dout)
