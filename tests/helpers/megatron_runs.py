"""A small GPT of Megatron-Core's with the weights of our decoder, fine-tuned by Megatron's own means."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from helpers.collectives import Collective, count_collectives
from helpers.megatron_cpu import SequenceParallelRMSNorm, megatron_on_cpu
from helpers.oracle_runs import config as decoder_config
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from meshpeft.engines.process_groups import axis_of_group
from meshpeft.models import Decoder
from meshpeft.models.rotary import inverse_frequencies
from meshpeft.parallel import (
    ParallelAxis,
    TensorLayout,
    describe_layers,
    finalize_gradients,
    gradient_norm,
    layer_type_of,
    layout_of,
    layout_of_tensor,
    parallel_group_info,
)
from meshpeft.parallel import vocab_parallel_cross_entropy as cross_entropy
from meshpeft.parallel.init import draw_full
from meshpeft.peft import PEFT

BATCH, SEQ = 3, 12  # more than one row: Megatron makes a single one require a gradient by itself
CONFIG = decoder_config()


def token_ids() -> Tensor:
    return torch.randint(0, CONFIG.vocab_size, (BATCH, SEQ), generator=torch.Generator().manual_seed(3))


def loss_of(logits: Tensor, axis: ParallelAxis | None = None) -> Tensor:
    """Mean over the target tokens, of which the rows have different numbers."""
    labels = token_ids().roll(-1, 1)
    for row, length in enumerate((5, SEQ - 1, 8)):
        labels[row, length:] = -100
    return cross_entropy(logits, labels, axis=axis).sum() / (labels != -100).sum()


def canonical_weights() -> dict[str, Tensor]:
    """Our decoder's names -> full tensors in canonical order."""
    shapes = {
        name: p.shape if (layout := layout_of_tensor(p)) is None else layout.global_shape
        for name, p in Decoder(CONFIG, device="meta").named_parameters()
    }
    return {
        name: draw_full(tuple(shape), lambda t: t.normal_(float(t.dim() == 1), 0.3), seed)
        for seed, (name, shape) in enumerate(shapes.items())
    }


def make_decoder() -> Decoder:
    """Our decoder, on one rank."""
    decoder = Decoder(CONFIG, dtype=torch.float64)
    weights = canonical_weights()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            layout = layout_of_tensor(parameter) or TensorLayout(tuple(parameter.shape))
            parameter.copy_(layout.slice(weights[name]))
    return decoder


def make_gpt(*, sequence_parallel: bool = False, **options: Any) -> GPTModel:
    """The same model of Megatron's, divided as its `parallel_state` says."""
    config = TransformerConfig(
        num_layers=CONFIG.num_layers,
        hidden_size=CONFIG.hidden_size,
        ffn_hidden_size=CONFIG.intermediate_size,
        num_attention_heads=CONFIG.num_attention_heads,
        num_query_groups=CONFIG.num_query_groups,
        kv_channels=CONFIG.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=CONFIG.rms_norm_eps,
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        sequence_parallel=sequence_parallel,
        params_dtype=torch.float64,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        **options,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=True)
    norms = spec.submodules
    norms.input_layernorm = norms.pre_mlp_layernorm = SequenceParallelRMSNorm
    norms.self_attention.submodules.q_layernorm = norms.self_attention.submodules.k_layernorm = SequenceParallelRMSNorm
    model = GPTModel(
        config,
        TransformerBlockSubmodules([spec] * CONFIG.num_layers, layer_norm=SequenceParallelRMSNorm),
        CONFIG.vocab_size,
        max_sequence_length=SEQ,
        position_embedding_type="rope",
        rotary_base=int(CONFIG.rope.theta),
        share_embeddings_and_output_weights=False,
    )
    # Megatron's angles are float32, ours have the model's type.
    model.rotary_pos_emb.inv_freq = inverse_frequencies(
        CONFIG.rope, CONFIG.head_dim, torch.float64, torch.device("cpu")
    )
    fill(model)
    return model


def fill(model: GPTModel) -> None:
    """Give the model our decoder's weights."""
    describe_layers(model)
    weights = canonical_weights()
    tp = axis_of_group("tp", parallel_state.get_tensor_model_parallel_group())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            holder, _, attribute = name.rpartition(".")
            layer = model.get_submodule(holder)
            if holder.endswith("word_embeddings"):
                full = weights["embedding.weight"]
                parameter.copy_(TensorLayout(tuple(full.shape), ((0, tp),)).slice(full))
            elif layer_type_of(layer) is not None and attribute == "weight":
                parameter.copy_(layout_of(layer).weight().slice(weights[name]))
            else:
                parameter.copy_(weights[name])


