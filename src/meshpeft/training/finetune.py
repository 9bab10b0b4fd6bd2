"""`meshpeft finetune`: from the options to an adapter, with its numbers before and after."""

from __future__ import annotations

import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from meshpeft.checkpoint import export_peft_adapter, serving_note
from meshpeft.data.documents import prompt_of
from meshpeft.data.tokenizers import load_tokenizer
from meshpeft.hub.staging import StagedFiles
from meshpeft.models import LanguageModel
from meshpeft.parallel.agreement import all_or_none
from meshpeft.parallel.errors import MeshPEFTError, first_line, shown
from meshpeft.parallel.launcher_world import is_joined
from meshpeft.parallel.mesh import ParallelGroupInfo
from meshpeft.parallel.random import set_seed
from meshpeft.peft import trainable_parameters
from meshpeft.quantization import packed_size
from meshpeft.training.adapters import (
    DefaultLayers,
    add_adapter,
    base_quantizer,
    check_adapter,
    default_layers_of,
    describe_experts,
    describe_targets,
    start_adapter,
)
from meshpeft.training.base import BaseModel, check_attention, find_base
from meshpeft.training.checkpoints import difference_of_runs, run_date
from meshpeft.training.config import RECORD, ConfigError, FinetuneConfig, tensor_type
from meshpeft.training.generate import continuation
from meshpeft.training.inputs import Inputs, check_rows, load_inputs
from meshpeft.training.launch import Interruption, device, join_mesh, launch, speaks_for_all, workers_for
from meshpeft.training.loop import TrainingLoop
from meshpeft.training.output import CURVE, METRICS, OutputDirectory, OutputError
from meshpeft.training.report import (
    MetricsLog,
    Report,
    TrainingProgress,
    counted,
    describe_layout,
    plot_losses,
    record_of,
    short_path,
)
from meshpeft.training.same_inputs import check_same_inputs

__all__ = ["finetune", "start"]

# How long workers that are asked to stop may take for the step they are in and for their last checkpoint.
SAVING_SECONDS = 600


def start(config: FinetuneConfig, prove: Callable[[FinetuneConfig, BaseModel], str] | None = None) -> None:
    """Check the options, then run `finetune` on the workers they need.

    Args:
        config: Options of the run.
        prove: Called with the checked options before several workers compute with a model whose code is not ours.
            Returns a line that is printed, or raises a `MeshPEFTError`, which ends the run.

    Raises:
        MeshPEFTError: The options, the model, the data or the output directory are at fault; nothing is written.
        RunInterrupted: A signal asked for an end; there is a checkpoint to go on from.
        WorkerDied: A worker failed otherwise; nothing is written but the checkpoints before.
    """
    config = config.resolved()
    config.check()
    workers = workers_for(config)
    output = _output(config)
    if not is_joined():  # else the first rank looks, for all
        if _is_finished(config, output):
            print(_finished_sentence(config))
            return
        output.check()
    if config.offload_activations and device().type == "cpu":
        raise ConfigError(
            "offload_activations: there is no GPU here, so activations are in host memory already; leave it out"
        )
    base = find_base(config.model, config.engine)
    base.check(config)
    check_adapter(base, config)
    if prove is not None and base.engine == "transformers" and workers > 1:
        found = prove(config, base)  # where a launcher started the ranks, each finds the same
        if speaks_for_all():
            print(found)
    try:
        launch(finetune, config, workers=workers, shutdown_seconds=SAVING_SECONDS)
    finally:
        if not is_joined():  # a worker that was killed could not clean up after itself
            output.clear()


def finetune(config: FinetuneConfig) -> None:
    """Fine-tune on the mesh that this process is part of. Every rank calls it, with equal options.

    Args:
        config: Checked and `resolved`.

    Raises:
        MeshPEFTError: The model or the data cannot be used; raised before anything is written.
        TrainingError: The loss is not finite.
        RunInterrupted: A signal asked for an end; there is a checkpoint to go on from.
        OutputError: The adapter could not be written, or not where it should be; the message names its place.
    """
    info = join_mesh(config)
    config = replace(config, template_date=run_date(config))
    report = Report(info)
    with _owned(config, info) as output:
        if output is None:
            report.say(_finished_sentence(config))
        else:
            _train(config, info, report, output)


