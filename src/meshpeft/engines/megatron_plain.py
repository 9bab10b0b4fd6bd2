"""Linear layers of Megatron-Core models whose weight every tensor-parallel rank holds.

| layer | layout |
|---|---|
| ModelOpt's `Linear` (of MLA's down-projections) | replicated, on token shards under sequence parallel |
| a class without a config of Megatron's (`nn.Linear`) | replicated; its weight's mark says which tokens it meets |

Megatron's own mark decides: a parameter with `sequence_parallel=True` has a partial gradient on each rank,
which Megatron's finalisation sums. Nothing else in a sequence-parallel model tells a plain layer on token shards
from one that meets all tokens, and one mistaken for the other trains a different adapter on every rank. A plain layer
without the mark is refused there.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

from megatron.core import ModelParallelConfig
from torch import nn

from meshpeft.engines.megatron_checkpoint import megatron_entries
from meshpeft.engines.megatron_mesh import data_axis, megatron_marks, model_axis, reduced_as_dense
from meshpeft.parallel import LayerType, LinearLayout, ParallelError, TensorLayout, layer_type_of, register_layer_type
from meshpeft.parallel.containers import register_description
from meshpeft.parallel.layer_types import set_surroundings

__all__: list[str] = []

_MARK = "sequence_parallel"


def _duplicated(layer: Any) -> LinearLayout:
    """The layout of Megatron's own linear layer without tensor parallel."""
    # It keeps no record of being an expert's but this: its other parameters have the mark, true or false.
    expert = hasattr(layer.weight, "allreduce") and not hasattr(layer.weight, _MARK)
    return LinearLayout(
        layer.in_features,
        layer.out_features,
        axis=model_axis(layer.tp_group, expert),
        sequence_parallel=not expert and layer.config.sequence_parallel,
        data_axis=data_axis(expert),
        marks=partial(megatron_marks, allreduce=not expert or reduced_as_dense(not layer.weight.allreduce)),
    )


def _describe(model: nn.Module) -> None:
    """Let plain layers know the config of the nearest module of Megatron's around them."""
    _describe_below(model, "", None)


def _describe_below(module: nn.Module, name: str, config: ModelParallelConfig | None) -> None:
    own = getattr(module, "config", None)
    if isinstance(own, ModelParallelConfig):
        config = own
    elif config is not None and layer_type_of(module) is not None:
        set_surroundings(module, partial(_in_megatron, config=config, name=name))
    for child_name, child in module.named_children():
        _describe_below(child, f"{name}.{child_name}".lstrip("."), config)


def _in_megatron(layer: Any, layout: LinearLayout, *, config: ModelParallelConfig, name: str) -> LinearLayout:
    """The layout of a layer without a config of Megatron's, in a model of Megatron's."""
    expert = not getattr(layer.weight, "allreduce", True)
    axis, marked = model_axis(None, expert), getattr(layer.weight, _MARK, None)
    marks = partial(megatron_marks, allreduce=not expert)
    known = expert or marked is not None or not config.sequence_parallel or axis.world_size == 1
    return replace(
        layout,
        axis=axis,
        sequence_parallel=config.sequence_parallel and bool(marked) and not expert,
        data_axis=data_axis(expert),
        # Refused where it gets an adapter, not before: it may be no target.
        marks=marks if known else partial(_refuse, name=name, kind=type(layer).__name__),
    )


def _refuse(layout: TensorLayout, *, name: str, kind: str) -> NoReturn:
    raise ParallelError(
        f"{name} is a plain {kind} in a model of Megatron's with sequence parallel, and does not say whether it meets "
        "this rank's tokens or all of them: the gradients of its adapter may be partial or complete. Set "
        "layer.weight.sequence_parallel = True where each rank has its own tokens, False where all have the same; or "
        "leave the layer out"
    )


def _register() -> None:
    try:
        from megatron.core.post_training.modelopt.layers import Linear
    except ImportError:  # other versions of Megatron-Core have it elsewhere, or not at all
        return
    register_layer_type(
        Linear, LayerType(layout=_duplicated, weight=lambda layer: layer.weight, checkpoint=megatron_entries)
    )


_register()
register_description(_describe)
