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
)

__all__ = ["TrainingProgress"]

LINES_WITHOUT_TERMINAL = 20
SPEED_WINDOW_STEPS = 20
FIRST_LINE_SECONDS = 60.0
LONGEST_SILENCE_SECONDS = 1800.0


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
                # Not rich's own estimate: it forgets what is older than 30 seconds, and so knows none of slow steps.
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
