"""Checkpoints of a run: what they hold besides the model, and whether a run can be resumed from one."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from meshpeft.checkpoint import CheckpointError, Save, load_checkpoint, save_checkpoint
from meshpeft.checkpoint.coordination import agreed, checkpoint_group, rank_and_world_size
from meshpeft.checkpoint.directory import CheckpointDirectory
from meshpeft.checkpoint.manifest import Manifest
from meshpeft.models import LanguageModel
from meshpeft.parallel.agreement import all_or_none
from meshpeft.parallel.errors import shown
from meshpeft.parallel.mesh import is_simulated, parallel_group_info
from meshpeft.training.config import FinetuneConfig
from meshpeft.training.inputs import Inputs
from meshpeft.training.output import CHECKPOINTS, RunState, run_state
from meshpeft.training.report import MetricsLog, check_metrics
from meshpeft.training.step import LossScale

__all__ = ["RunCheckpoints", "agreed_date", "checkpoints_in", "difference_of_runs", "run_date"]

# Options that change no number of the training: where it runs and reads, how often it measures and saves. The model,
# the data and what a template makes of them are compared by their content.
_NEUTRAL = frozenset(
    {
        "tp", "cp", "dp", "ep", "etp", "sequence_parallel", "micro_batch_size", "loss_chunk",
        "activation_checkpointing", "offload_activations", "model", "engine", "data", "adapter_format", "output_dir",
        "overwrite", "eval_every", "eval_rows", "save_every", "save_minutes", "keep", "resume", "config",
        "template_date",
    }
)  # fmt: skip


def checkpoints_in(directory: Path) -> Path:
    """Find checkpoints: a run's output directory holds them in a folder; any other directory is taken as given."""
    inside = directory / CHECKPOINTS
    return inside if inside.is_dir() else directory


def run_date(config: FinetuneConfig) -> str:
    """Agree on the date that chat templates get in this run. A collective.

    It is the option, or that of the checkpoint to go on from, or today's.
    """
    return agreed_date(config.template_date or _checkpoint_date(config))


def agreed_date(day: str | None) -> str:
    """Agree on this day, or on today by the clock of rank 0: machines differ in their time zone. A collective."""
    days = [day or date.today().isoformat()]
    world = parallel_group_info().world
    if world.world_size > 1 and not is_simulated():
        dist.broadcast_object_list(days, src=0, group=world.group)
    return days[0]


def _checkpoint_date(config: FinetuneConfig) -> str | None:
    """Read the date that the run to resume recorded, if there is one; whether it can be resumed is checked later."""
    if config.resume is None:
        return None
    with suppress(CheckpointError, OSError, ValueError):  # ValueError: a null byte in a name
        own = config.output_dir.resolve() / CHECKPOINTS
        if config.resume == "auto" and run_state(own.parent) is not RunState.UNFINISHED:
            return None
        directory = CheckpointDirectory(own if config.resume == "auto" else checkpoints_in(Path(config.resume)))
        for path in directory.candidates():
            with suppress(Exception):  # whether it can be used is asked later
                day = Manifest.read(path).extra.get("run", {}).get("template_date")
                return date.fromisoformat(day).isoformat()
    return None


