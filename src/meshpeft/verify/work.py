"""What operations compute and move, and the time that a machine needs for it.

An estimate, to rank layouts: each operation takes as long as its products or its memory traffic, whichever is more, and
each collective as long as its bytes need over the slowest link between its ranks. What overlaps is the gathers of a
sharded base with everything else, on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeAlias

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from meshpeft.models.spans import tiles_stand_for
from meshpeft.verify.watch import Operation, tensors_in

__all__ = ["MACHINES", "Kernels", "Machine", "Traffic", "WorkWatch", "seconds_of_kernels", "seconds_of_traffic"]

Kernels: TypeAlias = dict[tuple[int, int], float]
"""Floating-point operations of products, and bytes read and written, of an operation -> how many such operations."""


@dataclass(frozen=True, order=True)
class Traffic:
    """Collectives of one kind over one axis.

    Attributes:
        axis: `tp dp ep etp edp`, or axes joined by `+`.
        name: `allreduce allgather reduce_scatter alltoall broadcast`.
        calls: How many.
        bytes: What one rank puts into all of them.
        ranks: How many take part.
        span: Ranks from the first of them to the last: more than a node has, and a collective crosses nodes.
    """

    axis: str
    name: str
    calls: int
    bytes: int
    ranks: int = field(default=1, compare=False)
    span: int = field(default=1, compare=False)


class WorkWatch:
    """Counts what operations compute and move.

    Attributes:
        kernels: The operations.
    """

    def __init__(self) -> None:
        self.kernels: Kernels = {}

    def seen(self, operation: Operation) -> None:
        """Count an operation."""
        func, args, kwargs, out = operation.func, operation.args, operation.kwargs, operation.out
        if func.namespace in ("c10d", "_c10d_functional") or _only_views(func):
            return
        tensors = {id(tensor): tensor for tensor in (*operation.given, *tensors_in(out))}
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        times = tiles_stand_for()
        # What is done tile by tile stays in a cache, or inside of one kernel.
        kind = (_products(func, args, kwargs, out), moved if times is None else 0)
        self.kernels[kind] = self.kernels.get(kind, 0.0) + (1.0 if times is None else times)


@cache
def _only_views(func: Any) -> bool:
    if func.name().startswith(("aten::empty", "aten::detach", "aten::alias", "prim::")):
        return True
    arguments = func._schema.arguments
    aliases = any(argument.alias_info is not None for argument in arguments)
    return aliases and not any(argument.is_write for argument in arguments)


def _products(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    packet = func.overloadpacket
    counter = flop_registry.get(packet)
    if counter is not None:
        return int(counter(*args, **kwargs, out_val=out))
    name = packet.__name__
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        causal = kwargs.get("is_causal", args[4] if len(args) > 4 else False)
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3]))) // (2 if causal else 1)
    if name == "_scaled_dot_product_flash_attention_for_cpu_backward":
        return int(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))) // (2 if args[7] else 1)
    if name == "_grouped_mm":
        # Of rows by one matrix each; or of columns that groups sum over.
        rows, columns = args[0], args[1]
        return 2 * rows.shape[-2] * rows.shape[-1] * columns.shape[-1]
    return 0


@dataclass(frozen=True)
class Machine:
    """What one device of a cluster does in a second, at what large operations reach of it.

    Attributes:
        memory: Bytes of a device.
        flops: Floating-point operations of products, by the bytes of a number.
        memory_bandwidth: Bytes read and written.
        bandwidth: Bytes that a device sends to others of its node.
        node_bandwidth: Bytes that it sends to those of other nodes.
        node: Devices of a node.
        latency: Seconds that a collective takes at least.
        launch: Seconds between the starts of two operations.
        copies_beside: Whether a sharded base is gathered while it computes: the cores of a CPU do both.
    """

    memory: float
    flops: dict[int, float]
    memory_bandwidth: float
    bandwidth: float
    node_bandwidth: float
    node: int
    latency: float
    launch: float
    copies_beside: bool = True


def _gpu(gib: int, half: float, single: float, memory: float, link: float, network: float) -> Machine:
    """Make a GPU from its maker's peaks, in TFLOP/s, TB/s and GB/s: 60% of the products, 80% of the bytes."""
    products = {2: 0.6e12 * half, 4: 0.6e12 * single, 8: 0.3e12 * single}
    return Machine(gib * 1e9, products, 0.8e12 * memory, 0.8e9 * link, 0.8e9 * network, 8, 2e-5, 5e-6)


MACHINES: dict[str, Machine] = {
    # Dense 16-bit and 32-bit products, memory, NVLink in one direction, and a network of 200 or 400 Gbit/s a device.
    "a100": _gpu(80, 312, 19.5, 2.0, 300, 25),
    "h100": _gpu(80, 989, 67, 3.35, 450, 50),
    "h200": _gpu(141, 989, 67, 4.8, 450, 50),
    "b200": _gpu(180, 2250, 75, 8.0, 900, 50),
    # Of a server's CPU one core for each process, over gloo: what steps of 128 and 512 tokens a row took.
    "cpu": Machine(8e9, {2: 4e9, 4: 6e10, 8: 3e10}, 3e9, 3e8, 2e8, 64, 2e-3, 3e-5, copies_beside=False),
}
"""What `plan` takes for a machine, if no option says otherwise."""


def seconds_of_kernels(kernels: Iterable[tuple[int, int, float]], machine: Machine, dtype: torch.dtype) -> float:
    """Estimate how long operations take.

    Args:
        kernels: Operations of products, bytes, and how many such.
        machine: What runs them.
        dtype: Type of most products.
    """
    rate = machine.flops[min(max(dtype.itemsize, 2), 8)]
    return math.fsum(
        count * (machine.launch + max(products / rate, moved / machine.memory_bandwidth))
        for products, moved, count in kernels
    )


# What a rank sends of the bytes that it puts into a collective over n ranks.
_SENT = {
    "allreduce": lambda n: 2 * (n - 1) / n,
    "allgather": lambda n: n - 1,
    "reduce_scatter": lambda n: (n - 1) / n,
    "alltoall": lambda n: (n - 1) / n,
    "broadcast": lambda n: 1,
}


def seconds_of_traffic(traffic: Iterable[Traffic], machine: Machine) -> float:
    """Estimate how long collectives take, one after the other."""
    return math.fsum(
        one.calls * machine.latency
        + one.bytes
        * _SENT[one.name](one.ranks)
        / (machine.bandwidth if one.span <= machine.node else machine.node_bandwidth)
        for one in traffic
        if one.ranks > 1
    )
