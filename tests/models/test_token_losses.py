"""The losses of tokens are those of all logits, with any adapter on the head, at any layout and in both engines."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.oracle_runs import OPTIONS, TOLERANCE, config, rows
from helpers.tiny_models import random_ids, save_tiny
from helpers.transformers_float64 import in_float64
from helpers.workers import run_on_ranks
from torch import nn
from transformers import LlamaForCausalLM

from meshpeft.models import Decoder, LanguageModel, ModelError, load_transformers
from meshpeft.models import head as head_module
from meshpeft.parallel import LogitScaling, ModelParallelConfig, init_parallelism, vocab_parallel_cross_entropy
from meshpeft.peft import CanonicalLoRA, DoRA, LoRA
from meshpeft.quantization import quantize_base
from meshpeft.verify.oracle import Layout, Trace, compare, trace_layout

TARGETS = ["linear_fc2", "output_layer"]
HEADS: dict[str, Callable[[Any], nn.Module]] = {
    "lora": LoRA(target_modules=TARGETS, **OPTIONS),
    "canonical_lora": CanonicalLoRA(target_modules=TARGETS, **OPTIONS),
    "dora": DoRA(target_modules=TARGETS, **OPTIONS),
    "lora, standalone": LoRA(target_modules=TARGETS, fused=False, **OPTIONS),
    "lora, dropout": LoRA(target_modules=TARGETS, dropout=0.3, **OPTIONS),
    "dora, dropout": DoRA(target_modules=TARGETS, dropout=0.3, **OPTIONS),
    "lora, dropped output": LoRA(target_modules=TARGETS, dropout=0.3, dropout_position="post", **OPTIONS),
}


def trace(layout: Layout, adapt: Callable[[Any], nn.Module], *, chunk: int | None, tied: bool = False) -> Trace:
    """Two steps; without a chunk, by all logits, as a model that does not have the loss in chunks takes them."""

    def make(parallel: ModelParallelConfig) -> Decoder:
        model = Decoder(config(tie_word_embeddings=tied), parallel, dtype=torch.float64)
        model.loss_chunk = chunk
        if chunk is None:
            object.__setattr__(model, "token_losses", lambda *a, **k: LanguageModel.token_losses(model, *a, **k))
        return model

    return trace_layout(layout, make, adapt, rows(), steps=2, clip=0.5, batch_size=4)


@pytest.mark.parametrize(
    ("layout", "tied"),
    (
        (Layout(micro_batch_size=2), True),
        (Layout(tp=2, micro_batch_size=4), True),
        (Layout(tp=2, dp=2, sequence_parallel=True, micro_batch_size=2), False),
    ),
    ids=str,
)
@pytest.mark.parametrize("head", HEADS)
def test_a_head_with_an_adapter(head: str, layout: Layout, tied: bool) -> None:
    """Dropout's masks belong to a layout, so the same layout is compared, by all logits."""
    if "dropout" in head or "dropped" in head:
        expected = trace(layout, HEADS[head], chunk=None, tied=tied)
    else:
        expected = trace(Layout(micro_batch_size=4), HEADS[head], chunk=None, tied=tied)
    errors = compare(expected, trace(layout, HEADS[head], chunk=7, tied=tied))
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize(
    ("change", "form"),
    (
        ("packed", "FrozenHead"),
        ("merged", "FrozenHead"),
        ("switched off", "FrozenHead"),
        ("evaluated", "AdaptedHead"),
        ("trained itself", "AdaptedHead"),
    ),
)
def test_heads_in_other_states(change: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are those of a call, and what needs no gradient is taken as frozen."""
    ids = random_ids()
    model: Any = Decoder(config(hidden_size=32, vocab_size=96), dtype=torch.float64).requires_grad_(False)
    if change == "packed":
        quantize_base(model, "int8", block_size=32, target_modules=["output_layer"], exclude_modules=())
    elif change == "trained itself":
        model.output_layer.requires_grad_()
    else:
        LoRA(target_modules=["output_layer"], **OPTIONS)(model)
    if change == "merged":
        model.output_layer.merge()
    elif change == "switched off":
        model.output_layer.disable_adapter_layers()
    forms: list[Any] = []
    right = head_module._form_of

    def form_of(*arguments: Any) -> Any:
        forms.append(right(*arguments))
        return forms[-1]

    monkeypatch.setattr(head_module, "_form_of", form_of)
    with torch.set_grad_enabled(change != "evaluated"):
        losses = model.token_losses(ids.roll(-1, 1), ids)
    assert [type(one).__name__ for one in forms] == [form]
    expected = vocab_parallel_cross_entropy(model(ids), ids.roll(-1, 1))
    torch.testing.assert_close(losses, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_labels_that_do_not_fit() -> None:
    model = Decoder(config(), dtype=torch.float64)
    ids = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ModelError, match=r"labels has shape \(2, 4\); expected that of input_ids, \(2, 5\)"):
        model.token_losses(ids[:, 1:], ids)
    with pytest.raises(ModelError, match="losses are of all tokens"):
        model.token_losses(ids, ids, last_token_only=True)


# What transformers does between head and logits: nothing, a factor, a divisor, a soft cap, a head with a bias, other
# things with a head of the model's own.
SCALED: dict[str, dict[str, Any]] = {
    "llama": {},
    "cohere": {},
    "granite": {"logits_scaling": 8.0},
    "gemma2": {"final_logit_softcapping": 3.0, "head_dim": 6, "query_pre_attn_scalar": 6, "num_hidden_layers": 2},
    "phi": {},
    "gpt2": {},
}
FOUND = {
    "cohere": LogitScaling(0.3),
    "granite": LogitScaling(1 / 8),
    "gemma2": LogitScaling(cap=3.0),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def directory(family: str) -> Path:
        return save_tiny(family, tmp_path_factory.mktemp(family), **SCALED[family])

    return directory


def of_transformers(directory: Path, tp: int, adapted: bool) -> dict[str, Any]:
    """Losses and gradients by chunks and by all logits, with what was found between head and logits."""
    init_parallelism(tensor_parallel=tp)
    results = []
    model: Any = in_float64(load_transformers(directory, torch.float64))  # type: ignore[arg-type]
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    LoRA(target_modules=["*mlp*", head] if adapted else ["*mlp*"], **OPTIONS)(model)
    model.loss_chunk = 5
    ids = random_ids()
    labels = ids.roll(-1, 1)
    labels[0, :4] = -100
    for losses_of in (model.token_losses, lambda *a: LanguageModel.token_losses(model, *a)):
        losses = losses_of(labels, ids)
        losses.backward(torch.linspace(-1, 1, losses.numel(), dtype=losses.dtype).view_as(losses))
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        results.append((losses.detach(), gradients))
    return {"scaling": model._logit_scaling(), "results": results}


@pytest.mark.parametrize(
    ("family", "tp", "adapted"),
    (
        *((family, 1, adapted) for family in SCALED for adapted in (False, True)),
        *((family, 2, True) for family in ("cohere", "gemma2", "phi")),
    ),
)
def test_a_model_of_transformers(family: str, tp: int, adapted: bool, tiny: Callable[[str], Path]) -> None:
    for found in run_on_ranks(tp, of_transformers, tiny(family), tp, adapted):
        assert found["scaling"] == FOUND.get(family, LogitScaling())
        (losses, gradients), (wanted, expected) = found["results"]
        torch.testing.assert_close(losses, wanted, rtol=TOLERANCE, atol=TOLERANCE)
        assert gradients.keys() == expected.keys() and len(gradients) >= 4
        torch.testing.assert_close(gradients, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_other_things_between_head_and_logits_are_left_to_transformers(tiny: Callable[[str], Path]) -> None:
    """A bias that the model adds itself, tokens that it rules out: all logits are made, and the losses are right."""
    model: Any = load_transformers(tiny("llama"), torch.float64)
    theirs = LlamaForCausalLM.forward

    def ruled_out(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = theirs(self, *args, **kwargs)
        out.logits = out.logits.index_fill(-1, torch.tensor([5]), -30.0)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "forward", ruled_out)
        ids = random_ids()
        losses = model.token_losses(ids, ids)
        assert model._logit_scaling() is None
        expected = vocab_parallel_cross_entropy(model(ids), ids)
    torch.testing.assert_close(losses, expected, rtol=TOLERANCE, atol=TOLERANCE)
