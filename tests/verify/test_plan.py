"""What `plan` counts, against what a run holds and sends."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from helpers.simulate import simulate
from helpers.thinned import cross_section

from meshpeft.cli.main import main
from meshpeft.models import Decoder, DecoderConfig, MoEConfig
from meshpeft.parallel import ModelParallelConfig
from meshpeft.peft import CanonicalLoRA, DoRA, LoRA, LowRankPEFT
from meshpeft.verify import Traffic, plan
from meshpeft.verify.simulation import count_collectives

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


def test_of_a_model_with_experts_the_weights_are_counted() -> None:
    moe = MoEConfig(num_experts=8, moe_router_topk=2, intermediate_size=16)
    config = DecoderConfig(**{**CONFIG.__dict__, "moe": moe, "model_type": "mixtral"})
    one, four = (plan(config, LoRA(**OPTIONS), dp=4, ep=ep, dtype=torch.float64) for ep in (1, 4))
    experts = CONFIG.num_layers * 8 * 3 * 16 * CONFIG.hidden_size * 8
    assert one.base - four.base == experts * 3 // 4
    assert four.micro_batch is None and four.activations is None


def test_the_command_prints_what_was_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--tp", "2", "--seq-length", "64", "--no-fused", "--target-modules", "linear_fc2"]) == 0
    printed = capsys.readouterr().out
    assert "layout: 2 processes (tp=2)" in printed
    added = printed.split("of that for the adapter\n")[1].splitlines()[0].split()
    # 4 layers; 4 rows of 64 tokens, rank 16, float32.
    assert added == ["tp", "allreduce", "4", "x", "16.0", "KiB"]
