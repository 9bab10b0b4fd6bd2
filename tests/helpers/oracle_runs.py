"""A small fine-tune for the oracle: a decoder with unequal head counts, packed rows, one adapter method."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from meshpeft.data.batches import PackedRows, pack_documents
from meshpeft.data.documents import Document
from meshpeft.models import Decoder, DecoderConfig
from meshpeft.parallel import ModelParallelConfig
from meshpeft.peft import CanonicalLoRA, DoRA, LoRA
from meshpeft.verify.oracle import Layout, Trace, trace_layout

VOCAB_SIZE, SEQ_LENGTH = 64, 15  # an odd number of tokens, so that sequence parallel has to pad

# Agreement in float64 between two orders of summation: a few 1e-16 an operation, some 1e-13 after five optimizer
# steps (AdamW divides by small square roots). The project's promise is 1e-10.
TOLERANCE = 1e-10

# B starts at random: with the usual zeros the first step would not see A at all.
OPTIONS: dict[str, Any] = {"dim": 4, "alpha": 8, "lora_B_init_method": "normal", "lora_dtype": torch.float64}
METHODS: dict[str, Callable[[Any], nn.Module]] = {
    "lora": lambda model: LoRA(**OPTIONS)(model),
    "canonical_lora": lambda model: CanonicalLoRA(**OPTIONS)(model),
    "dora": lambda model: DoRA(**OPTIONS)(model),
    "canonical_lora, token shards": lambda model: CanonicalLoRA(**OPTIONS, keep_token_shards=True)(model),
    "dora, token shards": lambda model: DoRA(**OPTIONS, keep_token_shards=True)(model),
    "lora, standalone": lambda model: LoRA(**OPTIONS, fused=False)(model),
    "canonical_lora, standalone": lambda model: CanonicalLoRA(**OPTIONS, fused=False)(model),
    "dora, standalone": lambda model: DoRA(**OPTIONS, fused=False)(model),
}


def config(**overrides: Any) -> DecoderConfig:
    """A Qwen3 (query and key norms) of two layers, with 8 heads over 4 groups."""
    sizes = {
        "model_type": "qwen3",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 4,
        "vocab_size": VOCAB_SIZE,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
    }
    return DecoderConfig.from_hf(sizes | overrides)


@cache
def rows() -> PackedRows:
    """Documents of unequal lengths and unequal numbers of targets, packed."""
    generator = np.random.default_rng(0)
    documents = []
    for _ in range(40):
        length = int(generator.integers(3, SEQ_LENGTH))
        tokens = generator.integers(0, VOCAB_SIZE, length).astype(np.int32)
        targets = np.arange(length) >= generator.integers(1, length)
        documents.append(Document(tokens, targets))
    return pack_documents(documents, SEQ_LENGTH, seed=0)


def moe_config(**overrides: Any) -> DecoderConfig:
    """A Qwen3-MoE of two layers with 8 experts, two for each token."""
    experts = {
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
    }
    return config(**experts | overrides)


def make_model(parallel: ModelParallelConfig) -> Decoder:
    """The base: the same values at every layout."""
    return Decoder(config(), parallel, dtype=torch.float64)


def run(layout: Layout, method: str = "lora", *, steps: int = 5, clip: float = 0.5, batch_size: int = 4) -> Trace:
    """One fine-tune; the clip is below the first gradient norms, so that clipping is compared too."""
    return trace_layout(layout, make_model, METHODS[method], rows(), steps=steps, clip=clip, batch_size=batch_size)


@cache
def one_rank(method: str = "lora", steps: int = 5) -> Trace:
    """The same on one rank, one row at a time."""
    return run(Layout(), method, steps=steps)
