"""Which layers of a transformers model get adapters, and which are packed, if the options name none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny_models import FOREIGN_FAMILIES
from transformers import AutoConfig

from meshpeft.models import make_transformers_model
from meshpeft.peft import AdapterError, LoRA, adapter_wrappers
from meshpeft.quantization import BaseQuantizer
from meshpeft.training.adapters import default_layers

_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_IMAGES = {**_SIZES, "image_size": 28, "patch_size": 14}
OPTIONS: dict[str, dict[str, Any]] = {
    **FOREIGN_FAMILIES,
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4, "kv_channels": 8},
    "gemma3": {"text_config": {**_SIZES, "head_dim": 8, "vocab_size": 96}, "vision_config": _IMAGES},
}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


def made(family: str) -> Any:
    options = OPTIONS[family] if family == "gemma3" else {**_SIZES, **OPTIONS[family]}
    return make_transformers_model(AutoConfig.for_model(family, **options), torch.float32)


@pytest.mark.parametrize(
    ("family", "own_names"),
    [
        ("phi3", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
        ("gpt_neox", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        # The head is called `decoder`.
        ("bert", {"query", "key", "value", "dense"}),
        # The router's layer is called `layer`.
        ("jetmoe", {"kv_proj"}),
        # The weights of the others are handed to kernels: of bamba to one that is not used in training here, but peft
        # takes no adapter on `out_proj`.
        ("mamba", {"in_proj"}),
        ("bamba", {"in_proj", *ATTENTION, "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_heads_routers_and_layers_whose_weight_is_read_stay_as_they_are(family: str, own_names: set[str]) -> None:
    model = made(family)
    layers = default_layers(model)
    assert set(layers.adapted or ()) == own_names
    packed = BaseQuantizer(block_size=32, exclude_modules=layers.in_full).layers_of(model)
    assert {name.rpartition(".")[2] for name in packed} == own_names


def test_only_the_text_model_of_several_gets_adapters_and_is_packed() -> None:
    model = made("gemma3")
    assert not any("vision" in name for name, _ in model.named_parameters())  # it is not in memory
    layers = default_layers(model)
    packed = BaseQuantizer(block_size=32, exclude_modules=layers.in_full).layers_of(model)
    adapted = [name for name, _ in adapter_wrappers(LoRA(target_modules=layers.adapted, dim=2)(model))]
    assert len(adapted) == 2 * 7  # two blocks of four and three layers
    assert all(name.startswith("model.language_model.layers.") for name in adapted)
    assert sorted(packed) == sorted(adapted)


def test_a_layer_whose_weight_is_read_is_refused_where_it_is_named() -> None:
    model = LoRA(target_modules=["x_proj"], dim=2)(made("mamba").to_empty(device="cpu"))
    with pytest.raises(AdapterError, match="would silently leave out its adapter"):
        model(torch.ones(1, 4, dtype=torch.long))
