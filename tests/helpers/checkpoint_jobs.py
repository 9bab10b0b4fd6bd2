"""What real processes do in the tests of checkpoints; in a module of its own, so that they import little."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from helpers.adapters import adapted
from helpers.oracle_runs import METHODS, make_model, rows
from torch import Tensor, nn

from meshpeft.checkpoint import CheckpointError, export_peft_adapter, load_checkpoint, save_checkpoint
from meshpeft.models import Decoder
from meshpeft.parallel import (
    ModelParallelConfig,
    TensorLayout,
    init_parallelism,
    layout_of_tensor,
    parallel_group_info,
    set_seed,
)
from meshpeft.parallel.init import draw_full
from meshpeft.training.batches import RowSampler
from meshpeft.training.optimizer import adamw
from meshpeft.training.step import TrainStep


class At(NamedTuple):
    """A layout of real processes."""

    tp: int = 1
    dp: int = 1
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        return self.tp * self.dp


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


def build(at: At, method: str, **options: Any) -> tuple[Decoder, torch.optim.AdamW]:
    """The oracle's model with a fresh adapter and optimizer, at a layout."""
    init_parallelism(tensor_parallel=at.tp)
    parallel = ModelParallelConfig(
        tensor_model_parallel_size=at.tp, sequence_parallel=at.sequence_parallel, params_dtype=torch.float64
    )
    model = METHODS[method](make_model(parallel))
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
    save = save_checkpoint(
        model, folder, step=7, optimizer=optimizer, extra={"at": list(at)}, asynchronous=asynchronous
    )
    if asynchronous:
        # Training goes on, in the same process groups' world, while the files are written.
        train(model, optimizer, range(2))
        save.wait()
    return sizes


def load_known(at: At, method: str, folder: str) -> list[str]:
    """Load it, and name every tensor that is not, bit for bit, what was saved."""
    model, optimizer = build(at, method)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(torch.nan)
    loaded = load_checkpoint(model, folder, optimizer=optimizer)
    assert loaded.step == 7
    wrong = [
        what
        for what, (value, layout) in _each(model, optimizer).items()
        if not torch.equal(layout.gather(value), _drawn(what, layout.global_shape))
    ]
    steps = [float(state["step"]) for state in optimizer.state.values()]
    return wrong if steps == [7.0] * len(optimizer.param_groups[0]["params"]) else [*wrong, "step"]


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
    model, optimizer = build(At(tp=2), "lora")
    save_checkpoint(model, folder, step=1, optimizer=optimizer)
    heard = []
    with _no_space_on(rank=1):
        try:
            save_checkpoint(model, folder, step=2, optimizer=optimizer)
        except CheckpointError as error:
            heard.append(str(error))
    loaded = load_checkpoint(model, folder, optimizer=optimizer)
    return [*heard, str(loaded.step)]


class _no_space_on:
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __enter__(self) -> None:
        from meshpeft.checkpoint.tensor_file import TensorFileWriter

        self.written: Callable[..., None] = TensorFileWriter.write

        def write(writer: TensorFileWriter, tensor: Tensor) -> None:
            if parallel_group_info().world.rank == self.rank:
                raise OSError(28, "No space left on device")
            self.written(writer, tensor)

        TensorFileWriter.write = write  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        from meshpeft.checkpoint.tensor_file import TensorFileWriter

        TensorFileWriter.write = self.written  # type: ignore[method-assign]
