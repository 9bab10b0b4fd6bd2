"""Checkpoints outlive their layout, the process that wrote them, and the disk's failures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.checkpoint_jobs import (
    FAST_MODELS,
    MODELS,
    At,
    build,
    failing_save,
    load_known,
    on,
    resume,
    save_known,
    train,
    train_and_save,
    whole,
)
from helpers.oracle_runs import OPTIONS, TOLERANCE, make_model
from helpers.workers import run_on_ranks
from torch import Tensor

from meshpeft.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint
from meshpeft.checkpoint.manifest import MANIFEST
from meshpeft.models import Decoder
from meshpeft.parallel import ModelParallelConfig
from meshpeft.peft import LoRA

BACKGROUND = [("dense, lora", At()), ("dense, lora", At(tp=2, sequence_parallel=True)), ("MoE, whole", At(dp=2, ep=2))]


@pytest.mark.parametrize(("model", "at"), BACKGROUND, ids=str)
def test_a_save_in_the_background_holds_the_values_of_its_moment(model: str, at: At, tmp_path: Path) -> None:
    on(at, save_known, model, str(tmp_path), True)
    assert load_known(At(), model, [str(tmp_path)]) == []


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Another layout's run: the same sums, in another order."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= TOLERANCE * value.abs().max(), name


@pytest.mark.parametrize("model", FAST_MODELS)
def test_a_resumed_run_is_the_undisturbed_one(model: str, tmp_path: Path) -> None:
    straight = train_and_save(At(), model, str(tmp_path), steps=4)
    resumed = resume(At(), model, str(tmp_path))
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    assert_close(on(At(dp=2, ep=2), resume, model, str(tmp_path)), straight)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_twenty_steps_are_ten_and_ten(model: str, tmp_path: Path) -> None:
    for at in (At(tp=2, ep=2, etp=1, sequence_parallel=True), At(dp=2)):
        folder = str(tmp_path / str(at))
        straight = on(at, train_and_save, model, folder, 20)
        resumed = on(at, resume, model, folder)
        assert all(torch.equal(resumed[name], straight[name]) for name in straight)
        for other in (At(), At(tp=4), At(tp=2, dp=2, ep=4, etp=1)):
            assert_close(on(other, resume, model, folder), straight)


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
    model, _ = build(At(), "dense, lora")
    save_checkpoint(model, tmp_path, step=1, full_model=True)
    other, _ = build(At(), "dense, lora")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(0.5)
    load_checkpoint(other, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


def test_the_newest_whole_checkpoint_is_taken_and_broken_ones_are_named(tmp_path: Path) -> None:
    model, optimizer = build(At(), "dense, lora")
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
    model, _ = build(At(), "dense, lora")
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