def logits_of(model: nn.Module, **kwargs: Any) -> Tensor:
    ids = token_ids()
    mask = torch.triu(torch.ones(SEQ, SEQ, dtype=torch.bool), 1)[None, None]
    return model(ids, torch.arange(SEQ).expand(BATCH, SEQ), mask, **kwargs)


@dataclass
class Run:
    """What must not depend on the layout, nor on whose model it is; tensors have their full shapes."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


def train_gpt(method: PEFT, tensor_parallel: int, options: dict[str, Any]) -> Run:
    """A few steps in Megatron's data-parallel wrapper, with its own finalisation of gradients.

    Args:
        options: of its configuration, beside the sizes.
    """
    with megatron_on_cpu(tensor_model_parallel_size=tensor_parallel):
        model = method(make_gpt(**options))
        return train(DistributedDataParallel(model.config, DistributedDataParallelConfig(), model), model)


def train_decoder(method: PEFT) -> Run:
    """The same on our decoder, on one rank."""
    decoder = method(make_decoder())
    return train(decoder, decoder)


def train(wrapped: nn.Module, model: nn.Module, steps: int = 5) -> Run:
    """Fine-tune a model of either package, in Megatron's wrapper or as it is."""
    run = Run()
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2, weight_decay=0.1)
    ours = isinstance(model, Decoder)
    for step in range(steps):
        logits = wrapped(token_ids()) if ours else logits_of(wrapped)
        loss = loss_of(logits, None if ours else axis_of_group("tp", parallel_state.get_tensor_model_parallel_group()))
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.zero_grad_buffer()
            loss.backward()
            finalize_model_grads([wrapped])
            for parameter in trainable.values():
                parameter.grad = parameter.main_grad
        else:
            # Data-parallel ranks have the same rows here, and the sum over them is to be that of one.
            (loss / parallel_group_info().dp.world_size).backward()
            finalize_gradients(model)
        run.norms.append(gradient_norm(model).item() if ours else megatron_norm(trainable.values()))
        run.losses.append(loss.item())
        if step == 0:
            run.gradients = {name: whole(parameter, parameter.grad) for name, parameter in trainable.items()}
        optimizer.step()
        optimizer.zero_grad()
    run.weights = {name: whole(parameter, parameter) for name, parameter in trainable.items()}
    return run


def megatron_norm(parameters: Iterable[nn.Parameter]) -> float:
    """The norm of all gradients, counted by Megatron's rule, in float64 (its own function works in float32)."""
    group = parallel_state.get_tensor_model_parallel_group()
    counted = [p.grad for p in parameters if param_is_not_tensor_parallel_duplicate(p, group)]
    total = torch.stack([grad.square().sum() for grad in counted]).sum() if counted else torch.zeros(()).double()
    torch.distributed.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return total.sqrt().item()


def whole(parameter: Tensor, value: Tensor) -> Tensor:
    """The full tensor of which `value` is this rank's slice, laid out like the parameter."""
    layout = layout_of_tensor(parameter)
    assert layout is not None
    return layout.gather(value).clone()


def largest_error(got: Run, want: Run) -> float:
    """The largest relative error of anything; of tensors, relative to their largest value."""
    assert got.gradients.keys() == want.gradients.keys() and got.weights.keys() == want.weights.keys()
    scalars = zip(got.losses + got.norms, want.losses + want.norms, strict=True)
    errors = [abs(mine / theirs - 1) for mine, theirs in scalars]
    for mine, theirs in ((got.gradients, want.gradients), (got.weights, want.weights)):
        errors += [float((mine[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in theirs]
    return max(errors)


def collectives_of(method: PEFT, options: dict[str, Any]) -> tuple[Counter[Collective], Counter[Collective]]:
    """What one forward and backward pass communicates at tensor parallel 2: with adapters, and without.

    The embedding trains, so that the base's gradients go the whole way back in both.
    """
    with megatron_on_cpu(tensor_model_parallel_size=2):
        model = method(make_gpt(**options))
        model.embedding.requires_grad_()
        axis = axis_of_group("tp", parallel_state.get_tensor_model_parallel_group())

        def run() -> Counter[Collective]:
            with count_collectives() as calls:
                loss_of(logits_of(model), axis).backward()
            return Counter(calls)

        run()  # DoRA's norms are computed once per step
        adapted = run()
        with method.disable_adapter(model):
            return adapted, run()
