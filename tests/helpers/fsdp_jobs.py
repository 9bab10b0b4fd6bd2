"""Training under PyTorch's `fully_shard`, on ranks that have rows of their own."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from transformers import AutoModelForCausalLM

from meshpeft.checkpoint import CheckpointError, export_peft_adapter, load_peft_adapter, merge_adapter, save_checkpoint
from meshpeft.peft import DoRA, LoRA

TARGETS = ["q_proj", "down_proj"]


def made(base: str, method: str) -> nn.Module:
    """A model of transformers with adapters, of two ranks for LoRA."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    options = {"target_modules": TARGETS, "dim": 4, "lora_B_init_method": "normal"}
    if method == "dora":
        return DoRA(**options)(model)
    return LoRA(**options, rank_pattern={"q_proj": 3}, lora_dtype=torch.float64)(model)


def trained(model: nn.Module, rows: list[Tensor]) -> nn.Module:
    """After two steps on rows whose loss is the mean over ranks."""
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=0.01)
    for row in rows:
        model(input_ids=row, labels=row).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def export_under_fsdp(base: str, folder: str, method: str, rows: list[Tensor]) -> list[str]:
    """Train, export, load into it and export again; the errors of what is refused."""
    rank, model = dist.get_rank(), made(base, method)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    trained(model, [row[rank : rank + 1] for row in rows])
    with torch.no_grad():
        model(input_ids=rows[0])  # which leaves the root's parameters gathered
    export_peft_adapter(model, Path(folder) / "first")
    for value in model.parameters():
        if value.requires_grad:
            nn.init.zeros_(value)
    load_peft_adapter(model, Path(folder) / "first")
    export_peft_adapter(model, Path(folder) / "again")
    assert all(isinstance(layer, FSDPModule) for layer in model.model.layers)
    errors = []
    for refused in (lambda: save_checkpoint(model, folder, step=1), lambda: merge_adapter(model)):
        try:
            refused()
        except CheckpointError as error:
            errors.append(str(error))
    return errors


def export_under_fsdp1(base: str, folder: str) -> str:
    """The error of an export under the older FullyShardedDataParallel; its summoned parameters are exported."""
    model = FullyShardedDataParallel(made(base, "lora"), use_orig_params=True, device_id=torch.device("cpu"))
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        export_peft_adapter(model, Path(folder) / "summoned")
    dist.barrier()
    try:
        export_peft_adapter(model, Path(folder) / "flat")
    except CheckpointError as error:
        return str(error)
    return ""
