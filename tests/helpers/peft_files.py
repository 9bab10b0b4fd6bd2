"""Adapters as peft's files: loaded by peft itself, and changed for tests of bad input."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from helpers.tiny_models import reference
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def with_peft(base: Path, adapter: Path) -> peft.PeftModel:
    """The adapter on transformers' model; every key of the file has its place and every place its key."""
    with warnings.catch_warnings():
        # It looks for patterns among modules only, and then finds them among parameters all the same.
        warnings.filterwarnings("ignore", message=".*pattern keys did not match", category=RuntimeWarning)
        model = peft.PeftModel.from_pretrained(reference(base), adapter)
        result = model.load_adapter(adapter, "again")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if ".lora_" in key and ".again." in key]
    return model


def served(base: Path, adapter: Path) -> PreTrainedModel:
    """transformers' model with an adapter in its weights as servers compute it: one scale for the whole file.

    What vLLM's PEFTHelper and SGLang's LoRAAdapter take of a config is `r` and `lora_alpha`; SGLang's buffers take
    matrices of rank `r` only. Magnitudes they do not serve; they are here so that DoRA's files are read the same way.
    """
    model, config = reference(base), json.loads((adapter / CONFIG).read_text())
    for unread in ("rank_pattern", "alpha_pattern", "use_rslora"):
        assert not config.get(unread), f"{unread} is passed over, or refused"
    scale, rank, tensors = config["lora_alpha"] / config["r"], config["r"], load_file(adapter / WEIGHTS)
    parameters = dict(model.named_parameters())
    for key, a in tensors.items():
        module, is_a, _ = key.removeprefix("base_model.model.").partition(".lora_A.weight")
        if not is_a:
            continue
        b, m = (
            tensors[key.replace("lora_A", "lora_B")],
            tensors.get(key.replace("lora_A.weight", "lora_magnitude_vector")),
        )
        module = module.replace("block_sparse_moe", "mlp")
        one, all_of_them = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)", module), module.partition(".experts")
        if one is not None:
            name, rows = {
                "w1": ("gate_up_proj", 0), "gate_proj": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1),
                "up_proj": ("gate_up_proj", 1), "w2": ("down_proj", 0), "down_proj": ("down_proj", 0),
            }[one[3]]  # fmt: skip
            weight = parameters[f"{one[1]}.{name}"][int(one[2])].split(b.shape[0])[rows]
        elif all_of_them[1]:
            name = "gate_up_proj" if module.endswith("base_layer") else "down_proj"
            weight = parameters[f"{all_of_them[0]}.experts.{name}"]
            a = a.view(weight.shape[0], -1, a.shape[1])
            b = b.view(b.shape[0], -1, weight.shape[0]).permute(2, 0, 1)
        else:
            weight = parameters[f"{module}.weight"]
        assert a.shape[-2] == b.shape[-1] == rank
        with torch.no_grad():
            weight.add_((scale * b.double() @ a.double()).to(weight.dtype))
            if m is not None:
                weight.mul_(m.unsqueeze(-1) / weight.norm(dim=-1, keepdim=True))
    return model


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
