"""Adapters on each kind of Megatron layer, with each of its options, against one dense layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.workers import run_on_ranks
from torch import Tensor

from meshpeft.peft import DoRA, LoRA

pytest.importorskip("megatron.core")
from helpers.megatron_layers import BATCH, IN, OUT, SEQ, Case, Result, full, run_layer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

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
EXPERT = {"expert_model_parallel_size": 2}


def column(x: Any, y: Any, config: dict[str, Any] | None = None, expert_comm: bool = False, **options: Any) -> Case:
    return Case(ColumnParallelLinear, x, y, {"bias": False} | options, config or {}, expert_comm)


def row(x: Any, y: Any, config: dict[str, Any] | None = None, expert_comm: bool = False, **options: Any) -> Case:
    defaults = {"bias": False, "input_is_parallel": True, "skip_bias_add": False}
    return Case(RowParallelLinear, x, y, defaults | options, config or {}, expert_comm)


CASES = {
    "column": column("I", -1),
    "column, bias": column("I", -1, bias=True),
    "column, bias returned": column("I", -1, bias=True, skip_bias_add=True),
    "column, stride": column("I", -1, stride=2),
    "column, gathered": column("I", "I", gather_output=True, bias=True),
    "column, sequence": column(0, -1, SEQUENCE, bias=True),
    "column, sequence, gathered": column(0, "I", SEQUENCE, gather_output=True),
    "column, dx reduced outside": column("R", -1, disable_grad_reduce=True),
    "column, sequence, nothing reduced outside": column(0, -1, SEQUENCE, disable_grad_reduce=True),
    "column, expert": column("R", -1, EXPERT, is_expert=True),
    "column, expert, sequence": column("R", -1, EXPERT | SEQUENCE, is_expert=True),
    "column, shared expert": column("R", -1, expert_comm=True),
    "column, shared expert, sequence": column("R", -1, SEQUENCE, expert_comm=True),
    "row": row(-1, "I"),
    "row, bias": row(-1, "I", bias=True),
    "row, bias returned": row(-1, "I", bias=True, skip_bias_add=True),
    "row, whole input": row("I", "I", input_is_parallel=False),
    "row, sequence": row(-1, 0, SEQUENCE, bias=True),
    "row, expert": row(-1, "P", EXPERT, is_expert=True, skip_bias_add=True),
    "row, expert, sequence": row(-1, "P", EXPERT | SEQUENCE, is_expert=True, skip_bias_add=True, bias=True),
    "row, shared expert": row(-1, "P", expert_comm=True, skip_bias_add=True),
    "row, shared expert, sequence": row(-1, "P", SEQUENCE, expert_comm=True, skip_bias_add=True),
}


def dense(case: Case, result: Result) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, input gradient and parameter gradients of the formula, for the adapter's own values."""
    x = full(SEQ, BATCH, IN, seed=1).requires_grad_()
    weight = full(OUT, IN, seed=3)
    values = {name: value.clone().requires_grad_() for name, value in result.weights.items()}
    combined = weight + SCALE * values["linear_out.weight"] @ values["linear_in.weight"]
    y = x @ combined.t()
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
        if case.options.get("skip_bias_add") and case.options["bias"]:
            assert result.bias is not None
            assert_close(result.bias, full(OUT, seed=4))


def marks(
    parallel_dim: int | None, *, partial: bool = False, allreduce: bool = True, stride: int = 1
) -> dict[str, Any]:
    # Megatron's norm takes an expert's parameter from every rank, but for copies.
    return {
        "allreduce": allreduce,
        "sequence_parallel": partial,
        "tensor_model_parallel": parallel_dim is not None or not allreduce,
        "shared": False if allreduce or parallel_dim is not None else "but on the first rank",
        "partition_dim": -1 if parallel_dim is None else parallel_dim,
        "partition_stride": stride,
    }


WHOLE = marks(None)
PARTIAL = marks(None, partial=True)
MARKS = {
    "column": (WHOLE, marks(0), marks(0)),
    "column, stride": (WHOLE, marks(0, stride=2), marks(0, stride=2)),
    "column, sequence": (PARTIAL, marks(0), marks(0)),
    # Megatron sums nothing over tensor parallel without sequence parallel, nor ever over expert-tensor parallel:
    # these gradients are summed in the backward pass, and are no summands after it.
    "column, dx reduced outside": (WHOLE, marks(0), marks(0)),
    "column, expert, sequence": (marks(None, allreduce=False), marks(0, allreduce=False), marks(0, allreduce=False)),
    "column, shared expert, sequence": (PARTIAL, marks(0), marks(0)),
    "row": (marks(1), WHOLE, WHOLE),
    "row, sequence": (marks(1), PARTIAL, PARTIAL),
    "row, expert, sequence": (marks(1, allreduce=False), marks(None, allreduce=False), marks(None, allreduce=False)),
    "row, shared expert": (marks(1), WHOLE, WHOLE),
    "row, shared expert, sequence": (marks(1), PARTIAL, PARTIAL),
}


@pytest.mark.parametrize("name", MARKS)
def test_parameters_carry_what_megatron_reads(name: str) -> None:
    names = ("linear_in.weight", "linear_out.weight", "weight_magnitude")
    for rank, result in enumerate(run_on_ranks(2, run_layer, CASES[name], METHODS["dora"], 2)):
        for parameter, want in zip(names, MARKS[name], strict=True):
            shared = rank > 0 if want["shared"] else False
            assert result.marks[parameter] == {**want, "shared": shared}
