"""What cannot be saved or loaded: each is a sentence that names the first difference, and changes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoint_jobs import train
from helpers.oracle_runs import OPTIONS, make_model
from helpers.simulate import simulate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from meshpeft.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from meshpeft.checkpoint.manifest import MANIFEST
from meshpeft.models import Decoder
from meshpeft.parallel import ModelParallelConfig
from meshpeft.peft import LoRA


def adapted(seed: int = 0, base_seed: int | None = None, **options: Any) -> Decoder:
    base = make_model(ModelParallelConfig())
    if base_seed is not None:
        base.reset_parameters(base_seed)
    return LoRA(**{**OPTIONS, "seed": seed, **options})(base)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer, range(1))
    save_checkpoint(model, folder, step=1, optimizer=optimizer)
    return folder / "step-00000001"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_seed": 1}, r"another base model: decoder.final_layernorm.*|another base model: .* has other values"),
        ({"dim": 2}, r"linear_fc1: rank is 4 in .*step-00000001, 2 in the model"),
        ({"alpha": 9}, r"linear_fc1: alpha is 8.0 in .*, 9.0 in the model"),
        ({"use_rslora": True}, r"use_rslora is False in .*, True in the model"),
        (
            {"target_modules": ["linear_proj"]},
            r"another target set: .* has an adapter on decoder.layers.0.mlp.linear_fc1",
        ),
        ({"target_modules": ["*"]}, r"another target set: the model has an adapter on output_layer"),
        ({"lora_dtype": torch.float32}, r"linear_in.weight has type float64 in .*, float32 in the model"),
    ],
    ids=["base", "rank", "alpha", "scale", "fewer targets", "more targets", "type"],
)
def test_a_checkpoint_of_another_model_is_refused(options: dict[str, Any], message: str, saved: Path) -> None:
    model = adapted(**options)
    before = state(model)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model, saved)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_another_optimizer_is_refused(saved: Path, tmp_path: Path) -> None:
    model = adapted()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for optimizer, message in (
        (torch.optim.AdamW(parameters[1:]), "group 0 of the optimizer differs from that in .*linear_qkv"),
        (torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:]}]), "has 2 groups, in .* it had 1"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(model, saved, optimizer=optimizer)
        assert not optimizer.state
    save_checkpoint(model, tmp_path, step=1)
    with pytest.raises(CheckpointError, match="holds no optimizer state"):
        load_checkpoint(model, tmp_path, optimizer=torch.optim.AdamW(parameters))


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = adapted()
    stranger = torch.optim.AdamW([nn.Parameter(torch.zeros(3))])
    with pytest.raises(CheckpointError, match=r"parameter of shape \(3,\) that is not one of the model's"):
        save_checkpoint(model, tmp_path, step=1, optimizer=stranger)
    with pytest.raises(CheckpointError, match="extra values must be plain JSON"):
        save_checkpoint(model, tmp_path, step=1, extra={"tensor": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="step=-1"):
        save_checkpoint(model, tmp_path, step=-1)
    with pytest.raises(CheckpointError, match="nothing to train"):
        save_checkpoint(make_model(ModelParallelConfig()).requires_grad_(False), tmp_path, step=1)
    with simulate(tp=2), pytest.raises(CheckpointError, match="simulated ranks"):
        save_checkpoint(model, tmp_path, step=1)
    assert not list(tmp_path.iterdir())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_checkpoint_is_an_error_and_changes_nothing(data: st.DataObject, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    path = folder / data.draw(st.sampled_from(sorted(os.listdir(folder))))
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    how = data.draw(st.sampled_from(["flip", "cut", "insert", "remove"]))
    if how == "flip":
        content[position] ^= data.draw(st.integers(1, 255))
    elif how == "cut":
        del content[position:]
    else:
        content[position : position + (how == "remove")] = b"x" * (how == "insert")
    path.write_bytes(content)
    model = adapted(seed=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    before, generator = state(model), torch.get_rng_state()
    try:
        load_checkpoint(model, folder, optimizer=optimizer)
    except CheckpointError:
        assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
        assert not optimizer.state and torch.equal(torch.get_rng_state(), generator)
    else:
        # Only white space of the manifest's head and end means nothing.
        assert json.loads(path.read_text().splitlines()[0]) == json.loads(
            (saved / MANIFEST).read_text().splitlines()[0]
        )


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_manifest_that_lies_is_an_error(data: st.DataObject, saved: Path, tmp_path: Path) -> None:
    """Whoever changes a manifest can change its checksum with it."""
    folder = tmp_path / "step-00000001"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    content = json.loads((folder / MANIFEST).read_text().splitlines()[1])
    place: Any = content
    while isinstance(place, dict | list) and len(place):
        parent, key = (
            place,
            data.draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1)),
        )
        place = parent[key]
        if data.draw(st.integers(0, 3)) == 0:
            break
    lies = st.one_of(
        st.none(), st.integers(), st.text(max_size=5), st.lists(st.integers(-2, 9), max_size=3), st.just({})
    )
    parent[key] = data.draw(lies)
    content_text = json.dumps(content, separators=(",", ":"))

    head = {"format": "meshpeft checkpoint", "version": 1, "sha256": hashlib.sha256(content_text.encode()).hexdigest()}
    (folder / MANIFEST).write_text(f"{json.dumps(head)}\n{content_text}\n")
    model = adapted(seed=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    before = state(model)
    try:
        load_checkpoint(model, folder, optimizer=optimizer)
    except CheckpointError:
        assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
        assert not optimizer.state
