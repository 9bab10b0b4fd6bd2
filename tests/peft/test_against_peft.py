"""On a plain transformers model our adapters are Hugging Face PEFT's: outputs and gradients, float64."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from helpers.transformers_float64 import in_float64
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from meshpeft.peft import DoRA, LoRA, adapter_wrappers

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config).to(dtype)
    return in_float64(model) if dtype == torch.float64 else model


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return base_model()


def pair(base, method, **theirs):
    """The model with our adapters and with PEFT's, which get the values of ours."""
    ours = method(copy.deepcopy(base))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, **theirs)
    reference = peft.get_peft_model(copy.deepcopy(base), config).train()
    layers = dict(reference.base_model.model.named_modules())
    pairs = {}
    for name, wrapper in adapter_wrappers(ours):
        layer = layers[name]
        pairs[f"{name}.A"] = (wrapper.adapter.linear_in.weight, layer.lora_A["default"].weight)
        pairs[f"{name}.B"] = (wrapper.adapter.linear_out.weight, layer.lora_B["default"].weight)
        if theirs.get("use_dora"):
            magnitude = layer.lora_magnitude_vector["default"].weight
            pairs[f"{name}.m"] = (wrapper.adapter.weight_magnitude, magnitude)
    with torch.no_grad():
        for mine, other in pairs.values():
            other.copy_(mine)
    return ours, reference, pairs


@pytest.mark.parametrize(
    ("method", "theirs"),
    (
        (LoRA, {}),
        (LoRA, {"use_rslora": True}),
        (DoRA, {"use_dora": True}),
    ),
)
@pytest.mark.parametrize("fused", (True, False))
def test_outputs_and_gradients_are_those_of_peft(base, method, theirs, fused):
    options = {"use_rslora": True} if "use_rslora" in theirs else {}
    adapters = method(target_modules=TARGETS, dim=4, alpha=6, lora_B_init_method="normal", fused=fused, **options)
    ours, reference, pairs = pair(base, adapters, **theirs)
    assert len(pairs) == (3 if "use_dora" in theirs else 2) * 2 * len(TARGETS)
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    got, want = ours(ids).logits, reference(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    for logits in (got, want):
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, (mine, other) in pairs.items():
        torch.testing.assert_close(
            mine.grad, other.grad, rtol=1e-9, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("use_reentrant", (False, True))
@pytest.mark.parametrize("method", (LoRA, DoRA))
def test_checkpointing_of_transformers_trains_every_adapter(method, use_reentrant):
    # Nothing that enters the first layer requires a gradient.
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    found = []
    for checkpointing in (False, True):
        model = base_model(torch.float32)
        method(target_modules=TARGETS, dim=2, lora_B_init_method="normal")(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(ids).logits.square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    plain, recomputed = found
    assert len(plain) >= 2 * 2 * len(TARGETS)
    for name, grad in plain.items():
        torch.testing.assert_close(recomputed[name], grad, msg=lambda text, n=name: f"{n}: {text}")
        assert grad.abs().max() > 0
