"""Adapters on a Megatron model with experts: routed one after the other, shared ones, and the router."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from helpers.workers import run_on_ranks

from meshpeft.peft import PEFT, CanonicalLoRA, DoRA, LoRA

pytest.importorskip("megatron.core")
from helpers.megatron_gpt import EXPERTS
from helpers.megatron_models import routed_alike
from helpers.megatron_runs import Run, assert_same, train_decoder, train_decoder_one_by_one, train_gpt

# Float64, as in the tests of dense models.
TOLERANCE = 1e-10
OPTIONS: dict[str, Any] = {"dim": 4, "alpha": 8, "lora_B_init_method": "normal"}
ON_EXPERTS: dict[str, PEFT] = {
    "lora": LoRA(target_modules=["linear_fc1", "linear_fc2", "router"], **OPTIONS),
    "canonical": CanonicalLoRA(**OPTIONS),
    "dora": DoRA(**OPTIONS),
    "normalized": LoRA(target_modules=["linear_fc1", "linear_fc2"], normalize_moe_lora=True, **OPTIONS),
}
# Our decoder stacks its experts, and their adapters: what both have alike is around them.
AROUND_EXPERTS = LoRA(
    target_modules=[
        "linear_qkv",
        "linear_proj",
        "router",
        "*.shared_experts.linear_fc1",
        "*.shared_experts.linear_fc2",
    ],
    **OPTIONS,
)


def layout(tp: int = 1, ep: int = 1, etp: int | None = None, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sizes, and options: tensor parallel trains experts with sequence parallel only."""
    sizes = {
        "tensor_model_parallel_size": tp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
    }
    return sizes, options | {"sequence_parallel": tp > 1}


ONE = layout()
RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
ALLGATHER = {"moe_token_dispatcher_type": "allgather"}
# Megatron's own mark of the last but one would leave gradients unsummed: experts are whole on every rank, each with
# other tokens.
LAYOUTS = [
    layout(ep=2),
    layout(tp=2),
    layout(tp=2, ep=2, etp=1),
    layout(tp=2, etp=1),
    layout(tp=2, **RECOMPUTE),
    layout(tp=2, **ALLGATHER),
]
# With both kinds of expert parallel, gloo cannot gather what the all-to-all sent: numbers of tokens that differ.
SLOW = [
    layout(tp=2, ep=2, **ALLGATHER),
    layout(tp=2, ep=2, etp=1),
    layout(tp=2),
    layout(ep=4),
    layout(tp=4, ep=2, etp=2, **ALLGATHER),
    layout(tp=4, etp=2),
]


@cache
def decoder() -> Run:
    return train_decoder(AROUND_EXPERTS, EXPERTS)


@cache
def reference(method: str) -> Run:
    """Our decoder's run; of canonical adapters, which no stacked experts have, that of Megatron's model on one rank."""
    if method == "canonical":
        run: Run = run_on_ranks(2, train_gpt, ON_EXPERTS[method], *ONE, EXPERTS)[0]
        return run
    return train_decoder_one_by_one(replace(ON_EXPERTS[method], share_expert_adapters=False), EXPERTS)


@pytest.mark.parametrize("sizes, options", [ONE, *LAYOUTS])
def test_a_model_with_experts_trains_as_our_decoder(sizes: dict[str, Any], options: dict[str, Any]) -> None:
    assert_same(run_on_ranks(2, train_gpt, AROUND_EXPERTS, sizes, options, EXPERTS), decoder(), TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("sizes, options", SLOW)
def test_a_model_with_experts_trains_on_four_ranks_too(sizes: dict[str, Any], options: dict[str, Any]) -> None:
    assert_same(run_on_ranks(4, train_gpt, AROUND_EXPERTS, sizes, options, EXPERTS), decoder(), TOLERANCE)


FAST = [("lora", *sizes) for sizes in LAYOUTS] + [
    (method, *layout(tp=2)) for method in ("canonical", "dora", "normalized")
]


@pytest.mark.parametrize("method, sizes, options", FAST)
def test_adapters_of_experts_train_as_those_of_our_decoder(
    method: str, sizes: dict[str, Any], options: dict[str, Any]
) -> None:
    runs = run_on_ranks(2, train_gpt, ON_EXPERTS[method], sizes, options, EXPERTS)
    assert_same(runs, reference(method), TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("method", ON_EXPERTS)
@pytest.mark.parametrize("sizes, options", SLOW)
def test_on_four_ranks_too(method: str, sizes: dict[str, Any], options: dict[str, Any]) -> None:
    runs = run_on_ranks(4, train_gpt, ON_EXPERTS[method], sizes, options, EXPERTS)
    assert_same(runs, reference(method), TOLERANCE)


ROUTERS: dict[str, dict[str, Any]] = {
    "random logits": {"moe_router_force_load_balancing": True},
    "jitter": {"moe_input_jitter_eps": 0.1},
    "losses": {"moe_z_loss_coeff": 0.1, "moe_aux_loss_coeff": 0.1, "moe_router_load_balancing_type": "aux_loss"},
    "bias": {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"},
    "type": {"moe_router_dtype": "fp32"},
    "dropped tokens": {"moe_expert_capacity_factor": 1.0},
    "sinkhorn": {"moe_router_load_balancing_type": "sinkhorn"},
}


@pytest.mark.parametrize("name", [*ROUTERS, "losses, masked"])
def test_a_router_with_an_adapter_does_whatever_else_the_router_does(name: str) -> None:
    method = LoRA(target_modules=["router"], dim=2)  # B is zero: the logits are the router's
    options, _, masked = name.partition(", ")
    assert run_on_ranks(1, routed_alike, method, ROUTERS[options], bool(masked)) == [True]
