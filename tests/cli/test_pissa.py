"""Runs whose adapters start from the principal part of the weights: what is written fits the base as its files are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.finetune_jobs import finetuned
from safetensors.torch import load_file

from meshpeft.cli.main import main

OPTIONS = ["--seq-length=48", "--batch-size=4", "--micro-batch-size=2", "--rank=4", "--lr=0.01", "--seed=3"]
PISSA = ["--lora-init-method", "pissa", "--dtype", "float64", "--steps", "4", "--eval-every", "0"]


@pytest.fixture(scope="module")
def options(wide_base: Path, data: Path) -> list[str]:
    return ["finetune", "--model", str(wide_base), "--data", str(data), *OPTIONS, *PISSA]


PACKED = ["--quantize", "nf4"]
# By the name of the run's directory: which method, and whether the remainder is packed.
RUNS = {
    "lora": ["--method", "lora"],
    "canonical_lora": ["--method", "canonical_lora"],
    "dora": ["--method", "dora"],
    "lora packed": ["--method", "lora", *PACKED],
    "one part packed": ["--method", "canonical_lora", "--target-modules", "linear_q", "linear_fc2", *PACKED],
}


LEAN = [name for name in RUNS if PACKED[0] not in RUNS[name]]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in RUNS if name not in LEAN]


@pytest.fixture(scope="module", params=[*LEAN, *SLOW])
def run(request: pytest.FixtureRequest, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / request.param
    assert main([*options, *RUNS[request.param], "--output-dir", str(output), "--save-every", "2"]) == 0
    return output


def results(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())["results"]
    return found


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["evaluate", *arguments]) == 0
    return capsys.readouterr().out.split("loss: ")[1].split(" ")[0]


def test_what_is_exported_is_the_change_of_the_base(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert results(run)["held_out_loss_after"] < results(run)["held_out_loss_before"]
    config = json.loads((run / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 64)  # twice the rank, at the same scale
    # The adapter's file, on the base that evaluate reads.
    assert evaluated(capsys, "--adapter", str(run)) == f"{results(run)['held_out_loss_after']:.4f}"


def test_checkpoints_are_resumed_exported_and_merged(
    run: Path, options: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = [*RUNS[run.name], "--output-dir", str(tmp_path / "run")]
    assert main([*options, *again, "--resume", str(run / "checkpoints" / "step-00000002")]) == 0
    assert main(["export", "--checkpoint", str(run), "--to", str(tmp_path / "adapter")]) == 0
    theirs = load_file(run / "adapter_model.safetensors")
    for path in ("run", "adapter"):
        ours = load_file(tmp_path / path / "adapter_model.safetensors")
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0)
    assert main(["export", "--checkpoint", str(run), "--to", str(tmp_path / "merged"), "--format", "merged"]) == 0
    measure = ["--data", str(data), "--seq-length", "48", "--dtype", "float64"]
    want = evaluated(capsys, "--adapter", str(run), *measure)
    assert evaluated(capsys, "--model", str(tmp_path / "merged"), *measure) == want


@pytest.mark.slow
def test_a_run_goes_on_at_another_layout(run: Path, wide_base: Path, data: Path, tmp_path: Path) -> None:
    """The weights give the same part up again, over 2 processes as over 1."""
    again = [*RUNS[run.name], "--tp", "2", "--resume", str(run / "checkpoints" / "step-00000002")]
    finetuned(wide_base, data, tmp_path / "run", *OPTIONS, *PISSA, *again)
    # float64, sums in another order.
    assert results(tmp_path / "run")["held_out_loss_after"] == pytest.approx(
        results(run)["held_out_loss_after"], rel=1e-10
    )
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "run", run))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-7, atol=1e-9)
