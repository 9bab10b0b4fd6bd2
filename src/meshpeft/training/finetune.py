"""The whole fine-tune: from the options to an adapter, with its numbers before and after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from meshpeft.checkpoint import export_peft_adapter, serving_note
from meshpeft.models import LanguageModel
from meshpeft.parallel.launcher_world import is_joined
from meshpeft.parallel.mesh import ParallelGroupInfo
from meshpeft.parallel.random import set_seed
from meshpeft.peft import trainable_parameters
from meshpeft.quantization import packed_size
from meshpeft.training.adapter_check import check_adapter
from meshpeft.training.adapters import add_adapter, describe_experts, describe_targets
from meshpeft.training.base_model import BaseModel, check_attention, find_base
from meshpeft.training.checkpoints import run_date
from meshpeft.training.config import FinetuneConfig, tensor_type
from meshpeft.training.default_layers import DefaultLayers
from meshpeft.training.inputs import check_rows, load_inputs, load_tokenizer
from meshpeft.training.launch import launch
from meshpeft.training.loop import TrainingLoop
from meshpeft.training.metrics import MetricsLog, plot_losses
from meshpeft.training.output import OutputDirectory
from meshpeft.training.progress import TrainingProgress
from meshpeft.training.prompts import continuation, prompt_of
from meshpeft.training.quantized_base import base_quantizer, start_adapter
from meshpeft.training.report import CURVE, METRICS, Report, describe_layout, short_path, write_record
from meshpeft.training.setup import join_mesh, workers_for

__all__ = ["finetune", "start"]

# How long workers that are asked to stop may take for the step they are in and for their last checkpoint.
SAVING_SECONDS = 600


def start(config: FinetuneConfig) -> None:
    """Check the options, then run [`finetune`][meshpeft.training.finetune.finetune] on the workers they need.

    Raises:
        MeshPEFTError: the options, the model, the data or the output directory are at fault; nothing is written.
        RunInterrupted: a signal asked for an end; there is a checkpoint to go on from.
        WorkerDied: a worker failed otherwise; nothing is written but the checkpoints before.
    """
    config = config.resolved()
    config.check()
    workers = workers_for(config)
    output = _output(config)
    output.check()
    base = find_base(config.model, config.engine)
    base.check(config)
    check_adapter(base, config)
    try:
        launch(finetune, config, workers=workers, shutdown_seconds=SAVING_SECONDS)
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
    info = join_mesh(config)
    config = replace(config, template_date=run_date(config))
    report = Report(info)
    set_seed(config.seed)
    base = find_base(config.model, config.engine)
    tokenizer = load_tokenizer(base.directory)
    inputs = load_inputs(config, tokenizer)
    layers = base.default_layers()
    model = _adapted(config, base, layers)
    check_rows(model, inputs.train, inputs.held_out)
    loop = TrainingLoop(config, model, inputs, info)
    for line in _subject(config, base, model, layers):
        report.say(line)
    report.say(f"data: {inputs.summary}")
    report.say(f"layout: {describe_layout(info, config.sequence_parallel)}")
    report.say(f"training: {loop.steps:,} steps of {config.batch_size} rows, {loop.epochs:.2f} epochs\n")
    prompt = prompt_of(inputs.sample)
    before = continuation(model, tokenizer, prompt, inputs.ends)
    with _staged(config, info) as output:
        log = MetricsLog(output.stage / METRICS if report.speaks else None)
        loop.run(log, TrainingProgress(loop.steps, report.console))
        after = continuation(model, tokenizer, prompt, inputs.ends)
        log.close()
        export_peft_adapter(
            model,
            output.stage,
            base_model_name_or_path=str(base.directory),
            format=config.adapter_format,
        )
        held_out = log.series("held_out_loss")[1]
        tokens, seconds = round(sum(log.series("tokens")[1])), sum(log.series("seconds")[1])
        if report.speaks:
            plot_losses(log, output.stage / CURVE, f"{config.method}, rank {config.rank}")
            results = {
                "held_out_loss_before": held_out[0],
                "held_out_loss_after": held_out[-1],
                "steps": loop.steps,
                "trainable_parameters": trainable_parameters(model).trainable,
                "packed": packed_size(model)._asdict() if config.quantize is not None else None,
                "training_seconds": round(seconds, 2),
                "tokens_per_second": round(tokens / seconds, 1),
            }
            write_record(output.stage, config, info, results)
    report.samples(tokenizer, inputs.sample, before, after)
    report.outcome(held_out[0], held_out[-1], tokens, seconds)
    report.next_commands(config.output_dir, inputs.example, serving_note(model, config.adapter_format))


def _adapted(config: FinetuneConfig, base: BaseModel, layers: DefaultLayers) -> LanguageModel:
    """This rank's share of the base, with its adapter as it starts. Every rank calls it."""
    model = base.load(
        tensor_type(config.dtype),
        quantize=base_quantizer(config, layers, residuals=True),
        sequence_parallel=config.sequence_parallel,
        activation_checkpointing=config.activation_checkpointing,
    )
    check_attention(model, config)
    add_adapter(model, config)
    start_adapter(model, config)
    return model


def _subject(config: FinetuneConfig, base: BaseModel, model: LanguageModel, layers: DefaultLayers) -> Iterator[str]:
    """What is trained, line by line."""
    yield f"model: {short_path(base.directory)}, {config.dtype}"
    if base.engine == "transformers":
        why = "" if base.reason is None else f" (not native: {base.reason.partition(';')[0]})"
        yield f"engine: transformers{why}"
    yield f"{config.method}: rank {config.rank} on {describe_targets(config, layers.adapted)}"
    experts = describe_experts(model)
    if experts is not None:
        yield f"experts: {experts}"
    yield str(trainable_parameters(model))
    if config.quantize is not None:
        yield f"packed: {packed_size(model)}"


@contextmanager
def _staged(config: FinetuneConfig, info: ParallelGroupInfo) -> Iterator[OutputDirectory]:
    """The output directory, whose stage the first rank makes, and puts in its place if all goes well."""
    output = _output(config)
    if info.world.rank != 0:
        yield output
        return
    output.open()
    try:
        yield output
        output.commit()
    finally:
        output.discard()


def _output(config: FinetuneConfig) -> OutputDirectory:
    return OutputDirectory(config.output_dir, overwrite=config.overwrite, resume=config.resume is not None)
