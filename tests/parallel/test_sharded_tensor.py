"""What a rank says it holds: boxes of global tensors, also along axes that no layer has by itself."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import torch
from helpers.simulate import rank_values, simulate, standing_at
from torch import Tensor, nn

from meshpeft.parallel import (
    ColumnParallelLinear,
    FusedParts,
    GroupedColumnParallelLinear,
    GroupedRowParallelLinear,
    ParallelError,
    RowParallelLinear,
    ShardedTensors,
    init_parallelism,
    layout_of_tensor,
)
from meshpeft.parallel.init import draw_full
from meshpeft.peft import DoRA, LoRA

LAYERS, HIDDEN, WIDTH, EXPERTS = 3, 8, 24, 4
QKV, GATED = FusedParts(("q", "k", "v"), (16, 4, 4), blocks=4), FusedParts(("gate", "up"), (12, 12))
MESHES: tuple[dict[str, Any], ...] = ({}, {"tp": 2}, {"tp": 4}, {"tp": 2, "dp": 2, "ep": 2}, {"dp": 2, "ep": 2})


class Layer(ShardedTensors, nn.Module):
    """A packed column, a row, a norm and packed experts; DoRA on the column and the row."""

    def __init__(self) -> None:
        super().__init__()
        options: dict[str, Any] = {"dtype": torch.float64, "perform_initialization": False}
        self.column = ColumnParallelLinear(HIDDEN, WIDTH, gather_output=False, fused_parts=QKV, **options)
        self.row = RowParallelLinear(WIDTH, HIDDEN, input_is_parallel=True, **options)
        self.norm = nn.LayerNorm(HIDDEN, dtype=torch.float64)
        self.experts_in = GroupedColumnParallelLinear(EXPERTS, HIDDEN, WIDTH, fused_parts=GATED, **options)
        self.experts_out = GroupedRowParallelLinear(EXPERTS, WIDTH, HIDDEN, **options)


def make_layer() -> nn.Module:
    return DoRA(["column", "row"], dim=2, lora_dtype=torch.float64)(Layer())


def fill(layer: nn.Module, number: int) -> dict[str, Tensor]:
    """Values that follow from the parameters' names and the layer's number; the global ones, canonical."""
    full_values = {}
    for name, parameter in layer.named_parameters():
        layout = layout_of_tensor(parameter)
        shape = tuple(parameter.shape) if layout is None else layout.global_shape
        full = draw_full(shape, lambda full: full.normal_(), zlib.crc32(f"{name} {number}".encode()))
        with torch.no_grad():
            parameter.copy_(full if layout is None else layout.slice(full))
        full_values[name.replace("to_wrap.", "")] = full
    return full_values


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_layers_that_are_stored_stacked_are_slices_along_an_axis_in_front(mesh: dict[str, Any]) -> None:
    """`sharded_offsets=((0, layer, layers),)`: the ranks' first copies make up the stacked tensors, each value once."""
    world = mesh.get("tp", 1) * mesh.get("dp", 1)
    stacked: dict[str, Tensor] = {}
    written: dict[str, Tensor] = {}
    full_values: list[dict[str, Tensor]] = []
    for rank in range(world):
        with standing_at(rank, world):
            init_parallelism(mesh.get("tp", 1), 1, mesh.get("ep", 1))
            layer, full_values = make_layer(), []
            for number in range(LAYERS):
                full_values.append(fill(layer, number))
                for name, entry in layer.sharded_state_dict("layers.", ((0, number, LAYERS),)).items():
                    assert (name, entry.prepended_axes) == (entry.key, 1)
                    assert (entry.global_shape[0], entry.global_offset[0], entry.local_shape[0]) == (LAYERS, number, 1)
                    whole = stacked.setdefault(name, torch.full(entry.global_shape, torch.nan, dtype=torch.float64))
                    count = written.setdefault(name, torch.zeros(entry.global_shape, dtype=torch.int64))
                    places = zip(entry.global_offset, entry.local_shape, strict=True)
                    box = tuple(slice(start, start + size) for start, size in places)
                    values = entry.data.view(entry.local_shape)
                    if entry.replica_id == 0:
                        whole[box] = values
                        count[box] += 1
                    else:
                        assert torch.equal(whole[box], values)
    assert all(bool((count == 1).all()) for count in written.values())
    for part, rows in (("q", slice(0, 16)), ("k", slice(16, 20)), ("v", slice(20, 24))):
        for name in (
            "column.weight",
            "column.bias",
            "column.adapter.linear_out.weight",
            "column.adapter.weight_magnitude",
        ):
            module, _, attribute = name.rpartition(".")
            expected = torch.stack([full[name][rows] for full in full_values])
            assert torch.equal(stacked.pop(f"layers.{module}.{part}.{attribute}"), expected), (name, part)
    for part, rows in (("gate", slice(0, 12)), ("up", slice(12, 24))):
        expected = torch.stack([full["experts_in.weight"][:, rows] for full in full_values])
        assert torch.equal(stacked.pop(f"layers.experts_in.{part}.weight"), expected), part
    for name, values in stacked.items():
        expected = torch.stack([full[name.removeprefix("layers.")] for full in full_values])
        assert torch.equal(values, expected), name
    assert {"layers.row.weight", "layers.norm.bias", "layers.experts_out.weight"} < stacked.keys()


