"""Adapted Megatron models in Megatron's own checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.workers import run_on_ranks

from meshpeft.peft import PEFT, CanonicalLoRA, DoRA, LoRA

pytest.importorskip("megatron.core")
from helpers.megatron_checkpoints import save_and_load

EVERY: dict[str, PEFT] = {"lora": LoRA(dim=4), "canonical": CanonicalLoRA(dim=4), "dora": DoRA(dim=4)}
SOME_LAYERS = LoRA(target_modules=["*.layers.1.*.linear_qkv", "*.layers.1.*.linear_fc2"], dim=4)


def check(world: int, *arguments: Any) -> None:
    for saved, loaded in run_on_ranks(world, save_and_load, *arguments):
        assert saved.keys() == loaded.keys()
        assert len(saved) > 0
        for name, value in saved.items():
            assert torch.equal(loaded[name], value), name


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("saved_at, loaded_at", [(2, 1), (1, 2)])
def test_a_checkpoint_is_read_at_another_tensor_parallel_size(
    method: str, saved_at: int, loaded_at: int, tmp_path: Path
) -> None:
    check(2, EVERY[method], tmp_path, saved_at, loaded_at, {})


def test_adapters_on_some_layers_need_layers_of_their_own_in_the_checkpoint(tmp_path: Path) -> None:
    check(2, SOME_LAYERS, tmp_path, 2, 1, {"non_homogeneous_layers": True})


@pytest.mark.slow
@pytest.mark.parametrize("method", EVERY)
def test_a_checkpoint_is_read_on_more_ranks(method: str, tmp_path: Path) -> None:
    check(4, EVERY[method], tmp_path, 2, 4, {})
