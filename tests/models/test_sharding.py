"""What the layout of a decoder states, and that the type checker holds the model to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from helpers.simulate import simulate

from meshpeft.models import Decoder, DecoderConfig, ModelSharding, MoEConfig
from meshpeft.parallel import I, ModelParallelConfig, ParallelError, R, Shard, layout_of_tensor
from meshpeft.verify import typecheck_layout

CONFIG = DecoderConfig(96, 32, 48, 2, 8, 4, 4, model_type="qwen3", qk_norm=True)
MOE = MoEConfig(num_experts=4, moe_router_topk=2, intermediate_size=24, shared_intermediate_size=24)
LAYER = "decoder.layers.0."


def partial_gradients(config: DecoderConfig, sequence_parallel: bool) -> set[str]:
    """The parameters of the first layer and of the ends whose gradients are partial over tensor parallel."""
    with simulate(tp=2) as mesh:
        decoder = Decoder(config, ModelParallelConfig(2, sequence_parallel=sequence_parallel), device="meta")
        layouts = {name: layout_of_tensor(parameter) for name, parameter in decoder.named_parameters()}
        found = {name for name, layout in layouts.items() if layout is not None and mesh.tp in layout.grad_partial}
    return {name.removeprefix(LAYER).removesuffix(".weight") for name in found if "layers.1" not in name}


def test_gradients_are_partial_where_a_replicated_weight_meets_a_sharded_activation() -> None:
    heads = {"self_attention.q_layernorm", "self_attention.k_layernorm"}
    norms = {"input_layernorm", "pre_mlp_layernorm", "decoder.final_layernorm"}
    assert partial_gradients(CONFIG, sequence_parallel=False) == heads
    assert partial_gradients(CONFIG, sequence_parallel=True) == heads | norms
    experts = replace(CONFIG, model_type="qwen2_moe", qk_norm=False, moe=MOE)
    assert partial_gradients(experts, sequence_parallel=False) == {"mlp.router"}
    assert partial_gradients(experts, sequence_parallel=True) == {"mlp.router", "mlp.shared_experts.gate"} | norms


def test_a_vocabulary_that_does_not_divide_is_replicated() -> None:
    with simulate(tp=2) as mesh:
        assert ModelSharding.of(CONFIG).vocab is mesh.tp
        odd = ModelSharding.of(replace(CONFIG, vocab_size=97))
        assert odd.vocab.world_size == 1 and odd.hidden is I


@pytest.mark.parametrize("stated", (R, Shard(1)))
def test_a_stream_that_is_not_in_the_stated_state_is_a_type_error(stated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ModelSharding.of
    monkeypatch.setattr(ModelSharding, "of", lambda *arguments: replace(right(*arguments), hidden=stated))
    with pytest.raises(ParallelError, match="tp=2"):
        typecheck_layout(CONFIG, tp=2, sequence_parallel=True)
