"""Every rank has read the same, found out before they compute anything together.

Each rank reads the model, the tokenizer and the data for itself, from the disk of its machine. Where one machine holds
another file under the same name, the run would train a mixture, and no number of it would tell. So the ranks compare:

| what | how |
|---|---|
| options, but for where files are | each value |
| versions of the packages that read and compute | each |
| config.json, generation_config.json | each entry |
| tokenizer | vocabulary and rules, special tokens, chat template |
| rows, of training and held out | SHA-256 |
| the base's files | each tensor's name, type and shape, and blocks of its values at places that no layout changes |
| the base as it was loaded | a checksum of every slice that several ranks hold |
| the adapter's files, where one is read | SHA-256 |

The blocks are `SAMPLED_BYTES` in all, spread evenly over every tensor, so all of a small model is read. Of a larger one
they tell a change of all of a tensor, and the checksums any change of a slice that another rank holds: all of
them under data parallel, replicated tensors under tensor parallel. What neither sees is a change of a few values of a
slice that one rank alone holds.

What is sent is a few checksums a rank; the descriptions themselves only once they are known to differ.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from meshpeft.checkpoint.content import ModelContent
from meshpeft.checkpoint.identity import checksums_of_slices
from meshpeft.data.batches import PackedRows
from meshpeft.hub.coded_files import model_files
from meshpeft.hub.tensor_files import read_json
from meshpeft.parallel.agreement import all_or_none, gathered
from meshpeft.parallel.errors import MeshPEFTError, first_few
from meshpeft.parallel.mesh import is_simulated, parallel_group_info

__all__ = ["InputsDiffer", "check_same_base", "check_same_inputs"]

SAMPLED_BYTES = 64 << 20
_BLOCK_BYTES = 4096

# Where files are, which machines may differ in: their content is compared. What only rank 0 does.
_PLACES = frozenset({"model", "data", "output_dir", "config", "resume", "adapter", "overwrite"})
_PACKAGES = ("meshpeft", "torch", "transformers", "tokenizers")
# Entries of a configuration that change nothing.
_REMARKS = frozenset({"_name_or_path", "transformers_version"})

# What is compared: name of a subject -> name of each of its parts -> its checksum, or itself where it is short.
_Description = Mapping[str, Mapping[str, str]]

_ADVICE = {
    "options": "start every process with the same command",
    "versions": "install the same versions everywhere",
    "configuration": "give every machine the same model directory",
    "tokenizer": "give every machine the same model directory",
    "weights": "give every machine the same model directory",
    "adapter": "give every machine the same adapter",
    "data": "give every machine the same data",
}


class InputsDiffer(MeshPEFTError):
    """Ranks of one run hold other options, data, or models than the rest."""


def check_same_inputs(
    options: Any,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: Mapping[str, PackedRows],
    adapter: Path | None = None,
) -> None:
    """Compare what every rank has read but not loaded yet. A collective.

    Args:
        options: Options, a dataclass.
        directory: Directory of the base model.
        tokenizer: Its tokenizer.
        rows: Rows by name.
        adapter: Directory of an adapter to load.

    Raises:
        InputsDiffer: Raised on every rank; it names the ranks, their machines, and what differs.
    """
    if parallel_group_info().world.world_size == 1 or is_simulated():
        return
    found: dict[str, dict[str, str]] = {}
    with all_or_none(f"comparing what was read of {directory}"):
        found["versions"] = {name: version(name) for name in _PACKAGES}
        given = {name: value for name, value in asdict(options).items() if name not in _PLACES}
        found["options"] = {f"--{name.replace('_', '-')}": repr(value) for name, value in given.items()}
        found["configuration"] = dict(_configuration(directory))
        found["tokenizer"] = dict(_tokenizer(tokenizer))
        found["data"] = {name: part.digest for name, part in rows.items()}
        found["weights"] = dict(_weights(directory))
        if adapter is not None:
            found["adapter"] = {path.name: _sha256(path.read_bytes()) for path in sorted(adapter.glob("adapter_*"))}
    _compare(found)


def check_same_base(model: nn.Module) -> None:
    """Compare the slices of the base that several ranks hold. A collective.

    Args:
        model: Model as it was loaded, without adapters.

    Raises:
        InputsDiffer: Raised on every rank.
    """
    world = parallel_group_info().world
    if world.world_size == 1 or is_simulated():
        return
    held: dict[tuple[str, ...], list[Any]] = {}
    for entry in ModelContent.of(model, full_model=True).stored:
        axes = () if entry.layout is None else entry.layout.shard_axes
        # Sharded over all ranks, a slice is on one only.
        if not entry.source.is_meta and math.prod(axis.world_size for axis in axes) < world.world_size:
            held.setdefault(tuple(axis.name for axis in axes), []).append(entry)
    found: dict[str, dict[str, str]] = {}
    for names, entries in held.items():
        sums = checksums_of_slices(model, entries)
        slices = {
            f"{entry.key} from {entry.global_offset}": f"{value:x}" for entry, value in zip(entries, sums, strict=True)
        }
        # Under this name are ranks that hold the same slices.
        found[f"weights sharded over {'+'.join(names)}: {_sha256(json.dumps(sorted(slices)).encode())}"] = slices
    _compare(found)


def _compare(found: _Description) -> None:
    """Raise on every rank if the ranks describe a subject differently. A collective."""
    short = {subject: _sha256(json.dumps(sorted(parts.items())).encode()) for subject, parts in found.items()}
    held = gathered((socket.gethostname(), short))
    subjects = list(dict.fromkeys(subject for _, own in held for subject in own))
    differing = [subject for subject in subjects if len({own[subject] for _, own in held if subject in own}) > 1]
    if not differing:
        return
    parts = gathered({subject: found[subject] for subject in differing if subject in found})
    words, others, first = [], set[int](), 0
    for subject in differing:
        first = next(rank for rank, own in enumerate(parts) if subject in own)
        names: dict[str, None] = {}
        for rank, own in enumerate(parts):
            if subject in own and own[subject] != parts[first][subject]:
                others.add(rank)
                every = {**parts[first][subject], **own[subject]}
                names |= {name: None for name in every if parts[first][subject].get(name) != own[subject].get(name)}
        words.append(f"{_title(subject)} ({first_few(list(names))})")
    where = ", ".join(f"rank {rank} ({held[rank][0]})" for rank in sorted(others)[:4])
    more = f" and {len(others) - 4} more" if len(others) > 4 else ""
    advice = "; ".join(dict.fromkeys(_ADVICE[_title(subject)] for subject in differing))
    raise InputsDiffer(
        f"{where}{more} read other inputs than rank {first} ({held[first][0]}): {', '.join(dict.fromkeys(words))}. "
        f"The ranks would train a mixture: {advice}"
    )


def _title(subject: str) -> str:
    return subject.partition(" ")[0]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _configuration(directory: Path) -> Iterator[tuple[str, str]]:
    for file in ("config.json", "generation_config.json"):
        path = directory / file
        for name, value in read_json(path).items() if os.path.lexists(path) else ():
            if name not in _REMARKS:
                yield f"{file}: {name}", _sha256(json.dumps(value, sort_keys=True).encode())


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str]]:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    yield "class", type(tokenizer).__name__
    yield "vocabulary and rules", _sha256(rules.encode())
    yield "chat template", _sha256(json.dumps(tokenizer.chat_template, sort_keys=True).encode())
    yield "special tokens", _sha256(repr(sorted(tokenizer.special_tokens_map.items())).encode())


def _weights(directory: Path) -> Iterator[tuple[str, str]]:
    """Yield each tensor of the files, with a checksum of its type, its shape, and some of its values."""
    with model_files(directory) as files:
        sizes = {name: math.prod(files.shape(name)) for name in sorted(files.names())}
        # An element is four bytes or fewer, but for a few.
        part = min(1.0, SAMPLED_BYTES / max(1, 4 * sum(sizes.values())))
        for name, size in sizes.items():
            shape = files.shape(name)
            digest = hashlib.sha256(f"{files.stored_type(name)} {shape}".encode())
            boxes = [()] if part == 1 or not shape or not size else list(_boxes(shape, part))
            for box in boxes:
                digest.update(files.view(name, box).contiguous().reshape(-1).view(torch.uint8).numpy().data)
            yield name, digest.hexdigest()[:16]


def _boxes(shape: tuple[int, ...], part: float) -> Iterator[tuple[slice, ...]]:
    """Small boxes of a tensor from its first to its last value, about this part of it, one at least."""
    size, least = math.prod(shape), _BLOCK_BYTES // 4
    # The dims from `dim` on make up a block, or more than one.
    dim = next((dim for dim in reversed(range(len(shape))) if math.prod(shape[dim:]) >= least), 0)
    inner = math.prod(shape[dim + 1 :])
    length = min(shape[dim], max(1, least // inner))
    count = max(1, round(size * part / (length * inner)))
    places = math.prod(shape[: dim + 1])
    for number in range(count):
        *outer, start = _unravelled((places - length) * number // max(1, count - 1), shape[: dim + 1])
        start = min(start, shape[dim] - length)
        yield (*(slice(index, index + 1) for index in outer), slice(start, start + length))


def _unravelled(place: int, shape: tuple[int, ...]) -> list[int]:
    found = []
    for size in reversed(shape):
        place, index = divmod(place, size)
        found.append(index)
    return found[::-1]
