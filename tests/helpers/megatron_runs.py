"""Fine-tunes of small Megatron models by Megatron's own means, and of our decoder with the same weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from helpers.megatron_cpu import megatron_on_cpu
from helpers.megatron_gpt import DENSE, logits_of, loss_of, make_decoder, make_gpt, token_ids
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn

from meshpeft.engines import axis_of_group
from meshpeft.models import Decoder, DecoderConfig
from meshpeft.parallel import (
    TensorLayout,
    finalize_gradients,
    gradient_norm,
    layout_of_tensor,
    named_init_,
    parallel_group_info,
    set_layout,
)
from meshpeft.peft import PEFT, DoRALinear, adapter_wrappers
from meshpeft.peft.adapter import init_method_of
from meshpeft.verify.simulation import Collective, count_collectives


@dataclass
class Run:
    """What must not depend on the layout, nor on whose model it is; tensors have their full shapes.

    With expert parallel, gradients and weights are those of this rank's experts.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


Method = Callable[[Any], nn.Module]


def train_gpt(method: Method, sizes: dict[str, int], options: dict[str, Any], config: DecoderConfig = DENSE) -> Run:
    """A few steps in Megatron's data-parallel wrapper, with its own finalisation of gradients.

    Args:
        sizes: of `parallel_state`.
        options: of its configuration, beside the sizes.
    """
    with megatron_on_cpu(**sizes):
        model = method(make_gpt(config, **options))
        return train(DistributedDataParallel(model.config, DistributedDataParallelConfig(), model), model)


def train_decoder(method: Method, config: DecoderConfig = DENSE) -> Run:
    """The same on our decoder, on one rank."""
    decoder = method(make_decoder(config))
    return train(decoder, decoder)


def train_decoder_one_by_one(method: PEFT, config: DecoderConfig) -> Run:
    """The same with an adapter for each expert, under the names, and from the values, of experts one after the other.

    Args:
        method: with `share_expert_adapters=False`.
    """
    decoder = method(make_decoder(config))
    for _, wrapper in adapter_wrappers(decoder):
        if ".mlp.experts." in wrapper.adapter.base_name:
            for own, init in (("linear_in", method.lora_A_init_method), ("linear_out", method.lora_B_init_method)):
                stack = wrapper.adapter.get_parameter(f"{own}.weight")
                for expert, matrix in enumerate(stack.detach()):
                    name = f"{_of_one(wrapper.adapter.base_name, expert)}.adapter.{own}.weight"
                    drawn = nn.Parameter(torch.empty_like(matrix))
                    set_layout(drawn, TensorLayout(tuple(matrix.shape)))
                    named_init_(drawn, init_method_of(init), method.seed, name)
                    matrix.copy_(drawn.detach())
            if isinstance(wrapper, DoRALinear):
                wrapper.forget_norms()
                wrapper.adapter.init_weight_magnitude(wrapper._get_weight_norm())
    run = train(decoder, decoder)
    run.gradients, run.weights = _one_by_one(run.gradients), _one_by_one(run.weights)
    return run


def _of_one(name: str, expert: int) -> str:
    return name.replace(".mlp.experts.", f".mlp.experts.local_experts.{expert}.")


def _one_by_one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in tensors.items():
        stacked = ".mlp.experts." in name
        found |= {_of_one(name, expert): row for expert, row in enumerate(value)} if stacked else {name: value}
    return found


def train(wrapped: nn.Module, model: nn.Module, steps: int = 5) -> Run:
    """Fine-tune a model of either package, in Megatron's wrapper (or its chunks each in one) or as it is."""
    run, wrappers = Run(), [module for module in wrapped.modules() if isinstance(module, DistributedDataParallel)]
    trainable = adapter_parameters(model)
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2, weight_decay=0.1)
    ours = isinstance(model, Decoder)
    for step in range(steps):
        logits = wrapped(token_ids()) if ours else logits_of(wrapped)
        loss = loss_of(logits, None if ours else axis_of_group("tp", parallel_state.get_tensor_model_parallel_group()))
        if wrappers:
            for wrapper in wrappers:
                wrapper.zero_grad_buffer()
            loss.backward()
            finalize_model_grads(wrappers)
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
    _let_go(model)
    return run


def _let_go(model: nn.Module) -> None:
    """Take from the dispatchers of tokens what they keep of the last step.

    Its graph leads to the parameters, whose hooks lead to Megatron's wrapper: a cycle that python cannot see, which
    would keep the model and its process groups for ever.
    """
    for module in model.modules():
        if isinstance(module, MoELayer):
            for name, value in list(vars(module.token_dispatcher).items()):
                if isinstance(value, Tensor):
                    setattr(module.token_dispatcher, name, None)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters, by names in which layers and experts have global numbers."""
    return {
        f"{next(adapter.base_name for adapter in wrapper.adapter.modules() if hasattr(adapter, 'base_name'))}.{name}": p
        for _, wrapper in adapter_wrappers(model)
        for name, p in wrapper.adapter.named_parameters()
    }


def megatron_norm(parameters: Iterable[nn.Parameter]) -> float:
    """The norm of all gradients, counted by Megatron's rules, in float64 (its own functions work in float32).

    Its optimizers of experts, too, have the group of dense tensor parallel as their `tp_group`.
    """
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    groups = {
        True: parallel_state.get_model_parallel_group(),
        False: parallel_state.get_expert_tensor_model_pipeline_parallel_group(),
    }
    squares = torch.zeros((), dtype=torch.float64)
    for allreduce, model_group in groups.items():
        square = torch.zeros((), dtype=torch.float64)
        for p in parameters:
            counts = param_is_not_shared(p) and param_is_not_tensor_parallel_duplicate(p, tensor_group)
            if p.allreduce == allreduce and counts:
                square += p.grad.square().sum()
        torch.distributed.all_reduce(square, group=model_group)
        squares += square
    return squares.sqrt().item()


def whole(parameter: Tensor, value: Tensor) -> Tensor:
    """The full tensor of which `value` is this rank's slice, laid out like the parameter."""
    layout = layout_of_tensor(parameter)
    assert layout is not None
    return layout.gather(value).clone()


def assert_same(runs: list[Run], want: Run, tolerance: float) -> None:
    """Every rank's losses and norms, and all ranks' gradients and weights together, are those of one run."""
    for mine, theirs in ((run.gradients, want.gradients) for run in runs):
        assert theirs.keys() >= mine.keys()
    assert {name for run in runs for name in run.weights} == want.weights.keys()
    assert max(largest_error(run, want) for run in runs) < tolerance


def largest_error(got: Run, want: Run) -> float:
    """The largest relative error of anything; of tensors, relative to their largest value."""
    scalars = zip(got.losses + got.norms, want.losses + want.norms, strict=True)
    errors = [abs(mine / theirs - 1) for mine, theirs in scalars]
    for mine, theirs in ((got.gradients, want.gradients), (got.weights, want.weights)):
        errors += [float((mine[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in mine]
    return max(float("inf") if error != error else error for error in errors)


def collectives_of(
    method: PEFT, sizes: dict[str, int], options: dict[str, Any], config: DecoderConfig = DENSE
) -> tuple[Counter[Collective], Counter[Collective]]:
    """What one forward and backward pass communicates: with adapters, and without.

    The embedding trains, so that the base's gradients go the whole way back in both.
    """
    with megatron_on_cpu(**sizes):
        model = method(make_gpt(config, **options))
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
