"""Warnings on the command line, ours and those of other packages."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

__all__ = ["plain_warnings", "quiet"]


@contextmanager
def plain_warnings(speaker: str) -> Iterator[None]:
    """Our warnings as one sentence each, without the place in the source, and from one process.

    Args:
        speaker: whose warnings they are; it stands before each.
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
        if category is not UserWarning:
            show(message, category, filename, lineno, file, line)
        elif int(os.environ.get("RANK", "0")) == 0:
            print(f"{speaker}: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show_plainly
        yield


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Leave out what these loggers say that is no error."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
