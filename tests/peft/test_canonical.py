"""Canonical LoRA: separate adapters on the parts of fused layers, as if the layers were not fused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.adapted_block import FULL_INPUT, GROUPS, HEAD_DIM, HEADS, HIDDEN, make_block
from torch import nn

from meshpeft.parallel import FusedParts, LayerType, LinearLayout, register_layer_type
from meshpeft.peft import (
    AdapterError,
    CanonicalLoRA,
    DoRALinear,
    LoRA,
    LoRALinear,
    LoRALinearSplitFC1UpGate,
    LoRALinearSplitQKV,
    LoRATopKRouter,
    ModuleDict,
)
from meshpeft.peft.canonical import _should_treat_linear_fc1_as_unfused, pack_factors
from meshpeft.peft.named import NamedLoRALinear

PARTS = {
    "linear_q": ("self_attention", "linear_qkv", "adapter_q"),
    "linear_k": ("self_attention", "linear_qkv", "adapter_k"),
    "linear_v": ("self_attention", "linear_qkv", "adapter_v"),
    "linear_fc1_gate": ("mlp", "linear_fc1", "adapter_gate"),
    "linear_fc1_up": ("mlp", "linear_fc1", "adapter_up"),
}
OPTIONS = {"dim": 4, "alpha": 6, "lora_B_init_method": "normal"}


def part_outputs(block, x):
    """The output of each fused layer, and separately the base's parts plus each part's own adapter."""
    found = []
    for holder, name in ((block.self_attention, "linear_qkv"), (block.mlp, "linear_fc1")):
        wrapper = getattr(holder, name)
        base = wrapper.to_wrap
        fused_parts = base.layout.fused_parts
        parts = fused_parts.split(F.linear(x, base.weight, base.bias), -1, 1)
        for index, part in enumerate(fused_parts.names):
            if f"adapter_{part}" in wrapper.adapter:
                adapter = wrapper.adapter[f"adapter_{part}"]
                a, b = adapter.linear_in.weight, adapter.linear_out.weight
                parts[index] = parts[index] + 1.5 * (x @ a.t()) @ b.t()
        found.append((wrapper(x), fused_parts.fuse(parts, -1, 1)))
    return found


@pytest.mark.parametrize(
    "targets", (tuple(PARTS), ("linear_v", "linear_fc1_gate"), ("linear_q", "linear_k", "linear_fc1_up"))
)
def test_each_part_has_its_own_adapter_and_an_absent_one_adds_zero(targets):
    block = make_block(CanonicalLoRA(target_modules=list(targets), **OPTIONS))
    assert isinstance(block.self_attention.linear_qkv, LoRALinearSplitQKV)
    assert isinstance(block.mlp.linear_fc1, LoRALinearSplitFC1UpGate)
    for part, (holder, layer, adapter) in PARTS.items():
        assert (adapter in block.get_submodule(f"{holder}.{layer}").adapter) == (part in targets)
    trainable = [p for p in block.parameters() if p.requires_grad]
    assert len(trainable) == 2 * len(targets)
    for got, want in part_outputs(block, FULL_INPUT):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        weights = torch.linspace(-1, 1, got.numel(), dtype=got.dtype).view_as(got)
        for mine, expected in zip(
            torch.autograd.grad((got * weights).sum(), trainable, allow_unused=True),
            torch.autograd.grad((want * weights).sum(), trainable, allow_unused=True),
            strict=True,
        ):
            assert (mine is None) == (expected is None)
            if mine is not None:
                torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


def test_a_swap_of_q_and_k_would_be_seen():
    # Sensitivity of the test above: unequal parts cannot be swapped, equal ones give other numbers.
    block = make_block(CanonicalLoRA(target_modules=["linear_k", "linear_v"], **OPTIONS))
    adapters = block.self_attention.linear_qkv.adapter
    before = block.self_attention.linear_qkv(FULL_INPUT)
    adapters["adapter_k"], adapters["adapter_v"] = adapters["adapter_v"], adapters["adapter_k"]
    assert (block.self_attention.linear_qkv(FULL_INPUT) - before).abs().max() > 0.1


def test_all_factors_of_a_layer_run_as_one_product(monkeypatch):
    from meshpeft.peft import lora

    seen = []
    original = lora.fused_lora
    monkeypatch.setattr(lora, "fused_lora", lambda *args: seen.append(args[2].a.shape) or original(*args))
    make_block(CanonicalLoRA(**OPTIONS))(FULL_INPUT)
    assert seen == [(12, HIDDEN), (4, HEADS * HEAD_DIM), (8, HIDDEN), (4, 32)]


def test_the_fused_factor_equals_fusing_the_outputs():
    fused_parts = FusedParts(("q", "k", "v"), (8, 4, 4), blocks=2)
    generator = torch.Generator().manual_seed(0)
    a = [torch.randn(2, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    b = [torch.randn(rows, 2, generator=generator, dtype=torch.float64) for rows in (8, 4)]
    x = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    big_a, big_b = pack_factors(fused_parts, 1, [0, 2], a, b)
    want = fused_parts.fuse([x @ a[0].t() @ b[0].t(), torch.zeros(3, 4).double(), x @ a[1].t() @ b[1].t()], -1, 1)
    torch.testing.assert_close(x @ big_a.t() @ big_b.t(), want, rtol=1e-13, atol=1e-13)


def test_ranks_and_scales_may_differ_between_parts():
    block = make_block(CanonicalLoRA(target_modules=["linear_q"], **OPTIONS))
    other = make_block(CanonicalLoRA(target_modules=["linear_v"], **(OPTIONS | {"dim": 2, "alpha": 5})))
    q = block.self_attention.linear_qkv.adapter["adapter_q"]
    v = other.self_attention.linear_qkv.adapter["adapter_v"]
    base = block.self_attention.linear_qkv.to_wrap
    wrapper = LoRALinearSplitQKV(base, ModuleDict({"adapter_v": v, "adapter_q": q}))
    parts = base.layout.fused_parts.split(base(FULL_INPUT), -1, 1)
    for index, adapter in ((0, q), (2, v)):
        parts[index] = parts[index] + adapter(FULL_INPUT)
    torch.testing.assert_close(wrapper(FULL_INPUT), wrapper._interleave_qkv(*parts), rtol=1e-12, atol=1e-12)


def test_mapping_is_that_of_the_reference_and_follows_the_targets():
    method = CanonicalLoRA(target_modules=["linear_q", "linear_k", "linear_proj", "linear_fc1_up"])
    assert method.canonical_mapping == {
        "linear_qkv": {"linear_q", "linear_k"},
        "linear_proj": {"linear_proj"},
        "linear_fc1": {"linear_fc1_up"},
    }
    method = CanonicalLoRA(target_modules=["*.layers.0.*.linear_q", "*.layers.1.*.linear_q"], dim=2)
    assert method.canonical_mapping == {
        "*.layers.0.*.linear_qkv": {"linear_q"},
        "*.layers.1.*.linear_qkv": {"linear_q"},
    }
    method.target_modules = ["linear_v"]
    block = make_block(method)
    assert method.canonical_mapping == {"linear_qkv": {"linear_v"}}
    assert list(block.self_attention.linear_qkv.adapter) == ["adapter_v"]


def test_patterns_that_meet_one_layer_add_up():
    block = make_block(CanonicalLoRA(target_modules=["linear_q", "*attention.linear_v", "*linear_fc1_up"], dim=2))
    assert list(block.self_attention.linear_qkv.adapter) == ["adapter_q", "adapter_v"]
    assert list(block.mlp.linear_fc1.adapter) == ["adapter_up"]
    whole = make_block(CanonicalLoRA(target_modules=["*attention.*"], dim=2))
    assert list(whole.self_attention.linear_qkv.adapter) == ["adapter_q", "adapter_k", "adapter_v"]
    assert isinstance(whole.self_attention.linear_proj, LoRALinear)


def test_defaults_and_exclusions():
    assert CanonicalLoRA().target_modules == [
        "linear_q",
        "linear_k",
        "linear_v",
        "linear_proj",
        "linear_fc1_up",
        "linear_fc1_gate",
        "linear_fc2",
    ]
    block = make_block(CanonicalLoRA(exclude_modules=["linear_proj", "*.linear_fc2"], dim=2))
    assert list(block.self_attention.linear_qkv.adapter) == ["adapter_q", "adapter_k", "adapter_v"]
    assert list(block.mlp.linear_fc1.adapter) == ["adapter_gate", "adapter_up"]
    assert not isinstance(block.self_attention.linear_proj, LoRALinear)


@pytest.mark.parametrize("target", ("linear_qkv", "*.layers.0.*.linear_qkv", "linear_fc1"))
def test_fused_layers_as_targets_are_refused_with_advice(target):
    advice = "linear_q'.*linear_k'.*linear_v'" if "qkv" in target else "linear_fc1_up'.*linear_fc1_gate'"
    with pytest.raises(AdapterError, match=advice):
        CanonicalLoRA(target_modules=[target])
    method = CanonicalLoRA()
    method.target_modules = [target]
    with pytest.raises(AdapterError, match=advice):
        make_block(method)


def test_a_part_that_is_not_there_names_the_request():
    with pytest.raises(AdapterError, match=r"'\*\.layers\.7\.\*\.linear_k' matches no layer"):
        make_block(CanonicalLoRA(target_modules=["linear_q", "*.layers.7.*.linear_k"], dim=2))


class Fused(nn.Linear):
    """Says how it is packed, or that it is not."""

    fused_parts: FusedParts | None = None


register_layer_type(
    Fused,
    LayerType(
        layout=lambda m: LinearLayout(m.in_features, m.out_features, fused_parts=m.fused_parts),
        weight=lambda m: m.weight,
        enter=lambda m, x: x,
        exit=lambda m, y: y if m.bias is None else y + m.bias,
    ),
)


def test_layers_that_do_not_pack_parts_are_kept_whole():
    model = nn.ModuleDict(
        {"vision_model": nn.ModuleDict({"linear_fc1": Fused(8, 8)}), "mlp": nn.ModuleDict({"linear_fc1": Fused(8, 8)})}
    )
    model["vision_model"]["linear_fc1"].fused_parts = FusedParts(("gate", "up"), (4, 4))
    CanonicalLoRA(target_modules=["linear_fc1_up"], dim=2)(model)
    assert all(type(model[name]["linear_fc1"]) is LoRALinear for name in model)
    assert _should_treat_linear_fc1_as_unfused("vision_model.decoder.linear_fc1")
    assert not _should_treat_linear_fc1_as_unfused("decoder.linear_fc1")
    with pytest.raises(AdapterError, match="does not say how q, k, v are packed"):
        CanonicalLoRA(target_modules=["linear_q"], dim=2)(nn.ModuleDict({"linear_qkv": Fused(8, 8)}))


@pytest.mark.parametrize("foreign", [nn.Linear(4, 4), None], ids=["a layer", "nothing"])
def test_an_adapter_of_another_package_is_refused_where_it_is_given(foreign: nn.Module | None):
    base, named = make_block(None).self_attention.linear_qkv, NamedLoRALinear(make_block(None).mlp.linear_fc1)
    for give in (
        partial(LoRALinear, base, foreign),
        partial(LoRATopKRouter, base, foreign),
        partial(DoRALinear, base, foreign),
        partial(LoRALinearSplitQKV, base, foreign if foreign is None else ModuleDict({"adapter_q": foreign})),
        partial(named.add, "named", foreign),
    ):
        with pytest.raises(
            AdapterError, match=r"(Linear|QKV|Router): got an adapter of type .*, expected a meshpeft.peft"
        ):
            give()


def test_a_split_wrapper_refuses_what_it_cannot_hold():
    block = make_block(None)
    adapter = make_block(LoRA(dim=2)).self_attention.linear_qkv.adapter
    with pytest.raises(AdapterError, match="adapter_q, adapter_k, adapter_v; got \\['q'\\]"):
        LoRALinearSplitQKV(block.self_attention.linear_qkv, ModuleDict({"q": adapter}))
    with pytest.raises(AdapterError, match="packs gate, up"):
        LoRALinearSplitFC1UpGate(block.self_attention.linear_qkv, ModuleDict({"adapter_up": adapter}))


def test_checkpoint_entries_are_per_part():
    block = make_block(CanonicalLoRA(target_modules=["linear_q", "linear_v"], dim=2))
    wrapper = block.self_attention.linear_qkv
    entries = wrapper.sharded_state_dict(prefix="qkv.")
    shapes = {key: entry.global_shape for key, entry in entries.items() if ".adapter." in key}
    assert shapes == {
        "qkv.adapter.adapter_q.linear_in.weight": (2, HIDDEN),
        "qkv.adapter.adapter_q.linear_out.weight": (HEADS * HEAD_DIM, 2),
        "qkv.adapter.adapter_v.linear_in.weight": (2, HIDDEN),
        "qkv.adapter.adapter_v.linear_out.weight": (GROUPS * HEAD_DIM, 2),
    }
    assert "qkv.q.weight" in entries
    assert wrapper.adapter.sharded_state_dict("x.").keys() == {key.replace("qkv.adapter.", "x.") for key in shapes}


def test_merging_split_adapters():
    block = make_block(CanonicalLoRA(**OPTIONS))
    before = block(FULL_INPUT)
    for wrapper in (block.self_attention.linear_qkv, block.mlp.linear_fc1):
        wrapper.merge()
    torch.testing.assert_close(block(FULL_INPUT), before, rtol=1e-11, atol=1e-11)
