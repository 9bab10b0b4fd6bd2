"""`meshpeft plan`."""

from __future__ import annotations

from collections.abc import Sequence

from meshpeft.cli.arguments import parse
from meshpeft.training.config import FinetuneConfig
from meshpeft.verify.run import plan_run

__all__ = ["run"]

DESCRIPTION = """What one process of a fine-tune will hold in memory and send to others. The options are those of
`meshpeft finetune`: put `plan` in its place. One process, no GPU; those of data and output do not matter."""


def run(argv: Sequence[str]) -> None:
    """Parse the options of a fine-tune, count what it costs, and print it."""
    print(plan_run(parse(FinetuneConfig, argv, prog="meshpeft plan", description=DESCRIPTION)))
