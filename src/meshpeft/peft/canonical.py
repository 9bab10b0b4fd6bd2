"""Canonical LoRA: separate adapters for q, k, v and for gate, up of fused layers, as Hugging Face models have them.

Adapters A_i [r_i, in], B_i [out_i, r_i] of the parts of a fused layer are one low-rank adapter of rank sum(r_i):

    A = [A_0; A_1; ..]                       [sum r, in]
    B = fuse(diag(B_0, B_1, ..))             [out, sum r], rows in the layer's fused order, zero off the diagonal

So Canonical LoRA runs the same fused function as LoRA, in the same parallel states: one GEMM for all A_i, and B's
product written straight into the layer's fused output. The zeros cost rank-sized products, less than the separate
launches that they save.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
from spmd_types import rules
from torch import Tensor, nn
from torch.autograd import Function

from meshpeft.parallel import FusedParts, LinearLayout, ShardedTensors, layout_of
from meshpeft.peft.adapter import LowRankAdapter
from meshpeft.peft.errors import AdapterError
from meshpeft.peft.lora import LoRALinear, LoRATopKRouter, LowRankWrapper
from meshpeft.peft.matching import default_targets, is_target
from meshpeft.peft.method import LowRankPEFT
from meshpeft.peft.wrapper import AdapterTerm, AdapterWrapper, check_ours

__all__ = [
    "CanonicalLoRA",
    "LoRALinearSplitFC1UpGate",
    "LoRALinearSplitQKV",
    "ModuleDict",
    "component_name",
    "pack_factors",
    "part_layout",
]


class _PackDiagonal(Function):
    @staticmethod
    def forward(ctx: Any, fused_parts: FusedParts, shards: int, parts: tuple[int, ...], *factors: Tensor) -> Tensor:
        ranks = [factor.shape[1] for factor in factors]
        blocks, chunks = fused_parts.local_blocks(shards), fused_parts.chunks(shards)
        ctx.fused_parts, ctx.shards, ctx.parts, ctx.ranks = fused_parts, shards, parts, ranks
        packed = factors[0].new_zeros((blocks, sum(chunks), sum(ranks)))
        column = 0
        for part, factor, rank in zip(parts, factors, ranks, strict=True):
            row = sum(chunks[:part])
            block = packed[:, row : row + chunks[part], column : column + rank]
            block.copy_(factor.view(blocks, chunks[part], rank))
            column += rank
        return packed.view(-1, sum(ranks))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        rows = ctx.fused_parts.split(grads[0], 0, ctx.shards)
        columns = [rows[part].split(ctx.ranks, 1)[index] for index, part in enumerate(ctx.parts)]
        return None, None, None, *columns

    @staticmethod
    def spmd_typecheck(*, factors: tuple[Tensor, ...]) -> Any:
        # Rows of every part are sharded alike, and so are those of the fused result. The columns are local.
        result = rules.einsum("or->or", factors[0])
        for factor in factors[1:]:
            rules.einsum("or,or->or", result, factor)
        return result


def pack_factors(
    fused_parts: FusedParts, shards: int, parts: Sequence[int], a: Sequence[Tensor], b: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Make the factors of the one adapter that equals separate adapters on some parts of a fused layer.

    Args:
        fused_parts: Parts of the layer's output.
        shards: Number of shards of the output.
        parts: Index in `fused_parts` of each adapter's part; parts without an adapter get zero rows.
        a: A_i [r_i, in] per adapter, all in the same state.
        b: B_i [out_i / shards, r_i] per adapter, this rank's rows in canonical order.

    Returns:
        A [sum r, in] and B [out / shards, sum r]. Differentiable.
    """
    packed: Tensor = _PackDiagonal.apply(fused_parts, shards, tuple(parts), *b)
    return torch.cat(list(a)), packed


# Name of a part's target -> (name of the fused layer, name of the part in its fused parts).
_COMPONENTS = {
    "linear_q": ("linear_qkv", "q"),
    "linear_k": ("linear_qkv", "k"),
    "linear_v": ("linear_qkv", "v"),
    "linear_fc1_up": ("linear_fc1", "up"),
    "linear_fc1_gate": ("linear_fc1", "gate"),
}
_FUSED = tuple({fused for fused, _ in _COMPONENTS.values()})


class ModuleDict(ShardedTensors, nn.ModuleDict):
    """nn.ModuleDict with a sharded_state_dict implementation for checkpointing."""


