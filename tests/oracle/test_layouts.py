"""The promise: loss, gradients, weights, gradient norm and exported file are those of one process."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.oracle_runs import METHODS, OPTIONS, TOLERANCE, VOCAB_SIZE, config, one_rank, rows, run
from helpers.thinned import cross_section, thinned
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


def runs(layouts: tuple[Layout, ...]) -> list[tuple[Layout, str]]:
    """Every method at every layout; token shards are only kept under sequence parallel."""
    return [
        (layout, method)
        for method in METHODS
        for layout in layouts
        if layout.sequence_parallel or "token shards" not in method
    ]


def assert_same_fine_tune(layout: Layout, method: str, steps: int) -> None:
    expected = one_rank(method, steps)
    assert len(set(expected.losses)) == steps
    errors = compare(expected, run(layout, method, steps=steps))
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize(("layout", "method"), thinned(runs(CROSS_SECTION), 3), ids=str)
def test_the_fine_tune_does_not_depend_on_the_layout(layout: Layout, method: str) -> None:
    assert_same_fine_tune(layout, method, steps=2)


@pytest.mark.parametrize("layout", CROSS_SECTION[2:4], ids=str)
def test_the_fine_tune_with_windows_does_not_depend_on_the_layout(layout: Layout) -> None:
    def make_model(parallel: ModelParallelConfig) -> Decoder:
        return Decoder(replace(config(), sliding_windows=(3, None)), parallel, dtype=torch.float64)

    one, found = (trace_layout(each, make_model, METHODS["lora"], rows(), steps=2) for each in (Layout(), layout))
    assert one.losses != one_rank().losses[:2]
    assert max(compare(one, found).values()) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "method"), runs(MATRIX), ids=str)
def test_the_fine_tune_does_not_depend_on_the_layout_full_matrix(layout: Layout, method: str) -> None:
    assert_same_fine_tune(layout, method, steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_fine_tune_stays_the_same_over_more_steps(method: str) -> None:
    assert_same_fine_tune(CROSS_SECTION[2], method, steps=5)


def trained_with_its_table(method: type[LowRankPEFT], model: nn.Module) -> nn.Module:
    """Adapters on a layer of each kind and on the head, and the table, which trains as it is."""
    targets = ["linear_qkv", "linear_fc2", "output_layer"]
    model = method(target_modules=targets, **OPTIONS)(model)
    model.get_submodule("embedding").requires_grad_()
    return model


VOCABULARY_LAYOUTS = (
    Layout(tp=2, micro_batch_size=2),
    Layout(tp=2, dp=2, sequence_parallel=True),
    Layout(tp=4, sequence_parallel=True),
)


@cross_section(2, layout=VOCABULARY_LAYOUTS, method=[LoRA, DoRA])
def test_a_vocabulary_that_does_not_divide_is_whole_on_every_rank(layout: Layout, method: type[LowRankPEFT]) -> None:
    def trace(at: Layout) -> Trace:
        def make(parallel: ModelParallelConfig) -> Decoder:
            return Decoder(config(vocab_size=VOCAB_SIZE + 1), parallel, dtype=torch.float64)

        return trace_layout(at, make, partial(trained_with_its_table, method), rows(), steps=2, clip=0.5, batch_size=4)

    errors = compare(trace(Layout()), trace(layout))
    assert max(errors.values()) < TOLERANCE, errors
