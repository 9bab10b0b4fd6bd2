"""The oracle: the same fine-tune at two layouts, compared number by number.

It drives `training`'s own step on a real model; nothing of training is written again here. All ranks run in one
process (`simulate`), in float64, where the layouts agree to rounding
(relative error about 1e-15 per operation) and a real error cannot hide.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from meshpeft.checkpoint import export_peft_adapter
from meshpeft.data.batches import GlobalBatchSlice, MicroBatch, PackedRows, RowSampler
from meshpeft.data.context import ContextShard
from meshpeft.models import LanguageModel
from meshpeft.models.base_blocks import ShardBase, shard_base
from meshpeft.models.recompute import ActivationCheckpointing, checkpointing_mode
from meshpeft.models.spans import Spans, SpansOfRanks
from meshpeft.parallel import (
    ModelParallelConfig,
    ParallelAxis,
    ParallelGroupInfo,
    TensorLayout,
    layout_of_tensor,
    set_seed,
)
from meshpeft.training.step import StepResult, TrainStep, adamw
from meshpeft.verify.simulation import index_on_rank, on_rank, ranks, simulate, the_same

__all__ = [
    "Layout",
    "Recipe",
    "Run",
    "Trace",
    "agreed",
    "compare",
    "full_tensors",
    "largest_error",
    "trace_layout",
]


@dataclass(frozen=True)
class Layout:
    """How one run is spread over ranks; no number may depend on it.

    Attributes:
        tp, dp, ep, etp: Sizes of the axes; `etp=None` means `tp`.
        sequence_parallel: Token shards between layers.
        activation_checkpointing: What is kept of a layer and computed again; `True` is full. See `recompute.py`.
        micro_batch_size: Rows of one forward on one data-parallel rank.
        cp: Size of context parallel.
        shard_base: Over how many of its dp * cp replicas the frozen base is sharded.
    """

    tp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int | None = None
    sequence_parallel: bool = False
    activation_checkpointing: bool | ActivationCheckpointing = False
    micro_batch_size: int = 1
    cp: int = 1
    shard_base: ShardBase = "none"

    def simulated(self) -> AbstractContextManager[ParallelGroupInfo]:
        """Simulate the ranks of this layout in this process, see `simulate`."""
        return simulate(self.tp, self.dp, self.ep, self.etp, cp=self.cp)

    def parallel_config(self) -> ModelParallelConfig:
        """Make the decoder's configuration of this layout."""
        return ModelParallelConfig(
            tensor_model_parallel_size=self.tp,
            context_parallel_size=self.cp,
            expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=self.etp,
            sequence_parallel=self.sequence_parallel,
        )

    @property
    def recomputes(self) -> bool:
        """Whether anything is computed again in the backward pass."""
        return checkpointing_mode(self.activation_checkpointing) != "none"

    def __str__(self) -> str:
        words = [f"tp={self.tp}", *([f"cp={self.cp}"] if self.cp > 1 else []), f"dp={self.dp}"]
        if self.ep > 1 or self.etp is not None:
            words += [f"ep={self.ep}", f"etp={self.tp if self.etp is None else self.etp}"]
        words += ["sequence-parallel"] * self.sequence_parallel
        mode = checkpointing_mode(self.activation_checkpointing)
        words += [] if mode == "none" else ["recompute" if mode == "full" else "recompute-selective"]
        words += [] if self.shard_base in ("none", 1) else [f"shard-base={self.shard_base}"]
        return " ".join([*words, f"micro-batch={self.micro_batch_size}"])


@dataclass(frozen=True, eq=False)
class Trace:
    """What a run computed; every tensor in full, on no mesh.

    Attributes:
        losses, grad_norms: Loss and norm of each step; the loss as it is trained, with the routers' balance if that is
            part of it.
        gradients: Gradient of each adapter parameter after the first step (summed, and clipped if the run clips).
        weights: Value of each adapter parameter after the last step.
        exported: Tensors of the exported adapter file.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    exported: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained, and how; the same at every layout.

    Attributes:
        make_model: Builds or loads the base, the same values at every layout, in float64.
        adapt: Adds the adapters and freezes the rest, for instance a `LoRA`.
        rows: What to train on.
        batch_size: Rows of the global batch.
        lr, lr_ratio, weight_decay, clip: Settings of AdamW and of clipping.
        router_aux_loss_coef: Coefficient of the routers' load-balancing loss; 0 leaves it out.
        seed: Seed of the data order and of dropout.
    """

    make_model: Callable[[ModelParallelConfig], LanguageModel]
    adapt: Callable[[LanguageModel], nn.Module]
    rows: PackedRows
    batch_size: int = 4
    lr: float = 1e-2
    lr_ratio: float = 1.0
    weight_decay: float = 0.1
    clip: float = 0.0
    router_aux_loss_coef: float = 0.0
    seed: int = 0


