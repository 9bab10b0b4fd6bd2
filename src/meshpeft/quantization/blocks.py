"""The blocks of a packed weight, and their layout on the mesh.

Blocks run along the rows of the *full* weight, whatever shards it, so the dequantised weight is the same at every
layout. Where the ranks' columns end at ends of blocks, codes and scales are sharded like the weight. Where a block
reaches from one rank's columns into another's, both need its scale, which is that of all its values: such a layer is
gathered while it is packed, and its scales are replicated over the axis; its codes are sharded all the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import pad

from meshpeft.parallel import FusedParts, LinearLayout, TensorLayout, on_each_rank
from meshpeft.quantization.errors import QuantizationError
from meshpeft.quantization.formats import BLOCK_SIZES, Packed, WeightFormat

__all__ = ["Blocks"]

# Values that are packed at a time: the libraries make several temporary copies of them.
_VALUES_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class Blocks:
    """Blocks of one layer's weight.

    Attributes:
        storage: Format.
        size: Values of a row that share a scale.
        layout: Layout of the layer.
    """

    storage: WeightFormat
    size: int
    layout: LinearLayout

    @property
    def weight(self) -> TensorLayout:
        """Layout of the weight, [.., out, in]."""
        return self.layout.weight()

    @property
    def straddle_ranks(self) -> bool:
        """Whether some block has values on two ranks."""
        fused_parts, columns = self._column_parts(), self.weight.global_shape[-1]
        shards = columns // self.weight.local_shape[-1]
        if fused_parts is None:
            return columns // shards % self.size != 0
        return any(length % self.size for length in fused_parts.chunks(shards))

    def codes(self) -> TensorLayout:
        """Return the layout of the codes [.., out, in * bits / 8], bytes: sharded like the weight."""
        codes = _columns_of(self.weight, self.storage.bits, 8)
        return replace(codes, counts_as=math.prod(self.weight.global_shape))

    def scales(self) -> TensorLayout:
        """Return the layout of the scales [.., out, in / size]: replicated where blocks straddle ranks."""
        weight = self.weight
        if self.straddle_ranks:
            last = len(weight.global_shape) - 1
            if self._column_parts() is not None:
                weight = replace(weight, fused_parts=None, fused_dim=0)
            weight = replace(weight, shards=tuple((dim, axis) for dim, axis in weight.shards if dim != last))
        return replace(_columns_of(weight, 1, self.size), counts_as=0)

    def check(self, name: str) -> None:
        """Check that a weight of these sizes can be packed.

        Raises:
            QuantizationError: Rows do not divide into blocks, or ranks' columns not into bytes.
        """
        columns, local = self.weight.global_shape[-1], self.weight.local_shape[-1]
        if columns % self.size:
            fitting = [size for size in BLOCK_SIZES if columns % size == 0]
            sizes = " or ".join(map(str, fitting))
            advice = f"use block_size={sizes} (--quantize-block-size)" if fitting else "exclude the layer"
            raise QuantizationError(
                f"{name}: {columns} input features do not divide into blocks of {self.size}; {advice}"
            )
        fused_parts = self._column_parts()
        lengths = (local,) if fused_parts is None else fused_parts.chunks(columns // local)
        if any(length * self.storage.bits % 8 for length in lengths):
            raise QuantizationError(
                f"{name}: {columns} input features over {columns // local} ranks leave "
                f"{' and '.join(map(str, lengths))} a rank, and two {self.storage.name} codes share a byte; use "
                "fewer ranks, or exclude the layer"
            )

    @torch.no_grad()
    def pack(self, weight: Tensor, principal: tuple[Tensor, Tensor] | None = None) -> Packed:
        """Pack this rank's local weight, or the remainder of it less a low-rank part.

        A collective over the layer's axis where blocks straddle ranks.

        Values are quantised from float32, so that what is stored does not depend on a wider type. Some rows at a time,
        also where they are gathered: besides weight and result there are only copies of these.

        Args:
            weight: [.., out, in].
            principal: Factors `a` [.., r, in] and `b` [.., out, r], local; weight - b @ a is computed in float64 and
                rounded once, so that no layout's order of sums decides a code.
        """
        codes, scales = self.codes(), self.scales()
        packed = Packed(*_empty(list(codes.local_shape), list(scales.local_shape), weight.device))
        if isinstance(weight, FakeTensor):  # no values, to count what a run holds
            return packed
        for rows in self._some_rows():
            values = weight.detach()[rows]
            if principal is not None:
                a, b = principal
                values = torch.addmm(values.double(), b[rows].double(), a[rows[:-1]].double(), alpha=-1)
            if self.straddle_ranks:
                values = _of_rows(self.weight, values.shape[0]).gather(values)
            its_codes, its_scales = _pack(self.storage, values, self.size)
            if self.straddle_ranks:
                its_codes = _of_rows(codes, values.shape[0]).slice(its_codes)
            packed.codes[rows] = its_codes
            packed.scales[rows] = its_scales
        return packed

    @torch.no_grad()
    def unpack(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """Return the local weight, rounded once from float32."""
        if not self.straddle_ranks:
            return _unpack(self.storage, *packed, self.size, dtype)
        codes = self.codes()
        fused = self._column_parts() is not None
        parts = [
            _unpack_part(self.storage, part, packed.scales, self.size, dtype, start)
            for part, start in zip(
                codes.split_parts(packed.codes) if fused else [packed.codes], self._starts(), strict=True
            )
        ]
        return self.weight.join_parts(parts) if fused else parts[0]

    def _some_rows(self) -> Iterator[tuple[int | slice, ...]]:
        """Yield indices of this rank's weight: some rows of the matrix, or of one expert's, at a time."""
        *experts, rows, _ = self.weight.local_shape
        step = max(1, _VALUES_AT_ONCE // self.weight.global_shape[-1])
        for start in range(0, rows, step):
            some = slice(start, start + step)
            yield from ((expert, some) for expert in range(experts[0])) if experts else [(some,)]

    def _column_parts(self) -> FusedParts | None:
        """Return the canonical parts of the columns (a row-parallel layer's `stride`)."""
        weight = self.weight
        return weight.fused_parts if weight.fused_dim == len(weight.global_shape) - 1 else None

    def _starts(self) -> list[int]:
        """Return the canonical column of the full weight at which each contiguous run of this rank's begins."""
        fused_parts, pieces = self._column_parts(), self.weight.pieces()
        if fused_parts is None:
            return [pieces[0].offset[-1]]
        starts, before = [], 0
        for piece, size in zip(pieces, fused_parts.sizes, strict=True):
            starts.append(before + piece.offset[-1])
            before += size
        return starts


@on_each_rank
def _empty(codes: list[int], scales: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.empty(codes, dtype=torch.uint8, device=device), torch.empty(scales, dtype=torch.float32, device=device)


@on_each_rank
def _pack(storage: WeightFormat, values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    codes, scales = storage.pack(values.float().contiguous(), size)
    return codes, scales


@on_each_rank
def _unpack(storage: WeightFormat, codes: Tensor, scales: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return storage.unpack(Packed(codes, scales), size, _type_of_libraries(dtype)).to(dtype)


@on_each_rank
def _unpack_part(
    storage: WeightFormat, codes: Tensor, scales: Tensor, size: int, dtype: torch.dtype, start: int
) -> Tensor:
    """Unpack columns that begin at `start` of the full rows, whose scales these are: padded to blocks, then cut."""
    length = storage.columns(codes)
    before, after = start % size, -(start + length) % size
    filled = pad(codes, (before * storage.bits // 8, after * storage.bits // 8))
    theirs = scales[..., start // size : (start + length + after) // size].contiguous()
    full = storage.unpack(Packed(filled, theirs), size, _type_of_libraries(dtype))
    return full[..., before : before + length].to(dtype)


def _type_of_libraries(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to unpack in: the libraries have no float64."""
    return dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32


def _of_rows(layout: TensorLayout, rows: int) -> TensorLayout:
    """Return the layout of some rows of a matrix, or of a stack of them: only columns are sharded."""
    last = len(layout.global_shape) - 1
    packed = layout.fused_parts is not None and layout.fused_dim == last
    return replace(
        layout,
        global_shape=(rows, layout.global_shape[-1]),
        shards=tuple((1, axis) for dim, axis in layout.shards if dim == last),
        fused_parts=layout.fused_parts if packed else None,
        fused_dim=1 if packed else 0,
    )


def _columns_of(layout: TensorLayout, numerator: int, denominator: int) -> TensorLayout:
    """Return the layout of a tensor that has numerator / denominator as many columns."""

    def scaled(size: int) -> int:
        return size * numerator // denominator

    *rows, columns = layout.global_shape
    fused_parts = layout.fused_parts
    if fused_parts is not None and layout.fused_dim == len(rows):
        fused_parts = FusedParts(fused_parts.names, tuple(map(scaled, fused_parts.sizes)), fused_parts.blocks)
    return replace(layout, global_shape=(*rows, scaled(columns)), fused_parts=fused_parts, grad_partial=())
