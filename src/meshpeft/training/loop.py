"""The loop over the steps, with a measurement of the held-out loss now and then."""

from __future__ import annotations

import math
import time
import warnings

from meshpeft.models import LanguageModel
from meshpeft.parallel.mesh import ParallelGroupInfo
from meshpeft.training.batches import RowSampler, eval_batches
from meshpeft.training.checkpoints import RunCheckpoints
from meshpeft.training.config import FinetuneConfig, TrainingError
from meshpeft.training.inputs import Inputs
from meshpeft.training.interruption import Interruption, RunInterrupted
from meshpeft.training.metrics import MetricsLog
from meshpeft.training.optimizer import LossScale, adamw
from meshpeft.training.progress import TrainingProgress
from meshpeft.training.schedule import learning_rate, steps_between_measurements, warmup_steps
from meshpeft.training.setup import device
from meshpeft.training.step import StepResult, TrainStep, mean_loss
from meshpeft.training.untrained import untrained_layers

__all__ = ["TrainingLoop"]


class TrainingLoop:
    """Trains the adapters of `model` on this rank's share of every batch.

    Args:
        config: resolved options.
        model: with its adapters.
        inputs: all rows, the same on every rank.
        info: the mesh.

    Attributes:
        steps: of the whole run.
        epochs: how often these steps read the rows.
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
        )
        self._held_out = eval_batches(
            inputs.held_out,
            micro_batch_size=config.micro_batch_size,
            dp_rank=info.dp.rank,
            dp_size=info.dp.world_size,
            most=config.eval_rows,
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

    def run(self, log: MetricsLog, progress: TrainingProgress) -> None:
        """Take every step that is left, and measure before, after and every `eval_every` steps.

        Warns of adapters that no step trained.

        Raises:
            CheckpointError: the run cannot go on from the checkpoint it was told to, or one cannot be written.
            RunInterrupted: a signal asked for an end; there is a checkpoint of the last step.
            TrainingError: the loss of a step is not finite.
        """
        start = self._checkpoints.start(log)
        every = self.config.eval_every
        if every is None:
            every = steps_between_measurements(self.steps, self.config.batch_size, len(self._held_out.rows))
        every = every or self.steps
        with progress, Interruption() as interruption:
            progress.start_at(start)
            if start:
                progress.note(f"resumed after step {start}")
            else:
                self._measure(0, log, progress)
            for done in range(start + 1, self.steps + 1):
                self._take(done, log, progress)
                if done % every == 0 or done == self.steps:
                    self._measure(done, log, progress)
                self._save(done, interruption.requested(), log)
        self._checkpoints.wait()
        untrained = untrained_layers(self.model, self._step.optimizer)
        if untrained:
            others = f" and {len(untrained) - 1} more layers" if len(untrained) > 1 else ""
            warnings.warn(
                f"{untrained[0]}{others}: the adapters had no gradient in any step, so they are as they were; leave "
                "out layers that text does not pass through with --exclude-modules",
                stacklevel=2,
            )

    def _save(self, done: int, interrupted_by: int, log: MetricsLog) -> None:
        every = self.config.save_every
        if interrupted_by or (every and (done % every == 0 or done == self.steps)):
            self._checkpoints.save(done, log)
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
        loss, norm = self._checked(number, result)
        seconds = time.monotonic() - begun
        balance = {} if result.router_loss is None else {"router_loss": float(result.router_loss)}
        log.add(
            step=number,
            loss=loss,
            **balance,
            learning_rate=lr,
            grad_norm=norm if math.isfinite(norm) else None,
            tokens=batch.global_tokens,
            target_tokens=batch.global_target_tokens,
            seconds=round(seconds, 4),
        )
        progress.advance(loss, batch.global_tokens, seconds)

    def _checked(self, number: int, result: StepResult) -> tuple[float, float]:
        loss = float(result.loss)
        if not math.isfinite(loss):
            raise TrainingError(
                f"step {number}: the loss is {loss}; use a lower --lr than {self._peak:g}, or a wider --dtype than "
                f"{self.config.dtype}"
            )
        return loss, float(result.grad_norm)

    def _measure(self, done: int, log: MetricsLog, progress: TrainingProgress) -> None:
        batches = (micro_batch.to(device()) for micro_batch in self._held_out)
        loss = float(mean_loss(self.model, batches, self._held_out.global_target_tokens))
        log.add(step=done, held_out_loss=loss)
        progress.note(f"held-out loss after {done} steps: {loss:.4f}")
