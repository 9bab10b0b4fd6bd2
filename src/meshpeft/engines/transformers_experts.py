"""Experts of transformers' models on grouped layers: sharded over expert parallel, each with an adapter.

Nearly every architecture with experts has one class for them, made with transformers' `use_experts_implementation`.
Its contract is all that is read here:

* parameters `gate_up_proj` [experts, 2 width, hidden], or `up_proj` [experts, width, hidden] without a gate, and
  `down_proj` [experts, hidden, width]; where the class says so transposed, gate and up interleaved, or with biases;
* `_apply_gate`, or `act_fn` without a gate: from the first product to the second's input, channel by channel;
* a call `(tokens [T, hidden], experts [T, k], weights [T, k]) -> [T, hidden]`.

`group_experts` gives such a module layers in the place of the parameters, under the same names, and a call that sends
each token to the rank of its expert. The router, shared experts and all else stay the model's own code: a router runs
on every token of a tensor-parallel rank, and each of these ranks then sends its share of the tokens on.

Llama 4 has the same experts in a class of its own, whose call takes every token for every expert, scaled by its score:
zero for those that were not chosen. So the block around them gets our call too (`ScaledInputs`).
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshpeft.parallel import (
    FusedParts,
    GroupedColumnParallelLinear,
    GroupedRowParallelLinear,
    ParallelAxis,
    ParallelError,
    combine_tokens,
    dispatch_tokens,
    group_offsets,
    layout_of_tensor,
    mp_gather,
    mp_scatter,
    parallel_group_info,
    set_layout,
)
from meshpeft.parallel.grouped_gemm import group_of_rows
from meshpeft.parallel.sharded_tensor import ShardedTensors
from meshpeft.parallel.states import take_slice

__all__ = [
    "NO_EXPERTS",
    "ExpertAxes",
    "StackedExperts",
    "experts_per_token",
    "group_experts",
    "has_grouped_experts",
    "keep_slice",
    "naming",
    "stacks_of_experts",
]

NO_EXPERTS = "none, or of a class without transformers' use_experts_implementation"
"""Why a model of transformers has no experts that can be sharded and adapted."""

# Llama 4's block, and its experts.
_OF_SCALED_INPUTS = ("Llama4TextMoe", "Llama4TextExperts")
_FLAGS_OF_SCALED_INPUTS = {"has_gate": True, "has_bias": False, "is_transposed": True, "is_concatenated": True}

# How configurations call the number of experts of a token.
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "experts_top_k")


@dataclass(frozen=True)
class ExpertAxes:
    """Axes of a layer of experts.

    Attributes:
        tp: Shards the layers around it, whose tokens are the same on its ranks.
        ep: Shards the stack: [experts / ep, ..].
        etp: Shards the width of each expert.
    """

    tp: ParallelAxis
    ep: ParallelAxis
    etp: ParallelAxis

    @classmethod
    def of_mesh(cls, tp: ParallelAxis | None = None) -> ExpertAxes:
        """Axes of the mesh; with another in the place of tensor parallel, if one is given."""
        info = parallel_group_info()
        return cls(info.tp if tp is None else tp, info.ep, info.etp)


def stacks_of_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Find the modules that `group_experts` takes, by full name.

    Left out are classes with a norm behind each expert, which needs the full output, and those without this contract.
    """
    return {name: module for name, module in model.named_modules() if _has_contract(module)}


def _has_contract(module: nn.Module) -> bool:
    flags = {"has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm"}
    if not (type(module).__name__ == _OF_SCALED_INPUTS[1] or flags <= vars(module).keys()):
        return False
    expected = [_first_of(module), "down_proj"]
    expected += [f"{name}_bias" for name in expected] if _flag(module, "has_bias") else []
    return set(expected) == module._parameters.keys() and not getattr(module, "has_post_expert_norm", False)


def has_grouped_experts(model: nn.Module) -> bool:
    """Whether a model has experts that `group_experts` gave layers."""
    return any(isinstance(module, StackedExperts) for module in model.modules())


def experts_per_token(config: Any) -> int | None:
    """Read how many experts a token has from a configuration of transformers; `None` where it is not said."""
    return next((value for name in _TOP_K if isinstance(value := getattr(config, name, None), int)), None)