class Run:
    """A fine-tune at one layout, before its first step. Made and used inside `simulate`.

    Attributes:
        recipe, layout, mesh: Arguments.
        model: Model with its adapters.
        optimizer: AdamW of the adapters.
        step: `training`'s own step.
    """

    def __init__(self, recipe: Recipe, layout: Layout, mesh: ParallelGroupInfo) -> None:
        self.recipe, self.layout, self.mesh = recipe, layout, mesh
        set_seed(recipe.seed)
        self.model = recipe.make_model(replace(layout.parallel_config(), params_dtype=torch.float64))
        self.model.set_activation_checkpointing(layout.activation_checkpointing)
        shard_base(self.model, layout.shard_base)
        recipe.adapt(self.model)
        self.optimizer = adamw(self.model, lr=recipe.lr, lr_ratio=recipe.lr_ratio, weight_decay=recipe.weight_decay)
        self.step = TrainStep(
            self.model, self.optimizer, clip=recipe.clip, router_aux_loss_coef=recipe.router_aux_loss_coef
        )

    def take(self, number: int, trace: Trace) -> StepResult:
        """Take the optimizer step of this number, and record its loss and norm; of a first one, the gradients."""
        return self.take_on(*self.batches(number), trace)

    def take_on(self, batches: list[MicroBatch], targets: int, trace: Trace) -> StepResult:
        """Take an optimizer step on given micro-batches; otherwise as `take`."""
        result = self.step(batches, targets)
        balance = 0.0 if result.router_loss is None else float(agreed(result.router_loss))
        trace.losses.append(float(agreed(result.loss)) + self.recipe.router_aux_loss_coef * balance)
        trace.grad_norms.append(float(agreed(result.grad_norm)))
        if not trace.gradients:
            trace.gradients.update(full_tensors(self.model, lambda parameter: parameter.grad))
        return result

    def batches(self, number: int) -> tuple[list[MicroBatch], int]:
        """Return this (possibly simulated) rank's micro-batches of a step, and the target tokens of all ranks."""
        return self.own(self._of_every_rank(number))

    def all_batches(self, number: int) -> tuple[list[MicroBatch], int]:
        """Join the micro-batches of all ranks of the token axes, for one rank to compute."""
        slices = [self._sampler(dp_rank, None).micro_batches(number) for dp_rank in range(self.layout.dp)]
        batches = [
            MicroBatch.of(
                (torch.cat(tensors) for tensors in zip(*(batch.tensors for batch in of_dp), strict=True)),
                Spans.joined(*_spans(of_dp)),
            )
            for of_dp in zip(*slices, strict=True)
        ]
        return batches, slices[0].global_target_tokens

    def _of_every_rank(self, number: int) -> list[GlobalBatchSlice]:
        return [self._sampler(*place).micro_batches(number) for place in self.token_places]

    def own(self, slices: Sequence[GlobalBatchSlice]) -> tuple[list[MicroBatch], int]:
        """Take this rank's own from the micro-batches of all `token_places`; return it with all target tokens."""
        axis = self.mesh.token_axis()
        stacked = TensorLayout((axis.world_size,), ((0, axis),))

        def own(tensors: Sequence[Tensor]) -> Tensor:
            every = torch.stack(list(tensors))
            return replace(stacked, global_shape=tuple(every.shape)).slice(every)[0]

        batches = [
            MicroBatch.of(
                (own(tensors) for tensors in zip(*(batch.tensors for batch in of_dp), strict=True)),
                _spans_on(axis, _spans(of_dp)),
            )
            for of_dp in zip(*slices, strict=True)
        ]
        return batches, slices[0].global_target_tokens

    @property
    def token_places(self) -> list[tuple[int, int]]:
        """Every place on data and context parallel, in the order of the ranks."""
        return list(product(range(self.layout.dp), range(self.layout.cp)))

    def context(self, rank: int | None) -> ContextShard:
        """Return the part of every row of one rank of context parallel; `None` for all, see `ContextShard`."""
        return ContextShard(rank, self.layout.cp, self.layout.tp)

    def _sampler(self, dp_rank: int, cp_rank: int | None) -> RowSampler:
        return RowSampler(
            rows=self.recipe.rows,
            batch_size=self.recipe.batch_size,
            micro_batch_size=self.layout.micro_batch_size,
            dp_rank=dp_rank,
            dp_size=self.layout.dp,
            seed=self.recipe.seed,
            context=self.context(cp_rank),
        )

    def finish(self, trace: Trace) -> None:
        """Record the weights, and the tensors of the exported file."""
        trace.weights.update(full_tensors(self.model, lambda parameter: parameter))
        # Ranks that hold different copies have no adapter to export; `compare` then finds none.
        if all(bool(weight.isfinite().all()) for weight in trace.weights.values()):
            with tempfile.TemporaryDirectory() as directory:
                self.export(directory)
                trace.exported.update(load_file(Path(directory) / "adapter_model.safetensors"))

    def export(self, directory: str | Path) -> None:
        """Write the adapter, in the form that holds every method's on experts; other layers have one form."""
        export_peft_adapter(self.model, directory, format="peft-per-expert")


