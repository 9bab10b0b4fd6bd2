"""A disk that fills up, or fails, at any moment of a save: a sentence, and what was there is as it was."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import pytest
import torch
from helpers.adapters import adapted
from helpers.checkpoint_jobs import At as Layout
from helpers.checkpoint_jobs import build, train
from safetensors.torch import load_file

from meshpeft.checkpoint import (
    CheckpointError,
    export_peft_adapter,
    latest_checkpoint,
    load_checkpoint,
    merge_adapter,
    save_checkpoint,
)
from meshpeft.models import ModelError

Tiny = Callable[[str], Path]
CALLS = ("mkdir", "rename", "replace", "fsync", "open", "unlink", "rmdir")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel's own limit: a write beyond it fails as on a full disk, with part of it done."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def every_call_fails_once(
    monkeypatch: pytest.MonkeyPatch,
    before: Callable[[], None],
    save: Callable[[], object],
    after: Callable[[], None],
) -> int:
    """Let the first change of the file system fail, then the second, .. until `save` succeeds.

    Returns:
        How many there were.
    """
    for failing in count():
        before()
        made = 0

        def call(name: str, real: Callable[..., object], failing: int = failing) -> Callable[..., object]:
            def changed(*arguments: object, **options: object) -> object:
                nonlocal made
                made += 1
                if made == failing + 1:
                    raise OSError(errno.ENOSPC, f"No space left on device ({name})")
                return real(*arguments, **options)

            return changed

        with monkeypatch.context() as patched:
            for name in CALLS:
                patched.setattr(os, name, call(name, getattr(os, name)))
            # What fails while it cleans up after a save that is whole is not the save's failure.
            with suppress(CheckpointError):
                save()
        after()
        if made <= failing:
            return failing
    raise AssertionError


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path: Path) -> None:
    model, optimizer = build(Layout(), "dense, lora")
    train(model, optimizer, range(1))
    first = save_checkpoint(model, tmp_path, step=1, optimizer=optimizer).path
    sizes = sorted({path.stat().st_size for path in first.iterdir()})
    assert len(sizes) == 2
    limits = [0, 1, sizes[0] // 2, sizes[0] - 1, sizes[0] + 1, sizes[1] // 2, sizes[1] - 1]
    for number, size in enumerate(limits):
        with files_of_at_most(size), pytest.raises(CheckpointError, match=rf"saving to {tmp_path}: File too large"):
            save_checkpoint(model, tmp_path, step=2, optimizer=optimizer, asynchronous=number % 2 == 1).wait()
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        assert load_checkpoint(model, tmp_path, optimizer=optimizer).step == 1
    save_checkpoint(model, tmp_path, step=2, optimizer=optimizer)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000002"


@pytest.mark.parametrize("step", (2, 1), ids=("the next step", "the same step"))
def test_whatever_fails_in_a_save_some_checkpoint_is_whole(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = build(Layout(), "dense, lora")
    found = set()

    def again(directory: Path, step: int, which: str) -> None:
        save_checkpoint(model, directory, step=step, optimizer=optimizer, keep=1, extra={"which": which})

    def prepare() -> None:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        again(tmp_path / "run", 1, "old")

    def whole() -> None:
        loaded = load_checkpoint(model, tmp_path / "run", optimizer=optimizer)
        assert not loaded.skipped and loaded.step == (step if loaded.extra["which"] == "new" else 1)
        found.add(loaded.extra["which"])

    calls = every_call_fails_once(monkeypatch, prepare, lambda: again(tmp_path / "run", step, "new"), whole)
    assert calls > 10 and found == {"old", "new"}
    assert [path.name for path in (tmp_path / "run").iterdir()] == [f"step-0000000{step}"]


def test_an_adapter_that_does_not_fit_leaves_the_one_before(tiny: Tiny, tmp_path: Path) -> None:
    model, folder = adapted(tiny("llama")), tmp_path / "adapter"
    export_peft_adapter(model, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    changed = adapted(tiny("llama"), seed=1)
    sizes = [len(content) for content in before.values()]
    for size in (0, 1, min(sizes) - 1, min(sizes) + 1, max(sizes) // 2, max(sizes) - 1):
        with files_of_at_most(size), pytest.raises(CheckpointError, match=rf"writing {folder}: File too large"):
            export_peft_adapter(changed, folder, overwrite=True)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_whatever_fails_in_an_export_no_adapter_is_a_mixture(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, folder = [adapted(tiny("llama")), adapted(tiny("llama"), seed=1)], tmp_path / "adapter"
    contents = []
    for number, model in enumerate(models):
        export_peft_adapter(model, tmp_path / str(number))
        contents.append(load_file(tmp_path / str(number) / "adapter_model.safetensors"))

    def one_of_the_two() -> None:
        if (folder / "adapter_config.json").exists():  # without which it is no adapter
            found = load_file(folder / "adapter_model.safetensors")
            assert any(all(torch.equal(found[key], content[key]) for key in content) for content in contents)

    calls = every_call_fails_once(
        monkeypatch,
        lambda: export_peft_adapter(models[0], folder, overwrite=True),
        lambda: export_peft_adapter(models[1], folder, overwrite=True),
        one_of_the_two,
    )
    assert calls > 8


def test_a_model_that_does_not_fit_is_a_sentence(tiny: Tiny, tmp_path: Path) -> None:
    size = (tiny("llama") / "model.safetensors").stat().st_size
    for limit in (0, 100, size // 2):
        with (
            files_of_at_most(limit),
            pytest.raises(ModelError, match=rf"saving to {tmp_path}/merged: .*File too large"),
        ):
            merge_adapter(adapted(tiny("llama")), tmp_path / "merged")
        assert not list(tmp_path.iterdir())
