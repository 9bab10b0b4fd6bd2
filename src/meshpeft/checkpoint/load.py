"""Load a checkpoint at any layout: all of it, or nothing.

How optimizer state is resharded: a state of a parameter (`exp_avg`) has the parameter's layout. It is saved as the
parameter is: each rank writes its own slices of one global tensor, under a key that no layout changes, and the parts of
a fused parameter are saved separately (`OptimizerContent.slices`, `checkpoint/content.py`). `Incoming` expects, for
every slice that this rank holds of a parameter, the same slice of each of its states; torch.distributed.checkpoint
reads those parts of the stored slices that overlap it, and `_joined` puts the parts of a fused parameter together in
this layout's order. A state that is one number (`step`) is stored once, under the parameter's name, and every rank
reads it. A state of any other shape than its parameter's is refused when it is to be saved.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load

from meshpeft.checkpoint.content import (
    MODEL,
    OPTIMIZER,
    RANDOM,
    ModelContent,
    OptimizerContent,
    check_random_state,
    restore_random_state,
    state_key,
)
from meshpeft.checkpoint.coordination import agreed, checkpoint_group, explained, rank_and_world_size
from meshpeft.checkpoint.directory import CheckpointDirectory
from meshpeft.checkpoint.identity import check_same_model, describe_adapters, describe_base
from meshpeft.checkpoint.manifest import MANIFEST, Manifest
from meshpeft.checkpoint.save import finish_saves
from meshpeft.checkpoint.storage import Reader, Slice, SliceId, SliceLoadPlanner, dtype_name, labelled
from meshpeft.hub.tensor_files import CheckpointError
from meshpeft.parallel.agreement import all_or_none
from meshpeft.parallel.errors import blamed_on, shown
from meshpeft.parallel.sharded_tensor import ShardedTensor, expert_key, sharded_tensors

__all__ = ["Incoming", "LoadedCheckpoint", "find_checkpoint", "latest_checkpoint", "load_checkpoint"]


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint that was found, or loaded.

    Attributes:
        path: Path of the checkpoint.
        step: Optimizer steps that had been done.
        extra: The caller's own state.
        skipped: Newer checkpoints that were broken, each with what is wrong with it.
    """

    path: Path
    step: int
    extra: Mapping[str, Any]
    skipped: tuple[str, ...] = ()


def latest_checkpoint(directory: str | Path) -> Path | None:
    """Find the newest complete checkpoint in a directory, every byte checked; `None` if there is none.

    Not a collective. Broken ones are named in a warning.
    """
    checkpoints = CheckpointDirectory(Path(directory))
    for step in checkpoints.steps():
        path = checkpoints.of_step(step)
        try:
            manifest = Manifest.read(path)
            for name in manifest.files:
                manifest.check_file(path, name, values=True)
        except CheckpointError as error:
            warnings.warn(f"{error}; trying the one before it", stacklevel=2)
        else:
            return path
    return None


def find_checkpoint(directory: str | Path) -> LoadedCheckpoint:
    """Find what `load_checkpoint` would load from a directory, without a model. A collective.

    Raises:
        CheckpointError: The directory is no checkpoint and holds no whole one.
    """
    finish_saves()
    path, manifest, skipped = _choose(CheckpointDirectory(Path(directory)), checkpoint_group())
    return LoadedCheckpoint(path, manifest.step, manifest.extra, skipped)


