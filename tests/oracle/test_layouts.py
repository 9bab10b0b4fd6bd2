"""The promise: loss, gradients, weights, gradient norm and exported file are those of one process."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from helpers.oracle_runs import METHODS, OPTIONS, TOLERANCE, VOCAB_SIZE, config, one_rank, rows, run
from torch import nn

from meshpeft.models import Decoder
from meshpeft.parallel import ModelParallelConfig
from meshpeft.peft import DoRA, LoRA, LowRankPEFT
from meshpeft.verify.oracle import Layout, Trace, compare, trace_layout

# A cross-section in which every axis and option meets another; the full matrix is `slow`.
CROSS_SECTION = (
    Layout(tp=2, micro_batch_size=2),
    Layout(tp=4, sequence_parallel=True, micro_batch_size=4),
    Layout(tp=2, dp=2, sequence_parallel=True, activation_checkpointing=True, micro_batch_size=2),
    # 4 rows over 3 ranks: one gets a row of padding, and the numbers of target tokens differ.
    Layout(dp=3, micro_batch_size=2),
    Layout(activation_checkpointing=True, micro_batch_size=3),
)
MATRIX = tuple(
    Layout(tp, dp, 1, None, sequence_parallel, recompute, micro_batch)
    for tp in (1, 2, 4)
    for dp in (1, 2)
    for sequence_parallel in ((False, True) if tp > 1 else (False,))
    for recompute in (False, True)
    for micro_batch in (1, 2)
)


def runs(layouts: tuple[Layout, ...]) -> list[Any]:
    """Every method at every layout; token shards are only kept under sequence parallel. Every second is slow."""
    return [
        pytest.param(layout, method, id=f"{layout}-{method}", marks=[pytest.mark.slow] if (row + column) % 2 else [])
        for row, method in enumerate(METHODS)
        for column, layout in enumerate(layouts)
        if layout.sequence_parallel or "token shards" not in method
    ]


def assert_same_fine_tune(layout: Layout, method: str) -> None:
    expected = one_rank(method)
    assert len(set(expected.losses)) == 5
    errors = compare(expected, run(layout, method))
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize(("layout", "method"), runs(CROSS_SECTION))
def test_the_fine_tune_does_not_depend_on_the_layout(layout: Layout, method: str) -> None:
    assert_same_fine_tune(layout, method)


@pytest.mark.parametrize("layout", CROSS_SECTION[2:4], ids=str)
def test_the_fine_tune_with_windows_does_not_depend_on_the_layout(layout: Layout) -> None:
    def make_model(parallel: ModelParallelConfig) -> Decoder:
        return Decoder(replace(config(), sliding_windows=(3, None)), parallel, dtype=torch.float64)

    one, found = (trace_layout(each, make_model, METHODS["lora"], rows(), steps=2) for each in (Layout(), layout))
    assert one.losses != one_rank().losses[:2]
    assert max(compare(one, found).values()) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "method"), runs(MATRIX))
def test_the_fine_tune_does_not_depend_on_the_layout_full_matrix(layout: Layout, method: str) -> None:
    assert_same_fine_tune(layout, method)


def trained_with_its_table(method: type[LowRankPEFT], model: nn.Module) -> nn.Module:
    """Adapters on a layer of each kind and on the head, and the table, which trains as it is."""
    targets = ["linear_qkv", "linear_fc2", "output_layer"]
    model = method(target_modules=targets, **OPTIONS)(model)
    model.get_submodule("embedding").requires_grad_()
    return model


@pytest.mark.parametrize("method", [LoRA, DoRA])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2, micro_batch_size=2),
        Layout(tp=2, dp=2, sequence_parallel=True),
        Layout(tp=4, sequence_parallel=True),
    ],
    ids=str,
)
def test_a_vocabulary_that_does_not_divide_is_whole_on_every_rank(layout: Layout, method: type[LowRankPEFT]) -> None:
    def trace(at: Layout) -> Trace:
        def make(parallel: ModelParallelConfig) -> Decoder:
            return Decoder(config(vocab_size=VOCAB_SIZE + 1), parallel, dtype=torch.float64)

        return trace_layout(at, make, partial(trained_with_its_table, method), rows(), steps=3, clip=0.5, batch_size=4)

    errors = compare(trace(Layout()), trace(layout))
    assert max(errors.values()) < TOLERANCE, errors
