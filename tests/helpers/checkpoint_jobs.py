"""What real processes do in the tests of checkpoints; in a module of its own, so that they import little."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import torch
from helpers.adapters import adapted
from helpers.expert_oracle import METHODS as EXPERT_METHODS
from helpers.oracle_runs import METHODS, make_model, moe_config, rows
from helpers.workers import run_on_ranks
from torch import Tensor, nn

from meshpeft.checkpoint import CheckpointError, export_peft_adapter, load_checkpoint, save_checkpoint
from meshpeft.data.batches import RowSampler
from meshpeft.hub.tensor_files import TensorFileWriter
from meshpeft.models import Decoder
from meshpeft.parallel import (
    ModelParallelConfig,
    RowParallelLinear,
    ShardedTensor,
    TensorLayout,
    init_parallelism,
    layout_of_tensor,
    parallel_group_info,
    set_seed,
    sharded_state_dict,
)
from meshpeft.parallel.init import draw_full
from meshpeft.training.step import TrainStep, adamw


class At(NamedTuple):
    """A layout of real processes; `etp=None` means `tp`."""

    tp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int | None = None
    sequence_parallel: bool = False
    cp: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.dp * self.cp

    def __str__(self) -> str:
        sizes = [f"{axis}{size}" for axis, size in zip(("tp", "dp", "ep", "etp"), self, strict=False) if size]
        return "-".join([*sizes, *["sp"] * self.sequence_parallel, *[f"cp{self.cp}"] * (self.cp > 1)])


def on(at: At, job: Callable[..., Any], *arguments: Any) -> Any:
    """A job's result at a layout: in this process, or rank 0's of others."""
    if at.world_size == 1:
        return job(at, *arguments)
    return run_on_ranks(at.world_size, job, at, *arguments)[0]


def make_moe(parallel: ModelParallelConfig) -> Decoder:
    """A layer of experts, and one without."""
    return Decoder(moe_config(mlp_only_layers=[1]), parallel, dtype=torch.float64)


# What is saved: name -> (the base, the adapters on it). "whole": every parameter is trained, experts too.
MODELS: dict[str, tuple[Callable[[ModelParallelConfig], Decoder], Callable[[Any], nn.Module]]] = {
    **{f"dense, {name}": (make_model, method) for name, method in METHODS.items()},
    "MoE, whole": (make_moe, lambda model: model),
    **{f"MoE, {name}": (make_moe, method) for name, method in EXPERT_METHODS.items()},
}
# One of each kind.
FAST_MODELS = [
    *("dense, lora", "dense, canonical_lora", "dense, dora"),
    *(
        "MoE, whole",
        "MoE, lora, shared",
        "MoE, canonical_lora, per expert",
        "MoE, dora, per expert",
        "MoE, lora, routers",
    ),
]


def export_and_fail(base: str, folder: str) -> str:
    """The error of a second export, which only the rank that writes can see."""
    init_parallelism(tensor_parallel=2)
    model = adapted(Path(base))
    export_peft_adapter(model, Path(folder))
    try:
        export_peft_adapter(model, Path(folder))
    except CheckpointError as error:
        return str(error)
    return ""


def build(at: At, name: str) -> tuple[Decoder, torch.optim.AdamW]:
    """A model with a fresh adapter and optimizer, at a layout."""
    init_parallelism(
        tensor_parallel=at.tp, expert_parallel=at.ep, expert_tensor_parallel=at.etp, context_parallel=at.cp
    )
    make, adapt = MODELS[name]
    parallel = ModelParallelConfig(
        tensor_model_parallel_size=at.tp,
        context_parallel_size=at.cp,
        expert_model_parallel_size=at.ep if make is make_moe else 1,
        expert_tensor_parallel_size=at.etp,
        sequence_parallel=at.sequence_parallel,
        params_dtype=torch.float64,
    )
    model = adapt(make(parallel))
    assert isinstance(model, Decoder)
    return model, adamw(model, lr=0.01)


def _layout(parameter: nn.Parameter) -> TensorLayout:
    layout = layout_of_tensor(parameter)
    assert layout is not None
    return layout


def _drawn(what: str, shape: tuple[int, ...]) -> Tensor:
    return draw_full(shape, lambda full: full.normal_(), zlib.crc32(what.encode()))


def _each(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[Tensor, TensorLayout]]:
    """Every trained parameter and every state of it that is divided like it, by name."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[name] = (parameter.data, _layout(parameter))
            for state, value in optimizer.state[parameter].items():
                if value.dim():
                    found[f"{state} of {name}"] = (value, _layout(parameter))
    return found


