from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from meshpeft.parallel import layout_of_tensor
from meshpeft.peft import CanonicalLoRA, DoRA, LoRA
from meshpeft.training.adapters import adapter_method, describe_targets
from meshpeft.training.config import ConfigError, FinetuneConfig
from meshpeft.training.step import adamw


@pytest.mark.parametrize(("name", "method"), (("lora", LoRA), ("canonical_lora", CanonicalLoRA), ("dora", DoRA)))
def test_every_option_reaches_the_method(name: str, method: type) -> None:
    config = FinetuneConfig(
        method=name,
        rank=6,
        alpha=9,
        rslora=True,
        dropout=0.25,
        dropout_recompute=True,
        keep_token_shards=True,
        normalize_moe_lora=True,
        share_expert_adapters=False,
        lora_a_init_method="kaiming",
        lora_b_init_method="normal",
        fused=False,
        exclude_modules=("linear_fc2",),
        dtype="float64",
        seed=5,
    )
    found = adapter_method(config)
    assert type(found) is method
    assert (found.dim, found.alpha, found.use_rslora, found.seed) == (6, 9, True, 5)
    assert (found.dropout, found.dropout_recompute, found.fused) == (0.25, True, False)
    assert found.keep_token_shards
    assert (found.lora_A_init_method, found.lora_B_init_method) == ("kaiming", "normal")
    assert (found.normalize_moe_lora, found.share_expert_adapters) == (True, False)
    assert found.exclude_modules == ["linear_fc2"]
    assert found.lora_dtype is torch.float64
    assert adapter_method(replace(config, lora_dtype="bf16")).lora_dtype == "bf16"
    assert describe_targets(config) == "every linear layer but linear_fc2"


def test_without_targets_the_method_has_its_own() -> None:
    assert adapter_method(FinetuneConfig(method="canonical_lora")).target_modules == CanonicalLoRA().target_modules


def test_targets_and_exclusions_together_are_an_error() -> None:
    with pytest.raises(ConfigError, match="leave one out"):
        FinetuneConfig(target_modules=("linear_qkv",), exclude_modules=("linear_fc2",)).check()


def test_lora_plus_trains_b_faster() -> None:
    model = LoRA(target_modules=["0"], dim=2)(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    groups = adamw(model, lr=0.5, lr_ratio=4.0).param_groups
    rates = {tuple(p.shape): group["lr"] for group in groups for p in group["params"] if layout_of_tensor(p)}
    assert rates == {(2, 4): 0.5, (4, 2): 2.0}
    assert sorted(group["lr_ratio"] for group in groups) == [1.0, 4.0]
