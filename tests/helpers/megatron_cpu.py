"""Megatron-Core on a machine without GPUs: its groups over gloo, and stand-ins for its calls of CUDA."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from queue import Queue
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.common.embeddings import RotaryEmbedding
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import moe_utils, router, token_dispatcher
from torch import Tensor, nn

__all__ = ["SequenceParallelRMSNorm", "megatron_on_cpu"]


@contextmanager
def megatron_on_cpu(**sizes: int) -> Iterator[None]:
    """Inside, Megatron-Core runs on this process's gloo world; afterwards everything is as it was.

    Args:
        sizes: of `parallel_state.initialize_model_parallel`, for instance `tensor_model_parallel_size=2`.
    """
    with ExitStack() as stack:
        for target, name, stand_in in (
            # The device that layers allocate their buffers on.
            (torch.cuda, "current_device", lambda: torch.device("cpu")),
            # Waiting for kernels: there are none.
            (torch.cuda, "synchronize", lambda *args: None),
            # The states of GPU generators, which no operation here draws from.
            (megatron_random, "_get_cuda_rng_state", lambda **kwargs: torch.zeros(1, dtype=torch.uint8)),
            (megatron_random, "_set_cuda_rng_state", lambda *args, **kwargs: None),
            (megatron_random.CudaRNGStatesTracker, "fork", lambda self, name="": nullcontext()),
            # The stream on which numbers of tokens are copied to the CPU: they are there.
            (torch.cuda, "Stream", mock.MagicMock),
            (torch.cuda, "current_stream", mock.MagicMock),
            (torch.cuda, "stream", lambda stream: nullcontext()),
            (token_dispatcher, "maybe_move_tensor_to_cpu", _on_cpu),
            # Transformer Engine's GEMM, a name that Megatron does not define without it and asks for nevertheless.
            (moe_utils, "te_general_gemm", None),
            # Its router's softmax is float32 whatever the type of the model.
            (router, "topk_routing_with_score_function", _topk_softmax),
            # A queue in a process of its own, for writers that outlive the call.
            (filesystem_async, "_get_write_results_queue", Queue),
        ):
            stack.enter_context(mock.patch.object(target, name, stand_in, create=True))
        # Its writers are processes, which the workers of tests (daemons) may not start otherwise.
        stack.enter_context(mock.patch.dict(multiprocessing.current_process()._config, daemon=False))
        parallel_state.initialize_model_parallel(**sizes)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            # By its embeddings, this cache holds models and their process groups, whose threads go on running.
            RotaryEmbedding.forward.cache_clear()


def _on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


def _topk_softmax(logits: Tensor, topk: int, **_: Any) -> tuple[Tensor, Tensor]:
    scores, experts = logits.topk(topk, dim=1)
    probabilities = torch.zeros_like(logits).scatter(1, experts, scores.softmax(-1))
    return probabilities, torch.zeros_like(logits, dtype=torch.bool).scatter(1, experts, True)


class SequenceParallelRMSNorm(nn.Module):
    """RMSNorm in Megatron's place for norms: torch's, which its local spec has there, refuses sequence parallel."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight
