"""What a run shows while it goes: one progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from collections import deque
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["TrainingProgress"]

LINES_WITHOUT_TERMINAL = 20
SPEED_WINDOW_STEPS = 20


class TrainingProgress:
    """Shows step, loss, tokens per second and time left, from one rank.

    Args:
        steps: of the whole run.
        console: where to; `None` shows nothing (on ranks other than 0).
    """

    def __init__(self, steps: int, console: Console | None) -> None:
        self._steps = steps
        self._console = console
        self._done = 0
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
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("training", total=steps, loss="-", speed="-")

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
        """Some steps were done before."""
        self._done = done
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def advance(self, loss: float, tokens: int, seconds: float) -> None:
        """One more step is done, of `tokens` tokens over all ranks."""
        if self._console is None:
            return
        self._done += 1
        self._window.append((tokens, seconds))
        spent = max(sum(seconds for _, seconds in self._window), 1e-9)
        speed = sum(tokens for tokens, _ in self._window) / spent
        if self._bar is not None:
            self._bar.update(self._task, advance=1, loss=f"{loss:.4f}", speed=f"{speed:,.0f}")
        elif self._done % max(1, self._steps // LINES_WITHOUT_TERMINAL) == 0 or self._done == self._steps:
            left = (self._steps - self._done) * spent / len(self._window)
            self.note(f"step {self._done}/{self._steps}  loss {loss:.4f}  {speed:,.0f} tokens/s  {_clock(left)} left")

    def note(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
