"""Directories that nobody honest wrote: a sentence that names the file, before memory or time is taken."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fuzz import MANY, Raw, generators, guarded, json_bytes, mutated_bytes, mutated_json
from helpers.tiny_models import save_tiny

from meshpeft.models import DecoderConfig, ModelError, load_pretrained
from meshpeft.parallel.errors import MeshPEFTError
from meshpeft.training.base import find_base
from meshpeft.training.config import LayoutConfig

Tiny = Callable[[str], Path]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def directory(tiny: Tiny, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a small model, which may be changed."""
    return lambda family: Path(shutil.copytree(tiny(family), tmp_path / "model", dirs_exist_ok=True))


def read(directory: Path) -> None:
    """What `finetune` does with a base before anything else, and on each worker."""
    base = find_base(directory)
    base.check(LayoutConfig())
    base.load(torch.float32)


def refused(directory: Path) -> str:
    with guarded(directory, "model") as outcome:
        read(directory)
    assert outcome.error is not None
    return str(outcome.error)


def changed(directory: Path, **fields: Any) -> Path:
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_bytes(json_bytes({**content, **fields}))
    return directory


@pytest.mark.parametrize("family", ("llama", "phi3"))
@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"rms_norm_eps": "1e-05"}, "rms_norm_eps"),
        ({"num_attention_heads": 0}, ""),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000: no model has more than 1,024"),
        ({"num_hidden_layers": 10**18}, "no model has more than 1,024"),
        ({"num_hidden_layers": 1000}, "config"),
        ({"num_hidden_layers": True}, ""),
        ({"hidden_size": 10**12}, "no model has more than 2,147,483,647"),
        ({"hidden_size": 2**30}, ""),
        ({"intermediate_size": 2**31 - 2}, ""),
        ({"vocab_size": 2**31 - 1}, ""),
        ({"vocab_size": 97}, "its config says (97, 32)"),
        ({"num_attention_heads": -8}, ""),
        ({"rms_norm_eps": Raw("NaN")}, "'rms_norm_eps' is NaN"),
        ({"hidden_size": Raw("9" * 5000)}, "config.json cannot be read as JSON"),
        ({"x": Raw("[" * 100_000 + "]" * 100_000)}, "it is nested too deep"),
        ({"rope_parameters": {"rope_type": ["a"], "rope_theta": None}}, ""),
        ({"model_type": ["llama"]}, ""),
        ({"model_type": "a" * 10**6}, "aaa...aaa"),
        ({"vocab_size": None}, ""),
    ],
)
def test_a_configuration_that_is_none_is_refused(
    directory: Callable[[str], Path], family: str, fields: dict[str, Any], sentence: str
) -> None:
    assert sentence in refused(changed(directory(family), **fields))


def test_experts_that_no_file_holds_are_refused(directory: Callable[[str], Path]) -> None:
    for count in (10**6, 8000):
        assert "experts" in refused(changed(directory("qwen3_moe"), num_experts=count, num_local_experts=count))


def indexed(directory: Path, weight_map: Any) -> Path:
    (directory / "model.safetensors").rename(directory / "part.safetensors")
    (directory / INDEX).write_bytes(json_bytes({"weight_map": weight_map}))
    return directory


@pytest.mark.parametrize(
    ("weight_map", "sentence"),
    [
        (["part.safetensors"], "has no weight_map"),
        ({"model.norm.weight": 3}, "names 3 for 'model.norm.weight'; expected a file of the directory"),
        ({"model.norm.weight": ["part.safetensors"]}, "expected a file of the directory"),
        ({"model.norm.weight": "../model/part.safetensors"}, "expected a file of the directory"),
        ({"model.norm.weight": "/dev/zero"}, "expected a file of the directory"),
        ({"model.norm.weight": "a\x00b"}, "expected a file of the directory"),
        ({"model.norm.weight": "."}, "is a directory; expected a file"),
        ({"absent" * 10**5: "part.safetensors"}, "which the index promises"),
    ],
)
def test_an_index_that_is_none_is_refused(directory: Callable[[str], Path], weight_map: Any, sentence: str) -> None:
    assert sentence in refused(indexed(directory("llama"), weight_map))


