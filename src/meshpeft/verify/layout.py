"""`verify_layout`: proof, before the GPU hours, that a layout trains the adapter that one process would train.

Two checks, both in this process and without a GPU:

1. the states of the model at its real size and the full number of ranks ([`typecheck_layout`]);
2. a few optimizer steps of a scaled-down model of the same structure, in float64, on simulated ranks, against one
   rank ([`trace_layout`]). Scaled down are widths, layers and vocabulary; heads, query groups, biases, norms,
   windows and the adapter are the model's own. Data parallel is cut to 2: more ranks add no other arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from meshpeft.models import Decoder, DecoderConfig, check_divisible
from meshpeft.parallel import ModelParallelConfig
from meshpeft.training.documents import Document
from meshpeft.training.packing import PackedRows, pack_documents
from meshpeft.verify.oracle import Layout, compare, trace_layout
from meshpeft.verify.typecheck import typecheck_layout

__all__ = ["TOLERANCE", "Verdict", "scaled_down", "verify_layout"]

TOLERANCE = 1e-10
"""Largest relative error, in float64, that two orders of summation explain; measured errors are below 1e-11."""


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Attributes:
        states: the loss's state per axis, from the type check.
        errors: largest relative error of loss, gradient norm, gradients, weights and exported adapter.
        layout: the simulated layout.
    """

    states: dict[str, str]
    errors: dict[str, float]
    layout: Layout

    @property
    def is_exact(self) -> bool:
        """Whether every error is below [`TOLERANCE`][meshpeft.verify.layout.TOLERANCE]."""
        return all(error < TOLERANCE for error in self.errors.values())


def verify_layout(
    config: DecoderConfig,
    adapt: Callable[[Decoder], nn.Module],
    *,
    tp: int = 1,
    dp: int = 1,
    sequence_parallel: bool = False,
    activation_checkpointing: bool = False,
    steps: int = 3,
) -> Verdict:
    """Check a model, an adapter and a layout together.

    Args:
        config: of the model, at its real size.
        adapt: adds the adapters and freezes the rest, for instance a `LoRA`. Factors B that start at zero hide A
            from the first step; give them random values here.
        tp, dp: sizes of the axes.
        sequence_parallel, activation_checkpointing: as the run will have them.
        steps: optimizer steps to compare.

    Raises:
        MeshPEFTError: the sizes do not divide, or a state is wrong.
    """
    check_divisible(config, ModelParallelConfig(tp, sequence_parallel=sequence_parallel))
    # Two layers show what any number does.
    states = typecheck_layout(_layers(config, 2), adapt, tp=tp, dp=dp, sequence_parallel=sequence_parallel)
    small = scaled_down(config, tp)
    layout = Layout(
        tp=tp,
        dp=min(dp, 2),
        sequence_parallel=sequence_parallel,
        activation_checkpointing=activation_checkpointing,
        micro_batch_size=2,
    )

    def make_model(parallel: ModelParallelConfig) -> Decoder:
        return Decoder(small, parallel, dtype=torch.float64)

    rows = _rows(small.vocab_size)
    alone, spread = (trace_layout(one, make_model, adapt, rows, steps=steps) for one in (Layout(), layout))
    return Verdict(states, compare(alone, spread), layout)


def scaled_down(config: DecoderConfig, tp: int) -> DecoderConfig:
    """A model of the same structure that takes seconds: two layers, narrow heads, a small vocabulary."""
    heads = config.num_attention_heads
    two = _layers(config, 2)
    windows = two.sliding_windows
    return replace(
        two,
        hidden_size=math.lcm(heads * 4, 4 * tp) if config.hidden_size == heads * config.head_dim else 8 * tp,
        head_dim=4,
        intermediate_size=8 * tp,
        vocab_size=16 * tp,
        # A window shorter than a row, where the model has windows at all.
        sliding_windows=None if windows is None else tuple(None if window is None else 4 for window in windows),
        # Large enough that softmax and the nonlinearities are not linear.
        initializer_range=0.3,
    )


def _layers(config: DecoderConfig, count: int) -> DecoderConfig:
    """The first `count` layers; of layers with and without a window, one of each."""
    windows = config.sliding_windows
    if windows is not None:
        kinds = list(dict.fromkeys(windows))
        windows = tuple((kinds * count)[:count])
    return replace(config, num_layers=count, sliding_windows=windows)


def _rows(vocab_size: int) -> PackedRows:
    """Random documents of unequal lengths and numbers of targets, in rows of an odd length."""
    generator = np.random.default_rng(0)
    documents = []
    for _ in range(32):
        length = int(generator.integers(3, 15))
        tokens = generator.integers(0, vocab_size, length).astype(np.int32)
        documents.append(Document(tokens, np.arange(length) >= generator.integers(1, length)))
    return pack_documents(documents, 15, seed=0)
