"""Small fine-tunes of a model with experts for the oracle, and routings that leave experts without a token."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from helpers.oracle_runs import OPTIONS, moe_config, rows
from torch import nn

from meshpeft.models import Decoder, TopKRouter
from meshpeft.parallel import ModelParallelConfig
from meshpeft.peft import CanonicalLoRA, DoRA, LoRA
from meshpeft.verify.oracle import Layout, Trace, trace_layout

LAYERS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
PARTS = ["linear_q", "linear_v", "linear_proj", "linear_fc1_up", "linear_fc1_gate", "linear_fc2"]


def _methods() -> dict[str, Callable[[Any], nn.Module]]:
    found: dict[str, Callable[[Any], nn.Module]] = {}
    for name, shared in (("shared", True), ("per expert", False)):
        options: dict[str, Any] = {**OPTIONS, "share_expert_adapters": shared}
        found[f"lora, {name}"] = LoRA(LAYERS, **options)
        found[f"canonical_lora, {name}"] = CanonicalLoRA(PARTS, **options)
        found[f"dora, {name}"] = DoRA(LAYERS, **options)
        found[f"lora, {name}, standalone"] = LoRA(LAYERS, **options, fused=False)
        found[f"dora, {name}, standalone"] = DoRA(LAYERS, **options, fused=False)
    found["lora, routers"] = LoRA([*LAYERS, "router"], **OPTIONS, normalize_moe_lora=True)
    return found


METHODS = _methods()


def make_model(parallel: ModelParallelConfig | None = None) -> Decoder:
    """The base: the same values at every layout."""
    return Decoder(moe_config(), parallel, dtype=torch.float64)


def half_empty(parallel: ModelParallelConfig | None = None) -> Decoder:
    """The same, with routers that send no token to the first half of the experts.

    The others' logits are two values and their negatives, of which two are always above the zeros of the first half.
    """
    model = make_model(parallel)
    for module in model.modules():
        if isinstance(module, TopKRouter):
            with torch.no_grad():
                half = module.weight[: module.out_features // 4].clone()
                module.weight.copy_(torch.cat((torch.zeros_like(half), torch.zeros_like(half), half, -half)))
    return model


def run(
    layout: Layout,
    method: str,
    *,
    steps: int = 3,
    make: Callable[[ModelParallelConfig], Decoder] = make_model,
) -> Trace:
    """One fine-tune; the clip is below the first gradient norms, so that clipping is compared too."""
    return trace_layout(layout, make, METHODS[method], rows(), steps=steps, clip=0.5)


@cache
def one_rank(method: str, steps: int = 3, make: Callable[[ModelParallelConfig], Decoder] = make_model) -> Trace:
    """The same on one rank, one row at a time."""
    return run(Layout(), method, steps=steps, make=make)
