"""What is asked of adapted Megatron models in real processes, beside training."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.megatron_cpu import megatron_on_cpu
from helpers.megatron_gpt import EXPERTS, logits_of, loss_of, make_gpt
from helpers.megatron_layers import MARKS
from helpers.megatron_runs import Method, Run, train
from helpers.modelopt_jobs import quantized_by
from megatron.core import ModelParallelConfig, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn

from meshpeft.checkpoint import CheckpointError, export_peft_adapter, load_peft_adapter, merge_adapter
from meshpeft.engines import axis_of_group
from meshpeft.models import DecoderConfig
from meshpeft.parallel import ParallelAxis, layer_type_of, layout_of, layout_of_tensor, parallel_group_info
from meshpeft.parallel.states import all_gather
from meshpeft.peft import PEFT, NamedLoRALinear, ParallelLinearAdapter, adapter_wrappers, update_model


def train_wrapped_before(method: PEFT, ddp_options: dict[str, Any]) -> Run:
    """Adapters on a model that was in Megatron's data-parallel wrapper already."""
    with megatron_on_cpu(tensor_model_parallel_size=1):
        model = make_gpt()
        wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(**ddp_options), model)
        assert method(wrapped) is wrapped
        return train(wrapped, model)


def train_with_our_finalisation(method: PEFT, options: dict[str, Any]) -> Run:
    """Without Megatron's wrapper: this package's `finalize_gradients` sums what it would."""
    with megatron_on_cpu(tensor_model_parallel_size=2):
        model = method(make_gpt(**options))
        return train(model, model)


def half_precision(method: PEFT) -> tuple[list[str], set[torch.dtype], bool]:
    """(Names of the adapted layers, types of their adapters, all have a gradient), in Megatron's bfloat16 wrapper."""
    with megatron_on_cpu(tensor_model_parallel_size=2):
        model = make_gpt(bf16=True)
        wrapped = method(Float16Module(model.config, model))
        loss_of(logits_of(wrapped), _tensor_axis()).backward()
        wrappers = [wrapper for _, wrapper in adapter_wrappers(wrapped)]
        parameters = [parameter for wrapper in wrappers for parameter in wrapper.adapter.parameters()]
        names = [wrapper.adapter.base_name for wrapper in wrappers]
        finite = all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in parameters)
        return names, {parameter.dtype for parameter in parameters}, finite


class Chunks(nn.Module):
    """Two chunks of one model, as an interleaved pipeline holds them, called one after the other."""

    def __init__(self, chunks: list[nn.Module]) -> None:
        super().__init__()
        self.chunks = nn.ModuleList(chunks)

    def forward(self, *args: Any) -> Tensor:
        first, last = self.chunks
        last.module.set_input_tensor(first(*args))
        logits: Tensor = last(*args)
        return logits


def _chunk_of(layer: int) -> nn.Module:
    """A GPT with one of its layers, and what comes before the first or after the last one."""
    model = make_gpt(sequence_parallel=True)
    model.decoder.layers = nn.ModuleList([model.decoder.layers[layer]])
    if layer == 0:
        model.post_process = model.decoder.post_process = False
        model.output_layer = model.decoder.final_layernorm = None
    else:
        model.pre_process = model.decoder.pre_process = False
        model.embedding = None
    return model


def train_in_chunks(method: Method) -> Run:
    """Two layers in a list of two chunks, each in Megatron's data-parallel wrapper."""
    with megatron_on_cpu(tensor_model_parallel_size=2):
        chunks = [
            DistributedDataParallel(chunk.config, DistributedDataParallelConfig(), chunk)
            for chunk in (_chunk_of(0), _chunk_of(1))
        ]
        assert method(chunks) is chunks
        model = Chunks(chunks)
        return train(model, model)


def names_in_chunks(method: PEFT) -> list[str]:
    """Names of the adapted layers of two chunks of a model, as two pipeline stages hold them."""
    with megatron_on_cpu(tensor_model_parallel_size=1):
        chunks = [make_gpt(), make_gpt()]
        for layer in chunks[1].decoder.layers:
            layer.layer_number += len(chunks[0].decoder.layers)
        assert method(chunks) is chunks
        return [wrapper.adapter.base_name for _, wrapper in adapter_wrappers(chunks)]


