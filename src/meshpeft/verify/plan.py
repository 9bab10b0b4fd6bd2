"""`plan`: what one rank of a fine-tune holds and sends, before anything is started.

The model is built from its configuration at its real size, on a process group of the full size, on tensors that have
shapes and no memory, and one training step runs on them: what is counted is what the code does, not a second formula
for it. Its documents fill their rows, and every token has a label.

In a model with experts the tokens choose where they go, which depends on their values: there every number is counted
for tokens that choose all experts alike, the expectation of a balanced router, and the memory also for the worst case,
in which every token of every rank goes to the experts of this one.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from transformers import PretrainedConfig

from meshpeft.data.batches import MicroBatch
from meshpeft.data.context import ContextShard
from meshpeft.models import Decoder, DecoderConfig, LanguageModel, check_divisible
from meshpeft.models.base_blocks import ShardBase, base_stores, rows_of_tables, shard_axes, shard_base
from meshpeft.models.recompute import ActivationCheckpointing
from meshpeft.parallel import MeshPEFTError, ModelParallelConfig, ParallelGroupInfo, init_parallelism
from meshpeft.parallel.dispatch import assume_load
from meshpeft.parallel.loss import default_loss_chunk
from meshpeft.parallel.sharded_base import BlockStore, is_stored
from meshpeft.quantization import BaseQuantizer
from meshpeft.training.step import TrainStep, adamw, summed_loss, summed_losses
from meshpeft.verify.few_layers import few_layers
from meshpeft.verify.memory import MemoryWatch
from meshpeft.verify.oracle import Layout
from meshpeft.verify.simulation import Collective, CollectiveWatch, count_collectives, fake_world
from meshpeft.verify.watch import Watch, watching
from meshpeft.verify.work import Kernels, Machine, Traffic, WorkWatch, seconds_of_kernels, seconds_of_traffic

__all__ = ["Plan", "plan"]

# How often each collective was made, with the group that made it.
_Calls = Counter[tuple[str, Collective]]


@dataclass(frozen=True)
class Plan:
    """What one rank holds, in bytes, and sends.

    Attributes:
        base, adapter, gradients, optimizer: Frozen parameters as they are stored, this rank's part of them; trainable
            ones, their gradients, their states.
        buffers: What a sharded base is gathered into.
        activations: Alive between the forward and the backward pass of one micro-batch.
        transient: What is alive besides those at the worst moment of the two passes: the insides of a layer, the loss.
            Gradients of the adapter are not counted again.
        worst_activations, worst_transient: The same where all tokens go to this rank's experts.
        micro_batch: Collectives of one forward and backward pass.
        gathers: Those of them that gather a sharded base.
        added: Those of them that are the adapter's: without it the frozen base would not make them.
        step: Collectives of an optimizer step besides those of its micro-batches.
        kernels: Operations of one forward and backward pass: products, bytes read and written, how many such.
    """

    base: int
    buffers: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    transient: int
    worst_activations: int
    worst_transient: int
    micro_batch: tuple[Traffic, ...]
    gathers: tuple[Traffic, ...]
    added: tuple[Traffic, ...]
    step: tuple[Traffic, ...]
    kernels: tuple[tuple[int, int, float], ...]

    @property
    def together(self) -> int:
        """Bytes that one rank holds at most, where tokens choose all experts alike."""
        held = self.base + self.buffers + self.adapter + self.gradients + self.optimizer
        return held + self.activations + self.transient

    @property
    def worst(self) -> int:
        """The same where all tokens go to this rank's experts."""
        return self.together - self.activations - self.transient + self.worst_activations + self.worst_transient

    def seconds_of_step(self, passes: int, machine: Machine, dtype: torch.dtype) -> tuple[float, float]:
        """Estimate the time of an optimizer step of so many passes, and the part of it in which nothing is computed.

        Args:
            passes: Micro-batches of a step.
            machine: What runs it.
            dtype: Type of the base.
        """
        computing = seconds_of_kernels(self.kernels, machine, dtype)
        gathering = seconds_of_traffic(self.gathers, machine)
        sending = max(0.0, seconds_of_traffic(self.micro_batch, machine) - gathering)
        if not machine.copies_beside:
            sending, gathering = sending + gathering, 0.0
        one_pass, step = max(computing + sending, gathering), seconds_of_traffic(self.step, machine)
        return passes * one_pass + step, passes * (one_pass - computing) + step


