"""What adapters communicate: nothing where they join their layers, rank-sized tensors beside them; and its types."""

from __future__ import annotations

import pytest
import torch
from helpers.adapted_block import BATCH, SEQ, local_input, make_block
from helpers.simulate import simulate, the_same
from helpers.thinned import cross_section

from meshpeft.models import DecoderConfig
from meshpeft.parallel import ParallelError, finalize_gradients, layout_of_tensor, mp_reduce
from meshpeft.peft import CanonicalLoRA, DoRA, LoRA, fused_lora, fused_lora_reference
from meshpeft.peft import lora as lora_module
from meshpeft.peft.fused import product
from meshpeft.verify.simulation import Collective, count_collectives
from meshpeft.verify.typecheck import typecheck_layout

TP, DIM = 2, 4
TOKENS = SEQ * BATCH


def collectives(method, sequence_parallel):
    """Those of one forward and backward, after the first forward has computed what is cached."""
    with simulate(tp=TP) as info:
        block = make_block(method, sequence_parallel)
        x = local_input(info, sequence_parallel).requires_grad_()
        with torch.no_grad():
            block(x)
        with count_collectives() as seen:
            block(x).square().sum().backward()
        return sorted(seen)


def added(method, sequence_parallel):
    seen = collectives(method, sequence_parallel)
    for collective in collectives(None, sequence_parallel):
        seen.remove(collective)  # raises if the base's own is missing
    return seen


@pytest.mark.parametrize("sequence_parallel", (False, True))
@pytest.mark.parametrize("method", (LoRA, CanonicalLoRA, DoRA))
def test_a_fused_adapter_adds_no_collective(method, sequence_parallel):
    assert added(method(dim=DIM), sequence_parallel) == []


@pytest.mark.parametrize("method", (LoRA, CanonicalLoRA, DoRA))
def test_keeping_token_shards_adds_one_rank_sized_collective_to_a_column(method):
    ranks = (2 * DIM, 3 * DIM) if method is CanonicalLoRA else (DIM, DIM)  # of linear_fc1 and linear_qkv
    expected = [Collective("reduce_scatter", TOKENS * rank) for rank in ranks]
    assert added(method(dim=DIM, keep_token_shards=True), True) == expected
    # Where no sequence is gathered there is nothing to save.
    assert added(method(dim=DIM, keep_token_shards=True), False) == []


def kept_tokens_and_gradients(method, keep_token_shards, dropout):
    """Of `linear_qkv`: the lengths of what it keeps of its input, and its adapters' whole gradients."""
    targets = ["linear_q", "linear_v"] if method is CanonicalLoRA else ["linear_qkv"]
    adapters = method(
        targets, dim=DIM, dropout=dropout, keep_token_shards=keep_token_shards, lora_B_init_method="normal"
    )
    with simulate(tp=TP) as info:
        torch.manual_seed(0)
        layer = make_block(adapters, True).self_attention.linear_qkv
        x = local_input(info, True).requires_grad_()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = layer(x)
        y.square().sum().backward()
        finalize_gradients(layer)
        trained = [p for p in layer.parameters() if p.requires_grad]
        gradients = [the_same(layout_of_tensor(p).gather(p.grad)) for p in trained]
        return [t.shape[0] for t in saved if t.dim() == 3 and t.shape[-1] == x.shape[-1]], gradients


@pytest.mark.parametrize("dropout", (0.0, 0.1))
@pytest.mark.parametrize("method", (LoRA, CanonicalLoRA, DoRA))
def test_of_a_gathered_sequence_each_rank_keeps_its_tokens_and_the_gradients_are_the_same(method, dropout):
    whole, expected = kept_tokens_and_gradients(method, False, dropout)
    shards, gradients = kept_tokens_and_gradients(method, True, dropout)
    assert SEQ in whole and len(whole) == len(shards)
    assert sum(whole) - sum(shards) == SEQ - SEQ // TP
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", (LoRA, DoRA))
def test_a_standalone_adapter_all_reduces_its_bottleneck(method):
    # Once per layer: a column's in the backward pass, a row's in the forward.
    assert added(method(dim=DIM, fused=False), False) == [Collective("allreduce", TOKENS * DIM)] * 4


