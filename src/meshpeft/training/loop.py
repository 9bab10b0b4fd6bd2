"""The loop over the steps, with a measurement of the held-out loss now and then.

A step without a finite gradient is left out. `MOST_SKIPPED` of them in a row end the run: its adapter is what it was
before them, and is kept as a checkpoint. A held-out loss that is not finite ends it at once, before a checkpoint of
such an adapter takes the place of an older one.
"""

from __future__ import annotations

import math
import time
import warnings
from itertools import takewhile

import torch
from torch import Tensor, nn

from meshpeft.data.batches import RowSampler, eval_batches
from meshpeft.data.context import ContextShard
from meshpeft.models import LanguageModel
from meshpeft.parallel.finite import finite_everywhere
from meshpeft.parallel.mesh import ParallelGroupInfo
from meshpeft.peft import adapter_wrappers
from meshpeft.training.checkpoints import RunCheckpoints
from meshpeft.training.config import FinetuneConfig, TrainingError
from meshpeft.training.inputs import Inputs
from meshpeft.training.launch import Interruption, RunInterrupted, device
from meshpeft.training.report import MetricsLog, TrainingProgress, counted
from meshpeft.training.step import LossScale, TrainStep, adamw, mean_loss

__all__ = [
    "MOST_SKIPPED",
    "TrainingLoop",
    "learning_rate",
    "steps_between_measurements",
    "untrained_layers",
    "warmup_steps",
]

MOST_SKIPPED = 5
"""So many steps in a row without a finite gradient end a run. Those that lower float16's loss scale do not count."""


