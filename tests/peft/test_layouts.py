"""The same adapter at every layout: simulated ranks against one, in float64."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from helpers.adapted_block import Outcome, largest_difference, local_input, make_block, outcome
from helpers.faults import complete_beside
from helpers.simulate import on_rank, simulate
from helpers.thinned import cross_section
from torch import Tensor
from torch.distributed._local_tensor import LocalTensor

from meshpeft.parallel import P, R, Shard, mp_copy
from meshpeft.parallel.init import draw_full
from meshpeft.peft import PEFT, CanonicalLoRA, DoRA, DoRALinear, LoRA, standalone
from meshpeft.peft import adapter as adapter_module
from meshpeft.peft import canonical as canonical_module

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
LAYOUTS = ((2, 2, True), (4, 1, False), (8, 1, False), (8, 1, True))


@functools.cache
def one_rank(method: str) -> Outcome:
    return outcome(METHODS[method])


@cross_section(2, method=METHODS, layout=LAYOUTS)
def test_adapters_train_alike_at_every_layout(method, layout):
    # float64 sums in another order: a few thousand roundings of 1e-16.
    assert largest_difference(outcome(METHODS[method], *layout), one_rank(method)) < 1e-10


def _gradient_of_a_is_not_summed(patch):
    complete_beside(patch, R)


def _gradient_of_b_is_not_summed(patch):
    complete_beside(patch, P)


def _standalone_gradients_are_not_summed(patch):
    complete_beside(patch, Shard(0))


def _initialised_by_the_shard(patch):
    def by_the_shard(parameter, init_fn, seed, name):
        shape = parameter.shape
        full = draw_full(tuple(shape), init_fn, 0)
        with torch.no_grad():
            parameter.copy_(full)

    patch.setattr(adapter_module, "named_init_", by_the_shard)


def _norms_of_local_columns(patch):
    original = DoRALinear._get_weight_norm

    def local(self):
        self._norm_axis = None
        return original(self)

    patch.setattr(DoRALinear, "_get_weight_norm", local)


def _gradient_of_b_is_summed_twice(patch):
    original = adapter_module.product
    patch.setattr(standalone, "product", lambda x, w: original(x, mp_copy(w)))


def _k_and_v_exchanged(patch):
    original = canonical_module._PackDiagonal.apply
    patch.setattr(canonical_module, "pack_factors", _exchanging(original))


def _exchanging(apply):
    def pack(fused_parts, shards, parts, a, b):
        # Only where there are several ranks, as a wrong order of shards would do it.
        order = [0, *parts[:0:-1]] if shards > 1 and len(parts) == 3 else list(parts)
        return torch.cat(list(a)), apply(fused_parts, shards, tuple(order), *b)

    return pack


@pytest.mark.parametrize(
    ("fault", "method", "sequence_parallel"),
    (
        (_gradient_of_a_is_not_summed, "lora", False),
        (_gradient_of_b_is_not_summed, "lora", True),
        (_gradient_of_b_is_not_summed, "dora", False),
        (_standalone_gradients_are_not_summed, "lora, standalone", True),
        (_initialised_by_the_shard, "lora", False),
        (_norms_of_local_columns, "dora", False),
        (_gradient_of_b_is_summed_twice, "lora, standalone", False),
        (_k_and_v_exchanged, "canonical", False),
    ),
)
def test_a_fault_put_in_on_purpose_is_seen(monkeypatch, fault, method, sequence_parallel):
    want = one_rank(method)
    fault(monkeypatch)
    try:
        difference = largest_difference(outcome(METHODS[method], 4, 1, sequence_parallel), want)
    except AssertionError as error:  # the simulation's, when it is asked for the one value of all ranks
        if "shards must be the same" not in str(error):
            raise
        difference = float("inf")
    assert difference > 1e-4


def divided(tensor: Tensor) -> bool:
    """Whether the ranks hold different values."""
    return not torch.equal(on_rank(tensor, 0), on_rank(tensor, 1))


@pytest.mark.parametrize("position", ("pre", "post"))
@pytest.mark.parametrize("sequence_parallel", (False, True))
@pytest.mark.parametrize("fused", (True, False))
def test_dropout_masks_agree_where_values_do(fused, sequence_parallel, position):
    # Over tp: an input is divided in a row (features), and beside a column under sequence parallel (tokens); an
    # output in a column (features), and beside a row under sequence parallel (tokens).
    expected = {
        ("linear_fc1", "pre"): sequence_parallel and not fused,
        ("linear_fc2", "pre"): True,
        ("linear_fc1", "post"): True,
        ("linear_fc2", "post"): sequence_parallel and not fused,
    }
    options = OPTIONS | {"dropout": 0.5, "dropout_position": position, "fused": fused}
    ones = torch.ones(6, 4)
    for tp, dp in ((2, 1), (1, 2)):
        with simulate(tp=tp, dp=dp):
            block = make_block(LoRA(**options), sequence_parallel)
            for name in ("linear_fc1", "linear_fc2"):
                adapter = getattr(block.mlp, name).adapter
                drop = adapter.drop_input if position == "pre" else adapter.drop_output
                assert divided(drop(LocalTensor({0: ones, 1: ones}))) == (dp == 2 or expected[name, position])


@pytest.mark.parametrize("method", ("lora", "canonical", "dora"))
def test_the_mean_over_masks_is_the_undropped_output(method):
    # One column layer, whose output is linear in the dropped input.
    plain = copy.copy(METHODS[method])
    with simulate(tp=2) as info:
        x = local_input(info, False)
        means = []
        for dropout in (0.0, 0.3):
            plain.dropout = dropout
            layer = make_block(plain).self_attention.linear_qkv
            with torch.no_grad():
                base = layer.to_wrap(x)
                draws = [layer(x) - base for _ in range(1 if dropout == 0 else 120)]
            means.append(on_rank(sum(draws) / len(draws), 0))
    # One draw is off by about sqrt(0.3 / 0.7) of the adapter's output, the mean of 120 by 6% of it.
    assert (means[1] - means[0]).abs().mean() < 0.15 * means[0].abs().mean()