class RunCheckpoints:
    """Saves and restores one run.

    Args:
        config: Resolved options.
        model: Model with its adapters.
        optimizer: Optimizer of the adapters.
        loss_scale: Loss scale of float16; `None` for other types.
        inputs: Data of the run.

    Attributes:
        directory: Directory of the checkpoints.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        model: LanguageModel,
        optimizer: torch.optim.Optimizer,
        loss_scale: LossScale | None,
        inputs: Inputs,
    ) -> None:
        self.config, self.model, self.optimizer, self.loss_scale = config, model, optimizer, loss_scale
        self.directory = config.output_dir.resolve() / CHECKPOINTS
        self._data = {"train": inputs.train.digest, "held_out": inputs.held_out.digest}
        self._save: Save | None = None
        self._asked_for = True
        self._saved_at = time.monotonic()

    def start(self, log: MetricsLog) -> int:
        """Resume from a checkpoint if the options name one, else remove those of an earlier run. A collective.

        Args:
            log: Receives the rows of the steps that are done.

        Returns:
            The steps that are done.

        Raises:
            CheckpointError: The checkpoint is broken, or of a run that computes something else.
        """
        self._saved_at = time.monotonic()
        source = self._source()
        if source is None:
            self._clear(-1)
            return 0
        loaded = load_checkpoint(self.model, source, optimizer=self.optimizer, check=self._compare)
        # Later ones, and those of another run, are not of this one.
        self._clear(loaded.step if loaded.path.parent == self.directory else -1)
        log.restore(loaded.extra["metrics"])
        if self.loss_scale is not None:
            self.loss_scale.value = loaded.extra["loss_scale"]["value"]
            self.loss_scale.good_steps = loaded.extra["loss_scale"]["good_steps"]
        return loaded.step

    def _clear(self, step: int) -> None:
        """Remove the checkpoints of later steps. A collective."""
        with all_or_none(f"clearing {self.directory}", CheckpointError):
            if rank_and_world_size(checkpoint_group())[0] == 0:
                CheckpointDirectory(self.directory).drop_after(step)

    def _source(self) -> Path | None:
        if self.config.resume is None:
            return None
        if self.config.resume != "auto":
            return checkpoints_in(Path(self.config.resume))
        # Those of a finished run are its own: it is to be replaced.
        unfinished = run_state(self.directory.parent) is RunState.UNFINISHED
        found = CheckpointDirectory(self.directory).steps() if unfinished else []
        return self.directory if agreed(found, f"reading {self.directory}", checkpoint_group()) else None

    def _compare(self, extra: dict[str, Any], path: Path) -> None:
        """Check that this run computes what the run of a checkpoint did."""
        if not {"run", "data", "metrics", "loss_scale"} <= extra.keys():
            raise CheckpointError(f"{path} was not written by meshpeft finetune; resume it with what wrote it")
        check_metrics(extra["metrics"], path)
        if self.loss_scale is not None:
            scale, good = extra["loss_scale"]["value"], extra["loss_scale"]["good_steps"]
            if type(scale) is not float or not 0 < scale < 2**100 or type(good) is not int or not 0 <= good < 2**31:
                raise CheckpointError(f"{path}: its loss scale is {shown(extra['loss_scale'])}, which no run has")
        difference = difference_of_runs(self.config, extra["run"])
        if difference is not None:
            name, own, other = difference
            raise CheckpointError(
                f"{name} is {own!r}, but {path} was written with {shown(other)}; a run goes on with the same options"
            )
        for name, digest in self._data.items():
            if extra["data"].get(name) != digest:
                raise CheckpointError(
                    f"the {name} rows are not those of {path}: the data, its tokenizer or --template-date changed"
                )

    def is_due(self) -> bool:
        """Return whether the last checkpoint is `save_minutes` old, by the first rank's clock."""
        minutes = self.config.save_minutes
        first = not dist.is_initialized() or dist.get_rank() == 0
        return bool(minutes) and first and time.monotonic() - self._saved_at >= 60 * minutes

    def save(self, step: int, log: MetricsLog, *, asked_for: bool = True) -> None:
        """Write the checkpoint of a step in the background. A collective.

        Args:
            step: Number of the step.
            log: Rows so far.
            asked_for: Raise if it cannot be written; else warn, since the training itself does not need it.

        Raises:
            CheckpointError: It, or the one before, cannot be written.
        """
        self.wait()
        self._save, self._asked_for, self._saved_at = None, asked_for, time.monotonic()
        with self._warned_of():
            self._save = save_checkpoint(
                self.model,
                self.directory,
                step=step,
                optimizer=self.optimizer,
                extra={
                    "run": self.config.as_json(),
                    "data": self._data,
                    "metrics": log.rows,
                    "loss_scale": None if self.loss_scale is None else asdict(self.loss_scale),
                },
                keep=self.config.keep,
                asynchronous=True,
            )

    def wait(self) -> Path | None:
        """Wait for the last checkpoint to be complete, and return its path.

        Raises:
            CheckpointError: It could not be written.
        """
        path: Path | None = None
        with self._warned_of():
            path = None if self._save is None else self._save.wait()
        return path

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint of the run, also one from before it was resumed."""
        self.wait()
        directory = CheckpointDirectory(self.directory)
        return next((directory.of_step(step) for step in directory.steps()), None)

    @contextmanager
    def _warned_of(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            if self._asked_for:
                raise
            warnings.warn(f"{error}; the training goes on without this checkpoint", stacklevel=4)

    def remove_unasked(self) -> None:
        """Remove the checkpoints of a finished run that `save_every` did not ask for. For the first rank."""
        if not self.config.save_every:
            CheckpointDirectory(self.directory).keep(0)
            with suppress(OSError):  # it was never made, or holds something else
                os.rmdir(self.directory)


def difference_of_runs(
    config: FinetuneConfig, other: Mapping[str, Any], *, with_paths: bool = False
) -> tuple[str, Any, Any] | None:
    """Find the first option that makes two runs compute different things: its name, its value here and there.

    Args:
        config: Resolved options.
        other: Options of the other run, as `as_json` gave them.
        with_paths: Compare the paths of model and data, too, where their content cannot be compared.
    """
    own = json.loads(json.dumps(config.as_json()))
    for name in (field.name for field in fields(config)):
        compared = name not in _NEUTRAL or (with_paths and name in ("model", "data"))
        theirs = json.loads(json.dumps(other.get(name)))
        if compared and own[name] != theirs:
            return name, own[name], theirs
    return None
