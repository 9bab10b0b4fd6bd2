"""Adapters of Megatron models in Hugging Face PEFT's files: those of our decoder, whose layers have these names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.workers import run_on_ranks
from safetensors.torch import load_file

from meshpeft.checkpoint import export_peft_adapter
from meshpeft.peft import PEFT, CanonicalLoRA, DoRA, LoRA

pytest.importorskip("megatron.core")
from helpers import megatron_models as models
from helpers.megatron_gpt import DENSE, EXPERTS, make_decoder

OPTIONS: dict[str, Any] = {"dim": 4, "alpha": 8, "lora_B_init_method": "normal"}
METHODS: dict[str, PEFT] = {"lora": LoRA(**OPTIONS), "canonical": CanonicalLoRA(**OPTIONS), "dora": DoRA(**OPTIONS)}
ROUTED = LoRA(target_modules=["*.experts.linear_fc1", "*.experts.linear_fc2", "linear_qkv", "router"], **OPTIONS)
OWN = LoRA(target_modules=["*.experts.linear_fc1", "*.experts.linear_fc2"], share_expert_adapters=False, **OPTIONS)
TP2 = {"tensor_model_parallel_size": 2}
CASES: dict[str, tuple[PEFT, dict[str, Any], Any]] = {
    **{name: (method, {}, DENSE) for name, method in METHODS.items()},
    "grouped experts": (ROUTED, {"sequence_parallel": True, "grouped": True}, EXPERTS),
    "each of grouped experts": (OWN, {"sequence_parallel": True, "grouped": True}, EXPERTS),
}


SLOW = ("canonical", "each of grouped experts")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]
)
def test_the_file_is_that_of_our_decoder_and_is_read_back(name: str, tmp_path: Path) -> None:
    method, options, config = CASES[name]
    for exported, loaded in run_on_ranks(2, models.exported, method, TP2, options, config, tmp_path / "megatron"):
        torch.testing.assert_close(loaded, exported, rtol=0, atol=1e-12 * float(exported.abs().max()))
    export_peft_adapter(method(make_decoder(config)), tmp_path / "decoder")
    mine, theirs = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("megatron", "decoder"))
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        # Factors start from the same values; DoRA's norms are summed in another order.
        torch.testing.assert_close(mine[key], value, rtol=1e-14, atol=0)
    configs = [json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("megatron", "decoder")]
    assert configs[0] == configs[1]


def test_what_would_not_be_whole_is_not_exported(tmp_path: Path) -> None:
    for part, sequential, stage in run_on_ranks(2, models.refused_exports, LoRA(**OPTIONS), tmp_path):
        assert "a TransformerBlock is no model that Hugging Face has" in part
        assert "local_experts.0.linear_fc1: a LoRALinear on a ColumnParallelLinear has no counterpart" in sequential
        assert "a pipeline with 2 stages" in stage
    assert not (tmp_path / "adapter_config.json").exists()
