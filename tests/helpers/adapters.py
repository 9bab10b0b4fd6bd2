"""Adapters on the small models, with random values in every factor."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from meshpeft.models import Decoder, load_pretrained
from meshpeft.parallel import layout_of_tensor
from meshpeft.parallel.init import draw_full
from meshpeft.peft import CanonicalLoRA, DoRA, LoRA, LowRankPEFT

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

EVERYTHING = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
METHODS: dict[str, type[LowRankPEFT]] = {"lora": LoRA, "canonical_lora": CanonicalLoRA, "dora": DoRA}


def adapted(
    base: Path, targets: list[str] | None = None, dim: int = 4, method: str = "lora", **options: Any
) -> Decoder:
    """A float64 model with adapters that change its output, the same values at every layout."""
    if targets is not None:
        options["target_modules"] = targets
    make = METHODS[method](dim=dim, alpha=2 * dim, lora_B_init_method="normal", **options)
    model = make(load_pretrained(base, torch.float64))
    for name, parameter in model.named_parameters():
        if name.endswith("weight_magnitude"):  # which start at the norms, where they do nothing
            layout = layout_of_tensor(parameter)
            assert layout is not None
            noise = draw_full(layout.global_shape, lambda full: full.uniform_(0.5, 1.5), zlib.crc32(name.encode()))
            with torch.no_grad():
                parameter.mul_(layout.slice(noise))
    return model


def peft_adapted(model: PreTrainedModel, seed: int = 0, **options: object) -> PeftModel:
    """The same made by peft, with random values in every factor."""
    from peft import LoraConfig, get_peft_model  # not above: workers import this module too, and need no peft

    adapter = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if "lora_magnitude" in name:
                parameter.mul_(1 + noise)
            elif "lora_" in name:
                parameter.copy_(noise)
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
