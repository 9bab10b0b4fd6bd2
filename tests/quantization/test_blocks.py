"""Blocks of the full rows, whatever divides these: the dequantised weight is the same at every layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.gated_mlp import GatedMLP, full_weight
from helpers.simulate import rank_values, simulate
from torch import Tensor, nn

from meshpeft.parallel import (
    FusedParts,
    GroupedColumnParallelLinear,
    GroupedRowParallelLinear,
    RowParallelLinear,
    layout_of_tensor,
    named_init_,
    sharded_state_dict,
)
from meshpeft.peft import trainable_parameters
from meshpeft.quantization import PackedLayer, QuantizationError, dequantize_base, packed_size, quantize_base
from meshpeft.quantization.formats import FORMATS


def packed_weights(tp: int, name: str) -> dict[str, Tensor]:
    with simulate(tp=tp):
        model = quantize_base(GatedMLP(), name)
        layers = {key: layer for key, layer in model.named_modules() if isinstance(layer, PackedLayer)}
        return {key: full_weight(layer, layer.dequantized_weight()) for key, layer in layers.items()}


@pytest.mark.parametrize("name", FORMATS)
def test_the_dequantised_weight_is_the_same_at_every_layout(name):
    want = packed_weights(1, name)
    assert set(want) == {"linear_fc1", "linear_fc2"}  # output_layer is excluded by default
    for tp in (2, 4, 8):  # over 8 ranks a row of linear_fc2 leaves each half a block
        got = packed_weights(tp, name)
        assert all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize("name", ("nf4", "int8"))
def test_the_largest_value_of_a_block_is_as_exact_as_a_float32_scale(name):
    layer = nn.Linear(256, 4, bias=False)
    want = layer.weight.detach().unflatten(1, (4, 64))
    got = quantize_base(layer, name).dequantized_weight().unflatten(1, (4, 64))
    largest = want.abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(got.gather(-1, largest), want.gather(-1, largest), rtol=1e-6, atol=0)


# Over 4 ranks 640 columns leave 160, two blocks and a half; with stride 2, twice 80, a block and a quarter.
STRADDLING: dict[str, Callable[[], nn.Module]] = {
    "row": lambda: RowParallelLinear(640, 6, bias=False, perform_initialization=False),
    "row, stride 2": lambda: RowParallelLinear(640, 6, stride=2, bias=False, perform_initialization=False),
    "experts": lambda: GroupedRowParallelLinear(2, 640, 6, perform_initialization=False),
    "experts, fused": lambda: GroupedRowParallelLinear(
        2, 640, 6, fused_parts=FusedParts(("a", "b"), (4, 2)), perform_initialization=False
    ),
}


def packed(make: Callable[[], nn.Module], name: str) -> nn.Module:
    layer = make()
    # Scales that differ from block to block: each must be that of all of a block's values.
    named_init_(layer.weight, lambda full: full.normal_().mul_(torch.arange(1.0, full.shape[-1] + 1)), 0, "weight")
    return quantize_base(layer, name)


@pytest.mark.parametrize("kind", STRADDLING)
@pytest.mark.parametrize("name", FORMATS)
def test_blocks_may_reach_from_one_rank_into_another(name, kind):
    want = packed(STRADDLING[kind], name).dequantized_weight()
    with simulate(tp=4):
        layer = packed(STRADDLING[kind], name)
        assert layer.blocks.straddle_ranks
        got = full_weight(layer, layer.dequantized_weight())
        # Their scales are on every rank, whole; the codes are divided as ever.
        assert layer.weight_scale.shape[-1] == 10
        assert layer.weight_packed.shape[-1] == 160 * layer.storage.bits // 8
        residual_free = full_weight(dequantize_base(layer), layer.weight)
    assert torch.equal(got, want) and torch.equal(residual_free, want)


def test_the_checkpoint_entries_of_straddling_blocks_are_those_of_one_rank():
    def shapes(tp: int) -> dict[str, tuple[int, ...]]:
        with simulate(tp=tp):
            entries = sharded_state_dict(packed(STRADDLING["row"], "nf4"))
            return {key: entry.global_shape for key, entry in entries.items()}

    assert shapes(4) == shapes(1) == {"weight_packed": (6, 320), "weight_scale": (6, 10)}
    with simulate(tp=4):
        scale = sharded_state_dict(packed(STRADDLING["row"], "nf4"))["weight_scale"]
        assert [int(replica) for replica in rank_values(torch.zeros(1) + scale.replica_id)] == [0, 1, 2, 3]


def test_rows_that_do_not_divide_and_codes_that_share_a_byte_are_refused_before_anything_is_packed():
    model = nn.Sequential(nn.Linear(128, 96), nn.Linear(96, 8))
    advice = r"1: 96 input features do not divide into blocks of 64; use block_size=32 \(--quantize-block-size\)$"
    with pytest.raises(QuantizationError, match=advice):
        quantize_base(model, "nf4")
    assert not any(isinstance(module, PackedLayer) for module in model.modules())
    with pytest.raises(QuantizationError, match="50 input features do not divide into blocks of 64; exclude the layer"):
        quantize_base(nn.Linear(50, 8))
    with simulate(tp=64):
        layer = RowParallelLinear(64, 64, bias=False)
        with pytest.raises(QuantizationError, match="64 ranks leave 1 a rank, and two nf4 codes share a byte"):
            quantize_base(layer, "nf4")
        quantize_base(layer, "int8")


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_packed_weights_count_as_the_parameters_that_they_store(tp):
    with simulate(tp=tp):
        model = GatedMLP(torch.float32)
        want = trainable_parameters(model.requires_grad_(False))
        quantize_base(model, "nf4")
        assert trainable_parameters(model) == want
        size = packed_size(model)
    assert (size.layers, size.parameters) == (2, 3 * 128 * 256)
    # Over 8 ranks the scales of linear_fc2, 4 a row, are on each.
    scales = 4 * (2 * 256 * 2 + 128 * 4 * (8 if tp == 8 else 1))
    assert size.bytes == size.parameters // 2 + scales
    assert str(size).startswith("98,304 parameters of 2 layers as nf4 in ")


@pytest.mark.parametrize("layer", [GroupedColumnParallelLinear, GroupedRowParallelLinear])
def test_experts_are_packed_alike_at_every_expert_parallel_size(layer):
    def weight(**sizes: int) -> Tensor:
        with simulate(**sizes):
            experts = packed(lambda: layer(4, 128, 64, perform_initialization=False), "int4")
            for parameter in (experts.weight_packed, experts.weight_scale):
                layout = layout_of_tensor(parameter)
                assert layout is not None and layout.expert and layout.global_shape[0] == 4
            return full_weight(experts, experts.dequantized_weight())

    want = weight(tp=1)
    for sizes in ({"dp": 2, "ep": 2}, {"dp": 4, "ep": 4}, {"tp": 2, "dp": 2, "ep": 2, "etp": 2}, {"tp": 4, "etp": 4}):
        assert torch.equal(weight(**sizes), want)


def test_dequantising_gives_the_layers_back():
    model = GatedMLP()
    kinds = {name: type(module) for name, module in model.named_modules()}
    quantize_base(model, "nf4", residual_rank=2)
    want = {name: layer.dequantized_weight() for name, layer in model.named_modules() if isinstance(layer, PackedLayer)}
    dequantize_base(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert list(model.state_dict()) == list(GatedMLP().state_dict())
    for name, weight in want.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.weight, weight) and not layer.weight.requires_grad and not list(layer.buffers())
        assert not hasattr(layer, "storage") and not hasattr(layer, "compute_dtype")
        assert layout_of_tensor(layer.weight) == layout_of_tensor(GatedMLP().get_submodule(name).weight)
