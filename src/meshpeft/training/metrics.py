"""The numbers of a run: one JSON object a line while it goes, and a picture of them when it ends."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from meshpeft.models.staging import StagedFiles
from meshpeft.parallel.errors import MeshPEFTError, shown
from meshpeft.training.output import CURVE, METRICS

__all__ = ["MetricsLog", "check_rows", "plot_losses"]


class MetricsLog:
    """Keeps the rows of `metrics.jsonl` and writes each as it comes, so that a run can be watched.

    A row of a step has `step` (from 1), `loss` (nats per target token), `router_loss` (load balance of the experts,
    before its coefficient, where it is trained), `learning_rate`, `grad_norm`, `tokens`, `target_tokens` (of the global
    batch) and `seconds` (of the step); a row of a measurement has `step` (steps done so far) and `held_out_loss`. A
    number that is not finite is null. A step that was not taken has `skipped`: `overflow` where float16's loss scale
    was too large, else `not finite`.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._file: TextIO | None = None

    def write_to(self, path: Path) -> None:
        """Write the rows so far into a file, and each that comes."""
        self._file = path.open("w", encoding="utf-8")
        for row in self.rows:
            self._write(row)

    def add(self, **row: Any) -> None:
        """Append a row."""
        self.rows.append(row)
        self._write(row)

    def _write(self, row: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:  # the rows are in the checkpoints, too; a full disk ends no training
            self._file = None
            warnings.warn(f"{METRICS}: {error.strerror or error}; no more lines are written", stacklevel=3)

    def restore(self, rows: list[dict[str, Any]]) -> None:
        """Begin with the rows of an earlier part of the run."""
        for row in rows:
            self.add(**row)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of the rows that have a number of this name."""
        rows = [row for row in self.rows if row.get(name) is not None]
        return [row["step"] for row in rows], [row[name] for row in rows]

    def close(self) -> None:
        """Wait until the disk has the file, and close it."""
        file, self._file = self._file, None
        if file is None:
            return
        try:
            with file:
                os.fsync(file.fileno())
        except OSError as error:
            warnings.warn(f"{METRICS}: {error.strerror or error}; lines may be missing", stacklevel=2)


def check_rows(rows: Any, source: object) -> None:
    """Check rows that a file holds, before a log begins with them.

    Raises:
        MeshPEFTError: they are not those of a log.
    """
    if not isinstance(rows, list):
        raise MeshPEFTError(f"{source}: its metrics are {shown(rows)}; expected rows")
    for row in rows:
        if not isinstance(row, dict) or type(row.get("step")) is not int or not all(map(_is_entry, row.items())):
            raise MeshPEFTError(f"{source}: a row of its metrics is {shown(row)}, which no run writes")
    if not any(row.get("held_out_loss") is not None for row in rows):
        raise MeshPEFTError(f"{source}: its metrics have no held-out loss, with which every run begins")


def _is_entry(entry: tuple[str, Any]) -> bool:
    name, value = entry
    if name == "skipped":
        return value in ("overflow", "not finite")
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
    return name != "self" and (number or (value is None and name != "step"))


def plot_losses(log: MetricsLog, directory: Path, title: str) -> None:
    """Draw the loss of every step and the held-out loss, in nats per token, as `loss.png`."""
    with _no_files_at_home(), StagedFiles(directory) as staged:
        _draw(log, staged.folder / CURVE, title)
        staged.publish([CURVE])


@contextmanager
def _no_files_at_home() -> Iterator[None]:
    """Give matplotlib, which keeps its settings and its list of fonts in the home directory, a place for them."""
    if "MPLCONFIGDIR" in os.environ or "matplotlib" in sys.modules:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="meshpeft-") as folder:
        os.environ["MPLCONFIGDIR"] = folder
        try:
            yield
        finally:
            del os.environ["MPLCONFIGDIR"]


def _draw(log: MetricsLog, path: Path, title: str) -> None:
    # Here, because it is slow to import and only rank 0 draws; without pyplot, which would look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*log.series("loss"), color="tab:blue", linewidth=1, alpha=0.8, label="training, each step")
    axes.plot(*log.series("held_out_loss"), color="tab:orange", marker="o", label="held out")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per target token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
