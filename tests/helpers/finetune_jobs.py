"""Whole runs of `meshpeft finetune`, on workers that are there already where a run needs several."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from helpers.workers import run_on_ranks

from meshpeft.cli.arguments import parse
from meshpeft.cli.main import main
from meshpeft.data.batches import GlobalBatchSlice, PackedRows, RowSampler
from meshpeft.training import generate
from meshpeft.training.config import FinetuneConfig
from meshpeft.training.finetune import finetune
from meshpeft.training.launch import workers_for

__all__ = ["finetune_here", "finetuned", "rows_of_each_step", "short_samples"]


def finetuned(base: Path, data: Path, output: Path, *options: str) -> dict[str, Any]:
    """Run `meshpeft finetune`; the results in the run's record.

    Of several workers only the first run of this process starts any: the command would launch its own, and each of them
    would import everything again.
    """
    arguments = ["--model", str(base), "--data", str(data), "--output-dir", str(output), *options]
    workers = workers_for(parse(FinetuneConfig, arguments, "meshpeft finetune").resolved())
    if workers == 1:
        assert main(["finetune", *arguments]) == 0
    else:
        run_on_ranks(workers, finetune_here, arguments)
    results: dict[str, Any] = json.loads((output / "run.json").read_text())["results"]
    return results


def finetune_here(arguments: list[str]) -> None:
    """What each worker of `meshpeft finetune` does."""
    config = parse(FinetuneConfig, arguments, "meshpeft finetune").resolved()
    config.check()
    with short_samples():
        finetune(config)


@contextmanager
def short_samples() -> Iterator[None]:
    """Samples before and after training of 4 tokens each, which would take longer than a few steps."""
    with patch.object(generate, "SAMPLE_TOKENS", 4):
        yield


def rows_of_each_step(arguments: list[str]) -> dict[int, list[int]]:
    """The same; which rows of the training data this rank computed in each step."""
    with _recorded() as rows:
        finetune_here(arguments)
    return rows


@contextmanager
def _recorded() -> Iterator[dict[int, list[int]]]:
    micro_batches, gather = RowSampler.micro_batches, PackedRows.gather
    rows: dict[int, list[int]] = {}
    train: list[PackedRows] = []

    def next_step(sampler: RowSampler, step: int) -> GlobalBatchSlice:
        train[:], rows[step] = [sampler.rows], []
        return micro_batches(sampler, step)

    def read(source: PackedRows, numbers: Any, *more: Any) -> Any:
        if train and source is train[0]:
            rows[max(rows)] += [int(number) for number in np.asarray(numbers) if number >= 0]
        return gather(source, numbers, *more)

    RowSampler.micro_batches, PackedRows.gather = next_step, read  # type: ignore[method-assign]
    try:
        yield rows
    finally:
        RowSampler.micro_batches, PackedRows.gather = micro_batches, gather  # type: ignore[method-assign]
