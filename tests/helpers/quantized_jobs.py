"""What real processes do in the tests of quantised bases; in a module of its own, so that they import little."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from meshpeft.checkpoint import load_checkpoint, save_checkpoint
from meshpeft.models import Decoder, load_pretrained
from meshpeft.parallel import ModelParallelConfig, finalize_gradients, init_parallelism, parallel_group_info
from meshpeft.peft import LoRA
from meshpeft.quantization import BaseQuantizer, pissa_init, svdquant_init

TARGETS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


def token_ids(seed: int = 0) -> Tensor:
    return torch.randint(1, 96, (2, 13), generator=torch.Generator().manual_seed(seed))


# How adapters start, and what packs their base; by name, for real processes.
STARTS = {
    "svdquant": BaseQuantizer("nf4", residual_rank=4),
    "pissa": None,
    "packed pissa": BaseQuantizer("nf4", principal_rank=4),
}


def adapted(model: str, start: str) -> Decoder:
    """A float64 model with adapters that start from its weights, or from what packing lost."""
    parallel = ModelParallelConfig(tensor_model_parallel_size=parallel_group_info().tp.world_size)
    decoder = LoRA(TARGETS, dim=4, alpha=4)(load_pretrained(model, torch.float64, parallel, quantize=STARTS[start]))
    (svdquant_init if start == "svdquant" else pissa_init)(decoder)
    return decoder


def train_and_save(model: str, folder: str, steps: int, start: str) -> Tensor:
    """Train with tensor parallel 2, save into `folder`, and return the logits."""
    init_parallelism(tensor_parallel=2)
    decoder = adapted(model, start)
    optimizer = torch.optim.AdamW([p for p in decoder.parameters() if p.requires_grad], lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        decoder(token_ids(step % 3), gather_logits=True).logsumexp(-1).mean().backward()
        finalize_gradients(decoder)
        optimizer.step()
    save_checkpoint(decoder, folder, step=steps, optimizer=optimizer)
    return decoder(token_ids(), gather_logits=True).detach()


class ExpertLogits(NamedTuple):
    """Of one batch: with adapters as they start, and as they are after training or loading."""

    started: Tensor
    trained: Tensor


EXPERT_TARGETS = [*TARGETS[:2], "*.experts.linear_fc1", "*.experts.linear_fc2"]


def adapted_experts(model: str, ep: int, start: str) -> Decoder:
    """A float64 model with experts, and one adapter for each, in blocks of 32."""
    parallel = ModelParallelConfig(expert_model_parallel_size=ep)
    quantize = STARTS[start] and replace(STARTS[start], block_size=32)
    decoder = load_pretrained(model, torch.float64, parallel, quantize=quantize)
    LoRA(EXPERT_TARGETS, dim=4, alpha=4, share_expert_adapters=False)(decoder)
    (svdquant_init if start == "svdquant" else pissa_init)(decoder)
    return decoder


def train_and_save_experts(model: str, folder: str, steps: int, start: str) -> ExpertLogits:
    """Train with expert parallel 2, each rank on a row of its own; save into `folder`."""
    info = init_parallelism(expert_parallel=2)
    decoder = adapted_experts(model, 2, start)
    started = decoder(token_ids()).detach()
    optimizer = torch.optim.AdamW([p for p in decoder.parameters() if p.requires_grad], lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        decoder(token_ids(step % 3)[info.dp.rank : info.dp.rank + 1]).logsumexp(-1).mean().backward()
        finalize_gradients(decoder)
        optimizer.step()
    save_checkpoint(decoder, folder, step=steps, optimizer=optimizer)
    return ExpertLogits(started, decoder(token_ids()).detach())


def expert_logits(model: str, folder: str, ep: int, start: str) -> ExpertLogits:
    """Load what `train_and_save_experts` saved, at another expert-parallel size."""
    init_parallelism(expert_parallel=ep)
    decoder = adapted_experts(model, ep, start)
    started = decoder(token_ids()).detach()
    load_checkpoint(decoder, folder)
    return ExpertLogits(started, decoder(token_ids()).detach())