def plan(
    config: DecoderConfig | PretrainedConfig,
    adapt: Callable[[LanguageModel], nn.Module],
    *,
    tp: int = 1,
    dp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    cp: int = 1,
    sequence_parallel: bool = False,
    activation_checkpointing: bool | ActivationCheckpointing = False,
    shard_base: ShardBase = "none",
    quantizer: BaseQuantizer | None = None,
    micro_batch_size: int = 1,
    seq_length: int = 2048,
    loss_chunk: int | None = None,
    router_aux_loss_coef: float = 0.0,
    dtype: torch.dtype = torch.bfloat16,
    device_type: str = "cpu",
    models: Sequence[tuple[int, DecoderConfig | PretrainedConfig]] | None = None,
    with_added: bool = True,
) -> Plan:
    """Count what one rank of `tp * cp * dp` holds and sends.

    Args:
        config: Configuration of the model, at its real size: nothing is allocated. That of transformers stands for a
            model of transformers.
        adapt: Adds the adapters and freezes the rest, for instance a `LoRA`.
        tp, dp, ep, etp, cp: Sizes of the axes; `etp=None` means `tp`.
        sequence_parallel, activation_checkpointing, shard_base: Options of the run.
        quantizer: Packs the base. Parts of weights that it keeps for the start of adapters are not counted: the start
            moves them there.
        micro_batch_size: Rows of one forward pass on one rank.
        seq_length: Tokens of a row, each of which has a label.
        loss_chunk: Tokens whose logits exist at a time; by default what such a device takes (`default_loss_chunk`).
        router_aux_loss_coef: Coefficient of the routers' load-balancing loss; 0 leaves it out.
        dtype: Type of the base.
        device_type: Type of the devices of the run.
        models: What is run in the place of the whole model: models of few layers, and how often each counts, as
            `few_layers` makes them by default. Adapters that name layers by their number need all: `[(1, config)]`.
        with_added: Count what the adapter adds, which takes twice the time.

    Raises:
        MeshPEFTError: Sizes that do not divide; the process has a process group already; the code of a transformers
            model asks for values.
    """
    layout = Layout(tp, dp, ep, etp, sequence_parallel, activation_checkpointing, micro_batch_size, cp, shard_base)
    run = _Run(adapt, layout, quantizer, seq_length, loss_chunk, router_aux_loss_coef, dtype, device_type, with_added)
    models = few_layers(config) if models is None else models
    return _added_up([(times, run.counted(model)) for times, model in models])


def _added_up(found: Sequence[tuple[int, Plan]]) -> Plan:
    """Add up plans of few layers, each so many times; see `few_layers`."""
    if len(found) == 1:
        return found[0][1]

    def total(name: str) -> int:
        return sum(times * getattr(one, name) for times, one in found)

    def traffic(name: str) -> tuple[Traffic, ...]:
        sums: dict[tuple[str, str, int, int], list[int]] = {}
        for times, one in found:
            for part in getattr(one, name):
                entry = sums.setdefault((part.axis, part.name, part.ranks, part.span), [0, 0])
                entry[0] += times * part.calls
                entry[1] += times * part.bytes
        return tuple(
            sorted(
                Traffic(axis, kind, calls, sent, ranks, span)
                for (axis, kind, ranks, span), (calls, sent) in sums.items()
            )
        )

    kernels: Kernels = {}
    for times, one in found:
        for products, moved, count in one.kernels:
            kernels[products, moved] = kernels.get((products, moved), 0.0) + times * count
    first = found[0][1]
    sums = {name: total(name) for name in ("base", "adapter", "gradients", "optimizer", "activations")}
    return Plan(
        **sums,
        worst_activations=total("worst_activations"),
        # The most at a time, not a sum.
        buffers=first.buffers,
        transient=first.transient,
        worst_transient=first.worst_transient,
        micro_batch=traffic("micro_batch"),
        gathers=traffic("gathers"),
        added=traffic("added"),
        step=traffic("step"),
        kernels=tuple((*kind, count) for kind, count in sorted(kernels.items())),
    )


