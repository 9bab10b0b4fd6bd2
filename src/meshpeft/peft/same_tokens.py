"""Check that ranks that share layers get the same tokens: compared once, in the first training call.

Under tensor parallel every rank computes its part of every layer for the same tokens. A trainer that deals the rows of
a batch out over all processes gives each rank others; the parts of different rows are then added up, and the run trains
an adapter of nothing, without an error. So the input embedding of an adapted model compares a checksum of its token ids
over tensor parallel, in its first call in training mode, and never again.

Models of Megatron are left out: their token embedding sees what Megatron's own data pipeline hands out, which is the
same by construction, and their vocabulary embedding may see a rank's part of the sequence.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from meshpeft.parallel import ParallelAxis, ParallelError, VocabParallelEmbedding, is_simulated, layout_of_tensor
from meshpeft.parallel.states import all_gather

__all__ = ["watch_tokens"]


def watch_tokens(model: nn.Module, adapters: list[nn.Module]) -> None:
    """Make the model's input embedding compare its tokens once, if adapted layers are sharded over several ranks.

    Args:
        model: Model with adapters.
        adapters: Modules that hold their parameters.
    """
    axis = _shared_axis(adapters)
    embedding = _input_embedding(model)
    if axis is None or embedding is None:
        return
    if not any(isinstance(hook, _TokenComparison) for hook in embedding._forward_pre_hooks.values()):
        embedding.register_forward_pre_hook(_TokenComparison(axis))


class _TokenComparison:
    """A hook that removes itself once it has compared."""

    def __init__(self, axis: ParallelAxis) -> None:
        self.axis = axis

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        # A graph that is compiled or captured keeps no hook of python; the next call outside of one compares.
        if not module.training or torch.compiler.is_compiling() or not args or not _has_values(args[0], self.axis):
            return
        for number, hook in list(module._forward_pre_hooks.items()):
            if hook is self:
                del module._forward_pre_hooks[number]
        ids: Tensor = args[0]
        digest = hashlib.sha256(repr(tuple(ids.shape)).encode())
        digest.update(ids.detach().cpu().contiguous().numpy().tobytes())
        own = torch.tensor([int.from_bytes(digest.digest()[:8], "little", signed=True)], device=ids.device)
        found = all_gather(own, self.axis, 0).tolist()
        others = [rank for rank, number in enumerate(found) if number != found[0]]
        if others:
            raise ParallelError(
                f"rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others[:4]))} of {self.axis.name}="
                f"{self.axis.world_size} got other tokens than rank 0, but each computes a part of every layer for the "
                "same tokens. Deal rows out over data parallel only: give the loader a DistributedSampler with "
                "num_replicas=parallel_group_info().dp.world_size and rank=parallel_group_info().dp.rank"
            )


def _has_values(ids: Any, axis: ParallelAxis) -> bool:
    """Whether the ids have values, and other processes have them too."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_meta or isinstance(ids, (FakeTensor, DTensor)):
        return False
    if is_simulated() or dist.get_backend(axis.group) == "fake":
        return False
    return not (ids.is_cuda and torch.cuda.is_current_stream_capturing())


def _shared_axis(adapters: list[nn.Module]) -> ParallelAxis | None:
    """Return the tensor-parallel axis of the adapted layers if it has several ranks; experts have their own."""
    for adapter in adapters:
        for parameter in adapter.parameters():
            layout = layout_of_tensor(parameter)
            if layout is None or layout.expert:
                continue
            for axis in (*layout.shard_axes, *layout.grad_partial):
                if axis.name == "tp" and axis.world_size > 1 and axis.group is not None:
                    return axis
    return None


def _input_embedding(model: nn.Module) -> nn.Module | None:
    """Return the input embedding of a transformers model, wherever it is in the model, or of our decoder."""
    for module in model.modules():
        get: Any = getattr(module, "get_input_embeddings", None)
        if callable(get):
            with suppress(NotImplementedError, AttributeError):  # of a class that does not define it
                found: nn.Module | None = get()
                return found
        embedding = getattr(module, "embedding", None)
        if isinstance(embedding, VocabParallelEmbedding):
            return embedding
    return None
