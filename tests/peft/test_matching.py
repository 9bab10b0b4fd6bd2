"""Patterns name layers; what was asked for and not found is an error that helps."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
from torch import nn

from meshpeft.models import Decoder, DecoderConfig, MoEConfig
from meshpeft.peft import AdapterError, CanonicalLoRA, LoRA, is_expert_linear, wildcard_match


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attention = nn.ModuleDict({"linear_qkv": nn.Linear(8, 24), "linear_proj": nn.Linear(8, 8)})
        self.mlp = nn.ModuleDict({"linear_fc1": nn.Linear(8, 32), "linear_fc2": nn.Linear(16, 8)})
        self.norm = nn.LayerNorm(8)


class Model(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.decoder = nn.ModuleDict({"layers": nn.ModuleList(Layer() for _ in range(layers))})
        self.output_layer = nn.Linear(8, 11)


def adapted(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "to_wrap")]


@pytest.mark.parametrize(
    ("pattern", "key", "expected"),
    (
        ("*.layers.0.*.linear_qkv", "decoder.layers.0.self_attention.linear_qkv", True),
        ("*.layers.0.*.linear_qkv", "decoder.layers.1.self_attention.linear_qkv", False),
        ("*.layers.0.*.linear_qkv", None, None),
        ("*linear_qkv", "linear_qkv", True),
        ("linear_qkv", "a.linear_qkv", False),
        ("*", "anything.at.all", True),
        # Characters of regular expressions are literal.
        ("*.layers.1*.x", "a.layers.1.x", True),
        ("a.b", "aXb", False),
        ("(a|b)", "a", False),
        ("[ab]+", "[ab]+", True),
    ),
)
def test_wildcard_match(pattern, key, expected):
    assert wildcard_match(pattern, key) is expected


def test_a_pattern_that_lost_its_star_matches_nothing_and_is_warned_about():
    with pytest.warns(UserWarning, match=r"lose its '\*'.*'\*\.layers\.0\.\*\.linear_q'"):
        assert wildcard_match(".layers.0..linear_q", "decoder.layers.0.self_attention.linear_q") is False


@pytest.mark.parametrize(
    ("name", "expected"),
    (
        ("model.layers.0.mlp.experts.0.linear_fc1", True),
        ("decoder.layers.0.mlp.experts.linear_fc1", True),
        ("model.layers.0.mlp.linear_fc1", False),
        ("model.layers.0.mlp.shared_experts.linear_fc1", False),
        ("experts", False),
    ),
)
def test_is_expert_linear(name, expected):
    assert is_expert_linear(name) is expected


def test_default_targets_are_the_four_fused_layers():
    assert LoRA().target_modules == ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    model = Model()
    LoRA(dim=2)(model)
    assert len(adapted(model)) == 8


def test_wildcard_targets_pick_one_layer():
    model = Model()
    LoRA(target_modules=["*.layers.0.*.linear_qkv"], dim=2)(model)
    assert adapted(model) == ["decoder.layers.0.self_attention.linear_qkv"]


def test_exclusions_alone_adapt_every_other_linear_layer():
    model = Model(layers=1)
    LoRA(exclude_modules=["output_layer", "*.mlp.*"], dim=2)(model)
    assert adapted(model) == [
        "decoder.layers.0.self_attention.linear_qkv",
        "decoder.layers.0.self_attention.linear_proj",
    ]


def experts(**method: Any) -> set[str]:
    """What is adapted below the layers of a small Qwen2-MoE, whose shared experts have a gate."""
    moe = MoEConfig(4, 2, 8, shared_intermediate_size=8)
    config = DecoderConfig(32, 16, 8, 1, 4, 2, 4, model_type="qwen2_moe", moe=moe)
    model = LoRA(**method, dim=1)(Decoder(config, device="meta"))
    return {name.removeprefix("decoder.layers.0.") for name in adapted(model)}


ATTENTION = {"self_attention.linear_qkv", "self_attention.linear_proj"}
MLP = {f"mlp.{part}.linear_{linear}" for part in ("experts", "shared_experts") for linear in ("fc1", "fc2")}
GATES = {"mlp.router", "mlp.shared_experts.gate"}


def test_routers_and_gates_are_reached_only_by_their_names():
    """Exclusions and wildcards mean linear layers; an adapter that moves tokens is asked for."""
    assert experts(exclude_modules=["output_layer"]) == ATTENTION | MLP
    assert experts(exclude_modules=["output_layer", "linear_fc1", "linear_fc2"]) == ATTENTION
    assert experts(target_modules=["decoder.layers.0.*"]) == ATTENTION | MLP
    assert experts(target_modules=["*.mlp.*"]) == MLP
    assert experts(target_modules=["*.mlp.router", "*gate"]) == GATES
    assert experts(target_modules=["router", "linear_proj"]) == {"mlp.router", "self_attention.linear_proj"}


def test_a_requested_target_that_matches_nothing_names_itself_and_the_nearest():
    model = Model()
    with pytest.raises(AdapterError, match=r"'linear_qvk' matches no layer; nearest: linear_qkv"):
        LoRA(target_modules=["linear_proj", "linear_qvk"], dim=2)(model)
    # Nothing was changed before the error.
    assert adapted(model) == []
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_target_that_cannot_carry_an_adapter_says_so():
    with pytest.raises(AdapterError, match=r"'norm' matches only decoder.layers.0.norm \(LayerNorm\)"):
        LoRA(target_modules=["norm"], dim=2)(Model())


@pytest.mark.parametrize("method", (LoRA, CanonicalLoRA))
def test_a_target_that_lost_its_star_is_told_once_and_as_it_was_given(method):
    leaf = "linear_q" if method is CanonicalLoRA else "linear_qkv"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(AdapterError, match=re.escape(f"Perhaps '*.layers.0.*.{leaf}' was meant")):
            method(target_modules=[f".layers.0..{leaf}"], dim=2)(Model())


def test_parts_of_fused_layers_are_no_exclusions():
    message = r"'\*\.linear_q' is a part of linear_qkv.*exclude '\*\.linear_qkv', or name the parts to adapt"
    with pytest.warns(UserWarning, match=message), pytest.raises(AdapterError, match="packed"):
        CanonicalLoRA(exclude_modules=["*.linear_q"], dim=2)(Model())
    with pytest.raises(AdapterError, match="'linear_q' means a part of linear_qkv, and is a layer of its own"):
        CanonicalLoRA(target_modules=["linear_q"], dim=2)(nn.ModuleDict({"linear_q": nn.Linear(4, 4)}))


def test_a_default_list_may_match_partly_with_one_warning():
    model = nn.ModuleDict({"linear_qkv": nn.Linear(4, 4), "linear_fc1": nn.Linear(4, 4)})
    with pytest.warns(UserWarning, match="linear_proj.*linear_fc2") as caught:
        LoRA(dim=2)(model)
    assert len(caught) == 1
    with pytest.raises(AdapterError, match="linear_proj"):
        LoRA(dim=2)(nn.ModuleDict({"other": nn.Linear(4, 4)}))


def test_patterns_give_some_targets_another_rank_and_alpha():
    model = Model()
    patterns = {"rank_pattern": {"*.0.*.linear_qkv": 3, "linear_qkv": 1}, "alpha_pattern": {"linear_fc2": 5}}
    LoRA(dim=2, alpha=4, **patterns)(model)
    first, second = (layer.self_attention["linear_qkv"].adapter for layer in model.decoder["layers"])
    assert (first.dim, second.dim, second.scale) == (3, 1, 4)
    assert model.decoder["layers"][1].mlp["linear_fc2"].adapter.scale == 2.5
    with pytest.raises(AdapterError, match=r"rank_pattern: 'linear_q' matches no target; nearest: linear_qkv"):
        LoRA(dim=2, rank_pattern={"linear_q": 3})(Model())
    with pytest.raises(AdapterError, match=r"alpha_pattern: 'linear_fc2' matches no target; nearest: linear_qkv"):
        LoRA(target_modules=["linear_qkv"], dim=2, alpha_pattern={"linear_fc2": 3})(Model())
    with pytest.raises(AdapterError, match="dim=0"):
        LoRA(rank_pattern={"linear_q": 0})


def test_an_exclusion_that_matches_nothing_is_warned_about():
    with pytest.warns(UserWarning, match="'outptu_layer' matches no layer; nearest: output_layer"):
        LoRA(exclude_modules=["outptu_layer"], dim=2)(Model())


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"target_modules": ["linear_qkv"], "exclude_modules": ["x"]}, "leave the other empty"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": "linear_qkv"}, r"give a list of patterns: \['linear_qkv'\]"),
        ({"target_modules": [4]}, "4 is no pattern of layer names"),
        ({"target_modules": None}, "target_modules is empty"),
        ({"dim": 0}, "at least 1"),
        ({"dim": 4.0}, "dim=4.0: expected an integer"),
        ({"dim": True}, "dim=True: expected an integer"),
        ({"dim": "4"}, "dim='4': expected an integer"),
        ({"alpha": None}, "alpha=None: expected a number"),
        ({"dropout": "0.1"}, "dropout='0.1': expected a number"),
        ({"dropout": -0.1}, "below 1"),
        ({"dropout": 1.0}, "below 1"),
        ({"alpha": float("nan")}, "finite"),
        ({"alpha": float("inf")}, "finite"),
        ({"dropout_position": "middle"}, "'pre' or 'post'"),
        ({"keep_token_shards": True, "dropout": 0.1, "dropout_position": "post"}, "use dropout_position='pre'"),
    ),
)
def test_bad_options_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**options)


def test_unknown_init_methods_are_not_implemented():
    with pytest.raises(NotImplementedError, match="orthogonal"):
        LoRA(lora_A_init_method="orthogonal")


def test_a_rank_above_the_smaller_side_is_only_a_warning():
    with pytest.warns(UserWarning, match="dim=9 is above the layer's smaller side 8"):
        LoRA(target_modules=["output_layer"], dim=9)(Model())


def test_nothing_is_warned_about_when_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoRA(dim=2)(Model())
