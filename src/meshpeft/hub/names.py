"""Which tensors of a Hugging Face file make up which parameter of ours: names and forms, read and written.

Loading and saving models, and importing and exporting adapters, all read the tables and the description here. Our names
are Megatron's; fused modules have parts: `linear_qkv` is `q`, `k`, `v`, `linear_fc1` is `gate`, `up`.

**How `linear_qkv` becomes `q_proj`, `k_proj`, `v_proj`**, in the file of a model or of an adapter:

* `hf_module_name` names each part; the parameter is described as `StoredTensors`
  with a tensor for each part: of a weight, a bias, LoRA's B [out, r], or DoRA's magnitude [out]. A [r, in] is one
  parameter here without parts, and the file repeats it for each of them. (Canonical LoRA has an A for each.)
* Written: `TensorLayout.gather` gives the global tensor in canonical order, `[q; k; v]`; `split` cuts it at the parts.
* Read: each rank reads, of each part's tensor, the rows of its own query groups into their places in the local tensor,
  which is in fused order, `[q .. q k v | q .. q k v | ..]`.

Experts have two forms. The models of transformers stack them: `mlp.experts.gate_up_proj` and `mlp.experts.down_proj`
are parameters, gate and up one after the other. Checkpoints on the hub, which transformers reads and writes too, have
every expert by itself: `mlp.experts.7.gate_proj.weight`; Mixtral's call the layer, and the projections, by names of
their own. peft adapts the stacked parameters by two matrices for all experts: A [experts * r, in], which has one
expert's rows after the other's, and B [out, r * experts], in whose columns the experts take turns.

Shapes of adapters' parameters: A [r, in] and B [out, r] of a layer, [experts, r, in] and [experts, out, r] of stacked
experts; an adapter that the experts share has the first. A magnitude is [out], or [experts, out]. A file may hold
matrices of a larger rank R than the parameter's r: A's rows, and B's columns, from r on are zeros then.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed._local_tensor import LocalTensor

from meshpeft.engines.transformers_experts import StackedExperts
from meshpeft.hub.tensor_files import CheckpointError, TensorFiles
from meshpeft.models import Decoder, LanguageModel, ModelError
from meshpeft.models.language_model import PartsInFiles
from meshpeft.parallel.layout import FusedParts, TensorLayout
from meshpeft.parallel.mesh import on_each_rank

__all__ = [
    "OurModule",
    "SeparateA",
    "SeparateB",
    "StackedA",
    "StackedB",
    "Stored",
    "StoredTensor",
    "StoredTensors",
    "Transposed",
    "expert_module_name",
    "has_expert_names",
    "hf_module_name",
    "hf_tensor_names",
    "is_swapped_by_peft",
    "name_in_transformers",
    "our_module_name",
    "plain",
    "stored_forms",
]

_GLOBAL: dict[tuple[str, str | None], str] = {
    ("embedding", None): "model.embed_tokens",
    ("decoder.final_layernorm", None): "model.norm",
    ("output_layer", None): "lm_head",
}
_PER_LAYER: dict[tuple[str, str | None], str] = {
    ("input_layernorm", None): "input_layernorm",
    ("self_attention.linear_qkv", "q"): "self_attn.q_proj",
    ("self_attention.linear_qkv", "k"): "self_attn.k_proj",
    ("self_attention.linear_qkv", "v"): "self_attn.v_proj",
    ("self_attention.q_layernorm", None): "self_attn.q_norm",
    ("self_attention.k_layernorm", None): "self_attn.k_norm",
    ("self_attention.linear_proj", None): "self_attn.o_proj",
    ("pre_mlp_layernorm", None): "post_attention_layernorm",
    ("mlp.linear_fc1", "gate"): "mlp.gate_proj",
    ("mlp.linear_fc1", "up"): "mlp.up_proj",
    ("mlp.linear_fc2", None): "mlp.down_proj",
    ("mlp.router", None): "mlp.gate",
    ("mlp.experts.linear_fc1", None): "mlp.experts.gate_up_proj",
    ("mlp.experts.linear_fc2", None): "mlp.experts.down_proj",
    ("mlp.shared_experts.linear_fc1", "gate"): "mlp.shared_expert.gate_proj",
    ("mlp.shared_experts.linear_fc1", "up"): "mlp.shared_expert.up_proj",
    ("mlp.shared_experts.linear_fc2", None): "mlp.shared_expert.down_proj",
    ("mlp.shared_experts.gate", None): "mlp.shared_expert_gate",
}
_EXPERTS = "mlp.experts"
_PER_EXPERT: dict[tuple[str, str | None], str] = {
    ("linear_fc1", "gate"): "gate_proj",
    ("linear_fc1", "up"): "up_proj",
    ("linear_fc2", None): "down_proj",
}
# What the checkpoints of a family call otherwise than the modules of transformers.
_OTHERWISE = {"mixtral": {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "mlp": "block_sparse_moe"}}
_ALIASES = {alias: name for names in _OTHERWISE.values() for name, alias in names.items()}

_GLOBAL_INVERSE = {hf: ours for ours, hf in _GLOBAL.items()}
_PER_LAYER_INVERSE = {hf: ours for ours, hf in _PER_LAYER.items()}
_PER_EXPERT_INVERSE = {hf: ours for ours, hf in _PER_EXPERT.items()}
_OUR_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_HF_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_HF_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(\w+)")


class OurModule(NamedTuple):
    """The module of ours that a Hugging Face name belongs to.

    Attributes:
        module: Its full name.
        part: Part of a fused module; `None` where ours is not fused, or the name is of all parts.
        expert: Number of the expert, over all ranks; `None` if it is not one expert's.
    """

    module: str
    part: str | None
    expert: int | None = None


def hf_module_name(
    module: str, part: str | None = None, *, expert: int | None = None, model_type: str | None = None
) -> str:
    """Map `decoder.layers.3.self_attention.linear_qkv`, `q` to `model.layers.3.self_attn.q_proj`.

    Args:
        module: Full name of a module of the decoder.
        part: Part of a fused module; `None` for a module that is not fused, and for the stacked experts:
            `decoder.layers.3.mlp.experts.linear_fc1` -> `model.layers.3.mlp.experts.gate_up_proj`, the parameter of
            transformers' model.
        expert: Its number over all ranks: `decoder.layers.3.mlp.experts.linear_fc1`, `gate`, 5 ->
            `model.layers.3.mlp.experts.5.gate_proj`.
        model_type: Name it as the family's checkpoints on the hub do (`mixtral`: `block_sparse_moe.experts.5.w1`);
            by default as transformers' modules.

    Raises:
        ModelError: The decoder has no such module, or it has no such part.
    """
    layer = _OUR_LAYER.fullmatch(module)
    if layer is None:
        found = _GLOBAL.get((module, part)) if expert is None else None
    elif expert is None:
        found = _PER_LAYER.get((layer[2], part))
    else:
        found = _expert_name(layer[2], part, expert)
    if found is None:
        whole = module if part is None else f"{module} ({part})"
        whole = whole if expert is None else f"expert {expert} of {whole}"
        raise ModelError(f"{whole} has no name in Hugging Face checkpoints")
    if layer is None:
        return found
    return f"model.layers.{layer[1]}.{_as_in_checkpoints(found, model_type)}"


def _expert_name(module: str, part: str | None, expert: int) -> str | None:
    experts, _, linear = module.rpartition(".")
    found = _PER_EXPERT.get((linear, part)) if experts == _EXPERTS else None
    return None if found is None else f"{_EXPERTS}.{expert}.{found}"


def _as_in_checkpoints(name: str, model_type: str | None) -> str:
    other = _OTHERWISE.get(model_type or "", {})
    return ".".join(other.get(component, component) for component in name.split("."))


def our_module_name(hf_module: str) -> OurModule:
    """Map `model.layers.3.self_attn.q_proj` to (`decoder.layers.3.self_attention.linear_qkv`, `q`, None).

    Takes both names of experts, and those of every family's checkpoints.

    Raises:
        ModelError: The decoder has no such module.
    """
    layer = _HF_LAYER.fullmatch(hf_module)
    if layer is None:
        found, expert = _GLOBAL_INVERSE.get(hf_module), None
    else:
        name = ".".join(_ALIASES.get(component, component) for component in layer[2].split("."))
        one = _HF_EXPERT.fullmatch(name)
        if one is None:
            found, expert = _PER_LAYER_INVERSE.get(name), None
        else:
            linear, part = _PER_EXPERT_INVERSE.get(one[2], (None, None))
            found, expert = None if linear is None else (f"{_EXPERTS}.{linear}", part), int(one[1])
    if found is None:
        raise ModelError(f"the decoder has no module for {hf_module!r}")
    return OurModule(found[0] if layer is None else f"decoder.layers.{layer[1]}.{found[0]}", found[1], expert)


def stored_forms(model: LanguageModel, parameter: str, layout: TensorLayout) -> list[StoredTensors]:
    """List the forms in which files may hold a parameter or persistent buffer of a model.

    The first is the one that is written: that of the hub.

    Raises:
        ModelError: The parameter has no name there (an adapter's, for instance).
    """
    if isinstance(model, Decoder):
        return _forms_of_family(parameter, layout, model.config.model_type)
    parts = model.stored_parts.get(parameter)
    if parts is not None:
        return [_in_parts(layout, parts)]
    # The models of transformers have the form of their files.
    key = model.stored_names.get(parameter, name_in_transformers(model, parameter))
    return [StoredTensors(layout, [StoredTensor(key)], transposed=_is_transposed(model, parameter))]


def _in_parts(layout: TensorLayout, parts: PartsInFiles) -> StoredTensors:
    if parts.sizes is not None:
        names = tuple(f"part {number}" for number in range(len(parts.sizes)))
        layout = replace(layout, fused_parts=FusedParts(names, parts.sizes), fused_dim=0)
    stacked = layout.is_stacked
    tensors = [
        StoredTensor(key, None if layout.fused_parts is None else part, expert if stacked else None)
        for part, keys in enumerate(parts.tensors)
        for expert, key in enumerate(keys)
    ]
    return StoredTensors(layout, tensors, stacked)


def _stack_of(model: nn.Module, layer: str) -> StackedExperts | None:
    """Return the `StackedExperts` that hold a layer of a transformers model; `None` for any other layer."""
    holder, _, own = layer.rpartition(".")
    try:
        stack = model.get_submodule(holder)
    except AttributeError:  # a name that leaves out the wrapper around a block
        return None
    return stack if isinstance(stack, StackedExperts) and own in (stack.first, "down_proj") else None


def name_in_transformers(model: nn.Module, parameter: str) -> str:
    """Return transformers' name of a parameter of one of its models.

    The weight of stacked experts' layer `..experts.down_proj` is a parameter `..experts.down_proj` there.
    """
    layer, _, attribute = parameter.rpartition(".")
    return layer if attribute == "weight" and _stack_of(model, layer) is not None else parameter


def _is_transposed(model: nn.Module, parameter: str) -> bool:
    """Whether transformers has the weight of stacked experts as [experts, in, out]."""
    layer, _, attribute = parameter.rpartition(".")
    stack: Any = _stack_of(model, layer) if attribute == "weight" else None
    return stack is not None and bool(stack.is_transposed)


def is_swapped_by_peft(model: nn.Module, layer: str) -> bool:
    """Whether peft takes a weight [experts, in, out] of stacked experts for [experts, out, in].

    It does where the class does not say `is_transposed`: its `lora_A` then is Bᵀ, and its `lora_B` Aᵀ.
    """
    stack = _stack_of(model, layer)
    return stack is not None and stack.is_transposed_unsaid


def has_expert_names(model: nn.Module, layer: str) -> bool:
    """Whether each expert of a layer of stacked experts, not of a decoder, has a name in checkpoints on the hub."""
    return _stack_of(model, layer) is not None


def expert_module_name(model: nn.Module, layer: str, part: str | None, expert: int) -> str:
    """Name one expert's part of a layer of stacked experts, of any model, as checkpoints on the hub name it.

    Those of a transformers model that was read from such a checkpoint have its names; others get
    `..experts.7.gate_proj`, `up_proj` and `down_proj`.

    Args:
        model: Decoder of ours or of Megatron's, or a model of transformers.
        layer: Full name of the layer there.
        part: `gate` or `up`; `None` for a layer that is not fused.
        expert: Its number over all ranks.
    """
    if isinstance(model, Decoder):
        return hf_module_name(layer, part, expert=expert, model_type=model.config.model_type)
    if _stack_of(model, layer) is None:
        return hf_module_name(layer, part, expert=expert)
    held = getattr(model, "stored_parts", {}).get(f"{layer}.weight")
    if held is not None:
        name: str = held.tensors[{"gate": 0, "up": 1, None: 0}[part]][expert]
        return name.removesuffix(".weight")
    container, _, own = layer.rpartition(".")
    return f"{container}.{expert}.{own if part is None else f'{part}_proj'}"


def _forms_of_family(parameter: str, layout: TensorLayout, model_type: str) -> list[StoredTensors]:
    module, _, attribute = parameter.rpartition(".")
    parts: list[tuple[int | None, str | None]] = [(None, None)]
    if layout.fused_parts is not None:
        parts = list(enumerate(layout.fused_parts.names))
    stacked = f".{_EXPERTS}." in module
    experts = range(layout.global_shape[0]) if stacked else (None,)

    def form(family: str | None) -> StoredTensors:
        tensors = [
            StoredTensor(f"{hf_module_name(module, name, expert=expert, model_type=family)}.{attribute}", part, expert)
            for part, name in parts
            for expert in experts
        ]
        return StoredTensors(layout, tensors, stacked)

    # Some files use the names of the modules of transformers where the family has others.
    found = [form(family) for family in ([model_type, None] if model_type in _OTHERWISE else [None])]
    if stacked:
        found.append(StoredTensors(layout, [StoredTensor(hf_module_name(module))]))
    return found


def hf_tensor_names(parameter: str, layout: TensorLayout, model_type: str = "") -> list[str]:
    """Name the tensors that a parameter is written as: part by part, and for each expert if it is of experts.

    Args:
        parameter: Its full name.
        layout: Layout of the parameter.
        model_type: That of the configuration.

    Raises:
        ModelError: The parameter has no name there (an adapter's, for instance).
    """
    return _forms_of_family(parameter, layout, model_type)[0].keys


class Stored:
    """How one parameter is stored in a file.

    Attributes:
        layout: Layout of the parameter.
    """

    layout: TensorLayout

    @property
    def keys(self) -> list[str]:
        """Names of the tensors."""
        return [key for key, _ in self.declared()]

    def declared(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of each tensor."""
        raise NotImplementedError

    def split(self, full: Tensor) -> Iterator[Tensor]:
        """Cut the global parameter, in canonical order, into its tensors, in the same order."""
        raise NotImplementedError

    def check_copies(self, files: TensorFiles) -> None:
        """Check that what the parameter holds once is the same wherever the file repeats it.

        Raises:
            CheckpointError: Two tensors differ.
        """

    def read(self, files: TensorFiles) -> Tensor:
        """Read this rank's slice, in fused order; only its own part of the files is read."""
        raise NotImplementedError


class StoredTensor(NamedTuple):
    """A tensor of a file.

    Attributes:
        key: Its name.
        part: Index of the part of the fused dim that it holds; `None` for all of them, fused as on one rank.
        expert: The expert that it is of; `None` for a tensor of all, or of a layer without experts.
    """

    key: str
    part: int | None = None
    expert: int | None = None


@dataclass(frozen=True)
class StoredTensors(Stored):
    """A tensor for the parameter, for each of its parts, for each expert, or for each of both.

    Attributes:
        tensors: In the order in which they are written. Either all of them hold a part, or none does.
        stacked: The parameter's first dim counts the experts, each of which has tensors of its own; otherwise what
            differs only in `expert` are copies.
        rank_dim: The dim of a matrix that is the rank: -2 of A, -1 of B; `None` for no such dim.
        rank: R, the rank in the file; `None` for the parameter's own.
        transposed: The last two dims are the other way round in the file.
    """

    layout: TensorLayout
    tensors: Sequence[StoredTensor]
    stacked: bool = False
    rank_dim: int | None = None
    rank: int | None = None
    transposed: bool = False

    def declared(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of each tensor."""
        lead = int(self.stacked)
        full = self._in_file(self.layout.global_shape[lead:])
        parts = [self._in_file(piece.global_shape[lead:]) for piece in self.layout.pieces()]
        return [(tensor.key, full if tensor.part is None else parts[tensor.part]) for tensor in self.tensors]

    def _in_file(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.transposed:
            return (*shape[:-2], shape[-1], shape[-2])
        if self.rank is None or self.rank_dim is None:
            return shape
        sizes = list(shape)
        sizes[self.rank_dim] = self.rank
        return tuple(sizes)

    def split(self, full: Tensor) -> Iterator[Tensor]:
        """Cut the global parameter at its parts and experts; fuse the parts where one tensor holds them all."""
        fused, dim = self.layout.fused_parts, self.layout.fused_dim
        parts = [full] if fused is None else list(full.split(list(fused.sizes), dim))
        if self.tensors[0].part is None:
            parts = [full if fused is None else fused.fuse(parts, dim, 1)]
        for tensor in self.tensors:
            values = parts[tensor.part or 0]
            values = values[tensor.expert] if self.stacked and tensor.expert is not None else values
            values = values.transpose(-2, -1).contiguous() if self.transposed else values
            yield values if self.rank_dim is None else _padded(values, self.rank_dim, self.rank)

    def _copies(self) -> dict[tuple[int | None, int | None], list[str]]:
        """Map (part, expert) of the parameter to the names of the tensors that hold it."""
        found: dict[tuple[int | None, int | None], list[str]] = {}
        for tensor in self.tensors:
            found.setdefault((tensor.part, tensor.expert if self.stacked else None), []).append(tensor.key)
        return found

    def check_copies(self, files: TensorFiles) -> None:
        """Compare what is repeated."""
        for first, *others in self._copies().values():
            expected = files.read(first) if others else None
            for other in others:
                if expected is not None and not torch.equal(expected, files.read(other)):
                    raise CheckpointError(f"{first} and {other} differ, but one parameter holds both")

    def read(self, files: TensorFiles, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        """Read this rank's box of each tensor into its place.

        Args:
            files: Files that hold the tensors.
            dtype: Type of the result; that of the tensors by default.
            device: Device of the result; the CPU by default.
        """
        layout = self.layout
        keys = {held: names[0] for held, names in self._copies().items()}
        kind = _common_dtype(files, keys.values()) if dtype is None else dtype
        local = _empty(list(layout.local_shape), kind, torch.device("cpu") if device is None else device)
        fused = self.tensors[0].part is None
        starts: Iterator[int] = accumulate(() if layout.fused_parts is None else layout.fused_parts.sizes, initial=0)
        if fused and layout.fused_parts is not None and layout.fused_parts.blocks is not None:
            # Whole blocks of all parts lie in the file as they do here.
            layout, starts = replace(layout, fused_parts=None), iter((0,))
        for number, (piece, place) in enumerate(zip(layout.pieces(), layout.part_views(local), strict=True)):
            part, start = (None, next(starts)) if fused else (number, 0)
            experts = range(layout.global_shape[0]) if self.stacked else (None,)
            names = [keys[part, expert] for expert in experts]
            offset, dim = list(piece.offset), layout.fused_dim
            if start:  # only a fused parameter has a dim to add it to: a scalar has none
                offset[dim] += start
            _read_piece(files, names, self.stacked, offset, list(piece.shape), dim, place, transposed=self.transposed)
        return local

    @property
    def is_one_matrix(self) -> bool:
        """Whether a file has the parameter as it is: neither in parts nor expert by expert."""
        return not self.stacked and len(self.layout.pieces()) == 1 and len(self._copies()) == 1

    def read_rows(self, files: TensorFiles, dtype: torch.dtype, device: torch.device, first: int, count: int) -> Tensor:
        """Read some of this rank's rows of one that `is_one_matrix`; otherwise as `read`."""
        (piece,), (keys,) = self.layout.pieces(), self._copies().values()
        shape, offset = [count, *piece.shape[1:]], [piece.offset[0] + first, *piece.offset[1:]]
        rows = _empty(shape, dtype, device)
        _read_piece(files, keys[:1], False, offset, shape, 0, rows, transposed=self.transposed)
        return rows


@dataclass(frozen=True)
class StackedA(Stored):
    """A of stacked experts as one tensor [experts * r, in].

    Attributes:
        key: Its name.
        experts: Number of experts, over all ranks.
        stacked: The parameter is [experts, r, in]; otherwise the experts share [r, in].
        rank: R, the rows that each expert has in the file; `None` for r.
    """

    layout: TensorLayout
    key: str
    experts: int
    stacked: bool
    rank: int | None = None

    def declared(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of each tensor."""
        *_, rank, features = self.layout.global_shape
        return [(self.key, (self.experts * (self.rank or rank), features))]

    def split(self, full: Tensor) -> Iterator[Tensor]:
        """Write the experts out in one matrix."""
        fused = self.layout.fused_parts
        if fused is not None:
            full = fused.fuse(full.split(list(fused.sizes), -1), -1, 1)
        full = _padded(full, -2, self.rank)
        yield full.expand(self.experts, *full.shape[-2:]).reshape(-1, full.shape[-1])

    def check_copies(self, files: TensorFiles) -> None:
        """Compare what is repeated."""
        if not self.stacked:
            _check_same(files.read(self.key).view(self.experts, -1), self.key)

    def read(self, files: TensorFiles) -> Tensor:
        """Read this rank's slice."""
        parts = []
        for piece, start in zip(self.layout.pieces(), _starts(self.layout), strict=False):
            *lead, rank, features = piece.shape
            first_expert = piece.offset[0] if self.stacked else 0
            each, experts = self.rank or rank, lead[0] if lead else 1
            # A is never sharded over its rank: each expert's rows are complete.
            box = files.read_box(self.key, (first_expert * each, piece.offset[-1] + start), (experts * each, features))
            parts.append(box.view(experts, each, features)[:, :rank].reshape(piece.shape))
        return self.layout.join_parts(parts)


@dataclass(frozen=True)
class StackedB(Stored):
    """B of stacked experts as one tensor [out, r * experts]; for the attributes see `StackedA`."""

    layout: TensorLayout
    key: str
    experts: int
    stacked: bool
    rank: int | None = None

    def declared(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of each tensor."""
        *_, features, rank = self.layout.global_shape
        return [(self.key, (features, (self.rank or rank) * self.experts))]

    def split(self, full: Tensor) -> Iterator[Tensor]:
        """Write the experts out in one matrix."""
        fused = self.layout.fused_parts
        if fused is not None:
            full = fused.fuse(full.split(list(fused.sizes), -2), -2, 1)
        full = _padded(full, -1, self.rank)
        yield full.expand(self.experts, *full.shape[-2:]).permute(1, 2, 0).reshape(full.shape[-2], -1)

    def check_copies(self, files: TensorFiles) -> None:
        """Compare what is repeated."""
        if not self.stacked:
            columns = files.read(self.key)
            _check_same(columns.view(columns.shape[0], -1, self.experts).permute(2, 0, 1).flatten(1), self.key)

    def read(self, files: TensorFiles) -> Tensor:
        """Read this rank's slice."""
        layout, fused = self.layout, self.layout.fused_parts
        if fused is not None and fused.blocks is not None:  # whole blocks lie in the file as they do here
            layout, fused = replace(layout, fused_parts=None), None
        parts = []
        for piece, start in zip(layout.pieces(), _starts(layout), strict=False):
            *lead, features, rank = piece.shape
            first_expert = piece.offset[0] if self.stacked else 0
            experts = lead[0] if lead else 1
            columns = [
                files.read_box(
                    self.key, (piece.offset[-2] + start, column * self.experts + first_expert), (features, experts)
                )
                for column in range(rank)
            ]
            parts.append(torch.stack(columns, -1).transpose(0, 1).reshape(piece.shape))
        return layout.join_parts(parts)


def _starts(layout: TensorLayout) -> Iterator[int]:
    """Iterate over the places at which the parts of a fused dim begin."""
    return accumulate((0,) if layout.fused_parts is None else layout.fused_parts.sizes, initial=0)


@dataclass(frozen=True)
class Transposed(Stored):
    """A factor of stacked experts in the place of the other, the other way round; see `is_swapped_by_peft`.

    Attributes:
        inner: How its transpose is stored.
    """

    layout: TensorLayout
    inner: Stored

    @classmethod
    def of(cls, layout: TensorLayout, stored: Callable[[TensorLayout], Stored]) -> Transposed:
        """Store a parameter as `stored` does a parameter with the last two dims the other way round."""
        dims = len(layout.global_shape)
        places = [*range(dims - 2), dims - 1, dims - 2]
        turned = replace(
            layout,
            global_shape=tuple(layout.global_shape[dim] for dim in places),
            shards=tuple((places[dim], axis) for dim, axis in layout.shards),
            fused_dim=places[layout.fused_dim],
        )
        return cls(layout, stored(turned))

    def declared(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of each tensor."""
        return self.inner.declared()

    def split(self, full: Tensor) -> Iterator[Tensor]:
        """Cut the transpose."""
        return self.inner.split(full.transpose(-2, -1))

    def check_copies(self, files: TensorFiles) -> None:
        """Compare what is repeated."""
        self.inner.check_copies(files)

    def read(self, files: TensorFiles) -> Tensor:
        """Read this rank's slice."""
        return self.inner.read(files).transpose(-2, -1).contiguous()


@dataclass(frozen=True)
class SeparateA(Stored):
    """A [experts, sum r, in] of experts whose parts (gate, up) have an A each: one above the other. Only read.

    Attributes:
        parts: For each part, each expert's key.
        ranks: Ranks of the parts.
    """

    layout: TensorLayout
    parts: Sequence[Sequence[str]]
    ranks: Sequence[int]

    def declared(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of each tensor."""
        features = self.layout.global_shape[-1]
        return [(key, (rank, features)) for keys, rank in zip(self.parts, self.ranks, strict=True) for key in keys]

    def read(self, files: TensorFiles) -> Tensor:
        """Read this rank's slice."""
        (piece,) = self.layout.pieces()
        experts, _, features = piece.shape
        return torch.cat(
            [
                _read_stack(files, keys, piece.offset, (experts, rank, features))
                for keys, rank in zip(self.parts, self.ranks, strict=True)
            ],
            1,
        )


@dataclass(frozen=True)
class SeparateB(Stored):
    """B [experts, out, sum r] of such experts: each part's rows have that part's columns, else zeros. Only read.

    Attributes:
        parts, ranks: As of `SeparateA`.
        factors: Factor of each part, where their adapters' scales differ.
    """

    layout: TensorLayout
    parts: Sequence[Sequence[str]]
    ranks: Sequence[int]
    factors: Sequence[float]

    def declared(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of each tensor."""
        shapes = [
            (*piece.global_shape[1:-1], rank) for piece, rank in zip(self.layout.pieces(), self.ranks, strict=True)
        ]
        return [(key, shape) for keys, shape in zip(self.parts, shapes, strict=True) for key in keys]

    def read(self, files: TensorFiles) -> Tensor:
        """Read this rank's slice."""
        parts, column = [], 0
        for keys, rank, factor, piece in zip(self.parts, self.ranks, self.factors, self.layout.pieces(), strict=True):
            own = _read_stack(files, keys, piece.offset, (*piece.shape[:-1], rank))
            own = own if factor == 1 else own * factor
            parts.append(torch.nn.functional.pad(own, (column, sum(self.ranks) - column - rank)))
            column += rank
        return self.layout.join_parts(parts)


def _padded(values: Tensor, dim: int, rank: int | None) -> Tensor:
    """Add zeros behind the values along `dim`, up to `rank`."""
    missing = 0 if rank is None else rank - values.shape[dim]
    return torch.nn.functional.pad(values, (0, 0) * (-dim - 1) + (0, missing)) if missing else values


def _check_same(experts: Tensor, key: str) -> None:
    if not bool((experts == experts[:1]).all()):
        raise CheckpointError(f"{key} differs between the experts, but the model's experts share one adapter")


def plain(full: Tensor) -> Tensor:
    """Make one tensor of a simulated one that is the same on all ranks."""
    return full.reconcile() if isinstance(full, LocalTensor) else full


def _common_dtype(files: TensorFiles, keys: Iterable[str]) -> torch.dtype:
    return reduce(torch.promote_types, {files.dtype(key) for key in keys})


@on_each_rank
def _empty(shape: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _read_stack(files: TensorFiles, keys: Sequence[str], offset: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Read a box [matrices, ..] of the stack of these tensors, of which only those in the box are read."""
    local = _empty(list(shape), _common_dtype(files, keys), torch.device("cpu"))
    _read_piece(files, list(keys), True, list(offset), list(shape), 1, local, transposed=False)
    return local


@on_each_rank
def _read_piece(
    files: TensorFiles,
    keys: list[str],
    stacked: bool,
    offset: list[int],
    shape: list[int],
    dim: int,
    place: Tensor,
    *,
    transposed: bool,
) -> None:
    """Copy a box of a part into `place`: from its tensor, or from the tensor of each expert in the box.

    Args:
        files: Files that hold them.
        keys: Name of the tensor, or of each expert's.
        stacked: Whether there is one for each expert, along the first dim of the box.
        offset, shape: The box.
        dim: Dim of the box along which parts are fused.
        place: [*shape], or `dim` of it unflattened into [blocks, chunk].
        transposed: The tensors have the last two dims the other way round.
    """
    if transposed:  # in terms of the files; `place` has no blocks then
        offset, shape = ([*sizes[:-2], sizes[-1], sizes[-2]] for sizes in (offset, shape))
        place = place.transpose(-2, -1)
    if not stacked:
        _read_blocks(files, keys[0], offset, shape, dim, place)
        return
    for index in range(shape[0]):
        _read_blocks(files, keys[offset[0] + index], offset[1:], shape[1:], dim - 1, place[index])


def _read_blocks(files: TensorFiles, key: str, offset: list[int], shape: list[int], dim: int, place: Tensor) -> None:
    """Copy a box of a tensor into `place`, which has its shape, or `dim` of it unflattened into [blocks, chunk]."""
    if place.dim() == len(shape):
        files.read_into(place, key, offset, shape)
        return
    at = offset[dim]
    for block in place.unbind(dim):
        count = block.shape[dim]
        files.read_into(block, key, [*offset[:dim], at, *offset[dim + 1 :]], [*shape[:dim], count, *shape[dim + 1 :]])
        at += count
