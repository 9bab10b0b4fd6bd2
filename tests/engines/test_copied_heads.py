"""Keys and values of fewer heads than there are ranks of tensor parallel: on every rank, and exact."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import config_of, random_ids, reference, save_tiny
from helpers.transformers_float64 import in_float64
from safetensors.torch import load_file

from meshpeft.engines.replicated_layers import CopiedHeadsLinear
from meshpeft.hub.adapter_export import export_peft_adapter
from meshpeft.models import load_transformers, make_transformers_model
from meshpeft.parallel import ParallelAxis, ParallelError
from meshpeft.quantization import BaseQuantizer, quantize_base
from meshpeft.training.adapters import add_adapter
from meshpeft.training.config import FinetuneConfig
from meshpeft.verify.simulation import simulate, the_same
from meshpeft.verify.transformers_layout import verify_transformers_layout

# Float64, sums in another order.
TOLERANCE = 1e-10
RUN = FinetuneConfig(rank=4, alpha=8, dtype="float64", lora_b_init_method="normal")
# Biases; a norm of each head; sinks, and experts.
FAMILIES = ("starcoder2", "exaone4", "gpt_oss")


def heads(queries: int, keys: int) -> dict[str, int]:
    return {"num_attention_heads": queries, "num_key_value_heads": keys}


@pytest.mark.parametrize(
    ("family", "keys", "method", "options"),
    [
        ("starcoder2", 2, "lora", {"quantizer": BaseQuantizer("nf4")}),
        ("exaone4", 1, "dora", {"sequence_parallel": True}),
        pytest.param("gpt_oss", 2, "lora", {}, marks=pytest.mark.slow),
        pytest.param("starcoder2", 1, "canonical_lora", {"activation_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param("exaone4", 2, "lora", {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_fine_tune_is_that_of_one_process(family: str, keys: int, method: Any, options: dict[str, Any]) -> None:
    run = replace(RUN, method=method)
    found = verify_transformers_layout(
        config_of(family, **heads(8, keys)), partial(add_adapter, config=run), tp=4, steps=2, **options
    )
    assert {check.name: check.error for check in found.checks if not check.error < TOLERANCE} == {}


@pytest.mark.parametrize(
    ("family", "sizes", "name"),
    [
        ("exaone4", heads(8, 2), "model.layers.0.self_attn.k_proj"),
        # A packed layer of transformers' attention that every rank holds, too: of latent attention.
        ("deepseek_v3", heads(4, 4), "model.layers.0.self_attn.kv_a_proj_with_mqa"),
    ],
)
def test_the_adapter_on_a_packed_one_is_exported(family: str, sizes: Any, name: str, tmp_path: Path) -> None:
    directory = save_tiny(family, tmp_path / "base", **sizes)
    with simulate(tp=4):
        model = load_transformers(directory, torch.float32)
        quantize_base(model, "nf4", block_size=32, target_modules=(name,), exclude_modules=())
        add_adapter(model, replace(RUN, dtype="float32", target_modules=(name,)))
        export_peft_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert any(key.endswith(f"{name}.lora_A.weight") for key in tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_what_a_cache_continues_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    directory, ids = save_tiny(family, tmp_path, **heads(8, 2)), random_ids()
    expected = reference(directory)(ids).logits.detach()
    with simulate(tp=4):
        model: Any = in_float64(load_transformers(directory, torch.float64)).eval()
        copied = [name for name, module in model.named_modules() if isinstance(module, CopiedHeadsLinear)]
        assert {name.rpartition(".")[2] for name in copied} == {"k_proj", "v_proj"}
        with torch.no_grad():
            cache = model.new_cache()
            begun = model(ids[:, :9], cache=cache, gather_logits=True)
            continued = model(ids[:, 9:], cache=cache, gather_logits=True)
            found = the_same(torch.cat((begun, continued), dim=1))
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("starcoder2", heads(6, 2)),  # the queries do not divide
        ("starcoder2", heads(12, 3)),  # neither do keys divide over ranks, nor ranks over keys
        ("cohere", {**heads(8, 2), "use_qk_norm": True}),  # norms with a weight for each head
    ],
)
def test_heads_that_cannot_be_copied_are_refused(family: str, sizes: dict[str, Any]) -> None:
    with pytest.raises(ParallelError, match=r"heads of \d features cannot be split over tp=4"):
        make_transformers_model(config_of(family, **sizes), torch.float32, axis=ParallelAxis("tp", world_size=4))
