"""An expert MLP over dispatched tokens, and the dense loop that says what it must compute.

In a module of its own, so that real workers can import it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshpeft.models import load_pretrained, save_pretrained
from meshpeft.parallel import (
    FusedParts,
    GroupedColumnParallelLinear,
    GroupedRowParallelLinear,
    ModelParallelConfig,
    ParallelGroupInfo,
    combine_tokens,
    dispatch_tokens,
    finalize_gradients,
    init_parallelism,
    layout_of_tensor,
)

EXPERTS, HIDDEN, WIDTH = 8, 6, 10


class Case(NamedTuple):
    """The tokens of all ranks, in the ranks' order, and the experts' weights in canonical order."""

    x: Tensor
    experts: Tensor
    probabilities: Tensor
    fc1: Tensor
    fc2: Tensor
    grad: Tensor


class Result(NamedTuple):
    y: Tensor
    x_grad: Tensor
    probabilities_grad: Tensor
    fc1_grad: Tensor
    fc2_grad: Tensor


def make_case(tokens: int, allowed: list[int], top_k: int = 2) -> Case:
    """Random tokens, each sent to `top_k` of the allowed experts."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    choices = randn(tokens, len(allowed)).argsort(1)[:, :top_k]
    return Case(
        randn(tokens, HIDDEN),
        torch.tensor(allowed)[choices],
        randn(tokens, top_k),
        randn(EXPERTS, 2 * WIDTH, HIDDEN),
        randn(EXPERTS, HIDDEN, WIDTH),
        randn(tokens, HIDDEN),
    )


def dense_loop(case: Case) -> Result:
    """Every expert on its tokens, one after the other."""
    x, probabilities, fc1, fc2 = (
        tensor.clone().requires_grad_() for tensor in (case.x, case.probabilities, case.fc1, case.fc2)
    )
    y = torch.zeros_like(case.x)
    for expert in range(EXPERTS):
        rows, choice = (case.experts == expert).nonzero(as_tuple=True)
        gate, up = functional.linear(x[rows], fc1[expert]).chunk(2, -1)
        out = functional.linear(functional.silu(gate) * up, fc2[expert])
        y = y.index_add(0, rows, out * probabilities[rows, choice, None])
    return Result(y.detach(), *torch.autograd.grad((y * case.grad).sum(), (x, probabilities, fc1, fc2)))


class ExpertMLP(nn.Module):
    """The experts of one layer, with given weights."""

    def __init__(self, fc1: Tensor, fc2: Tensor) -> None:
        super().__init__()
        self.fused_parts = FusedParts(("gate", "up"), (WIDTH, WIDTH))
        options = {"dtype": fc1.dtype, "perform_initialization": False}
        self.linear_fc1 = GroupedColumnParallelLinear(
            EXPERTS, HIDDEN, 2 * WIDTH, fused_parts=self.fused_parts, **options
        )
        self.linear_fc2 = GroupedRowParallelLinear(EXPERTS, WIDTH, HIDDEN, **options)
        with torch.no_grad():
            for layer, full in ((self.linear_fc1, fc1), (self.linear_fc2, fc2)):
                layer.weight.copy_(layer.layout.weight().slice(full))

    def forward(self, x: Tensor, experts: Tensor, probabilities: Tensor, info: ParallelGroupInfo) -> Tensor:
        rows, plan = dispatch_tokens(x, experts, probabilities, EXPERTS, info.ep, info.etp)
        packed = self.linear_fc1(rows, plan.tokens_per_expert)
        gate, up = self.fused_parts.split(packed, -1, info.etp.world_size)
        return combine_tokens(self.linear_fc2(functional.silu(gate) * up, plan.tokens_per_expert), plan)


def gathered_gradient(parameter: nn.Parameter) -> Tensor:
    """The whole gradient, on every rank."""
    layout = layout_of_tensor(parameter)
    assert layout is not None and parameter.grad is not None
    return layout.gather(parameter.grad)


def run_uneven(layouts: dict[str, tuple[int, int, list[list[int]]]], case: Case) -> dict[str, Result]:
    """What this worker computes under each of the named layouts (ep, etp, tokens of each worker)."""
    results = {}
    for name, (ep, etp, tokens) in layouts.items():
        info = init_parallelism(expert_parallel=ep, expert_tensor_parallel=etp)
        mine = tokens[info.world.rank]
        x, probabilities = case.x[mine].requires_grad_(), case.probabilities[mine].requires_grad_()
        model = ExpertMLP(case.fc1, case.fc2)
        y = model(x, case.experts[mine], probabilities, info)
        (y * case.grad[mine]).sum().backward()
        finalize_gradients(model)
        gradients = [gathered_gradient(layer.weight) for layer in (model.linear_fc1, model.linear_fc2)]
        assert x.grad is not None and probabilities.grad is not None
        results[name] = Result(y.detach(), x.grad, probabilities.grad, *gradients)
    return results


def load_run_save(source: Path, target: Path, ids: list[list[int]]) -> dict[str, Tensor]:
    """Each of 2 workers, with half of the experts, runs its own row of tokens; both save the model.

    Returns:
        `logits` of the row; the final gradients of the last layer's `router` and, gathered, `experts`.
    """
    info = init_parallelism(expert_parallel=2)
    parallel = ModelParallelConfig(expert_model_parallel_size=2)
    decoder = load_pretrained(source, torch.float64, parallel, activation_checkpointing=True)
    # Rows of different lengths: the ranks send unequal numbers of tokens, forward and again in the backward pass.
    logits = decoder(torch.tensor([ids[info.dp.rank]]))
    logits.square().sum().backward()
    finalize_gradients(decoder)
    router = decoder.decoder.layers[-1].mlp.router.weight
    experts = decoder.decoder.layers[-1].mlp.experts.linear_fc2.weight
    save_pretrained(decoder, target)
    assert router.grad is not None
    return {"logits": logits.detach(), "router": router.grad, "experts": gathered_gradient(experts)}
