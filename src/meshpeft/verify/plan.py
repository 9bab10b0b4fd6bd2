"""`plan`: what one rank of a fine-tune holds and sends, before anything is started.

The model is built at its real size on a process group of the full size, on tensors that have shapes and no memory,
and one training step runs on them: what is counted is what the code does, not a second formula for it.

In a model with experts the tokens choose where they go, so what waits for the backward pass and what is exchanged
depends on their values, which such tensors do not have: there only weights, gradients and optimizer are counted.
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
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meshpeft.data.batches import MicroBatch
from meshpeft.data.context import ContextShard
from meshpeft.models import Decoder, DecoderConfig, LanguageModel, check_divisible
from meshpeft.parallel import ParallelGroupInfo, init_parallelism
from meshpeft.training.step import TrainStep, adamw, summed_loss
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
        micro_batch: Collectives of one forward and backward pass.
        added: Those of them that are the adapter's: without it the frozen base would not make them.
        step: Collectives of an optimizer step besides those of its micro-batches.

    The last four are `None` for a model with experts.
    """

    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int | None = None
    micro_batch: tuple[Traffic, ...] | None = None
    added: tuple[Traffic, ...] | None = None
    step: tuple[Traffic, ...] | None = None


def plan(
    config: DecoderConfig,
    adapt: Callable[[LanguageModel], nn.Module],
    *,
    tp: int = 1,
    dp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    cp: int = 1,
    sequence_parallel: bool = False,
    activation_checkpointing: bool = False,
    micro_batch_size: int = 1,
    seq_length: int = 2048,
    loss_chunk: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Plan:
    """Count what one rank of `tp * cp * dp` holds and sends.

    Args:
        config: Configuration of the model, at its real size: nothing is allocated.
        adapt: Adds the adapters and freezes the rest, for instance a `LoRA`.
        tp, dp, ep, etp, cp: Sizes of the axes; `etp=None` means `tp`.
        sequence_parallel, activation_checkpointing: Options of the run.
        micro_batch_size: Rows of one forward pass on one rank.
        seq_length: Tokens of a row, each of which has a label.
        loss_chunk: Tokens whose logits exist at a time; by default what a CPU takes (`default_loss_chunk`).
        dtype: Type of the base.

    Raises:
        MeshPEFTError: Sizes that do not divide; the process has a process group already.
    """
    parallel = Layout(tp, dp, ep, etp, sequence_parallel, cp=cp).parallel_config()
    check_divisible(config, parallel)
    tokens_of_a_pass = micro_batch_size * seq_length
    with contextlib.ExitStack() as stack:
        stack.enter_context(fake_world(tp * cp * dp))
        mesh = init_parallelism(tp, 1, ep, etp, cp)
        stack.enter_context(FakeTensorMode())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # asked to tell them apart

        def make(adapted: bool) -> Decoder:
            model = Decoder(config, parallel, dtype=dtype).requires_grad_(False)
            model.set_activation_checkpointing(activation_checkpointing)
            model.loss_chunk = tokens_of_a_pass  # what is sent does not depend on chunks, and each takes time
            if adapted:
                adapt(model)
            return model

        model = make(True)
        if config.moe is not None:
            # No step can run; AdamW keeps two numbers for each.
            return _weights(model, 2 * _bytes(p for p in model.parameters() if p.requires_grad))
        batch = _micro_batch(micro_batch_size, seq_length, ContextShard(0, cp, tp))
        model.loss_chunk = loss_chunk
        activations, micro_batch = _forward_and_backward(model, batch)
        model.loss_chunk = tokens_of_a_pass
        adapted, bare = (_with_input_gradient(make(adapters), batch) for adapters in (True, False))
        optimizer = adamw(model, lr=1e-4)
        step = TrainStep(model, optimizer, clip=1.0)
        tokens = tp * cp * dp * batch.labels.numel()
        step([batch], tokens)  # what is computed once is computed now
        with count_collectives() as calls:
            step([batch], tokens)
        states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
        return _weights(
            model,
            _bytes(states),
            activations,
            _traffic(micro_batch, mesh),
            _traffic(adapted - bare, mesh),
            _traffic(_counted(calls) - micro_batch, mesh),
        )


def _weights(model: Decoder, optimizer: int, *counted: Any) -> Plan:
    trainable = _bytes(p for p in model.parameters() if p.requires_grad)
    return Plan(_bytes(model.parameters()) - trainable, trainable, trainable, optimizer, *counted)


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _micro_batch(rows: int, width: int, context: ContextShard) -> MicroBatch:
    places, spans = context.of_rows([[width]] * rows, context.padded(width))
    return MicroBatch.of((torch.zeros(places.shape, dtype=torch.long) for _ in range(4)), spans)


def _forward_and_backward(model: Decoder, batch: MicroBatch) -> tuple[int, _Calls]:
    with count_collectives() as calls:
        with _storages() as alive:
            loss = summed_loss(model, batch)
        kept = alive()
        loss.backward()
    model.zero_grad(set_to_none=True)
    return kept, _counted(calls)


def _with_input_gradient(model: Decoder, batch: MicroBatch) -> _Calls:
    """Count collectives where the gradient reaches the embedding's output, so that all layers have a backward pass."""
    model.embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    return _forward_and_backward(model, batch)[1]


@contextlib.contextmanager
def _storages() -> Iterator[Callable[[], int]]:
    """Measure how many bytes that operations inside allocate are still in use."""
    made: dict[int, tuple[StorageWeakRef, int]] = {}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = {leaf.untyped_storage()._cdata for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                    storage = leaf.untyped_storage()
                    made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            return out

    with Recorder():
        yield lambda: sum(size for reference, size in made.values() if not reference.expired())


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