def test_several_axes_in_front_keep_their_order() -> None:
    entries = Layer().sharded_state_dict("", ((0, 1, 2), (1, 2, 3)))
    norm, q = entries["norm.weight"], entries["column.q.weight"]
    assert (norm.global_shape, norm.global_offset, norm.local_shape) == ((2, 3, 8), (1, 2, 0), (1, 1, 8))
    assert (q.global_shape, q.global_offset, q.local_shape) == ((2, 3, 16, 8), (1, 2, 0, 0), (1, 1, 16, 8))


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (((1, 0, 2),), r"sharded_offsets=\(\(1, 0, 2\),\): expected the axes 0, 1, .. in order"),
        (((0, 2, 2),), r"index 2 of axis 0 is not in \[0, 2\)"),
        (((0, -1, 2),), r"index -1 of axis 0 is not in \[0, 2\)"),
    ],
)
def test_axes_in_front_that_make_no_sense_are_named(offsets: Any, message: str) -> None:
    with pytest.raises(ParallelError, match=message):
        Layer().sharded_state_dict("", offsets)


# -- experts one by one --------------------------------------------------------------------------------------------


def make_experts() -> nn.Module:
    """With an adapter for each expert."""
    options: dict[str, Any] = {"share_expert_adapters": False, "lora_dtype": torch.float64}
    return LoRA(["experts_in", "experts_out"], dim=2, **options)(Layer())


def one_by_one(stacked: dict[str, Tensor], first: int = 0) -> dict[str, Tensor]:
    """A state dict as other systems write it: `weight0`, `weight1`, .. instead of stacked experts."""
    found = {}
    for name, values in stacked.items():
        if name.startswith("experts"):
            found |= {f"{name}{first + number}": expert for number, expert in enumerate(values)}
        else:
            found[name] = values
    return found


@pytest.mark.parametrize("own", (False, True), ids=("all experts", "its own"))
@pytest.mark.parametrize("form", ("stacked", "one by one"))
def test_a_state_dict_has_its_experts_stacked_or_one_by_one(form: str, own: bool) -> None:
    whole = make_experts()
    fill(whole, 0)
    for rank in range(2):
        with standing_at(rank, 2):
            init_parallelism(1, 1, 2)
            layer, held = make_experts(), whole.state_dict()
            share = {name: held[name][2 * rank : 2 * rank + 2] for name in held if name.startswith("experts")}
            state = {**held, **share}
            if form == "one by one":
                state = one_by_one(state, 2 * rank) if own else one_by_one(held)
            layer.load_state_dict(state)
            assert all(torch.equal(values, {**held, **share}[name]) for name, values in layer.state_dict().items())


def test_simulated_ranks_take_their_own_of_all_experts() -> None:
    whole = make_experts()
    fill(whole, 0)
    with simulate(dp=2, ep=2):
        layer, held = make_experts(), whole.state_dict()
        layer.load_state_dict(one_by_one(held))
        names = [name for name in held if name.startswith("experts")]
        assert len(names) == 6
        for name in names:
            for rank, values in enumerate(rank_values(layer.state_dict()[name])):
                assert torch.equal(values, held[name][2 * rank : 2 * rank + 2]), name


def test_an_expert_that_is_missing_is_named() -> None:
    layer, state = Layer(), one_by_one(Layer().state_dict())
    del state["experts_out.weight2"]
    with pytest.raises(
        RuntimeError, match=r'Missing key.*"experts_out.weight"(?s:.*)Unexpected.*"experts_out.weight0"'
    ):
        layer.load_state_dict(state)