def grouped_layer(method: PEFT, sizes: dict[str, Any]) -> dict[str, Any]:
    """What the adapter of the first grouped layer says of itself, and what Megatron reads on its parameters."""
    with megatron_on_cpu(**sizes):
        model = method(make_gpt(EXPERTS, grouped=True, sequence_parallel=sizes["tensor_model_parallel_size"] > 1))
        wrapper = model.get_submodule("decoder.layers.0.mlp.experts.linear_fc1")
        layout, adapter = wrapper.adapter.layout, wrapper.adapter
        weight = wrapper.layer_type.weight(wrapper.to_wrap)
        assert torch.equal(weight[1], wrapper.to_wrap.weight1)
        return {
            "layout": (layout.experts, layout.in_features, layout.out_features, layout.shard),
            "weight": tuple(weight.shape),
            "fused_parts": layout.fused_parts.names,
            "A": tuple(adapter.linear_in.weight.shape),
            "B": tuple(adapter.linear_out.weight.shape),
            "marks of A": {mark: getattr(adapter.linear_in.weight, mark) for mark in MARKS[:4]},
            "marks of B": {mark: getattr(adapter.linear_out.weight, mark) for mark in MARKS[:4]},
        }


@torch.no_grad()
def residuals_and_products(config: str) -> list[tuple[Tensor, Tensor]]:
    """(W - quant(W), s B A), whole, of the layers of a model that ModelOpt quantised, over 2 ranks."""
    with megatron_on_cpu(tensor_model_parallel_size=2):
        model = quantized_by(make_gpt().eval(), config, logits_of)
        start = {"rank": 4, "scale": 3.0, "lora_init_method": "svdquant"}
        update_model(model, {"adapter_cfg": {"*linear*": start}})
        found = []
        for _, wrapper in adapter_wrappers(model):
            assert isinstance(wrapper, NamedLoRALinear)
            base, layer_type = wrapper.to_wrap, layer_type_of(wrapper.to_wrap)
            assert layer_type is not None and base.weight_quantizer.is_enabled
            residual = layout_of(base).weight().gather(base.weight - layer_type.weight(base))
            a, b = (layout.gather(f) for f in wrapper.factors() if (layout := layout_of_tensor(f)) is not None)
            found.append((residual, 3.0 * b @ a))
        return found


@torch.no_grad()
def started_without_a_quantiser() -> tuple[bool, bool]:
    """Whether the factors of adapters on grouped experts are zero, and the logits those of before."""
    with megatron_on_cpu(tensor_model_parallel_size=1, expert_model_parallel_size=2):
        model = make_gpt(EXPERTS, grouped=True).eval()
        before = logits_of(model)
        attributes = {"rank": 4, "lora_init_method": "svdquant"}
        with pytest.warns(UserWarning, match="no enabled quantiser on decoder.layers.0.mlp.experts.linear_fc1"):
            update_model(model, {"adapter_cfg": {"*.experts.linear_fc*": attributes}})
        wrappers = [wrapper for _, wrapper in adapter_wrappers(model) if isinstance(wrapper, NamedLoRALinear)]
        zero = not any(factor.any() for wrapper in wrappers for factor in wrapper.factors())
        return bool(wrappers) and zero, torch.equal(logits_of(model), before)


def routed_alike(method: PEFT, options: dict[str, Any], masked: bool) -> bool:
    """Whether a router with an adapter that is zero does what the router does without: choice, gradients, counts."""
    with megatron_on_cpu(tensor_model_parallel_size=1):
        found = []
        for adapted in (True, False):
            model = make_gpt(EXPERTS, **options)
            model = method(model) if adapted else model.requires_grad_(False)
            router = model.decoder.layers[0].mlp.router
            generator = torch.Generator().manual_seed(2)
            x = torch.randn(6, 2, EXPERTS.hidden_size, generator=generator, dtype=torch.float64).requires_grad_()
            mask = torch.rand(6, 2, generator=generator) < 0.3 if masked else None
            torch.manual_seed(5)
            probabilities, choice = router(x, padding_mask=mask)
            (probabilities * torch.linspace(0, 1, probabilities.numel()).view_as(probabilities)).sum().backward()
            base = router.to_wrap if adapted else router
            found.append([probabilities.detach(), choice, x.grad, *base.buffers()])
        return all(torch.equal(*pair) for pair in zip(*found, strict=True))


@torch.no_grad()
def merged_logits(method: PEFT, sizes: dict[str, Any], options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, int]:
    """Logits with adapters, with them merged, and unmerged; and how many layers of the merged model have adapters."""
    with megatron_on_cpu(**sizes):
        model = method(make_gpt(EXPERTS, **options)).eval()
        adapted = logits_of(model)
        method.merge(model)
        merged = logits_of(model)
        method.unmerge(model)
        unmerged = logits_of(model)
        assert torch.equal(logits_of(merge_adapter(model)), merged)
        return adapted, merged, unmerged, len(list(adapter_wrappers(model)))


