"""`meshpeft merge`."""

from __future__ import annotations

from collections.abc import Sequence

from meshpeft.cli.arguments import parse
from meshpeft.training.export import MergeConfig, merge

__all__ = ["run"]


def run(argv: Sequence[str]) -> None:
    """Parse the options, run the command in this process, and say what it did."""
    print(merge(parse(MergeConfig, argv, prog="meshpeft merge")))
