"""`meshpeft finetune`."""

from __future__ import annotations

from collections.abc import Sequence

from meshpeft.cli.arguments import parse
from meshpeft.training.config import FinetuneConfig
from meshpeft.training.finetune import start

__all__ = ["run"]


def run(argv: Sequence[str]) -> None:
    """Parse the options and run the command, on as many processes as they ask for."""
    start(parse(FinetuneConfig, argv, prog="meshpeft finetune"))
