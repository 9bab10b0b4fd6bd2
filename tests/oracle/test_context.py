"""Context parallel: the tokens of every row are on several ranks, and the fine-tune is that of one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.oracle_runs import (
    METHODS,
    OPTIONS,
    SEQ_LENGTH,
    TOLERANCE,
    config,
    make_model,
    moe_config,
    one_rank,
    rows,
    run,
)
from helpers.thinned import thinned
from helpers.tiny_models import save_tiny
from helpers.transformers_float64 import in_float64
from torch import Tensor, nn

import meshpeft.models.spans as spans_module
from meshpeft.data.batches import MicroBatch, PackedRows, pack_documents
from meshpeft.data.context import ContextShard
from meshpeft.data.documents import Document
from meshpeft.models import Decoder, DecoderConfig, load_transformers
from meshpeft.models.sharding import ModelSharding
from meshpeft.models.spans import Spans
from meshpeft.parallel import I, ModelParallelConfig, P, ParallelAxis, ParallelGroupInfo, R, State, convert
from meshpeft.peft import DoRA, LoRA
from meshpeft.verify.oracle import Layout, Trace, compare, trace_layout

CROSS_SECTION = (
    ("lora", Layout(cp=2, micro_batch_size=2)),
    ("canonical_lora", Layout(cp=4, activation_checkpointing=True)),
    ("dora", Layout(cp=2, tp=2, sequence_parallel=True, micro_batch_size=2)),
    ("lora, standalone", Layout(cp=2, tp=2, sequence_parallel=True)),
    ("lora", Layout(cp=2, dp=2, tp=2, activation_checkpointing=True, sequence_parallel=True)),
)
MATRIX = tuple(
    (method, Layout(tp, dp, 1, None, sequence_parallel, recompute, micro_batch, cp=cp))
    for method in ("lora", "canonical_lora", "dora")
    for cp in (2, 4)
    for tp in (1, 2)
    for sequence_parallel in ((False, True) if tp > 1 else (False,))
    for dp in (1, 2)
    for recompute in (False, True)
    for micro_batch in (1, 2)
)


@pytest.mark.parametrize(("method", "layout"), thinned(CROSS_SECTION, 2), ids=str)
def test_the_fine_tune_is_that_of_one_process(method: str, layout: Layout) -> None:
    errors = compare(one_rank(method, 2), run(layout, method, steps=2))
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.slow
@pytest.mark.parametrize(("method", "layout"), MATRIX, ids=str)
def test_the_fine_tune_is_that_of_one_process_full_matrix(method: str, layout: Layout) -> None:
    errors = compare(one_rank(method, 2), run(layout, method, steps=2))
    assert max(errors.values()) < TOLERANCE, errors


def fine_tune(layout: Layout, structure: DecoderConfig, **options: Any) -> Trace:
    def make(parallel: ModelParallelConfig) -> Decoder:
        return Decoder(structure, parallel, dtype=torch.float64)

    def adapt(model: Any) -> nn.Module:
        return LoRA(**OPTIONS | options)(model)

    balance = 0.02 if structure.moe is not None else 0.0
    return trace_layout(layout, make, adapt, rows(), steps=3, clip=0.5, batch_size=4, router_aux_loss_coef=balance)


@cache
def experts_on_one_rank(shared: bool) -> Trace:
    return fine_tune(Layout(), moe_config(), share_expert_adapters=shared)


EXPERTS = (
    Layout(cp=2, ep=2, etp=1, micro_batch_size=2),
    Layout(cp=2, tp=2, ep=2, etp=2, sequence_parallel=True, activation_checkpointing=True),
    Layout(cp=2, tp=2, ep=2, etp=1),
    Layout(cp=4, ep=4, etp=1),
    Layout(cp=2, tp=2, ep=1, etp=2, dp=2),
)


CASES = [(layout, shared) for shared in (True, False) for layout in EXPERTS]


@pytest.mark.parametrize(("layout", "shared"), thinned(CASES, 3), ids=str)
def test_experts_and_the_balance_of_their_router(layout: Layout, shared: bool) -> None:
    errors = compare(experts_on_one_rank(shared), fine_tune(layout, moe_config(), share_expert_adapters=shared))
    assert max(errors.values()) < TOLERANCE, errors


MODELS_OF_TRANSFORMERS = (
    ("gemma", Layout(cp=2, tp=2, activation_checkpointing=True)),  # a tied head
    ("phi3", Layout(cp=2, micro_batch_size=2)),  # q, k and v in one layer
    ("gemma2", Layout(cp=4, dp=2)),  # soft caps, and every second layer with a window
    ("gpt_neox", Layout(cp=4, tp=2, micro_batch_size=2)),  # biases
)


@pytest.mark.parametrize(("family", "layout"), thinned(MODELS_OF_TRANSFORMERS, 4), ids=str)
def test_models_of_transformers(family: str, layout: Layout, tmp_path: Path) -> None:
    directory = save_tiny(family, tmp_path, num_hidden_layers=2)

    def make(parallel: ModelParallelConfig) -> nn.Module:
        return in_float64(load_transformers(directory, torch.float64))

    def trace(layout: Layout) -> Trace:
        adapt = DoRA(**OPTIONS, target_modules=["*.layers.*"])
        return trace_layout(layout, make, adapt, rows(), steps=2, clip=0.5, batch_size=4)

    errors = compare(trace(Layout()), trace(layout))
    assert max(errors.values()) < TOLERANCE, errors


def test_rows_of_one_document_each_are_padded_and_divided() -> None:
    documents = [Document(np.arange(n, dtype=np.int32) % 60, np.arange(n) > 1) for n in (3, 9, 15, 4, 7, 15, 6, 11)]
    padded = pack_documents(documents, SEQ_LENGTH, seed=0, packing=False)

    def trace(layout: Layout) -> Trace:
        return trace_layout(layout, make_model, METHODS["lora"], padded, steps=3, clip=0.5, batch_size=4)

    errors = compare(trace(Layout()), trace(Layout(cp=4, tp=2, sequence_parallel=True, micro_batch_size=2)))
    assert max(errors.values()) < TOLERANCE, errors


def test_a_sliding_window_reaches_across_ranks() -> None:
    structure = config(model_type="mistral", sliding_window=4)
    trace = partial(fine_tune, structure=structure)
    errors = compare(trace(Layout()), trace(Layout(cp=4, micro_batch_size=2)))
    assert max(errors.values()) < TOLERANCE, errors


def keys_as_gathered(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Spans, "in_order", lambda self, gathered: gathered)


def keys_gradients_of_this_rank_alone(patch: pytest.MonkeyPatch) -> None:
    def sliced(x: Tensor, src: State, dst: State, axis: ParallelAxis) -> Tensor:
        return convert(x, src, I, axis)

    patch.setattr(spans_module, "convert", sliced)


def keys_gradients_summed_twice(patch: pytest.MonkeyPatch) -> None:
    def twice(x: Tensor, src: State, dst: State, axis: ParallelAxis) -> Tensor:
        return convert(convert(x, src, I, axis), I, R, axis) * axis.world_size - convert(x, src, dst, axis).detach()

    patch.setattr(spans_module, "convert", twice)


def labels_in_the_order_of_the_row(patch: pytest.MonkeyPatch) -> None:
    gather = PackedRows.gather

    def wrong(self: PackedRows, rows: Any, width: Any = None, context: ContextShard = ContextShard()) -> MicroBatch:  # noqa: B008
        batch, full = gather(self, rows, width, context), gather(self, rows, context.padded(width))
        own = batch.labels.shape[1]
        return replace(batch, labels=full.labels[:, (context.rank or 0) * own :][:, :own])

    patch.setattr(PackedRows, "gather", wrong)


def positions_in_this_ranks_part(patch: pytest.MonkeyPatch) -> None:
    gather = PackedRows.gather

    def wrong(self: PackedRows, *arguments: Any) -> MicroBatch:
        batch = gather(self, *arguments)
        return replace(batch, position_ids=torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids))

    patch.setattr(PackedRows, "gather", wrong)


def gradients_and_losses_of_one_rank(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ParallelGroupInfo, "token_axes", lambda self, expert=False: (self.edp,) if expert else (self.dp,))


def the_router_balance_of_one_rank(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ModelSharding, "sum_over_tokens", lambda self, values: convert(values, P, I, self.tp))


def the_router_balance_without_its_adjoint(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        ModelSharding, "sum_over_tokens", lambda self, values: convert(convert(values, P, I, self.tp), P, I, self.cp)
    )


FAULTS = (
    keys_as_gathered,
    keys_gradients_of_this_rank_alone,
    keys_gradients_summed_twice,
    labels_in_the_order_of_the_row,
    positions_in_this_ranks_part,
    gradients_and_losses_of_one_rank,
)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = one_rank("lora", 2)
    fault(monkeypatch)
    errors = compare(expected, run(Layout(cp=2, micro_batch_size=2), "lora", steps=2))
    assert max(errors.values()) > 1e-3, errors


@pytest.mark.parametrize("fault", [the_router_balance_of_one_rank, the_router_balance_without_its_adjoint])
def test_a_fault_of_the_router_balance_is_seen(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = experts_on_one_rank(True)
    fault(monkeypatch)
    errors = compare(expected, fine_tune(EXPERTS[0], moe_config(), share_expert_adapters=True))
    assert max(errors.values()) > 1e-5, errors
