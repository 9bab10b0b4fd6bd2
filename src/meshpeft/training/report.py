"""What a run prints and records of itself, on the first rank only: report, progress, metrics and their curve."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from transformers import PreTrainedTokenizerBase

from meshpeft.data.documents import Document, prompt_of
from meshpeft.data.tokenizers import decoded
from meshpeft.hub.staging import StagedFiles
from meshpeft.parallel.errors import MeshPEFTError, shown
from meshpeft.parallel.mesh import AXES, ParallelGroupInfo
from meshpeft.training.config import FinetuneConfig, LayoutConfig
from meshpeft.training.output import CURVE, METRICS

__all__ = [
    "MetricsLog",
    "Report",
    "TrainingProgress",
    "check_metrics",
    "counted",
    "describe_layout",
    "describe_processes",
    "plot_losses",
    "record_of",
    "short_path",
]

PROMPT_LINES = 12


def counted(number: int, noun: str) -> str:
    """Write a number with its noun: `1 row`, `3,198 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def describe_processes(count: int, sizes: Mapping[str, int], layout: LayoutConfig) -> str:
    """Describe the processes: `2 processes (tp=2, sequence parallel)`.

    Args:
        count: Number of all processes.
        sizes: Sizes of `tp cp dp ep etp`.
        layout: Has what else is sharded.
    """
    words = [f"{axis}={sizes[axis]}" for axis in ("tp", "cp", "dp", "ep") if sizes[axis] > 1]
    if sizes["etp"] != sizes["tp"]:
        words.append(f"etp={sizes['etp']}")
    if layout.sequence_parallel and sizes["tp"] > 1:
        words.append("sequence parallel")
    shards = sizes["dp"] * sizes["cp"] if layout.shard_base == "all" else layout.shard_base
    if shards not in ("none", 1):
        words.append(f"base sharded over {shards}")
    return "1 process" if count == 1 else f"{count:,} processes ({', '.join(words)})"


def describe_layout(info: ParallelGroupInfo, layout: LayoutConfig) -> str:
    """Describe the layout: `2 processes (tp=2, sequence parallel) on CPU`."""
    sizes = {axis: info.axis(axis).world_size for axis in ("tp", "cp", "dp", "ep", "etp")}
    processes = describe_processes(info.world.world_size, sizes, layout)
    return f"{processes} on {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}"


def short_path(path: Path) -> str:
    """Return the path from the current directory, if it is below it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def record_of(config: FinetuneConfig, info: ParallelGroupInfo, results: dict[str, Any] | None) -> dict[str, Any]:
    """Make the content of `run.json`: options, layout, versions, and results once there are some."""
    packages = ("meshpeft", "torch", "transformers", "tokenizers", "safetensors")
    return {
        "options": config.as_json(),
        "layout": {axis: info.axis(axis).world_size for axis in AXES},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "results": results,
    }


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raise the `BrokenPipeError` on, which the command turns into its exit code; rich's own would exit with 1."""
        raise


class Report:
    """Prints on the first rank, and nothing elsewhere.

    Attributes:
        console: Standard output, or `None`.
        speaks: Whether this is the first rank.
    """

    def __init__(self, info: ParallelGroupInfo) -> None:
        self.speaks = bool(info.world.rank == 0)
        self.console = _Console() if self.speaks else None

    def say(self, text: str = "") -> None:
        """Print a line as it is."""
        if self.console is not None:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def samples(self, tokenizer: PreTrainedTokenizerBase, document: Document, before: str, after: str) -> None:
        """Show a held-out prompt, its continuation in the data, and the model's before and after training."""
        prompt = prompt_of(document)
        rest = document.tokens[len(prompt) :].tolist()
        lines = decoded(tokenizer, prompt).strip("\n").splitlines()
        cut = ["..."] if len(lines) > PROMPT_LINES else []
        self.say("\nheld-out prompt:")
        self._quote("\n".join([*cut, *lines[-PROMPT_LINES:]]))
        for title, text in (
            ("in the data:", decoded(tokenizer, rest)),
            ("before training:", before),
            ("after training:", after),
        ):
            said = text.splitlines()
            self.say(title)
            self._quote("\n".join([*said[:PROMPT_LINES], *(["..."] if len(said) > PROMPT_LINES else [])]))

    def outcome(self, before: float, after: float, tokens: int, seconds: float) -> None:
        """Print the held-out loss before and after, and the speed."""
        self.say(f"\nheld-out loss: {before:.4f} before, {after:.4f} after ({after / before - 1:+.1%})")
        self.say(f"{tokens:,} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s")

    def next_commands(self, directory: Path, files: Sequence[str], example: str, serving: str | None = None) -> None:
        """Print the files written, and the commands that use them.

        Args:
            directory: Output directory of the run.
            files: Files in it besides the adapter.
            example: Options of `meshpeft generate` that give a prompt.
            serving: What serving systems do not read of the adapter.
        """
        self.say(f"wrote {directory}: {', '.join(['the adapter (PEFT format)', *files])}")
        program, adapter = _program(), shlex.quote(str(directory))
        self.say("\nuse it:")
        self.say(f"  {program} generate --adapter {adapter} {example}")
        self.say(f"  {program} evaluate --adapter {adapter}")
        if serving is not None:
            self.say(f"\n{serving}")

    def _quote(self, text: str) -> None:
        for line in text.splitlines() or [""]:
            self.say(f"  | {line}")


def _program() -> str:
    """Return `meshpeft`, or its path if it is not on the search path, so that printed commands can be copied."""
    called = Path(sys.argv[0])
    found = shutil.which("meshpeft")
    if called.name != "meshpeft" or (found is not None and called.exists() and called.samefile(found)):
        return "meshpeft"
    return shlex.quote(str(called))


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
        """Return steps and values of the rows that have a number of this name."""
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


def check_metrics(rows: Any, source: object) -> None:
    """Check rows that a file holds, before a log begins with them.

    Raises:
        MeshPEFTError: They are not those of a log.
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


LINES_WITHOUT_TERMINAL = 20
SPEED_WINDOW_STEPS = 20
FIRST_LINE_SECONDS = 60.0
LONGEST_SILENCE_SECONDS = 1800.0


class TrainingProgress:
    """Shows step, loss, tokens per second and time left, from one rank.

    Args:
        steps: Steps of the run.
        console: Console to print on; `None` shows nothing (on ranks other than 0).
    """

    def __init__(self, steps: int, console: Console | None) -> None:
        self._steps = steps
        self._console = console
        self._done = 0
        self._elapsed = 0.0  # seconds in the steps of this process
        self._last_line = 0.0
        # (tokens, seconds) of the last steps: the speed now, without the measurements between steps.
        self._window: deque[tuple[int, float]] = deque(maxlen=SPEED_WINDOW_STEPS)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if console is not None and console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
                TimeElapsedColumn(),
                # Not rich's own estimate: it drops what is older than 30 seconds, and so has none for slow steps.
                TextColumn("{task.fields[left]} left"),
                console=console,
            )
            self._task = self._bar.add_task("training", total=steps, loss="-", speed="-", left="-:--")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start_at(self, done: int) -> None:
        """Begin after the steps that an earlier process took."""
        self._done = done
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def advance(self, loss: float, tokens: int, seconds: float) -> None:
        """One more step is done, of `tokens` tokens over all ranks."""
        if self._console is None:
            return
        self._done += 1
        self._window.append((tokens, seconds))
        self._elapsed += seconds
        spent = max(sum(seconds for _, seconds in self._window), 1e-9)
        speed = f"{sum(tokens for tokens, _ in self._window) / spent:,.0f}"
        left = _clock((self._steps - self._done) * spent / len(self._window))
        if self._bar is not None:
            self._bar.update(self._task, advance=1, loss=f"{loss:.4f}", speed=speed, left=left)
        elif self._line_is_due():
            self._last_line = self._elapsed
            self.note(f"step {self._done}/{self._steps}  loss {loss:.4f}  {speed} tokens/s  {left} left")

    def _line_is_due(self) -> bool:
        if self._done % max(1, self._steps // LINES_WITHOUT_TERMINAL) == 0 or self._done == self._steps:
            return True
        # A twentieth of a long run is hours: a line a minute at first, then less and less often.
        wait = min(max(FIRST_LINE_SECONDS, self._elapsed / 10), LONGEST_SILENCE_SECONDS)
        return self._elapsed - self._last_line >= wait

    def note(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
