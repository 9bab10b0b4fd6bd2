"""Checkpoints outlive their layout, the process that wrote them, and the disk's failures."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoint_jobs import (
    At,
    build,
    failing_save,
    load_known,
    resume,
    save_known,
    train,
    train_and_save,
    whole,
)
from helpers.oracle_runs import METHODS, OPTIONS, TOLERANCE, make_model
from helpers.simulate import simulate
from helpers.workers import run_on_ranks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from meshpeft.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint
from meshpeft.checkpoint.manifest import MANIFEST, Manifest
from meshpeft.checkpoint.tensor_file import TensorFileReader
from meshpeft.models import Decoder
from meshpeft.parallel import ModelParallelConfig
from meshpeft.peft import LoRA

FAST = [At(), At(tp=2, sequence_parallel=True), At(dp=2)]
EVERY = [
    At(),
    At(tp=2),
    At(dp=2),
    At(tp=4),
    At(tp=2, dp=2),
    At(dp=4),
    At(tp=2, dp=2, sequence_parallel=True),
    At(tp=4, sequence_parallel=True),
]


def on(at: At, job: Callable[..., Any], *arguments: Any) -> Any:
    """A job's result at a layout: in this process, or rank 0's of others."""
    if at.world_size == 1:
        return job(at, *arguments)
    return run_on_ranks(at.world_size, job, at, *arguments)[0]


def check_bytes(folder: Path, sizes: dict[str, int]) -> None:
    """No slice is lost and none is there twice: the bytes on the disk are those of the global tensors."""
    manifest = Manifest.read(folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {MANIFEST, *manifest.files}
    stored = 0
    for name in manifest.files:
        with TensorFileReader(folder / name) as file:
            stored += sum(
                torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
                for tensor in file.tensors.values()
                if not tensor.name.startswith(("optimizer.step.", "random."))
            )
    assert stored == sum(sizes.values())


@pytest.mark.parametrize("method", METHODS)
def test_what_one_layout_saves_the_others_load(method: str, tmp_path: Path) -> None:
    for at in FAST:
        sizes = on(at, save_known, method, str(tmp_path / str(at)))
        check_bytes(tmp_path / str(at) / "step-00000007", sizes)
        for other in FAST:
            assert on(other, load_known, method, str(tmp_path / str(at))) == [], (at, other)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_what_each_of_eight_layouts_saves_every_other_loads(method: str, tmp_path: Path) -> None:
    for at in EVERY:
        sizes = on(at, save_known, method, str(tmp_path / str(at)))
        check_bytes(tmp_path / str(at) / "step-00000007", sizes)
    for other in EVERY:
        for at in EVERY:
            assert on(other, load_known, method, str(tmp_path / str(at))) == [], (at, other)


@pytest.mark.parametrize("at", [At(), At(tp=2, sequence_parallel=True)], ids=str)
def test_a_save_in_the_background_holds_the_values_of_its_moment(at: At, tmp_path: Path) -> None:
    on(at, save_known, "lora", str(tmp_path), True)
    assert load_known(At(), "lora", str(tmp_path)) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_undisturbed_one(method: str, tmp_path: Path) -> None:
    straight = train_and_save(At(), method, str(tmp_path), steps=4)
    resumed = resume(At(), method, str(tmp_path))
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    elsewhere = on(At(tp=2), resume, method, str(tmp_path))
    for name, value in straight.items():
        assert (elsewhere[name] - value).abs().max() <= TOLERANCE * value.abs().max(), name


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_are_ten_and_ten(method: str, tmp_path: Path) -> None:
    for at in (At(tp=2, sequence_parallel=True), At(dp=2)):
        straight = on(at, train_and_save, method, str(tmp_path / str(at)), 20)
        resumed = on(at, resume, method, str(tmp_path / str(at)))
        assert all(torch.equal(resumed[name], straight[name]) for name in straight)
        for other in (At(), At(tp=4), At(tp=2, dp=2)):
            elsewhere = on(other, resume, method, str(tmp_path / str(at)))
            for name, value in straight.items():
                assert (elsewhere[name] - value).abs().max() <= TOLERANCE * value.abs().max(), (name, other)


def test_dropout_goes_on_where_it_was(tmp_path: Path) -> None:
    def dropped() -> Decoder:
        return LoRA(dropout=0.3, **OPTIONS)(make_model(ModelParallelConfig()))

    model = dropped()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer, range(2))
    save_checkpoint(model, tmp_path, step=2, optimizer=optimizer)
    train(model, optimizer, range(2, 4))
    torch.manual_seed(5)
    again = dropped()
    its = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad])
    load_checkpoint(again, tmp_path, optimizer=its)
    train(again, its, range(2, 4))
    assert all(torch.equal(value, whole(model)[name]) for name, value in whole(again).items())


def test_a_full_model_is_loaded_without_its_base(tmp_path: Path) -> None:
    model, _ = build(At(), "lora")
    save_checkpoint(model, tmp_path, step=1, full_model=True)
    other, _ = build(At(), "lora")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(0.5)
    load_checkpoint(other, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


def test_the_newest_whole_checkpoint_is_taken_and_broken_ones_are_named(tmp_path: Path) -> None:
    model, optimizer = build(At(), "lora")
    for step in range(1, 6):
        train(model, optimizer, range(step, step + 1))
        save_checkpoint(model, tmp_path, step=step, optimizer=optimizer, extra={"step": step}, keep=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-0000000{step}" for step in range(2, 6)]
    file = "rank-00000.safetensors"
    (tmp_path / "step-00000005" / MANIFEST).unlink()
    content = bytearray((tmp_path / "step-00000004" / file).read_bytes())
    content[-3] ^= 1
    (tmp_path / "step-00000004" / file).write_bytes(content)
    (tmp_path / "step-00000003" / file).write_bytes(content[:-3])
    with pytest.warns(UserWarning, match="step-00000002 is taken instead") as warned:
        loaded = load_checkpoint(model, tmp_path, optimizer=optimizer)
    assert (loaded.step, loaded.extra) == (2, {"step": 2})
    for text, what in zip(loaded.skipped, ("has no manifest.json", "is damaged", "is cut"), strict=True):
        assert what in text and any(text in str(warning.message) for warning in warned)
    with pytest.warns(UserWarning, match="trying the one before it"):
        assert latest_checkpoint(tmp_path) == tmp_path / "step-00000002"
    assert latest_checkpoint(tmp_path / "elsewhere") is None


def test_what_a_killed_save_left_is_invisible_and_cleared_away(tmp_path: Path) -> None:
    model, _ = build(At(), "lora")
    for name in (".step-00000001.partial", ".step-00000000.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).write_text("half")
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"is not a checkpoint, and holds none"):
        load_checkpoint(model, tmp_path)
    save_checkpoint(model, tmp_path, step=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_disk_that_fills_up_on_one_rank_is_a_sentence_on_all(tmp_path: Path) -> None:
    for error, step in run_on_ranks(2, failing_save, str(tmp_path)):
        assert error == f"saving to {tmp_path}: No space left on device (rank 1)"
        assert step == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


# -- bad input -----------------------------------------------------------------------------------------------------


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
