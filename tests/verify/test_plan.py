"""What `plan` counts, against what a run holds and sends."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.simulate import simulate
from helpers.thinned import cross_section
from transformers import Phi3Config

from meshpeft.cli.main import main
from meshpeft.data.batches import MicroBatch
from meshpeft.models import Decoder, DecoderConfig, MoEConfig
from meshpeft.models.base_blocks import rows_of_tables, shard_base
from meshpeft.models.spans import Spans
from meshpeft.parallel import ModelParallelConfig
from meshpeft.parallel.sharded_base import is_stored
from meshpeft.peft import CanonicalLoRA, DoRA, LoRA, LowRankPEFT
from meshpeft.quantization import BaseQuantizer, quantize_base
from meshpeft.training.step import summed_loss
from meshpeft.verify import Traffic, plan
from meshpeft.verify.few_layers import few_layers
from meshpeft.verify.memory import MemoryWatch
from meshpeft.verify.simulation import count_collectives
from meshpeft.verify.watch import watching

CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=4,
)
TOKENS, RANK, TP = 16, 4, 2
OPTIONS: dict[str, Any] = {"dim": RANK, "lora_dtype": torch.float64}


def planned(method: LowRankPEFT, **options: Any) -> Any:
    return plan(CONFIG, method, tp=TP, dp=4, micro_batch_size=2, seq_length=TOKENS // 2, dtype=torch.float64, **options)


METHODS: dict[str, LowRankPEFT] = {
    "lora": LoRA(**OPTIONS),
    "canonical, standalone": CanonicalLoRA(**OPTIONS, fused=False),
    "dora": DoRA(**OPTIONS),
}


@cross_section(2, method=METHODS, sequence_parallel=(True, False))
def test_weights_and_collectives_are_those_of_a_simulated_run(method: str, sequence_parallel: bool) -> None:
    with simulate(tp=TP, dp=2):
        parallel = ModelParallelConfig(TP, sequence_parallel=sequence_parallel)
        model = Decoder(CONFIG, parallel, dtype=torch.float64).requires_grad_(False)
        base = sum(parameter.nbytes for parameter in model.parameters())
        METHODS[method](model)
        adapter = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        ids = torch.zeros((2, TOKENS // 2), dtype=torch.long)
        with count_collectives() as calls:
            model.token_losses(ids, ids).sum().backward()
    found = planned(METHODS[method], sequence_parallel=sequence_parallel)
    assert (found.base, found.adapter, found.gradients, found.optimizer) == (base, adapter, adapter, 2 * adapter)
    expected: Counter[tuple[str, int]] = Counter()
    for call in calls:
        expected[call.name, 0] += 1
        expected[call.name, 1] += call.bytes
    assert {(one.name, 0): one.calls for one in found.micro_batch} | {
        (one.name, 1): one.bytes for one in found.micro_batch
    } == dict(expected)
    assert {one.axis for one in found.micro_batch} == {"tp"}


def test_an_adapter_beside_its_layers_adds_rank_sized_collectives_and_one_inside_adds_none() -> None:
    assert planned(LoRA(**OPTIONS)).added == ()
    size = TOKENS * RANK * 8
    layers = 4 * CONFIG.num_layers
    assert planned(LoRA(**OPTIONS, fused=False)).added == (Traffic("tp", "allreduce", layers, layers * size),)


def test_gradients_are_summed_once_a_step_over_the_axes_of_their_layouts() -> None:
    found = planned(LoRA(target_modules=["linear_fc2"], **OPTIONS))
    b = CONFIG.hidden_size * RANK * 8 * CONFIG.num_layers  # a summand over tp as well
    a = CONFIG.intermediate_size // TP * RANK * 8 * CONFIG.num_layers
    loss = norm = 8
    assert found.step == (
        Traffic("dp", "allreduce", 2, a + loss),
        Traffic("dp+tp", "allreduce", 1, b),
        Traffic("tp", "allreduce", 1, norm),
    )


def test_what_is_kept_follows_the_options() -> None:
    plain, shards, recomputed = (
        planned(method, sequence_parallel=True, activation_checkpointing=recompute).activations
        for method, recompute in (
            (LoRA(**OPTIONS), False),
            (LoRA(**OPTIONS, keep_token_shards=True), False),
            (LoRA(**OPTIONS), True),
        )
    )
    # Of two gathered inputs a layer one half each.
    assert plain - shards == 2 * CONFIG.num_layers * TOKENS * CONFIG.hidden_size * 8 // TP
    assert recomputed < plain / 3


def test_of_the_loss_a_gradient_for_each_token_is_kept_and_nothing_of_the_vocabulary() -> None:
    wide, narrow = (DecoderConfig(**{**CONFIG.__dict__, "vocab_size": size}) for size in (4096, 64))
    found = [plan(config, LoRA(**OPTIONS), seq_length=TOKENS, dtype=torch.float64) for config in (wide, narrow)]
    assert found[0].activations == found[1].activations
    assert found[0].base > found[1].base


MOE = MoEConfig(num_experts=8, moe_router_topk=2, intermediate_size=16)
EXPERTS = DecoderConfig(**{**CONFIG.__dict__, "moe": MOE, "model_type": "mixtral"})


@pytest.mark.parametrize(
    ("config", "mode", "dropout"),
    [
        (CONFIG, "none", 0),
        (CONFIG, "selective", 0),
        (CONFIG, "full", 0),
        (EXPERTS, "selective", 0),
        (CONFIG, "none", 0.5),
    ],
    ids=("none", "selective", "full", "experts", "dropout"),
)
def test_memory_is_what_tensors_with_values_take(config: DecoderConfig, mode: Any, dropout: float) -> None:
    method = LoRA(**OPTIONS, dropout=dropout)
    found = plan(config, method, seq_length=TOKENS, activation_checkpointing=mode, dtype=torch.float64)
    model = Decoder(config, dtype=torch.float64).requires_grad_(False)
    model.set_activation_checkpointing(mode)
    method(model)
    ids = torch.arange(TOKENS)[None]
    with watching(memory := MemoryWatch()):
        loss = summed_loss(model, MicroBatch(ids, ids, ids, torch.zeros_like(ids), spans=Spans.of_rows(*ids.shape)))
        kept = memory.alive()
        loss.backward()
    assert found.activations == kept
    # With values, sorting the labels holds one index a token longer.
    assert found.transient + TOKENS * 8 >= memory.peak() - kept >= found.transient > 0


def test_what_a_layer_keeps_is_what_its_mode_names() -> None:
    def of_a_layer(mode: Any) -> int:
        two, three = (
            plan(
                DecoderConfig(**{**CONFIG.__dict__, "num_layers": layers}),
                LoRA(**OPTIONS),
                seq_length=TOKENS,
                activation_checkpointing=mode,
                dtype=torch.float64,
            ).activations
            for layers in (2, 3)
        )
        return (three - two) // (TOKENS * 8)

    hidden, heads = CONFIG.hidden_size, CONFIG.num_attention_heads * CONFIG.head_dim
    assert of_a_layer("full") == hidden
    # The inputs of its halves and of linear_proj and linear_fc2, and the rank-sized product of each of the two.
    selective = 2 * hidden + heads + CONFIG.intermediate_size + 2 * RANK
    assert of_a_layer("none") > 2 * selective == 2 * of_a_layer("selective")


def test_experts_are_counted_by_expectation_and_in_the_worst_case() -> None:
    one, four = (
        plan(EXPERTS, LoRA(**OPTIONS), dp=4, ep=ep, seq_length=TOKENS, activation_checkpointing="selective",
             dtype=torch.float64)
        for ep in (1, 4)
    )  # fmt: skip
    experts = CONFIG.num_layers * MOE.num_experts * 3 * MOE.intermediate_size * CONFIG.hidden_size * 8
    assert one.base - four.base == experts * 3 // 4
    # On one rank nothing depends on the routing. On four, each rank's rows go to two experts of the worst one.
    assert one.worst_activations == one.activations
    rows = 4 * TOKENS * MOE.moe_router_topk - TOKENS * MOE.moe_router_topk
    # As they arrived, between the layers of an expert, rank-sized before the second; and where they came from.
    a_row = CONFIG.hidden_size + MOE.intermediate_size + RANK + 2
    assert four.worst_activations - four.activations == CONFIG.num_layers * rows * a_row * 8
    assert four.worst_transient > four.transient
    sent = TOKENS * MOE.moe_router_topk * CONFIG.hidden_size * 8
    (exchanged,) = (traffic for traffic in four.micro_batch if traffic.name == "alltoall")
    # Rows out and back in both passes; and counts.
    counts = CONFIG.num_layers * MOE.num_experts * 8
    assert exchanged.bytes == 4 * CONFIG.num_layers * sent + counts


def test_a_model_of_transformers_is_counted_from_its_configuration() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Phi3Config(vocab_size=64, intermediate_size=48, pad_token_id=0, tie_word_embeddings=False, **sizes)
    two, one = (plan(config, LoRA(["qkv_proj"], dim=RANK), tp=tp, seq_length=TOKENS) for tp in (2, 1))
    # Norms are on both ranks, and so are the values of a sliced layer's share.
    norms = 5 * 32 * 2
    assert one.base - norms == 2 * (two.base - norms)
    assert one.base == 2 * (2 * 64 * 32 + 2 * (32 * 64 + 32 * 32 + 3 * 48 * 32)) + norms
    assert one.activations > two.activations > 0 and two.transient > 0
    assert {(traffic.axis, traffic.name) for traffic in two.micro_batch} == {("tp", "allgather"), ("tp", "allreduce")}


def test_the_command_prints_what_was_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--tp", "2", "--seq-length", "64", "--no-fused", "--target-modules", "linear_fc2"]) == 0
    printed = capsys.readouterr().out
    assert "layout: 2 processes (tp=2)" in printed
    added = printed.split("of that for the adapter\n")[1].splitlines()[0].split()
    # 4 layers; 4 rows of 64 tokens, rank 16, float32.
    assert added == ["tp", "allreduce", "4", "x", "16.0", "KiB"]


NF4 = BaseQuantizer("nf4", 32)
HYBRID = replace(
    EXPERTS, num_layers=9, moe=replace(MOE, dense_layers=(0, 1, 2, 4)), sliding_windows=(None, *[4, None] * 4)
)


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (replace(CONFIG, num_layers=8), {"tp": 2, "dp": 2, "sequence_parallel": True}),
        (
            replace(CONFIG, num_layers=8, intermediate_size=64),
            {"dp": 4, "shard_base": "all", "quantizer": BaseQuantizer("nf4", 32)},
        ),
        (replace(CONFIG, num_layers=8), {"tp": 2, "dp": 4, "shard_base": 2}),
        (HYBRID, {"dp": 4, "ep": 2}),
        (HYBRID, {"dp": 4, "ep": 2, "shard_base": "all"}),
    ],
    ids=("dense", "packed and sharded", "sharded over two", "hybrid", "hybrid, sharded"),
)
def test_a_few_layers_of_each_kind_add_up_to_the_whole_model(
    config: DecoderConfig, layout: dict[str, Any], mode: Any
) -> None:
    options = {**layout, "activation_checkpointing": mode, "seq_length": TOKENS, "dtype": torch.float64}
    few, whole = (plan(config, LoRA(**OPTIONS), models=models, **options) for models in (None, [(1, config)]))
    assert few == replace(whole, kernels=few.kernels)
    assert [(*kind, round(count, 6)) for *kind, count in few.kernels] == [
        (*kind, round(count, 6)) for *kind, count in whole.kernels
    ]
    assert len(few_layers(config)) > 1


def test_a_sharded_base_is_counted_in_the_bytes_it_is_stored_in() -> None:
    layers = replace(CONFIG, num_layers=4, intermediate_size=64)
    with simulate(dp=4):
        model = Decoder(layers, dtype=torch.float64).requires_grad_(False)
        quantize_base(model, "nf4", block_size=32, exclude_modules=("output_layer",))
        whole = sum(parameter.nbytes for parameter in model.parameters())
        tables, rows = [model.embedding.weight, model.output_layer.weight], rows_of_tables(model)
        pieces = sum(-(-table.shape[0] // rows) if rows else 1 for table in tables)
        (store,) = shard_base(model, "all")
        kept = sum(parameter.nbytes for parameter in model.parameters() if not is_stored(parameter))
    options: dict[str, Any] = {
        "dp": 4, "seq_length": TOKENS, "dtype": torch.float64, "quantizer": NF4
    }  # fmt: skip
    one, found = (plan(layers, LoRA(**OPTIONS), shard_base=shards, **options) for shards in ("none", "all"))
    assert one.base == whole and one.buffers == 0 and one.gathers == ()
    assert found.base == kept + store.nbytes and found.buffers == store.buffer_bytes
    assert (found.activations, found.transient) == (one.activations, one.transient)
    (gathers,) = found.gathers
    assert gathers in found.micro_batch and gathers.axis == "dp" and gathers.ranks == gathers.span == 4
    # Each layer in both passes, each part of a table in the forward pass; with two parts, two are there at a turn.
    assert gathers.calls == 2 * layers.num_layers + pieces - (2 if pieces == 2 else 0)


def test_products_are_those_of_the_weights_and_of_attention() -> None:
    plain = replace(CONFIG, vocab_size=16)
    found = plan(plain, LoRA(**OPTIONS), seq_length=TOKENS, dtype=torch.float64)
    hidden, inner, heads, groups = 32, 48, 8, 4
    weights = hidden * (heads + 2 * groups) * 4 + heads * 4 * hidden + 3 * hidden * inner
    # Forward, and of all layers but the first what comes to its input; the head in the forward pass alone, twice.
    frozen = 2 * TOKENS * (2 * plain.num_layers * weights + 2 * 16 * hidden)
    products = sum(products * count for products, _, count in found.kernels)
    assert 0.9 * frozen < products < 1.6 * frozen