def _flag(module: Any, name: str) -> bool:
    """Read what a class of experts says of its parameters."""
    return bool(
        _FLAGS_OF_SCALED_INPUTS[name] if type(module).__name__ == _OF_SCALED_INPUTS[1] else getattr(module, name)
    )


def _first_of(module: Any) -> str:
    return "gate_up_proj" if _flag(module, "has_gate") else "up_proj"


class StackedExperts(ShardedTensors, nn.Module):
    """Base class that is added to a class of experts of transformers; see `group_experts`.

    Attributes:
        axes: Axes that it is on.
        num_stacked: Number of experts, over all ranks.
        first: Name of the layer before the gate: `gate_up_proj` or `up_proj`. The one behind it is `down_proj`.
        is_transposed_unsaid: Whether the parameters are [experts, in, out] and the class does not say so.
    """

    axes: ExpertAxes
    num_stacked: int
    first: str
    is_transposed_unsaid = False

    def forward(self, hidden_states: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Send tokens through their experts.

        Args:
            hidden_states: [T, hidden], I over `axes.tp`.
            experts: [T, k] of expert numbers, the same on these ranks.
            weights: [T, k], multiplies what the experts return; I over `axes.tp`.

        Returns:
            [T, hidden], I over `axes.tp`.
        """
        theirs: Any = self
        tp, count = self.axes.tp, hidden_states.shape[0]
        missing = -count % tp.world_size

        def padded(x: Tensor) -> Tensor:
            return functional.pad(x, (0, 0, 0, missing)) if missing else x

        arrived, plan = dispatch_tokens(
            mp_scatter(padded(hidden_states), 0, tp),
            take_slice(padded(experts), tp, 0),
            mp_scatter(padded(weights), 0, tp),
            self.num_stacked,
            self.axes.ep,
            self.axes.etp,
        )
        first = self._product(self.first, arrived, plan.tokens_per_expert)
        channels = theirs._apply_gate(first) if theirs.has_gate else theirs.act_fn(first)
        out = combine_tokens(self._product("down_proj", channels, plan.tokens_per_expert), plan)
        return mp_gather(out, 0, tp)[:count].to(hidden_states.dtype)

    def _product(self, name: str, x: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """Multiply each row by its expert's weight, and add its bias where there is one.

        Args:
            name: `first`: x is R over etp, the result Shard(-1). `down_proj`: x is Shard(-1), the result P.
            x: [tokens, in], sorted by local expert.
            tokens_per_expert: [local experts] of counts.

        Returns:
            [tokens, out].
        """
        y: Tensor = getattr(self, name)(x, tokens_per_expert)
        bias: Tensor | None = getattr(self, f"{name}_bias", None)
        if bias is None:
            return y
        if name != self.first:
            # What a row gives is P over etp: each rank adds its share of the bias.
            bias = bias / self.axes.etp.world_size
        return y + bias.index_select(0, group_of_rows(x, group_offsets(tokens_per_expert)))


class ScaledInputs(nn.Module):
    """Base class that is added to a block of experts whose scores scale what the experts take (Llama 4's)."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Send each token, scaled, through its experts, and through the shared one.

        Args:
            hidden_states: [batch, seq, hidden], I over tensor parallel.

        Returns:
            The sum of what these experts return, [batch, seq, hidden], and the router's logits [T, experts]; both I.
        """
        theirs: Any = self
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores, logits = theirs.router(tokens)
        chosen, experts = scores.topk(theirs.top_k, dim=1)
        # One copy for each of a token's experts: the weight of what an expert returns is one.
        sent = (tokens[:, None] * chosen[..., None]).flatten(0, 1)
        ones = torch.ones_like(chosen).view(-1, 1)
        routed = theirs.experts(sent, experts.view(-1, 1), ones).unflatten(0, chosen.shape).sum(1)
        return (theirs.shared_expert(tokens) + routed).view(hidden_states.shape), logits


class _GatedAsLlama4:
    act_fn: Any

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        result: Tensor = up * self.act_fn(gate)
        return result


def group_experts(model: Any, axes: ExpertAxes | None = None) -> None:
    """Give the stacked experts of a model of transformers grouped layers, each rank its slices, in place.

    No collective. Parameters `..experts.gate_up_proj` become layers of that name, whose weights are
    [experts, out, in] with gate above up, or interleaved with it, as the class has them.

    Args:
        model: Model as `from_pretrained` returns it, or on the meta device.
        axes: Axes that shard it; those of the mesh by default.

    Raises:
        ParallelError: The experts, or their channels, do not divide. The model is unchanged then.
    """
    axes = ExpertAxes.of_mesh() if axes is None else axes
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    made = {
        name: _layers_of(module, name, axes, experts_per_token(config))
        for name, module in stacks_of_experts(model).items()
    }
    for name, layers in made.items():
        _replace(model.get_submodule(name), layers, axes)
    for module in model.modules():
        if type(module).__name__ == _OF_SCALED_INPUTS[0] and not isinstance(module, ScaledInputs):
            module.__class__ = _derived(ScaledInputs, type(module))


def _layers_of(theirs: Any, name: str, axes: ExpertAxes, top_k: int | None) -> dict[str, nn.Module]:
    first = _first_of(theirs)
    weight, down = theirs._parameters[first], theirs._parameters["down_proj"]
    experts, packed, hidden = _in_our_order(theirs, weight).shape
    width = _in_our_order(theirs, down).shape[-1]
    parts = None
    if _flag(theirs, "has_gate"):
        blocks = None if _flag(theirs, "is_concatenated") else width
        parts = FusedParts(("gate", "up"), (width, width), blocks=blocks)
    options: dict[str, Any] = {
        "expert_axis": axes.ep,
        "axis": axes.etp,
        "device": weight.device,
        "dtype": weight.dtype,
        "perform_initialization": False,
        "config": SimpleNamespace(moe_router_topk=top_k),
    }
    with naming(name):
        return {
            first: GroupedColumnParallelLinear(experts, hidden, packed, fused_parts=parts, **options),
            "down_proj": GroupedRowParallelLinear(experts, width, hidden, **options),
        }


def _in_our_order(theirs: Any, weight: Tensor) -> Tensor:
    """[experts, out, in] of a weight that may be transposed."""
    return weight.transpose(-2, -1) if _flag(theirs, "is_transposed") else weight


def _replace(theirs: Any, layers: Mapping[str, Any], axes: ExpertAxes) -> None:
    for name, layer in layers.items():
        keep_slice(layer.weight, _in_our_order(theirs, theirs._parameters.pop(name)))
        theirs.add_module(name, layer)
        bias = theirs._parameters.get(f"{name}_bias")
        if bias is not None:
            layout = layer.layout.bias()
            local = nn.Parameter(bias.new_empty(layout.local_shape))
            set_layout(local, layout)
            keep_slice(local, bias)
            theirs._parameters[f"{name}_bias"] = local
    if type(theirs).__name__ == _OF_SCALED_INPUTS[1]:
        vars(theirs).update(_FLAGS_OF_SCALED_INPUTS)
        theirs.__class__ = _derived(StackedExperts, _GatedAsLlama4, type(theirs))
        theirs.is_transposed_unsaid = True
    else:
        theirs.__class__ = _derived(StackedExperts, type(theirs))
    theirs.axes, theirs.num_stacked, theirs.first = axes, layers["down_proj"].num_experts, next(iter(layers))


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Name the layer in an error."""
    try:
        yield
    except ParallelError as error:
        raise ParallelError(f"{name}: {error}") from error


@torch.no_grad()
def keep_slice(new: nn.Parameter, full: Tensor) -> None:
    """Give a parameter with a layout its slice of the full one, whose parts are fused as on one rank."""
    layout = layout_of_tensor(new)
    assert layout is not None
    if not new.is_meta:
        if layout.fused_parts is not None:
            full = torch.cat(layout.fused_parts.split(full, layout.fused_dim, 1), layout.fused_dim)
        new.copy_(layout.slice(full))
    new.requires_grad_(full.requires_grad)


def _derived(*bases: type[Any]) -> type[Any]:
    """Derive a class from ours and theirs, which comes last, under its name."""
    made = types.new_class(bases[-1].__name__, bases)
    made.__module__ = bases[-1].__module__
    return made
