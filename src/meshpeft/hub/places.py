"""Where the parameters of adapters are in a file: under which names, in which form.

Adapters of models with experts have two forms:

* `peft`, as peft adapts transformers' models: two matrices for each parameter of stacked experts (`target_parameters`).
  Routers, and MLPs beside experts, are adapted by their parameters as well.
* `peft-per-expert`, as serving systems read them, and as they were when every expert was a module: A and B of each
  expert's gate, up and down projection, under the names of the family's checkpoints.

An adapter that all experts share is written once for each of them, in both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import nn

from meshpeft.hub.adapter_config import FACTOR_A, FACTOR_B, MAGNITUDE, PREFIX, AdapterShape
from meshpeft.hub.adapter_scales import AS_THEY_ARE, Written
from meshpeft.hub.linears import AdaptedLinear, HubLinear
from meshpeft.hub.names import hf_module_name
from meshpeft.hub.stored_factors import Matrix, StackedA, StackedB, StoredFactor, StoredMatrices
from meshpeft.models import DecoderConfig
from meshpeft.parallel.layer_layout import LinearLayout
from meshpeft.parallel.tensor_layout import TensorLayout

__all__ = [
    "AdapterFormat",
    "Names",
    "Place",
    "WrittenNames",
    "is_adapted_as_parameter",
    "parts_of",
    "stored_factors",
    "wrapper_of",
]

AdapterFormat = Literal["peft", "peft-per-expert"]

# peft wraps a module with two adapted parameters twice; the one that the module lists first is inside.
_INNER, _NESTED = "gate_up_proj", "base_layer"

_RANK_DIMS = {FACTOR_A: -2, FACTOR_B: -1}


@dataclass(frozen=True)
class Place:
    """Where the tensors of some of the file's modules go: one pair of factors of ours.

    Attributes:
        module: full name of our layer.
        names: the file's modules, which share A; or the parameter of stacked experts.
        a, b, magnitude: layouts of the parameters.
        shape: rank and alpha.
        use_rslora: how they scale.
        experts: number of stacked experts; `None` for an ordinary layer.
        written: how the file has the factors.
    """

    module: str
    names: tuple[str, ...]
    a: TensorLayout
    b: TensorLayout
    magnitude: TensorLayout | None
    shape: AdapterShape
    use_rslora: bool
    experts: int | None = None
    written: Written = AS_THEY_ARE

    @classmethod
    def of(cls, linear: AdaptedLinear, written: Written = AS_THEY_ARE) -> Place:
        """Place of an adapter which is there."""
        return cls(
            linear.module,
            linear.names,
            linear.a.layout,
            linear.b.layout,
            None if linear.magnitude is None else linear.magnitude.layout,
            linear.shape,
            linear.use_rslora,
            linear.experts,
            written,
        )

    @property
    def stacked(self) -> bool:
        """Whether each expert has a factor of its own."""
        return self.experts is not None and len(self.a.global_shape) == 3

    @property
    def layouts(self) -> tuple[tuple[TensorLayout, str], ...]:
        """Every parameter with how its tensors are called."""
        magnitudes = () if self.magnitude is None else ((self.magnitude, MAGNITUDE),)
        return ((self.a, FACTOR_A), (self.b, FACTOR_B), *magnitudes)


class Names(Protocol):
    """Under which names a file has what our layers are."""

    @property
    def per_expert(self) -> bool:
        """Whether experts have tensors of their own."""

    def of_module(self, name: str) -> str:
        """A layer's name in the file, by its name in transformers."""

    def of_stack(self, name: str) -> str:
        """Likewise for a parameter of stacked experts: what stands before `lora_A`."""

    def of_expert(self, name: str, part: str | None, expert: int) -> str:
        """Likewise for one expert's part of it."""


