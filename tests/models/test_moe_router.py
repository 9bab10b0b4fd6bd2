"""The router's choice, the loss that balances it, and configurations that have experts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.simulate import rank_values, simulate, the_same
from helpers.tiny_models import MOE_FAMILIES, random_ids, reference
from torch import Tensor
from transformers import AutoConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from meshpeft.models import (
    Decoder,
    DecoderConfig,
    ModelError,
    ModelSharding,
    MoEConfig,
    TopKRouter,
    check_divisible,
    load_pretrained,
)
from meshpeft.models.moe import load_balancing_loss
from meshpeft.parallel import (
    ModelParallelConfig,
    TensorLayout,
    finalize_gradients,
    layer_type_of,
    layout_of,
    layout_of_tensor,
)

MOE = MoEConfig(num_experts=4, moe_router_topk=2, intermediate_size=24)
CONFIG = DecoderConfig(96, 32, 48, 3, 8, 4, 4, model_type="mixtral", moe=MOE)


def router(**changes: Any) -> TopKRouter:
    made = TopKRouter(6, replace(MOE, **changes), ModelSharding(dtype=torch.float64))
    with torch.no_grad():
        made.weight.copy_(torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    return made


def test_weights_are_a_softmax_before_or_after_the_choice() -> None:
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = router().gating(x)
    order = logits.argsort(-1, descending=True)[:, :2]
    probabilities = logits.softmax(-1).gather(-1, order)
    shares = probabilities / probabilities.sum(-1, keepdim=True)
    wanted = {(True, False): probabilities, (True, True): shares, (False, False): shares, (False, True): shares}
    for (first, normalize), weights in wanted.items():
        found = router(softmax_first=first, normalize_weights=normalize)(x)
        assert torch.equal(found.experts, order)
        torch.testing.assert_close(found.weights, weights, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("dtype", "wide"), ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64))
)
def test_the_softmax_is_taken_in_float32_or_wider(dtype: torch.dtype, wide: torch.dtype) -> None:
    logits = torch.randn(5, 4).to(dtype)
    assert router().routing(logits).weights.dtype == wide


def test_the_gradient_of_a_router_is_a_summand_over_tensor_parallel() -> None:
    with simulate(tp=2):
        decoder = Decoder(replace(CONFIG, moe=replace(MOE, shared_intermediate_size=24)), device="meta")
        found = decoder.decoder.layers[0].mlp.router
        layer_type = layer_type_of(found)
        assert layer_type is not None and layer_type.takes_adapters_inside
        for layout in (layout_of_tensor(found.weight), layout_of(found).factor_a(2), layout_of(found).factor_b(2)):
            assert layout is not None and [axis.name for axis in layout.grad_partial] == ["tp"]
        gate = decoder.decoder.layers[0].mlp.shared_experts.gate
        assert layout_of_tensor(gate.weight).grad_partial == ()  # without sequence parallel all ranks see all tokens


# (tp, ep, etp, dp, sequence parallel, activation checkpointing)
LAYOUTS = [
    (1, 1, 1, 1, False, False),
    (1, 1, 1, 1, False, True),
    (1, 2, 1, 2, False, False),
    (2, 2, 1, 1, True, True),
    (2, 2, 2, 2, True, False),
    (2, 1, 2, 1, False, False),
    (4, 2, 2, 1, False, True),
]
IDS = random_ids(4, 7)
# Rows with padding at the end, in the middle, and with nothing else.
DOCUMENTS = torch.tensor([[0] * 7, [0] * 4 + [-1] * 3, [0, 0, -1, 1, 1, 1, 1], [-1] * 7])
ROW_WEIGHTS = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)


def balance_of(directory: Path, layout: tuple[int, int, int, int, bool, bool]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each row, and the gradient of their weighted sum for every router."""
    tp, ep, etp, dp, sequence_parallel, recompute = layout
    with simulate(tp=tp, ep=ep, etp=etp, dp=dp) as mesh:
        parallel = ModelParallelConfig(tp, 1, ep, etp, sequence_parallel=sequence_parallel)
        decoder = load_pretrained(directory, torch.float64, parallel, recompute)

        def mine(full: Tensor) -> Tensor:
            return TensorLayout(tuple(full.shape), ((0, mesh.dp),)).slice(full)

        logits, loss = decoder(mine(IDS), document_ids=mine(DOCUMENTS), return_router_loss=True)
        # Both parts of what a step adds up; the logits' own part is nothing here.
        ((loss * mine(ROW_WEIGHTS)).sum() + 0 * logits.sum()).backward()
        finalize_gradients(decoder)
        gradients = {
            name: the_same(parameter.grad) for name, parameter in decoder.named_parameters() if "router" in name
        }
        whole = TensorLayout((4,), ((0, mesh.dp),)).gather(loss)
        return the_same(whole), gradients


