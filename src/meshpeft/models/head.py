"""From hidden states to the loss of each label: the vocabulary head in the form in which the loss takes it.

The head is a layer of any kind, with an adapter or without. Where its product stands between its registry entry's
`enter` and `exit`, it is run for a chunk of tokens at a time (`vocab_parallel_linear_cross_entropy`). All logits are
made, and then their cross entropy, for the rest: a layer that hides its collectives or does more than its product, a
standalone adapter, and dropout of an adapter's output, whose mask is one of all tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from meshpeft.models.config import ModelError
from meshpeft.parallel import (
    AdaptedHead,
    FrozenHead,
    LayerType,
    LogitScaling,
    ParallelAxis,
    Shard,
    does_more_than_its_type,
    layer_type_of,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)
from meshpeft.parallel.loss import UNSCALED
from meshpeft.peft import base_of
from meshpeft.peft.fused import WeightSource, product
from meshpeft.peft.wrapper import stored_weight_of, wrapper_of

__all__ = ["Labels", "check_labels", "head_losses", "losses_of_logits"]


@dataclass(frozen=True, eq=False)
class Labels:
    """What a model is to predict.

    Attributes:
        values: [batch, seq], already shifted.
        ignore_index: Label of tokens without a loss.
        count: Number of the other labels, or a larger one, if the host has it; see
            `vocab_parallel_linear_cross_entropy`.
    """

    values: Tensor
    ignore_index: int = -100
    count: int | None = None


def check_labels(labels: Labels, input_ids: Tensor, generates: bool) -> None:
    """Check that labels fit a call: one for each token, and no option of generation.

    Raises:
        ModelError: They do not.
    """
    if labels.values.shape != input_ids.shape:
        raise ModelError(
            f"labels has shape {tuple(labels.values.shape)}; expected that of input_ids, {tuple(input_ids.shape)}"
        )
    if generates:
        raise ModelError("labels: losses are of all tokens, without cache, gather_logits and last_token_only")


def losses_of_logits(logits: Tensor, labels: Labels, axis: ParallelAxis) -> Tensor:
    """logits [*, vocab / axis] -> -log p(label) [*], shaped like the labels."""
    return vocab_parallel_cross_entropy(logits, labels.values, labels.ignore_index, axis)


def head_losses(
    head: nn.Module,
    hidden: Tensor,
    labels: Labels,
    axis: ParallelAxis,
    chunk: int | None = None,
    scaling: LogitScaling = UNSCALED,
    rows_at_a_time: int | None = None,
) -> Tensor:
    """Compute -log p(label) for each token.

    Args:
        head: Layer that makes the logits, sharded by vocabulary over the axis.
        hidden: Its input [*, hidden].
        labels: Values [*], the tokens that the head has after its `enter`.
        axis: Axis that shards the vocabulary.
        chunk: Tokens whose logits exist at a time.
        scaling: What becomes of the head's output.
        rows_at_a_time: Rows of the vocabulary whose logits exist at a time, where the head is frozen; `None` for all.

    Returns:
        [*], I over the axis.
    """
    layer_type = layer_type_of(base_of(head))
    if layer_type is None or layer_type.enter is None or not _runs_by_rows(head, layer_type, axis):
        return losses_of_logits(scaling.logits(head(hidden)), labels, axis)
    x = layer_type.enter(base_of(head), hidden)
    return vocab_parallel_linear_cross_entropy(
        x,
        _form_of(head, layer_type, x, scaling, rows_at_a_time),
        labels.values,
        labels.ignore_index,
        axis,
        chunk=chunk,
        count=labels.count,
    )


def _runs_by_rows(head: nn.Module, layer_type: LayerType, axis: ParallelAxis) -> bool:
    """Whether some tokens' logits can be made without the others', between `enter` and `exit`."""
    base, wrapper = base_of(head), wrapper_of(head)
    layout = layer_type.layout(base)
    if layer_type.exit is None or layout.is_stacked or any(map(does_more_than_its_type, (base, head))):
        return False
    if layout.shard is not None and layout.axis.world_size > 1 and (layout.axis is not axis or layout.y != Shard(-1)):
        return False
    return wrapper is None or not wrapper.is_active or wrapper.runs_by_rows


def _form_of(
    head: nn.Module, layer_type: LayerType, x: Tensor, scaling: LogitScaling, rows_at_a_time: int | None
) -> FrozenHead | AdaptedHead:
    """Return the head in the form that the loss takes; x [*, hidden] is its input after `enter`."""
    base, wrapper = base_of(head), wrapper_of(head)
    stored = stored_weight_of(base)
    weight: WeightSource = partial(layer_type.weight, base) if stored is None else stored
    exit_layer = layer_type.exit
    assert exit_layer is not None
    rows = layer_type.layout(base).weight().local_shape[0]
    if wrapper is not None and wrapper.is_active:
        adapted = wrapper.row_product(x)
        run, dropped, trained = adapted.run, adapted.dropped, head
    elif torch.is_grad_enabled() and any(parameter.requires_grad for parameter in base.parameters()):
        run, dropped, trained = _product_with(weight), None, base
    else:
        return FrozenHead(weight, layer_type.bias(base), scaling, rows_at_a_time=rows_at_a_time)

    def logits_of(rows: Tensor, dropped: Tensor | None) -> Tensor:
        logits: Tensor = exit_layer(base, run(rows, dropped))
        return logits

    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    return AdaptedHead(logits_of, rows, parameters, dropped, scaling)


def _product_with(weight: WeightSource) -> Callable[[Tensor, Tensor | None], Tensor]:
    return lambda rows, _: product(rows, weight if isinstance(weight, Tensor) else weight())
