"""Ratios of paired measurements: all candidates in turn, many times, so that a noisy machine slows all alike."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ratio:
    """Median of the paired ratios of two candidates, and the quartiles around it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def measure(
    candidates: dict[str, Callable[[], object]],
    repeats: int = 30,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each candidate in each repeat; in every repeat each runs once, forwards and backwards in turn."""
    for run in candidates.values():
        for _ in range(warmup):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats):
        order = list(candidates) if repeat % 2 == 0 else list(reversed(candidates))
        for name in order:
            start = clock()
            candidates[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], over: str, base: str) -> Ratio:
    """Median and quartiles of `over` / `base`, repeat by repeat."""
    return quartiles([a / b for a, b in zip(seconds[over], seconds[base], strict=True)])


def quartiles(ratios: list[float]) -> Ratio:
    """The median of some ratios, with the quartiles around it."""
    low, median, high = statistics.quantiles(ratios, n=4)
    return Ratio(median, low, high)


def table(title: str, rows: list[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """A markdown table under a title, with the machine and the versions that made it."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    machine = f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}"
    return "\n".join([f"### {title}", "", line(header), rule, *(line(row) for row in rows), "", f"_{machine}_", ""])
