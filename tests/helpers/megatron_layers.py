"""One adapted layer of Megatron-Core's on two ranks, and what it must compute on one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from helpers.megatron_cpu import megatron_on_cpu
from helpers.megatron_runs import whole
from megatron.core import ModelParallelConfig, parallel_state
from torch import Tensor, nn

from meshpeft.engines import axis_of_group
from meshpeft.parallel import FusedParts, ParallelAxis, TensorLayout, finalize_gradients, layout_of
from meshpeft.parallel.states import all_reduce
from meshpeft.peft import PEFT

SEQ, BATCH, IN, OUT = 6, 2, 8, 12
# `I` and `R` are the same values on every rank; the gradient of `R` is a summand. Numbers are divided dims.
State = Literal["I", "R", "P", 0, -1]


@dataclass(frozen=True)
class Case:
    """A layer, and the states that it takes its input and gives its output in."""

    kind: type[nn.Module]
    x: State
    y: State
    options: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    explicit_expert_comm: bool = False


@dataclass(frozen=True)
class Result:
    """Everything in full shapes."""

    y: Tensor
    bias: Tensor | None
    dx: Tensor
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    marks: dict[str, dict[str, Any]]


def full(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MARKS = ("allreduce", "sequence_parallel", "tensor_model_parallel", "shared", "partition_dim", "partition_stride")


def run_layer(case: Case, method: PEFT, tensor_parallel: int) -> Result:
    """Forward and backward of the adapted layer; the bias, where the layer returns it, is handed on."""
    with megatron_on_cpu(tensor_model_parallel_size=tensor_parallel):
        holder = nn.Module()
        holder.linear = _make(case)
        method(holder)
        axis = axis_of_group("tp", holder.linear.to_wrap.tp_group)
        x = _local(full(SEQ, BATCH, IN, seed=1), case.x, axis).requires_grad_()
        fused_parts = layout_of(holder.linear.to_wrap).fused_parts
        y, bias = holder.linear(x)
        y.backward(_local(full(SEQ, BATCH, OUT, seed=2), case.y, axis, fused_parts))
        finalize_gradients(holder)
        trainable = dict(holder.linear.adapter.named_parameters())
        return Result(
            _full(y.detach(), case.y, axis, fused_parts),
            None if bias is None else whole_bias(holder.linear.to_wrap),
            _full(x.grad, "P" if case.x == "R" else case.x, axis),
            {name: whole(p, p.grad) for name, p in trainable.items()},
            {name: whole(p, p) for name, p in trainable.items()},
            {name: {mark: getattr(p, mark) for mark in MARKS} for name, p in trainable.items()},
        )


def _make(case: Case) -> nn.Module:
    config = ModelParallelConfig(
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        params_dtype=torch.float64,
        use_cpu_initialization=True,
        **case.config,
    )
    layer = case.kind(IN, OUT, config=config, init_method=torch.nn.init.zeros_, **case.options)
    if case.explicit_expert_comm:
        layer.explicit_expert_comm = True
    layout = layout_of(layer)
    with torch.no_grad():
        layer.weight.copy_(layout.weight().slice(full(OUT, IN, seed=3)))
        if layer.bias is not None:
            layer.bias.copy_(layout.bias().slice(full(OUT, seed=4)))
    return layer


def whole_bias(layer: nn.Module) -> Tensor:
    return layout_of(layer).bias().gather(layer.bias)


def _divided(dim: int, axis: ParallelAxis, features: int, fused_parts: FusedParts | None) -> TensorLayout:
    return TensorLayout((SEQ, BATCH, features), ((dim % 3, axis),), fused_parts, fused_dim=2)


def _local(value: Tensor, state: State, axis: ParallelAxis, fused_parts: FusedParts | None = None) -> Tensor:
    """This rank's share of a full value; of a gradient of a summand, all of it."""
    if isinstance(state, int):
        return _divided(state, axis, value.shape[-1], fused_parts if state == -1 else None).slice(value).clone()
    return value.clone()


def _full(value: Tensor, state: State, axis: ParallelAxis, fused_parts: FusedParts | None = None) -> Tensor:
    if isinstance(state, int):
        features = value.shape[-1] * (axis.world_size if state == -1 else 1)
        return _divided(state, axis, features, fused_parts if state == -1 else None).gather(value)
    return all_reduce(value, axis) if state == "P" else value
