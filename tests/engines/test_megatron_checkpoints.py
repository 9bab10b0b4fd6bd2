"""Adapted Megatron models in Megatron's own checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.workers import run_on_ranks

from meshpeft.peft import PEFT, CanonicalLoRA, DoRA, LoRA

pytest.importorskip("megatron.core")
from helpers.megatron_checkpoints import Layout, save_and_load
from helpers.megatron_gpt import DENSE, EXPERTS

EVERY: dict[str, PEFT] = {"lora": LoRA(dim=4), "canonical": CanonicalLoRA(dim=4), "dora": DoRA(dim=4)}
SOME_LAYERS = LoRA(target_modules=["*.layers.1.*.linear_qkv", "*.layers.1.*.linear_fc2"], dim=4)
TP1, TP2, TP4, EP2 = Layout(), Layout(tp=2), Layout(tp=4), Layout(ep=2)


def check(world: int, *arguments: Any) -> None:
    """What was loaded is what was saved, each parameter and its momentum, on all ranks together."""
    results = run_on_ranks(world, save_and_load, *arguments)
    saved = {name: value for result, _ in results for name, value in result.items()}
    for _, loaded in results:
        assert len(loaded) > 0
        for name, value in loaded.items():
            assert torch.equal(value, saved[name]), name
    assert {name for _, loaded in results for name in loaded} == saved.keys()


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("saved_at, loaded_at", [(TP2, TP1), (TP1, TP2)])
def test_a_checkpoint_is_read_at_another_tensor_parallel_size(
    method: str, saved_at: Layout, loaded_at: Layout, tmp_path: Path
) -> None:
    check(2, EVERY[method], tmp_path, saved_at, loaded_at, DENSE, {})


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("saved_at, loaded_at", [(EP2, TP2), (Layout(tp=2, ep=2, etp=1), Layout(tp=2, etp=1))])
def test_adapters_of_experts_are_read_at_another_expert_parallel_size(
    method: str, saved_at: Layout, loaded_at: Layout, tmp_path: Path
) -> None:
    check(2, EVERY[method], tmp_path, saved_at, loaded_at, EXPERTS, {})


ON_GROUPS: dict[str, PEFT] = {
    f"{kind.__name__.lower()}, {'shared' if shared else 'own'}": kind(dim=4, share_expert_adapters=shared)
    for kind in (LoRA, DoRA)
    for shared in (True, False)
}


@pytest.mark.parametrize("method", ["lora, shared", pytest.param("dora, own", marks=pytest.mark.slow)])
def test_adapters_of_grouped_experts_are_read_at_another_size(method: str, tmp_path: Path) -> None:
    check(2, ON_GROUPS[method], tmp_path, EP2, TP2, EXPERTS, {}, True)


@pytest.mark.slow
@pytest.mark.parametrize("method", ON_GROUPS)
@pytest.mark.parametrize(
    "saved_at, loaded_at", [(Layout(ep=4), Layout(tp=2, ep=2, etp=2)), (Layout(tp=4, ep=2, etp=2), Layout(ep=2))]
)
def test_adapters_of_grouped_experts_are_read_on_more_ranks(
    method: str, saved_at: Layout, loaded_at: Layout, tmp_path: Path
) -> None:
    check(4, ON_GROUPS[method], tmp_path, saved_at, loaded_at, EXPERTS, {}, True)


def test_adapters_on_some_layers_need_layers_of_their_own_in_the_checkpoint(tmp_path: Path) -> None:
    check(2, SOME_LAYERS, tmp_path, TP2, TP1, DENSE, {"non_homogeneous_layers": True})


@pytest.mark.slow
@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("saved_at, loaded_at", [(TP2, TP4), (TP4, TP1)])
def test_a_checkpoint_is_read_on_more_ranks(method: str, saved_at: Layout, loaded_at: Layout, tmp_path: Path) -> None:
    check(4, EVERY[method], tmp_path, saved_at, loaded_at, DENSE, {})


@pytest.mark.slow
@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize(
    "saved_at, loaded_at", [(Layout(ep=4), Layout(tp=2, ep=2, etp=2)), (EP2, Layout(tp=2, ep=4, etp=1))]
)
def test_adapters_of_experts_are_read_on_more_ranks(
    method: str, saved_at: Layout, loaded_at: Layout, tmp_path: Path
) -> None:
    check(4, EVERY[method], tmp_path, saved_at, loaded_at, EXPERTS, {})
