"""Models quantised by ModelOpt and adapted, for the tests on one rank and on two."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from helpers.gated_mlp import INPUT, GatedMLP, full_weight
from torch import Tensor, nn

from meshpeft.parallel import (
    GroupedColumnParallelLinear,
    GroupedRowParallelLinear,
    finalize_gradients,
    init_parallelism,
    layer_type_of,
    named_init_,
)
from meshpeft.peft import update_model

LAYERS = ("linear_fc1", "linear_fc2")


class Experts(nn.Module):
    """Four experts on tokens that come sorted, six each."""

    def __init__(self) -> None:
        super().__init__()
        experts = nn.Module()
        experts.linear_fc1 = GroupedColumnParallelLinear(4, 128, 128, perform_initialization=False)
        experts.linear_fc2 = GroupedRowParallelLinear(4, 128, 128, perform_initialization=False)
        self.experts, self.local = experts, experts.linear_fc1.num_local_experts
        for name, parameter in self.named_parameters():
            named_init_(parameter, lambda full: full.normal_(std=0.1), 0, name)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.full((self.local,), x.shape[0] // self.local)
        return self.experts.linear_fc2(torch.relu(self.experts.linear_fc1(x, tokens)), tokens)


def quantized(model: nn.Module, config: str, x: Tensor) -> nn.Module:
    """The model after `mtq.quantize` with one of ModelOpt's configurations, calibrated on x."""
    return quantized_by(model, config, lambda model: model(x))


def quantized_by(model: nn.Module, config: str, run: Callable[[nn.Module], object]) -> nn.Module:
    """The same, calibrated by a run of the model."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq  # takes seconds, and only some tests need it

        return mtq.quantize(model, getattr(mtq, config), run)


class Outcome(NamedTuple):
    """Full tensors: the quantised weight of each layer, and the output before and after training."""

    weights: dict[str, Tensor]
    adapted: Tensor
    trained: Tensor


def run(config: str, tp: int) -> Outcome:
    """Quantise, adapt from the residuals, and train two steps."""
    init_parallelism(tensor_parallel=tp)
    x = INPUT.float().flatten(0, 1)
    model = quantized(GatedMLP(torch.float32), config, x)
    weights = {name: full_weight(layer, _weight(layer)) for name, layer in _layers(model)}
    update_model(model, {"adapter_cfg": {"*linear_fc*": {"rank": 8, "scale": 0.5, "lora_init_method": "svdquant"}}})
    adapted = model(x).detach()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        finalize_gradients(model)
        optimizer.step()
    return Outcome(weights, adapted, model(x).detach())


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, getattr(model, name)) for name in LAYERS]


def _weight(layer: nn.Module) -> Tensor:
    layer_type = layer_type_of(layer)
    assert layer_type is not None
    return layer_type.weight(layer)


def run_experts(config: str, ep: int, etp: int) -> list[Tensor]:
    """The quantised weights of both projections, whole, and the scale of the second one's input."""
    info = init_parallelism(expert_parallel=ep, expert_tensor_parallel=etp, tensor_parallel=etp)
    x = INPUT.float().flatten(0, 1)
    model = quantized(Experts(), config, x[info.ep.rank * (24 // ep) : (info.ep.rank + 1) * (24 // ep)])
    layers = (model.experts.linear_fc1, model.experts.linear_fc2)
    return [*(full_weight(layer, _weight(layer)) for layer in layers), _scale_of_input(layers[1])]


def _scale_of_input(layer: Any) -> Tensor:
    scale: Tensor | None = layer.input_quantizer.amax
    return torch.zeros(()) if scale is None else scale


def scales_over_data_parallel(config: str) -> list[Tensor]:
    """Scales of activations, of dense layers and of experts, where 2 data-parallel ranks calibrate on other tokens."""
    info = init_parallelism()
    x = INPUT.float().flatten(0, 1).chunk(2)[info.dp.rank] * (1 + info.dp.rank)
    models = quantized(GatedMLP(torch.float32), config, x), quantized(Experts(), config, x)
    return [_scale_of_input(layer) for layer in (models[0].linear_fc1, models[1].experts.linear_fc1)]