@torch.no_grad()
def exported(
    method: PEFT, sizes: dict[str, Any], options: dict[str, Any], config: DecoderConfig, directory: Path
) -> tuple[Tensor, Tensor]:
    """Logits of an adapted model whose adapter is exported, and of another one that the adapter is loaded into.

    It is exported out of Megatron's data-parallel wrapper, which the file shows nothing of.
    """
    with megatron_on_cpu(**sizes):
        model = method(make_gpt(config, **options)).eval()
        with torch.enable_grad():  # it follows the graph to the parameters
            wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
        export_peft_adapter(wrapped, directory)
        loaded = load_peft_adapter(make_gpt(config, **options), directory)
        return logits_of(model), logits_of(loaded)


def refused_exports(method: PEFT, directory: Path) -> list[str]:
    """Why an adapter of a part of a model is not exported, nor one of experts one after the other."""
    found = []
    with megatron_on_cpu(tensor_model_parallel_size=1):
        for refused in (method(make_gpt().decoder), method(make_gpt(EXPERTS))):
            try:
                export_peft_adapter(refused, directory)
            except CheckpointError as error:
                found.append(str(error))
    with megatron_on_cpu(pipeline_model_parallel_size=2):
        model = make_gpt()
        try:
            export_peft_adapter(method(model), directory)
        except CheckpointError as error:
            found.append(str(error))
    return found


def marks_of_copies(method: PEFT) -> tuple[dict[str, Any], dict[str, Any]]:
    """Marks and layouts of the adapters' parameters, and of those of copies of the adapters."""

    def marks(adapters: dict[str, nn.Module]) -> dict[str, Any]:
        return {
            f"{name}.{own}": [getattr(parameter, mark) for mark in MARKS] + [layout_of_tensor(parameter).global_shape]
            for name, adapter in adapters.items()
            for own, parameter in adapter.named_parameters()
        }

    with megatron_on_cpu(tensor_model_parallel_size=2):
        model = method(make_gpt(sequence_parallel=True))
        adapters = {name: wrapper.adapter for name, wrapper in adapter_wrappers(model)}
        return marks(adapters), marks({name: copy.deepcopy(adapter) for name, adapter in adapters.items()})


def gathered_at_run_time(method: PEFT) -> bool:
    """Whether logits that the output layer gathers when it is asked to are those that it leaves divided otherwise."""
    with megatron_on_cpu(tensor_model_parallel_size=2):
        model = method(make_gpt())
        divided = logits_of(model).detach()
        gathered = logits_of(model, runtime_gather_output=True)
        return torch.equal(all_gather(divided, _tensor_axis(), -1), gathered)


def axes_without_parallel_state() -> tuple[list[int], int]:
    """Sizes of the axes of layers that were handed their group, with no `parallel_state`; and the mesh's."""
    config = ModelParallelConfig(tensor_model_parallel_size=2, use_cpu_initialization=True)
    group = dist.new_group([0, 1])
    layer = ColumnParallelLinear(4, 6, config=config, init_method=nn.init.zeros_, tp_group=group)
    layout = layout_of(layer)
    assert layout.axis.group is group and layout_of(layer).axis is layout.axis
    return [
        layout.axis.world_size,
        layout.factor_b(2, inside=False).local_shape[0],
    ], parallel_group_info().tp.world_size


def axis_is_left(method: PEFT) -> bool:
    """Whether the axis is there of a model that is gone, as are Megatron's groups."""
    with megatron_on_cpu(tensor_model_parallel_size=2):
        model = method(make_gpt())
        loss_of(logits_of(model), _tensor_axis()).backward()
        axis = weakref.ref(parallel_group_info().tp)
        assert axis() is _tensor_axis()
    del model
    gc.collect()
    return axis() is not None


def adapter_with_megatrons_config() -> tuple[tuple[int, ...], bool, int]:
    """Local shape of B, the mark of A, and the size of the axis, of an adapter made from the documented flags."""
    with megatron_on_cpu(tensor_model_parallel_size=2):
        config = ModelParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, params_dtype=torch.float64)
        adapter = ParallelLinearAdapter(
            8,
            12,
            2,
            "linear",
            activation="identity",
            model_parallel_config=config,
            disable_sequence_parallel_comm=False,
        )
        assert adapter.linear_in.weight.dtype == torch.float64
        marked = adapter.linear_in.weight.sequence_parallel
        return tuple(adapter.linear_out.weight.shape), marked, adapter.layout.axis.world_size


def _tensor_axis() -> ParallelAxis:
    return axis_of_group("tp", parallel_state.get_tensor_model_parallel_group())
