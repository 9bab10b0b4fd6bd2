"""Adapters as peft's files: loaded by peft itself, and changed for tests of bad input."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
from helpers.tiny_models import reference
from safetensors.torch import load_file, save_file
from torch import Tensor

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


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
