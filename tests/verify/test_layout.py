from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from meshpeft.models import DecoderConfig, ModelError
from meshpeft.parallel.layer_layout import LinearLayout
from meshpeft.peft import LoRA
from meshpeft.verify import verify_layout

# A window in every other layer, and as many heads over groups as a real model's.
CONFIG = DecoderConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    sliding_windows=(None, 4096) * 16,
)


def adapt(model: Any) -> nn.Module:
    return LoRA(dim=4, lora_B_init_method="normal", lora_dtype=torch.float64)(model)


def test_a_right_layout_is_exact() -> None:
    verdict = verify_layout(CONFIG, adapt, tp=4, dp=128, sequence_parallel=True, steps=2)
    assert verdict.is_exact, verdict
    assert verdict.states == {"dp": "P", "tp": "I"}
    assert set(verdict.errors) == {"loss", "grad_norm", "gradient", "weight", "export"}


def test_a_wrong_layout_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LinearLayout, "_b_is_partial", lambda self: False)
    with pytest.MonkeyPatch.context() as patch:
        # Only the numbers are asked here; the type check would already refuse it.
        patch.setattr("meshpeft.verify.layout.typecheck_layout", lambda *args, **kwargs: {})
        assert not verify_layout(CONFIG, adapt, tp=2, steps=1).is_exact


def test_sizes_that_do_not_divide_are_an_error() -> None:
    with pytest.raises(ModelError, match="8 query groups"):
        verify_layout(CONFIG, adapt, tp=16)
