"""The routers' load-balancing loss is one number of the global batch, at every layout and with every micro-batch."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from helpers.oracle_runs import OPTIONS, TOLERANCE, VOCAB_SIZE, rows
from helpers.thinned import thinned

from meshpeft.data.batches import IGNORED_LABEL
from meshpeft.models import Decoder, DecoderConfig, ModelError
from meshpeft.parallel import ModelParallelConfig, vocab_parallel_cross_entropy
from meshpeft.peft import LoRA
from meshpeft.training.step import TrainStep, adamw
from meshpeft.verify.oracle import Layout, Trace, compare, trace_layout

COEFFICIENT = 0.3


def make_model(parallel: ModelParallelConfig | None = None, model_type: str = "qwen3_moe") -> Decoder:
    sizes: dict[str, Any] = {
        "model_type": model_type,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 4,
        "vocab_size": VOCAB_SIZE,
        "initializer_range": 0.3,
    }
    if model_type == "qwen3_moe":
        sizes |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    return Decoder(DecoderConfig.from_hf(sizes), parallel, dtype=torch.float64)


adapt = LoRA(["linear_qkv", "linear_proj", "router"], **OPTIONS)


def run(layout: Layout, coefficient: float = COEFFICIENT) -> Trace:
    return trace_layout(
        layout, make_model, adapt, rows(), steps=2, batch_size=5, clip=0.5, router_aux_loss_coef=coefficient
    )


@cache
def one_rank() -> Trace:
    return run(Layout())


LAYOUTS = (
    # 5 rows over 2 ranks: one gets a row of padding, which has no balance.
    Layout(dp=2, ep=2, micro_batch_size=3, activation_checkpointing=True),
    Layout(micro_batch_size=2),
    Layout(tp=2, dp=2, ep=2, etp=1, sequence_parallel=True, micro_batch_size=2),
    Layout(tp=2, etp=2, micro_batch_size=4),
)


@pytest.mark.parametrize("layout", thinned(LAYOUTS, 2), ids=str)
def test_the_loss_with_the_routers_balance_does_not_depend_on_the_layout(layout: Layout) -> None:
    errors = compare(one_rank(), run(layout))
    assert max(errors.values()) < TOLERANCE, errors


def test_each_row_counts_by_its_target_tokens() -> None:
    """Loss and gradient are those of the formula, written down once more: rows of unequal numbers of targets."""
    batch = rows().gather(np.arange(4))
    targets = (batch.labels != IGNORED_LABEL).sum(-1).double()
    assert len(set(targets.tolist())) > 1
    model = adapt(make_model())
    step = TrainStep(model, adamw(model, lr=1.0), router_aux_loss_coef=COEFFICIENT)
    logits, balance = model(batch.input_ids, document_ids=batch.document_ids, return_router_loss=True)
    entropy = vocab_parallel_cross_entropy(logits, batch.labels, ignore_index=IGNORED_LABEL).sum() / targets.sum()
    share = targets / targets.sum()
    expected = torch.autograd.grad(entropy + COEFFICIENT * (share * balance).sum(), step.parameters)
    result = step([batch], int(targets.sum()))
    found = [parameter.grad for parameter in step.parameters]
    torch.testing.assert_close(result.loss, entropy.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(result.router_loss, (share * balance).sum().detach(), rtol=1e-12, atol=0)
    # float64, one sum in another order.
    torch.testing.assert_close(found, list(expected), rtol=1e-9, atol=1e-13)


def test_it_is_off_unless_asked_for_and_changes_the_gradients_when_it_is_on() -> None:
    off = run(Layout(), 0.0)
    assert one_rank().losses[0] > off.losses[0]
    errors = compare(off, one_rank())
    assert errors["gradient"] > 1e-3
    model = adapt(make_model())
    batch = rows().gather(np.arange(2))
    assert TrainStep(model, adamw(model, lr=1.0))([batch], 1).router_loss is None


def test_a_model_without_experts_has_no_balance() -> None:
    model = LoRA(["linear_qkv"], **OPTIONS)(make_model(model_type="qwen3"))
    step = TrainStep(model, adamw(model, lr=1.0), router_aux_loss_coef=COEFFICIENT)
    with pytest.raises(ModelError, match="this qwen3 model has no layer with experts"):
        step([rows().gather(np.arange(2))], 1)