def load_checkpoint(
    model: nn.Module,
    directory: str | Path,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    check_base: bool = True,
    check: Callable[[dict[str, Any], Path], None] | None = None,
) -> LoadedCheckpoint:
    """Load a checkpoint into a model, and an optimizer. A collective: every rank calls it, and reads its slices.

    The layout that wrote it does not matter. All files are checked before anything is read, each by one of the ranks,
    and the values are taken over when every rank has its own.

    Args:
        model: Built as the one that was saved: the same base with the same adapters.
        directory: A checkpoint; or a directory of them, of which the newest whole one is taken.
        optimizer: Its state is loaded, with the options of its groups, and the random generators are set.
        check_base: The frozen base must be the one that the checkpoint was made on; without this, adapters may be
            loaded on to a base of another type, or one without values.
        check: The caller's own comparison of what it gave as `extra`, and the path for its message; what it raises is
            raised on every rank before anything is changed.

    Raises:
        CheckpointError: The directory is no checkpoint and holds no whole one; or it is of another base model, rank,
            method, target set, type or optimizer. The message names the first difference, on every rank; model,
            optimizer and generators are as they were.
    """
    finish_saves()
    group = checkpoint_group()
    path, manifest, skipped = _choose(CheckpointDirectory(Path(directory)), group)
    with all_or_none(f"loading {path}", CheckpointError):
        content = ModelContent.of(model, full_model=manifest.full_model)
        state = None if optimizer is None else OptimizerContent.of(optimizer, content)
        own = {"adapters": describe_adapters(model)}
    base = describe_base(model, content.frozen) if check_base else manifest.model.get("base")
    with all_or_none(f"loading {path}", CheckpointError), _consistent(path):
        if check is not None:
            check(dict(manifest.extra), path)
        check_same_model(manifest.model, {**own, "base": base}, path)
        incoming = Incoming(path, manifest, content, state)
    with explained(f"loading {path}"):
        load(
            labelled(incoming.reads),
            storage_reader=Reader(path, manifest.tensors),
            planner=SliceLoadPlanner(),
            process_group=group,
        )
    with all_or_none(f"loading {path}", CheckpointError), _consistent(path):
        take_over = incoming.prepared()
    take_over()
    return LoadedCheckpoint(path, manifest.step, manifest.extra, skipped)


def _choose(
    checkpoints: CheckpointDirectory, group: dist.ProcessGroup | None
) -> tuple[Path, Manifest, tuple[str, ...]]:
    """Choose the best candidate whose files are all as they were written; every rank checks some of them."""
    rank, world_size = rank_and_world_size(group)
    with all_or_none(f"reading {checkpoints.path}", CheckpointError):
        candidates = checkpoints.candidates()
    broken: list[str] = []
    for path in agreed(candidates, f"reading {checkpoints.path}", group):
        try:
            with all_or_none("checking", CheckpointError):  # every message names its file
                manifest = Manifest.read(path)
                for number, name in enumerate(manifest.files):
                    manifest.check_file(path, name, values=number % world_size == rank)
        except CheckpointError as error:
            broken.append(str(error))
        else:
            for text in broken if rank == 0 else ():
                warnings.warn(f"{text}; {path.name} is taken instead", stacklevel=3)
            return path, manifest, tuple(broken)
    if len(broken) == 1:
        raise CheckpointError(broken[0])
    raise CheckpointError(f"{checkpoints.path} holds no whole checkpoint; the newest: {broken[0]}")


def _consistent(path: Path) -> AbstractContextManager[None]:
    """Name the manifest in errors of reading its free sections, whose form was not checked when it was parsed."""
    return blamed_on(f"{path / MANIFEST} is inconsistent", CheckpointError)


