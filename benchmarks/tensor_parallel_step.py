"""LoRA at TP=2 over the frozen base at TP=2, against the communication layout of Megatron's adapters.

An MLP 1024 -> 2 x 2816 -> 1024 on two gloo processes of one thread each, 512 tokens, rank 16, float32: forward and
backward with a gradient for the input. The peer is built from the same layers in the layout that Megatron-Bridge's
adapters have: on a column, A is sharded along the rank and h gathered, so that its input gradient is all-reduced
once more; on a row, h is reduced and the full-width output gathered.

    python benchmarks/tensor_parallel_step.py [--repeats 40]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from timing import measure, ratio, table
from torch import Tensor, nn

from meshpeft.parallel import ColumnParallelLinear, FusedParts, RowParallelLinear, init_parallelism, states
from meshpeft.peft import LoRA

HIDDEN, WIDTH, TOKENS, RANK = 1024, 2816, 512, 16


class MLP(nn.Module):
    """silu(gate) * up between a column and a row."""

    def __init__(self) -> None:
        super().__init__()
        fused_parts = FusedParts(("gate", "up"), (WIDTH, WIDTH))
        self.linear_fc1 = ColumnParallelLinear(
            HIDDEN, 2 * WIDTH, bias=False, gather_output=False, fused_parts=fused_parts
        )
        self.linear_fc2 = RowParallelLinear(WIDTH, HIDDEN, bias=False, input_is_parallel=True)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.linear_fc1(x).chunk(2, -1)
        return self.linear_fc2(F.silu(gate) * up)


class StandaloneColumn(nn.Module):
    """The base's output plus an adapter's: A sharded along the rank, h gathered, B sharded along out."""

    def __init__(self, base: ColumnParallelLinear) -> None:
        super().__init__()
        self.base = base
        self.linear_in = ColumnParallelLinear(base.in_features, RANK, bias=False, gather_output=True)
        self.linear_out = ColumnParallelLinear(RANK, base.out_features, bias=False, gather_output=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.linear_out(self.linear_in(x))


class StandaloneRow(nn.Module):
    """The base's output plus an adapter's: h reduced, B sharded along out, the output gathered."""

    def __init__(self, base: RowParallelLinear) -> None:
        super().__init__()
        self.base = base
        self.linear_in = RowParallelLinear(base.in_features, RANK, bias=False, input_is_parallel=True)
        self.linear_out = ColumnParallelLinear(RANK, base.out_features, bias=False, gather_output=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.linear_out(self.linear_in(x))


def models() -> dict[str, nn.Module]:
    frozen, fused, megatron = (MLP().requires_grad_(False) for _ in range(3))
    LoRA(target_modules=["linear_fc1", "linear_fc2"], dim=RANK, alpha=RANK)(fused)
    megatron.linear_fc1 = StandaloneColumn(megatron.linear_fc1)
    megatron.linear_fc2 = StandaloneRow(megatron.linear_fc2)
    return {"frozen base": frozen, "MeshPEFT LoRA": fused, "Megatron's layout": megatron}


def collectives_of(run: Callable[[], None]) -> int:
    """How many activations are sent in one forward and backward."""
    count = 0

    def counted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: object, **kwargs: object) -> Tensor:
            nonlocal count
            count += 1
            return function(*args, **kwargs)

        return call

    names = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    patches = [mock.patch.object(states, name, counted(getattr(states, name))) for name in names]
    for patch in patches:
        patch.start()
    run()
    for patch in patches:
        patch.stop()
    return count


def work(rank: int, repeats: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    init_parallelism(tensor_parallel=2)
    torch.manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    found = models()

    def step(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            dist.barrier()
            model(x).square().mean().backward()
            model.zero_grad(set_to_none=True)
            x.grad = None

        return run

    steps = {name: step(model) for name, model in found.items()}
    counts = {name: collectives_of(run) for name, run in steps.items()}
    seconds = measure(steps, repeats)
    if rank == 0:
        rows = [
            (name, str(ratio(seconds, name, "frozen base")), str(counts[name] - counts["frozen base"]))
            for name in steps
        ]
        header = ("step", "over the frozen base", "collectives added")
        print(table("LoRA at TP=2, an MLP on two gloo processes", rows, header))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(work, args=(arguments.repeats, str(Path(directory) / "store")), nprocs=2)


if __name__ == "__main__":
    main()
