"""`verify_layout`: proof, before the GPU hours, that a layout trains the same adapter as one process.

Two checks, both in this process and without a GPU:

1. the states of the model at its real size and the full number of ranks ([`typecheck_layout`]);
2. a few optimizer steps of a scaled-down model of the same structure, in float64, on simulated ranks, against one
   rank, with what they write and read (`prove`). Scaled down are widths, layers,
   vocabulary and the number of experts; heads, query groups, biases, norms, windows, the router and the adapter are the
   model's own. Data parallel is cut to 2 and expert parallel to 4: more ranks add no other arithmetic.

The states of experts are not followed (the checker has none for tokens that choose their rank): the numbers are all
that is known of a model with experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from meshpeft.data.batches import PackedRows, pack_documents
from meshpeft.data.documents import Document
from meshpeft.models import Decoder, DecoderConfig, LanguageModel, check_divisible
from meshpeft.models.base_blocks import ShardBase
from meshpeft.models.recompute import ActivationCheckpointing
from meshpeft.parallel import ModelParallelConfig
from meshpeft.quantization import BaseQuantizer
from meshpeft.quantization.formats import BLOCK_SIZES
from meshpeft.verify.masks import set_dropout
from meshpeft.verify.oracle import Layout, Recipe
from meshpeft.verify.proof import Check, Proof, prove
from meshpeft.verify.typecheck import typecheck_layout

__all__ = ["TOLERANCE", "Verdict", "few_ranks", "first_layers", "prove_adapter", "scaled_down", "verify_layout"]

TOLERANCE = 1e-10
"""Largest relative error, in float64, that two orders of summation explain; measured errors are below 1e-11."""

_MOST_RANKS = 16


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Attributes:
        states: The loss's state per axis, from the type check; `None` where they are not followed.
        checks: What was compared, each with its largest relative error and what was done.
        unchecked: What could not be, each with the reason.
        layout: The simulated layout.
        num_layers, hidden_size: Sizes of the scaled-down model.
    """

    states: dict[str, str] | None
    checks: tuple[Check, ...]
    unchecked: tuple[str, ...]
    layout: Layout
    num_layers: int
    hidden_size: int

    @property
    def errors(self) -> dict[str, float]:
        """The largest relative error of each check, by its name."""
        return {check.name: check.error for check in self.checks}

    @property
    def is_exact(self) -> bool:
        """Whether every error is below `TOLERANCE`."""
        return all(error < TOLERANCE for error in self.errors.values())


def verify_layout(
    config: DecoderConfig,
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
    start: Callable[[LanguageModel], None] | None = None,
    dropout: float = 0.0,
    all_layers: bool = False,
    steps: int = 3,
    **options: Any,
) -> Verdict:
    """Check a model, an adapter and a layout together.

    Args:
        config: Configuration of the model, at its real size.
        adapt: Adds the adapters and freezes the rest, for instance a `LoRA`. Factors B that start at zero hide A
            from the first step; give them random values here.
        tp, dp, ep, etp, cp: Sizes of the axes; `etp=None` means `tp`.
        sequence_parallel, activation_checkpointing, shard_base: Options of the run.
        quantizer: Packs the base; in the smallest blocks, so that those of narrow layers straddle ranks, too.
        start: Gives the adapters the values that they start from, where these depend on the base.
        dropout: Dropout of the run; its masks are checked, at another probability.
        all_layers: Keep all layers instead of two, for adapters that name layers by their number.
        steps: Optimizer steps to compare.
        options: `lr_ratio` and `router_aux_loss_coef`, see `Recipe`.

    Raises:
        MeshPEFTError: The sizes do not divide, or a state is wrong.
    """
    asked = Layout(tp, dp, ep, etp, sequence_parallel, activation_checkpointing, cp=cp, shard_base=shard_base)
    check_divisible(config, asked.parallel_config())
    structure = config if all_layers else first_layers(config, 2)  # two show what any number does
    states = None
    if config.moe is None:

        def adapt_and_drop(model: LanguageModel) -> nn.Module:
            adapted = adapt(model)
            set_dropout(adapted, dropout)
            return adapted

        states = typecheck_layout(structure, adapt_and_drop, tp=tp, dp=dp, cp=cp, sequence_parallel=sequence_parallel)
    layout = few_ranks(asked)
    small = scaled_down(structure, layout, blocks=quantizer is not None)

    def make(parallel: ModelParallelConfig) -> Decoder:
        model = Decoder(small, parallel, dtype=torch.float64)
        if quantizer is not None:
            few = in_smallest_blocks(quantizer)
            for name, layer in few.layers_of(model).items():
                few.pack_(layer, name)
        return model

    proof = prove_adapter(
        layout, make, started(adapt, start), small.vocab_size, steps=steps, dropout=dropout > 0, **options
    )
    return Verdict(states, tuple(proof.checks), tuple(proof.unchecked), layout, small.num_layers, small.hidden_size)


def prove_adapter(
    layout: Layout,
    make_model: Callable[[ModelParallelConfig], LanguageModel],
    adapt: Callable[[LanguageModel], nn.Module],
    vocab_size: int,
    *,
    steps: int,
    dropout: bool,
    **options: Any,
) -> Proof:
    """Prove a layout on random documents, see `prove`.

    Args:
        layout: Layout to simulate in this process.
        make_model, adapt, options: See `Recipe`.
        vocab_size: Vocabulary size of the model.
        steps, dropout: See `prove`.
    """
    # A small learning rate: AdamW divides the rounding of a gradient near zero by its epsilon, and every step adds it.
    options = {"lr": 1e-3, **options}
    recipe = Recipe(make_model=make_model, adapt=adapt, rows=_rows(vocab_size, 32, seed=0), **options)
    return prove(recipe, layout, _rows(vocab_size, 7, seed=1), steps=steps, dropout=dropout)


