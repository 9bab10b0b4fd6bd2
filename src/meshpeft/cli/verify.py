"""`meshpeft verify`."""

from __future__ import annotations

from collections.abc import Sequence

from meshpeft.cli.arguments import parse
from meshpeft.training.config import FinetuneConfig
from meshpeft.verify.run import verify_run

__all__ = ["run"]

DESCRIPTION = """Prove that a layout trains the adapter of one process, before it is run. The options are those of
`meshpeft finetune`: put `verify` in its place. One process, no GPU, seconds; those of data and output do not matter."""


def run(argv: Sequence[str]) -> None:
    """Parse the options of a fine-tune, check its layout, and print what was found."""
    print(verify_run(parse(FinetuneConfig, argv, prog="meshpeft verify", description=DESCRIPTION)))