@dataclass(frozen=True)
class _Run:
    """What is counted; see `plan`."""

    adapt: Callable[[LanguageModel], nn.Module]
    layout: Layout
    quantizer: BaseQuantizer | None
    seq_length: int
    loss_chunk: int | None
    router_aux_loss_coef: float
    dtype: torch.dtype
    device_type: str = "cpu"
    with_added: bool = True

    def counted(self, config: DecoderConfig | PretrainedConfig) -> Plan:
        """Run one step of a model without memory."""
        layout = self.layout
        if isinstance(config, DecoderConfig):
            check_divisible(config, layout.parallel_config())
        with contextlib.ExitStack() as stack:
            stack.enter_context(fake_world(layout.tp * layout.cp * layout.dp))
            mesh = init_parallelism(layout.tp, 1, layout.ep, layout.etp, layout.cp)
            shard_axes(layout.shard_base)  # makes groups, from numbers that have values
            # transformers' constructors make small constants with values.
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=not isinstance(config, DecoderConfig)))
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # asked to tell them apart
            stack.enter_context(_without_values(config))
            return self._counted(config, mesh)

    def _counted(self, config: DecoderConfig | PretrainedConfig, mesh: ParallelGroupInfo) -> Plan:
        layout, balance = self.layout, self.router_aux_loss_coef
        model = self._made(config, True)
        stores = base_stores(model)
        base = _bytes(p for p in model.parameters() if not p.requires_grad and not is_stored(p))
        batch = _micro_batch(layout.micro_batch_size, self.seq_length, ContextShard(0, layout.cp, layout.tp))
        if stores:
            for store in stores:
                store.release()
            summed_loss(model, batch).backward()
            model.zero_grad(set_to_none=True)
            for store in stores:
                store.expect_first()  # the buffers are there now, and which block follows which is known
        model.loss_chunk = self.loss_chunk or self._default_chunk(config, model)
        before = [(store.gathers, store.gathered_bytes) for store in stores]
        work = WorkWatch()
        passes = _forward_and_backward(model, batch, balance, work)
        gathers = tuple(_gathers_of(store, *earlier, mesh) for store, earlier in zip(stores, before, strict=True))
        optimizer = adamw(model, lr=1e-4)
        step = TrainStep(model, optimizer, clip=1.0, router_aux_loss_coef=balance)
        with count_collectives() as calls:
            step.finish(passes.losses, layout.tp * layout.cp * layout.dp * batch.labels.numel())
        model.zero_grad(set_to_none=True)
        worst = passes
        if layout.ep > 1:
            with assume_load("worst"):
                worst = _forward_and_backward(model, batch, balance)
        adapted, bare = (
            (_with_input_gradient(self._made(config, has), batch, balance) for has in (True, False))
            if self.with_added
            else (_Calls(), _Calls())
        )
        states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
        trainable = _bytes(p for p in model.parameters() if p.requires_grad)
        return Plan(
            base=base + sum(store.nbytes for store in stores),
            buffers=sum(store.buffer_bytes for store in stores),
            adapter=trainable,
            gradients=trainable,
            optimizer=_bytes(states),
            activations=passes.kept,
            transient=passes.peak - passes.kept,
            worst_activations=worst.kept,
            worst_transient=worst.peak - worst.kept,
            micro_batch=_traffic(passes.calls, mesh),
            gathers=tuple(sorted(gathers)),
            added=_traffic(adapted - bare, mesh),
            step=_traffic(_counted(calls), mesh),
            kernels=tuple((*kind, count) for kind, count in sorted(work.kernels.items())),
        )

    def _default_chunk(self, config: DecoderConfig | PretrainedConfig, model: LanguageModel) -> int | None:
        if self.device_type == "cpu":
            return None  # as the model counted here does by itself
        size = (config if isinstance(config, DecoderConfig) else config.get_text_config()).vocab_size
        rows = size // self.layout.tp if size % self.layout.tp == 0 else size
        return default_loss_chunk(rows_of_tables(model) or rows, self.dtype, torch.device(self.device_type))

    def _made(self, config: DecoderConfig | PretrainedConfig, adapted: bool) -> LanguageModel:
        parallel = self.layout.parallel_config()
        model = _without_memory(config, parallel, self.dtype).requires_grad_(False)
        model.set_activation_checkpointing(self.layout.activation_checkpointing)
        model.loss_chunk = self.layout.micro_batch_size * self.seq_length
        if self.quantizer is not None:
            quantizer = replace(self.quantizer, principal_rank=None, principal_modules=None, residual_rank=None)
            for name, layer in quantizer.layers_of(model).items():
                quantizer.pack_(layer, name)
        shard_base(model, self.layout.shard_base)
        if adapted:
            self.adapt(model)
        return model