@pytest.mark.parametrize("name", ("config.json", "model.safetensors"))
def test_what_is_no_file_is_not_opened(directory: Callable[[str], Path], name: str) -> None:
    model = directory("llama")
    (model / name).unlink()
    os.mkfifo(model / name)
    assert f"{name} is a pipe; expected a file" in refused(model)
    (model / name).unlink()
    (model / name).symlink_to("/dev/zero")
    assert f"{name} is a device; expected a file" in refused(model)
    (model / name).unlink()
    (model / name).symlink_to(name)
    assert f"{name} cannot be read: Too many levels of symbolic links" in refused(model)
    (model / name).unlink()
    (model / name).mkdir()
    assert f"{name} is a directory; expected a file" in refused(model)


@pytest.mark.parametrize("name", ("config.json", "model.safetensors"))
def test_a_file_that_may_not_be_read_is_called_so(
    directory: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model, real = directory("llama"), os.open

    def forbidden(path: Any, *args: Any, **options: Any) -> int:
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", forbidden)  # who runs the tests may be allowed to read everything
    with pytest.raises(ModelError, match=f"{name} cannot be read: Permission denied"):
        read(model)


def test_weights_are_read_through_links_as_caches_have_them(tiny: Tiny, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "revision"
    shutil.copytree(tiny("mistral"), blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert load_pretrained(snapshot).config == load_pretrained(tiny("mistral")).config


@pytest.mark.parametrize(
    "header",
    [
        b"\xff\xff\xff\xff\xff\xff\xff\x7f{",
        (1 << 40).to_bytes(8, "little") + b"{}",
        b"\x02\0\0\0\0\0\0\0[]",
        b"",
    ],
)
def test_a_header_that_is_none_is_refused(directory: Callable[[str], Path], header: bytes) -> None:
    model = directory("llama")
    (model / "model.safetensors").write_bytes(header)
    assert "model.safetensors is truncated or not a safetensors file" in refused(model)


# -- fuzzing -------------------------------------------------------------------------------------------------------

FUZZED = ("llama", "qwen2", "qwen3_moe", "phi3", "gpt2")


@MANY
def test_no_configuration_ends_in_a_traceback(count: int, tiny: Tiny, tmp_path: Path) -> None:
    good = {family: json.loads((tiny(family) / "config.json").read_text()) for family in FUZZED}
    for family in FUZZED:
        shutil.copytree(tiny(family), tmp_path / family)
    for number, rng in enumerate(generators("config", count)):
        family = FUZZED[number % len(FUZZED)]
        (tmp_path / family / "config.json").write_bytes(mutated_json(good[family], rng))
        with guarded(tmp_path, rng):
            read(tmp_path / family)


@MANY
def test_no_index_and_no_weights_file_ends_in_a_traceback(count: int, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=1)
    weights = (model / "model.safetensors").read_bytes()
    length = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + length])
    index = {"metadata": {}, "weight_map": {name: "part.safetensors" for name in header if name != "__metadata__"}}
    for number, rng in enumerate(generators("weights", count)):
        if number % 2:
            (model / "model.safetensors").unlink(missing_ok=True)
            (model / "part.safetensors").write_bytes(weights)
            (model / INDEX).write_bytes(mutated_json(index, rng))
        else:
            text = mutated_json(header, rng) if rng.random() < 0.8 else mutated_bytes(json_bytes(header), rng)
            content = len(text).to_bytes(8, "little") + text + weights[8 + length :]
            (model / "model.safetensors").write_bytes(content)
        with guarded(tmp_path, rng):
            read(model)


def test_plan_needs_a_configuration_alone(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copy(tiny("llama") / "config.json", tmp_path)
    base = find_base(tmp_path)
    assert isinstance(base.config, DecoderConfig)
    base.check(LayoutConfig(tp=2), weights=False)
    with pytest.raises(ModelError, match="holds no weights"):
        base.check(LayoutConfig(tp=2))
    with pytest.raises(MeshPEFTError, match="does not exist; expected a Hugging Face model directory"):
        find_base(tmp_path / "absent")
