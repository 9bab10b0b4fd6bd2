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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from transformers import PretrainedConfig

from meshpeft.data.batches import MicroBatch
from meshpeft.data.context import ContextShard
from meshpeft.models import Decoder, DecoderConfig, LanguageModel, check_divisible
from meshpeft.models.recompute import ActivationCheckpointing
from meshpeft.parallel import MeshPEFTError, ModelParallelConfig, ParallelGroupInfo, init_parallelism
from meshpeft.parallel.dispatch import assume_load
from meshpeft.training.step import TrainStep, adamw, summed_loss, summed_losses
from meshpeft.verify.memory import MemoryWatch
from meshpeft.verify.oracle import Layout
from meshpeft.verify.simulation import Collective, count_collectives, fake_world

__all__ = ["Plan", "Traffic", "plan"]

# How often each collective was made, with the group that made it.
_Calls = Counter[tuple[str, Collective]]


@dataclass(frozen=True, order=True)
class Traffic:
    """Collectives of one kind over one axis.

    Attributes:
        axis: `tp dp ep etp edp`, or axes joined by `+`.
        name: `allreduce allgather reduce_scatter alltoall broadcast`.
        calls: How many.
        bytes: What one rank puts into all of them.
    """

    axis: str
    name: str
    calls: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What one rank holds, in bytes, and sends.

    Attributes:
        base, adapter, gradients, optimizer: Frozen parameters, trainable ones, their gradients, their states.
        activations: Alive between the forward and the backward pass of one micro-batch.
        transient: What is alive besides those at the worst moment of the two passes: the insides of a layer, the loss.
            Gradients of the adapter are not counted again.
        worst_activations, worst_transient: The same where all tokens go to this rank's experts.
        micro_batch: Collectives of one forward and backward pass.
        added: Those of them that are the adapter's: without it the frozen base would not make them.
        step: Collectives of an optimizer step besides those of its micro-batches.
    """

    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    transient: int
    worst_activations: int
    worst_transient: int
    micro_batch: tuple[Traffic, ...]
    added: tuple[Traffic, ...]
    step: tuple[Traffic, ...]


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
    micro_batch_size: int = 1,
    seq_length: int = 2048,
    loss_chunk: int | None = None,
    router_aux_loss_coef: float = 0.0,
    dtype: torch.dtype = torch.bfloat16,
) -> Plan:
    """Count what one rank of `tp * cp * dp` holds and sends.

    Args:
        config: Configuration of the model, at its real size: nothing is allocated. That of transformers stands for a
            model of transformers.
        adapt: Adds the adapters and freezes the rest, for instance a `LoRA`.
        tp, dp, ep, etp, cp: Sizes of the axes; `etp=None` means `tp`.
        sequence_parallel, activation_checkpointing: Options of the run.
        micro_batch_size: Rows of one forward pass on one rank.
        seq_length: Tokens of a row, each of which has a label.
        loss_chunk: Tokens whose logits exist at a time; by default what a CPU takes (`default_loss_chunk`).
        router_aux_loss_coef: Coefficient of the routers' load-balancing loss; 0 leaves it out.
        dtype: Type of the base.

    Raises:
        MeshPEFTError: Sizes that do not divide; the process has a process group already; the code of a transformers
            model asks for values.
    """
    parallel = Layout(tp, dp, ep, etp, sequence_parallel, cp=cp).parallel_config()
    tokens_of_a_pass = micro_batch_size * seq_length
    if isinstance(config, DecoderConfig):
        check_divisible(config, parallel)
    with contextlib.ExitStack() as stack:
        stack.enter_context(fake_world(tp * cp * dp))
        mesh = init_parallelism(tp, 1, ep, etp, cp)
        # transformers' constructors make small constants with values.
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=not isinstance(config, DecoderConfig)))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # asked to tell them apart
        stack.enter_context(_without_values(config))

        def make(adapted: bool) -> LanguageModel:
            model = _without_memory(config, parallel, dtype).requires_grad_(False)
            model.set_activation_checkpointing(activation_checkpointing)
            model.loss_chunk = tokens_of_a_pass  # what is sent does not depend on chunks, and each takes time
            if adapted:
                adapt(model)
            return model

        model = make(True)
        batch = _micro_batch(micro_batch_size, seq_length, ContextShard(0, cp, tp))
        model.loss_chunk = loss_chunk
        kept, peak, micro_batch = _forward_and_backward(model, batch, router_aux_loss_coef)
        worst_kept, worst_peak = kept, peak
        if ep > 1:
            loaded = make(True)
            loaded.loss_chunk = loss_chunk
            with assume_load("worst"):
                worst_kept, worst_peak, _ = _forward_and_backward(loaded, batch, router_aux_loss_coef)
        model.loss_chunk = tokens_of_a_pass
        adapted, bare = (
            _with_input_gradient(make(adapters), batch, router_aux_loss_coef) for adapters in (True, False)
        )
        optimizer = adamw(model, lr=1e-4)
        step = TrainStep(model, optimizer, clip=1.0, router_aux_loss_coef=router_aux_loss_coef)
        tokens = tp * cp * dp * batch.labels.numel()
        step([batch], tokens)  # what is computed once is computed now
        with count_collectives() as calls:
            step([batch], tokens)
        states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
        trainable = _bytes(p for p in model.parameters() if p.requires_grad)
        return Plan(
            base=_bytes(model.parameters()) - trainable,
            adapter=trainable,
            gradients=trainable,
            optimizer=_bytes(states),
            activations=kept,
            transient=peak - kept,
            worst_activations=worst_kept,
            worst_transient=worst_peak - worst_kept,
            micro_batch=_traffic(micro_batch, mesh),
            added=_traffic(adapted - bare, mesh),
            step=_traffic(_counted(calls) - micro_batch, mesh),
        )


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


def _forward_and_backward(model: LanguageModel, batch: MicroBatch, balance: float) -> tuple[int, int, _Calls]:
    """Return what is kept between the passes, the most that is alive at a time in both, and the collectives."""
    with count_collectives() as calls, MemoryWatch() as memory:
        loss = summed_losses(model, batch).sum() if balance else summed_loss(model, batch)
        kept = memory.alive()
        loss.backward()
    peak = memory.peak()
    model.zero_grad(set_to_none=True)
    return kept, peak, _counted(calls)


def _with_input_gradient(model: LanguageModel, batch: MicroBatch, balance: float) -> _Calls:
    """Count collectives where the gradient reaches the embedding's output, so that all layers have a backward pass."""
    embedding: Any = model.embedding if isinstance(model, Decoder) else model.get_input_embeddings()  # type: ignore[operator]
    embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    return _forward_and_backward(model, batch, balance)[2]


def _counted(calls: Iterable[Collective]) -> _Calls:
    return Counter((call.group, call) for call in calls)


def _traffic(calls: _Calls, mesh: ParallelGroupInfo) -> tuple[Traffic, ...]:
    # Dense and expert axes may be the same ranks: the first name is the one that is known best.
    names: dict[str, str] = {}
    for axis in mesh.axes:
        if axis.world_size > 1:
            names.setdefault(axis.process_group.group_name, axis.name)
    total: dict[tuple[str, str], list[int]] = {}
    for (group, call), count in calls.items():
        entry = total.setdefault((names.get(group, "world"), call.name), [0, 0])
        entry[0] += count
        entry[1] += count * call.bytes
    return tuple(sorted(Traffic(axis, name, *entry) for (axis, name), entry in total.items()))