@dataclass
class Incoming:
    """Buffers for every slice that this rank reads from a checkpoint, made after all slices were compared.

    Attributes:
        path, manifest: Those of the checkpoint.
        content, state: The model's and the optimizer's tensors that it is loaded into.
        room: Buffers of this rank's slices.
        reads: Boxes of what is stored that are read into them.
        known: Checkpoint keys that are expected, on this rank or another.
        states: Names of the optimizer's states of each parameter.
    """

    path: Path
    manifest: Manifest
    content: ModelContent
    state: OptimizerContent | None
    room: dict[SliceId, Tensor] = field(default_factory=dict)
    reads: list[Slice] = field(default_factory=list)
    known: set[str] = field(default_factory=set)
    states: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for entry in self.content.stored:
            self._expect(MODEL + entry.key, entry, entry.dtype)
        self._nothing_else(MODEL)
        if self.state is not None:
            self._compare_groups(self.state)
            for name, entries in self.state.entries.items():
                self._expect_states(name, entries)
            for group in self.state.groups():
                self._compare_states(group["parameters"])
            self._nothing_else(OPTIMIZER)
            [generator] = sharded_tensors(RANDOM, torch.get_rng_state(), None)
            self._expect(RANDOM, generator, generator.dtype)

    def _expect(self, key: str, entry: ShardedTensor, dtype: torch.dtype | None) -> None:
        """Expect a slice, which is stored under its key, or, of stacked experts, under one key for each expert."""
        names = self._stored_names(key, entry)
        shape = entry.global_shape if names == [key] else entry.global_shape[1:]
        for name in names:
            stored = self.manifest.tensors.get(name)
            if stored is None:
                raise CheckpointError(f"{self.path} lacks {name}, which the model has")
            if stored.shape != shape:
                raise CheckpointError(f"{name} has shape {stored.shape} in {self.path}, {shape} in the model")
            wanted = self.manifest.tensors[names[0]].dtype if dtype is None else dtype_name(dtype)
            if stored.dtype != wanted:
                raise CheckpointError(f"{name} has type {stored.dtype} in {self.path}, {wanted} in the model")
        values = torch.empty(entry.local_shape, dtype=_dtype(self.manifest.tensors[names[0]].dtype))
        self.room[key, entry.global_offset] = values
        if names == [key]:
            self._read(key, values, shape, entry.global_offset)
        else:
            first = entry.global_offset[0]
            for expert, name in zip(values, names[first : first + len(values)], strict=True):
                self._read(name, expert, shape, entry.global_offset[1:])
        self.known.update(names)

    def _stored_names(self, key: str, entry: ShardedTensor) -> list[str]:
        """List the keys under which a slice is stored: one, or one for each expert."""
        if entry.layout is None or not entry.layout.expert or not self._holds_experts(key):
            return [key]
        return [expert_key(key, expert) for expert in range(entry.global_shape[0])]

    def _holds_experts(self, key: str) -> bool:
        return key not in self.manifest.tensors and expert_key(key, 0) in self.manifest.tensors

    def _holds(self, key: str) -> bool:
        return key in self.manifest.tensors or self._holds_experts(key)

    def _read(self, key: str, values: Tensor, global_shape: tuple[int, ...], offset: tuple[int, ...]) -> None:
        self.known.add(key)
        self.reads.append(Slice(key, values.dtype, global_shape, offset, tuple(values.shape), lambda: values))

    def _nothing_else(self, prefix: str) -> None:
        for key in self.manifest.tensors:
            if key.startswith(prefix) and key not in self.known:
                raise CheckpointError(f"{self.path} holds {key}, for which there is no place here")

    def _compare_groups(self, state: OptimizerContent) -> None:
        stored, own = self.manifest.optimizer, state.groups()
        if stored is None:
            raise CheckpointError(f"{self.path} holds no optimizer state; it was saved without its optimizer")
        if len(stored) != len(own):
            raise CheckpointError(f"the optimizer has {len(own)} groups, in {self.path} it had {len(stored)}")
        for number, (theirs, ours) in enumerate(zip(stored, own, strict=True)):
            if theirs["parameters"] != ours["parameters"]:
                differing = sorted(set(theirs["parameters"]) ^ set(ours["parameters"]))
                what = shown(differing[0]) if differing else "the order of its parameters"
                raise CheckpointError(f"group {number} of the optimizer differs from that in {self.path}: {what}")
            for name in sorted({*theirs["options"], *ours["options"]}):
                value, own_value = theirs["options"].get(name), ours["options"].get(name)
                if _kind(value) != _kind(own_value):
                    raise CheckpointError(
                        f"the optimizer's {shown(name)} is {shown(value)} in {self.path}, {own_value!r} here"
                    )

    def _expect_states(self, name: str, entries: list[ShardedTensor]) -> None:
        """Expect the states of a parameter, each of which is one number, or sharded like the parameter."""
        for state in self._state_names():
            number = self.manifest.tensors.get(state_key(state, name))
            if number is not None and number.shape == ():
                values = self.room[state_key(state, name), ()] = torch.empty((), dtype=_dtype(number.dtype))
                self._read(state_key(state, name), values, (), ())
            elif any(self._holds(state_key(state, entry.key)) for entry in entries):
                for entry in entries:
                    self._expect(state_key(state, entry.key), entry, None)
            else:
                continue
            self.states.setdefault(name, []).append(state)

    def _compare_states(self, group: Sequence[str]) -> None:
        """Check that all parameters of a group that has made a step have the same states."""
        wanted = max((self.states.get(name, []) for name in group), key=len, default=[])
        for name in group:
            for state in sorted(set(wanted) - set(self.states.get(name, wanted))):
                raise CheckpointError(
                    f"{self.path} lacks {state_key(state, name)}, a state that it has of other parameters"
                )

    def _state_names(self) -> list[str]:
        keys = (key.removeprefix(OPTIMIZER) for key in self.manifest.tensors if key.startswith(OPTIMIZER))
        return sorted({key.partition(".")[0] for key in keys})

    def prepared(self) -> Callable[[], None]:
        """Put the parts together; return a function that takes the values over, and cannot fail."""
        values = _joined(self.content.stored, lambda entry: self.room[MODEL + entry.key, entry.global_offset])

        def take_over() -> None:
            with torch.no_grad():
                for source, value in values:
                    source.copy_(value)

        if self.state is None:
            return take_over
        optimizer, state, torch_state = self.state.optimizer, self._optimizer_state(self.state), self.room[RANDOM, (0,)]
        check_random_state(self.manifest.random, torch_state)
        _rehearse(optimizer, state)

        def take_over_all() -> None:
            take_over()
            optimizer.load_state_dict(state)
            restore_random_state(self.manifest.random, torch_state)

        return take_over_all

    def _optimizer_state(self, state: OptimizerContent) -> dict[str, Any]:
        """Make torch's `Optimizer.state_dict`, in which parameters are numbered."""
        assert self.manifest.optimizer is not None
        numbers = {name: number for number, name in enumerate(state.entries)}
        groups = [
            {
                **{name: tuple(v) if isinstance(v, list) else v for name, v in group["options"].items()},
                "params": [numbers[name] for name in group["parameters"]],
            }
            for group in self.manifest.optimizer
        ]
        found: dict[int, dict[str, Tensor]] = {}
        for name, states in self.states.items():
            entries = state.entries[name]
            found[numbers[name]] = {}
            for what in states:
                number = self.room.get((state_key(what, name), ()))
                found[numbers[name]][what] = self._state(what, entries) if number is None else number
        return {"state": found, "param_groups": groups}

    def _state(self, what: str, entries: list[ShardedTensor]) -> Tensor:
        [(_, value)] = _joined(entries, lambda entry: self.room[state_key(what, entry.key), entry.global_offset])
        return value


def _rehearse(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state and undo that: an optimizer may refuse one after it has changed itself.

    It replaces its containers when it loads, and does not write into them.
    """
    before = dict(vars(optimizer))
    try:
        optimizer.load_state_dict(state)
    finally:
        vars(optimizer).clear()
        vars(optimizer).update(before)


def _joined(entries: Iterable[ShardedTensor], values: Callable[[ShardedTensor], Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Join the new values of the parts of each parameter or buffer to its local value, in fused order."""
    by_source: dict[int, list[ShardedTensor]] = {}
    for entry in entries:
        by_source.setdefault(id(entry.source), []).append(entry)
    found = []
    for parts in by_source.values():
        source, layout = parts[0].source, parts[0].layout
        new = [values(part).view(part.local_shape[part.prepended_axes :]) for part in parts]
        found.append((source, new[0] if layout is None else layout.join_parts(new)))
    return found


def _kind(option: Any) -> Any:
    """Reduce an optimizer's option to what must agree; numbers may differ."""
    if isinstance(option, list | tuple):
        return [_kind(item) for item in option]
    return float if isinstance(option, float | int) and not isinstance(option, bool) else option


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"{shown(name)} is not a type of tensors")
    return found