def trace_layout(
    layout: Layout,
    make_model: Callable[[ModelParallelConfig], LanguageModel],
    adapt: Callable[[LanguageModel], nn.Module],
    rows: PackedRows,
    *,
    steps: int = 5,
    **options: Any,
) -> Trace:
    """Fine-tune at one layout and keep what it computed.

    Args:
        layout: The layout.
        make_model, adapt, rows: See `Recipe`.
        steps: Optimizer steps.
        options: The other options of a `Recipe`.
    """
    trace = Trace()
    recipe = Recipe(make_model=make_model, adapt=adapt, rows=rows, **options)
    with layout.simulated() as mesh:
        run = Run(recipe, layout, mesh)
        for number in range(steps):
            run.take(number, trace)
        run.finish(trace)
    return trace


def _spans(batches: Sequence[MicroBatch]) -> list[Spans]:
    return [batch.spans for batch in batches if isinstance(batch.spans, Spans)]  # a sampler makes no others


def _spans_on(axis: ParallelAxis, spans: Sequence[Spans]) -> Spans | SpansOfRanks:
    """Give each simulated rank the spans of its place on an axis."""
    if axis.world_size == 1:
        return spans[0]
    return SpansOfRanks({rank: spans[index_on_rank(axis.rank, rank)] for rank in ranks()})


def full_tensors(model: nn.Module, value_of: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
    """Gather a value of each trainable parameter, by the parameter's name; NaN where replicas differ."""
    full = {}
    for name, parameter in model.named_parameters():
        value = value_of(parameter)
        if parameter.requires_grad and value is not None:
            layout = layout_of_tensor(parameter)
            full[name] = agreed(value if layout is None else layout.gather(value))
    return full


def agreed(tensor: Tensor) -> Tensor:
    """Return the value that all ranks hold; NaN where they differ, which every comparison reports."""
    same: Tensor
    try:
        same = the_same(tensor)
    except AssertionError:
        same = on_rank(tensor, 0).detach() * torch.nan
    return same


def compare(expected: Trace, found: Trace) -> dict[str, float]:
    """Return the largest relative error of each quantity: `loss`, `grad_norm`, and `gradient`, `weight`, `export`.

    A tensor's error is its largest difference over the largest magnitude of the expected tensor. A tensor that is
    missing, unexpected, or not finite has an infinite error.
    """
    return {
        "loss": _scalars(expected.losses, found.losses),
        "grad_norm": _scalars(expected.grad_norms, found.grad_norms),
        "gradient": largest_error(expected.gradients, found.gradients),
        "weight": largest_error(expected.weights, found.weights),
        "export": largest_error(expected.exported, found.exported),
    }


def _scalars(expected: list[float], found: list[float]) -> float:
    def named(values: list[float]) -> dict[str, Tensor]:
        return {"steps": torch.tensor(values, dtype=torch.float64)}

    return largest_error(named(expected), named(found))


def largest_error(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """Return the largest error among tensors of a kind, see `compare`."""
    if expected.keys() != found.keys() or not expected:
        return float("inf")
    worst = 0.0
    for name, tensor in expected.items():
        other = found[name]
        if other.shape != tensor.shape or not bool((tensor + other).isfinite().all()):
            return float("inf")
        scale = float(tensor.abs().max().clamp(min=torch.finfo(tensor.dtype).tiny))
        worst = max(worst, float((other - tensor).abs().max()) / scale)
    return worst
