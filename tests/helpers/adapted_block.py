"""A transformer block without its attention, adapted, run on simulated ranks, and its whole gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from helpers.simulate import simulate, the_same
from torch import Tensor, nn

from meshpeft.parallel import (
    ColumnParallelLinear,
    FusedParts,
    ParallelGroupInfo,
    RowParallelLinear,
    TensorLayout,
    finalize_gradients,
    gradient_norm,
    layout_of_tensor,
    named_init_,
)
from meshpeft.peft import PEFT

HIDDEN, HEADS, GROUPS, HEAD_DIM, WIDTH = 24, 16, 8, 3, 32
SEQ, BATCH = 8, 4


class Block(nn.Module):
    """qkv -> a product per group -> proj -> gated MLP, with residuals; x [seq, batch, hidden]."""

    def __init__(self, sequence_parallel: bool = False, bias: bool = True) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"bias": bias, "dtype": torch.float64, "sequence_parallel": sequence_parallel}
        q, k = HEADS * HEAD_DIM, GROUPS * HEAD_DIM
        self.qkv = FusedParts(("q", "k", "v"), (q, k, k), blocks=GROUPS)
        self.gate_up = FusedParts(("gate", "up"), (WIDTH, WIDTH))
        attention, mlp = nn.Module(), nn.Module()
        attention.linear_qkv = ColumnParallelLinear(
            HIDDEN, q + 2 * k, gather_output=False, fused_parts=self.qkv, **kwargs
        )
        attention.linear_proj = RowParallelLinear(q, HIDDEN, input_is_parallel=True, **kwargs)
        mlp.linear_fc1 = ColumnParallelLinear(
            HIDDEN, 2 * WIDTH, gather_output=False, fused_parts=self.gate_up, **kwargs
        )
        mlp.linear_fc2 = RowParallelLinear(WIDTH, HIDDEN, input_is_parallel=True, **kwargs)
        self.self_attention, self.mlp = attention, mlp
        self.shards = attention.linear_qkv.layout.axis.world_size

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv.split(self.self_attention.linear_qkv(x), -1, self.shards)
        mixed = q.tanh().unflatten(-1, (k.shape[-1], -1)) * (k.tanh() + v).unsqueeze(-1)
        x = x + self.self_attention.linear_proj(mixed.flatten(-2))
        gate, up = self.gate_up.split(self.mlp.linear_fc1(x), -1, self.shards)
        return x + self.mlp.linear_fc2(F.silu(gate) * up)


@dataclass
class Outcome:
    """What must not depend on the layout."""

    loss: float
    norm: float
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]


# Drawn here: inside the simulation every rank would draw its own.
FULL_INPUT = torch.randn(SEQ, BATCH, HIDDEN, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def local_input(info: ParallelGroupInfo, sequence_parallel: bool) -> Tensor:
    shards = ((1, info.dp), *(((0, info.tp),) if sequence_parallel else ()))
    return TensorLayout((SEQ, BATCH, HIDDEN), shards).slice(FULL_INPUT)


def make_block(method: PEFT | None, sequence_parallel: bool = False, **options: Any) -> Block:
    block = Block(sequence_parallel, **options)
    for name, parameter in block.named_parameters():
        named_init_(parameter, lambda full: full.normal_(std=0.1), 0, name)
    if method is not None:
        method(block)
    return block


def outcome(method: PEFT, tp: int = 1, dp: int = 1, sequence_parallel: bool = False, steps: int = 2) -> Outcome:
    """Train a few steps of SGD and report the last one's loss and gradients, assembled to their full shapes."""
    with simulate(tp=tp, dp=dp) as info:
        block = make_block(method, sequence_parallel)
        trainable = {name: p for name, p in block.named_parameters() if p.requires_grad}
        optimizer = torch.optim.SGD(trainable.values(), lr=0.003)
        for _ in range(steps):
            optimizer.zero_grad()
            out = block(local_input(info, sequence_parallel))
            loss = out.square().sum() / (SEQ * BATCH)
            loss.backward()
            finalize_gradients(block)
            norm = gradient_norm(block)
            optimizer.step()
        whole = TensorLayout((), ())
        layouts = {name: layout_of_tensor(p) or whole for name, p in trainable.items()}
        # The loss is a summand over the axes that divide tokens.
        for axis in (info.dp, *((info.tp,) if sequence_parallel else ())):
            if axis.world_size > 1:
                loss = loss.detach().clone()
                torch.distributed.all_reduce(loss, group=axis.group)
        gather = {name: layout.gather for name, layout in layouts.items()}
        return Outcome(
            float(the_same(loss.detach())),
            float(the_same(norm)),
            {name: the_same(gather[name](p.grad)).clone() for name, p in trainable.items()},
            {name: the_same(gather[name](p.detach())).clone() for name, p in trainable.items()},
        )


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))


def largest_difference(got: Outcome, want: Outcome) -> float:
    """The largest relative error in anything; NaN counts as infinite."""
    assert got.gradients.keys() == want.gradients.keys()
    errors = [abs(got.loss / want.loss - 1), abs(got.norm / want.norm - 1)]
    for name in want.gradients:
        errors.append(relative_error(got.gradients[name], want.gradients[name]))
        errors.append(relative_error(got.parameters[name], want.parameters[name]))
    return max(float("inf") if error != error else error for error in errors)
