"""The checks of a layout against one rank, and the checkpoints of simulated ranks that one of them needs.

| check | what is compared with one rank |
|---|---|
| loss, grad norm, gradient, weight | every step of `training`'s own, clipped |
| held-out | the loss without training, over rows that do not divide |
| export | the exported file; read back on one rank, it computes the layout's held-out loss |
| merged | (one rank) the base with its adapters merged computes the loss of the step that was trained on them |
| resume | a checkpoint of the layout goes on at one rank, and one of one rank at the layout |
| masks | a step with dropout, with the masks that the layout drew |
| packed | codes and scales of a quantised base, bit for bit |
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._local_tensor import maybe_disable_local_tensor_mode
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from meshpeft.checkpoint import CheckpointError, load_checkpoint, load_peft_adapter, merge_adapter, save_checkpoint
from meshpeft.checkpoint.content import ModelContent, OptimizerContent, random_state
from meshpeft.checkpoint.directory import CheckpointDirectory
from meshpeft.checkpoint.identity import check_same_model, describe_adapters, describe_base
from meshpeft.checkpoint.load import Incoming
from meshpeft.checkpoint.manifest import MANIFEST, FileRecord, Manifest, TensorRecord
from meshpeft.checkpoint.storage import Reader, Slice, SliceId, SliceLoadPlanner, SliceSavePlanner, Writer, labelled
from meshpeft.data.batches import MicroBatch, PackedRows, eval_batches
from meshpeft.models import Decoder, LanguageModel
from meshpeft.parallel import is_simulated, layer_type_of, layout_of_tensor
from meshpeft.parallel.random import masks_seen_by
from meshpeft.parallel.sharded_tensor import ShardedTensor
from meshpeft.peft import AdapterError, adapter_wrappers, base_of
from meshpeft.quantization import dequantize_base, packed_form
from meshpeft.training.step import mean_loss
from meshpeft.verify.masks import MaskFault, MasksOfALayout, set_dropout
from meshpeft.verify.oracle import Layout, Recipe, Run, Trace, agreed, compare, full_tensors, largest_error
from meshpeft.verify.simulation import index_on_rank, of_ranks, on_rank, ranks, simulate

__all__ = [
    "DROPOUT",
    "Check",
    "Proof",
    "prove",
    "restore",
    "store",
]

DROPOUT = 0.4
"""Dropout in the step whose masks are checked; not 0.5, where keeping and dropping are alike."""


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: What was compared.
        error: The largest relative error; infinite where there was nothing to compare.
        did: What was done, or what is wrong.
    """

    name: str
    error: float
    did: str


@dataclass
class Proof:
    """The checks of one layout, and what could not be checked, each with the reason."""

    checks: list[Check] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def add(self, name: str, error: float, did: str) -> None:
        """Add a check."""
        self.checks.append(Check(name, error, did))

    @contextmanager
    def check(self, name: str, did: str) -> Iterator[list[float]]:
        """Add a check whose errors the body appends; one that the body refuses to make has an infinite error."""
        errors: list[float] = []
        try:
            yield errors
        except (CheckpointError, MaskFault) as error:
            self.add(name, float("inf"), str(error))
        else:
            self.add(name, max(errors, default=float("inf")), did)


def prove(recipe: Recipe, layout: Layout, held_out: PackedRows, *, steps: int = 3, dropout: bool = False) -> Proof:
    """Train at a layout and on one rank, and compare everything that a run computes, writes and reads.

    Args:
        recipe: What is trained; its `clip` is set to a tenth of the first step's norm, so that clipping acts.
        layout: Simulated in this process.
        held_out: Rows of the loss without training.
        steps: Optimizer steps; the last one is taken again from checkpoints.
        dropout: Check the masks of a step with dropout, too.
    """
    recipe, proof = replace(recipe, clip=_first_norm(recipe) / 10), Proof()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        expected = _trained(recipe, Layout(), held_out, steps, directory / "one-rank")
        found = _trained(recipe, layout, held_out, steps, directory / "layout", expected.checkpoint, dropout)
        _compare_numbers(proof, expected, found, recipe, steps)
        _compare_files(proof, expected, found, recipe, held_out, directory / "layout")
        _compare_merged(proof, expected, recipe, steps)
        _compare_resumed(proof, expected, found, recipe, steps)
    if found.packed:
        layers = f"{len(found.packed) // 2} packed layers: codes and scales are slices of one rank's"
        proof.add("packed", largest_error(expected.packed, found.packed), layers)
    return proof


