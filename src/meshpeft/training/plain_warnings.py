"""What the command line lets through of warnings: ours, each as one sentence, and no noise of other packages."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

__all__ = ["plain_warnings", "quiet"]

_FOR_DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning)
# They log at import what they cannot use on this machine ("Failed to load .."), and what they will not do one day.
_NOISY = ("torchao", "bitsandbytes", "torch.utils._pytree")


@contextmanager
def plain_warnings(speaker: str) -> Iterator[None]:
    """Print our warnings as one sentence each, without the place in the source, and from one process.

    What other packages say to their own developers (deprecations, extensions that they could not load) is left out;
    it is nothing that a user can act on. `python -W` and PYTHONWARNINGS bring the warnings back.

    Args:
        speaker: Command whose warnings they are; it stands before each.
    """
    show = warnings.showwarning

    def show_plainly(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, _FOR_DEVELOPERS) and not sys.warnoptions:
            return
        if category is not UserWarning:
            show(message, category, filename, lineno, file, line)
        elif os.environ.get("RANK", "0") == "0":
            print(f"{speaker}: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings(), quiet(*_NOISY):
        warnings.showwarning = show_plainly
        yield


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Leave out what these loggers print below the level of an error."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
