"""What real processes do in the tests of quantised bases; in a module of its own, so that they import little."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from meshpeft.checkpoint import load_checkpoint, save_checkpoint
from meshpeft.models import Decoder, load_pretrained
from meshpeft.parallel import ModelParallelConfig, finalize_gradients, init_parallelism, parallel_group_info
from meshpeft.peft import LoRA
from meshpeft.quantization import BaseQuantizer, svdquant_init

TARGETS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


def token_ids(seed: int = 0) -> Tensor:
    return torch.randint(1, 96, (2, 13), generator=torch.Generator().manual_seed(seed))


def packed_and_adapted(model: str) -> Decoder:
    """A float64 model packed as NF4, with adapters that start from what packing lost."""
    parallel = ModelParallelConfig(tensor_model_parallel_size=parallel_group_info().tp.world_size)
    quantize = BaseQuantizer("nf4", residual_rank=4)
    decoder = LoRA(TARGETS, dim=4, alpha=4)(load_pretrained(model, torch.float64, parallel, quantize=quantize))
    svdquant_init(decoder)
    return decoder


def train_and_save(model: str, folder: str, steps: int) -> Tensor:
    """Train with tensor parallel 2, save into `folder`, and return the logits."""
    init_parallelism(tensor_parallel=2)
    decoder = packed_and_adapted(model)
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


def packed_experts(model: str, ep: int) -> Decoder:
    """A float64 model with experts packed as NF4, and one adapter for each that starts from what packing lost."""
    parallel = ModelParallelConfig(expert_model_parallel_size=ep)
    quantize = BaseQuantizer("nf4", residual_rank=4, block_size=32)
    decoder = load_pretrained(model, torch.float64, parallel, quantize=quantize)
    LoRA(EXPERT_TARGETS, dim=4, alpha=4, share_expert_adapters=False)(decoder)
    svdquant_init(decoder)
    return decoder


def train_and_save_experts(model: str, folder: str, steps: int) -> ExpertLogits:
    """Train with expert parallel 2, each rank on a row of its own; save into `folder`."""
    info = init_parallelism(expert_parallel=2)
    decoder = packed_experts(model, 2)
    started = decoder(token_ids()).detach()
    optimizer = torch.optim.AdamW([p for p in decoder.parameters() if p.requires_grad], lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        decoder(token_ids(step % 3)[info.dp.rank : info.dp.rank + 1]).logsumexp(-1).mean().backward()
        finalize_gradients(decoder)
        optimizer.step()
    save_checkpoint(decoder, folder, step=steps, optimizer=optimizer)
    return ExpertLogits(started, decoder(token_ids()).detach())


def expert_logits(model: str, folder: str, ep: int) -> ExpertLogits:
    """Load what `train_and_save_experts` saved, at another expert-parallel size."""
    init_parallelism(expert_parallel=ep)
    decoder = packed_experts(model, ep)
    started = decoder(token_ids()).detach()
    load_checkpoint(decoder, folder)
    return ExpertLogits(started, decoder(token_ids()).detach())