def started(
    adapt: Callable[[LanguageModel], nn.Module], start: Callable[[LanguageModel], None] | None
) -> Callable[[LanguageModel], nn.Module]:
    """Compose adding adapters to a model and starting them."""

    def adapt_and_start(model: LanguageModel) -> nn.Module:
        adapted = adapt(model)
        if start is not None:
            start(model)
        return adapted

    return adapt_and_start


def in_smallest_blocks(quantizer: BaseQuantizer) -> BaseQuantizer:
    """Copy a quantizer with the smallest blocks there are, for narrow layers."""
    return replace(quantizer, block_size=BLOCK_SIZES[0])


def few_ranks(layout: Layout) -> Layout:
    """Reduce a layout to as few ranks as show all of its arithmetic, with two rows in a micro-batch."""
    tp, ep, few_ep, cp = layout.tp, layout.ep, min(layout.ep, 4), min(layout.cp, 4)
    ranks = math.lcm(cp * tp, few_ep * (tp if layout.etp is None else layout.etp))
    # Twice, so that both kinds of data parallel sum something; among experts only where that stays quick.
    if layout.dp * cp * tp >= 2 * ranks and (ep == 1 or 2 * ranks <= _MOST_RANKS):
        ranks *= 2
    shards, replicas = layout.shard_base, ranks // tp
    if isinstance(shards, int) and shards > 1:
        # Of a base with several groups of replicas, two of them where there are as many ranks.
        shards = "all" if shards == layout.dp * layout.cp or replicas % 4 else replicas // 2
    return replace(layout, dp=ranks // (cp * tp), cp=cp, ep=few_ep, micro_batch_size=2, shard_base=shards)


def scaled_down(config: DecoderConfig, layout: Layout, *, blocks: bool = False) -> DecoderConfig:
    """Scale a model's structure down to seconds: narrow heads, small widths and vocabulary, few experts.

    Args:
        config: Configuration of the model.
        layout: Layout that the sizes are divisible by.
        blocks: Make rows of whole smallest blocks of a packed weight. Those of attention's output are whole on each
            rank, too; those of the MLP's straddle ranks.
    """
    heads, tp = config.num_attention_heads, layout.tp
    windows, moe = config.sliding_windows, config.moe
    square = config.hidden_size == heads * config.head_dim
    head_dim = 4
    if blocks:
        head_dim = math.lcm(heads * head_dim, BLOCK_SIZES[0] * tp) // heads

    def inner(ranks: int) -> int:
        return straddling_width(ranks) if blocks else 8 * ranks

    if moe is not None:
        etp = tp if layout.etp is None else layout.etp
        per_rank = math.ceil((moe.moe_router_topk + 1) / layout.ep)  # so that some expert may get no token
        moe = replace(
            moe,
            num_experts=min(moe.num_experts, layout.ep * per_rank),
            intermediate_size=inner(etp),
            shared_intermediate_size=None if moe.shared_intermediate_size is None else inner(tp),
        )
    return replace(
        config,
        hidden_size=math.lcm(heads * head_dim, 4 * tp) if square else inner(tp),
        head_dim=head_dim,
        intermediate_size=inner(tp),
        vocab_size=16 * tp + (config.vocab_size % tp > 0),  # divides where the model's does
        # A window shorter than a row, where the model has windows at all.
        sliding_windows=None if windows is None else tuple(None if window is None else 4 for window in windows),
        # Large enough that softmax and the nonlinearities are not linear.
        initializer_range=0.3,
        moe=moe,
    )


def straddling_width(ranks: int) -> int:
    """Find a small number of input features that divide into blocks, some of which straddle two ranks.

    Where there is no such number (three ranks), one that divides.
    """
    block, fits = BLOCK_SIZES[0], 2 * ranks  # two values to a byte
    widths = range(2 * block, 2 * block * ranks, block)
    straddling = (width for width in widths if width % fits == 0 and width // ranks % block)
    return next(straddling, math.lcm(block, fits))


def first_layers(config: DecoderConfig, count: int) -> DecoderConfig:
    """Reduce a model to `count` layers; of layers with and without a window, or experts, one of each."""
    windows, moe = config.sliding_windows, config.moe
    if windows is not None:
        kinds = list(dict.fromkeys(windows))
        windows = tuple((kinds * count)[:count])
    if moe is not None:
        mixed = len(config.expert_layers) < config.num_layers
        moe = replace(moe, sparse_step=1, dense_layers=(0,) if mixed else ())
    return replace(config, num_layers=count, sliding_windows=windows, moe=moe)


def _rows(vocab_size: int, count: int, seed: int) -> PackedRows:
    """Random documents of unequal lengths and numbers of targets, in rows of an odd length."""
    generator = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        length = int(generator.integers(3, 15))
        tokens = generator.integers(0, vocab_size, length).astype(np.int32)
        documents.append(Document(tokens, np.arange(length) >= generator.integers(1, length)))
    return pack_documents(documents, 15, seed=0)
