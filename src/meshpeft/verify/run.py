"""`meshpeft verify` and `meshpeft plan`: the proof and the costs of a run, from the run's own options."""

from __future__ import annotations

import gc
import math
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from itertools import starmap
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress

from meshpeft.models import DecoderConfig
from meshpeft.parallel import MeshPEFTError
from meshpeft.parallel.mesh import AXES
from meshpeft.training.adapters import (
    DefaultLayers,
    add_adapter,
    base_quantizer,
    check_adapter,
    default_layers_of,
    describe_targets,
    start_adapter,
)
from meshpeft.training.base import BaseModel, find_base
from meshpeft.training.config import ConfigError, EngineName, FinetuneConfig, PlanConfig, tensor_type
from meshpeft.training.launch import device, workers_for
from meshpeft.training.report import counted, describe_processes, short_path
from meshpeft.training.streams import plain_warnings
from meshpeft.verify.few_layers import few_layers
from meshpeft.verify.layout import TOLERANCE, Verdict, verify_layout
from meshpeft.verify.plan import Plan, plan
from meshpeft.verify.search import (
    DEFAULT_MACHINE,
    SHORTLIST,
    USED,
    Counts,
    Found,
    Models,
    command_for,
    found_layouts,
    machine_of,
)

__all__ = ["NotExact", "counted_of", "plan_of", "plan_run", "prove_run", "verify_run"]


Config = TypeVar("Config", bound=FinetuneConfig)

# Starts that depend on the base's weights; the others are drawn.
STARTS = ("svdquant", "pissa")

# Processes that count the layouts of a search: each has the libraries in its memory.
_COUNTING = 4


class NotExact(MeshPEFTError):
    """A layout whose numbers are not those of one process."""


def verify_run(config: FinetuneConfig) -> str:
    """Prove that the run with these options trains the adapter that one process trains.

    Its model's structure, method, targets and layout are taken, its quantisation and the start of its adapters; not its
    weights and data. Dropout is part of one step only, since its masks belong to a layout.

    Args:
        config: Options of the run; those that could not be started are refused as by `finetune`.

    Returns:
        What was checked and found, in lines.

    Raises:
        NotExact: An error above the tolerance, with the same lines.
        MeshPEFTError: Options, model and layout do not fit together; a state is wrong.
    """
    config, base, world = _checked(config, weights=True)
    start = time.perf_counter()
    verdict = _verdict(config, base, world)
    lines = [
        *_subject(config, base),
        *_findings(verdict, world, base, _left_out(config)),
        f"in {time.perf_counter() - start:.1f} s, without a GPU",
    ]
    if not verdict.is_exact:
        raise NotExact("\n".join(["this layout does not train the adapter of one process", *lines]))
    return "\n".join([*lines, "exact: this layout trains the adapter of one process"])


def prove_run(config: FinetuneConfig, base: BaseModel) -> str:
    """Check the layout of a run on a model of transformers as `verify_run` does, before it starts.

    Transformers' code may take statistics over sharded channels, or draw noise on each rank; only a comparison shows
    it. The decoder's code is this package's, and proven by its tests.

    Args:
        config: Options of the run, checked and `resolved`.
        base: Its base model.

    Returns:
        What was found, in a line; also where no small model can be made or simulated, so that nothing was.

    Raises:
        NotExact: The layout trains another adapter than one process.
        ConfigError: The tokens of a row cannot be on several processes, as `--cp` asks.
    """
    world, start = workers_for(config), time.perf_counter()
    try:
        verdict = _verdict(config, base, world)
    except ConfigError:
        raise
    except MeshPEFTError as error:  # of the small model: the real one passed the same checks
        return f"not checked before the run: {error}"
    if not verdict.is_exact:
        findings = _findings(verdict, world, base, _left_out(config))
        advice = "use another layout, such as one process; meshpeft verify with these options repeats the check"
        raise NotExact("\n".join(["this layout does not train the adapter of one process", *findings, advice]))
    worst = max(check.error for check in verdict.checks)
    return (
        f"checked: {verdict.layout} trains the adapter of one process (scaled down, float64, largest error "
        f"{worst:.0e}, {time.perf_counter() - start:.0f} s)"
    )


def plan_run(config: PlanConfig) -> str:
    """Count what one rank of the run with these options holds and sends; or search for layouts that fit.

    Args:
        config: Options of the run; those that could not be started are refused as by `finetune`.

    Returns:
        Tables, in lines.

    Raises:
        MeshPEFTError: Options, model and layout do not fit together.
    """
    if config.devices is not None:
        return _search(config)
    config, base, world = _checked(config, weights=False)
    found = plan_of(config, base, world)
    return "\n".join(
        [*_subject(config, base), f"layout: {_processes(config, world)}", "", *_costs(found, config, world)]
    )


