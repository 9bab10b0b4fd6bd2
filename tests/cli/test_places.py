"""Every writer at places that people have: mount points, read-only parents, disks that are full at the last moment."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import adapted

from meshpeft.checkpoint import export_peft_adapter, save_checkpoint
from meshpeft.cli.main import main
from meshpeft.models import load_pretrained, save_pretrained
from meshpeft.parallel.errors import MeshPEFTError

ADAPTER = {"adapter_model.safetensors", "adapter_config.json"}
MODEL = {"model.safetensors", "config.json"}


class Writers:
    """What writes files for others, by name: each takes the directory, and replaces what is there."""

    def __init__(self, base: Path, data: Path, folder: Path) -> None:
        self.base, self.data, self.run = base, data, folder / "run"
        self.finetune(self.run, "--save-every", "1")

    def finetune(self, to: Path, *more: str) -> None:
        options = ["--rank=2", "--seq-length=48", "--batch-size=2", "--steps=1", "--eval-every=0", "--overwrite"]
        self._main("finetune", "--model", self.base, "--data", self.data, "--output-dir", to, *options, *more)

    def export(self, to: Path) -> None:
        self._main("export", "--checkpoint", self.run, "--to", to, "--overwrite")

    def merge(self, to: Path) -> None:
        self._main("merge", "--adapter", self.run, "--to", to, "--overwrite")

    def save_pretrained(self, to: Path) -> None:
        save_pretrained(load_pretrained(self.base), to, overwrite=True)

    def export_peft_adapter(self, to: Path) -> None:
        export_peft_adapter(adapted(self.base), to, overwrite=True)

    def save_checkpoint(self, to: Path) -> None:
        save_checkpoint(adapted(self.base), to, step=1)

    def _main(self, *arguments: object) -> None:
        assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def writers(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Writers:
    return Writers(base, data, tmp_path_factory.mktemp("writers"))


@contextmanager
def failing(
    monkeypatch: pytest.MonkeyPatch, functions: tuple[str, ...], number: int, when: Callable[[Path, Path], bool]
) -> Iterator[None]:
    """Functions of `os` fail for the paths (the first and the last argument) that `when` names."""

    def call(real: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any, **options: Any) -> Any:
            paths = [Path(argument) for argument in arguments if isinstance(argument, str | os.PathLike)]
            if paths and when(paths[0], paths[-1]):
                raise OSError(number, os.strerror(number))
            return real(*arguments, **options)

        return changed

    with monkeypatch.context() as patched:
        for name in functions:
            patched.setattr(os, name, call(getattr(os, name)))
        yield


def files(directory: Path) -> dict[str, bytes]:
    """What shows, but for the finished files of a publication that failed."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and not path.relative_to(directory).parts[0].startswith("finished-")
    }


@pytest.mark.parametrize(
    ("writer", "expected"),
    [
        ("finetune", {*ADAPTER, "run.json", "metrics.jsonl", "loss.png"}),
        ("export", {*ADAPTER, "run.json"}),
        ("merge", {*MODEL, "tokenizer.json"}),
        ("save_pretrained", MODEL),
        ("export_peft_adapter", ADAPTER),
        ("save_checkpoint", {"step-00000001/manifest.json"}),
    ],
)
def test_a_writer_needs_its_directory_alone_and_loses_nothing_where_it_cannot_finish(
    writer: str,
    expected: set[str],
    writers: Writers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    to = tmp_path / "to"
    to.mkdir()
    write = getattr(writers, writer)
    # A mount point (EBUSY, EXDEV), or below a directory that may only be read.
    changes = ("mkdir", "rename", "replace", "unlink", "rmdir")
    with failing(monkeypatch, changes, errno.EBUSY, lambda first, last: tmp_path in (first.parent, last.parent)):
        write(to)
    before = files(to)
    assert expected <= before.keys() and not [name for name in before if name.startswith(".")]
    assert {path.stat().st_mode & 0o777 for path in to.rglob("*") if path.is_file()} == {0o666 & ~_umask()}

    def into_its_place(source: Path, target: Path) -> bool:
        named = target.name in ("adapter_model.safetensors", "model.safetensors", "step-00000001")
        return target.parent == to and named and source.parent.name != "replaced" and ".removed" not in source.name

    capsys.readouterr()
    torch.manual_seed(1)
    with (
        failing(monkeypatch, ("rename", "replace"), errno.ENOSPC, into_its_place),
        pytest.raises((MeshPEFTError, AssertionError)) as failed,
    ):
        write(to)
    assert files(to) == before
    said = str(failed.value) if isinstance(failed.value, MeshPEFTError) else capsys.readouterr().err
    assert "No space left on device" in said
    if writer != "save_checkpoint":  # which leaves the one before
        finished = Path(said.strip().partition("; the finished files are in ")[2])
        assert finished.parent == to and (expected & {*ADAPTER, *MODEL}) <= {path.name for path in finished.iterdir()}


def _umask() -> int:
    umask = os.umask(0o022)
    os.umask(umask)
    return umask
