from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.faults import complete_beside
from torch import nn

from meshpeft.checkpoint.load import Incoming
from meshpeft.models import DecoderConfig, ModelError
from meshpeft.parallel import P
from meshpeft.peft import DoRA, LoRA, adapter
from meshpeft.peft.dora import RowNorms
from meshpeft.quantization import BaseQuantizer
from meshpeft.quantization.blocks import Blocks
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
SMALL = replace(CONFIG, num_layers=1, num_attention_heads=4, num_query_groups=2, head_dim=1024, sliding_windows=None)
CHECKS = ["loss", "grad_norm", "gradient", "weight", "held-out", "export", "merged", "resume"]
OPTIONS: dict[str, Any] = {"dim": 4, "lora_B_init_method": "normal", "lora_dtype": torch.float64}


def adapt(model: Any) -> nn.Module:
    return LoRA(**OPTIONS)(model)


def test_a_right_layout_is_exact() -> None:
    verdict = verify_layout(CONFIG, adapt, tp=4, dp=128, sequence_parallel=True, steps=2)
    assert verdict.is_exact, verdict
    assert verdict.states == {"dp": "P", "tp": "I"}
    assert list(verdict.errors) == CHECKS


def test_a_base_that_is_packed_and_masks_are_checked_when_the_run_has_them() -> None:
    verdict = verify_layout(SMALL, adapt, tp=2, all_layers=True, steps=1, dropout=0.1, quantizer=BaseQuantizer("nf4"))
    assert verdict.is_exact, verdict
    assert list(verdict.errors) == [*CHECKS, "masks", "packed"]
    assert verdict.errors["packed"] == 0


def test_a_wrong_layout_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    complete_beside(monkeypatch, P)
    with pytest.MonkeyPatch.context() as patch:
        # Only the numbers are asked here; the type check would already refuse it.
        patch.setattr("meshpeft.verify.layout.typecheck_layout", lambda *args, **kwargs: {})
        assert not verify_layout(CONFIG, adapt, tp=2, steps=1).is_exact


def test_sizes_that_do_not_divide_are_an_error() -> None:
    with pytest.raises(ModelError, match="8 query groups"):
        verify_layout(CONFIG, adapt, tp=16)


def stale_norms(patch: pytest.MonkeyPatch) -> None:
    right = RowNorms.get
    patch.setattr(RowNorms, "get", lambda self, *args: right(self, *args) if self._norms is None else self._norms)


def masks_alike_on_shards(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(adapter, "differs", lambda state: False)


def straddling_scales(patch: pytest.MonkeyPatch) -> None:
    """Every rank reads the first scales of its rows."""
    patch.setattr(Blocks, "_starts", lambda self: [0])


def moments_swapped(patch: pytest.MonkeyPatch) -> None:
    right, others = Incoming._state, {"exp_avg": "exp_avg_sq", "exp_avg_sq": "exp_avg"}
    patch.setattr(Incoming, "_state", lambda self, what, entries: right(self, others[what], entries))


@pytest.mark.parametrize(
    ("fault", "seen_in", "options"),
    (
        (stale_norms, {"merged"}, {"method": DoRA}),
        (masks_alike_on_shards, {"masks"}, {"dropout": 0.1}),
        (straddling_scales, {"loss"}, {"quantizer": BaseQuantizer("nf4")}),
        (moments_swapped, {"resume"}, {}),
    ),
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_is_seen_in_its_check(
    fault: Callable[[pytest.MonkeyPatch], None],
    seen_in: set[str],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method, options = options.get("method", LoRA), {k: v for k, v in options.items() if k != "method"}
    fault(monkeypatch)
    # Only the numbers are asked here; the type check would already refuse masks.
    monkeypatch.setattr("meshpeft.verify.layout.typecheck_layout", lambda *args, **kwargs: {})
    verdict = verify_layout(SMALL, method(**OPTIONS), tp=2, all_layers=True, steps=2, **options)
    wrong = {name for name, error in verdict.errors.items() if error > 1e-8}
    assert wrong >= seen_in, verdict
