"""`meshpeft export`."""

from __future__ import annotations

from collections.abc import Sequence

from meshpeft.cli.arguments import parse
from meshpeft.training.export import ExportConfig, export

__all__ = ["run"]


def run(argv: Sequence[str]) -> None:
    """Parse the options, run the command in this process, and say what it did."""
    print(export(parse(ExportConfig, argv, prog="meshpeft export")))
