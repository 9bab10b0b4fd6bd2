"""What real processes do in the tests of checkpoints; in a module of its own, so that they import little."""

from __future__ import annotations

from pathlib import Path

from helpers.adapters import adapted

from meshpeft.checkpoint import CheckpointError, export_peft_adapter
from meshpeft.parallel import init_parallelism


def export_and_fail(base: str, folder: str) -> str:
    """The error of a second export, which only the rank that writes can see."""
    init_parallelism(tensor_parallel=2)
    model = adapted(Path(base))
    export_peft_adapter(model, Path(folder))
    try:
        export_peft_adapter(model, Path(folder))
    except CheckpointError as error:
        return str(error)
    return ""