class TrainingLoop:
    """Trains the adapters of `model` on this rank's share of every batch.

    Args:
        config: Resolved options.
        model: Model with its adapters.
        inputs: All rows, the same on every rank.
        info: Mesh.

    Attributes:
        steps: Steps of the run.
        epochs: How often these steps read the rows.
    """

    def __init__(self, config: FinetuneConfig, model: LanguageModel, inputs: Inputs, info: ParallelGroupInfo) -> None:
        self.config = config
        self.model = model
        self._sampler = RowSampler(
            rows=inputs.train,
            batch_size=config.batch_size,
            micro_batch_size=config.micro_batch_size,
            dp_rank=info.dp.rank,
            dp_size=info.dp.world_size,
            seed=config.seed,
            pad_to_longest=not config.packing,
            context=ContextShard.here(),
        )
        self._held_out = eval_batches(
            inputs.held_out,
            micro_batch_size=config.micro_batch_size,
            dp_rank=info.dp.rank,
            dp_size=info.dp.world_size,
            most=config.eval_rows,
            context=ContextShard.here(),
        )
        self.steps = self._sampler.steps(config.epochs or 1.0) if config.steps is None else config.steps
        self.epochs = self.steps / self._sampler.steps(1)
        self._peak = config.lr or config.GENERAL_LEARNING_RATE
        self._warmup = warmup_steps(config.warmup, self.steps)
        optimizer = adamw(model, lr=self._peak, weight_decay=config.weight_decay, lr_ratio=config.lora_plus)
        loss_scale = LossScale() if config.dtype == "float16" else None
        self._step = TrainStep(
            model,
            optimizer,
            clip=config.clip,
            loss_scale=loss_scale,
            router_aux_loss_coef=config.router_aux_loss_coef,
        )
        self._checkpoints = RunCheckpoints(config, model, optimizer, loss_scale, inputs)
        # Steps in a row that were not taken, and steps that were since the last checkpoint.
        self._skipped = self._unsaved = 0
        self._start = 0

    def restore(self, log: MetricsLog) -> None:
        """Resume from a checkpoint if the options name one, else remove those of an earlier run. A collective.

        Args:
            log: Receives the rows of the steps that are done.

        Raises:
            CheckpointError: The run cannot be resumed from the checkpoint that the options name.
        """
        self._start = self._checkpoints.start(log)

    def run(self, log: MetricsLog, progress: TrainingProgress, interruption: Interruption) -> None:
        """Take every step that is left, and measure before, after and every `eval_every` steps.

        Warns of adapters that no step trained.

        Raises:
            CheckpointError: A checkpoint that was asked for cannot be written.
            RunInterrupted: A signal asked for an end; there is a checkpoint of the last step.
            TrainingError: A held-out loss is not finite, or the gradients of too many steps in a row are not.
        """
        start = self._start
        self._skipped = _skipped_at_the_end(log)
        every = self.config.eval_every
        if every is None:
            every = steps_between_measurements(self.steps, self.config.batch_size, len(self._held_out.rows))
        every = every or self.steps
        with progress:
            progress.start_at(start)
            if start:
                progress.note(f"resumed after step {start}")
            else:
                self._measure(0, log, progress)
            for done in range(start + 1, self.steps + 1):
                self._take(done, log, progress)
                if done % every == 0 or done == self.steps:
                    self._measure(done, log, progress)
                self._save(done, interruption, log)
        self._checkpoints.wait()
        skipped = sum(bool(row.get("skipped")) for row in log.rows)
        if skipped:
            progress.note(f"{skipped:,} of {self.steps:,} steps were skipped: their gradients were not finite")
        untrained = untrained_layers(self.model, self._step.optimizer)
        if untrained:
            others = f" and {len(untrained) - 1} more layers" if len(untrained) > 1 else ""
            warnings.warn(
                f"{untrained[0]}{others}: the adapters had no gradient in any step, so they are as they were; leave "
                "out layers that text does not pass through with --exclude-modules",
                stacklevel=2,
            )

    def remove_unasked_checkpoints(self) -> None:
        """Remove the checkpoints of a finished run that `save_every` did not ask for. For the first rank."""
        self._checkpoints.remove_unasked()

    def _save(self, done: int, interruption: Interruption, log: MetricsLog) -> None:
        interrupted_by, due = interruption.requested(self._checkpoints.is_due())
        every, last = self.config.save_every, done == self.steps
        asked_for = bool(interrupted_by or (every and (done % every == 0 or last)))
        if asked_for or (due and not last):
            self._checkpoints.save(done, log, asked_for=asked_for)
            self._unsaved = 0
        if interrupted_by:
            path = self._checkpoints.wait()
            raise RunInterrupted(
                f"interrupted after step {done}; saved {path}; go on by the same command with --resume auto",
                interrupted_by,
            )

    def _take(self, number: int, log: MetricsLog, progress: TrainingProgress) -> None:
        begun = time.monotonic()
        batch = self._sampler.micro_batches(number - 1)
        lr = learning_rate(number - 1, peak=self._peak, steps=self.steps, warmup=self._warmup)
        micro_batches = (micro_batch.to(device()) for micro_batch in batch)
        result = self._step(micro_batches, batch.global_target_tokens, lr=lr)
        loss, norm = _if_finite(result.loss), _if_finite(result.grad_norm)
        seconds = time.monotonic() - begun
        balance = {} if result.router_loss is None else {"router_loss": _if_finite(result.router_loss)}
        # A loss scale that was too large is no fault of the run.
        skipped = {} if result.skipped is None else {"skipped": "overflow" if result.rescaled else "not finite"}
        log.add(
            step=number,
            loss=loss,
            **balance,
            learning_rate=lr,
            grad_norm=norm,
            **skipped,
            tokens=batch.global_tokens,
            target_tokens=batch.global_target_tokens,
            seconds=round(seconds, 4),
        )
        progress.advance(math.nan if loss is None else loss, batch.global_tokens, seconds)
        if result.skipped is None:
            self._skipped, self._unsaved = 0, self._unsaved + 1
        elif not result.rescaled:
            self._skipped += 1
            progress.note(f"step {number} skipped: {result.skipped}")
            if self._skipped >= MOST_SKIPPED:
                self._give_up(number, result.skipped, log)

    def _give_up(self, number: int, why: str, log: MetricsLog) -> None:
        """End the run, whose adapter is that of the last step that was taken."""
        if self._unsaved:
            self._checkpoints.save(number, log)
        path = self._checkpoints.newest()
        kept = "" if path is None else f"; {path} holds the adapter from before them"
        raise TrainingError(
            f"step {number}: {self._skipped} steps in a row were skipped: {why}{kept}. {self._advice()}"
        )

    def _advice(self) -> str:
        return f"Use a lower --lr than {self._peak:g}, or a wider --dtype than {self.config.dtype}"

    def _measure(self, done: int, log: MetricsLog, progress: TrainingProgress) -> None:
        batches = (micro_batch.to(device()) for micro_batch in self._held_out)
        loss = mean_loss(self.model, batches, self._held_out.global_target_tokens)
        if not finite_everywhere(loss):
            log.add(step=done, held_out_loss=None)
            path = self._checkpoints.newest()
            if not done:
                raise TrainingError(
                    f"the held-out loss before training is {float(loss)}: the model itself overflows, or its weights "
                    f"are not finite. Use a wider --dtype than {self.config.dtype}, or other weights"
                )
            kept = "no checkpoint was saved before" if path is None else f"{path} is from before"
            raise TrainingError(
                f"the held-out loss after step {done} is {float(loss)}: the steps have broken the adapter ({kept}). "
                f"{self._advice()}"
            )
        log.add(step=done, held_out_loss=float(loss))
        progress.note(f"held-out loss after {counted(done, 'step')}: {float(loss):.4f}")


