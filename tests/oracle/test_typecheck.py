"""The states of the base model at its full world size, and of the adapters' unfused twins in it.

The adapters themselves, fused and standalone, are checked in tests/peft.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import spmd_types as spmd
from helpers.oracle_runs import METHODS, config
from helpers.thinned import cross_section
from torch import Tensor

import meshpeft.parallel.linear as parallel_linear
import meshpeft.peft.dora as dora
import meshpeft.peft.lora as lora
from meshpeft.parallel import P, ParallelAxis, ParallelError, State, convert
from meshpeft.peft.fused import Term, fused_dora_reference, fused_lora_reference
from meshpeft.verify import typecheck_layout

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 16, "num_key_value_heads": 8}
STATES = {"dp": "P", "tp": "I"}


@pytest.mark.parametrize("sequence_parallel", (False, True))
def test_states_under_context_parallel(sequence_parallel: bool) -> None:
    states = typecheck_layout(config(**SIZES), METHODS["lora"], tp=8, cp=8, dp=4, sequence_parallel=sequence_parallel)
    assert states == {"dp": "P", "cp": "P", "tp": "I"}


@pytest.mark.parametrize("sequence_parallel", (False, True))
def test_states_of_the_base_are_right_at_4096_ranks(sequence_parallel: bool) -> None:
    assert typecheck_layout(config(**SIZES), tp=8, dp=512, sequence_parallel=sequence_parallel) == STATES


def test_states_of_windows_are_right() -> None:
    windows = replace(config(**SIZES), sliding_windows=(16, None))
    assert typecheck_layout(windows, METHODS["lora"], tp=8, dp=4, sequence_parallel=True) == STATES


def dora_twin(x: Tensor, weight: Tensor, term: Term, magnitude: Tensor, norm: Tensor, _: Any) -> Tensor:
    """The norm is made outside the model and has no type yet: that of the magnitude, by which it divides."""
    spmd.assert_type_like(norm, magnitude)
    return fused_dora_reference(x, weight, term, magnitude, norm)


@cross_section(2, method=("lora", "canonical_lora", "dora"), sequence_parallel=(False, True))
def test_states_of_the_unfused_twins_are_right(
    method: str, sequence_parallel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "fused_lora", fused_lora_reference)
    monkeypatch.setattr(dora, "fused_dora", dora_twin)
    states = typecheck_layout(config(**SIZES), METHODS[method], tp=8, dp=512, sequence_parallel=sequence_parallel)
    assert states == STATES


def test_a_forgotten_reduction_is_a_type_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgotten(x: Tensor, src: State, dst: State, axis: ParallelAxis) -> Tensor:
        return x if src is P else convert(x, src, dst, axis)

    monkeypatch.setattr(parallel_linear, "convert", forgotten)
    with pytest.raises(ParallelError, match="tp=8"):
        typecheck_layout(config(**SIZES), METHODS["lora"], tp=8, dp=2)
