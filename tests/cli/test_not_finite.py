"""Gradients, losses and weights that are not finite: the adapter is kept, and no file gets such a value."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers.finetune_jobs import finetune_here
from helpers.workers import run_on_ranks
from safetensors.torch import load_file
from torch import Tensor

from meshpeft.checkpoint import find_checkpoint
from meshpeft.cli.main import main
from meshpeft.parallel.errors import MeshPEFTError
from meshpeft.training import step as step_module
from meshpeft.training.loop import MOST_SKIPPED

OPTIONS = ["--seq-length=48", "--batch-size=4", "--micro-batch-size=2", "--rank=4", "--lr=0.01", "--dtype=float64"]
EVERY = range(1, 100)


def finetune_with_nan(arguments: list[str], steps: Collection[int], rank: int, what: str) -> str:
    """A run with a NaN in the loss, or in a gradient, of one rank at some steps; the error that ends it."""
    number = 0
    largest, losses = step_module._largest_gradients, step_module.TrainStep._losses
    here = rank == (dist.get_rank() if dist.is_initialized() else 0)

    def spoiled_gradients(parameters: list[Any]) -> list[Tensor]:
        nonlocal number
        number += 1
        if what == "gradient" and here and number in steps:
            parameters[0].grad.view(-1)[0] = math.nan
        return largest(parameters)

    def spoiled_losses(step: Any, batch: Any) -> Tensor:
        found = losses(step, batch)
        return found + math.nan if what == "loss" and here and number + 1 in steps else found

    with ExitStack() as stack:
        stack.enter_context(patch.object(step_module, "_largest_gradients", spoiled_gradients))
        stack.enter_context(patch.object(step_module.TrainStep, "_losses", spoiled_losses))
        try:
            finetune_here(arguments)
        except MeshPEFTError as error:
            return f"{type(error).__name__}: {error}"
    return ""


Run = Callable[..., tuple[Path, list[str]]]


@pytest.fixture
def run(base: Path, data: Path, tmp_path: Path) -> Run:
    def run(
        layout: str, steps: Collection[int], rank: int, what: str = "gradient", more: str = ""
    ) -> tuple[Path, list[str]]:
        """The output directory, and every rank's error."""
        output = tmp_path / f"{layout or 'one'}-{rank}-{what}".replace(" ", "")
        arguments = ["--model", str(base), "--data", str(data), "--output-dir", str(output), *OPTIONS]
        arguments += [*layout.split(), *more.split()]
        if not layout:
            return output, [finetune_with_nan(arguments, steps, rank, what)]
        return output, run_on_ranks(2, finetune_with_nan, arguments, steps, rank, what)

    return run


def steps_of(output: Path) -> list[dict[str, Any]]:
    def no_constant(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    lines = (output / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=no_constant) for line in lines]
    json.loads((output / "run.json").read_text(), parse_constant=no_constant)
    return [row for row in rows if "loss" in row]


def test_a_step_that_is_not_finite_on_one_rank_is_left_out_at_every_layout(run: Run) -> None:
    """Also where the rank is one of several that hold the same, or that read other rows."""
    adapters = {}
    for layout, rank, what in [
        ("", 0, "gradient"),
        ("--tp 2", 1, "loss"),
        ("--tp 2", 1, "gradient"),
        ("--dp 2", 1, "gradient"),
    ]:
        output, errors = run(layout, {2}, rank, what, "--steps 4")
        assert not any(errors)
        adapters[layout, what] = load_file(output / "adapter_model.safetensors")
        skipped = [row for row in steps_of(output) if "skipped" in row]
        assert [(row["step"], row["skipped"], row["grad_norm"]) for row in skipped] == [(2, "not finite", None)]
    one = adapters.pop(("", "gradient"))
    for case, found in adapters.items():
        assert found.keys() == one.keys()
        for name, values in found.items():
            assert values.isfinite().all()
            assert (values - one[name]).abs().max() < 1e-10 * one[name].abs().max(), (case, name)


@pytest.mark.parametrize("layout", ["", "--tp 2"])
def test_a_run_without_a_finite_step_is_an_error_and_leaves_nothing(run: Run, layout: str) -> None:
    output, errors = run(layout, EVERY, 0, more="--steps 20 --save-every 10")
    where = " on rank 0" if layout else ""
    for error in errors:
        assert error.startswith(
            f"TrainingError: step {MOST_SKIPPED}: {MOST_SKIPPED} steps in a row were skipped: the gra"
        )
        assert f"adapter.linear_in.weight{where} is not finite" in error
    assert not output.exists()


def test_what_was_trained_before_is_kept_as_a_checkpoint(run: Run) -> None:
    output, (error, _) = run("--tp 2", range(3, 100), 1, more="--steps 20")
    kept = find_checkpoint(output / "checkpoints")
    assert kept.step == 2 + MOST_SKIPPED and str(kept.path) in error
    assert [row.get("skipped") for row in kept.extra["metrics"] if "loss" in row] == [None] * 2 + ["not finite"] * 5
    exported = output.parent / "exported"
    assert main(["export", "--checkpoint", str(output), "--to", str(exported)]) == 0
    assert all(values.isfinite().all() for values in load_file(exported / "adapter_model.safetensors").values())


def test_a_run_whose_last_step_breaks_the_adapter_is_an_error(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["finetune", "--model", str(base), "--data", str(data), "--output-dir", str(tmp_path / "run")]
    assert main([*arguments, *OPTIONS[:-2], "--lr=1e30", "--steps=1", "--save-every=1"]) == 2
    assert "held-out loss after step 1 is nan" in capsys.readouterr().err
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert not list(tmp_path.glob("run/checkpoints/step*"))


def test_float16_that_overflows_at_every_scale_is_an_error(run: Run) -> None:
    _, (error,) = run("", EVERY, 0, more="--steps 40 --dtype float16")
    # 2^15 is halved 15 times before a step counts.
    assert error.startswith(f"TrainingError: step {15 + MOST_SKIPPED}: 5 steps in a row were skipped")


def test_a_base_that_is_not_finite_is_an_error_before_the_first_step(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with patch.object(step_module, "summed_loss", lambda model, batch: torch.tensor(math.inf)):
        arguments = ["finetune", "--model", str(base), "--data", str(data), "--output-dir", str(tmp_path / "run")]
        assert main([*arguments, *OPTIONS, "--steps=1"]) == 2
    assert "held-out loss before training is inf" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
