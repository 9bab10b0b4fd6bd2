"""The hidden stream of transformers models: copied or gathered once a block, sharded between blocks, and exact."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import DENSE_FAMILIES, EXPERT_FAMILIES, config_of, random_ids, save_tiny
from helpers.transformers_float64 import in_float64
from torch import Tensor, nn

from meshpeft.engines.hidden_stream import layers_of_stream
from meshpeft.models import load_transformers, make_transformers_model
from meshpeft.parallel import ParallelError, finalize_gradients
from meshpeft.peft import LoRA
from meshpeft.training.adapters import add_adapter
from meshpeft.training.config import FinetuneConfig
from meshpeft.verify.simulation import count_collectives, simulate, the_same
from meshpeft.verify.transformers_layout import verify_transformers_layout

# Float64, sums in another order.
TOLERANCE = 1e-10
RUN = FinetuneConfig(rank=4, alpha=8, dtype="float64", share_expert_adapters=False, lora_b_init_method="normal")
# Blocks of every kind: q, k, v in one layer; one norm for two blocks; states that stay replicated; latent attention;
# experts that a layer calls itself; biases of rows; rotary angles in one tensor.
KINDS = ("phi3", "cohere", "qwen3_next", "deepseek_v3", "gemma4_text", "starcoder2", "deepseek_v2 with experts")
OTHERS = [name for name in (*DENSE_FAMILIES, *EXPERT_FAMILIES) if name not in (*KINDS, "gemma3n_text")]


@pytest.mark.parametrize("method", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", [*KINDS, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_a_fine_tune_on_token_shards_is_that_of_one_process(family: str, method: Any) -> None:
    """Rows of 15 tokens, which two ranks have to fill up."""
    run = replace(RUN, method=method)
    found = verify_transformers_layout(
        config_of(family), partial(add_adapter, config=run), tp=2, sequence_parallel=True, steps=2
    )
    assert {check.name: check.error for check in found.checks if not check.error < TOLERANCE} == {}


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("family", ["phi3", pytest.param("starcoder2", marks=pytest.mark.slow)])
def test_standalone_adapters_train_alike(family: str, sequence_parallel: bool) -> None:
    """Beside columns whose input is a copy, and rows whose output is a partial sum."""
    method = LoRA(["*.layers.*"], dim=4, alpha=8, fused=False, lora_B_init_method="normal", lora_dtype=torch.float64)
    found = verify_transformers_layout(
        config_of(family), method, tp=2, dp=2, sequence_parallel=sequence_parallel, steps=2
    )
    assert {check.name: check.error for check in found.checks if not check.error < TOLERANCE} == {}


def collectives(family: str, layers: int, sequence_parallel: bool) -> Counter[str]:
    """How often each collective is made in a forward and backward pass of a model of so many layers."""
    ids = random_ids()
    with simulate(tp=2):
        config = config_of(family, num_hidden_layers=layers)
        model: Any = make_transformers_model(config, torch.float32, sequence_parallel=sequence_parallel)
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02)
        model = add_adapter(model, RUN)
        model.get_input_embeddings().requires_grad_()  # so that the gradient goes the whole way back
        model.token_losses(ids, ids)  # how its logits are made is found once
        with count_collectives() as calls:
            model.token_losses(ids, ids).sum().backward()
    return Counter(call.name for call in calls)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("family", ["gemma", "phi3", "gpt_neox", "cohere"])
def test_a_block_communicates_once_at_its_beginning_and_once_at_its_end(family: str, sequence_parallel: bool) -> None:
    """In each pass, however many layers take its input, and none of it for their adapters."""
    of_a_layer = collectives(family, 3, sequence_parallel) - collectives(family, 2, sequence_parallel)
    # Attention and MLP.
    assert of_a_layer == ({"allgather": 4, "reduce_scatter": 4} if sequence_parallel else {"allreduce": 4})


def gradients_of_norms(directory: Path, tp: int, length: int) -> dict[str, Tensor]:
    ids = random_ids()[:, :length]
    with simulate(tp=tp):
        model: Any = in_float64(load_transformers(directory, torch.float64, sequence_parallel=tp > 1))
        model.requires_grad_(False)
        norms = {name: weight for name, weight in model.named_parameters() if "norm" in name}
        for weight in norms.values():
            weight.requires_grad_()
        model.token_losses(ids, ids).sum().backward()
        finalize_gradients(norms.values())
        return {name: the_same(weight.grad) for name, weight in norms.items() if weight.grad is not None}


@pytest.mark.parametrize("length", [12, 9])
@pytest.mark.parametrize("family", ["gemma", "starcoder2"])
def test_norms_between_blocks_train_on_their_shards(family: str, length: int, tmp_path: Path) -> None:
    directory = save_tiny(family, tmp_path)
    expected, found = (gradients_of_norms(directory, tp, length) for tp in (1, 4))
    assert found.keys() == expected.keys() and len(expected) >= 5
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-6
        torch.testing.assert_close(found[name], gradient, rtol=TOLERANCE, atol=TOLERANCE)


def test_more_than_one_vector_for_a_token_is_refused() -> None:
    """Gemma 3n's layers take four."""
    with simulate(tp=2):
        model: Any = make_transformers_model(config_of("gemma3n_text"), torch.float32, sequence_parallel=True)
        model.to_empty(device="cpu")
        with pytest.raises(ParallelError, match=r"hidden states of shape .* leave it out"):
            model(torch.ones(2, 6, dtype=torch.long))


def test_a_model_without_one_list_of_layers_is_refused() -> None:
    encoder = nn.ModuleList([nn.ModuleDict({"attention": nn.Linear(2, 2)})])
    model = nn.ModuleDict({"encoder": encoder, "decoder": nn.ModuleList([nn.Linear(2, 2)]), "images": nn.ModuleList()})
    assert layers_of_stream(model, ["decoder.0"]) == "decoder"
    for sharded, count in (([], 0), (["encoder.0.attention", "decoder.0"], 2)):
        with pytest.raises(ParallelError, match=f"this model has {count}"):
            layers_of_stream(model, sharded)
