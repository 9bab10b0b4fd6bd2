"""The loss of a model on data, with or without an adapter."""

from __future__ import annotations

import math
from dataclasses import replace

from meshpeft.data.batches import eval_batches
from meshpeft.data.context import ContextShard
from meshpeft.data.tokenizers import load_tokenizer
from meshpeft.parallel.agreement import all_or_none
from meshpeft.parallel.finite import finite_everywhere
from meshpeft.training.adapters import load_base_and_adapter
from meshpeft.training.base import base_directory, check_attention, find_base
from meshpeft.training.checkpoints import agreed_date
from meshpeft.training.config import EvaluateConfig, TrainingError, paths
from meshpeft.training.inputs import check_rows, load_rows
from meshpeft.training.launch import device, join_mesh, launch, workers_for
from meshpeft.training.report import Report, describe_layout
from meshpeft.training.same_inputs import check_same_inputs
from meshpeft.training.step import mean_loss

__all__ = ["evaluate", "start"]


def start(config: EvaluateConfig) -> None:
    """Check the options, then run `evaluate` on the workers they need.

    Raises:
        MeshPEFTError: The options, the model, the adapter or the data are at fault.
        WorkerDied: A worker failed otherwise.
    """
    config.check()
    workers = workers_for(config)
    run = config.run()
    find_base(run.model, run.engine).check(config)
    launch(evaluate, config, workers=workers)


def evaluate(config: EvaluateConfig) -> float:
    """Measure on the mesh that this process is part of, and print. Every rank calls it, with equal options.

    Returns:
        The mean loss in nats per target token, the same on every rank.

    Raises:
        TrainingError: It is not finite.
    """
    info = join_mesh(config)
    report = Report(info)
    run = config.run()
    run = replace(run, template_date=agreed_date(run.template_date))
    if config.seq_length is not None:
        run = replace(run, seq_length=config.seq_length)
    directory = base_directory(run.model)
    with all_or_none("reading the model and the data"):
        tokenizer = load_tokenizer(directory)
        rows, findings = load_rows(run, tokenizer, config.data)
    check_same_inputs(run, directory, tokenizer, {"rows": rows}, config.adapter)
    model = load_base_and_adapter(run, config.adapter, config)
    model.loss_chunk = config.loss_chunk
    check_rows(model, rows)
    check_attention(model, run)
    batches = eval_batches(
        rows,
        micro_batch_size=config.micro_batch_size,
        dp_rank=info.dp.rank,
        dp_size=info.dp.world_size,
        context=ContextShard.here(),
    )
    mean = mean_loss(model, (batch.to(device()) for batch in batches), batches.global_target_tokens)
    if not finite_everywhere(mean):
        raise TrainingError(
            f"the loss is {float(mean)}: the model overflows in {run.dtype}, or its weights are not finite; use a "
            "wider --dtype, or an adapter from before"
        )
    loss = float(mean)
    report.say(f"model: {directory}, {run.quantize or run.dtype}; adapter: {config.adapter or 'none'}")
    files = ", ".join(map(str, paths(config.data) or run.data_files)) or "the embedded data"
    source = files if config.data else f"held out of {files}"
    report.say(f"data: {source}, {batches.global_target_tokens:,} target tokens")
    for line in findings.lines():
        report.say(f"  {line}")
    report.say(f"layout: {describe_layout(info, config)}")
    # The exponential of more than 709 is no float64.
    perplexity = f"{math.exp(loss):.2f}" if loss < 700 else f"e^{loss:.0f}"
    report.say(f"loss: {loss:.4f} nats per target token (perplexity {perplexity})")
    return loss