def _gathers_of(store: BlockStore, gathers: int, received: int, mesh: ParallelGroupInfo) -> Traffic:
    """Count a store's gathers since there were so many; what one rank puts in is what it receives from each other."""
    axis, ranks, span = _groups(mesh)[store.axis.process_group.group_name]
    sent = (store.gathered_bytes - received) // (ranks - 1)
    return Traffic(axis, "allgather", store.gathers - gathers, sent, ranks, span)


@contextlib.contextmanager
def _without_values(config: DecoderConfig | PretrainedConfig) -> Iterator[None]:
    """Say in one sentence that code which looks at values cannot be counted."""
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise MeshPEFTError(
            f"a {config.model_type} model cannot be counted: its code does what the values of tensors say "
            f"({error.func}), and here they have none"
        ) from error


def _without_memory(
    config: DecoderConfig | PretrainedConfig, parallel: ModelParallelConfig, dtype: torch.dtype
) -> LanguageModel:
    """Make the model inside a `FakeTensorMode`, on its CPU."""
    if isinstance(config, DecoderConfig):
        return Decoder(config, parallel, dtype=dtype)
    from meshpeft.models.transformers_model import make_transformers_model  # takes seconds

    model = make_transformers_model(config, dtype, sequence_parallel=parallel.sequence_parallel)
    made: dict[int, nn.Parameter | Tensor] = {}
    # Under every name, so that what was tied is again.
    for name, old in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if old.is_meta:
            new = made.get(id(old))
            if new is None:
                made[id(old)] = model.assign_parameter(name, torch.empty_like(old, device="cpu"))
            else:
                module, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(module), attribute, new)
    return model


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _micro_batch(rows: int, width: int, context: ContextShard) -> MicroBatch:
    places, spans = context.of_rows([[width]] * rows, context.padded(width))
    return MicroBatch.of((torch.zeros(places.shape, dtype=torch.long) for _ in range(4)), spans)


class _Passes(NamedTuple):
    """A forward and a backward pass: bytes kept between them and alive at most, collectives, and summed losses."""

    kept: int
    peak: int
    calls: _Calls
    losses: Tensor


def _forward_and_backward(model: LanguageModel, batch: MicroBatch, balance: float, *watches: Watch) -> _Passes:
    collectives, memory = CollectiveWatch(), MemoryWatch()
    with watching(collectives, memory, *watches):
        losses = summed_losses(model, batch) if balance else summed_loss(model, batch)
        loss = losses.sum() if balance else losses
        kept = memory.alive()
        loss.backward()
    return _Passes(kept, memory.peak(), _counted(collectives.calls), losses.detach().view(-1))


def _with_input_gradient(model: LanguageModel, batch: MicroBatch, balance: float) -> _Calls:
    """Count collectives where the gradient reaches the embedding's output, so that all layers have a backward pass."""
    embedding: Any = model.embedding if isinstance(model, Decoder) else model.get_input_embeddings()  # type: ignore[operator]
    embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    return _forward_and_backward(model, batch, balance).calls


def _counted(calls: Iterable[Collective]) -> _Calls:
    return Counter((call.group, call) for call in calls)


def _traffic(counted: _Calls, mesh: ParallelGroupInfo) -> tuple[Traffic, ...]:
    total: dict[tuple[str, str, int, int], list[int]] = {}
    groups = _groups(mesh)
    world = ("world", mesh.world.world_size, mesh.world.world_size)
    for (group, call), count in counted.items():
        axis, ranks, span = groups.get(group, world)
        entry = total.setdefault((axis, call.name, ranks, span), [0, 0])
        entry[0] += count
        entry[1] += count * call.bytes
    return tuple(
        sorted(
            Traffic(axis, name, calls, sent, ranks, span) for (axis, name, ranks, span), (calls, sent) in total.items()
        )
    )


def _groups(mesh: ParallelGroupInfo) -> dict[str, tuple[str, int, int]]:
    """Map the name of each group to its axis, how many ranks it has, and how many from the first to the last."""
    found: dict[str, tuple[str, int, int]] = {}
    # Dense and expert axes may be the same ranks: the first name is the one that is known best.
    for axis in (*mesh.axes, *(axis for shards in mesh.base_axes.values() for axis in shards[:2])):
        if axis.world_size > 1:
            ranks = dist.get_process_group_ranks(axis.process_group)
            found.setdefault(axis.process_group.group_name, (axis.name, len(ranks), max(ranks) - min(ranks) + 1))
    return found