def save_known(at: At, method: str, folder: str, asynchronous: bool = False) -> dict[str, int]:
    """Save a state whose every value follows from its name and place; the bytes of each global tensor."""
    model, optimizer = build(at, method)
    for parameter in model.parameters():
        if parameter.requires_grad:
            optimizer.state[parameter] = {
                "step": torch.tensor(7.0),
                "exp_avg": torch.empty_like(parameter),
                "exp_avg_sq": torch.empty_like(parameter),
            }
    sizes = {}
    for what, (value, layout) in _each(model, optimizer).items():
        value.copy_(layout.slice(_drawn(what, layout.global_shape)))
        sizes[what] = value.element_size() * torch.Size(layout.global_shape).numel()
    with _writes_held() if asynchronous else nullcontext():
        save = save_checkpoint(
            model, folder, step=7, optimizer=optimizer, extra={"at": list(at)}, asynchronous=asynchronous
        )
        if asynchronous:
            # Training goes on, in the same process groups' world, before the first byte is written.
            train(model, optimizer, range(2))
    save.wait()
    return sizes


@contextmanager
def _writes_held() -> Iterator[None]:
    """Nothing is written into a file before the end."""
    go_on, written = Event(), TensorFileWriter.write

    def write(writer: TensorFileWriter, tensor: Tensor) -> None:
        assert go_on.wait(60)
        written(writer, tensor)

    TensorFileWriter.write = write  # type: ignore[method-assign]
    try:
        yield
    finally:
        TensorFileWriter.write = written  # type: ignore[method-assign]
        go_on.set()


def load_known(at: At, method: str, folders: list[str]) -> list[tuple[str, str]]:
    """Load what each of the folders holds, and name every tensor that is not, bit for bit, what was saved."""
    model, _ = build(at, method)
    wrong = []
    for folder in folders:
        optimizer = adamw(model, lr=0.01)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.fill_(torch.nan)
        assert load_checkpoint(model, folder, optimizer=optimizer).step == 7
        wrong += [
            (folder, what)
            for what, (value, layout) in _each(model, optimizer).items()
            if not torch.equal(layout.gather(value), _drawn(what, layout.global_shape))
        ]
        steps = [float(state["step"]) for state in optimizer.state.values()]
        if steps != [7.0] * sum(parameter.requires_grad for parameter in model.parameters()):
            wrong.append((folder, "step"))
    return wrong


