"""The oracle: the same fine-tune at two layouts, compared number by number.

It drives `training`'s own step on a real model; nothing of training is written again here. All ranks run in one
process ([`simulate`][meshpeft.verify.simulation.simulate]), in float64, where the layouts agree to rounding
(relative error about 1e-15 per operation) and a real error cannot hide.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from meshpeft.checkpoint import export_peft_adapter
from meshpeft.models import LanguageModel
from meshpeft.parallel import ModelParallelConfig, ParallelGroupInfo, TensorLayout, layout_of_tensor, set_seed
from meshpeft.training.batches import RowSampler
from meshpeft.training.optimizer import adamw
from meshpeft.training.packing import MicroBatch, PackedRows
from meshpeft.training.step import TrainStep
from meshpeft.verify.simulation import on_rank, simulate, the_same

__all__ = ["Layout", "Trace", "compare", "trace_layout"]


@dataclass(frozen=True)
class Layout:
    """How one run is spread out; whatever it says, the numbers must not change.

    Attributes:
        tp, dp, ep, etp: sizes of the axes; `etp=None` means `tp`.
        sequence_parallel: token shards between layers.
        activation_checkpointing: compute each layer again in the backward pass.
        micro_batch_size: rows of one forward on one data-parallel rank.
    """

    tp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int | None = None
    sequence_parallel: bool = False
    activation_checkpointing: bool = False
    micro_batch_size: int = 1

    def parallel_config(self) -> ModelParallelConfig:
        """What a decoder is told of this layout."""
        return ModelParallelConfig(
            tensor_model_parallel_size=self.tp,
            expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=self.etp,
            sequence_parallel=self.sequence_parallel,
        )

    def __str__(self) -> str:
        words = [f"tp={self.tp}", f"dp={self.dp}"]
        if self.ep > 1 or self.etp is not None:
            words += [f"ep={self.ep}", f"etp={self.tp if self.etp is None else self.etp}"]
        words += ["sequence-parallel"] * self.sequence_parallel
        words += ["recompute"] * self.activation_checkpointing
        return " ".join([*words, f"micro-batch={self.micro_batch_size}"])


@dataclass(frozen=True, eq=False)
class Trace:
    """What a run computed; every tensor whole, on no mesh.

    Attributes:
        losses, grad_norms: of each step; the loss as it is trained, with the routers' balance if that is part of it.
        gradients: of each adapter parameter after the first step (summed, and clipped if the run clips).
        weights: of each adapter parameter after the last step.
        exported: the tensors of the exported adapter file.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    exported: dict[str, Tensor] = field(default_factory=dict)


def trace_layout(
    layout: Layout,
    make_model: Callable[[ModelParallelConfig], LanguageModel],
    adapt: Callable[[LanguageModel], nn.Module],
    rows: PackedRows,
    *,
    steps: int = 5,
    batch_size: int = 4,
    lr: float = 1e-2,
    weight_decay: float = 0.1,
    clip: float = 0.0,
    router_aux_loss_coef: float = 0.0,
    seed: int = 0,
) -> Trace:
    """Fine-tune at one layout and keep what it computed.

    Args:
        layout: the layout.
        make_model: builds or loads the base, the same values at every layout, in float64.
        adapt: adds the adapters and freezes the rest, for instance a `LoRA`.
        rows: what to train on.
        steps: optimizer steps.
        batch_size: rows of the global batch.
        lr, weight_decay, clip: of AdamW.
        router_aux_loss_coef: of the routers' load-balancing loss; 0 leaves it out.
        seed: of the data order and of dropout.
    """
    trace = Trace()
    with simulate(layout.tp, layout.dp, layout.ep, layout.etp) as mesh:
        set_seed(seed)
        model = make_model(replace(layout.parallel_config(), params_dtype=torch.float64))
        model.set_activation_checkpointing(layout.activation_checkpointing)
        adapt(model)
        optimizer = adamw(model, lr=lr, weight_decay=weight_decay)
        step = TrainStep(model, optimizer, clip=clip, router_aux_loss_coef=router_aux_loss_coef)
        for number in range(steps):
            batches, targets = _micro_batches(rows, layout, mesh, number, batch_size, seed)
            result = step(batches, targets)
            balance = 0.0 if result.router_loss is None else float(_agreed(result.router_loss))
            trace.losses.append(float(_agreed(result.loss)) + router_aux_loss_coef * balance)
            trace.grad_norms.append(float(_agreed(result.grad_norm)))
            if number == 0:
                trace.gradients.update(_whole(model, lambda parameter: parameter.grad))
        trace.weights.update(_whole(model, lambda parameter: parameter))
        # Ranks that hold different copies have no adapter to export; `compare` then finds none.
        if all(bool(weight.isfinite().all()) for weight in trace.weights.values()):
            with tempfile.TemporaryDirectory() as directory:
                # The form that holds every method's adapters on experts; of other layers there is one form.
                export_peft_adapter(model, directory, format="peft-per-expert")
                trace.exported.update(load_file(Path(directory) / "adapter_model.safetensors"))
    return trace


def _micro_batches(
    rows: PackedRows, layout: Layout, mesh: ParallelGroupInfo, step: int, batch_size: int, seed: int
) -> tuple[list[MicroBatch], int]:
    """Every data-parallel rank's own micro-batches, as this (possibly simulated) rank sees them."""
    slices = [
        RowSampler(
            rows=rows,
            batch_size=batch_size,
            micro_batch_size=layout.micro_batch_size,
            dp_rank=rank,
            dp_size=layout.dp,
            seed=seed,
        ).micro_batches(step)
        for rank in range(layout.dp)
    ]

    def own(tensors: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack(list(tensors))
        return TensorLayout(tuple(stacked.shape), ((0, mesh.dp),)).slice(stacked)[0]

    batches = [
        MicroBatch(*(own([getattr(batch, name) for batch in ranks]) for name in MicroBatch.__dataclass_fields__))
        for ranks in zip(*slices, strict=True)
    ]
    return batches, slices[0].global_target_tokens


def _whole(model: nn.Module, value_of: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
    whole = {}
    for name, parameter in model.named_parameters():
        value = value_of(parameter)
        if parameter.requires_grad and value is not None:
            layout = layout_of_tensor(parameter)
            whole[name] = _agreed(value if layout is None else layout.gather(value))
    return whole


def _agreed(tensor: Tensor) -> Tensor:
    """The value that all ranks hold; not a number where they differ, which no comparison forgives."""
    same: Tensor
    try:
        same = the_same(tensor)
    except AssertionError:
        same = on_rank(tensor, 0).detach() * torch.nan
    return same


def compare(expected: Trace, found: Trace) -> dict[str, float]:
    """The largest relative error of each quantity: `loss`, `grad_norm`, and `gradient`, `weight`, `export` tensors.

    A tensor's error is its largest difference over the largest magnitude of the expected tensor. A tensor that is
    missing, unexpected, or not finite has an infinite error.
    """
    return {
        "loss": _scalars(expected.losses, found.losses),
        "grad_norm": _scalars(expected.grad_norms, found.grad_norms),
        "gradient": _tensors(expected.gradients, found.gradients),
        "weight": _tensors(expected.weights, found.weights),
        "export": _tensors(expected.exported, found.exported),
    }


def _scalars(expected: list[float], found: list[float]) -> float:
    def named(values: list[float]) -> dict[str, Tensor]:
        return {"steps": torch.tensor(values, dtype=torch.float64)}

    return _tensors(named(expected), named(found))


def _tensors(expected: dict[str, Tensor], found: dict[str, Tensor]) -> float:
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
