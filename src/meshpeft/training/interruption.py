"""A run that is asked to stop: by Ctrl-C, by a scheduler that wants the machine back (SIGTERM), or by a terminal that
goes away (SIGHUP).
"""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Self

import torch
import torch.distributed as dist

from meshpeft.checkpoint.coordination import cpu_group
from meshpeft.parallel.errors import MeshPEFTError

__all__ = ["Interruption", "RunInterrupted", "heeded_signals"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def heeded_signals() -> list[signal.Signals]:
    """List the signals that end a run: those that ask for it, less those that the caller ignores.

    Under `nohup` a run ignores SIGHUP, and goes on when its terminal is gone; a shell's background job may ignore
    SIGINT.
    """
    return [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


class RunInterrupted(MeshPEFTError):
    """A run that was stopped by a signal and can be continued.

    Args:
        text: what was saved, and how to go on.
        number: of the signal.
    """

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.number = number

    @property
    def exit_code(self) -> int:
        """By the shell's convention."""
        return 128 + self.number


class Interruption:
    """Takes the signals instead of dying of them; a context manager, for the main thread.

    What is to be done about them is asked between two steps, when all ranks do the same.
    """

    def __init__(self) -> None:
        self._number = 0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._note) for number in heeded_signals()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A lone process can be made to stop at once by asking twice. Workers are told by their launcher, too.
        if self._number and "RANK" not in os.environ:
            raise KeyboardInterrupt
        self._number = number

    def requested(self, due: bool = False) -> tuple[int, bool]:
        """The number of the signal that any rank got, or 0; and whether a checkpoint is due on any. A collective.

        Args:
            due: whether one is by this rank's clock.
        """
        # Not the checkpoints' group: a save may be under way.
        group = cpu_group("interruptions")
        if group is None:
            return self._number, due
        asked = torch.tensor([self._number, int(due)])
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=group)
        return int(asked[0]), bool(asked[1])
