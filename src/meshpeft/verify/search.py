"""`meshpeft plan --devices N`: the layouts of a run that fit, fastest first, and the command for the first.

What can be combined is shortlisted by a rough count of weights, activations and bytes sent. The layouts of the
shortlist are counted as `plan` counts them; what is printed, and what decides, are those numbers. The time of a step is
an estimate from them (`work.py`), to rank layouts by.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any, Literal, TypeAlias

from torch import nn
from transformers import PretrainedConfig

from meshpeft.engines.transformers_experts import experts_per_token
from meshpeft.models import DecoderConfig
from meshpeft.parallel import MeshPEFTError, layer_type_of, layout_of_tensor
from meshpeft.training.base import BaseModel
from meshpeft.training.config import ConfigError, FinetuneConfig, PlanConfig, tensor_type
from meshpeft.verify.plan import Plan
from meshpeft.verify.work import MACHINES, Machine

__all__ = ["DEFAULT_MACHINE", "Counts", "Found", "bytes_of", "command_for", "found_layouts", "machine_of"]

Models: TypeAlias = Sequence[tuple[int, DecoderConfig | PretrainedConfig]]
Counts: TypeAlias = Callable[[Sequence[tuple[FinetuneConfig, int]]], Iterable[Plan | MeshPEFTError]]
"""Counts layouts, given the options and the ranks of each; gives what one was refused for in the place of its plan."""

DEFAULT_MACHINE: Literal["h100"] = "h100"
# Layouts that are counted: as many as a minute allows of the largest models.
SHORTLIST, _MOST, _WANTED = 7, 10, 5
_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
# Of a device's memory what the allocator, the kernels' work space and the buffers of collectives leave.
USED = 0.9


@dataclass(frozen=True)
class Found:
    """A layout, what one rank of it holds and sends, and an estimate of the time of an optimizer step.

    Attributes:
        config: Options of the run, and of the machine.
        world: Ranks.
        plan: What was counted.
        seconds, waiting: A step, and the part of it in which nothing is computed.
    """

    config: PlanConfig
    world: int
    plan: Plan
    seconds: float
    waiting: float


def bytes_of(text: str) -> float:
    """Read an amount of memory such as `80GB` or `75GiB`.

    Raises:
        ConfigError: It is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]i?B?|B)\s*", text, re.IGNORECASE)
    unit = "" if found is None else found[2].upper()
    unit = unit if unit.endswith("B") else f"{unit}B"
    if found is None or unit not in _UNITS or not float(found[1]):
        raise ConfigError(f"memory={text!r}: expected an amount such as 80GB or 75GiB")
    return float(found[1]) * _UNITS[unit]


def machine_of(config: PlanConfig) -> Machine:
    """Return the machine that the options describe."""
    machine = MACHINES[config.machine or DEFAULT_MACHINE]
    size = min(max(tensor_type(config.dtype).itemsize, 2), 8)
    changes: dict[str, Any] = {
        "memory": None if config.memory is None else bytes_of(config.memory),
        "flops": None if config.tflops is None else {size: config.tflops * 1e12},
        "memory_bandwidth": None if config.memory_bandwidth is None else config.memory_bandwidth * 1e9,
        "bandwidth": None if config.bandwidth is None else config.bandwidth * 1e9,
        "node_bandwidth": None if config.node_bandwidth is None else config.node_bandwidth * 1e9,
        "node": config.node_devices,
    }
    return replace(machine, **{name: value for name, value in changes.items() if value is not None})


def found_layouts(config: PlanConfig, base: BaseModel, counts: Counts) -> tuple[list[Found], list[Found], int]:
    """Find the layouts of a run on `config.devices` ranks.

    Args:
        config: Options of the run; those of its layout that are not at their defaults are kept.
        base: Its base model.
        counts: Counts layouts (`run.counted_of`).

    Returns:
        Those that fit, fastest first; those that were counted and do not, the smallest first; how many there are.

    Raises:
        ConfigError: No layout has so many ranks.
        MeshPEFTError: What all layouts were refused for.
    """
    machine, sizes = machine_of(config), _Sizes.of(base, config)
    every = [(layout, _rough(layout, world, sizes, machine)) for layout, world in _layouts(config, machine, sizes)]
    if not every:
        raise ConfigError(_why_none(config, sizes))
    limit = USED * machine.memory
    # What fits, fastest first; then the others, smallest first.
    every.sort(key=lambda item: (False, item[1].seconds) if item[1].memory <= limit else (True, item[1].memory))
    fitting: list[Found] = []
    too_large: list[Found] = []
    refused: MeshPEFTError | None = None
    for shortlist in (every[:SHORTLIST], every[SHORTLIST:_MOST]):
        if len(fitting) >= _WANTED:
            break
        if fitting or too_large:
            shortlist = [(layout, rough) for layout, rough in shortlist if rough.memory <= limit]
        layouts = [(layout, rough.world) for layout, rough in shortlist]
        for (layout, world), plan in zip(layouts, counts(layouts), strict=True):
            if isinstance(plan, MeshPEFTError):
                refused = plan
                continue
            found = _counted(layout, world, plan, machine)
            (fitting if plan.together <= limit else too_large).append(found)
    if refused is not None and not fitting and not too_large:
        raise refused
    fitting.sort(key=lambda found: found.seconds)
    too_large.sort(key=lambda found: found.plan.together)
    return fitting, too_large, len(every)


