"""Fine-tunes of transformers models that our decoder does not know, divided in one way or another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from helpers.tiny_models import random_ids
from helpers.transformers_float64 import in_float64
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from meshpeft.checkpoint import merge_adapter
from meshpeft.engines.parallelize import parallelize
from meshpeft.hub.tensor_files import TensorFiles
from meshpeft.parallel import I, LinearLayout, Shard, finalize_gradients, init_parallelism, layout_of_tensor, set_seed
from meshpeft.peft import PEFT, LoRA, adapter_wrappers
from meshpeft.verify.simulation import Collective, count_collectives

# Not at all, by transformers itself, by us.
Division = Literal["none", "tp_plan", "parallelize"]
# The linear layers of every family.
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gemma": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "deepseek_v2": ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
}


@dataclass
class Run:
    """What must not depend on the division; gradients have their full shapes."""

    losses: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)


def load(directory: Path, division: Division) -> nn.Module:
    """The model in float64, divided over all processes of the world."""
    options: dict[str, Any] = {}
    if division == "tp_plan":
        options["distributed_config"] = DistributedConfig(tp_plan="auto", tp_size=dist.get_world_size())
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, **options)
    model = in_float64(model)
    return parallelize(model) if division == "parallelize" else model


def loss_of(model: nn.Module) -> Tensor:
    ids = random_ids()
    logits = model(ids).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(directory: Path, division: Division, method: PEFT, mesh: bool = False, steps: int = 2) -> Run:
    """Some steps of plain gradient descent, as the loop of any trainer takes them."""
    if mesh:
        init_parallelism(tensor_parallel=dist.get_world_size())
    run, model = Run(), method(load(directory, division))
    for step in range(steps):
        loss = loss_of(model)
        loss.backward()
        if division == "parallelize":
            finalize_gradients(model)
        run.losses.append(loss.item())
        for name, parameter in adapter_parameters(model).items():
            assert parameter.grad is not None, name
            if step == steps - 1:
                run.gradients[name] = whole(parameter, parameter.grad)
            with torch.no_grad():
                parameter.sub_(parameter.grad, alpha=0.1)
            parameter.grad = None
    return run


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{name}.{own}": parameter
        for name, wrapper in adapter_wrappers(model)
        for own, parameter in wrapper.adapter.named_parameters()
    }


def whole(parameter: Tensor, value: Tensor) -> Tensor:
    """The full tensor of which `value` is this rank's slice, laid out like the parameter."""
    layout = layout_of_tensor(parameter)
    assert layout is not None
    return layout.gather(value).clone()


def largest_error(got: Run, want: Run) -> float:
    """The largest relative error of a loss or of a gradient, relative to its largest value."""
    assert got.gradients.keys() == want.gradients.keys()
    errors = [abs(mine / theirs - 1) for mine, theirs in zip(got.losses, want.losses, strict=True)]
    for name, theirs in want.gradients.items():
        errors.append(float((got.gradients[name] - theirs).abs().max() / theirs.abs().max()))
    return max(float("inf") if error != error else error for error in errors)


@dataclass
class Merges:
    """Logits of one model before its adapters were merged, with them merged, and after they were taken out again."""

    adapted: Tensor
    merged: Tensor
    unmerged: Tensor
    base_is_back: bool


@torch.no_grad()
def merge(directory: Path, division: Division, method: PEFT, merged: Path) -> Merges:
    """Merge, unmerge, merge for good, and save the model as transformers does."""
    model, ids = method(load(directory, division)).eval(), random_ids()

    def weights() -> list[nn.Parameter]:
        return [wrapper.to_wrap.weight for _, wrapper in adapter_wrappers(model)]

    def placements() -> list[Any]:
        return [getattr(parameter, "placements", None) for parameter in weights()]

    adapted, base, placed = model(ids).logits, weights(), placements()
    method.merge(model)
    logits = model(ids).logits
    assert placements() == placed
    method.unmerge(model)
    back = all(mine is theirs for mine, theirs in zip(weights(), base, strict=True))
    unmerged = model(ids).logits
    merge_adapter(model).save_pretrained(merged)
    return Merges(adapted, logits, unmerged, back)


def _gathers_or_takes_shards(layout: LinearLayout) -> bool:
    return layout.y == I if layout.shard == "out" else layout.x == Shard(-1)


def describe(directory: Path, division: Division) -> dict[str, tuple[Any, ...]]:
    """Of the layers of block 0: what their adapters say about them, and what this rank holds."""
    model = LoRA(target_modules=["*.layers.0.*"], dim=4)(load(directory, division))
    return {
        name.partition("layers.0.")[2]: (
            wrapper.adapter.layout.shard,
            wrapper.adapter.layout.y == I
            if wrapper.adapter.layout.shard == "out"
            else wrapper.adapter.layout.x == Shard(-1),
            tuple(wrapper.layer_type.weight(wrapper.to_wrap).shape),
            tuple(wrapper.adapter.linear_in.weight.shape),
            tuple(wrapper.adapter.linear_out.weight.shape),
        )
        for name, wrapper in adapter_wrappers(model)
    }


def logits_with_dropout(directory: Path, division: Division, method: PEFT) -> Tensor:
    """Of the model in training."""
    set_seed(5)
    logits: Tensor = method(load(directory, division))(random_ids()).logits
    return logits.detach()


def collectives_of(directory: Path, division: Division, method: PEFT) -> tuple[list[Collective], list[Collective]]:
    """What one forward and backward pass communicates: with adapters, and without.

    The embedding trains, so that the base's gradients go the whole way back in both.
    """
    if division == "parallelize":
        init_parallelism(tensor_parallel=dist.get_world_size())
    model = method(load(directory, division))
    model.get_input_embeddings().requires_grad_()

    def run() -> list[Collective]:
        with count_collectives() as calls:
            loss_of(model).backward()
        return sorted(calls)

    run()  # DoRA's norms are computed once per step
    adapted = run()
    with method.disable_adapter(model):
        return adapted, run()


@contextmanager
def count_read() -> Iterator[list[int]]:
    """Count the values that are read from files, of weights; a list of one number."""
    numbers, read = [0], TensorFiles.read_into

    def counted(self: TensorFiles, *arguments: Any) -> Tensor:
        box = read(self, *arguments)
        numbers[0] += box.numel()
        return box

    with mock.patch.object(TensorFiles, "read_into", counted):
        yield numbers
