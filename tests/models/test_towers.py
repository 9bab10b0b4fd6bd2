"""What text does not reach is not in memory, and a merged model has it as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import random_ids
from helpers.transformers_float64 import in_float64
from helpers.workers import run_on_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from meshpeft.checkpoint import merge_adapter
from meshpeft.models import ModelError, load_transformers
from meshpeft.parallel import init_parallelism
from meshpeft.training.adapters import add_adapter
from meshpeft.training.config import FinetuneConfig

# Float64, sums in another order.
TOLERANCE = 1e-10
_IMAGES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "pad_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": _TEXT, "vision_config": _IMAGES, "mm_tokens_per_image": 1},
    "qwen3_5": {
        "text_config": {
            **_TEXT,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
                "partial_rotary_factor": 1.0,
            },
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "num_position_embeddings": 16,
        },
        "architectures": ["Qwen3_5ForConditionalGeneration"],
    },
}
TOWERS = {"gemma3": ("vision_tower", "multi_modal_projector"), "qwen3_5": ("visual",)}


@pytest.fixture(params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A model of images and text, of random values."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(request.param, **MODELS[request.param]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape) + ("norm" in name))
    model.save_pretrained(tmp_path / "base")
    return request.param, tmp_path / "base"


def of_towers(tensors: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if any(f"{tower}." in key for tower in TOWERS[family])}


def merged(directory: Path, to: Path, tp: int) -> tuple[Tensor, list[str]]:
    """Logits of a model with a merged adapter, which is written, and the names of all its tensors in memory."""
    init_parallelism(tensor_parallel=tp)
    model: Any = in_float64(load_transformers(directory, torch.float64))
    run = FinetuneConfig(rank=2, alpha=4, dtype="float64", lora_b_init_method="normal")
    merge_adapter(add_adapter(model, run), to)
    return model(random_ids(), gather_logits=True).detach(), list(model.state_dict())


@pytest.mark.parametrize("tp", [1, 2])
def test_a_merged_model_has_every_tensor_of_its_towers(saved: tuple[str, Path], tp: int, tmp_path: Path) -> None:
    family, directory = saved
    kept = of_towers(load_file(directory / "model.safetensors"), family)
    assert kept
    for logits, names in run_on_ranks(tp, merged, directory, tmp_path / "merged", tp):
        assert names and not of_towers(dict.fromkeys(names, torch.empty(0)), family)
        found = of_towers(load_file(tmp_path / "merged" / "model.safetensors"), family)
        assert found.keys() == kept.keys()
        assert all(torch.equal(found[key], value.double()) for key, value in kept.items())
        theirs: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float64).eval()
        tokens = {"input_ids": random_ids()}
        expected = in_float64(theirs)(**tokens).logits
        torch.testing.assert_close(logits, expected.detach(), rtol=TOLERANCE, atol=TOLERANCE)


def test_a_tower_that_lacks_a_tensor_is_refused(saved: tuple[str, Path]) -> None:
    family, directory = saved
    init_parallelism()
    held = load_file(directory / "model.safetensors")
    held.pop(next(iter(of_towers(held, family))))
    save_file(held, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"lacks model.({'|'.join(TOWERS[family])})[.].*, which a {family} model has"):
        load_transformers(directory)


def test_images_are_refused(saved: tuple[str, Path]) -> None:
    family, directory = saved
    init_parallelism()
    model: Any = load_transformers(directory)
    with pytest.raises(ModelError, match="is not in memory: this model was read for text"):
        model.model.get_submodule(TOWERS[family][0])(torch.zeros(1, 3, 28, 28))
