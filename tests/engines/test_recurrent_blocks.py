"""Linear attention and state spaces, sharded by their groups of heads: the fine-tune of one process, and half of it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from helpers.tiny_models import config_of
from torch import nn

from meshpeft.engines.recurrent_blocks import recurrent_block
from meshpeft.models import make_transformers_model
from meshpeft.parallel import layout_of_tensor, sharded_state_dict
from meshpeft.training.adapters import add_adapter
from meshpeft.training.config import FinetuneConfig
from meshpeft.verify.simulation import simulate
from meshpeft.verify.transformers_layout import verify_transformers_layout

# Float64, sums in another order.
TOLERANCE = 1e-10
RUN = FinetuneConfig(rank=4, alpha=8, dtype="float64", share_expert_adapters=False, lora_b_init_method="normal")
DIVIDED = ("qwen3_next", "qwen3_5_text", "nemotron_h")
IN_FULL = ("falcon_h1", "granitemoehybrid")


def blocks(family: str, tp: int) -> dict[str, nn.Module]:
    with simulate(tp=tp):
        model: Any = make_transformers_model(config_of(family), torch.float32)
        return {
            name: module
            for name, module in model.named_modules()
            if isinstance(getattr(module, "conv1d", None), nn.Conv1d)
        }


@pytest.mark.parametrize("family", DIVIDED)
def test_each_rank_holds_its_slices_of_every_parameter(family: str) -> None:
    whole, local = blocks(family, 1), blocks(family, 2)
    assert whole and local.keys() == whole.keys()
    for name, block in whole.items():
        assert recurrent_block(block) is None  # its layers are parallel ones
        shapes = {own: tuple(parameter.shape) for own, parameter in local[name].named_parameters()}
        for own, parameter in block.named_parameters():
            layout = layout_of_tensor(dict(local[name].named_parameters())[own])
            assert layout is not None
            if layout.shards:
                assert torch.Size(shapes[own]).numel() * 2 == parameter.numel()
            else:  # a norm of each head
                assert own.endswith("norm.weight") and parameter.numel() < 64
        assert local[name].conv1d.groups * 2 == block.conv1d.groups  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("family", IN_FULL)
def test_groups_that_do_not_divide_are_held_in_full_under_the_same_names(family: str) -> None:
    """Fused parameters have their parts' names in a checkpoint, at one process and where they divide."""
    for whole, local in zip(blocks(family, 1).values(), blocks(family, 2).values(), strict=True):
        assert whole.conv1d.groups == local.conv1d.groups  # type: ignore[union-attr]
        assert sharded_state_dict(local).keys() == sharded_state_dict(whole).keys()


@pytest.mark.parametrize(
    "layout",
    [
        {"tp": 2},
        pytest.param({"tp": 2, "dp": 2, "activation_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"tp": 2, "sequence_parallel": True, "method": "dora"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", [*DIVIDED, *(pytest.param(name, marks=pytest.mark.slow) for name in IN_FULL)])
def test_the_fine_tune_is_that_of_one_process(family: str, layout: dict[str, Any]) -> None:
    """Adapters on the first layers and the last, too."""
    options = dict(layout)
    run = replace(RUN, method=options.pop("method", "lora"))
    found = verify_transformers_layout(config_of(family), partial(add_adapter, config=run), steps=2, **options)
    assert {check.name: check.error for check in found.checks if not check.error < TOLERANCE} == {}
