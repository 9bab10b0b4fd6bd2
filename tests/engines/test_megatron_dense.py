"""Adapters on a dense Megatron model, at every layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
from helpers.workers import run_on_ranks

from meshpeft.peft import CanonicalLoRA, DoRA, LoRA, update_model

pytest.importorskip("megatron.core")
from helpers.megatron_runs import Run, assert_same, train_decoder, train_gpt

# Float64, two orders of summation, and five steps of AdamW, which divides by small square roots: some 1e-14.
TOLERANCE = 1e-10
# B starts at random: with the usual zeros the first step would not see A at all.
OPTIONS: dict[str, Any] = {"dim": 4, "alpha": 8, "lora_B_init_method": "normal"}
PATTERNS = {
    "*": {"rank": 4, "scale": 2.0, "lora_b_init": "torch.nn.init.kaiming_uniform_"},
    "*output_layer": {"enable": False},
}
METHODS: dict[str, Callable[..., Any]] = {
    "lora": LoRA(**OPTIONS),
    "canonical": CanonicalLoRA(**OPTIONS),
    "dora": DoRA(**OPTIONS),
    "patterns": partial(update_model, config={"adapter_cfg": PATTERNS}),
}

SEQUENCE = {"sequence_parallel": True}
RECOMPUTE_ALL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
RECOMPUTE_SOME = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}
FAST = [(1, {}), (2, {}), (2, SEQUENCE), (2, RECOMPUTE_ALL), (2, SEQUENCE | RECOMPUTE_SOME)]
SLOW = [(1, RECOMPUTE_ALL), (4, {}), (4, SEQUENCE), (4, RECOMPUTE_SOME), (4, SEQUENCE | RECOMPUTE_ALL)]


@cache
def reference(method: str) -> Run:
    return train_decoder(METHODS[method])


def check(world: int, method: str, tensor_parallel: int, options: dict[str, Any]) -> None:
    sizes = {"tensor_model_parallel_size": tensor_parallel}
    assert_same(run_on_ranks(world, train_gpt, METHODS[method], sizes, options), reference(method), TOLERANCE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tensor_parallel, options", FAST)
def test_a_gpt_trains_as_our_decoder_on_one_rank(method: str, tensor_parallel: int, options: dict[str, Any]) -> None:
    check(2, method, tensor_parallel, options)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tensor_parallel, options", [(2, SEQUENCE), *SLOW])
def test_on_four_ranks_too(method: str, tensor_parallel: int, options: dict[str, Any]) -> None:
    check(4, method, tensor_parallel, options)
