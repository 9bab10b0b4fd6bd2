"""Files that were cut, flipped or forged: one kind of error every time, no crash, and nothing half-loaded."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft  # noqa: F401  # what its import leaves is not the doing of a file
import pytest
import torch
from helpers.adapters import adapted
from helpers.checkpoint_jobs import train
from helpers.fuzz import MANY, Generator, Raw, generators, guarded, json_bytes, mutated_json
from helpers.oracle_runs import OPTIONS, make_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from meshpeft.checkpoint import (
    CheckpointError,
    export_peft_adapter,
    load_checkpoint,
    load_peft_adapter,
    save_checkpoint,
)
from meshpeft.checkpoint.manifest import MANIFEST
from meshpeft.models import Decoder, load_pretrained
from meshpeft.parallel import ModelParallelConfig
from meshpeft.peft import LoRA

Tiny = Callable[[str], Path]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-2, 9), max_size=3),
    st.lists(st.text(max_size=3), max_size=2),
    st.just({}),
)


def fuzzed(examples: int) -> Callable[[Any], Any]:
    return settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def damaged(data: st.DataObject, content: bytes, positions: st.SearchStrategy[int]) -> bytes:
    """Bytes with one of them flipped, added or taken away, or the rest cut off."""
    changed, position = bytearray(content), data.draw(positions)
    how = data.draw(st.sampled_from(["flip", "cut", "insert", "remove"]))
    if how == "flip":
        changed[position] ^= data.draw(st.integers(1, 255))
    elif how == "cut":
        del changed[position:]
    else:
        changed[position : position + (how == "remove")] = b"x" * (how == "insert")
    return bytes(changed)


def forged(data: st.DataObject, content: Any) -> None:
    """Change one value in plain JSON, at any depth; or take it away, or add one."""
    place, parent, key = content, content, None
    while isinstance(place, dict | list) and len(place):
        keys = st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1)
        parent, key = place, data.draw(keys)
        place = parent[key]
        if data.draw(st.integers(0, 3)) == 0:
            break
    how = data.draw(st.sampled_from(["change", "change", "change", "remove", "add"]))
    if how == "change":
        parent[key] = data.draw(LEAVES)
    elif how == "remove":
        del parent[key]
    elif isinstance(parent, dict):
        parent[data.draw(st.text(max_size=4))] = data.draw(LEAVES)
    else:
        parent.append(data.draw(LEAVES))


def snapshot(model: nn.Module) -> list[tuple[str, torch.Tensor, bool]]:
    return [(name, value.detach().clone(), value.requires_grad) for name, value in model.named_parameters()]


def unchanged(model: nn.Module, before: list[tuple[str, torch.Tensor, bool]]) -> bool:
    after = snapshot(model)
    return len(after) == len(before) and all(
        a[0] == b[0] and torch.equal(a[1], b[1]) and a[2] == b[2] for a, b in zip(after, before, strict=True)
    )


# -- checkpoints ---------------------------------------------------------------------------------------------------


def trained(seed: int = 0) -> tuple[Decoder, torch.optim.AdamW]:
    model = LoRA(**{**OPTIONS, "seed": seed})(make_model(ModelParallelConfig()))
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model, optimizer = trained()
    train(model, optimizer, range(1))
    save_checkpoint(model, folder, step=1, optimizer=optimizer)
    return folder / "step-00000001"


def loads(folder: Path) -> bool:
    """Whether a checkpoint loads; if not, by a clear error, and without a trace in model, optimizer and generator."""
    model, optimizer = trained(seed=1)
    before, generator = snapshot(model), torch.get_rng_state()
    try:
        load_checkpoint(model, folder, optimizer=optimizer)
    except CheckpointError:
        assert unchanged(model, before)
        assert not optimizer.state and torch.equal(torch.get_rng_state(), generator)
        return False
    return True


@fuzzed(60)
@given(data=st.data())
def test_a_damaged_checkpoint_is_an_error_and_changes_nothing(data: st.DataObject, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    path = folder / data.draw(st.sampled_from(sorted(os.listdir(folder))))
    content = path.read_bytes()
    path.write_bytes(damaged(data, content, st.integers(0, len(content) - 1)))
    if loads(folder):
        # Only white space of the manifest's head and end means nothing.
        assert json.loads(path.read_text().splitlines()[0]) == json.loads(content.splitlines()[0])


@fuzzed(60)
@given(data=st.data())
def test_a_manifest_that_lies_is_an_error(data: st.DataObject, saved: Path, tmp_path: Path) -> None:
    """Whoever changes a manifest can change its checksum with it."""
    folder = tmp_path / "step-00000001"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    content = json.loads((folder / MANIFEST).read_text().splitlines()[1])
    forged(data, content)
    text = json.dumps(content, separators=(",", ":"))
    head = {"format": "meshpeft checkpoint", "version": 1, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (folder / MANIFEST).write_text(f"{json.dumps(head)}\n{text}\n")
    loads(folder)


# -- adapters ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "adapter"
    export_peft_adapter(adapted(tiny("llama")), folder)
    return folder


def reads(folder: Path, tiny: Tiny) -> Decoder | None:
    """The model with the adapter of a folder; `None` after a clear error that left the model as it was."""
    model = load_pretrained(tiny("llama"), torch.float64)
    before = snapshot(model)
    try:
        return load_peft_adapter(model, folder)
    except CheckpointError:
        assert unchanged(model, before)
        return None


@fuzzed(40)
@given(data=st.data())
def test_a_damaged_adapter_config_is_an_error_or_still_one(
    data: st.DataObject, exported: Path, tiny: Tiny, tmp_path: Path
) -> None:
    folder = shutil.copytree(exported, tmp_path / "adapter", dirs_exist_ok=True)
    content = (exported / CONFIG).read_bytes()
    (folder / CONFIG).write_bytes(damaged(data, content, st.integers(0, len(content) - 1)))
    reads(folder, tiny)


@fuzzed(60)
@given(data=st.data())
def test_an_adapter_config_that_lies_is_an_error_or_another_adapter(
    data: st.DataObject, exported: Path, tiny: Tiny, tmp_path: Path
) -> None:
    folder = shutil.copytree(exported, tmp_path / "adapter", dirs_exist_ok=True)
    content = json.loads((exported / CONFIG).read_text())
    forged(data, content)
    (folder / CONFIG).write_text(json.dumps(content))
    reads(folder, tiny)


@fuzzed(60)
@given(data=st.data())
def test_a_damaged_adapter_file_is_an_error_and_never_another_adapter(
    data: st.DataObject, exported: Path, tiny: Tiny, tmp_path: Path
) -> None:
    folder = shutil.copytree(exported, tmp_path / "adapter", dirs_exist_ok=True)
    content = (exported / WEIGHTS).read_bytes()
    # Half of the damage goes to the header, a small part of the file.
    header = 8 + int.from_bytes(content[:8], "little")
    positions = st.one_of(st.integers(0, header - 1), st.integers(header, len(content) - 1))
    (folder / WEIGHTS).write_bytes(damaged(data, content, positions))
    model = reads(folder, tiny)
    if model is not None:
        # Some bytes mean nothing: a space, or the key of the metadata.
        export_peft_adapter(model, tmp_path / "again", overwrite=True)
        found, expected = load_file(tmp_path / "again" / WEIGHTS), load_file(exported / WEIGHTS)
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@fuzzed(60)
@given(data=st.data())
def test_an_adapter_header_that_lies_is_an_error_or_another_adapter(
    data: st.DataObject, exported: Path, tiny: Tiny, tmp_path: Path
) -> None:
    folder = shutil.copytree(exported, tmp_path / "adapter", dirs_exist_ok=True)
    content = (exported / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    forged(data, header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    reads(folder, tiny)


# -- files of hostile values -----------------------------------------------------------------------------------------


def sealed(content: bytes) -> bytes:
    """The file of a manifest's content, whose checksum is right."""
    head = {"format": "meshpeft checkpoint", "version": 1, "sha256": hashlib.sha256(content).hexdigest()}
    return json.dumps(head).encode() + b"\n" + content + b"\n"


