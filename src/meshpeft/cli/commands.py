"""The commands of `meshpeft`: each parses its options, calls what does the work, and prints what that returns.

A command imports what it needs when it is run, and what does the work behind the parsing: that takes seconds, which
`meshpeft --help` and `meshpeft COMMAND --help` do not need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from meshpeft.training.base import BaseModel
    from meshpeft.training.config import FinetuneConfig

__all__ = ["COMMANDS", "Command"]


class Command(NamedTuple):
    """A command.

    Attributes:
        summary: Its line in `meshpeft --help`.
        run: Parses the arguments behind the command's name, and does the work.
        has_results: It does more than print, so it goes on when nobody reads what it prints.
    """

    summary: str
    run: Callable[[Sequence[str]], None]
    has_results: bool = False


def _finetune(argv: Sequence[str]) -> None:
    from meshpeft.cli.arguments import parse
    from meshpeft.training.config import FinetuneConfig

    options = parse(FinetuneConfig, argv, prog="meshpeft finetune")

    from meshpeft.training.finetune import start

    start(options, _prove)


def _prove(config: FinetuneConfig, base: BaseModel) -> str:
    from meshpeft.verify.run import prove_run

    return prove_run(config, base)


def _evaluate(argv: Sequence[str]) -> None:
    from meshpeft.cli.arguments import parse
    from meshpeft.training.config import EvaluateConfig

    options = parse(EvaluateConfig, argv, prog="meshpeft evaluate")

    from meshpeft.training.evaluate import start

    start(options)


def _generate(argv: Sequence[str]) -> None:
    from meshpeft.cli.arguments import parse
    from meshpeft.training.config import GenerateConfig

    options = parse(GenerateConfig, argv, prog="meshpeft generate")

    from meshpeft.training.generate import start

    start(options)


def _export(argv: Sequence[str]) -> None:
    from meshpeft.cli.arguments import parse
    from meshpeft.training.config import ExportConfig

    options = parse(ExportConfig, argv, prog="meshpeft export")

    from meshpeft.training.export import export

    print(export(options))


def _merge(argv: Sequence[str]) -> None:
    from meshpeft.cli.arguments import parse
    from meshpeft.training.config import MergeConfig

    options = parse(MergeConfig, argv, prog="meshpeft merge")

    from meshpeft.training.export import merge

    print(merge(options))


def _verify(argv: Sequence[str]) -> None:
    from meshpeft.cli.arguments import parse
    from meshpeft.training.config import FinetuneConfig

    description = """Prove that a layout trains the adapter of one process, before it is run. The options are those of
`meshpeft finetune`: put `verify` in its place. One process, no GPU, seconds; those of data and output do not matter."""
    options = parse(FinetuneConfig, argv, prog="meshpeft verify", description=description)

    from meshpeft.verify.run import verify_run

    print(verify_run(options))


def _plan(argv: Sequence[str]) -> None:
    from meshpeft.cli.arguments import parse
    from meshpeft.training.config import PlanConfig

    description = """What one process of a fine-tune will hold in memory and send to others; with --devices, which
layouts fit a cluster. The options are those of `meshpeft finetune`: put `plan` in its place. One process, no GPU; those
of data and output do not matter."""
    options = parse(PlanConfig, argv, prog="meshpeft plan", description=description)

    from meshpeft.verify.run import plan_run

    print(plan_run(options))


COMMANDS = {
    "finetune": Command("fine-tune a model with an adapter, on one process or over a mesh", _finetune, True),
    "evaluate": Command("measure the loss of a model with or without an adapter", _evaluate),
    "generate": Command("continue a prompt with or without an adapter", _generate),
    "export": Command("write a checkpoint as an adapter or as a model", _export, True),
    "merge": Command("write a base model with an adapter merged into it", _merge, True),
    "verify": Command("prove that a layout trains the adapter of one process, before it is run", _verify),
    "plan": Command("count what one process of a fine-tune will hold and send", _plan),
}