def _first_norm(recipe: Recipe) -> float:
    with simulate() as mesh:
        return float(Run(replace(recipe, clip=0.0), Layout(), mesh).take(0, Trace()).grad_norm)


@dataclass
class _Trained:
    """A layout's run.

    Attributes:
        trace: Trace of its steps.
        held_out: Loss without training, after them.
        packed: Codes and scales of the base's packed layers, gathered.
        checkpoint: Checkpoint of the state before the last step; or why there is none.
        entropy: Cross entropy of the last step.
        resumed: The last step, taken from the other layout's checkpoint; or why it was not.
        masks: Masks of one more step, with dropout, or what is wrong with them.
        dropped, dropped_batches: What that step computed, and on which micro-batches.
    """

    trace: Trace
    held_out: float
    packed: dict[str, Tensor]
    checkpoint: Path | CheckpointError
    entropy: float
    resumed: Trace | CheckpointError | None = None
    masks: MasksOfALayout | MaskFault | None = None
    dropped: Trace = field(default_factory=Trace)
    dropped_batches: tuple[list[MicroBatch], int] | None = None


def _trained(
    recipe: Recipe,
    layout: Layout,
    held_out: PackedRows,
    steps: int,
    directory: Path,
    resume: Path | CheckpointError | None = None,
    dropout: bool = False,
) -> _Trained:
    with layout.simulated() as mesh:
        run, trace = Run(recipe, layout, mesh), Trace()
        packed = _packed(run.model)
        checkpoint: Path | CheckpointError
        for number in range(steps):
            if number == steps - 1:
                try:
                    checkpoint = store(run.model, run.optimizer, directory, number)
                except CheckpointError as error:
                    checkpoint = error
            entropy = float(agreed(run.take(number, trace).loss))
        run.finish(trace)
        if trace.exported:
            run.export(directory)
        done = _Trained(trace, _held_out(run, held_out), packed, checkpoint, entropy)
        if isinstance(resume, Path):
            done.resumed = _last_step(Run(recipe, layout, mesh), resume, steps)
        if dropout:
            _drop(done, run, steps)
    return done


def _held_out(run: Run, rows: PackedRows) -> float:
    size, dp = run.layout.micro_batch_size, run.layout.dp
    slices = [
        eval_batches(rows, size, dp_rank, dp, context=run.context(cp_rank)) for dp_rank, cp_rank in run.token_places
    ]
    return float(agreed(mean_loss(run.model, *run.own(slices))))


def _last_step(run: Run, checkpoint: Path, steps: int) -> Trace | CheckpointError:
    trace = Trace()
    try:
        restore(run.model, run.optimizer, checkpoint)
    except CheckpointError as error:
        return error
    run.take(steps - 1, trace)
    trace.weights.update(full_tensors(run.model, lambda parameter: parameter))
    return trace


def _drop(done: _Trained, run: Run, number: int) -> None:
    """Take one more step, with dropout."""
    adapters = set_dropout(run.model, DROPOUT)
    done.masks = masks = MasksOfALayout(DROPOUT, run.mesh, 1 if isinstance(run.model, Decoder) else 0)
    done.dropped_batches = run.all_batches(number)
    with masks_seen_by(masks.record):
        run.take(number, done.dropped)
    if adapters[0].dropout_position != "pre":
        return
    try:
        masks.check(1 + run.layout.recomputes + adapters[0].dropout_recompute)
    except MaskFault as error:
        done.masks = error


