"""Whole runs of `meshpeft finetune` on workers that are there already; in a module of its own for what it imports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meshpeft.training.config import FinetuneConfig
from meshpeft.training.finetune import finetune

__all__ = ["finetune_here"]


def finetune_here(options: dict[str, Any]) -> None:
    """What each worker of a run does: options by their names."""
    paths = ("model", "data", "output_dir")
    finetune(FinetuneConfig(**{**options, **{name: Path(options[name]) for name in paths}}).resolved())
