"""Packed weights that keep their principal part in full, and adapters that take it over (QPiSSA)."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.gated_mlp import INPUT, GatedMLP, full_weight
from helpers.modelopt_jobs import Experts
from helpers.simulate import simulate, the_same
from torch import Tensor, nn

from meshpeft.checkpoint import merge_adapter
from meshpeft.checkpoint.content import ModelContent
from meshpeft.checkpoint.identity import describe_base
from meshpeft.parallel import layout_of, sharded_state_dict
from meshpeft.peft import CanonicalLoRA, DoRA, LoRA, LowRankPEFT, adapter_wrappers, update_model
from meshpeft.quantization import (
    PackedLayer,
    QuantizationError,
    dequantize_base,
    packed_size,
    pissa_init,
    quantize_base,
)

TARGETS = ["linear_fc1", "linear_fc2"]
RANK = 8
METHODS: dict[str, LowRankPEFT] = {
    "lora": LoRA(TARGETS, dim=RANK, alpha=20),
    "lora, standalone": LoRA(TARGETS, dim=RANK, alpha=4, fused=False),
    "dora": DoRA(TARGETS, dim=RANK, alpha=4),
    "canonical": CanonicalLoRA(["linear_fc1_gate", "linear_fc1_up", "linear_fc2"], dim=RANK, alpha=20),
    "canonical, of a part": CanonicalLoRA(["linear_fc1_up", "linear_fc2"], dim=RANK, alpha=4),
    "a lower rank": LoRA(TARGETS, dim=3, alpha=4),
}


def packed(**options: Any) -> GatedMLP:
    return quantize_base(GatedMLP(), "nf4", principal_rank=RANK, **options)


def layers(model: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLayer)}


@functools.cache
def weights(tp: int) -> dict[str, Tensor]:
    """Of each layer: codes, scales and the dequantised weight, whole; over 8 ranks blocks straddle them."""
    found = {}
    with simulate(tp=tp):
        for name, layer in layers(packed()).items():
            blocks = layer.blocks
            found[f"{name} codes"] = the_same(blocks.codes().gather(layer.weight_packed.detach()))
            found[f"{name} scales"] = the_same(blocks.scales().gather(layer.weight_scale.detach()))
            found[name] = full_weight(layer, layer.dequantized_weight())
    return found


def test_codes_and_weights_are_those_of_every_layout():
    want = weights(1)
    for tp in (2, 4, 8):
        for name, tensor in weights(tp).items():
            # The factors are stored in float32; products in float64 sum in another order.
            assert torch.equal(tensor, want[name]) or (
                name in TARGETS and torch.allclose(tensor, want[name], atol=1e-15)
            )


def test_what_is_left_packs_with_less_error():
    for name in TARGETS:
        exact = getattr(GatedMLP(), name)
        whole = quantize_base(copy.deepcopy(exact), "nf4").dequantized_weight()
        error, plain = ((weight - exact.weight).norm() for weight in (weights(1)[name], whole))
        # Of the noise that the tests' weights are, rank 8 of 128 holds a fifth of the energy.
        assert error < 0.95 * plain


@functools.cache
def started(method: str, tp: int) -> tuple[Tensor, Tensor, dict[str, int | None]]:
    """Outputs before and after the adapters took over, and the ranks that are left in the layers."""
    with simulate(tp=tp):
        model = packed()
        before = the_same(model(INPUT).detach())
        replace(METHODS[method])(model)
        pissa_init(model)
        left = {name: layer.principal and layer.principal.a.shape[-2] for name, layer in layers(model).items()}
        names = {name.removesuffix(".to_wrap"): rank for name, rank in left.items()}
        return before, the_same(model(INPUT).detach()), names


@pytest.mark.parametrize("method", METHODS)
def test_adapters_take_over_what_the_layers_give_up(method):
    before, after, left = started(method, 1)
    # The same model: what was in float32 factors is in float64 ones.
    assert (after - before).norm() < 1e-7 * before.norm()
    partly = {"canonical, of a part": {"linear_fc1"}, "a lower rank": set(TARGETS)}.get(method, set())
    assert left == {name: RANK if name in partly else None for name in TARGETS}
    _, divided, left_divided = started(method, 4)
    assert (divided - after).norm() < 1e-10 * after.norm() and left_divided == left


def test_adapters_hold_the_best_part_of_the_weight():
    model = METHODS["lora"](packed())
    pissa_init(model)
    for name in TARGETS:
        wrapper, weight = getattr(model, name), getattr(GatedMLP(), name).weight.detach()
        a, b = (factor.detach() for factor in wrapper.factors())
        best = torch.linalg.svdvals(weight)[:RANK].square().sum()
        taken = weight.square().sum() - (weight - wrapper.one_adapter.scale * b @ a).square().sum()
        assert taken > 0.99 * best
        # Balanced: both factors have the roots of the singular values.
        assert torch.allclose(a.norm(dim=1), wrapper.one_adapter.scale * b.norm(dim=0), rtol=1e-5)


def test_magnitudes_are_the_lengths_of_the_rows_as_they_are_afterwards():
    model = METHODS["dora"](packed())
    pissa_init(model)
    for name in TARGETS:
        wrapper = getattr(model, name)
        a, b = wrapper.adapter.linear_in.weight, wrapper.adapter.linear_out.weight
        rows = wrapper.to_wrap.dequantized_weight() + wrapper.adapter.scale * b @ a
        assert torch.allclose(wrapper.adapter.weight_magnitude, rows.norm(dim=1), rtol=1e-12)
        with torch.no_grad():  # and computed of the remainder, not of what it was part of, when the adapter moves
            b.mul_(2)
        rows = wrapper.to_wrap.dequantized_weight() + wrapper.adapter.scale * b @ a
        assert torch.allclose(wrapper._get_weight_norm(), rows.norm(dim=1), rtol=1e-12)


def test_a_narrow_adapter_remembers_all_that_the_base_gave_up():
    """Exported, it is less what the base gave up, not less what bfloat16 kept of that."""
    model = LoRA(TARGETS, dim=RANK, lora_dtype="bf16")(packed())
    kept = {name: [factor.clone() for factor in getattr(model, name).to_wrap.principal] for name in TARGETS}
    pissa_init(model)
    for name, (a, b) in kept.items():
        adapter = getattr(model, name).adapter
        assert adapter.linear_in.weight.dtype == torch.bfloat16
        assert torch.equal(adapter.linear_in.start, a)
        assert torch.equal(adapter.linear_out.start, b / adapter.scale)


def test_experts_each_keep_their_own_part():
    exact = Experts().double()
    model = quantize_base(Experts().double(), "nf4", principal_rank=RANK)
    x = INPUT.flatten(0, 1)
    before = model(x)
    plain = quantize_base(Experts().double(), "nf4")(x)
    assert (before - exact(x)).norm() < 0.95 * (plain - exact(x)).norm()
    update_model(model, {"adapter_cfg": {"*": {"rank": RANK, "scale": 0.5, "lora_init_method": "pissa"}}})
    assert (model(x) - before).norm() < 1e-7 * before.norm()
    assert all(layer.principal is None for layer in layers(model).values())
    for _, wrapper in adapter_wrappers(model):
        assert layout_of(wrapper.to_wrap).experts == 4 and wrapper.factors()[0].shape == (4, RANK, 128)


def test_one_adapter_for_all_experts_cannot_take_them_over():
    model = quantize_base(nn.ModuleDict({"dense": GatedMLP(torch.float32), "sparse": Experts()}), principal_rank=RANK)
    LoRA(TARGETS, dim=RANK)(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(QuantizationError, match="use share_expert_adapters=False"):
        pissa_init(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("which", [["linear_fc2"], LoRA(["linear_fc2"])])
def test_only_the_layers_that_are_named_keep_a_part(which):
    model = packed(principal_modules=which)
    assert [layer.principal is not None for layer in layers(model).values()] == [False, True]
    size, plain = packed_size(model), packed_size(quantize_base(GatedMLP(), "nf4"))
    assert size.bytes - plain.bytes == 4 * RANK * (256 + 128)
    pissa_init(LoRA(["linear_fc2"], dim=RANK)(model))
    assert packed_size(model) == plain


def test_the_part_stays_exact_in_copies_casts_and_state_dicts():
    model = packed()
    cast = copy.deepcopy(model).to(torch.bfloat16)
    for name, layer in layers(cast).items():
        ours = getattr(model, name)
        assert all(torch.equal(a, b) for a, b in zip(layer.principal, ours.principal, strict=True))
        assert layer.dequantized_weight().dtype == torch.bfloat16
        # Rounded once, to 8 bits.
        assert torch.allclose(layer.dequantized_weight().double(), ours.dequantized_weight(), rtol=2**-8, atol=1e-6)
    other = packed()
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(INPUT), model(INPUT))
    dequantized = dequantize_base(other)(INPUT)
    assert (dequantized - model(INPUT)).norm() < 1e-14 * dequantized.norm()
    assert not any("principal" in name for name, _ in other.named_parameters())
    with simulate(tp=2):
        entries = sharded_state_dict(packed())
        shapes = {key: entry.global_shape for key, entry in entries.items() if "_b" in key and "fc1" in key}
    assert shapes == {f"linear_fc1.{part}.weight_principal_b": (256, RANK) for part in ("gate", "up")}


def test_a_merged_adapter_is_the_model_that_was_started():
    model = METHODS["lora"](packed())
    before = model(INPUT).detach()
    pissa_init(model)
    merged = merge_adapter(dequantize_base(model))
    assert (merged(INPUT) - before).norm() < 1e-7 * before.norm()


def test_codes_beside_a_principal_part_are_described_without_their_values():
    """Another machine's decomposition rounds otherwise; the format, and every other tensor, must be the same."""

    def description(**options: Any) -> dict[str, list[object]]:
        model = LoRA(["linear_fc1"], dim=RANK)(packed(**options))
        pissa_init(model)
        return describe_base(model, ModelContent.of(model, full_model=False).frozen)

    found = description()
    assert found["linear_fc1.gate.weight_packed"][2] == "less its principal part, nf4/64"
    assert found["linear_fc2.weight_principal_a"][2] == "less its principal part, nf4/64"
    other = description(block_size=32)
    assert other["linear_fc1.gate.weight_packed"] != found["linear_fc1.gate.weight_packed"]
    assert other["output_layer.weight"] == found["output_layer.weight"]


def test_what_cannot_be_kept_or_taken_is_named():
    with pytest.raises(QuantizationError, match="principal_rank=0: expected an integer of at least 1"):
        quantize_base(GatedMLP(), principal_rank=0)
    with pytest.raises(QuantizationError, match="give principal_rank"):
        quantize_base(GatedMLP(), principal_modules=["linear_fc1"])
    with pytest.raises(QuantizationError, match="'linear_fc3' matches no packed layer; nearest: linear_fc"):
        packed(principal_modules=["linear_fc3"])
    model = LoRA(TARGETS, dim=RANK + 1)(packed())
    with pytest.raises(QuantizationError, match=r"kept a principal part of rank 8 only, .*principal_rank=9\)"):
        pissa_init(model)
