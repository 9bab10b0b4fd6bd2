"""Adapters on layers of Megatron models that every tensor-parallel rank holds."""

from __future__ import annotations

from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.workers import run_on_ranks

from meshpeft.peft import CanonicalLoRA, DoRA, LoRA, update_model

pytest.importorskip("megatron.core.post_training")
from helpers.megatron_mla import refused, save_and_load_mla, train_mla
from helpers.megatron_runs import Run, assert_same

TOLERANCE = 1e-10
TARGETS = ["linear_q_down_proj", "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj", "plain"]
OPTIONS: dict[str, Any] = {"target_modules": TARGETS, "dim": 4, "alpha": 8, "lora_B_init_method": "normal"}
DOWN = LoRA(**OPTIONS | {"target_modules": ["linear_q_down_proj", "linear_kv_down_proj"]})
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
PATTERNS = {"*": {"rank": 4, "lora_b_init": "torch.nn.init.kaiming_uniform_"}, "*output_layer": {"enable": False}}
METHODS: dict[str, Any] = {
    "lora": LoRA(**OPTIONS),
    "canonical": CanonicalLoRA(**OPTIONS),
    "dora": DoRA(**OPTIONS),
    "patterns": partial(update_model, config={"adapter_cfg": PATTERNS}),
}


@cache
def reference(method: str, duplicated: bool) -> Run:
    [run] = run_on_ranks(1, train_mla, METHODS[method], 1, duplicated)
    return run


LAYOUTS = {
    "tokens": ({}, None),
    "sequence": ({"sequence_parallel": True}, True),
    "sequence, recomputed": ({"sequence_parallel": True, **RECOMPUTE}, True),
}


FAST = [("lora", True, "tokens"), ("lora", True, "sequence"), ("lora", False, "sequence"), ("dora", True, "sequence")]
REST = [each for each in product(METHODS, [True, False], LAYOUTS) if each not in FAST]


@pytest.mark.parametrize(
    "method, duplicated, layout", [*FAST, *(pytest.param(*each, marks=pytest.mark.slow) for each in REST)]
)
def test_down_projections_and_plain_layers_train_as_on_one_rank(method: str, duplicated: bool, layout: str) -> None:
    options, mark = LAYOUTS[layout]
    runs = run_on_ranks(2, train_mla, METHODS[method], 2, duplicated, mark, options)
    assert_same(runs, reference(method, duplicated), TOLERANCE)


def test_a_plain_layer_that_does_not_say_what_tokens_it_meets_is_refused_under_sequence_parallel() -> None:
    [found, other] = run_on_ranks(2, refused, METHODS["lora"], {"sequence_parallel": True})
    assert found == other
    assert "decoder.layers.0.pre_mlp_layernorm.plain is a plain Linear" in found
    assert "weight.sequence_parallel = True" in found
    assert run_on_ranks(2, refused, DOWN, {"sequence_parallel": True}) == ["", ""]


@pytest.mark.parametrize(
    "method", ["dora", "patterns", *(pytest.param(each, marks=pytest.mark.slow) for each in ("lora", "canonical"))]
)
def test_checkpoints_of_megatron_hold_adapters_as_slices(method: str, tmp_path: Path) -> None:
    for saved, loaded, common in run_on_ranks(2, save_and_load_mla, METHODS[method], tmp_path):
        assert common == []
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)
