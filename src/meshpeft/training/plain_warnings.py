"""Warnings on the command line."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

__all__ = ["plain_warnings"]


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