def _fill(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        layout = _layout(parameter)
        with torch.no_grad():
            parameter.copy_(layout.slice(_drawn(name, layout.global_shape)))


def save_experts_one_by_one(at: At, folder: str) -> None:
    """All parameters of a model, as a system that does not stack its experts would describe them."""
    model, _ = build(at, "MoE, whole")
    _fill(model)
    entries: dict[str, ShardedTensor] = {}
    for key, entry in sharded_state_dict(model).items():
        if entry.layout is None or not entry.layout.expert:
            entries[key] = entry
            continue
        for number, values in enumerate(entry.data.contiguous(), entry.global_offset[0]):
            name, shape, offset = f"{key}{number}", entry.global_shape[1:], entry.global_offset[1:]
            entries[name] = ShardedTensor(name, values, shape, offset, entry.replica_id, name=name)
    model.sharded_state_dict = lambda: entries
    save_checkpoint(model, folder, step=7, full_model=True)


def load_whole(at: At, folder: str) -> list[str]:
    """Load all parameters into a model of stacked experts; the names of those that are not what was saved."""
    model, _ = build(at, "MoE, whole")
    load_checkpoint(model, folder)
    return [
        name
        for name, parameter in model.named_parameters()
        if not torch.equal(_layout(parameter).gather(parameter), _drawn(name, _layout(parameter).global_shape))
    ]


class StackedLayers(nn.Module):
    """Two layers that a checkpoint holds as one tensor for each parameter, with an axis for the layers in front."""

    def __init__(self) -> None:
        super().__init__()
        options: dict[str, Any] = {"dtype": torch.float64, "input_is_parallel": True, "bias": False}
        self.layers = nn.ModuleList([RowParallelLinear(8, 4, **options), RowParallelLinear(8, 4, **options)])

    def sharded_state_dict(self, prefix: str = "", *_: Any) -> dict[str, ShardedTensor]:
        return {
            f"{number}.{name}": entry
            for number, layer in enumerate(self.layers)
            for name, entry in sharded_state_dict(layer, f"{prefix}layers.", ((0, number, len(self.layers)),)).items()
        }


def _stacked_layers(at: At) -> tuple[StackedLayers, torch.optim.AdamW]:
    init_parallelism(tensor_parallel=at.tp)
    model = StackedLayers()
    return model, torch.optim.AdamW(model.parameters())


def _states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    [group] = optimizer.param_groups
    return [_layout(p).gather(optimizer.state[p]["exp_avg"]).clone() for p in group["params"]]


def save_stacked_layers(at: At, folder: str) -> list[Tensor]:
    """One step of a model whose layers are stacked when saved; its final parameters, and states."""
    model, optimizer = _stacked_layers(at)
    _fill(model)
    for parameter in model.parameters():
        layout = _layout(parameter)
        parameter.grad = layout.slice(_drawn("gradient", layout.global_shape)) * parameter.detach()
    optimizer.step()
    save_checkpoint(model, folder, step=1, optimizer=optimizer)
    return [*whole(model).values(), *_states(optimizer)]


def load_stacked_layers(at: At, folder: str) -> list[Tensor]:
    """The same, loaded."""
    model, optimizer = _stacked_layers(at)
    load_checkpoint(model, folder, optimizer=optimizer)
    return [*whole(model).values(), *_states(optimizer)]


def train(model: Decoder, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps of training's own, on the oracle's rows."""
    info = parallel_group_info()
    sampler = RowSampler(
        rows=rows(), batch_size=4, micro_batch_size=1, dp_rank=info.dp.rank, dp_size=info.dp.world_size, seed=3
    )
    step = TrainStep(model, optimizer, clip=0.5)
    for number in steps:
        batch = sampler.micro_batches(number)
        step(batch, batch.global_target_tokens)


def train_and_save(at: At, method: str, folder: str, steps: int) -> dict[str, Tensor]:
    """Train, save on the way at half of the steps, and give the final adapters."""
    set_seed(0)
    model, optimizer = build(at, method)
    train(model, optimizer, range(steps // 2))
    save_checkpoint(model, folder, step=steps // 2, optimizer=optimizer, extra={"steps": steps})
    train(model, optimizer, range(steps // 2, steps))
    return whole(model)


def resume(at: At, method: str, folder: str) -> dict[str, Tensor]:
    """Go on from there in a process that knows nothing else, and give the final adapters."""
    set_seed(99)
    model, optimizer = build(at, method)
    loaded = load_checkpoint(model, folder, optimizer=optimizer)
    train(model, optimizer, range(loaded.step, int(loaded.extra["steps"])))
    return whole(model)


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The global values of the trained parameters."""
    return {
        name: _layout(parameter).gather(parameter).clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def failing_save(folder: str) -> list[str]:
    """One of two ranks cannot write its file; then one cannot read. What each rank hears, and what it then has."""
    model, optimizer = build(At(tp=2), "dense, lora")
    save_checkpoint(model, folder, step=1, optimizer=optimizer)
    heard = []
    with _no_space_on(rank=1):
        try:
            save_checkpoint(model, folder, step=2, optimizer=optimizer)
        except CheckpointError as error:
            heard.append(str(error))
    loaded = load_checkpoint(model, folder, optimizer=optimizer)
    return [*heard, str(loaded.step)]


@contextmanager
def _no_space_on(rank: int) -> Iterator[None]:
    written = TensorFileWriter.write

    def write(writer: TensorFileWriter, tensor: Tensor) -> None:
        if parallel_group_info().world.rank == rank:
            raise OSError(28, "No space left on device")
        written(writer, tensor)

    TensorFileWriter.write = write  # type: ignore[method-assign]
    try:
        yield
    finally:
        TensorFileWriter.write = written  # type: ignore[method-assign]