@MANY
def test_no_manifest_ends_in_a_traceback(count: int, saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "step-00000001")
    good = json.loads((saved / MANIFEST).read_text().splitlines()[1])
    for rng in generators("manifest", count):
        # Half of the changes are to what is not checked when it is parsed.
        part = rng.choice((None, None, None, "model", "optimizer", "random"))
        if part is None:
            content = mutated_json(good, rng)
        else:
            content = json_bytes({**good, part: Raw(mutated_json(good[part], rng).decode("utf-8", "replace"))})
        (folder / MANIFEST).write_bytes(sealed(content))
        with guarded(tmp_path, rng):
            load_into_new(folder)


@MANY
def test_no_slices_of_a_checkpoint_end_in_a_traceback(count: int, saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "step-00000001")
    name = "rank-00000.safetensors"
    good, manifest = (saved / name).read_bytes(), json.loads((saved / MANIFEST).read_text().splitlines()[1])
    for rng in generators("slices", count):
        content = with_header(good, rng)
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (folder / name).write_bytes(content)
        (folder / MANIFEST).write_bytes(sealed(json.dumps(manifest).encode()))
        with guarded(tmp_path, rng):
            load_into_new(folder)


def load_into_new(folder: Path) -> None:
    model, optimizer = trained(seed=1)
    load_checkpoint(model, folder, optimizer=optimizer)