def _train(config: FinetuneConfig, info: ParallelGroupInfo, report: Report, output: OutputDirectory) -> None:
    set_seed(config.seed)
    with all_or_none("reading the model and the data"):
        base = find_base(config.model, config.engine)
        tokenizer = load_tokenizer(base.directory)
        inputs = load_inputs(config, tokenizer)
    rows = {"training rows": inputs.train, "held-out rows": inputs.held_out}
    check_same_inputs(config, base.directory, tokenizer, rows)
    layers = default_layers_of(base)
    model = _adapted(config, base, layers)
    check_rows(model, inputs.train, inputs.held_out)
    loop = TrainingLoop(config, model, inputs, info)
    for line in _subject(config, base, model, layers):
        report.say(line)
    report.say(f"data: {inputs.summary}")
    report.say(f"layout: {describe_layout(info, config)}")
    report.say(
        f"training: {counted(loop.steps, 'step')} of {counted(config.batch_size, 'row')}, {loop.epochs:.2f} epochs\n"
    )
    before = _sample(model, tokenizer, inputs, info)
    log = MetricsLog()
    loop.restore(log)
    with all_or_none(f"writing {config.output_dir}", OutputError):
        if report.speaks:
            output.begin(record_of(config, info, None))
            log.write_to(output.metrics)
    with Interruption() as interruption:  # until the adapter is in its place
        loop.run(log, TrainingProgress(loop.steps, report.console), interruption)
        _publish(config, model, base, output, info)
        held_out = log.series("held_out_loss")[1]
        tokens, seconds = round(sum(log.series("tokens")[1])), sum(log.series("seconds")[1])
        files = [METRICS]
        if report.speaks:
            results = {
                "held_out_loss_before": held_out[0],
                "held_out_loss_after": held_out[-1],
                "steps": loop.steps,
                "trainable_parameters": trainable_parameters(model).trainable,
                "packed": packed_size(model)._asdict() if config.quantize is not None else None,
                "training_seconds": round(seconds, 2),
                "tokens_per_second": round(tokens / seconds, 1),
            }
            with _or_warning(f"{config.output_dir}: {RECORD} could not be written, so the run counts as unfinished"):
                log.close()
                output.finish(record_of(config, info, results))
                files.append(RECORD)
        if RECORD in files:
            with _or_warning(f"{config.output_dir}: checkpoints that nobody asked for could not be removed"):
                loop.remove_unasked_checkpoints()
    if report.speaks:
        with _or_warning(f"{config.output_dir}: {CURVE} could not be drawn"):
            plot_losses(log, output.path, f"{config.method}, rank {config.rank}")
            files.insert(1, CURVE)
    after = _sample(model, tokenizer, inputs, info)
    if before is not None and after is not None:
        with _or_warning("the sample could not be shown"):
            report.samples(tokenizer, inputs.sample, before, after)
    report.outcome(held_out[0], held_out[-1], tokens, seconds)
    report.next_commands(config.output_dir, files, inputs.example, serving_note(model, config.adapter_format))


def _publish(
    config: FinetuneConfig, model: LanguageModel, base: BaseModel, output: OutputDirectory, info: ParallelGroupInfo
) -> None:
    """Put the adapter into the output directory, or, if it cannot be written there, anywhere. Every rank calls it.

    Raises:
        CheckpointError: The adapter is none that may be written.
        OutputError: It is not in its place; the message names where it is.
    """
    leads = info.world.rank == 0
    staged: StagedFiles | None = None

    def export(folder: Path) -> None:
        named = str(base.directory)
        export_peft_adapter(model, folder, base_model_name_or_path=named, format=config.adapter_format)

    try:
        try:
            with all_or_none(str(config.output_dir), OutputError):
                staged = StagedFiles(output.path) if leads else None
            export(config.output_dir if staged is None else staged.folder)
        except MeshPEFTError as error:
            if not _of_first_rank(isinstance(error.__cause__, OSError), info):
                raise
            output.keep()
            folder = Path(tempfile.gettempdir()) / f"meshpeft-{uuid.uuid4().hex[:8]}"
            elsewhere: Path = _of_first_rank(folder / output.path.name, info)
            reason = str(error) if staged is None else str(error).replace(str(staged.folder), str(output.path))
            try:
                export(elsewhere)
            except MeshPEFTError as second:
                raise OutputError(f"the adapter could not be written: {reason}; nor {second}") from error
            raise OutputError(f"{reason}; the finished adapter is in {elsewhere}") from error
        with all_or_none(f"writing {config.output_dir}", OutputError):
            if staged is not None:
                output.publish(staged)
    finally:
        if staged is not None:
            staged.clean_up()


