"""What a checkpoint holds: slices of the model's and the optimizer's tensors, under keys that no layout changes.

`meshpeft.checkpoint.load` has how parameters and optimizer state are resharded.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from meshpeft.checkpoint.storage import Slice
from meshpeft.hub.adapter_tensors import refuse_sharded
from meshpeft.hub.tensor_files import CheckpointError
from meshpeft.parallel.errors import blamed_on
from meshpeft.parallel.mesh import ParallelAxis
from meshpeft.parallel.sharded_base import BlockTensor
from meshpeft.parallel.sharded_tensor import ShardedTensor, sharded_state_dict, sharded_tensors
from meshpeft.peft import adapter_wrappers

__all__ = [
    "MODEL",
    "OPTIMIZER",
    "RANDOM",
    "ModelContent",
    "OptimizerContent",
    "check_random_state",
    "random_state",
    "restore_random_state",
    "state_key",
]

MODEL = "model."
OPTIMIZER = "optimizer."
RANDOM = "random.torch"


@dataclass(frozen=True)
class ModelContent:
    """A model's tensors, each once: those that a checkpoint holds, and the frozen base that it presupposes.

    Attributes:
        stored, frozen: This rank's slices; the same keys in the same order on every rank.
    """

    stored: list[ShardedTensor]
    frozen: list[ShardedTensor]

    @classmethod
    def of(cls, model: nn.Module, *, full_model: bool) -> ModelContent:
        """Sort a model's tensors into those that are stored and the frozen ones.

        Args:
            model: Its adapters, whatever else is trainable, and running statistics are always stored.
            full_model: Store everything.

        Raises:
            CheckpointError: There is nothing to store; or the model's parameters are sharded by `fully_shard`.
        """
        refuse_sharded(
            model,
            "save with torch.distributed.checkpoint.state_dict, which knows its tensors; export_peft_adapter and "
            "load_peft_adapter gather and shard the adapter",
        )
        described = getattr(model, "sharded_state_dict", None)
        entries: Mapping[str, ShardedTensor] = described() if callable(described) else sharded_state_dict(model)
        wanted = _trained(model)
        seen: dict[int, str] = {}
        stored: list[ShardedTensor] = []
        frozen: list[ShardedTensor] = []
        for entry in entries.values():
            # A tied parameter is stored under the first of its names.
            if seen.setdefault(id(entry.source), entry.name) == entry.name:
                (stored if full_model or id(entry.source) in wanted else frozen).append(entry)
        if not stored:
            raise CheckpointError("the model has no adapter and nothing to train; save all of it with full_model=True")
        return cls(stored, frozen)

    def slices(self) -> list[Slice]:
        """List the slices to save, with the values as they are when they are read.

        A collective where the base is sharded over its replicas: of its tensors each rank takes some rows, as they are
        now, into the CPU's memory.
        """
        return [
            part
            for entry in self.stored
            for part in (
                _own_rows(MODEL + entry.key, entry, entry.source.store.axis)
                if isinstance(entry.source, BlockTensor)
                else [_slice(MODEL + entry.key, entry)]
            )
        ]


def _trained(model: nn.Module) -> set[int]:
    found = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    for _, wrapper in adapter_wrappers(model):
        found.update(map(id, wrapper.adapter.parameters()))
        found.update(map(id, wrapper.adapter.buffers()))
    for module in model.modules():
        if getattr(module, "track_running_stats", False):
            found.update(map(id, module.buffers(recurse=False)))
    return found


def _slice(key: str, entry: ShardedTensor) -> Slice:
    return Slice(key, entry.dtype, entry.global_shape, entry.global_offset, entry.local_shape, lambda: entry.data)


def _own_rows(key: str, entry: ShardedTensor, axis: ParallelAxis) -> list[Slice]:
    """Cut a slice that the ranks of an axis gather together into one for each of them."""
    values, dim = entry.data, entry.prepended_axes
    start, end = (len(values) * index // axis.world_size for index in (axis.rank, axis.rank + 1))
    own = values[start:end].to("cpu", copy=True)
    if start == end:
        return []
    offset, shape = list(entry.global_offset), list(entry.local_shape)
    offset[dim], shape[dim] = offset[dim] + start, end - start
    return [Slice(key, entry.dtype, entry.global_shape, tuple(offset), tuple(shape), lambda: own)]


@dataclass(frozen=True)
class OptimizerContent:
    """The state of an optimizer, by parameter name, and the options of its groups.

    Attributes:
        optimizer: The optimizer.
        names: Id of each of its parameters -> its name.
        entries: Name of each of its parameters -> this rank's slices of it.
    """

    optimizer: torch.optim.Optimizer
    names: Mapping[int, str]
    entries: Mapping[str, list[ShardedTensor]]

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, model: ModelContent) -> OptimizerContent:
        """Name the parameters of an optimizer.

        Raises:
            CheckpointError: It has a parameter that is not the model's, or that a checkpoint does not hold.
        """
        by_source: dict[int, list[ShardedTensor]] = {}
        for entry in model.stored:
            by_source.setdefault(id(entry.source), []).append(entry)
        names, entries = {}, {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                found = by_source.get(id(parameter))
                if found is None:
                    raise CheckpointError(
                        f"the optimizer has a parameter of shape {tuple(parameter.shape)} that is not one of the "
                        "model's trained ones"
                    )
                name = names[id(parameter)] = _parameter_name(found[0])
                entries[name] = found
        return cls(optimizer, names, entries)

    def groups(self) -> list[dict[str, Any]]:
        """List options and parameter names of each group, as plain JSON."""
        return [
            {
                "parameters": [self.names[id(parameter)] for parameter in group["params"]],
                "options": {name: _plain_option(name, value) for name, value in group.items() if name != "params"},
            }
            for group in self.optimizer.param_groups
        ]

    def slices(self) -> list[Slice]:
        """List the slices to save: each state tensor, sharded like its parameter, or one number for all ranks."""
        return [
            part
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            for state, value in self.optimizer.state.get(parameter, {}).items()
            for part in self._state_slices(parameter, state, value)
        ]

    def _state_slices(self, parameter: Tensor, state: str, value: Any) -> list[Slice]:
        name = self.names[id(parameter)]
        number = value if isinstance(value, Tensor) else torch.tensor(value)
        if number.dim() == 0:
            key = state_key(state, name)
            return [_slice(key, sharded_tensors(name, number, None)[0])]
        if number.shape != parameter.shape:
            raise CheckpointError(
                f"the optimizer's {state} of {name} has shape {tuple(number.shape)}, its parameter "
                f"{tuple(parameter.shape)}: only states of the same shape can be sharded like the parameter"
            )
        return [_slice(state_key(state, entry.key), replace(entry, source=number)) for entry in self.entries[name]]


def _parameter_name(entry: ShardedTensor) -> str:
    """Name a parameter; with its index where several parameters are slices of one global tensor."""
    return entry.name + "".join(f"[{index}]" for index in entry.global_offset[: entry.prepended_axes])


def state_key(state: str, key: str) -> str:
    """Make the key of a state of the optimizer from `exp_avg`, `linear_qkv.q.weight`."""
    return f"{OPTIMIZER}{state}.{key}"


def _plain_option(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    if isinstance(value, tuple | list):
        return [_plain_option(name, item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(f"the optimizer's option {name}={value!r} cannot be stored")


def random_state() -> tuple[dict[str, Any], Slice]:
    """Get the states of the generators of python, numpy and torch's CPU, which every rank seeds alike."""
    state = torch.get_rng_state()
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = cast(tuple[Any, ...], np.random.get_state())
    plain = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, keys.tolist(), int(position), int(has_gauss), float(cached)],
    }
    return plain, _slice(RANDOM, sharded_tensors(RANDOM, state, None)[0])


def check_random_state(plain: Mapping[str, Any], torch_state: Tensor) -> None:
    """Check that `restore_random_state` can set these states.

    Raises:
        CheckpointError: No generator has such a state.
    """
    with blamed_on("the states of the random generators are damaged", CheckpointError):
        _set_random_state(plain, torch_state, random.Random(), np.random.RandomState(), torch.Generator())


def restore_random_state(plain: Mapping[str, Any], torch_state: Tensor) -> None:
    """Set the states that were read by `random_state`."""
    _set_random_state(plain, torch_state, random, np.random, torch.default_generator)


def _set_random_state(
    plain: Mapping[str, Any], torch_state: Tensor, python_generator: Any, numpy_generator: Any, generator: Any
) -> None:
    version, numbers, gauss = plain["python"]
    kind, keys, position, has_gauss, cached = plain["numpy"]
    python_generator.setstate((version, tuple(numbers), gauss))
    numpy_generator.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    generator.set_state(torch_state)