def _packed(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, module in model.named_modules():
        form = packed_form(module)
        if form is not None:
            for key in ("weight_packed", "weight_scale"):
                tensor: Tensor = getattr(form, key)
                layout = layout_of_tensor(tensor)
                found[f"{name}.{key}"] = agreed(tensor if layout is None else layout.gather(tensor)).double()
    return found


def _compare_numbers(proof: Proof, expected: _Trained, found: _Trained, recipe: Recipe, steps: int) -> None:
    errors, norms = compare(expected.trace, found.trace), expected.trace.grad_norms
    did = {
        "loss": f"{steps} steps of {recipe.batch_size} rows",
        "grad_norm": f"{min(norms):.3g} to {max(norms):.3g}, clipped to {recipe.clip:.3g}",
        "gradient": f"{len(expected.trace.gradients)} tensors, summed and clipped, of the first step",
        "weight": f"after {steps} steps of AdamW",
    }
    if min(norms) <= recipe.clip:
        proof.unchecked.append("clipping in all of the steps: a norm is too small")
    errors["gradient"] = max(errors["gradient"], _error_of_clipping(found.trace, recipe.clip))
    for name, text in did.items():
        proof.add(name, errors[name], text)
    proof.add("held-out", _difference(expected.held_out, found.held_out), "the loss without training")


def _error_of_clipping(trace: Trace, clip: float) -> float:
    """Compare the norm of all gathered gradients with what clipping leaves of the reported norm."""
    norm = trace.grad_norms[0]
    left = math.sqrt(sum(float(gradient.square().sum()) for gradient in trace.gradients.values()))
    return _difference(norm * min(1.0, clip / (norm + 1e-6)), left)


def _difference(expected: float, found: float) -> float:
    def named(value: float) -> dict[str, Tensor]:
        return {"loss": torch.tensor([value], dtype=torch.float64)}

    return largest_error(named(expected), named(found))


def _compare_files(
    proof: Proof, expected: _Trained, found: _Trained, recipe: Recipe, held_out: PackedRows, directory: Path
) -> None:
    with proof.check("export", "the adapter's file; read back on one rank, it gives the held-out loss") as errors:
        errors.append(largest_error(expected.trace.exported, found.trace.exported))
        if found.trace.exported:
            with simulate() as mesh:
                run = Run(replace(recipe, adapt=lambda model: _read(model, directory)), Layout(), mesh)
                errors.append(_difference(expected.held_out, _held_out(run, held_out)))


def _read(model: Any, directory: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # given already, where the run's own adapter was made
        read: nn.Module = load_peft_adapter(model, directory, trainable=True)
    return read


def _compare_merged(proof: Proof, expected: _Trained, recipe: Recipe, steps: int) -> None:
    """Merge the adapter before the last step: without the adapter's code it gives the loss of that step."""
    if not isinstance(expected.checkpoint, Path):
        return
    with simulate() as mesh:
        run = Run(recipe, Layout(), mesh)
        restore(run.model, run.optimizer, expected.checkpoint)
        dequantize_base(run.model)
        wrappers = [wrapper for _, wrapper in adapter_wrappers(run.model)]
        try:
            for wrapper in wrappers:
                wrapper.check_mergeable()
        except AdapterError as error:
            proof.unchecked.append(f"merging: {error}")
            return
        merge_adapter(run.model)
        loss = float(mean_loss(run.model, *run.batches(steps - 1)))
    did = f"on one rank: the base with {len(wrappers)} adapters merged gives the loss of step {steps}"
    proof.add("merged", _difference(expected.entropy, loss), did)


def _compare_resumed(proof: Proof, expected: _Trained, found: _Trained, recipe: Recipe, steps: int) -> None:
    """Resume the layout's checkpoint at one rank, one rank's at the layout, and take a step with dropout."""
    after = f"saved after {steps - 1} steps: this layout's goes on at one rank, one rank's at this layout"
    with simulate() as mesh:
        run = Run(recipe, Layout(), mesh)
        with proof.check("resume", after) as errors:
            if isinstance(found.checkpoint, CheckpointError):
                raise found.checkpoint
            for trace in (_last_step(run, found.checkpoint, steps), found.resumed):
                if isinstance(trace, CheckpointError):
                    raise trace
                if trace is not None:
                    errors.extend(_errors_of_last_step(expected.trace, trace))
        if found.masks is not None:
            _compare_dropped(proof, found, run)


def _errors_of_last_step(expected: Trace, found: Trace) -> list[float]:
    return [
        _difference(expected.losses[-1], found.losses[-1]),
        _difference(expected.grad_norms[-1], found.grad_norms[-1]),
        largest_error(expected.weights, found.weights),
    ]


def _compare_dropped(proof: Proof, found: _Trained, run: Run) -> None:
    """Take the layout's step with dropout on one rank, with the layout's masks."""
    adapters = set_dropout(run.model, DROPOUT)
    masks, trace = found.masks, Trace()
    if adapters[0].dropout_position != "pre":
        proof.unchecked.append("masks of dropped outputs: their states are followed, their values are not compared")
        return
    experts = any(
        layer_type.layout(layer).is_stacked
        for layer in map(base_of, run.model.modules())
        if (layer_type := layer_type_of(layer)) is not None
    )
    if experts:
        proof.unchecked.append(
            "numbers with dropout: a layout has experts' tokens in another order; masks are compared between its ranks"
        )
    count = len(masks) if isinstance(masks, MasksOfALayout) else 0
    did = f"dropout {DROPOUT}: {count} masks agree where ranks hold the same activation and differ elsewhere"
    with proof.check("masks", did if experts else f"{did}; one rank computes the same with them") as errors:
        if not isinstance(masks, MasksOfALayout):
            raise masks or MaskFault("no mask was drawn")
        errors.append(0.0 if len(masks) else float("inf"))
        if not experts:
            assert found.dropped_batches is not None
            with masks_seen_by(masks.replay):
                run.take_on(*found.dropped_batches, trace)
            errors.append(_difference(trace.losses[0], found.dropped.losses[0]))
            errors.append(largest_error(trace.gradients, found.dropped.gradients))


def store(model: LanguageModel, optimizer: torch.optim.Optimizer, directory: Path, step: int) -> Path:
    """Write a checkpoint of all simulated ranks of this layout; of one rank, as every run does.

    `save_checkpoint` and `load_checkpoint` let the ranks meet in a group of processes, which simulated ranks are not.
    What they write and read is used here unchanged, once for each rank.

    Raises:
        CheckpointError: The slices of the ranks do not make up the tensors, each part once; ranks that hold the same
            slice hold other values; it is not one rank's to write.
    """
    if not is_simulated():
        return save_checkpoint(model, directory, step=step, optimizer=optimizer).path
    content = ModelContent.of(model, full_model=False)
    state = OptimizerContent.of(optimizer, content)
    generators, generator = random_state()
    _check_one_writer(content.stored)
    slices = _of_all_ranks([generator, *content.slices(), *state.slices()])
    manifest = Manifest(
        step=step,
        full_model=False,
        tensors={},
        files={},
        model={"adapters": describe_adapters(model), "base": describe_base(model, content.frozen)},
        optimizer=state.groups(),
        random=generators,
    )
    checkpoints = CheckpointDirectory(directory)

    def publish(tensors: dict[str, TensorRecord], files: dict[str, FileRecord]) -> None:
        complete = replace(manifest, tensors=tensors, files=files)
        complete.check_tensors()
        (checkpoints.partial(step) / MANIFEST).write_bytes(complete.encode())
        checkpoints.publish(step)

    writer = Writer(checkpoints.partial(step), lambda: checkpoints.prepare(step), publish)
    with maybe_disable_local_tensor_mode():
        save(labelled(slices.values()), storage_writer=writer, planner=SliceSavePlanner(), no_dist=True)
    return checkpoints.of_step(step)


def restore(model: LanguageModel, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Load a checkpoint into all simulated ranks of this layout; of one rank, as every run does.

    Raises:
        CheckpointError: It is of another model, or its tensors do not fit.
    """
    if not is_simulated():
        load_checkpoint(model, path, optimizer=optimizer)
        return
    manifest = Manifest.read(path)
    content = ModelContent.of(model, full_model=False)
    found = {"adapters": describe_adapters(model), "base": describe_base(model, content.frozen)}
    check_same_model(manifest.model, found, path)
    simulated = ranks()
    with maybe_disable_local_tensor_mode():
        own = {rank: _load_on(rank, optimizer, content, path, manifest) for rank in simulated}
    with torch.no_grad():
        for entry in content.stored:
            entry.source.mul_(1)  # it was written rank by rank: what follows its versions has to see that it changed
    for number, group in enumerate(optimizer.param_groups):
        group.update({name: value for name, value in own[0].param_groups[number].items() if name != "params"})
        for parameter in group["params"]:
            states = {rank: each.state[on_rank(parameter, rank)] for rank, each in own.items()}
            optimizer.state[parameter] = {
                name: of_ranks({rank: state[name] for rank, state in states.items()}) for name in states[0]
            }


def _load_on(
    rank: int, optimizer: torch.optim.Optimizer, content: ModelContent, path: Path, manifest: Manifest
) -> torch.optim.Optimizer:
    """Load one rank's slices; returns an optimizer over its tensors, with its state."""
    groups = [
        {**group, "params": [on_rank(parameter, rank) for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    own = type(optimizer)(groups)  # type: ignore[call-arg]  # AdamW's, not the abstract class's
    held = ModelContent([_on(rank, entry) for entry in content.stored], [])
    incoming = Incoming(path, manifest, held, OptimizerContent.of(own, held))
    load(
        labelled(incoming.reads),
        storage_reader=Reader(path, manifest.tensors),
        planner=SliceLoadPlanner(),
        no_dist=True,
    )
    incoming.prepared()()
    return own


def _on(rank: int, entry: ShardedTensor) -> ShardedTensor:
    return replace(entry, source=on_rank(entry.source, rank), global_offset=_offset(entry.global_offset, rank))


def _offset(offset: Iterable[int], rank: int) -> tuple[int, ...]:
    return tuple(index_on_rank(index, rank) for index in offset)


def _of_all_ranks(parts: Iterable[Slice]) -> Mapping[SliceId, Slice]:
    """Collect every rank's slices, each once."""
    found: dict[SliceId, Slice] = {}
    for part in parts:
        values = part.local()
        for rank in ranks():
            held, offset = on_rank(values, rank), _offset(part.offset, rank)
            first = found.setdefault((part.key, offset), replace(part, offset=offset, values=partial(_itself, held)))
            with maybe_disable_local_tensor_mode():
                if not torch.equal(first.values(), held):
                    raise CheckpointError(f"ranks that hold the same part of {part.key} hold other values of it")
    return found


def _itself(values: Tensor) -> Tensor:
    return values


def _check_one_writer(entries: Iterable[ShardedTensor]) -> None:
    """Check that exactly one of the ranks that hold the same slice writes it."""
    for entry in entries:
        writers: dict[tuple[int, ...], int] = {}
        for rank in ranks():
            place = _offset(entry.global_offset, rank)
            writers[place] = writers.get(place, 0) + (index_on_rank(entry.replica_id, rank) == 0)
        if set(writers.values()) != {1}:
            raise CheckpointError(f"{entry.key}: a slice is to be written by {max(writers.values())} ranks, not by one")