@pytest.mark.parametrize("method", (LoRA, DoRA))
def test_under_sequence_parallel_it_gathers_and_scatters_its_bottleneck(method):
    # Each layer once forward and once backward; a rank gives its shard to a gather, the whole to a scatter.
    assert added(method(dim=DIM, fused=False), True) == [
        *[Collective("allgather", TOKENS // TP * DIM)] * 4,
        *[Collective("reduce_scatter", TOKENS * DIM)] * 4,
    ]


def test_separate_adapters_of_a_fused_layer_share_one_collective():
    sizes = sorted(collective.elements // TOKENS for collective in added(CanonicalLoRA(dim=DIM, fused=False), False))
    assert sizes == [DIM, DIM, 2 * DIM, 3 * DIM]


def test_only_the_all_to_all_exchange_is_as_large_as_an_output():
    block_hidden = 24
    names = [c for c in added(LoRA(dim=DIM, fused=False, a2a_experimental=True), True) if "alltoall" in c.name]
    assert names == [Collective("alltoall", TOKENS * block_hidden // TP)] * 4


def test_dora_reduces_one_vector_per_row_layer_and_optimizer_step():
    with simulate(tp=TP) as info:
        block = make_block(DoRA(dim=DIM, lora_B_init_method="normal"))
        optimizer = torch.optim.SGD([p for p in block.parameters() if p.requires_grad], lr=1e-3)
        counts = []
        for _ in range(2):
            with count_collectives() as seen:
                for _ in range(3):  # micro-batches
                    block(local_input(info, False)).square().sum().backward()
            counts.append(sum(collective.elements == 24 for collective in seen))
            optimizer.step()
            optimizer.zero_grad()
    # The norms of the construction serve the first step.
    assert counts == [0, 2]


CONFIG = DecoderConfig(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1024,
    num_layers=1,
    num_attention_heads=16,
    num_query_groups=8,
    head_dim=32,
)
METHODS = {
    "lora": LoRA(dim=8),
    "lora, dropout after": LoRA(dim=8, dropout=0.1, dropout_position="post"),
    "canonical": CanonicalLoRA(dim=8, dropout=0.1),
    "dora": DoRA(dim=8),
    "dora, dropout": DoRA(dim=8, dropout=0.1),
    "lora, standalone": LoRA(dim=8, fused=False),
    "lora, standalone, all-to-all": LoRA(dim=8, fused=False, a2a_experimental=True),
    "canonical, standalone": CanonicalLoRA(dim=8, fused=False),
    "dora, standalone": DoRA(dim=8, fused=False, dropout=0.1),
}


@cross_section(2, method=METHODS, sequence_parallel=(False, True))
def test_states_are_right_at_4096_ranks(method, sequence_parallel):
    states = typecheck_layout(CONFIG, METHODS[method], tp=8, dp=512, sequence_parallel=sequence_parallel)
    assert states == {"tp": "I", "dp": "P"}


def test_the_unfused_twin_has_the_states_of_the_fused_function(monkeypatch):
    monkeypatch.setattr(lora_module, "fused_lora", fused_lora_reference)
    assert fused_lora is not lora_module.fused_lora
    assert typecheck_layout(CONFIG, LoRA(dim=8), tp=8, dp=512) == {"tp": "I", "dp": "P"}


def test_an_adapter_that_finishes_its_sum_before_the_base_does_is_caught(monkeypatch):
    def finished_too_early(x, weight, term):
        return product(x, weight) + product(mp_reduce(product(x, term.a)), term.b)

    monkeypatch.setattr(lora_module, "fused_lora", finished_too_early)
    with pytest.raises(ParallelError):
        typecheck_layout(CONFIG, LoRA(target_modules=["linear_fc2"], dim=8), tp=8, dp=512)
