"""Checkpoints of a run: what they hold beside the model, and whether a run may go on from one."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, fields
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from meshpeft.checkpoint import CheckpointError, Save, load_checkpoint, save_checkpoint
from meshpeft.checkpoint.coordination import agreed, checkpoint_group, rank_and_world_size
from meshpeft.checkpoint.directory import CheckpointDirectory
from meshpeft.checkpoint.manifest import Manifest
from meshpeft.models import LanguageModel
from meshpeft.parallel.agreement import all_or_none
from meshpeft.parallel.mesh import is_simulated, parallel_group_info
from meshpeft.training.config import FinetuneConfig
from meshpeft.training.inputs import Inputs
from meshpeft.training.metrics import MetricsLog
from meshpeft.training.optimizer import LossScale
from meshpeft.training.output import CHECKPOINTS
from meshpeft.training.packing import PackedRows

__all__ = ["RunCheckpoints", "agreed_date", "checkpoints_in", "run_date"]

# Options that change no number of the training: where it runs and reads, how often it measures and saves. The model,
# the data and what a template makes of them are compared by their content.
_NEUTRAL = frozenset(
    {
        "tp", "dp", "ep", "etp", "sequence_parallel", "micro_batch_size", "activation_checkpointing", "model", "engine",
        "data", "adapter_format", "output_dir", "overwrite", "eval_every", "eval_rows", "save_every", "keep", "resume",
        "config", "template_date",
    }
)  # fmt: skip


def checkpoints_in(directory: Path) -> Path:
    """A checkpoint, a directory of them, or the output directory of a run that holds one: the first or second."""
    inside = directory / CHECKPOINTS
    return inside if inside.is_dir() else directory


def run_date(config: FinetuneConfig) -> str:
    """The date that chat templates get in this run, the same on every rank. A collective.

    It is the option, or that of the checkpoint to go on from, or today's.
    """
    return agreed_date(config.template_date or _checkpoint_date(config))


def agreed_date(day: str | None) -> str:
    """This day, or today by the clock of rank 0, since machines differ in their time zone. A collective."""
    days = [day or date.today().isoformat()]
    world = parallel_group_info().world
    if world.world_size > 1 and not is_simulated():
        dist.broadcast_object_list(days, src=0, group=world.group)
    return days[0]


def _checkpoint_date(config: FinetuneConfig) -> str | None:
    """The date that a run to go on from recorded. `None` if there is none; whether it may go on is asked later."""
    if config.resume is None:
        return None
    own = config.output_dir.resolve() / CHECKPOINTS
    directory = CheckpointDirectory(own if config.resume == "auto" else checkpoints_in(Path(config.resume)))
    with suppress(CheckpointError, OSError):
        for path in directory.candidates():
            with suppress(CheckpointError, ValueError, TypeError, AttributeError):
                day = Manifest.read(path).extra.get("run", {}).get("template_date")
                return date.fromisoformat(day).isoformat()
    return None


class RunCheckpoints:
    """Saves and restores one run.

    Args:
        config: resolved options.
        model: with its adapters.
        optimizer: over them.
        loss_scale: of float16.
        inputs: the data of the run.

    Attributes:
        directory: where the checkpoints are written.
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
        self._data = {"train": _digest(inputs.train), "held_out": _digest(inputs.held_out)}
        self._save: Save | None = None

    def start(self, log: MetricsLog) -> int:
        """Go on from a checkpoint if the options say so, else clear away those of an earlier run. A collective.

        Args:
            log: gets the rows of the steps that are done.

        Returns:
            The steps that are done.

        Raises:
            CheckpointError: the checkpoint is broken, or of a run that computes something else.
        """
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
        """Remove what is there of steps after this one. A collective."""
        with all_or_none(f"clearing {self.directory}", CheckpointError):
            if rank_and_world_size(checkpoint_group())[0] == 0:
                CheckpointDirectory(self.directory).drop_after(step)

    def _source(self) -> Path | None:
        if self.config.resume is None:
            return None
        if self.config.resume != "auto":
            return checkpoints_in(Path(self.config.resume))
        found = agreed(CheckpointDirectory(self.directory).steps(), f"reading {self.directory}", checkpoint_group())
        return self.directory if found else None

    def _compare(self, extra: dict[str, Any], path: Path) -> None:
        """Whether this run computes what the run of a checkpoint did."""
        if not {"run", "data", "metrics", "loss_scale"} <= extra.keys():
            raise CheckpointError(f"{path} was not written by meshpeft finetune; resume it with what wrote it")
        for row in extra["metrics"]:
            int(row["step"])
        if self.loss_scale is not None:
            LossScale(**extra["loss_scale"])
        own = json.loads(json.dumps(self.config.as_json()))
        for name in (field.name for field in fields(self.config) if field.name not in _NEUTRAL):
            if extra["run"].get(name) != own[name]:
                raise CheckpointError(
                    f"{name} is {own[name]!r}, but {path} was written with {extra['run'].get(name)!r}; "
                    "a run goes on with the same options"
                )
        for name, digest in self._data.items():
            if extra["data"].get(name) != digest:
                raise CheckpointError(
                    f"the {name} rows are not those of {path}: the data, its tokenizer or --template-date changed"
                )

    def save(self, step: int, log: MetricsLog) -> None:
        """Write the checkpoint of a step in the background. A collective."""
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
        """The last checkpoint, when it is whole.

        Raises:
            CheckpointError: it could not be written.
        """
        return None if self._save is None else self._save.wait()

    def newest(self) -> Path | None:
        """The newest whole checkpoint of the run, also one from before it was resumed."""
        self.wait()
        directory = CheckpointDirectory(self.directory)
        return next((directory.of_step(step) for step in directory.steps()), None)


def _digest(rows: PackedRows) -> str:
    """A checksum of everything that training reads."""
    digest = hashlib.sha256(json.dumps([rows.seq_length, rows.pad_token_id]).encode())
    for name in ("tokens", "targets", "document_starts", "row_documents", "row_starts"):
        digest.update(np.ascontiguousarray(getattr(rows, name)).data)
    return digest.hexdigest()
