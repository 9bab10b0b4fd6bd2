"""Adapters on the small models, with random values in every factor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from meshpeft.models import Decoder, load_pretrained
from meshpeft.peft import LoRA

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

EVERYTHING = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


def adapted(base: Path, targets: list[str] | None = None, dim: int = 4, **options: object) -> Decoder:
    """A float64 model with LoRA adapters that change its output, the same values at every layout."""
    method = LoRA(
        target_modules=EVERYTHING if targets is None else targets,
        dim=dim,
        alpha=2 * dim,
        lora_B_init_method="normal",
        **options,  # type: ignore[arg-type]
    )
    return method(load_pretrained(base, torch.float64))


def peft_adapted(model: PreTrainedModel, seed: int = 0, **options: object) -> PeftModel:
    """The same made by peft, with random values in every factor."""
    from peft import LoraConfig, get_peft_model  # not above: workers import this module too, and need no peft

    adapter = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapter


def share_a(model: nn.Module, groups: tuple[tuple[str, ...], ...] = (("q", "k", "v"), ("gate", "up"))) -> None:
    """Let the A factors of what is one fused layer of ours be equal, in a peft model."""
    parameters = dict(model.named_parameters())
    for first, *others in groups:
        for name, parameter in parameters.items():
            if f".{first}_proj.lora_A" in name:
                for other in others:
                    with torch.no_grad():
                        parameters[name.replace(f"{first}_proj", f"{other}_proj")].copy_(parameter)
