"""Adapters on layers like Transformer Engine's: what is recognised, and the arithmetic. Not the real ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.workers import run_on_ranks
from torch import Tensor

from meshpeft.parallel import layout_of
from meshpeft.peft import HAVE_TE, TECL, TERL, DoRA, LoRA

pytest.importorskip("megatron.core")
from helpers.megatron_layers import BATCH, IN, OUT, SEQ, Case, Result, full, run_layer
from helpers.te_layers import (
    StandInColumn,
    StandInLayerNormColumn,
    StandInLinear,
    StandInRow,
)

TOLERANCE = 1e-12  # one layer in float64
RANK, SCALE = 3, 2.0
OPTIONS: dict[str, Any] = {
    "target_modules": ["linear"],
    "dim": RANK,
    "alpha": SCALE * RANK,
    "lora_B_init_method": "normal",
}
METHODS = {"lora": LoRA(**OPTIONS), "dora": DoRA(**OPTIONS)}
SEQUENCE = {"sequence_parallel": True}
BIAS = {"bias": True}
RETURNED = {"bias": True, "skip_bias_add": True}
EXPERT = {"bias": False, "is_expert": True}
CASES = {
    "column": Case(StandInColumn, "I", -1, BIAS),
    "column, bias returned": Case(StandInColumn, "I", -1, RETURNED),
    "column, sequence": Case(StandInColumn, 0, -1, BIAS, SEQUENCE),
    "column, no mode": Case(StandInColumn, "R", -1, EXPERT),
    "column, no mode, sequence": Case(StandInColumn, "R", -1, EXPERT, SEQUENCE),
    "row": Case(StandInRow, -1, "I", BIAS),
    "row, sequence": Case(StandInRow, -1, 0, BIAS, SEQUENCE),
    "row, no mode": Case(StandInRow, -1, "P", EXPERT),
    "row, no mode, sequence": Case(StandInRow, -1, "P", EXPERT, SEQUENCE),
    "plain": Case(StandInLinear, "I", "I", BIAS),
    "plain, sequence": Case(StandInLinear, 0, 0, BIAS, SEQUENCE),
    "norm": Case(StandInLayerNormColumn, "I", -1, BIAS),
    "norm, bias returned": Case(StandInLayerNormColumn, "I", -1, RETURNED),
    "norm, sequence": Case(StandInLayerNormColumn, 0, -1, BIAS, SEQUENCE),
    "norm, sequence, overlap": Case(StandInLayerNormColumn, 0, -1, BIAS, SEQUENCE | {"tp_comm_overlap": True}),
}


def dense(case: Case, result: Result) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, input gradient and parameter gradients of the formula, for the adapter's own values."""
    x = full(SEQ, BATCH, IN, seed=1).requires_grad_()
    values = {name: value.clone().requires_grad_() for name, value in result.weights.items()}
    combined = full(OUT, IN, seed=3) + SCALE * values["linear_out.weight"] @ values["linear_in.weight"]
    normalised = torch.nn.functional.layer_norm(x, (IN,)) if case.kind is StandInLayerNormColumn else x
    y = normalised @ combined.t()
    if "weight_magnitude" in values:
        y = y * (values["weight_magnitude"] / combined.detach().norm(dim=1))
    if case.options["bias"] and not case.options.get("skip_bias_add"):
        y = y + full(OUT, seed=4)
    y.backward(full(SEQ, BATCH, OUT, seed=2))
    assert x.grad is not None
    return y.detach(), x.grad, {name: value.grad for name, value in values.items() if value.grad is not None}


def assert_close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE * float(want.abs().max()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_one_dense_layer(name: str, method: str) -> None:
    case = CASES[name]
    for result in run_on_ranks(2, run_layer, case, METHODS[method], 2):
        y, dx, gradients = dense(case, result)
        assert_close(result.y, y)
        assert_close(result.dx, dx)
        assert result.gradients.keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            assert_close(result.gradients[parameter], gradient)
        if case.options.get("skip_bias_add"):
            assert result.bias is not None
            assert_close(result.bias, full(OUT, seed=4))


def test_what_is_still_a_summand_carries_the_mark_that_megatron_sums_by() -> None:
    marked = {}
    for name in ("column, sequence", "row, sequence", "norm, sequence", "norm, sequence, overlap", "norm"):
        result: Result = run_on_ranks(2, run_layer, CASES[name], METHODS["lora"], 2)[0]
        marked[name] = [parameter for parameter, marks in result.marks.items() if marks["sequence_parallel"]]
    assert marked == {
        "column, sequence": ["linear_in.weight"],
        "row, sequence": ["linear_out.weight"],
        "norm, sequence": ["linear_in.weight"],
        "norm, sequence, overlap": ["linear_in.weight"],
        "norm": [],
    }


def outputs_asked_for() -> tuple[list[bool], list[bool]]:
    """Whether the fused layer returns its norm's output: inside a call with its adapter, and after it."""
    from helpers.megatron_cpu import megatron_on_cpu
    from helpers.megatron_layers import _make

    with megatron_on_cpu(tensor_model_parallel_size=1):
        holder = torch.nn.Module()
        holder.linear = layer = _make(replace(CASES["norm"], config={}))
        METHODS["lora"](holder)
        seen: list[bool] = []
        layer.register_forward_pre_hook(lambda module, args: seen.append(module.return_layernorm_output))
        holder.linear(full(SEQ, BATCH, IN, seed=1))
        holder.linear.disable_adapter_layers()
        holder.linear(full(SEQ, BATCH, IN, seed=1))
        return seen, [layer.return_layernorm_output, layer.return_layernorm_output_gathered]


def test_the_norms_output_is_asked_for_only_where_an_adapter_takes_it() -> None:
    seen, after = run_on_ranks(2, outputs_asked_for)[0]
    assert seen == [True, False]
    assert after == [False, False]


def undivided_expert() -> tuple[str | None, bool, list[int], bool]:
    """Mode of an expert that is whole on every rank, what is seen in it, and what sums its adapter."""
    from helpers.megatron_cpu import megatron_on_cpu
    from megatron.core import ModelParallelConfig

    with megatron_on_cpu(tensor_model_parallel_size=2, expert_tensor_parallel_size=1):
        config = ModelParallelConfig(tensor_model_parallel_size=2, expert_tensor_parallel_size=1)
        layer = StandInColumn(IN, OUT, config=config, init_method=None, bias=False, is_expert=True)
        layout = layout_of(layer)
        assert layout.data_axis is not None and layout.marks is not None
        marks = layout.marks(layout.factor_a(RANK, inside=False))
        sizes = [layout.axis.world_size, layout.data_axis.world_size]
        return layer.parallel_mode, layout.is_expert, sizes, marks["allreduce"]


def test_an_expert_that_is_not_divided_is_known_by_its_group() -> None:
    # Its two copies hold different tokens: the data parallel of experts has both, that of dense layers one.
    assert run_on_ranks(2, undivided_expert) == [("column", True, [1, 2], False)] * 2


def test_without_transformer_engine_its_classes_are_none() -> None:
    if HAVE_TE:
        assert TECL and TERL
    else:
        assert (TECL, TERL) == ((), ())