class _SplitLoRALinear(LowRankWrapper):
    """A fused layer with a separate adapter for each of some of its parts."""

    adapter: ModuleDict
    parts: ClassVar[tuple[str, ...]]

    def __init__(self, to_wrap: nn.Module, adapter: ModuleDict) -> None:
        check_ours(type(self), adapter, ModuleDict)
        for part in adapter.values():
            check_ours(type(self), part, LowRankAdapter)
        super().__init__(to_wrap, adapter)
        known = [f"adapter_{part}" for part in self.parts]
        if not len(adapter) or any(name not in known for name in adapter):
            raise AdapterError(f"{type(self).__name__}: adapters are called {', '.join(known)}; got {list(adapter)}")
        layout = layout_of(to_wrap)
        if layout.fused_parts is None or set(layout.fused_parts.names) != set(self.parts):
            raise AdapterError(f"{type(self).__name__} needs a layer that packs {', '.join(self.parts)}")
        self._fused_parts: FusedParts = layout.fused_parts
        self._shards = layout.axis.world_size if layout.shard == "out" else 1

    def adapters(self) -> dict[str, LowRankAdapter]:
        """Part -> its adapter, in the order of the fused parts."""
        return {
            part: cast(LowRankAdapter, self.adapter[f"adapter_{part}"])
            for part in self._fused_parts.names
            if f"adapter_{part}" in self.adapter
        }

    def terms(self) -> list[AdapterTerm]:
        """Return one term for each adapted part, in the order of the layer's parts."""
        return [AdapterTerm(adapter, part, path=f"adapter_{part}") for part, adapter in self.adapters().items()]

    def join_factors(self, a: list[Tensor], b: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Join the factors of terms on different rows, see `pack_factors`."""
        indices = [self._fused_parts.names.index(part) for part in self.adapters()]
        return pack_factors(self._fused_parts, self._shards, indices, a, b)


class LoRALinearSplitQKV(_SplitLoRALinear):
    """An adapter wrapper for linear_qkv where q, k, v are three separate adapters.

    Args:
        to_wrap: Layer whose output fuses q, k and v.
        adapter: `ModuleDict` of `adapter_q`, `adapter_k`, `adapter_v`, or some of them; an absent one adds zero.
    """

    parts = ("q", "k", "v")

    def _interleave_qkv(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Separate local outputs [*, q], [*, k], [*, v] -> the layer's packed order [*, per group q .. q k v]."""
        return self._fused_parts.fuse([query, key, value], -1, self._shards)


class LoRALinearSplitFC1UpGate(_SplitLoRALinear):
    """An adapter wrapper for linear_fc1 where up_proj and gate_proj are two separate adapters.

    Args:
        to_wrap: Layer whose output fuses gate and up.
        adapter: `ModuleDict` of `adapter_up`, `adapter_gate`, or one of them; an absent one adds zero.
    """

    parts = ("gate", "up")


_WRAPPERS: dict[frozenset[str], type[_SplitLoRALinear]] = {
    frozenset(wrapper.parts): wrapper for wrapper in (LoRALinearSplitQKV, LoRALinearSplitFC1UpGate)
}


def _should_treat_linear_fc1_as_unfused(full_name: str) -> bool:
    """Return True when CanonicalLoRA should keep linear_fc1 as a single adapter: inside a vision model."""
    return "vision_model" in full_name.split(".")


@dataclass
class CanonicalLoRA(LowRankPEFT):
    """LoRA on q, k, v, and on gate and up, separately. Options as in `LowRankPEFT`.

    Routers that are targets get a `LoRATopKRouter`.

    Attributes:
        target_modules: `linear_q linear_k linear_v linear_proj linear_fc1_up linear_fc1_gate linear_fc2`, or some of
            them, also with wildcards: `*.layers.0.*.linear_q`.
        exclude_modules: every other layer is adapted, with all its components.
        canonical_mapping: pattern of the layer as it is in the model -> the targets that it stands for; made from
            `target_modules` at construction, and again when the method is applied.
    """

    target_modules: list[str] = field(
        default_factory=default_targets(
            "linear_q", "linear_k", "linear_v", "linear_proj", "linear_fc1_up", "linear_fc1_gate", "linear_fc2"
        )
    )
    _requests: dict[str, list[str]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._build_canonical_mapping()

    def _init_target_match_state(self) -> None:
        super()._init_target_match_state()
        self._build_canonical_mapping()

    def _build_canonical_mapping(self) -> None:
        self.canonical_mapping, self._requests = {}, {}
        for target in [] if self.exclude_modules else self.target_modules:
            leaf = target.rpartition(".")[2].lstrip("*")
            start = target.removesuffix(leaf)
            if leaf in ("linear_qkv", "linear_fc1"):
                parts = ", ".join(repr(start + name) for name, (fused, _) in _COMPONENTS.items() if fused == leaf)
                raise AdapterError(
                    f"target_modules: {target!r} is one fused layer, and CanonicalLoRA adapts its parts: name {parts}, "
                    "or some of them; or use LoRA"
                )
            pattern = start + _COMPONENTS[leaf][0] if leaf in _COMPONENTS else target
            self.canonical_mapping.setdefault(pattern, set()).add(leaf or target)
            self._requests.setdefault(pattern, []).append(target)

    def _patterns(self) -> dict[str, list[str]]:
        return self._requests

    def _reason(self, pattern: str, names: Sequence[str]) -> str:
        leaf = pattern.rpartition(".")[2].lstrip("*")
        if leaf not in _COMPONENTS:
            return super()._reason(pattern, names)
        fused = _COMPONENTS[leaf][0]
        if self.exclude_modules:
            return (
                f"{pattern!r} is a part of {fused}, and layers are left alone as a whole: exclude "
                f"{pattern.removesuffix(leaf) + fused!r}, or name the parts to adapt in target_modules"
            )
        if any(name.rpartition(".")[2] == leaf for name in names):
            return f"{pattern!r} means a part of {fused}, and is a layer of its own in this model; use LoRA"
        return super()._reason(pattern, names)

    def adapt(self, base: nn.Module, full_name: str) -> AdapterWrapper:
        """Return a wrapper with one adapter per requested part of a fused layer; on other layers a `LoRALinear`."""
        layout = layout_of(base)
        wanted = self._wanted_parts(full_name)
        wrapper = _WRAPPERS.get(frozenset(layout.fused_parts.names)) if layout.fused_parts is not None else None
        if wrapper is None or layout.is_stacked or _should_treat_linear_fc1_as_unfused(full_name):
            if full_name.endswith("linear_qkv"):
                raise AdapterError(
                    f"{full_name}: the layout of {type(base).__name__} does not say how q, k, v are packed; use LoRA"
                )
            return LoRALinear(base, self.make_adapter(base, full_name))
        adapters = {
            f"adapter_{part}": self.make_adapter(
                base,
                full_name,
                part_layout(layout, part),
                f"adapter.adapter_{part}",
                component_name(full_name, part) if full_name.endswith(_FUSED) else None,
            )
            for part in wrapper.parts
            if part in wanted
        }
        return wrapper(base, ModuleDict(adapters))

    def adapt_router(self, router: nn.Module, full_name: str) -> AdapterWrapper:
        """Return a `LoRATopKRouter`, as LoRA does: logits have no parts."""
        return LoRATopKRouter(router, self.make_adapter(router, full_name))

    def _targets_of(self, full_name: str) -> list[str]:
        parts = [name for name, (fused, _) in _COMPONENTS.items() if full_name.endswith(fused)]
        return [full_name, *(full_name.rpartition(".")[0] + f".{part}" for part in parts)]

    def _wanted_parts(self, full_name: str) -> set[str]:
        """Return the parts of a fused layer that the patterns name; all, if one names the layer itself."""
        every = {part for _, part in _COMPONENTS.values()}
        if self.exclude_modules:
            return every
        wanted: set[str] = set()
        for pattern, components in self.canonical_mapping.items():
            if is_target(pattern, full_name):
                for component in components:
                    wanted |= {_COMPONENTS[component][1]} if component in _COMPONENTS else every
        return wanted


def part_layout(layout: LinearLayout, part: str) -> LinearLayout:
    """Return the layout that a part of a fused layer would have on its own."""
    assert layout.fused_parts is not None
    size = layout.fused_parts.sizes[layout.fused_parts.names.index(part)]
    return replace(layout, out_features=size, fused_parts=None)


def component_name(module: str, part: str) -> str:
    """Return the target that means one part of a fused layer: `..linear_qkv`, `q` -> `..linear_q`.

    Raises:
        AdapterError: The layer has no such part.
    """
    for name, (fused, its_part) in _COMPONENTS.items():
        if part == its_part and module.rpartition(".")[2] == fused:
            return module.removesuffix(fused) + name
    raise AdapterError(f"{module} has no part {part!r} that CanonicalLoRA could adapt by itself")