def _why_none(config: PlanConfig, sizes: _Sizes) -> str:
    given = {
        name: getattr(config, name) for name in ("tp", "cp", "dp", "ep", "etp") if (getattr(config, name) or 1) > 1
    }
    words = ", ".join(f"{name}={size}" for name, size in given.items()) or "these options"
    experts = f"; ep has to divide the {sizes.num_experts} experts" if "ep" in given else ""
    return (
        f"devices={config.devices}: no layout of so many processes has {words}; tp, cp and dp, and ep and etp, have to "
        f"divide them, and a batch has to have a row for each replica (--batch-size {config.batch_size}){experts}"
    )


def _counted(layout: PlanConfig, world: int, plan: Plan, machine: Machine) -> Found:
    passes = _micro_batches(layout, world)
    return Found(layout, world, plan, *plan.seconds_of_step(passes, machine, tensor_type(layout.dtype)))


def _replicas(config: FinetuneConfig, world: int) -> int:
    return world // (config.tp * config.cp)


def _micro_batches(config: FinetuneConfig, world: int) -> int:
    return math.ceil(math.ceil(config.batch_size / _replicas(config, world)) / config.micro_batch_size)


def command_for(config: FinetuneConfig, node: int, world: int) -> str:
    """Write the command that starts the run."""
    words = ["finetune"]
    for option in fields(FinetuneConfig):
        value, name = getattr(config, option.name), "--" + option.name.replace("_", "-")
        if value == option.default:
            continue
        if isinstance(value, bool):
            words.append(name if value else name.replace("--", "--no-", 1))
        else:
            words += [name, *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    command = shlex.join(words)
    if world <= node:
        return f"meshpeft {command}"
    nodes = f"--nnodes {world // node} --nproc-per-node {node} --rdzv-backend c10d --rdzv-endpoint FIRST-MACHINE:29500"
    return f"torchrun {nodes} --no-python meshpeft {command}"


@dataclass(frozen=True)
class _Sizes:
    """Of a whole model what a rough count needs.

    Attributes:
        dense, experts, tables: Parameters of layers, of their experts, and outside of the layers.
        wide, wide_experts: Channels that the linear layers of a layer take and give, and the experts of a token.
        hidden, layers: Width and number of layers.
        used: Part of the experts' parameters that a token meets.
        num_experts, top_k: 0 without experts.
    """

    dense: int
    experts: int
    tables: int
    wide: float
    wide_experts: float
    hidden: int
    layers: int
    used: float
    num_experts: int
    top_k: int

    @classmethod
    def of(cls, base: BaseModel, config: FinetuneConfig) -> _Sizes:
        model: Any = base.empty(tensor_type(config.dtype))
        own = base.config
        text: Any = own if isinstance(own, DecoderConfig) else own.get_text_config()
        layers = own.num_layers if isinstance(own, DecoderConfig) else text.num_hidden_layers
        moe = own.moe if isinstance(own, DecoderConfig) else None
        top_k = experts_per_token(text) if moe is None else moe.moe_router_topk
        dense = experts = tables = num_experts = 0
        wide = wide_experts = 0.0
        seen: set[int] = set()
        for module in model.modules():
            layer_type = layer_type_of(module)
            weight = module._parameters.get("weight")
            if not isinstance(weight, nn.Parameter) or id(weight) in seen:
                continue
            seen.add(id(weight))
            layout = layout_of_tensor(weight)
            if layout is not None and layout.expert:
                experts += weight.numel()
                num_experts = max(num_experts, weight.shape[0])
                wide_experts += (top_k or 1) * (weight.shape[-1] + weight.shape[-2])
            elif weight.dim() == 2 and weight.shape[0] == text.vocab_size:
                tables += weight.numel()
            else:
                dense += weight.numel()
                wide += sum(weight.shape) if layer_type is not None else 0
        used = (top_k or 0) / num_experts if num_experts else 0.0
        hidden = text.hidden_size
        return cls(
            dense, experts, tables, wide / layers, wide_experts / layers, hidden, layers, used, num_experts, top_k or 0
        )


@dataclass(frozen=True)
class _Rough:
    world: int
    memory: float
    seconds: float


def _rough(config: FinetuneConfig, world: int, sizes: _Sizes, machine: Machine) -> _Rough:
    size = tensor_type(config.dtype).itemsize
    stored = {None: size, "nf4": 0.5625, "int4": 0.5625, "int8": 1.0625, "fp8": 1.0625}[config.quantize]
    etp = config.etp or config.tp
    replicas = _replicas(config, world) * config.cp
    shards = {"all": replicas, "none": 1}.get(str(config.shard_base)) or int(config.shard_base)
    of_experts = max(1, shards * (world // (config.ep * etp)) // replicas)
    dense, experts = sizes.dense * stored / config.tp, sizes.experts * stored / (config.ep * etp)
    tables = sizes.tables * size / config.tp
    base = (dense + tables) / shards + experts / of_experts
    base += 2 * ((dense if shards > 1 else 0) + (experts if of_experts > 1 else 0)) / sizes.layers
    rows = min(config.micro_batch_size, math.ceil(config.batch_size / _replicas(config, world)))
    tokens = rows * config.seq_length / config.cp
    mode = config.activation_checkpointing
    # Multiples that were counted of a Llama and of a Qwen3-MoE.
    kept = {
        "none": 1.65 * sizes.wide + 3 * sizes.wide_experts,
        "selective": 0.4 * sizes.wide + 1.2 * sizes.wide_experts,
        "full": sizes.hidden,
    }[mode]
    wide = sizes.wide + sizes.wide_experts
    activations = size * tokens * (sizes.layers * kept + 2 * wide) / config.tp
    # Forward, backward to the inputs, and what is computed again.
    passes = {"none": 2.0, "selective": 2.2, "full": 3.0}[mode]
    active = sizes.dense + sizes.experts * sizes.used + sizes.tables
    computing = passes * 2 * tokens * active / config.tp / machine.flops[min(max(size, 2), 8)]
    computing += passes * 10 * size * tokens * sizes.layers * wide / config.tp / machine.memory_bandwidth
    computing += passes * 100 * sizes.layers * machine.launch

    def sent(amount: float, ranks: int, span: int) -> float:
        link = machine.bandwidth if span <= machine.node else machine.node_bandwidth
        return amount * (ranks - 1) / ranks / link

    stream = size * tokens * sizes.hidden * sizes.layers
    waiting = (2 + passes) * sent(2 * stream, config.tp, config.tp)
    waiting += passes * 2 * sent(stream * sizes.top_k / config.tp, config.ep, config.ep * etp)
    waiting += passes * sent(stream * config.cp / config.tp, config.cp, config.tp * config.cp)
    gathering = 2 * sent(dense + tables, shards, config.tp * shards) + 2 * sent(
        experts, of_experts, config.ep * etp * of_experts
    )
    seconds = _micro_batches(config, world) * max(computing + waiting, gathering)
    return _Rough(world, base + activations, seconds)


def _layouts(config: PlanConfig, machine: Machine, sizes: _Sizes) -> Iterator[tuple[PlanConfig, int]]:
    """Yield the layouts of so many ranks that the options leave open; sizes may not divide."""
    devices = config.devices
    assert devices is not None
    run = replace(config, devices=None, machine=config.machine or DEFAULT_MACHINE)

    def open_to(name: str, values: list[Any]) -> list[Any]:
        given = getattr(run, name)
        default = next(option.default for option in fields(FinetuneConfig) if option.name == name)
        return values if given == default else [given]

    powers = [2**power for power in range(devices.bit_length()) if devices % 2**power == 0]
    inside = [size for size in powers if size <= machine.node]
    # Rows of a few thousand tokens and more are worth sharing.
    shared = [size for size in inside if size == 1 or config.seq_length >= 4096 * size]
    has_experts = sizes.num_experts > 0
    of_experts = [size for size in powers if size <= sizes.num_experts and sizes.num_experts % size == 0]
    for tp, cp, ep in product(
        open_to("tp", inside), open_to("cp", shared), open_to("ep", of_experts if has_experts else [1])
    ):
        if devices % (tp * cp) or (run.dp is not None and tp * cp * run.dp != devices):
            continue
        dp = devices // (tp * cp)
        if dp > max(1, config.batch_size):
            continue
        for etp in open_to("etp", sorted({1, tp}) if has_experts and ep > 1 else [None]):
            etp_size = tp if etp is None else etp
            if devices % (ep * etp_size):
                continue
            replicas = dp * cp
            inner = max(1, machine.node // tp)
            shards = list(dict.fromkeys(["none", *([inner] if 1 < inner < replicas else []), "all"]))
            for shard, recompute, quantize in product(
                open_to("shard_base", shards if replicas > 1 else ["none"]),
                open_to("activation_checkpointing", ["none", "selective", "full"]),
                open_to("quantize", [None, "nf4"]),
            ):
                if isinstance(shard, int) and replicas % shard:
                    continue
                layout = replace(
                    run,
                    tp=tp,
                    cp=cp,
                    dp=dp,
                    ep=ep,
                    etp=None if etp == tp else etp,
                    shard_base=shard,
                    sequence_parallel=run.sequence_parallel or tp > 1,
                    activation_checkpointing=recompute,
                    quantize=quantize,
                )
                yield layout, devices
