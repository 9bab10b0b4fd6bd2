"""`attend` under models of transformers: the numbers of their own masks, and no mask."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.tiny_models import FAMILIES, FOREIGN_FAMILIES, random_ids, reference, save_tiny
from helpers.transformers_float64 import in_float64
from torch import Tensor, nn
from transformers import masking_utils

from meshpeft.hub.names import name_in_transformers
from meshpeft.models import generate, load_transformers, transformers_attention
from meshpeft.models.spans import Spans
from meshpeft.models.transformers_attention import SpansMask

TOLERANCE = 1e-10
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Between them: plain, windows in all and in some layers, soft caps, sinks, chunks, values narrower than keys.
OTHERS: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 6, "sliding_window": 4, "attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 9},
    "vaultgemma": {"head_dim": 6, "sliding_window": 4, "attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 9},
    "gpt_oss": {"head_dim": 6, "sliding_window": 4, **_EXPERTS},
    "granite_swa": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "llama4_text": {
        "head_dim": 6,
        "attention_chunk_size": 4,
        "intermediate_size_mlp": 48,
        "no_rope_layers": [1, 1, 0],
        "moe_layers": [],
        "use_qk_norm": False,
    },
}
ALIKE = ("llama", "mistral", "qwen2", "phi3", "gpt_neox", "cohere", "deepseek_v2", "mimo_v2_flash", *OTHERS)
DOCUMENTS = torch.tensor([[0] * 3 + [1] * 10, [0] * 6 + [1] * 7])
BOUNDS = ((0, 3, 13), (0, 6, 13))
POSITIONS = torch.tensor([[*range(3), *range(10)], [*range(6), *range(7)]])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def directory(family: str) -> Path:
        with mock.patch.dict(FOREIGN_FAMILIES, OTHERS):
            return save_tiny(family, tmp_path_factory.mktemp(family))

    return directory


def trained_like(model: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    """Logits [batch, seq, vocab], and gradients of every parameter that they depend on, by transformers' names."""
    upstream = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(1))
    parameters = {
        name_in_transformers(model, name): parameter.requires_grad_() for name, parameter in model.named_parameters()
    }
    grads = torch.autograd.grad(logits, list(parameters.values()), upstream, allow_unused=True)
    found = {name: grad for name, grad in zip(parameters, grads, strict=True) if grad is not None}
    return {"logits": logits.detach(), **found}


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("family", ALIKE)
def test_packed_rows_have_the_numbers_of_documents_alone_and_no_mask(
    tiny: Callable[[str], Path], family: str, recompute: bool
) -> None:
    theirs: Any = reference(tiny(family))
    alone = [
        theirs(row[begin:end][None], use_cache=False).logits
        for row, bounds in zip(random_ids(), BOUNDS, strict=True)
        for begin, end in pairwise(bounds)
    ]
    expected = trained_like(theirs, torch.cat(alone, 1).unflatten(1, (2, -1))[0])
    model: Any = in_float64(load_transformers(tiny(family), torch.float64, recompute)).train()
    with (
        mock.patch.object(masking_utils, "sdpa_mask", side_effect=AssertionError("a mask was made")),
        mock.patch.object(transformers_attention, "attend", wraps=transformers_attention.attend) as attend,
    ):
        logits = model(random_ids(), POSITIONS, DOCUMENTS, spans=Spans.of_documents(DOCUMENTS))
        found = trained_like(model, logits)
    layers = model.config.num_hidden_layers
    assert attend.call_count == layers * (1 + recompute)
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        # gpt-oss has the weights of its experts transposed; none of them is square.
        got = found[name] if found[name].shape == want.shape else found[name].transpose(-2, -1)
        assert (want - got).abs().max() <= TOLERANCE * want.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("family", ("gemma2", "gpt_oss", "llama4_text"))
def test_generation_with_a_cache_is_transformers_own(tiny: Callable[[str], Path], family: str) -> None:
    ids, options = random_ids(), {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs: Any = reference(tiny(family))
    model: Any = in_float64(load_transformers(tiny(family), torch.float64))
    assert torch.equal(generate(model, ids, 6), theirs.generate(ids, **options))
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[0, :3], mask[0, :3] = 0, 0
    assert torch.equal(
        generate(model, padded, 6, attention_mask=mask)[:, ids.shape[1] :],
        theirs.generate(padded, attention_mask=mask, **options)[:, ids.shape[1] :],
    )


def test_a_layer_that_is_not_causal_keeps_transformers_meaning(tiny: Callable[[str], Path]) -> None:
    """Its own kernel looks ahead where there is no mask: `attend` must not hide it."""
    model: Any = load_transformers(tiny("llama"), torch.float32)
    assert model.is_causal()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    assert not model.is_causal()


def test_a_model_that_looks_into_its_mask_gets_transformers_mask() -> None:
    made = torch.rand(2, 1, 5, 5) < 0.5
    mask = SpansMask.of((2, 1, 5, 5), "cpu", Spans.of_rows(2, 5), None, lambda: made)
    assert mask.shape == made.shape and mask.dtype == torch.bool
    assert torch.equal(mask[:, :, :, :3], made[:, :, :, :3])
    assert torch.equal(~mask, ~made)
    assert torch.equal(torch.where(mask, 0.0, -1.0), torch.where(made, 0.0, -1.0))
    causal = SpansMask.of((2, 1, 5, 5), "cpu", Spans.of_rows(2, 5), None, lambda: None)
    assert torch.equal(causal.clone(), torch.ones(5, 5).tril().bool().expand(2, 1, 5, 5))


def test_a_mask_of_the_models_own_is_left_to_transformers(tiny: Callable[[str], Path]) -> None:
    """As where images see each other: the pattern is not one that spans say."""
    ids, everything = random_ids(), lambda batch, head, query, key: key >= 0
    model: Any = load_transformers(tiny("llama"), torch.float64)
    whole = model(ids)
    made = masking_utils.create_causal_mask
    with mock.patch(
        "transformers.models.llama.modeling_llama.create_causal_mask",
        lambda **given: made(**given, or_mask_function=everything),
    ):
        both_ways = model(ids)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(whole, model(ids), rtol=TOLERANCE, atol=TOLERANCE)
    with mock.patch(
        "transformers.models.llama.modeling_llama.create_causal_mask",
        lambda **given: made(**given, or_mask_function=everything),
    ):
        torch.testing.assert_close(both_ways, model(ids), rtol=TOLERANCE, atol=TOLERANCE)
    assert (both_ways - whole).abs().max() > 0.01


def test_families_that_transformers_runs_eagerly_for_other_reasons_are_left_to_it(tiny: Callable[[str], Path]) -> None:
    assert load_transformers(tiny("llama")).config._attn_implementation == transformers_attention.IMPLEMENTATION
    assert "mamba" in FOREIGN_FAMILIES and "mistral" in FAMILIES
    assert load_transformers(tiny("mamba")).config._attn_implementation != transformers_attention.IMPLEMENTATION
