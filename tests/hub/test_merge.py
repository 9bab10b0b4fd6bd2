"""Merged models: what transformers computes with them is what the adapted model computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.adapters import METHODS, adapted
from helpers.simulate import simulate, the_same
from helpers.tiny_models import random_ids, reference
from torch import nn

from meshpeft.checkpoint import CheckpointError, export_peft_adapter, merge_adapter
from meshpeft.models import load_pretrained
from meshpeft.parallel import layout_of_tensor
from meshpeft.peft import LoRA, LoRALinear, ParallelLinearAdapter, adapter_wrappers

Tiny = Callable[[str], Path]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_merged_model_computes_what_the_adapted_one_did(family: str, method: str, tiny: Tiny, tmp_path: Path) -> None:
    ids = random_ids()
    expected = adapted(tiny(family), method=method).eval()(ids)
    with simulate(tp=2):
        model = merge_adapter(adapted(tiny(family), method=method), tmp_path / "merged").eval()
        assert not list(adapter_wrappers(model))
        torch.testing.assert_close(the_same(model(ids, gather_logits=True)), expected, rtol=0.0, atol=1e-11)
    with torch.no_grad():
        theirs = reference(tmp_path / "merged")(ids).logits
    torch.testing.assert_close(theirs, expected, rtol=0.0, atol=1e-11)


def test_a_merge_in_bfloat16_keeps_updates_below_its_rounding(tiny: Tiny) -> None:
    model = LoRA(["linear_proj"], dim=4, alpha=4, lora_B_init_method="normal", lora_dtype=torch.float32)(
        load_pretrained(tiny("llama"), torch.bfloat16)
    )
    layer = model.decoder.layers[0].self_attention.linear_proj
    a, b = layer.factors()
    weight = layer.to_wrap.weight.detach()
    exact = weight.float() + b @ a
    merged = merge_adapter(model).decoder.layers[0].self_attention.linear_proj.weight
    assert torch.equal(merged, exact.bfloat16())
    assert not torch.equal(merged, weight + b.bfloat16() @ a.bfloat16())


def test_a_tied_head_gets_its_own_weight(tiny: Tiny, tmp_path: Path) -> None:
    ids = random_ids()
    model = adapted(tiny("qwen2"), ["output_layer"]).eval()
    with torch.no_grad():
        expected = model(ids)
    before = model.embedding.weight.detach().clone()
    merge_adapter(model, tmp_path / "merged")
    assert torch.equal(model.embedding.weight, before)
    # transformers would find out by itself, other readers would tie them again.
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    with torch.no_grad():
        theirs = reference(tmp_path / "merged")(ids).logits
    torch.testing.assert_close(theirs, expected, rtol=0.0, atol=1e-11)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_tied_head_that_is_unmerged_is_tied_again(tp: int, tiny: Tiny) -> None:
    base, ids = tiny("qwen2"), random_ids()
    with simulate(tp=tp):
        model = adapted(base, ["output_layer", "linear_proj"]).eval()
        embedding = model.embedding.weight
        expected, values = model(ids).detach(), embedding.detach().clone()
        method = model.output_layer.applied_by
        method.merge(model)
        torch.testing.assert_close(model(ids).detach(), expected, rtol=0.0, atol=1e-11)
        assert torch.equal(embedding, values) and model.output_layer.to_wrap.weight is not embedding
        assert layout_of_tensor(model.output_layer.to_wrap.weight) == layout_of_tensor(embedding)
        method.unmerge(model)
        assert torch.equal(model(ids), expected) and model.output_layer.to_wrap.weight is embedding


@pytest.mark.parametrize(("family", "targets"), [("qwen2", ["lm_head", "o_proj"]), ("bert", ["decoder", "query"])])
def test_the_tied_head_of_a_transformers_model_gets_its_own_weight(
    tiny: Tiny, tmp_path: Path, family: str, targets: list[str]
) -> None:
    """And its own bias, where that is tied too (BERT)."""
    ids, model = random_ids(), reference(tiny(family))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    LoRA(targets, dim=4, lora_B_init_method="normal")(model, training=False)
    with torch.no_grad():
        expected = model(ids).logits
        merge_adapter(model).save_pretrained(tmp_path / "merged")
        theirs = reference(tmp_path / "merged")(ids).logits
    torch.testing.assert_close(theirs, expected, rtol=0.0, atol=1e-11)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False


def test_what_cannot_be_merged_is_left_as_it_is(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="carries no adapter"):
        merge_adapter(load_pretrained(tiny("llama")))
    model = nn.Sequential(nn.Linear(4, 4))
    swish = ParallelLinearAdapter(4, 4, 2, "0", base_linear_is_parallel=False)
    model[0] = LoRALinear(model[0], swish)
    for refused in (lambda: merge_adapter(model), lambda: export_peft_adapter(model, tmp_path / "adapter")):
        with pytest.raises(CheckpointError, match=r"0: (a LoRALinear on .* no counterpart|an adapter with an)"):
            refused()
    assert isinstance(model[0], LoRALinear)
    with pytest.raises(CheckpointError, match="merge it without a directory"):
        merge_adapter(LoRA(["0"], dim=2)(nn.Sequential(nn.Linear(4, 4))), tmp_path / "merged")
    model = adapted(tiny("llama"))
    with pytest.raises(CheckpointError, match="holds a model"):
        merge_adapter(model, tiny("llama"))
    LoRA().disable_adapter_layers(model)
    with pytest.raises(CheckpointError, match="switched off"):
        merge_adapter(model)
    assert list(adapter_wrappers(model))