@functools.cache
def dense_balance(directory: Path) -> tuple[Tensor, list[Tensor]]:
    """The same by transformers' router logits: each document by itself, the tokens of a row then counted together."""
    model = reference(directory)
    losses = []
    for row, documents in zip(IDS, DOCUMENTS, strict=True):
        runs = [model(row[documents == one][None], output_router_logits=True) for one in set(documents.tolist()) - {-1}]
        layers = [torch.cat(parts) for parts in zip(*(run.router_logits for run in runs), strict=True)]
        losses.append(
            torch.stack([dense_loss(logits) for logits in layers]).mean()
            if layers
            else torch.zeros((), dtype=torch.float64)
        )
    whole = torch.stack(losses)
    (whole * ROW_WEIGHTS).sum().backward()
    return whole.detach(), [p.grad for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")]


def dense_loss(logits: Tensor, top_k: int = 2) -> Tensor:
    """E sum_e f_e p_e of one row: logits [tokens, E] -> a scalar."""
    chosen = logits.argsort(-1, descending=True)[:, :top_k]
    counts = torch.stack([(chosen == expert).sum() for expert in range(logits.shape[1])])
    return logits.shape[1] * (counts.to(logits.dtype) / len(logits) * logits.softmax(-1).mean(0)).sum()


def test_the_balancing_loss_is_transformers() -> None:
    logits = torch.randn(11, 8, generator=torch.Generator().manual_seed(2))
    rows = torch.ones(11, 1)
    found = load_balancing_loss(router(moe_router_topk=3).routing(logits), rows, ModelSharding())
    # Means of 11 numbers in float32.
    torch.testing.assert_close(found[0], load_balancing_loss_func((logits,), 8, 3), rtol=1e-6, atol=0)
    torch.testing.assert_close(found[0], dense_loss(logits, 3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_balancing_loss_is_a_dense_models_at_every_layout(tiny: Callable[[str], Path], layout: Any) -> None:
    wanted, gradients = dense_balance(tiny("qwen3_moe"))
    found, router_gradients = balance_of(tiny("qwen3_moe"), layout)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    assert len(router_gradients) == len(gradients) == 2
    for ours, theirs in zip(router_gradients.values(), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11 * float(theirs.abs().max()))


def test_only_a_model_with_experts_has_a_router_loss(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match="return_router_loss: this llama model has no layer with experts"):
        load_pretrained(tiny("llama"))(IDS, return_router_loss=True)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_a_configuration_survives_the_round_trip(family: str) -> None:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 3}
    theirs = AutoConfig.for_model(
        family, **{**sizes, **MOE_FAMILIES[family]}, eos_token_id=[3, 4], router_aux_loss_coef=0.02
    )
    back = DecoderConfig.from_hf(theirs).to_hf().to_dict()
    assert back.pop("architectures") == [type(theirs).__name__.replace("Config", "ForCausalLM")]
    assert back == {name: value for name, value in theirs.to_dict().items() if name != "architectures"}


def test_which_layers_have_experts() -> None:
    def layers(**fields: Any) -> list[int]:
        sizes = {"num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "num_experts": 4}
        config = DecoderConfig.from_hf({"model_type": "qwen2_moe", **sizes, "num_experts_per_tok": 2, **fields})
        return [layer for layer in range(6) if config.has_experts(layer)]

    assert layers() == [0, 1, 2, 3, 4, 5]
    assert layers(decoder_sparse_step=2) == [1, 3, 5]
    assert layers(decoder_sparse_step=3, mlp_only_layers=[5]) == [2]


@pytest.mark.parametrize(
    ("fields", "message"),
    (
        ({"num_experts_per_tok": 9}, "the router chooses 9 experts per token, and there are 8; use a top-k of at most"),
        ({"num_experts": 0}, "num_experts=0 of the experts: expected an integer of at least 1"),
        ({"decoder_sparse_step": 0}, "sparse_step=0"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2 is not implemented"),
    ),
)
def test_what_is_not_implemented_is_an_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        DecoderConfig.from_hf(
            {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 4, **fields}
        )


def test_jitter_noise_is_refused() -> None:
    with pytest.raises(ModelError, match=r"router_jitter_noise=0\.1"):
        DecoderConfig.from_hf({"model_type": "mixtral", "router_jitter_noise": 0.1})


def test_a_family_cannot_express_another_familys_experts() -> None:
    with pytest.raises(ModelError, match="a mixtral configuration cannot express"):
        replace(CONFIG, moe=replace(MOE, shared_intermediate_size=8)).to_hf()
    with pytest.raises(ModelError, match="a mixtral model has experts, and this configuration has none"):
        replace(CONFIG, moe=None).to_hf()
    with pytest.raises(ModelError, match="a llama configuration cannot express"):
        replace(CONFIG, model_type="llama").to_hf()


@pytest.mark.parametrize(
    ("changes", "sizes", "message"),
    (
        ({}, {"expert_model_parallel_size": 3}, r"^experts: 4 experts .* expert_parallel=3; use 1, 2 or 4$"),
        ({}, {"expert_tensor_parallel_size": 5}, r"^experts: 24 channels .* expert_tensor_parallel=5; use 1, 2, 3"),
        (
            {"shared_intermediate_size": 6},
            {"tensor_model_parallel_size": 4},
            r"^shared_experts: 6 channels .* use 1 or 2$",
        ),
        ({}, {"expert_model_parallel_size": 0}, "expert_parallel=0: expected at least 1"),
    ),
)
def test_sizes_that_do_not_divide_name_those_that_would(
    changes: dict[str, int], sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        check_divisible(replace(CONFIG, moe=replace(MOE, **changes)), ModelParallelConfig(**sizes))


def test_only_layers_without_experts_need_an_mlp_that_divides() -> None:
    odd = replace(CONFIG, intermediate_size=47, moe=replace(MOE, intermediate_size=24))
    check_divisible(odd, ModelParallelConfig(tensor_model_parallel_size=2))
    dense = replace(odd, moe=replace(MOE, dense_layers=(1,)))
    with pytest.raises(ModelError, match="linear_fc1: 47 channels"):
        check_divisible(dense, ModelParallelConfig(tensor_model_parallel_size=2))


def test_expert_parallel_needs_experts_and_the_same_mesh() -> None:
    with pytest.raises(ModelError, match="expert_parallel=2: a mixtral model has no experts; use 1"):
        check_divisible(replace(CONFIG, moe=None), ModelParallelConfig(expert_model_parallel_size=2))
    with simulate(dp=2, ep=2, etp=1), pytest.raises(ModelError, match=r"expert_model_parallel_size=1, .* ep=2"):
        Decoder(CONFIG, ModelParallelConfig(), device="meta")
    with simulate(dp=2, ep=2, etp=1):
        assert Decoder(CONFIG, device="meta").sharding.ep.world_size == 2


def test_new_weights_are_the_same_at_every_layout() -> None:
    config = replace(CONFIG, moe=replace(MOE, shared_intermediate_size=24), initializer_range=0.1)
    alone = Decoder(config, dtype=torch.float64)(IDS)
    with simulate(tp=2, dp=2, ep=2, etp=2):
        # Each rank's own: ranks that send the same tokens fill different rows of an expert's product, whose sums the
        # processor may take in other orders.
        for found in rank_values(Decoder(config, dtype=torch.float64)(IDS, gather_logits=True)):
            torch.testing.assert_close(found, alone, rtol=1e-12, atol=1e-14)