def _if_finite(value: Tensor) -> float | None:
    """Convert a number for a JSON file, which has none for NaN and infinity."""
    number = float(value)
    return number if math.isfinite(number) else None


def _skipped_at_the_end(log: MetricsLog) -> int:
    """Count the steps at the end of the log that were skipped."""
    steps = [row.get("skipped") for row in log.rows if "loss" in row]
    return len(list(takewhile(lambda skipped: skipped == "not finite", reversed(steps))))


# Measurements take this part of the time of training, are at least so many steps apart, and in a run long enough for
# it there are at least so many of them between the first and the last.
_SHARE_OF_MEASURING = 0.1
_FEWEST_STEPS_BETWEEN = 50
_FEWEST_BETWEEN = 3


def warmup_steps(warmup: float, steps: int) -> int:
    """Convert `warmup` to a number of steps: below 1 it is a part of `steps`, rounded; else a number, cut at
    `steps`.
    """
    return min(round(warmup * steps) if warmup < 1 else int(warmup), steps)


def learning_rate(step: int, *, peak: float, steps: int, warmup: int) -> float:
    """Linear warm-up to `peak`, then half a cosine (SGDR, arXiv 1608.03983) down to 0.

    Step `step` (from 0) of the warm-up has `peak * (step + 1) / warmup`, so that no step is wasted at 0; 0 itself
    would come one step after the last.

    Args:
        step: Number of the step, from 0 to `steps - 1`.
        peak: Learning rate in the last step of the warm-up.
        steps: Steps of the run.
        warmup: Steps of the warm-up.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.5 * peak * (1 + math.cos(math.pi * progress))


def steps_between_measurements(steps: int, batch_size: int, measured_rows: int) -> int:
    """Space the measurements of a run so that they take about a tenth of the time of its training.

    Args:
        steps: Steps of the run.
        batch_size: Rows of a step, which take about three times as long as rows that are only measured.
        measured_rows: Rows of one measurement.

    Returns:
        Steps from one measurement to the next; the first comes before the first step, the last after the last.
    """
    affordable = int(_SHARE_OF_MEASURING * 3 * steps * batch_size / measured_rows) - 2
    return max(_FEWEST_STEPS_BETWEEN, math.ceil(steps / (max(_FEWEST_BETWEEN, affordable) + 1)))


def untrained_layers(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Full names of the layers whose adapters had no gradient in any step, as far as this rank's slices go.

    The output of the model does not depend on such a layer: it is part of something that text does not pass through,
    or of experts that no token was sent to.

    Args:
        model: Model with its adapters.
        optimizer: AdamW that has taken the steps: its moments remember gradients.
    """

    def had_gradient(parameter: nn.Parameter) -> bool:
        state = optimizer.state.get(parameter, {})
        return any(bool(state[moment].any()) for moment in ("exp_avg", "exp_avg_sq") if moment in state)

    return [
        name
        for name, wrapper in adapter_wrappers(model)
        if not any(had_gradient(parameter) for parameter in wrapper.adapter.parameters())
    ]
