"""What merge copies beside the weights never comes from outside of the model, and never goes over it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from meshpeft.hub.tensor_files import files_to_copy
from meshpeft.models import ModelError
from meshpeft.training.config import ConfigError, MergeConfig
from meshpeft.training.export import merge

NAMES = ("tokenizer.json", "generation_config.json", "vocab.txt")


def model(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.json").write_text("own")
    return directory


def test_a_link_out_of_the_directory_is_not_followed(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    (tmp_path / "secret").write_text("of this machine")
    (base / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match=r"vocab.txt is a link to .*secret, outside of .*base"):
        files_to_copy(base, NAMES)
    (base / "vocab.txt").unlink()
    (base / "vocab.txt").symlink_to("tokenizer.json")
    assert files_to_copy(base, NAMES) == [base / "tokenizer.json", base / "vocab.txt"]


def test_links_within_a_cache_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--a--b"
    blobs, snapshot = model(repository / "blobs"), repository / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/tokenizer.json")
    assert files_to_copy(snapshot, NAMES) == [snapshot / "tokenizer.json"]
    other = model(tmp_path / "hub" / "models--a--c" / "blobs")
    (snapshot / "vocab.txt").symlink_to(other / "tokenizer.json")
    with pytest.raises(ModelError, match=r"vocab.txt is a link"):
        files_to_copy(snapshot, NAMES)
    shutil.rmtree(blobs)
    (snapshot / "vocab.txt").unlink()
    with pytest.raises(ModelError, match=r"tokenizer.json does not exist"):
        files_to_copy(snapshot, NAMES)


def test_a_pipe_is_not_copied(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    os.mkfifo(base / "vocab.txt")
    with pytest.raises(ModelError, match=r"vocab.txt is a pipe; expected a file"):
        files_to_copy(base, NAMES)


def test_a_merge_does_not_go_over_its_base(tmp_path: Path) -> None:
    base, adapter = model(tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (tmp_path / "link").symlink_to(base)
    for to in (base, tmp_path / "link"):
        with pytest.raises(ConfigError, match="is the base model itself; choose another directory"):
            merge(MergeConfig(adapter=adapter, to=to, model=base, overwrite=True))
    with pytest.raises(ConfigError, match="nowhere: holds no adapter"):
        merge(MergeConfig(adapter=tmp_path / "nowhere", to=tmp_path / "to", model=base))
    assert sorted(path.name for path in base.iterdir()) == ["config.json", "tokenizer.json"]