def plan_of(
    config: FinetuneConfig,
    base: BaseModel,
    world: int,
    models: Models | None = None,
    layers: DefaultLayers | None = None,
    **options: Any,
) -> Plan:
    """Count what one of `world` ranks of a run holds and sends.

    Args:
        config: Options of the run.
        base: Its base model.
        world: Ranks.
        models, layers: `few_layers` and `default_layers_of` of the base, by whoever counts more than one layout.
        options: Other arguments of `plan`.
    """
    machine = config.machine if isinstance(config, PlanConfig) else None
    return plan(
        base.config,
        partial(add_adapter, config=config),
        **_layout(config, world),
        quantizer=base_quantizer(config, default_layers_of(base) if layers is None else layers),
        micro_batch_size=_rows_of_a_pass(config, world),
        seq_length=config.seq_length,
        loss_chunk=config.loss_chunk,
        router_aux_loss_coef=config.router_aux_loss_coef,
        dtype=tensor_type(config.dtype),
        device_type=device().type if machine is None else "cpu" if machine == "cpu" else "cuda",
        models=[(1, base.config)] if _names_layers(config) else models,
        **options,
    )


def _rows_of_a_pass(config: FinetuneConfig, world: int) -> int:
    """Return how many rows one process computes at a time: its part of a batch may have fewer than the option says."""
    return min(config.micro_batch_size, math.ceil(config.batch_size * config.tp * config.cp / world))


def _search(config: PlanConfig) -> str:
    config = replace(config, machine=config.machine or DEFAULT_MACHINE)
    config.resolved().check()
    base = find_base(config.model, config.engine)
    check_adapter(base, config)
    machine = machine_of(config)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("counting layouts", total=SHORTLIST)
        with _counting(config, base) as counts:

            def seen(layouts: Sequence[tuple[FinetuneConfig, int]]) -> Iterator[Plan | MeshPEFTError]:
                for found in counts(layouts):
                    progress.advance(task)
                    yield found

            fitting, too_large, of_all = found_layouts(config, base, seen)
    rows = f"{config.batch_size} rows of {config.seq_length:,} tokens a step"
    lines = [
        *_subject(config, base),
        f"machine: {config.devices:,} devices of {machine.memory / 1e9:,.0f} GB ({config.machine}), "
        f"{machine.node} in a node; {rows}",
        "",
    ]
    if fitting:
        lines += ["these layouts fit:", *_table(fitting), ""]
    if too_large:
        lines += [f"these do not fit {USED:.0%} of the memory:", *_table(too_large[:3]), ""]
    lines.append(
        f"{len(fitting) + len(too_large)} of {of_all} layouts were counted, those that a rough count puts first; the "
        "time is an estimate, to rank them by"
    )
    if not fitting:
        smaller = [
            "more devices",
            "shorter rows (--seq-length)",
            *(["--micro-batch-size 1"] if config.micro_batch_size > 1 else []),
            *(["--quantize nf4"] if config.quantize in ("int8", "fp8") else []),
        ]
        return "\n".join([*lines, f"nothing fits: it takes {' or '.join(smaller)}"])
    best, limit = fitting[0], USED * machine.memory
    if best.plan.worst > limit:
        safe = next((found for found in fitting if found.plan.worst <= limit), None)
        lines.append(
            "at worst the first does not fit; the fastest of these that does even then: "
            + ("none" if safe is None else ", ".join(_words_of(safe.config)))
        )
    if best.config.quantize != config.quantize:
        lines.append(
            f"packed as {best.config.quantize} the base has other values: --quantize is part of what is trained"
        )
    return "\n".join([*lines, "", command_for(best.config, machine.node, best.world)])


@contextmanager
def _counting(config: PlanConfig, base: BaseModel) -> Iterator[Counts]:
    """Give what counts the layouts of a search, in some processes where there are cores for them."""
    workers = min(os.cpu_count() or 1, _COUNTING)
    if workers == 1:
        yield counted_of(base)
        return
    # An interrupt ends them without a word: what there is to say the command says.
    quiet = (signal.SIGINT, signal.SIG_DFL)
    with ProcessPoolExecutor(workers, get_context("spawn"), signal.signal, quiet) as pool:
        for _ in range(workers):
            pool.submit(_get_ready, config.model, config.engine)  # takes seconds, beside the rough count
        yield lambda layouts: (future.result() for future in [pool.submit(_count_here, *one) for one in layouts])