@dataclass(frozen=True)
class WrittenNames:
    """The names that an export uses.

    Attributes:
        format: of the file.
        linears: every layer of the model, by name.
        stacks: the stacked experts that have an adapter.
        model_type: the family, whose checkpoints have names of their own, which the per-expert form uses; `None` of
            a model that is not a decoder.
    """

    format: AdapterFormat
    linears: Mapping[str, HubLinear]
    stacks: Mapping[str, HubLinear]
    model_type: str | None

    @property
    def per_expert(self) -> bool:
        """Whether experts have tensors of their own."""
        return self.format == "peft-per-expert"

    def of_module(self, name: str) -> str:
        """A layer's name, by its name in transformers."""
        if not self.per_expert or self.model_type is None:
            return name
        return hf_module_name(self.linears[name].module, self.linears[name].part, model_type=self.model_type)

    def of_stack(self, name: str) -> str:
        """What stands before `lora_A` of a parameter of stacked experts."""
        return wrapper_of(name, self.stacks)

    def of_expert(self, name: str, part: str | None, expert: int) -> str:
        """The name of one expert's part of it."""
        return hf_module_name(self.linears[name].module, part, expert=expert, model_type=self.model_type)

    def of_experts(self, name: str) -> list[str]:
        """Every expert's every part of a parameter of stacked experts."""
        layout = self.linears[name].layout
        return [
            self.of_expert(name, part, expert) for expert in range(layout.experts or 0) for part in parts_of(layout)
        ]

    def of_first_expert(self, name: str) -> list[str]:
        """The first expert's every part of it: under these names a file's header speaks of all experts."""
        return [self.of_expert(name, part, 0) for part in parts_of(self.linears[name].layout)]

    def of_all(self, skip: Collection[str]) -> list[str]:
        """Of every layer that is a module, but for `skip`: those that are adapted by their parameter."""
        found: list[str] = []
        for name, linear in self.linears.items():
            if linear.experts is None:
                found += [] if name in skip else [self.of_module(name)]
            elif self.per_expert:
                found += self.of_experts(name)
        return found


def wrapper_of(name: str, adapted: Collection[str]) -> str:
    """Where peft keeps the adapter on a parameter of stacked experts: `..mlp.experts`, or `..mlp.experts.base_layer`.

    Args:
        name: `..mlp.experts.gate_up_proj` or `..mlp.experts.down_proj`.
        adapted: all such parameters that have an adapter.
    """
    container, _, leaf = name.rpartition(".")
    both = any(other != name and other.rpartition(".")[0] == container for other in adapted)
    return f"{container}.{_NESTED}" if both and leaf == _INNER else container


def is_adapted_as_parameter(model: nn.Module, name: str) -> bool:
    """Whether peft reaches a layer of a model with experts only by its parameter `{name}.weight`.

    Routers are no linear layers in transformers; and peft (0.21) takes any target that ends like a projection of the
    experts for the experts themselves.
    """
    config = getattr(model, "config", None)
    if isinstance(config, DecoderConfig):
        has_experts = config.moe is not None
    else:  # a model of transformers, or of Megatron
        counts = ("num_experts", "num_local_experts", "num_moe_experts")
        has_experts = any(getattr(config, count, None) for count in counts)
    return has_experts and name.rpartition(".")[2] in ("gate", "gate_proj", "up_proj", "down_proj")


def parts_of(layout: LinearLayout) -> tuple[str | None, ...]:
    """The parts of a layer's output: (gate, up), or `None` for one that is not fused."""
    return (None,) if layout.fused_parts is None else layout.fused_parts.names


def stored_factors(place: Place, names: Names) -> list[StoredFactor]:
    """The tensors of a file that hold the parameters of a place: of A, B, and the magnitude if there is one."""
    if place.experts is None:
        return [_by_module(place, names, layout, suffix) for layout, suffix in place.layouts]
    if names.per_expert:
        return [_by_expert(place, names, layout, suffix) for layout, suffix in place.layouts]
    prefix, rank = f"{PREFIX}{names.of_stack(place.names[0])}", place.written.rank
    return [
        StackedA(place.a, f"{prefix}.{FACTOR_A}", place.experts, place.stacked, rank),
        StackedB(place.b, f"{prefix}.{FACTOR_B}", place.experts, place.stacked, rank),
    ]


def _by_module(place: Place, names: Names, layout: TensorLayout, suffix: str) -> StoredMatrices:
    # A layer of transformers' own that packs its parts is one module there, too.
    divided = suffix != FACTOR_A and layout.fused_parts is not None and len(place.names) > 1
    return StoredMatrices(
        layout,
        [
            Matrix(f"{PREFIX}{names.of_module(name)}.{suffix}", number if divided else None)
            for number, name in enumerate(place.names)
        ],
        rank_dim=_RANK_DIMS.get(suffix),
        rank=place.written.rank,
    )


def _by_expert(place: Place, names: Names, layout: TensorLayout, suffix: str) -> StoredMatrices:
    divided = suffix != FACTOR_A and layout.fused_parts is not None

    def matrices() -> Iterator[Matrix]:
        for expert in range(place.experts or 0):
            for number, part in enumerate((None,) if place.b.fused_parts is None else place.b.fused_parts.names):
                key = f"{PREFIX}{names.of_expert(place.names[0], part, expert)}.{suffix}"
                yield Matrix(key, number if divided else None, expert)

    # Of DoRA experts that share A and B, each has its own magnitude.
    stacked = len(layout.global_shape) == (2 if suffix == MAGNITUDE else 3)
    return StoredMatrices(layout, list(matrices()), stacked, _RANK_DIMS.get(suffix), place.written.rank)
