"""Adapters on Megatron's grouped experts: its own modules, with stand-ins for Transformer Engine's grouped layers."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from helpers.workers import run_on_ranks

from meshpeft.peft import PEFT, DoRA, LoRA
from meshpeft.verify.simulation import Collective

pytest.importorskip("megatron.core")
from helpers import megatron_models as models
from helpers.megatron_gpt import EXPERTS
from helpers.megatron_runs import Run, assert_same, collectives_of, train_decoder, train_gpt

# Float64, as in the tests of dense models.
TOLERANCE = 1e-10
OPTIONS: dict[str, Any] = {"dim": 4, "alpha": 8, "lora_B_init_method": "normal"}
ON_EXPERTS = ["*.experts.linear_fc1", "*.experts.linear_fc2"]
METHODS: dict[str, PEFT] = {
    f"{kind.__name__.lower()}, {'shared' if shared else 'own'}": kind(
        target_modules=[*ON_EXPERTS, "linear_qkv", "linear_proj"], share_expert_adapters=shared, **OPTIONS
    )
    for kind in (LoRA, DoRA)
    for shared in (True, False)
}


def layout(tp: int = 1, ep: int = 1, etp: int | None = None, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sizes, and options: tensor parallel trains experts with sequence parallel only."""
    sizes = {
        "tensor_model_parallel_size": tp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
    }
    return sizes, options | {"sequence_parallel": tp > 1, "grouped": True}


ALLGATHER = {"moe_token_dispatcher_type": "allgather"}
TWO_RANKS = [layout(), layout(ep=2), layout(tp=2), layout(tp=2, ep=2, etp=1), layout(tp=2, etp=1)]
# What one adapter for all experts needs, over both axes; and a magnitude whose gradient is partial.
FAST = [
    ("lora, shared", *layout(tp=2, ep=2, etp=1)),
    ("lora, own", *layout(ep=2)),
    ("dora, own", *layout(tp=2)),
]
# With both kinds of expert parallel, gloo cannot gather what the all-to-all sent: numbers of tokens that differ.
SLOW = [
    layout(ep=4),
    layout(ep=2),
    layout(tp=2, ep=2, etp=1),
    layout(tp=2, ep=2, **ALLGATHER),
    layout(tp=4, ep=2, etp=2, **ALLGATHER),
    layout(tp=4, etp=2),
    layout(tp=4, ep=4, etp=1),
    layout(tp=4),
]


@cache
def decoder(method: str) -> Run:
    return train_decoder(METHODS[method], EXPERTS)


def check(world: int, method: str, sizes: dict[str, Any], options: dict[str, Any]) -> None:
    assert_same(run_on_ranks(world, train_gpt, METHODS[method], sizes, options, EXPERTS), decoder(method), TOLERANCE)


@pytest.mark.parametrize("method, sizes, options", FAST)
def test_adapters_of_grouped_experts_train_as_on_our_decoder(
    method: str, sizes: dict[str, Any], options: dict[str, Any]
) -> None:
    check(2, method, sizes, options)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sizes, options", TWO_RANKS)
def test_every_method_does_on_two_ranks(method: str, sizes: dict[str, Any], options: dict[str, Any]) -> None:
    check(2, method, sizes, options)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sizes, options", SLOW)
def test_on_four_ranks_too(method: str, sizes: dict[str, Any], options: dict[str, Any]) -> None:
    check(4, method, sizes, options)


def summed_by(allreduce: bool, *, tp: bool = False, divided: bool = False, shared: bool = False) -> dict[str, bool]:
    return {
        "allreduce": allreduce,
        "sequence_parallel": tp,
        "tensor_model_parallel": divided or not allreduce,
        "shared": shared,
    }


# Hidden size 16, experts 12 wide, 4 of them. What sums the gradients of one adapter for all experts: the data parallel
# of dense layers where that is over the experts' ranks, too; with their tensor parallel where it is over all; otherwise
# that of experts, after the backward pass has summed over expert parallel.
SHARED = METHODS["lora, shared"]
SUMS = [
    (2, layout(ep=2), [summed_by(True)] * 2, [summed_by(True)] * 2),
    (2, layout(tp=2), [summed_by(True, tp=True)] * 2, [summed_by(True, divided=True)] * 2),
    (2, layout(tp=2, ep=2, etp=1), [summed_by(True, tp=True)] * 2, [summed_by(True, tp=True)] * 2),
    pytest.param(
        4,
        layout(tp=4, ep=2, etp=2),
        [summed_by(True, tp=True)] * 4,
        # Ranks 0 and 2, 1 and 3 hold the same halves.
        [summed_by(False, divided=True, shared=rank >= 2) for rank in range(4)],
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("world, where, of_a, of_b", SUMS)
def test_megatron_is_told_what_sums_the_adapter_of_all_experts(
    world: int, where: tuple[dict[str, Any], dict[str, Any]], of_a: Any, of_b: Any
) -> None:
    got = run_on_ranks(world, models.grouped_layer, SHARED, where[0])
    assert [rank["marks of A"] for rank in got] == of_a
    assert [rank["marks of B"] for rank in got] == of_b


# With B of zeros the routes, and so the numbers of tokens sent, are those of the base.
UNTRAINED = LoRA(target_modules=ON_EXPERTS, dim=4)


@pytest.mark.parametrize(
    "world, where, added",
    [
        # The dispatcher's collectives serve the adapters, and Megatron's finalisation sums their gradients.
        (2, layout(ep=2), Counter()),
        (2, layout(tp=2), Counter()),
        # Four ranks hold each half of 24 and of 12 features: these two sums, over expert parallel, are the adapter's.
        pytest.param(
            4,
            layout(tp=4, ep=2, etp=2, **ALLGATHER),
            Counter({Collective("allreduce", 12 * 4): 2, Collective("allreduce", 6 * 4): 2}),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_adapters_of_grouped_experts_communicate_nothing_or_factors(
    world: int, where: tuple[dict[str, Any], dict[str, Any]], added: Counter[Collective]
) -> None:
    for adapted, base in run_on_ranks(world, collectives_of, UNTRAINED, *where, EXPERTS):
        assert (adapted - base, base - adapted) == (added, Counter())


def test_grouped_layers_are_recognised_by_their_attributes() -> None:
    for rank in run_on_ranks(2, models.grouped_layer, METHODS["lora, own"], layout(tp=2)[0]):
        assert rank["layout"] == (4, 16, 24, "out") and rank["fused_parts"] == ("gate", "up")
        assert (rank["weight"], rank["A"], rank["B"]) == ((4, 12, 16), (4, 4, 16), (4, 12, 4))
    for rank in run_on_ranks(2, models.grouped_layer, SHARED, layout(ep=2)[0]):
        assert (rank["weight"], rank["A"], rank["B"]) == ((2, 24, 16), (4, 16), (24, 4))


@pytest.mark.parametrize("method", ["lora, shared", "dora, own"])
@pytest.mark.parametrize("sizes, options", [layout(tp=2, ep=2, etp=1)])
def test_a_merged_model_computes_what_the_adapted_one_did(
    method: str, sizes: dict[str, Any], options: dict[str, Any]
) -> None:
    for adapted, merged, unmerged, left in run_on_ranks(2, models.merged_logits, METHODS[method], sizes, options):
        torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-12 * float(adapted.abs().max()))
        assert torch.equal(unmerged, adapted) and left == 0