def counted_of(base: BaseModel) -> Counts:
    """Return what counts the layouts of a search in this process."""
    models, layers = few_layers(base.config), default_layers_of(base)

    def one(config: FinetuneConfig, world: int) -> Plan | MeshPEFTError:
        try:
            return plan_of(config, base, world, models, layers, with_added=False)
        except MeshPEFTError as error:
            return error

    return lambda layouts: starmap(one, layouts)


@plain_warnings("meshpeft plan")
def _count_here(config: FinetuneConfig, world: int) -> Plan | MeshPEFTError:
    """Count one layout, in a process that has nothing yet."""
    (found,) = _counts_of(config.model, config.engine)([(config, world)])
    # Its own class may ask for more than a sentence where it is made anew.
    return MeshPEFTError(str(found)) if isinstance(found, MeshPEFTError) else found


@plain_warnings("meshpeft plan")
def _get_ready(model: Path | None, engine: EngineName | None) -> None:
    _counts_of(model, engine)
    gc.freeze()  # what is imported is not looked at again while layouts are counted


@cache
def _counts_of(model: Path | None, engine: EngineName | None) -> Counts:
    return counted_of(find_base(model, engine))


def _table(found: Sequence[Found]) -> list[str]:
    # With experts on other ranks: where all tokens go to this one's.
    worst = any(one.plan.worst > one.plan.together for one in found)
    header = f"  {'one process holds':>18}{'at worst':>12}" if worst else f"  {'one process holds':>18}"
    lines = [f"{header}{'a step takes':>15}{'waiting':>9}   layout"]
    for one in found:
        held = f"  {_size(one.plan.together):>18}" + (f"{_size(one.plan.worst):>12}" if worst else "")
        time = f"{one.seconds:>13.2f} s{one.waiting / one.seconds:>9.0%}"
        lines.append(f"{held}{time}   {', '.join(_words_of(one.config))}")
    return lines


def _words_of(config: FinetuneConfig) -> list[str]:
    sizes = [f"{axis}={getattr(config, axis)}" for axis in ("tp", "cp", "dp", "ep") if (getattr(config, axis) or 1) > 1]
    words = [" ".join([*sizes, *([f"etp={config.etp}"] if config.etp not in (None, config.tp) else [])]) or "1 process"]
    words += [] if config.shard_base == "none" else [f"base sharded over {config.shard_base}"]
    mode = config.activation_checkpointing
    words += [] if mode == "none" else [f"{mode} recomputation"]
    return words + ([] if config.quantize is None else [f"{config.quantize} base"])


def _processes(config: FinetuneConfig, world: int) -> str:
    sizes = {name: size for name, size in _layout(config, world).items() if name in AXES}
    return describe_processes(world, {**sizes, "etp": config.etp or config.tp}, config)


def _checked(config: Config, *, weights: bool) -> tuple[Config, BaseModel, int]:
    """Resolve the options as `finetune` does, and find the model's structure and the number of processes.

    Args:
        config: Options of the run.
        weights: Check the files of the weights, too; otherwise a configuration is enough.
    """
    config = config.resolved()
    config.check()
    world = workers_for(config)
    base = find_base(config.model, config.engine)
    base.check(config, weights=weights)
    check_adapter(base, config)
    return config, base, world


def _verdict(config: FinetuneConfig, base: BaseModel, world: int) -> Verdict:
    adapt, layout = partial(add_adapter, config=_at_random(config)), _layout(config, world)
    options: dict[str, Any] = {
        "activation_checkpointing": config.activation_checkpointing,
        "quantizer": base_quantizer(config, default_layers_of(base), residuals=True),
        "start": None if config.lora_init_method not in STARTS else partial(start_adapter, run=config),
        "dropout": config.dropout,
        "all_layers": _names_layers(config),
        "lr_ratio": config.lora_plus,
        "router_aux_loss_coef": config.router_aux_loss_coef,
    }
    if isinstance(base.config, DecoderConfig):
        return verify_layout(base.config, adapt, **{**layout, **options})
    # It takes seconds, and there is something to import: the model is of transformers.
    from meshpeft.verify.transformers_layout import verify_transformers_layout

    return verify_transformers_layout(base.config, adapt, **{**layout, **options})


def _subject(config: FinetuneConfig, base: BaseModel) -> list[str]:
    return [
        f"model: {short_path(base.directory)}, {_structure(base)}",
        f"{config.method}: rank {config.rank} on {describe_targets(config, default_layers_of(base).adapted)}",
    ]


