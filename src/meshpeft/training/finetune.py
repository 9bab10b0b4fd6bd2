"""The whole fine-tune: from the options to an adapter, with its numbers before and after."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from meshpeft.checkpoint import export_peft_adapter
from meshpeft.models import Decoder
from meshpeft.parallel.mesh import ParallelGroupInfo, init_parallelism
from meshpeft.parallel.random import set_seed
from meshpeft.peft import trainable_parameters
from meshpeft.training.adapters import add_adapter, check_adapter
from meshpeft.training.batches import RowSampler, eval_batches
from meshpeft.training.config import FinetuneConfig, TrainingError
from meshpeft.training.inputs import Inputs, load_inputs, load_tokenizer
from meshpeft.training.launch import is_joined, launch, number_of_workers
from meshpeft.training.metrics import MetricsLog, plot_losses
from meshpeft.training.optimizer import LossScale, adamw
from meshpeft.training.output import OutputDirectory
from meshpeft.training.progress import TrainingProgress
from meshpeft.training.prompts import continuation, prompt_of
from meshpeft.training.report import CURVE, METRICS, Report, describe_layout, write_record
from meshpeft.training.schedule import learning_rate, warmup_steps
from meshpeft.training.setup import base_directory, check_base, device, load_base
from meshpeft.training.step import TrainStep, mean_loss

__all__ = ["finetune", "start"]


def start(config: FinetuneConfig) -> None:
    """Check the options, then run [`finetune`][meshpeft.training.finetune.finetune] on the workers they need.

    Raises:
        MeshPEFTError: the options, the model, the data or the output directory are at fault; nothing is written.
        WorkerDied: a worker failed otherwise; nothing is written.
    """
    config = config.resolved()
    config.check()
    workers = number_of_workers(config.tp, config.dp)
    output = OutputDirectory(config.output_dir, overwrite=config.overwrite)
    output.check()
    check_adapter(check_base(config.model, config.tp), config)
    try:
        launch(finetune, config, workers=workers)
    finally:
        if not is_joined():  # a worker that was killed could not clean up after itself
            output.discard()


def finetune(config: FinetuneConfig) -> None:
    """Fine-tune on the mesh that this process is part of. Every rank calls it, with equal options.

    Args:
        config: checked and [`resolved`][meshpeft.training.config.FinetuneConfig.resolved].

    Raises:
        MeshPEFTError: the model or the data cannot be used; raised before anything is written.
        TrainingError: the loss is not finite.
    """
    info = init_parallelism(tensor_parallel=config.tp)
    report = Report(info)
    set_seed(config.seed)
    tokenizer = load_tokenizer(base_directory(config.model))
    inputs = load_inputs(config, tokenizer)
    model = load_base(
        config.model,
        config.dtype,
        sequence_parallel=config.sequence_parallel,
        activation_checkpointing=config.activation_checkpointing,
    )
    add_adapter(model, config)
    parameters = trainable_parameters(model)
    sampler = RowSampler(
        rows=inputs.train,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        dp_rank=info.dp.rank,
        dp_size=info.dp.world_size,
        seed=config.seed,
        pad_to_longest=not config.packing,
    )
    steps = sampler.steps(config.epochs or 1.0) if config.steps is None else config.steps
    report.say(f"model: {base_directory(config.model)}, {config.dtype}")
    report.say(f"{config.method}: rank {config.rank} on {', '.join(config.target_modules)}")
    report.say(str(parameters))
    report.say(f"data: {inputs.summary}")
    report.say(f"layout: {describe_layout(info, config.sequence_parallel)}")
    report.say(f"training: {steps:,} steps of {config.batch_size} rows, {steps / sampler.steps_per_epoch:.2f} epochs")

    prompt = prompt_of(inputs.sample)
    before = continuation(model, tokenizer, prompt)
    with _staged(config, info) as output:
        log = MetricsLog(output.stage / METRICS if report.speaks else None)
        seconds = _train(model, config, sampler, inputs, steps, info, log, report)
        after = continuation(model, tokenizer, prompt)
        log.close()
        export_peft_adapter(model, output.stage, base_model_name_or_path=str(base_directory(config.model)))
        held_out = log.series("held_out_loss")[1]
        tokens = round(sum(log.series("tokens")[1]))
        if report.speaks:
            plot_losses(log, output.stage / CURVE, f"{config.method}, rank {config.rank}")
            results = {
                "held_out_loss_before": held_out[0],
                "held_out_loss_after": held_out[-1],
                "steps": steps,
                "trainable_parameters": parameters.trainable,
                "training_seconds": round(seconds, 2),
                "tokens_per_second": round(tokens / seconds, 1),
            }
            write_record(output.stage, config, info, results)
    report.samples(tokenizer, inputs.sample, before, after)
    report.outcome(held_out[0], held_out[-1], tokens, seconds)
    report.next_commands(config.output_dir, inputs.example)


def _train(
    model: Decoder,
    config: FinetuneConfig,
    sampler: RowSampler,
    inputs: Inputs,
    steps: int,
    info: ParallelGroupInfo,
    log: MetricsLog,
    report: Report,
) -> float:
    """The loop. Returns the seconds that the steps took, without the measurements in between."""
    peak = config.lr or 0.0
    warmup = warmup_steps(config.warmup, steps)
    step = TrainStep(
        model,
        adamw(model, lr=peak, weight_decay=config.weight_decay),
        clip=config.clip,
        loss_scale=LossScale() if config.dtype == "float16" else None,
    )
    held_out = eval_batches(
        inputs.held_out,
        micro_batch_size=config.micro_batch_size,
        dp_rank=info.dp.rank,
        dp_size=info.dp.world_size,
    )

    def measure(done: int) -> None:
        batches = (batch.to(device()) for batch in held_out)
        loss = float(mean_loss(model, batches, held_out.global_target_tokens))
        log.add(step=done, held_out_loss=loss)
        progress.note(f"held-out loss after {done} steps: {loss:.4f}")

    total = 0.0
    with TrainingProgress(steps, report.console) as progress:
        measure(0)
        for number in range(steps):
            begun = time.monotonic()
            batch = sampler.micro_batches(number)
            lr = learning_rate(number, peak=peak, steps=steps, warmup=warmup)
            result = step((micro.to(device()) for micro in batch), batch.global_target_tokens, lr=lr)
            loss, norm = float(result.loss), float(result.grad_norm)
            seconds = time.monotonic() - begun
            total += seconds
            if not math.isfinite(loss):
                raise TrainingError(
                    f"step {number + 1}: the loss is {loss}; use a lower --lr than {peak:g}, or a wider --dtype "
                    f"than {config.dtype}"
                )
            log.add(
                step=number + 1,
                loss=loss,
                learning_rate=lr,
                grad_norm=norm if math.isfinite(norm) else None,
                tokens=batch.global_tokens,
                target_tokens=batch.global_target_tokens,
                seconds=round(seconds, 4),
            )
            progress.advance(loss, batch.global_tokens, seconds)
            if number + 1 == steps or (config.eval_every and (number + 1) % config.eval_every == 0):
                measure(number + 1)
    return total


@contextmanager
def _staged(config: FinetuneConfig, info: ParallelGroupInfo) -> Iterator[OutputDirectory]:
    """The output directory, whose stage the first rank makes, and puts in its place if all goes well."""
    output = OutputDirectory(config.output_dir, overwrite=config.overwrite)
    if info.world.rank != 0:
        yield output
        return
    output.open()
    try:
        yield output
        output.commit()
    finally:
        output.discard()
