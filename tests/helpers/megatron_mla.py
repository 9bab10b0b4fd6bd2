"""A small GPT of Megatron-Core's with multi-latent attention and a plain linear layer in each of its layers."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from helpers.megatron_cpu import SequenceParallelRMSNorm, megatron_on_cpu
from helpers.megatron_gpt import DENSE, SEQ, _sizes
from helpers.megatron_runs import Method, Run, adapter_parameters, train, whole
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor, nn

from meshpeft.engines import axis_of_group
from meshpeft.parallel import ParallelError, TensorLayout, describe_layers, layer_type_of, layout_of, named_init_
from meshpeft.parallel.init import draw_full


class NormAndPlainLinear(SequenceParallelRMSNorm):
    """A norm and a linear layer that knows nothing of Megatron, on this rank's tokens."""

    def __init__(self, config: Any, hidden_size: int, **options: Any) -> None:
        super().__init__(config, hidden_size, **options)
        self.plain = nn.Linear(hidden_size, hidden_size, bias=False, dtype=config.params_dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.plain(super().forward(x))
        return y


class CoreAttention(DotProductAttention):
    """Megatron's own, which MLA passes widths that it reads from its config."""

    def __init__(self, *args: Any, k_channels: int = 8, v_channels: int = 8, **options: Any) -> None:
        super().__init__(*args, **options)
        assert k_channels == v_channels == self.config.kv_channels


def make_mla(duplicated: bool, mark: bool | None = None, **options: Any) -> GPTModel:
    """The model, divided as Megatron's `parallel_state` says.

    Args:
        duplicated: the down-projections are Megatron's own linear layers without tensor parallel.
        mark: what the plain layers' weights say of their tokens; `None` for nothing.
        options: of the configuration.
    """
    sizes = _sizes(DENSE)
    sizes |= {"num_query_groups": DENSE.num_attention_heads, "kv_channels": 8}
    latent = {"q_lora_rank": 8, "kv_lora_rank": 12, "qk_head_dim": 4, "qk_pos_emb_head_dim": 4, "v_head_dim": 8}
    config = MLATransformerConfig(**sizes | latent | {"rope_type": "rope"} | options)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=True, multi_latent_attention=True)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm, layer.pre_mlp_layernorm = SequenceParallelRMSNorm, NormAndPlainLinear
    attention.core_attention = CoreAttention
    attention.q_layernorm = attention.kv_layernorm = SequenceParallelRMSNorm
    if duplicated:
        attention.linear_q_down_proj = attention.linear_kv_down_proj = Linear
    blocks = TransformerBlockSubmodules([spec] * config.num_layers, layer_norm=SequenceParallelRMSNorm)
    # A name that Megatron asks for without Transformer Engine, too.
    with mock.patch.object(multi_latent_attention, "TELinear", type("TELinear", (nn.Module,), {})):
        model = GPTModel(config, blocks, DENSE.vocab_size, max_sequence_length=SEQ, position_embedding_type="none")
    for layer in model.decoder.layers:
        if mark is not None:
            layer.pre_mlp_layernorm.plain.weight.sequence_parallel = mark
    _fill(model)
    return model


@torch.no_grad()
def _fill(model: GPTModel) -> None:
    describe_layers(model)
    tp = axis_of_group("tp", parallel_state.get_tensor_model_parallel_group())
    for name, parameter in model.named_parameters():
        layer = model.get_submodule(name.rpartition(".")[0])
        layout = TensorLayout(tuple(parameter.shape))
        if name.endswith("word_embeddings.weight"):
            layout = TensorLayout((DENSE.vocab_size, DENSE.hidden_size), ((0, tp),))
        elif layer_type_of(layer) is not None:
            layout = layout_of(layer).weight()
        if parameter.dim() == 2:
            full = draw_full(layout.global_shape, lambda t: t.normal_(0.0, 0.3), zlib.crc32(name.encode()))
            parameter.copy_(layout.slice(full.to(parameter.dtype)))


def train_mla(
    method: Method, tp: int, duplicated: bool, mark: bool | None = None, options: dict[str, Any] | None = None
) -> Run:
    """A few steps in Megatron's data-parallel wrapper, with its own finalisation of gradients."""
    with megatron_on_cpu(tensor_model_parallel_size=tp):
        model = method(make_mla(duplicated, mark, **options or {}))
        return train(DistributedDataParallel(model.config, DistributedDataParallelConfig(), model), model)


def refused(method: Method, options: dict[str, Any]) -> str:
    """Why a method does not adapt the model, which is as it was then."""
    with megatron_on_cpu(tensor_model_parallel_size=2):
        model = make_mla(True, **options)
        before = list(model.modules())
        try:
            method(model)
        except ParallelError as error:
            assert list(model.modules()) == before
            return str(error)
        return ""


def save_and_load_mla(method: Method, directory: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Adapters saved by `dist_checkpointing` over 2 ranks and loaded on each; and what the shared file holds."""

    def entries(model: nn.Module) -> dict[str, Any]:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        found: dict[str, Any] = model.sharded_state_dict(metadata={"dp_cp_group": group})
        return found

    def trainee(seed: int) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        model = method(make_mla(True, True))
        parameters = adapter_parameters(model)
        for name, parameter in parameters.items():
            named_init_(parameter, lambda full: full.normal_(), seed, name)
        return model, parameters

    with megatron_on_cpu(tensor_model_parallel_size=2):
        model, parameters = trainee(0)
        dist_checkpointing.save(entries(model), str(directory))
        saved = {name: whole(parameter, parameter) for name, parameter in parameters.items()}
    with megatron_on_cpu(tensor_model_parallel_size=1):
        model, parameters = trainee(1)
        model.load_state_dict(dist_checkpointing.load(entries(model), str(directory)))
        common = dist_checkpointing.load_common_state_dict(str(directory))
        loaded = {name: whole(parameter, parameter) for name, parameter in parameters.items()}
        return saved, loaded, [name for name in common if "adapter" in name or "plain" in name]
