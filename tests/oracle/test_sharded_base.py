"""A base that is sharded over its replicas: the fine-tune is that of a whole one, bit for bit; and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.oracle_runs import METHODS, config, moe_config, rows
from torch import nn

from meshpeft.models import Decoder, DecoderConfig, LanguageModel
from meshpeft.models.base_blocks import ShardBase, base_stores, rows_of_tables, shard_base
from meshpeft.parallel import ModelParallelConfig
from meshpeft.parallel.sharded_base import BlockStore, is_stored
from meshpeft.peft import LoRA
from meshpeft.quantization import pissa_init, quantize_base
from meshpeft.verify.oracle import Layout, Recipe, Run, Trace
from meshpeft.verify.simulation import the_same

# Three layers, whose rows are whole blocks of packed values on each of two ranks.
SIZES: dict[str, Any] = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 64, "head_dim": 8}
DENSE, MOE = config(**SIZES), moe_config(**SIZES, moe_intermediate_size=64)
STEPS, MICRO_BATCHES = 2, 2


def trained(
    layout: Layout, model: DecoderConfig, adapt: Callable[[Any], nn.Module], shards: ShardBase, quantize: Any = None
) -> tuple[Trace, list[BlockStore], list[tuple[int, int]]]:
    """Fine-tune; return what was computed, the stores, and the gathers and bytes of each in the last step."""

    def make(parallel: ModelParallelConfig) -> LanguageModel:
        made = Decoder(model, parallel, dtype=torch.float64)
        if quantize is not None:
            quantize_base(made, quantize, block_size=32, principal_rank=2 if adapt is pissa else None)
        return made

    trace = Trace()
    size = MICRO_BATCHES * layout.dp * layout.micro_batch_size
    recipe = Recipe(make_model=make, adapt=adapt, rows=rows(), clip=0.5, batch_size=size)
    with layout.simulated() as mesh:
        run = Run(recipe, replace(layout, shard_base=shards), mesh)
        stores = base_stores(run.model)
        for number in range(STEPS):
            before = [(store.gathers, store.gathered_bytes) for store in stores]
            run.take(number, trace)
        run.finish(trace)
    sent = [(s.gathers - gathers, s.gathered_bytes - sent) for s, (gathers, sent) in zip(stores, before, strict=True)]
    return trace, stores, sent


def pissa(model: Any) -> nn.Module:
    adapted = LoRA(dim=2, lora_dtype=torch.float64)(model)
    pissa_init(adapted)
    return adapted


ADAPTERS = {**METHODS, "pissa": pissa}


def name(given: object) -> str:
    return "" if isinstance(given, DecoderConfig) else str(given)


LAYOUTS = [
    ("lora", DENSE, Layout(dp=2), "all", None),
    ("dora", DENSE, Layout(dp=4), 2, None),
    ("canonical_lora", DENSE, Layout(tp=2, dp=2, sequence_parallel=True, activation_checkpointing=True), "all", "int8"),
    ("lora, standalone", DENSE, Layout(cp=2, dp=2), 4, "nf4"),
    ("lora", MOE, Layout(dp=4, ep=2), "all", "nf4"),
    ("dora", MOE, Layout(tp=2, dp=2, ep=2, etp=1), 2, None),
    ("pissa", DENSE, Layout(tp=2, dp=2), "all", None),
    ("pissa", DENSE, Layout(dp=2), "all", "nf4"),
]


@pytest.mark.parametrize(("method", "model", "layout", "shards", "quantize"), LAYOUTS, ids=name)
def test_the_fine_tune_is_bit_for_bit_that_of_a_whole_base(
    method: str, model: DecoderConfig, layout: Layout, shards: ShardBase, quantize: str | None
) -> None:
    expected, none, _ = trained(layout, model, ADAPTERS[method], "none", quantize)
    found, stores, _ = trained(layout, model, ADAPTERS[method], shards, quantize)
    assert not none and stores
    assert (found.losses, found.grad_norms) == (expected.losses, expected.grad_norms)
    for tensors, others in ((found.gradients, expected.gradients), (found.weights, expected.weights)):
        assert tensors.keys() == others.keys() and tensors
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("shards", [2, 4])
def test_what_a_rank_holds_and_receives(shards: int, quantize: str | None) -> None:
    layout = Layout(dp=shards)
    with layout.simulated():
        whole = Decoder(DENSE, None, dtype=torch.float64)
        if quantize is not None:
            quantize_base(whole, quantize, block_size=32)
        weights = {name: p for name, p in whole.named_parameters() if p.dim() == 2}
        layers = [sum(p.nbytes for name, p in weights.items() if f"layers.{n}." in name) for n in range(3)]
        table, at_a_time = weights["embedding.weight"], rows_of_tables(whole)
        pieces = 1 if at_a_time is None else -(-table.shape[0] // at_a_time)
        assert all(piece * table[0].nbytes <= max(layers) for piece in [at_a_time or table.shape[0]])
        resident = sum(layers) + 2 * table.nbytes
    _, (store,), ((gathers, received),) = trained(layout, DENSE, METHODS["lora"], "all", quantize)
    # Sizes here are multiples of what bytes are aligned to.
    assert store.nbytes * shards == resident and store.buffer_bytes == 2 * max(layers)
    # A layer in each pass; embedding and head in the forward pass, less where one is still there at a turn.
    once = 2 * len(layers) + 2 * pieces - (2 if pieces == 1 else 0)
    assert gathers == once * MICRO_BATCHES
    if pieces > 1:
        assert received == MICRO_BATCHES * (2 * sum(layers) + 2 * table.nbytes) * (shards - 1) // shards


def test_parameters_keep_what_is_known_of_them() -> None:
    with Layout(tp=2, dp=2).simulated():
        whole, sharded = (Decoder(MOE, None, dtype=torch.float64) for _ in range(2))
        shard_base(sharded)
        described = [
            [(entry.key, entry.dtype, entry.global_shape, entry.local_shape, entry.name) for entry in entries.values()]
            for entries in (whole.sharded_state_dict(), sharded.sharded_state_dict())
        ]
        assert described[0] == described[1]
        kept = {name for name, parameter in sharded.named_parameters() if not is_stored(parameter)}
        assert all("norm" in name for name in kept) and kept


@pytest.mark.parametrize("keep_base", [True, False])
def test_an_adapter_is_merged_into_a_sharded_base_and_taken_out_again(keep_base: bool) -> None:
    ids, losses = torch.arange(8)[None], []
    with Layout(dp=2).simulated():
        for shards in ("none", "all"):
            model = Decoder(DENSE, None, dtype=torch.float64)
            shard_base(model, shards)
            method = LoRA(dim=2, lora_B_init_method="normal", lora_dtype=torch.float64)
            adapted = method(model)
            before = model.token_losses(ids, ids).sum()
            method.merge(adapted, keep_base=keep_base)
            merged = model.token_losses(ids, ids).sum()
            stored = {n for n, p in model.named_parameters() if is_stored(p)}
            if keep_base:
                method.unmerge(adapted)
                assert torch.equal(the_same(before), the_same(model.token_losses(ids, ids).sum()))
            losses.append((the_same(before), the_same(merged)))
    assert all(torch.equal(*pair) for pair in zip(*losses, strict=True)) and not torch.equal(*losses[0])
    # Merged weights are sharded, too.
    assert stored == {n for n, p in model.named_parameters() if is_stored(p)} and "embedding.weight" in stored
