"""The identity of a model that a checkpoint is for: the shapes of its adapters, and checksums of its frozen base.

An adapter is of use on its own base model only. So a checkpoint of adapters lists every frozen parameter with a
checksum of its values, which is the same at every layout: the sum over the elements of bits x (a weight that depends on
the element's index in the global tensor), modulo 2^64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshpeft.checkpoint.storage import dtype_name
from meshpeft.hub.tensor_files import CheckpointError
from meshpeft.parallel.errors import first_few, shown
from meshpeft.parallel.mesh import ParallelAxis, is_simulated, on_each_rank, parallel_group_info
from meshpeft.parallel.sharded_tensor import ShardedTensor
from meshpeft.parallel.states import all_reduce
from meshpeft.peft import LowRankAdapter, adapted_layers, adapter_wrappers
from meshpeft.quantization import packed_form

__all__ = ["check_same_model", "checksums_of_slices", "describe_adapters", "describe_base"]

# 2^64 / golden ratio, as a signed number: its multiples are spread over all 64 bits.
_SPREAD = -7046029254386353131
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# On a CPU what fits into its caches: fifteen times as fast.
_ELEMENTS_AT_ONCE = {False: 1 << 22, True: 1 << 17}

_CHANGED = "less its principal part"

# Checksums by model, with the tensors that they were computed from and their versions. The references are weak: the id
# of a tensor that is gone may be another's by now.
_Versions = list[tuple["ref[Tensor]", int]]
_known: WeakKeyDictionary[nn.Module, tuple[_Versions, dict[str, list[Any]]]] = WeakKeyDictionary()


def describe_adapters(model: nn.Module) -> dict[str, Any]:
    """Map the full name of each adapted layer to its method, and the options of its parts that decide numbers."""
    found: dict[str, Any] = {}
    for name, wrapper in adapted_layers(model):
        if wrapper.is_merged:
            raise CheckpointError(f"{name}: its adapter is merged into the base; unmerge it first")
        parts = {term.path: _options(term.adapter) for term in wrapper.terms()}
        found[name] = {"method": type(wrapper).__name__, "parts": parts}
    return found


def _options(adapter: LowRankAdapter) -> dict[str, Any]:
    options: dict[str, Any] = {"rank": adapter.dim, "alpha": float(adapter.alpha), "use_rslora": adapter.use_rslora}
    if adapter.share_expert_adapters is not None:
        options["share_expert_adapters"] = adapter.share_expert_adapters
    return options


def describe_base(model: nn.Module, frozen: Sequence[ShardedTensor]) -> dict[str, list[Any]]:
    """Map the key of each frozen tensor to `[type, global shape, checksum]`. A collective.

    A weight less its principal part has no checksum; those of the other tensors identify the base.

    Args:
        model: Model of the tensors. Checksums are kept until one of them changes.
        frozen: This rank's slices of them, the same keys in the same order on every rank.
    """
    if not frozen:
        return {}
    known = _known.get(model)
    stale = known is None or not _still_true(known[0], frozen)
    # Decided together: where one rank's tensors changed, all ranks compute.
    any_stale = torch.tensor(int(stale), device=frozen[0].source.device)
    any_stale = all_reduce(any_stale, parallel_group_info().world, dist.ReduceOp.MAX)
    if known is None or bool(any_stale):
        versions = [(ref(entry.source), entry.source._version) for entry in frozen]
        known = _known[model] = (versions, _checksums(model, frozen))
    decomposed = _decomposed(model)
    return {
        entry.key: [*known[1][entry.key][:2], decomposed[id(entry.source)]]
        if id(entry.source) in decomposed
        else known[1][entry.key]
        for entry in frozen
    }


def _decomposed(model: nn.Module) -> dict[int, str]:
    """Map the id of each tensor that is made from a decomposition of a weight to what it is instead of a checksum.

    Every run decomposes and rounds again: the weights whose principal part was moved to their adapters (PiSSA), and
    packed ones that hold it in addition to the remainder.
    """
    found: dict[int, str] = {}
    moved: set[int] = set()
    for _, wrapper in adapter_wrappers(model):
        if any(term.adapter.start is not None for term in wrapper.terms()):
            moved.add(id(wrapper.to_wrap))
            found[id(wrapper.stored_weight())] = _CHANGED
    for layer in model.modules():
        packed = packed_form(layer)
        if packed is not None and (packed.principal is not None or id(layer) in moved):
            stored = f"{_CHANGED}, {packed.storage.name}/{packed.block_size}"
            found.update((id(tensor), stored) for tensor in packed.stored_tensors())
    return found


def _still_true(versions: _Versions, frozen: Sequence[ShardedTensor]) -> bool:
    return len(versions) == len(frozen) and all(
        source() is entry.source and version == entry.source._version
        for (source, version), entry in zip(versions, frozen, strict=True)
    )


def checksums_of_slices(model: nn.Module, entries: Sequence[ShardedTensor]) -> list[int]:
    """Compute a checksum of each slice by itself, and of its offset. Not a collective.

    Args:
        model: Model of the slices. A checksum is kept until its tensor changes.
        entries: This rank's slices.
    """
    return [int(_own_sum(model, entry)) for entry in entries]


# `_weighted_sum` of each slice: one pass over the base is enough for a run.
_sums: WeakKeyDictionary[nn.Module, dict[tuple[str, tuple[int, ...]], tuple[ref[Tensor], int, Tensor]]] = (
    WeakKeyDictionary()
)


def _own_sum(model: nn.Module, entry: ShardedTensor) -> Tensor:
    if is_simulated():  # where a slice is, is one number for each rank
        return _weighted_sum(entry)
    known = _sums.setdefault(model, {})
    key = (entry.key, tuple(entry.global_offset))
    if key in known:
        source, changes, total = known[key]
        if source() is entry.source and changes == entry.source._version:
            return total
    total = _weighted_sum(entry)
    known[key] = (ref(entry.source), entry.source._version, total)
    return total


def _checksums(model: nn.Module, frozen: Sequence[ShardedTensor]) -> dict[str, list[Any]]:
    by_axes: dict[tuple[ParallelAxis, ...], list[ShardedTensor]] = {}
    for entry in frozen:
        by_axes.setdefault(() if entry.layout is None else entry.layout.shard_axes, []).append(entry)
    sums: dict[str, int] = {}
    for axes, entries in by_axes.items():
        totals = torch.stack([_own_sum(model, entry).to(entries[0].source.device) for entry in entries])
        for axis in axes:
            totals = all_reduce(totals, axis)
        for entry, total in zip(entries, totals.tolist(), strict=True):
            # Several entries of one rank may be slices of one tensor (prepended axes).
            sums[entry.key] = sums.get(entry.key, 0) + total
    return {
        entry.key: [dtype_name(entry.dtype), list(entry.global_shape), f"{sums[entry.key] % 2**64:016x}"]
        for entry in frozen
    }


@torch.no_grad()
def _weighted_sum(entry: ShardedTensor) -> Tensor:
    return _sum_of_slice(entry.data, list(entry.global_offset), list(entry.global_shape))


@on_each_rank
def _sum_of_slice(values: Tensor, offset: list[int], shape: list[int]) -> Tensor:
    """Sum a slice that starts at `offset` in a tensor of `shape`: an int64 scalar."""
    if values.dim() == 0:
        values, offset, shape = values.view(1), [0], [1]
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    if values.numel() == 0:
        return total
    # The places in one row, and where each row begins: an index for every element would take several times the memory.
    inside = torch.zeros((), dtype=torch.int64, device=values.device)
    for dim in range(1, values.dim()):
        index = torch.arange(values.shape[dim], device=values.device) + offset[dim]
        inside = inside.unsqueeze(-1) + index * math.prod(shape[dim + 1 :])
    weights = 2 * inside.reshape(-1) + 1
    rows = (torch.arange(values.shape[0], device=values.device) + offset[0]) * (2 * math.prod(shape[1:]))
    step = max(1, _ELEMENTS_AT_ONCE[values.device.type == "cpu"] // weights.numel())
    for start in range(0, values.shape[0], step):
        part = values[start : start + step].contiguous()
        bits = part.view(_BITS[part.element_size()]).to(torch.int64).view(len(part), -1) + 1
        total = total + (bits * weights).sum() + (bits.sum(1) * rows[start : start + step]).sum()
    return total * _SPREAD


def check_same_model(stored: Mapping[str, Any], found: Mapping[str, Any], directory: object) -> None:
    """Check that a checkpoint's model is this one.

    Args:
        stored: `{"adapters": .., "base": ..}` of the checkpoint.
        found: `{"adapters": .., "base": ..}` of the model.
        directory: Directory of the checkpoint, for the message.

    Raises:
        CheckpointError: They differ; the message names the first difference.
    """
    adapters, own = stored["adapters"], found["adapters"]
    for name in sorted({*adapters, *own}):
        if name not in own:
            raise CheckpointError(f"another target set: {directory} has an adapter on {name}, the model has none")
        if name not in adapters:
            raise CheckpointError(f"another target set: the model has an adapter on {name}, {directory} has none")
        if adapters[name] != own[name]:
            raise CheckpointError(f"{name}: {_difference(adapters[name], own[name], directory)}")
    for name in sorted({*stored["base"], *found["base"]}):
        theirs, ours = stored["base"].get(name), found["base"].get(name)
        if theirs is None or ours is None:
            with_it, without = ("the model", directory) if theirs is None else (directory, "the model")
            raise CheckpointError(f"another base model: {with_it} has {name}, {without} has not")
        for what, (a, b) in zip(("type", "shape"), zip(theirs, ours, strict=True), strict=False):
            if a != b:
                raise CheckpointError(f"another base model: {name} has {what} {_cut(a)} in {directory}, {_cut(b)} here")
        if theirs != ours:
            raise CheckpointError(f"another base model: {name} has other values here than where {directory} was made")


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any], directory: object) -> str:
    if theirs["method"] != ours["method"]:
        return f"another method: {directory} was made with {_cut(theirs['method'])}, the model has {ours['method']}"
    for part in sorted({*theirs["parts"], *ours["parts"]}):
        a, b = theirs["parts"].get(part), ours["parts"].get(part)
        if a is None or b is None:
            there, missing = ("the model", directory) if a is None else (directory, "the model")
            return f"another target set: {there} adapts {part}, {missing} does not"
        for option in sorted({*a, *b}):
            if a.get(option) != b.get(option):
                return f"{option} is {_cut(a.get(option))} in {directory}, {b.get(option)} in the model"
    return f"{directory} has {shown(theirs)}, the model {shown(ours)}"


def _cut(value: Any) -> str:
    """A value of the manifest in a message, where names stand without quotes."""
    return first_few([value]) if isinstance(value, str) else shown(value)
