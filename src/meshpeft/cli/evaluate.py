"""`meshpeft evaluate`."""

from __future__ import annotations

from collections.abc import Sequence

from meshpeft.cli.arguments import parse
from meshpeft.training.adapter_use import EvaluateConfig
from meshpeft.training.evaluate import start

__all__ = ["run"]


def run(argv: Sequence[str]) -> None:
    """Parse the options and run the command, on as many processes as they ask for."""
    start(parse(EvaluateConfig, argv, prog="meshpeft evaluate"))
