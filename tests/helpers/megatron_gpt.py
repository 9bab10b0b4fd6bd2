"""A small GPT of Megatron-Core's with the weights of our decoder, dense or with experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from helpers.megatron_cpu import SequenceParallelRMSNorm
from helpers.oracle_runs import config as decoder_config
from helpers.te_layers import StandInColumnGrouped, StandInRowGrouped
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from meshpeft.engines import axis_of_group
from meshpeft.models import Decoder, DecoderConfig, MoEConfig
from meshpeft.models.attention import inverse_frequencies
from meshpeft.parallel import (
    ParallelAxis,
    TensorLayout,
    describe_layers,
    layer_type_of,
    layout_of,
    layout_of_tensor,
    vocab_parallel_cross_entropy,
)
from meshpeft.parallel.init import draw_full

BATCH, SEQ = 3, 12  # more than one row: Megatron makes a single one require a gradient by itself
DENSE = decoder_config()
EXPERTS = replace(
    DENSE, moe=MoEConfig(num_experts=4, moe_router_topk=2, intermediate_size=12, shared_intermediate_size=8)
)


def token_ids() -> Tensor:
    return torch.randint(0, DENSE.vocab_size, (BATCH, SEQ), generator=torch.Generator().manual_seed(3))


def loss_of(logits: Tensor, axis: ParallelAxis | None = None) -> Tensor:
    """Mean over the target tokens, of which the rows have different numbers."""
    labels = token_ids().roll(-1, 1)
    for row, length in enumerate((5, SEQ - 1, 8)):
        labels[row, length:] = -100
    return vocab_parallel_cross_entropy(logits, labels, axis=axis).sum() / (labels != -100).sum()


def logits_of(model: nn.Module, **kwargs: Any) -> Tensor:
    """[batch, seq, vocab / tp] of a Megatron model."""
    mask = torch.triu(torch.ones(SEQ, SEQ, dtype=torch.bool), 1)[None, None]
    return model(token_ids(), torch.arange(SEQ).expand(BATCH, SEQ), mask, **kwargs)


def canonical_weights(config: DecoderConfig) -> dict[str, Tensor]:
    """Our decoder's names -> full tensors in canonical order."""
    shapes = {
        name: p.shape if (layout := layout_of_tensor(p)) is None else layout.global_shape
        for name, p in Decoder(config, device="meta").named_parameters()
    }
    return {
        name: draw_full(tuple(shape), lambda t: t.normal_(float(t.dim() == 1), 0.3), seed)
        for seed, (name, shape) in enumerate(shapes.items())
    }


def make_decoder(config: DecoderConfig = DENSE) -> Decoder:
    """Our decoder, on one rank."""
    decoder = Decoder(config, dtype=torch.float64)
    weights = canonical_weights(config)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            layout = layout_of_tensor(parameter) or TensorLayout(tuple(parameter.shape))
            parameter.copy_(layout.slice(weights[name]))
    return decoder


def make_gpt(config: DecoderConfig = DENSE, *, grouped: bool = False, **options: Any) -> GPTModel:
    """The same model of Megatron's, divided as its `parallel_state` says.

    Args:
        grouped: all experts of a rank in one layer, stand-ins for Transformer Engine's; otherwise one after the other.
        options: of `TransformerConfig`, for instance `sequence_parallel`.
    """
    transformer = TransformerConfig(**_sizes(config) | _experts(config) | options)
    spec = get_gpt_layer_local_spec(
        normalization="RMSNorm", qk_layernorm=True, num_experts=transformer.num_moe_experts, moe_grouped_gemm=False
    )
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = SequenceParallelRMSNorm
    attention.q_layernorm = attention.k_layernorm = SequenceParallelRMSNorm
    if grouped:
        layers = MLPSubmodules(linear_fc1=StandInColumnGrouped, linear_fc2=StandInRowGrouped)
        layer.mlp.submodules.experts = ModuleSpec(module=TEGroupedMLP, submodules=layers)
    model = GPTModel(
        transformer,
        TransformerBlockSubmodules([spec] * config.num_layers, layer_norm=SequenceParallelRMSNorm),
        config.vocab_size,
        max_sequence_length=SEQ,
        position_embedding_type="rope",
        rotary_base=int(config.rope.theta),
        share_embeddings_and_output_weights=False,
    )
    # Megatron's angles are float32, ours have the model's type.
    frequencies = inverse_frequencies(config.rope, config.head_dim, torch.float64, torch.device("cpu"))
    model.rotary_pos_emb.inv_freq = frequencies
    _fill(model, canonical_weights(config))
    return model


def _sizes(config: DecoderConfig) -> dict[str, Any]:
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "kv_channels": config.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.rms_norm_eps,
        "qk_layernorm": True,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "params_dtype": torch.float64,
        "use_cpu_initialization": True,
        "masked_softmax_fusion": False,
    }


def _experts(config: DecoderConfig) -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        return {}
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.moe_router_topk,
        "moe_ffn_hidden_size": moe.intermediate_size,
        "moe_shared_expert_intermediate_size": moe.shared_intermediate_size,
        "moe_shared_expert_gate": True,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }


def _fill(model: GPTModel, weights: dict[str, Tensor]) -> None:
    """Give the model our decoder's weights."""
    describe_layers(model)
    tp = axis_of_group("tp", parallel_state.get_tensor_model_parallel_group())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            holder, _, attribute = name.rpartition(".")
            layer = model.get_submodule(holder)
            if holder.endswith("word_embeddings"):
                full = weights["embedding.weight"]
                parameter.copy_(TensorLayout(tuple(full.shape), ((0, tp),)).slice(full))
            elif attribute.startswith("weight") and attribute != "weight":  # one expert of a layer of them
                local = layout_of(layer).weight().slice(weights[f"{holder}.weight"])
                parameter.copy_(local[int(attribute.removeprefix("weight"))])
            elif attribute == "gate_weight":
                parameter.copy_(weights[f"{holder}.gate.weight"])
            elif layer_type_of(layer) is not None:
                parameter.copy_(layout_of(layer).weight().slice(_of_layer(model, weights, holder)))
            else:
                parameter.copy_(weights[name])


def _of_layer(model: GPTModel, weights: dict[str, Tensor], name: str) -> Tensor:
    """The full weight of a linear layer; of an expert's, its slice of the stacked one."""
    experts, found, rest = name.partition(".local_experts.")
    if not found:
        return weights[f"{name}.weight"]
    number, _, layer = rest.partition(".")
    holder = model.get_submodule(experts)
    first = holder.ep_group.rank() * holder.num_local_experts
    return weights[f"{experts}.{layer}.weight"][first + int(number)]
