"""Configurations are read as transformers reads them; what would change numbers and is not implemented is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.tiny_models import FAMILIES
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from meshpeft.models import DecoderConfig, ModelError, RopeConfig, check_divisible
from meshpeft.models.attention import inverse_frequencies
from meshpeft.parallel import ModelParallelConfig

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_survives_the_round_trip(family: str) -> None:
    theirs = AutoConfig.for_model(family, **SIZES, **FAMILIES[family], eos_token_id=[3, 4], bos_token_id=5)
    back = DecoderConfig.from_hf(theirs).to_hf().to_dict()
    # The architecture is named, whether or not the source did.
    assert back.pop("architectures") == [type(theirs).__name__.replace("Config", "ForCausalLM")]
    assert back == {name: value for name, value in theirs.to_dict().items() if name != "architectures"}


def test_old_spellings_of_the_rotary_fields_are_read() -> None:
    scaling = {
        "type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    fields = {"model_type": "llama", **SIZES, "rope_theta": 500000.0, "rope_scaling": scaling}
    given = copy.deepcopy(fields)
    config = DecoderConfig.from_hf(given)
    assert config.rope == RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 64)
    assert given == fields  # nothing mutates a caller's config


def test_layers_share_or_differ_in_their_sliding_windows() -> None:
    def windows(**fields: Any) -> tuple[int | None, ...] | None:
        return DecoderConfig.from_hf({**SIZES, **fields}).sliding_windows

    assert windows(model_type="mistral", sliding_window=None) is None
    assert windows(model_type="mistral") == (4096, 4096, 4096)  # the family's default
    assert windows(model_type="qwen2", sliding_window=7) is None  # not used unless use_sliding_window
    assert windows(model_type="qwen3", use_sliding_window=True, sliding_window=7, max_window_layers=2) == (
        None,
        None,
        7,
    )
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows(model_type="qwen2", use_sliding_window=True, sliding_window=7, layer_types=kinds) == (7, None, 7)


@pytest.mark.parametrize("rope_type", ("linear", "llama3"))
def test_rotary_frequencies_are_those_of_transformers(rope_type: str) -> None:
    rope = RopeConfig(1e4, rope_type, 8.0, 1.0, 4.0, 64)
    fields = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    theirs = AutoConfig.for_model(
        "llama",
        head_dim=64,
        rope_parameters={
            "rope_type": rope_type,
            "rope_theta": 1e4,
            "factor": 8.0,
            **(fields if rope_type == "llama3" else {}),
        },
    )
    expected, _ = ROPE_INIT_FUNCTIONS[rope_type](theirs)
    found = inverse_frequencies(rope, 64, torch.float32, torch.device("cpu"))
    # Two units in the last place: the same formula in another order.
    torch.testing.assert_close(found, expected, rtol=2.4e-7, atol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    (
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not implemented; implemented: llama"),
        ({"model_type": None}, "model_type None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised already, by 'awq'"),
        ({"sliding_window": 5}, "sliding_window=5 is not implemented for model_type 'llama'"),
        ({"logit_scale": 0.5}, "logit_scale=0.5"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'yarn'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 2.0}}, "rope field factor=2.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1e4}}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": "2"}}, "factor='2'"),
        ({"num_key_value_heads": 3}, "8 attention heads cannot share 3 key/value heads"),
        ({"hidden_size": "32"}, "invalid configuration of a llama model"),
        ({"head_dim": 5}, "even"),
    ),
)
def test_what_is_not_implemented_is_an_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        DecoderConfig.from_hf({"model_type": "llama", **SIZES, **fields})


def test_fields_that_change_no_number_are_accepted() -> None:
    harmless = {"temperature": 0.7, "unsloth_version": "2026.1", "use_mrope": False, "pruned_heads": {}, "id2label": {}}
    # What transformers' reader of GGUF leaves in it.
    harmless |= {"_model_name_or_path": "Smollm2 135M 8k Lc100K Mix1 Ep2", "unk_token_id": 3}
    assert DecoderConfig.from_hf({"model_type": "llama", **SIZES, **harmless}) == DecoderConfig.from_hf(
        {"model_type": "llama", **SIZES}
    )


def test_a_family_cannot_express_another_familys_variation() -> None:
    config = DecoderConfig(96, 32, 48, 2, 8, 4, 4, model_type="mistral", qk_norm=True)
    with pytest.raises(ModelError, match="a mistral configuration cannot express"):
        config.to_hf()


@pytest.mark.parametrize(
    ("sizes", "tp", "message"),
    (
        ({"num_attention_heads": 6, "num_query_groups": 3}, 2, r"^linear_qkv: 3 query groups .* use 1 or 3$"),
        ({"intermediate_size": 50}, 4, r"^linear_fc1: 50 channels .* tensor_parallel=4; use 1 or 2$"),
    ),
)
def test_sizes_that_do_not_divide_name_those_that_would(sizes: dict[str, int], tp: int, message: str) -> None:
    fields = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "head_dim": 4,
        **sizes,
    }
    with pytest.raises(ModelError, match=message):
        check_divisible(DecoderConfig(**fields), ModelParallelConfig(tensor_model_parallel_size=tp))
