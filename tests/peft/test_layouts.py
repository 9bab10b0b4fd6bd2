"""The same adapter at every layout: simulated ranks against one, in float64."""

from __future__ import annotations

import functools

import pytest
from helpers.adapted_block import Outcome, largest_difference, outcome

from meshpeft.peft import PEFT, CanonicalLoRA, DoRA, LoRA

# Factors that are not zero, so that every gradient is.
OPTIONS = {"dim": 4, "alpha": 6, "lora_B_init_method": "normal"}
METHODS: dict[str, PEFT] = {
    "lora": LoRA(**OPTIONS),
    "canonical": CanonicalLoRA(**OPTIONS),
    "canonical, some parts": CanonicalLoRA(target_modules=["linear_k", "linear_q", "linear_fc1_up"], **OPTIONS),
    "lora, standalone": LoRA(fused=False, **OPTIONS),
    "canonical, standalone": CanonicalLoRA(fused=False, **OPTIONS),
    "dora": DoRA(**OPTIONS),
    "dora, standalone": DoRA(fused=False, **OPTIONS),
    "lora, standalone, all-to-all": LoRA(fused=False, a2a_experimental=True, **OPTIONS),
}
# (tp, dp, sequence parallel)
LAYOUTS = ((2, 1, False), (2, 2, True), (4, 1, False), (4, 1, True), (8, 1, False), (8, 1, True), (1, 2, False))


@functools.cache
def one_rank(method: str) -> Outcome:
    return outcome(METHODS[method])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("tp", "dp", "sequence_parallel"), LAYOUTS)
def test_adapters_train_alike_at_every_layout(method, tp, dp, sequence_parallel):
    # float64 sums in another order: a few thousand roundings of 1e-16.
    assert largest_difference(outcome(METHODS[method], tp, dp, sequence_parallel), one_rank(method)) < 1e-10