def _layout(config: FinetuneConfig, world: int) -> dict[str, Any]:
    """Return the layout of the run as arguments of `verify_layout` and `plan`."""
    return {
        "tp": config.tp,
        "cp": config.cp,
        "dp": world // (config.cp * config.tp),
        "ep": config.ep,
        "etp": config.etp,
        "sequence_parallel": config.sequence_parallel,
        "activation_checkpointing": config.activation_checkpointing,
        "shard_base": config.shard_base,
    }


def _costs(found: Plan, config: FinetuneConfig, world: int) -> list[str]:
    rows = f"{counted(_rows_of_a_pass(config, world), 'row')} of {config.seq_length} tokens"
    packed = "" if config.quantize is None else f", layers packed as {config.quantize}"
    held = {
        f"base, frozen, {config.dtype}{packed}": found.base,
        **({"  what a sharded base is gathered into": found.buffers} if found.buffers else {}),
        "adapter": found.adapter,
        "its gradients": found.gradients,
        "its optimizer states": found.optimizer,
        f"kept for the backward pass, {rows}": found.activations,
        "besides that, at the worst moment of a pass": found.transient,
    }
    lines = ["one process holds", *(f"  {name:<58}{_size(size):>12}" for name, size in held.items())]
    lines += [f"  {'together':<58}{_size(found.together):>12}"]
    more = found.worst - found.together
    if more:
        lines += [f"  {'more if all tokens go to its experts, not an equal share':<58}{_size(more):>12}"]
    parts = {
        f"one process sends, forward and backward of {rows}": found.micro_batch,
        **({"  of that to gather the base": found.gathers} if found.gathers else {}),
        "  of that for the adapter": found.added,
        "one process sends, once per optimizer step": found.step,
    }
    for title, traffic in parts.items():
        lines += ["", title] if not title.startswith(" ") else [title]
        lines += [
            f"    {one.axis:<8}{one.name.replace('_', '-'):<16}{one.calls:>6,} x {_size(one.bytes // one.calls):>11}"
            for one in traffic
        ] or ["    nothing"]
    return lines


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _at_random(config: FinetuneConfig) -> FinetuneConfig:
    """Return options of the run's adapter in float64, with a B that does not hide A, and without dropout."""
    return replace(
        config, dtype="float64", lora_dtype=None, dropout=0.0, lora_b_init_method="normal", lora_init_method=None
    )


def _left_out(config: FinetuneConfig) -> list[str]:
    """List options that change numbers and that the proof in float64 does not cover."""
    found = []
    if config.lora_dtype == "bf16":
        found.append("rounding of bf16 adapters: they are float64 here")
    if config.dtype == "float16":
        found.append("float16's loss scale: nothing overflows in float64")
    return found


def _names_layers(config: FinetuneConfig) -> bool:
    patterns = (*(config.target_modules or ()), *(config.exclude_modules or ()))
    return any(re.search(r"\.\d", pattern) for pattern in patterns)


def _structure(base: BaseModel) -> str:
    config = base.config
    if not isinstance(config, DecoderConfig):
        text = config.get_text_config()
        why = "" if base.reason is None else f" (not native: {base.reason.partition(';')[0]})"
        return f"{config.model_type}, {text.num_hidden_layers} layers, transformers engine{why}"
    heads = f"{config.num_attention_heads} heads over {config.num_query_groups}"
    sizes = f"{config.model_type}, {config.num_layers} layers, {heads}"
    moe = config.moe
    return sizes if moe is None else f"{sizes}, {moe.num_experts} experts, top {moe.moe_router_topk}"


def _findings(verdict: Verdict, world: int, base: BaseModel, left_out: list[str]) -> list[str]:
    if verdict.states is None:
        where = "a model with experts" if base.engine == "native" else "transformers' code"
        states = f"states: not followed in {where}; the numbers below are the proof"
    else:
        found = (
            ", ".join(f"{state} on {axis}" for axis, state in verdict.states.items()) or "one rank, nothing to check"
        )
        states = f"states at {world:,} ranks: every operation's operands agree; the loss is {found}"
    checks = [
        f"  {check.name.replace('_', ' '):<10}{check.error:.1e}   {'' if check.error < TOLERANCE else '<- wrong: '}"
        f"{check.did}"
        for check in verdict.checks
    ]
    small = f"{verdict.num_layers} layers, hidden {verdict.hidden_size}"
    return [
        states,
        f"numbers, float64, {verdict.layout} against one rank ({small}):",
        *checks,
        f"  largest relative error allowed: {TOLERANCE:.0e}",
        *(f"not checked: {what}" for what in (*verdict.unchecked, *left_out)),
    ]
