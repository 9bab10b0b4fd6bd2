"""The states of a whole model at its full world size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.oracle_runs import METHODS, config

import meshpeft.parallel.linear as parallel_linear
import meshpeft.peft.lora as lora
from meshpeft.parallel import ParallelError
from meshpeft.peft import fused_lora_reference
from meshpeft.verify.typecheck import typecheck_layout

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 16, "num_key_value_heads": 8}


@pytest.mark.parametrize("sequence_parallel", (False, True))
@pytest.mark.parametrize("method", (None, *METHODS))
@pytest.mark.parametrize("twin", (False, True), ids=("fused", "unfused twin"))
def test_states_are_right_at_4096_ranks(
    method: str | None, sequence_parallel: bool, twin: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if twin:
        monkeypatch.setattr(lora, "fused_lora", fused_lora_reference)
    adapt: Callable[[Any], Any] | None = None if method is None else METHODS[method]
    states = typecheck_layout(config(**SIZES), adapt, tp=8, dp=512, sequence_parallel=sequence_parallel, seq_length=16)
    assert states == {"dp": "P", "tp": "I"}


def test_a_forgotten_reduction_is_a_type_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_linear, "mp_reduce", lambda y, axis: y)
    with pytest.raises(ParallelError, match="tp=8"):
        typecheck_layout(config(**SIZES), METHODS["lora"], tp=8, dp=2, seq_length=16)


def test_an_adapter_added_after_the_reduction_is_a_type_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished sum meets a summand: the fault that counts an adapter once per rank."""

    def delta_is_whole(x: torch.Tensor, w: Any, a: torch.Tensor, b: torch.Tensor, scale: float, dropped: Any) -> Any:
        from meshpeft.parallel import mp_reduce, parallel_group_info

        h = torch.nn.functional.linear(x, a)
        if a.shape[1] != SIZES["hidden_size"]:  # divided along its input: a row-parallel layer
            h = mp_reduce(h, axis=parallel_group_info().tp)
        return torch.nn.functional.linear(x, w) + torch.nn.functional.linear(h * scale, b)

    monkeypatch.setattr(lora, "fused_lora", delta_is_whole)
    with pytest.raises(ParallelError):
        typecheck_layout(config(**SIZES), METHODS["lora"], tp=8, dp=2, seq_length=16)
