"""Where the values of a tensor are: fused parts, slicing, gathering, and the boxes that a rank holds."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from itertools import accumulate

import pytest
import torch
from helpers.simulate import rank_values, simulate, standing_at, the_same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from meshpeft.parallel import (
    ColumnParallelLinear,
    FusedParts,
    GroupedColumnParallelLinear,
    ParallelAxis,
    ParallelError,
    ParallelGroupInfo,
    RowParallelLinear,
    TensorLayout,
    VocabParallelEmbedding,
    init_parallelism,
    layout_of_tensor,
    set_layout,
)


def rows_of_shard(sizes: Sequence[int], blocks: int | None, shards: int, shard: int) -> list[int]:
    """Which rows of the canonical tensor a shard holds, in its order: the definition, written out."""
    starts = [0, *accumulate(sizes)]
    total = shards if blocks is None else blocks
    rows = []
    for block in range(shard * total // shards, (shard + 1) * total // shards):
        for start, size in zip(starts, sizes, strict=False):
            chunk = size // total
            rows += range(start + block * chunk, start + (block + 1) * chunk)
    return rows


@st.composite
def fused_parts(draw: st.DrawFn) -> tuple[FusedParts, int]:
    """Parts of unequal sizes: several query heads for a key head, keys wider than values."""
    shards = draw(st.sampled_from((1, 2, 4)))
    per_shard = draw(st.one_of(st.none(), st.integers(1, 3)))
    blocks = None if per_shard is None else per_shard * shards
    chunks = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    sizes = tuple(chunk * (blocks or shards) for chunk in chunks)
    return FusedParts(tuple("qkvw"[: len(sizes)]), sizes, blocks), shards


@given(fused_parts(), st.integers(-2, 1))
@settings(deadline=None, max_examples=60)
def test_packed_order_and_back(case: tuple[FusedParts, int], dim: int) -> None:
    fused_parts, shards = case
    canonical = torch.arange(float(sum(fused_parts.sizes)))
    for shard in range(shards):
        values = canonical[rows_of_shard(fused_parts.sizes, fused_parts.blocks, shards, shard)]
        local = values.expand(3, -1).clone() if dim in (1, -1) else values.unsqueeze(1).expand(-1, 3).clone()
        parts = fused_parts.split(local.requires_grad_(), dim, shards)
        for part, whole in zip(parts, canonical.split(fused_parts.sizes), strict=True):
            line = part.select(0 if dim in (1, -1) else 1, 0)
            assert torch.equal(line, whole.chunk(shards)[shard])
        packed = fused_parts.fuse(parts, dim, shards)
        assert torch.equal(packed, local)
        weights = torch.randn_like(local)
        (grad,) = torch.autograd.grad((packed * weights).sum(), local)
        assert torch.equal(grad, weights)


@pytest.mark.parametrize(
    ("build", "message"),
    (
        (lambda: FusedParts(("q", "k"), (4,)), "2 names for 1 sizes"),
        (lambda: FusedParts((), ()), "0 names"),
        (lambda: FusedParts(("q", "k"), (6, 4), blocks=3), r"parts of sizes \(6, 4\) do not divide into 3 blocks"),
        (lambda: FusedParts(("q", "k"), (6, 3), blocks=3).chunks(2), "3 blocks do not divide over 2 shards"),
        (lambda: FusedParts(("gate", "up"), (6, 5)).chunks(2), "part 'up' of size 5 does not divide over 2 shards"),
    ),
)
def test_fused_parts_that_do_not_fit(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ParallelError, match=message):
        build()


QKV = FusedParts(("q", "k", "v"), (16, 8, 8), blocks=4)
GATE_UP = FusedParts(("gate", "up"), (8, 8))
# A layout's global shape, its divided dims, and its fused parts (with the fused dim).
LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[ParallelGroupInfo], tuple], FusedParts | None, int]] = {
    "replicated": ((3, 5), lambda info: (), None, 0),
    "replicated, packed": ((32, 3), lambda info: (), QKV, 0),
    "rows": ((8, 3), lambda info: ((0, info.tp),), None, 0),
    "columns": ((3, 8), lambda info: ((1, info.tp),), None, 0),
    "qkv": ((32, 3), lambda info: ((0, info.tp),), QKV, 0),
    "gate and up": ((16,), lambda info: ((0, info.tp),), GATE_UP, 0),
    "packed columns": ((3, 16), lambda info: ((1, info.tp),), GATE_UP, 1),
    "experts": ((4, 16, 3), lambda info: ((0, info.ep), (1, info.etp)), GATE_UP, 1),
    "expert rows": ((4, 3, 8), lambda info: ((0, info.ep), (2, info.etp)), None, 0),
    "one dim over two axes": ((8, 3), lambda info: ((0, info.ep), (0, info.etp)), None, 0),
}
MESHES = [{"tp": 2, "dp": 2, "ep": 2, "etp": 2}, {"tp": 4, "dp": 2, "ep": 2, "etp": 2}, {"tp": 4}]


def layout_of(name: str, info: ParallelGroupInfo) -> TensorLayout:
    shape, shards, fused_parts, fused_dim = LAYOUTS[name]
    return TensorLayout(shape, shards(info), fused_parts, fused_dim)


def numbered(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_slices_gather_to_the_whole(name: str, mesh: dict[str, int]) -> None:
    full = numbered(LAYOUTS[name][0])
    with simulate(**mesh) as info:
        layout = layout_of(name, info)
        local = layout.slice(full)
        assert all(tuple(value.shape) == layout.local_shape for value in rank_values(local))
        joined = layout.join_parts(layout.split_parts(local))
        assert all(torch.equal(*pair) for pair in zip(rank_values(joined), rank_values(local), strict=True))
        assert torch.equal(the_same(layout.gather(local)), full)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_pieces_of_all_ranks_cover_the_whole_once(name: str, mesh: dict[str, int]) -> None:
    """As often as ranks hold copies, exactly; and each piece names the values that the rank has."""
    world = mesh["tp"] * mesh.get("dp", 1)
    shape, _, fused_parts, fused_dim = LAYOUTS[name]
    full = numbered(shape)
    parts = [full] if fused_parts is None else list(full.split(fused_parts.sizes, fused_dim))
    held = [torch.zeros(part.shape, dtype=torch.int64) for part in parts]
    replicas = world
    for rank in range(world):
        with standing_at(rank, world):
            info = init_parallelism(mesh["tp"], 1, mesh.get("ep", 1), mesh.get("etp"))
            layout = layout_of(name, info)
            local = layout.split_parts(layout.slice(full))
            pieces = layout.pieces()
            assert [piece.part for piece in pieces] == ([None] if fused_parts is None else list(fused_parts.names))
            for part, count, piece, values in zip(parts, held, pieces, local, strict=True):
                box = tuple(slice(start, start + size) for start, size in zip(piece.offset, piece.shape, strict=True))
                assert piece.global_shape == tuple(part.shape)
                assert torch.equal(part[box], values)
                count[box] += 1
            replicas = world
            for axis in layout.shard_axes:
                replicas //= axis.world_size
    assert all(bool((count == replicas).all()) for count in held)


def test_shapes_that_do_not_fit_are_named() -> None:
    tp = ParallelAxis("tp", world_size=4)
    with pytest.raises(ParallelError, match=r"dim 0 of a tensor of shape \(6, 4\) cannot be split over tp=4; use a"):
        TensorLayout((6, 4), ((0, tp),))
    with pytest.raises(ParallelError, match=r"parts of sizes \(8, 8\) do not add up to dim 0 of shape \(12, 4\)"):
        TensorLayout((12, 4), fused_parts=GATE_UP)
    with pytest.raises(ParallelError, match="4 blocks do not divide over 8 shards"):
        TensorLayout((32, 4), ((0, ParallelAxis("tp", world_size=8)),), fused_parts=QKV)
    layout = TensorLayout((8, 4), ((0, tp),))
    with pytest.raises(ParallelError, match=r"expected a full tensor of shape \(8, 4\), got \(2, 4\)"):
        layout.slice(torch.zeros(2, 4))
    with pytest.raises(ParallelError, match=r"expected a local tensor of shape \(2, 4\), got \(8, 4\)"):
        layout.gather(torch.zeros(8, 4))
    with pytest.raises(ParallelError, match=r"a tensor of shape \(3, 4\) cannot have local shape \(2, 4\)"):
        set_layout(nn.Parameter(torch.zeros(3, 4)), layout)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "column": lambda: ColumnParallelLinear(4, 8),
    "row": lambda: RowParallelLinear(8, 4),
    "embedding": lambda: VocabParallelEmbedding(8, 4),
    "experts": lambda: GroupedColumnParallelLinear(2, 4, 8),
}
COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "deepcopy of a parent": lambda module: copy.deepcopy(nn.Sequential(module))[0],
    "cast": lambda module: module.double(),
    "to_empty": lambda module: module.to("meta").to_empty(device="cpu"),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("tp", (1, 2))
def test_copies_and_casts_keep_the_layout(name: str, how: str, tp: int) -> None:
    """Without it a parameter passes for a replicated one: its gradient is not summed, its norm is its shard's."""
    with simulate(tp=tp):
        module = MODULES[name]()
        before = {name: layout_of_tensor(parameter) for name, parameter in module.named_parameters()}
        after = {name: layout_of_tensor(parameter) for name, parameter in COPIES[how](module).named_parameters()}
        assert None not in before.values()
        assert before.keys() == after.keys()
        for key, layout in before.items():
            found = after[key]
            assert found is not None and layout is not None
            assert (found.global_shape, found.shards) == (layout.global_shape, layout.shards)


def test_a_module_on_one_rank_can_be_pickled() -> None:
    saved = io.BytesIO()
    torch.save(ColumnParallelLinear(4, 6), saved)
    saved.seek(0)
    assert layout_of_tensor(torch.load(saved, weights_only=False).weight) is not None


def test_a_parameter_that_lost_its_layout_is_an_error() -> None:
    layer = ColumnParallelLinear(4, 6)
    layer.weight = nn.Parameter(torch.zeros(6, 4))
    with pytest.raises(ParallelError, match="lost its layout"):
        _ = layer.master_weight
