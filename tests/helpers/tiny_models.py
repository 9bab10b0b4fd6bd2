"""Small random models of every family, saved by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers.transformers_float64 import in_float64
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 96

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
# Between them: both rotary scalings, tied and untied heads, every bias, windows shorter than a test's sequence in
# all and in some layers, heads whose channels do not add up to the hidden size.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"sliding_window": 5},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
    },
    "qwen3": {"head_dim": 6, "attention_bias": True},
}
# Between them: experts in every layer, in some, in all but one; normalised weights and not; shared experts.
MOE_FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 2, "sliding_window": 5},
    "qwen2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 24,
        "decoder_sparse_step": 2,
    },
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "head_dim": 6,
    },
}
# Families that our decoder does not know. Between them: packed q, k, v in both orders, packed gate and up, biases,
# norms and activations of other kinds, heads wider than the hidden size, tied and not.
FOREIGN_FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 6, "tie_word_embeddings": True, "num_hidden_layers": 2},
    "phi3": {"num_hidden_layers": 2, "tie_word_embeddings": False},
    "gpt_neox": {"num_attention_heads": 4, "num_hidden_layers": 2},
    # Latent attention: one projection is not divided, and only part of its output's gradient is.
    "deepseek_v2": {
        "num_hidden_layers": 2,
        "first_k_dense_replace": 2,
        "kv_lora_rank": 8,
        "q_lora_rank": None,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 4,
        "num_key_value_heads": 8,
        "n_routed_experts": 2,
    },
    # Layers that store their weights transposed.
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    # Stacked experts in files that hold them so.
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2},
    # Stacked experts of a class with a contract of its own.
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4, "kv_channels": 8},
    # Norms with a weight for each head, on queries and keys.
    "cohere": {"num_hidden_layers": 2, "use_qk_norm": True, "logit_scale": 0.3, "tie_word_embeddings": True},
    # Cross-attention that text alone does not pass through.
    "bart": {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "decoder_ffn_dim": 48,
        "decoder_attention_heads": 4,
        "dropout": 0.0,
        "is_decoder": True,
        "is_encoder_decoder": False,
    },
    # The bias of the tied head is tied, too.
    "bert": {
        "num_hidden_layers": 2,
        "is_decoder": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    # Layers in a list, whose own names are numbers.
    "ctrl": {"n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    # States instead of keys and values, in every layer and in some.
    "mamba": {"num_hidden_layers": 2, "state_size": 4},
    "bamba": {
        "num_hidden_layers": 2,
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 4,
        "mamba_n_groups": 2,
    },
}

# Dense families of transformers' own code, in whose table of docs/models.md each has a row.
DENSE_FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": FOREIGN_FAMILIES["gemma"],
    "gemma2": {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 9},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4},
    "gemma3n_text": {
        "head_dim": 8,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.9, 0.9],
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
    },
    "phi": {},
    "phi3": FOREIGN_FAMILIES["phi3"],
    "gpt_neox": FOREIGN_FAMILIES["gpt_neox"],
    "cohere": FOREIGN_FAMILIES["cohere"],
    "cohere2": {"sliding_window": 4},
    "glm": {"head_dim": 8, "eos_token_id": 1},
    "glm4": {"head_dim": 8, "eos_token_id": 1},
    "granite": {},
    "olmo": {"eos_token_id": 1},
    "olmo2": {"eos_token_id": 1},
    "olmo3": {"eos_token_id": 1, "sliding_window": 4},
    "starcoder2": {"attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "smollm3": {"bos_token_id": 1, "eos_token_id": 2},
    "exaone4": {"head_dim": 8, "sliding_window": 4},
    "nemotron": {"head_dim": 8},
    "ministral3": {"head_dim": 8},
    "seed_oss": {"head_dim": 8, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "ernie4_5": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "helium": {"head_dim": 4},
    "arcee": {},
    "apertus": {},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "falcon_h1": {"head_dim": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_d_state": 4},
    "qwen3_5_text": {
        "head_dim": 8,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}
_LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "num_key_value_heads": 8,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_hidden_layers": 2}
_GROUPED = {
    **_EXPERTS,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_WITH_DELTA_NETS = {
    **_EXPERTS,
    "num_experts": 4,
    "shared_expert_intermediate_size": 16,
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
# Families whose experts are transformers' own code. Between them: files with experts one by one, also under names of
# their own, and stacked; transposed, with gate and up in turns, biases and a clamped gate; without a gate; routers of
# every kind; shared experts; experts beside latent attention, sinks, states and convolutions, and beside an MLP.
EXPERT_FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {**_GROUPED, **_LATENT},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "sliding_window": 5,
        "eos_token_id": 1,
    },
    "nemotron_h": {
        **_EXPERTS,
        "layers_block_type": ["attention", "moe", "mamba"],
        "num_hidden_layers": 3,
        "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
        "head_dim": 4,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 4,
    },
    "granitemoe": FOREIGN_FAMILIES["granitemoe"],
    "mixtral": MOE_FAMILIES["mixtral"],
    "qwen3_next": _WITH_DELTA_NETS,
    "gemma4_text": {
        **_EXPERTS,
        "head_dim": 8,
        "global_head_dim": 8,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 5,
        "num_kv_shared_layers": 0,
    },
    "deepseek_v2 with experts": {**_GROUPED, **_LATENT, "topk_method": "greedy"},
    # A sparse index chooses which keys are seen: fewer than a test's sequence has.
    # With few heads many pairs of tokens score exactly 0, and which of equal keys are chosen depends on the padding.
    "deepseek_v32": {**_GROUPED, **_LATENT, "index_n_heads": 32, "index_head_dim": 8, "index_topk": 4},
    "glm_moe_dsa": {**_GROUPED, **_LATENT, "index_n_heads": 32, "index_head_dim": 8, "index_topk": 4},
    "kimi_linear": {
        **_GROUPED,
        **_LATENT,
        "q_lora_rank": None,
        "num_experts": 8,
        "head_dim": 8,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "bailing_hybrid": {
        **_GROUPED,
        **_LATENT,
        "num_local_experts": 8,
        "head_dim": 8,
        "layer_group_size": 2,
        "num_mtp_layers": 0,
    },
    "qwen3_5_moe_text": _WITH_DELTA_NETS,
    "glm4_moe": {**_GROUPED, "head_dim": 4},
    "glm4_moe_lite": {**_GROUPED, **_LATENT},
    "dots1": {**_GROUPED, "head_dim": 4},
    "mimo_v2_flash": {**_GROUPED, "head_dim": 8, "v_head_dim": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2, "eos_token_id": 1},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4, "num_hidden_layers": 2},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "num_hidden_layers": 2,
    },
    "phimoe": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "router_jitter_noise": 0.0,
        "input_jitter_noise": 0.0,
        "num_hidden_layers": 2,
    },
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 4, "num_hidden_layers": 2},
    "lfm2_moe": {**_EXPERTS, "num_experts": 4, "num_dense_layers": 1, "layer_types": ["full_attention", "conv"]},
    "granitemoehybrid": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "layer_types": ["attention", "mamba"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 4,
        "shared_intermediate_size": 16,
    },
    # On inputs that their scores have scaled.
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 5,
        "use_qk_norm": False,
    },
}


# Experts of a class with a contract of its own, which stay as they are.
OWN_EXPERTS: dict[str, dict[str, Any]] = {
    "jetmoe": FOREIGN_FAMILIES["jetmoe"],
}


def config_of(family: str, **overrides: Any) -> Any:
    """Configuration of a small model of any family."""
    # A row may be a variant of a family, and has a longer name then.
    families = {**FAMILIES, **MOE_FAMILIES, **FOREIGN_FAMILIES, **DENSE_FAMILIES, **OWN_EXPERTS, **EXPERT_FAMILIES}
    return AutoConfig.for_model(family.partition(" ")[0], **{**_SIZES, **families.get(family, {}), **overrides})


# Of `EXPERT_FAMILIES`, one for each mechanism.
ONE_OF_EACH_KIND = ("deepseek_v3", "gpt_oss", "nemotron_h", "mixtral", "llama4_text")


def save_tiny(family: str, directory: Path, **overrides: Any) -> Path:
    """Write a small float32 model of `family` whose every parameter is random, biases and norms too."""
    model = AutoModelForCausalLM.from_config(config_of(family, **overrides))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.3 * noise)
    model.save_pretrained(directory)
    return directory


def reference(directory: Path, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """transformers' model of a directory, in evaluation mode; exact in float64."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    model.config._experts_implementation = "eager"  # no other takes every type
    return in_float64(model) if dtype == torch.float64 else model


def random_ids(batch: int = 2, length: int = 13, seed: int = 0) -> torch.Tensor:
    """Token ids [batch, length]; the default length is odd, and beyond every window."""
    return torch.randint(1, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))