def with_header(content: bytes, rng: Generator) -> bytes:
    """A safetensors file whose header has other values."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = mutated_json(header, rng)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


@MANY
@pytest.mark.parametrize("name", (CONFIG, WEIGHTS))
def test_no_adapter_ends_in_a_traceback(name: str, count: int, exported: Path, tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "adapter")
    good = (exported / name).read_bytes()
    fields = {**json.loads(good), "rank_pattern": {"q_proj": 2, r".*\.[01]\..*": 3}} if name == CONFIG else {}
    model = load_pretrained(tiny("llama"))
    for rng in generators(name, count):
        (folder / name).write_bytes(mutated_json(fields, rng) if name == CONFIG else with_header(good, rng))
        with guarded(tmp_path, rng):
            model = load_peft_adapter(model, folder)
            model = load_pretrained(tiny("llama"))  # the next one needs a model without adapters


@pytest.mark.parametrize("name", (CONFIG, WEIGHTS))
def test_what_is_no_file_is_not_opened(name: str, exported: Path, tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "adapter")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with guarded(tmp_path, name) as outcome:
        load_peft_adapter(load_pretrained(tiny("llama")), folder)
    assert f"{name} is a pipe; expected a file" in str(outcome.error)


@pytest.mark.parametrize("name", (MANIFEST, "rank-00000.safetensors"))
def test_no_pipe_of_a_checkpoint_is_opened(name: str, saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "step-00000001")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with guarded(tmp_path, name) as outcome:
        load_into_new(folder)
    assert f"{name} is a pipe; expected a file" in str(outcome.error)


# -- programs in files ---------------------------------------------------------------------------------------------


class _Program:
    """What a pickle may do when it is loaded."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("ran",)


def test_no_file_can_run_a_program(
    saved: Path, exported: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    program = pickle.dumps(_Program())
    for name in (".metadata", MANIFEST, "rank-00000.safetensors"):
        folder = shutil.copytree(saved, tmp_path / f"checkpoint {name}")
        (folder / name).write_bytes(program)
        assert loads(folder) == (name == ".metadata")  # where torch.distributed.checkpoint has its own pickle
    for name in (WEIGHTS, CONFIG, "adapter_model.bin"):
        folder = shutil.copytree(exported, tmp_path / f"adapter {name}")
        (folder / name).write_bytes(program)
        if name.endswith(".bin"):
            (folder / WEIGHTS).unlink()
        assert reads(folder, tiny) is None
    assert not (tmp_path / "ran").exists()
    pickle.loads(program)
    assert (tmp_path / "ran").exists()


def test_no_pickle_is_read(saved: Path, exported: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle was read")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert loads(saved) and reads(exported, tiny) is not None
