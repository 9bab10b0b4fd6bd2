"""Adapters on GPT-2's layers, whose weights are stored transposed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.peft_files import with_peft
from helpers.tiny_models import random_ids, reference, save_tiny
from torch import nn
from transformers.pytorch_utils import Conv1D

from meshpeft.checkpoint import export_peft_adapter, load_peft_adapter, merge_adapter
from meshpeft.models import load_transformers
from meshpeft.peft import DoRA, LoRA
from meshpeft.quantization import QuantizationError, pissa_init

# Float64, sums in another order.
CLOSE = {"rtol": 0.0, "atol": 1e-11}


@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_they_are_those_of_peft_and_are_merged(tmp_path: Path, method: type[LoRA | DoRA]) -> None:
    base, ids = save_tiny("gpt2", tmp_path / "base"), random_ids()
    model = load_transformers(base, torch.float64)
    method(target_modules=["c_attn", "c_fc", "c_proj"], dim=4, lora_B_init_method="normal")(model, training=False)
    export_peft_adapter(model, tmp_path / "adapter", base_model_name_or_path=str(base))
    with torch.no_grad():
        adapted, plain = model(ids), reference(base)(ids).logits
        assert (adapted - plain).abs().max() > 1e-2
        torch.testing.assert_close(with_peft(base, tmp_path / "adapter")(ids).logits, adapted, **CLOSE)
        loaded = load_peft_adapter(load_transformers(base, torch.float64), tmp_path / "adapter")
        torch.testing.assert_close(loaded(ids), adapted, **CLOSE)
        merge_adapter(model, tmp_path / "merged")
        torch.testing.assert_close(reference(tmp_path / "merged")(ids).logits, adapted, **CLOSE)


def test_under_autocast_an_adapted_layer_returns_the_type_of_its_base() -> None:
    model, x = LoRA(target_modules=["*"], dim=2)(nn.ModuleDict({"c_fc": Conv1D(8, 4)})), torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert model["c_fc"](x).dtype == model["c_fc"].to_wrap(x).dtype == torch.bfloat16


def test_an_adapter_that_takes_a_part_of_the_weight_is_refused(tmp_path: Path) -> None:
    model = LoRA(target_modules=["c_attn"], dim=4)(load_transformers(save_tiny("gpt2", tmp_path)))
    with pytest.raises(QuantizationError, match="a Conv1D of this kind stores in another form than it uses"):
        pissa_init(model)