def _sample(
    model: LanguageModel, tokenizer: PreTrainedTokenizerBase, inputs: Inputs, info: ParallelGroupInfo
) -> str | None:
    """Continue the held-out prompt; warn if that fails, since no training is to be lost by it. Every rank calls it."""
    try:
        return continuation(model, tokenizer, prompt_of(inputs.sample), inputs.ends)
    except Exception as error:
        # Where one rank may fail alone the others wait for it, and it has to end.
        if info.world.world_size > 1 and isinstance(error, torch.OutOfMemoryError | torch.distributed.DistError):
            raise
        warnings.warn(f"there is no sample of what the model says: {first_line(error)}", stacklevel=2)
        return None


@contextmanager
def _or_warning(what: str) -> Iterator[None]:
    """Warn of a failure in the block instead of raising it, since the training is done."""
    try:
        yield
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        warnings.warn(f"{what}: {reason}", stacklevel=3)


def _adapted(config: FinetuneConfig, base: BaseModel, layers: DefaultLayers) -> LanguageModel:
    """Load this rank's shard of the base, and add the adapter as it starts. Every rank calls it."""
    model = base.load(
        tensor_type(config.dtype),
        quantize=base_quantizer(config, layers, residuals=True),
        sequence_parallel=config.sequence_parallel,
        activation_checkpointing=config.activation_checkpointing,
        shard_base=config.shard_base,
    )
    model.loss_chunk = config.loss_chunk
    model.offloads_activations = config.offload_activations
    check_attention(model, config)
    add_adapter(model, config)
    start_adapter(model, config)
    return model


def _subject(config: FinetuneConfig, base: BaseModel, model: LanguageModel, layers: DefaultLayers) -> Iterator[str]:
    """Describe what is trained, line by line."""
    yield f"model: {short_path(base.directory)}, {config.dtype}"
    if base.engine == "transformers":
        why = "" if base.reason is None else f" (not native: {base.reason.partition(';')[0]})"
        yield f"engine: transformers{why}"
    yield f"{config.method}: rank {config.rank} on {describe_targets(config, layers.adapted)}"
    experts = describe_experts(model)
    if experts is not None:
        yield f"experts: {experts}"
    yield str(trainable_parameters(model))
    if model.left_out:
        yield f"left out in training: {', '.join(model.left_out)}, which differs from layout to layout"
    for what, shares in {
        "without an adapter": layers.without_adapter,
        "held in full by every process": layers.replicated,
    }.items():
        if shares:
            yield f"{what}: {sum(shares.values()):.1%} of the weights of the blocks ({', '.join(shares)})"
    if config.quantize is not None:
        yield f"packed: {packed_size(model)}"


@contextmanager
def _owned(config: FinetuneConfig, info: ParallelGroupInfo) -> Iterator[OutputDirectory | None]:
    """Own the output directory on the first rank; yield `None` if the run is finished. A collective."""
    output = _output(config)
    leads = info.world.rank == 0
    finished = False
    with all_or_none(f"opening {config.output_dir}", OutputError):
        if leads:
            finished = _is_finished(config, output)
            if not finished:
                output.open()
    if _of_first_rank(finished, info):
        yield None
        return
    try:
        yield output
    finally:
        if leads:
            output.close()


def _is_finished(config: FinetuneConfig, output: OutputDirectory) -> bool:
    """Return whether `--resume auto` finds this very run, finished.

    Raises:
        OutputError: It finds another one, which is not to be replaced.
    """
    if config.resume != "auto" or not output.is_finished():
        return False
    difference = difference_of_runs(config, FinetuneConfig.from_json(output.path / RECORD).as_json(), with_paths=True)
    if difference is not None and not config.overwrite:
        name, own, other = difference
        raise OutputError(
            f"{config.output_dir}: holds a finished run whose {name} is {shown(other)}, not {shown(own)}; choose "
            "another output directory, or replace it with --overwrite"
        )
    return difference is None


def _of_first_rank(value: Any, info: ParallelGroupInfo) -> Any:
    """Broadcast the first rank's value. A collective."""
    values = [value]
    if info.world.world_size > 1:
        dist.broadcast_object_list(values, src=0, group=info.world.group)
    return values[0]


def _finished_sentence(config: FinetuneConfig) -> str:
    return (
        f"{config.output_dir}: the run is finished, and nothing is left to do; to start it again, give --overwrite in "
        "place of --resume"
    )


def _output(config: FinetuneConfig) -> OutputDirectory:
    return OutputDirectory(config.output_dir, overwrite=config.overwrite, resume=config.resume is not None)
