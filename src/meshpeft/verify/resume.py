"""Checkpoints of simulated ranks: what each holds is written by this process, and each takes its own slices back.

`save_checkpoint` and `load_checkpoint` let the ranks meet in a group of processes, which simulated ranks are not. What
they write and read (`content`, `slices`, `storage`, `incoming`) is used here as it is, once for each rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed._local_tensor import maybe_disable_local_tensor_mode
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from meshpeft.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from meshpeft.checkpoint.content import ModelContent, OptimizerContent, random_state
from meshpeft.checkpoint.directory import CheckpointDirectory
from meshpeft.checkpoint.identity import check_same_model, describe_adapters, describe_base
from meshpeft.checkpoint.incoming import Incoming
from meshpeft.checkpoint.manifest import MANIFEST, FileRecord, Manifest, TensorRecord
from meshpeft.checkpoint.slices import Place, Slice, SliceLoadPlanner, SliceSavePlanner, labelled
from meshpeft.checkpoint.storage import Reader, Writer
from meshpeft.models import LanguageModel
from meshpeft.parallel import is_simulated
from meshpeft.parallel.sharded_tensor import ShardedTensor
from meshpeft.verify.simulation import index_on_rank, of_ranks, on_rank, ranks

__all__ = ["restore", "store"]


def store(model: LanguageModel, optimizer: torch.optim.Optimizer, directory: Path, step: int) -> Path:
    """Write a checkpoint of all ranks of this layout; where there is one, as every run does.

    Raises:
        CheckpointError: the slices of the ranks do not make up the tensors, each part once; ranks that hold the same
            slice hold other values; it is not one rank's to write.
    """
    if not is_simulated():
        return save_checkpoint(model, directory, step=step, optimizer=optimizer).path
    content = ModelContent.of(model, full_model=False)
    state = OptimizerContent.of(optimizer, content)
    generators, generator = random_state()
    _check_one_writer(content.stored)
    slices = _of_all_ranks([generator, *content.slices(), *state.slices()])
    manifest = Manifest(
        step=step,
        full_model=False,
        tensors={},
        files={},
        model={"adapters": describe_adapters(model), "base": describe_base(model, content.frozen)},
        optimizer=state.groups(),
        random=generators,
    )
    checkpoints = CheckpointDirectory(directory)

    def publish(tensors: dict[str, TensorRecord], files: dict[str, FileRecord]) -> None:
        complete = replace(manifest, tensors=tensors, files=files)
        complete.check_tensors()
        (checkpoints.partial(step) / MANIFEST).write_bytes(complete.encode())
        checkpoints.publish(step)

    writer = Writer(checkpoints.partial(step), lambda: checkpoints.prepare(step), publish)
    with maybe_disable_local_tensor_mode():
        save(labelled(slices.values()), storage_writer=writer, planner=SliceSavePlanner(), no_dist=True)
    return checkpoints.of_step(step)


def restore(model: LanguageModel, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Load a checkpoint into all ranks of this layout; where there is one, as every run does.

    Raises:
        CheckpointError: it is of another model, or its tensors do not fit.
    """
    if not is_simulated():
        load_checkpoint(model, path, optimizer=optimizer)
        return
    manifest = Manifest.read(path)
    content = ModelContent.of(model, full_model=False)
    found = {"adapters": describe_adapters(model), "base": describe_base(model, content.frozen)}
    check_same_model(manifest.model, found, path)
    simulated = ranks()
    with maybe_disable_local_tensor_mode():
        own = {rank: _load_on(rank, optimizer, content, path, manifest) for rank in simulated}
    with torch.no_grad():
        for entry in content.stored:
            entry.source.mul_(1)  # it was written rank by rank: what follows its versions has to see that it changed
    for number, group in enumerate(optimizer.param_groups):
        group.update({name: value for name, value in own[0].param_groups[number].items() if name != "params"})
        for parameter in group["params"]:
            states = {rank: each.state[on_rank(parameter, rank)] for rank, each in own.items()}
            optimizer.state[parameter] = {
                name: of_ranks({rank: state[name] for rank, state in states.items()}) for name in states[0]
            }


def _load_on(
    rank: int, optimizer: torch.optim.Optimizer, content: ModelContent, path: Path, manifest: Manifest
) -> torch.optim.Optimizer:
    """Load one rank's slices; returns an optimizer over its tensors, with its state."""
    groups = [
        {**group, "params": [on_rank(parameter, rank) for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    own = type(optimizer)(groups)  # type: ignore[call-arg]  # AdamW's, not the abstract class's
    held = ModelContent([_on(rank, entry) for entry in content.stored], [])
    incoming = Incoming(path, manifest, held, OptimizerContent.of(own, held))
    load(
        labelled(incoming.reads),
        storage_reader=Reader(path, manifest.tensors),
        planner=SliceLoadPlanner(),
        no_dist=True,
    )
    incoming.prepared()()
    return own


def _on(rank: int, entry: ShardedTensor) -> ShardedTensor:
    return replace(entry, source=on_rank(entry.source, rank), global_offset=_offset(entry.global_offset, rank))


def _offset(offset: Iterable[int], rank: int) -> tuple[int, ...]:
    return tuple(index_on_rank(index, rank) for index in offset)


def _of_all_ranks(parts: Iterable[Slice]) -> Mapping[Place, Slice]:
    """Every rank's slices, each once."""
    found: dict[Place, Slice] = {}
    for part in parts:
        values = part.local()
        for rank in ranks():
            held, offset = on_rank(values, rank), _offset(part.offset, rank)
            first = found.setdefault((part.key, offset), replace(part, offset=offset, values=partial(_itself, held)))
            with maybe_disable_local_tensor_mode():
                if not torch.equal(first.values(), held):
                    raise CheckpointError(f"ranks that hold the same part of {part.key} hold other values of it")
    return found


def _itself(values: Tensor) -> Tensor:
    return values


def _check_one_writer(entries: Iterable[ShardedTensor]) -> None:
    """Whether of the ranks that hold the same slice one is to write it."""
    for entry in entries:
        writers: dict[tuple[int, ...], int] = {}
        for rank in ranks():
            place = _offset(entry.global_offset, rank)
            writers[place] = writers.get(place, 0) + (index_on_rank(entry.replica_id, rank) == 0)
        if set(writers.values()) != {1}:
            raise CheckpointError(f"{entry.key}: a slice is to be written by {max(writers.values())} ranks, not by one")
