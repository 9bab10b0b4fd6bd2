"""transformers models with our parallel layers in the place of their linear ones.

Their own tensor-parallel plan states which linear layer is sharded how; blocks that it leaves out are sharded by their
structure, and stacked experts over expert parallel. Unlike layers that transformers shards itself
(`tp_plan="auto"`, see `engines.transformers`) these let adapters join between their collectives, and add none; and
layers that fuse q, k, v or gate and up are sharded part by part, where the plan gathers their full output: each rank's
output holds its slice of every part, and the code after it finds them there. So architectures that `meshpeft.models`
does not have are fine-tuned like those that it has: gradients are partial until `finalize_gradients`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

from meshpeft.engines import source_of
from meshpeft.engines.hidden_stream import attach_stream, layers_of_stream
from meshpeft.engines.recurrent_blocks import recurrent_block
from meshpeft.engines.replicated_layers import CopiedHeadsLinear, SharedKeyLinear
from meshpeft.engines.transformers_experts import ExpertAxes, group_experts, keep_slice, naming, stacks_of_experts
from meshpeft.parallel import (
    ColumnParallelLinear,
    FusedParts,
    ParallelAxis,
    ParallelError,
    RowParallelLinear,
    TensorLayout,
    VocabParallelEmbedding,
    layer_type_of,
    parallel_group_info,
    set_layout,
)

__all__ = ["FusedLayer", "fused_layers", "parallelize"]


@dataclass(frozen=True)
class FusedLayer:
    """A layer whose output fuses several parts, in a module whose code takes them apart.

    Attributes:
        fused_parts: made from the module that holds the layer.
        partner: Layer after it, which then takes its input sharded.
        localise: lets the holder's code count the heads of one rank.
    """

    fused_parts: Callable[[Any], FusedParts]
    partner: str
    localise: Callable[[Any, int], None] = lambda holder, shards: None


def _qkv_of_phi3(attention: Any) -> FusedParts:
    q, kv = (
        heads * attention.head_dim for heads in (attention.config.num_attention_heads, attention.num_key_value_heads)
    )
    return FusedParts(("q", "k", "v"), (q, kv, kv))


def _local_heads_of_phi3(attention: Any, shards: int) -> None:
    # It finds the end of the queries by its config, which it shares with the full model.
    attention.config = copy.copy(attention.config)
    attention.config.num_attention_heads //= shards
    attention.num_key_value_heads //= shards


def _qkv_of_neox(attention: Any) -> FusedParts:
    # Head after head: its query, its key, its value.
    size = attention.query_key_value.out_features // 3
    return FusedParts(("q", "k", "v"), (size,) * 3, blocks=size // attention.head_size)


def _gate_up(mlp: Any) -> FusedParts:
    size = mlp.gate_up_proj.out_features // 2
    return FusedParts(("gate", "up"), (size, size))


# (Class of the module that holds the layer, the layer) -> how it is packed.
_FUSED: dict[tuple[str, str], FusedLayer] = {
    ("Phi3Attention", "qkv_proj"): FusedLayer(_qkv_of_phi3, "o_proj", _local_heads_of_phi3),
    ("GPTNeoXAttention", "query_key_value"): FusedLayer(_qkv_of_neox, "dense"),
} | {(f"{family}MLP", "gate_up_proj"): FusedLayer(_gate_up, "down_proj") for family in ("Phi3", "Glm", "Glm4")}


def fused_layers(model: nn.Module, styles: Mapping[str, str]) -> dict[str, FusedLayer]:
    """Those of the layers named in `styles` whose parts are known, by full name."""
    found = {}
    for name in styles:
        parent, _, own = name.rpartition(".")
        for cls in type(model.get_submodule(parent)).__mro__:
            if (cls.__name__, own) in _FUSED:
                found[name] = _FUSED[cls.__name__, own]
    return found


Model = TypeVar("Model", bound=nn.Module)
_Linear = TypeVar("_Linear", ColumnParallelLinear, RowParallelLinear)

_COLUMN = {"colwise": False, "colwise_gather_output": True, "colwise_rep": True}
_ROW = {"rowwise": True, "rowwise_split_input": False, "rowwise_rep": False}


@dataclass
class _Changes:
    """Changes to the model, checked to be possible before the first of them."""

    layers: dict[str, nn.Module] = field(default_factory=dict)
    layouts: list[tuple[nn.Parameter, TensorLayout]] = field(default_factory=list)
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    blocks: list[str] = field(default_factory=list)
    local: list[tuple[FusedLayer, nn.Module]] = field(default_factory=list)
    counts: list[tuple[nn.Module, str, int]] = field(default_factory=list)  # numbers of one rank that their code reads
    in_full: set[str] = field(default_factory=set)  # those of `layers` that every rank holds

    def copy_heads(self, name: str, linear: nn.Linear, heads: int, axis: ParallelAxis) -> None:
        """Keep all heads of keys or values on every rank."""
        self.layers[name] = layer = CopiedHeadsLinear(linear, heads, axis)
        layouts = {"weight": layer.layout.weight(), "bias": layer.layout.bias()}
        self.layouts += [(parameter, layouts[own]) for own, parameter in layer.named_parameters()]


def parallelize(
    model: Model,
    *,
    axis: ParallelAxis | None = None,
    expert_axes: ExpertAxes | None = None,
    gather_logits: bool = True,
    sequence_parallel: bool = False,
) -> Model:
    """Shard a transformers model over tensor parallel, and its experts over expert parallel, in place. No collective.

    Linear layers and the embedding that the model's `tp_plan` names become `ColumnParallelLinear`,
    `RowParallelLinear` and `VocabParallelEmbedding`. So do the projections of attention (latent attention too, with
    its `SharedKeyLinear`) and of gated MLPs that it does not name; parameters of one value a head, such as sinks, are
    sharded with them. Stacked experts become grouped layers, whatever the plan says of them (`group_experts`).

    Each rank keeps its slices, and the rest is freed. Tied weights stay tied. An embedding and head whose vocabulary
    does not divide stay replicated. The model takes the same inputs on every rank and gives the same outputs. Apply
    adapters afterwards.

    Args:
        model: Model as `from_pretrained` returns it, or on the meta device, the same on every rank.
        axis: Axis to shard it over; tensor parallel by default.
        expert_axes: Axes that shard its experts; those of the mesh by default, with `axis` for tensor parallel.
        gather_logits: Return full logits; otherwise the model returns its rank's slice of the vocabulary
            [*, vocab / world_size], for `vocab_parallel_cross_entropy`, where the vocabulary divides.
        sequence_parallel: Shard the tokens of a row between blocks; see `hidden_stream.py`.

    Returns:
        The model itself.

    Raises:
        ParallelError: The model has no plan, or one with a style that has no counterpart here; neither plan nor
            structure shards anything between the embedding and the head; a layer's size, its attention heads or its
            experts do not divide; sequence parallel, and no single stack of layers. The model is unchanged then.
    """
    axis = parallel_group_info().tp if axis is None else axis
    plan: Mapping[str, str] = getattr(model, "tp_plan", None) or {}
    if not plan:
        raise ParallelError(
            f"{type(model).__name__} has no tensor-parallel plan (tp_plan): how its layers may be sharded is not known"
        )
    changes = _planned(model, plan, axis, gather_logits)
    experts, layers = list(stacks_of_experts(model)), None
    if sequence_parallel and axis.world_size > 1:
        layers = layers_of_stream(model, [*changes.layers, *experts])
    group_experts(model, ExpertAxes.of_mesh(axis) if expert_axes is None else expert_axes)
    for fused, holder in changes.local:
        fused.localise(holder, axis.world_size)
    for name, layer in changes.layers.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)
    for name, parameter in changes.parameters.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, parameter)
    for parameter, layout in changes.layouts:
        set_layout(parameter, layout)
    for module, count, local in changes.counts:
        setattr(module, count, local)
    if axis.world_size > 1:
        attach_stream(model, axis, changes.blocks, experts, layers)
    return model


def _planned(model: nn.Module, plan: Mapping[str, str], axis: ParallelAxis, gather_logits: bool) -> _Changes:
    changes, made = _Changes(), dict[int, nn.Parameter]()
    stacks = stacks_of_experts(model)
    styles = {
        name: style
        for name, _ in model.named_modules()
        if name not in stacks and (style := _style_of(name, plan)) is not None
    }
    styles |= _completed(model, styles)
    for name, module in model.named_modules():
        # Plans leave out an embedding that is not called embed_tokens.
        if module is getattr(model, "get_input_embeddings", lambda: None)():
            styles[name] = "embedding_rowwise"
    for name, parameter in model.named_parameters():
        style = styles.pop(name, None) or _style_of(name, plan)
        if style is None or name.rpartition(".")[0] in stacks:
            continue
        if style != "colwise" or parameter.dim() != 1:
            raise _unsupported(name, style)
        changes.parameters[name] = _sharded(parameter, name, axis, made)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    recurrent = _recurrent_layers(model, styles, changes, axis, made)
    fused = fused_layers(model, styles)
    partners = {f"{name.rpartition('.')[0]}.{entry.partner}" for name, entry in fused.items()}
    changes.local = [(entry, model.get_submodule(name.rpartition(".")[0])) for name, entry in fused.items()]
    replicated = _replicated_embedding(model, axis)
    changes.blocks = _blocks(model, styles, fused, changes.parameters)
    in_blocks = {name for name in styles if name.rpartition(".")[0] in changes.blocks}
    for name, style in styles.items():
        module = model.get_submodule(name)
        if style in _COLUMN:
            linear = _linear(module, name, style)
            if module is head and (linear.out_features % axis.world_size or linear.weight is replicated):
                continue
            gather = _COLUMN[style] and name not in fused and (gather_logits or module is not head)
            fused_parts = recurrent.get(name)
            if name in fused:
                fused_parts = fused[name].fused_parts(model.get_submodule(name.rpartition(".")[0]))
            copied = None
            if name in in_blocks and name not in fused and name not in recurrent:
                copied = _copied_heads(model, name, linear, styles, axis)
            if copied is not None:
                heads, queries = copied
                changes.copy_heads(name, linear, heads, axis)
                changes.counts.append((model.get_submodule(name.rpartition(".")[0]), "num_key_value_groups", queries))
                continue
            if not gather and module is not head and name not in recurrent:
                _check_heads(model, name, linear, fused_parts, axis)
                changes.parameters |= _norms_of_heads(model, name, linear, axis, made)
            changes.layers[name] = _column(linear, name, fused_parts, gather, name in in_blocks, axis, made)
        elif style in _ROW:
            parallel = _ROW[style] or name in partners
            linear = _linear(module, name, style)
            changes.layers[name] = _row(linear, name, parallel, name not in in_blocks, axis, made)
        elif style == "embedding_rowwise":
            if module.weight is not replicated:
                changes.layers[name] = _embedding(module, axis, made)
        elif style == "replicated_with_grad_allreduce":
            # A norm of each head: its own rank's heads are all that it sees.
            changes.layouts += [
                (parameter, TensorLayout(tuple(parameter.shape), grad_partial=(axis,) if axis.world_size > 1 else ()))
                for parameter in module.parameters()
            ]
        elif style == "mla_kv_a_proj":
            rotary: int = model.get_submodule(name.rpartition(".")[0]).qk_rope_head_dim  # type: ignore[assignment]
            changes.layers[name] = SharedKeyLinear(_linear(module, name, style), rotary, axis)
        elif style not in ("replicate", "local_params"):  # the second is of hooks that hand DTensors' slices on
            raise _unsupported(name, style)
    at_the_ends = {name for name, style in styles.items() if style == "embedding_rowwise"}
    at_the_ends |= {name for name in styles if model.get_submodule(name) is head}
    if axis.world_size > 1 and not stacks and changes.layers.keys() <= at_the_ends | changes.in_full:
        raise ParallelError(
            f"{type(model).__name__}: neither its tensor-parallel plan nor the structure of its blocks says how to "
            f"shard them, so at {axis.name}={axis.world_size} every process would hold and compute all of them; use "
            f"{axis.name}=1"
        )
    return changes


def _recurrent_layers(
    model: nn.Module,
    styles: dict[str, str],
    changes: _Changes,
    axis: ParallelAxis,
    made: dict[int, nn.Parameter],
) -> dict[str, FusedParts | None]:
    """Plan the blocks with a state: their first layers, with the fused parts of each.

    Where the groups of heads do not divide, every rank holds all of them. What fuses several parts states them all the
    same, for its parts have names in a checkpoint.
    """
    found: dict[str, FusedParts | None] = {}
    for prefix, module in model.named_modules():
        block = recurrent_block(module)
        if block is None:
            continue
        parameters = {f"{prefix}.{own}": parts for own, parts in block.parameters.items()}
        if block.groups % axis.world_size:
            alone = ParallelAxis("none")
            for name, parts in parameters.items():
                changes.parameters[name] = _sharded(model.get_parameter(name), name, alone, made, parts)
            for own, parts in block.columns.items():
                name = f"{prefix}.{own}"
                styles.pop(name, None)
                linear = _linear(model.get_submodule(name), name, "colwise")
                changes.layers[name] = _column(linear, name, parts, False, False, alone, made)
            changes.in_full |= {f"{prefix}.{own}" for own in block.columns}
            continue
        found |= {f"{prefix}.{name}": parts for name, parts in block.columns.items()}
        styles |= dict.fromkeys((f"{prefix}.{name}" for name in block.columns), "colwise")
        styles |= {f"{prefix}.{block.row}": "rowwise"}
        styles |= dict.fromkeys((f"{prefix}.{name}" for name in block.shared), "replicated_with_grad_allreduce")
        for name, parts in parameters.items():
            changes.parameters[name] = _sharded(model.get_parameter(name), name, axis, made, parts)
        for own, counts in block.counts.items():
            held: Any = module.get_submodule(own)
            changes.counts += [(held, count, getattr(held, count) // axis.world_size) for count in counts]
    return found


def _blocks(
    model: nn.Module, styles: Mapping[str, str], fused: Mapping[str, FusedLayer], sharded: Mapping[str, nn.Parameter]
) -> list[str]:
    """Find the modules that consist of columns, one row after them, and norms of heads between the two."""
    found = []
    for prefix, block in model.named_modules():
        linears = {f"{prefix}.{name}" for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        columns = {name for name in linears if styles.get(name) == "colwise" or name in fused}
        rows = linears - columns
        if not columns or len(rows) != 1 or styles.get(*rows) not in _ROW:
            continue
        (row,) = rows
        if not (_ROW[styles[row]] or row in {f"{prefix}.{fused[name].partner}" for name in columns & fused.keys()}):
            continue
        if any(name.rpartition(".")[0] != prefix for name in linears):
            continue
        others = {
            f"{prefix}.{name}" for name, parameter in block.named_parameters() if not _is_norm_of_heads(name, parameter)
        } - sharded.keys()
        others = {name for name in others if name.rpartition(".")[0] not in linears}
        if all(styles.get(name.rpartition(".")[0]) == "replicated_with_grad_allreduce" for name in others):
            found.append(prefix)
    return found


def _style_of(name: str, plan: Mapping[str, str]) -> str | None:
    for pattern, style in plan.items():
        if re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), name):
            return style
    return None


def _unsupported(name: str, style: str) -> ParallelError:
    return ParallelError(
        f"{name}: the style {style!r} of the model's tensor-parallel plan has no counterpart among this package's "
        "layers; use tp=1, or in Python let transformers shard the model (docs/engines.md)"
    )


def _linear(module: nn.Module, name: str, style: str) -> nn.Linear:
    if not isinstance(module, nn.Linear) or hasattr(module, "_is_hooked"):
        raise ParallelError(
            f"{name}: the plan shards it {style}, which needs a plain nn.Linear; found a {type(module).__name__}. "
            "Call parallelize before adapters are applied, on a model that transformers did not shard or quantise"
        )
    return module


def _head_dim(model: nn.Module, name: str, linear: nn.Linear) -> int | None:
    """Find the width of the heads that a layer gives; `None` where the module around it does not say."""
    holder: Any = model.get_submodule(name.rpartition(".")[0])
    if isinstance(getattr(holder, "qk_rope_head_dim", None), int):  # latent attention: heads of several widths
        return int(linear.out_features // holder.num_heads)
    own = "v_head_dim" if name.endswith("v_proj") else "head_dim"
    found = next((size for key in (own, "head_dim", "head_size") if (size := getattr(holder, key, None))), None)
    return found if isinstance(found, int) else None


def _copied_heads(
    model: nn.Module, name: str, linear: nn.Linear, styles: Mapping[str, str], axis: ParallelAxis
) -> tuple[int, int] | None:
    """Count the heads of keys or values that are fewer than the ranks and divide these, and the queries of a rank.

    `None` for any other layer.
    """
    prefix = name.rpartition(".")[0]
    holder: Any = model.get_submodule(prefix)
    groups, head_dim = getattr(holder, "num_key_value_groups", None), _head_dim(model, name, linear)
    rows = [child for own, child in holder.named_children() if styles.get(f"{prefix}.{own}") in _ROW]
    width = _head_dim(model, f"{prefix}.v_proj", linear)
    if not isinstance(groups, int) or head_dim is None or width is None:
        return None
    if any(_is_norm_of_heads(own, weight) for own, weight in holder.named_parameters()):
        return None
    heads, queries = linear.out_features // head_dim, rows[0].in_features // width
    if heads * groups != queries or heads >= axis.world_size or axis.world_size % heads or queries % axis.world_size:
        return None
    return heads, queries // axis.world_size


def _check_heads(
    model: nn.Module, name: str, linear: nn.Linear, fused_parts: FusedParts | None, axis: ParallelAxis
) -> None:
    """Check that every rank gets full heads: code between a column and a row counts them."""
    head_dim = _head_dim(model, name, linear)
    if head_dim is None:
        return
    parts = fused_parts.sizes if fused_parts is not None else (linear.out_features,)
    for size in parts:
        heads = size // head_dim
        if heads % axis.world_size:
            fitting = " or ".join(str(count) for count in range(1, heads + 1) if heads % count == 0)
            raise ParallelError(
                f"{name}: {heads} heads of {head_dim} features cannot be split over {axis.name}={axis.world_size}; "
                f"use {fitting}"
            )


def _norms_of_heads(
    model: nn.Module, name: str, linear: nn.Linear, axis: ParallelAxis, made: dict[int, nn.Parameter]
) -> dict[str, nn.Parameter]:
    """Shard weights [heads, head_dim] of norms after a column (Cohere's), which no plan shards, by heads."""
    prefix, found = name.rpartition(".")[0], {}
    for own, weight in model.get_submodule(prefix).named_parameters():
        if _is_norm_of_heads(own, weight) and weight.numel() == linear.out_features:
            found[f"{prefix}.{own}"] = _sharded(weight, f"{prefix}.{own}", axis, made)
    return found


def _is_norm_of_heads(name: str, weight: Tensor) -> bool:
    """Whether a parameter is the weight [heads, head_dim] of a norm with other numbers for each head."""
    return name.endswith("norm.weight") and weight.dim() == 2


def _sharded(
    full: nn.Parameter, name: str, axis: ParallelAxis, made: dict[int, nn.Parameter], parts: FusedParts | None = None
) -> nn.Parameter:
    """Shard a full parameter along its first dim, [heads, ..] or channels that fuse `parts`, as q, k and v are."""
    with naming(name):
        layout = TensorLayout(tuple(full.shape), ((0, axis),), parts)
    new = nn.Parameter(full.new_empty(layout.local_shape))
    set_layout(new, layout)
    return _kept(new, full, made)


# The layers of a block whose plan says nothing of it.
_ATTENTION = ("q_proj", "k_proj", "v_proj")
_OUTPUTS = ("o_proj", "out_proj", "dense")
_LATENT = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
_GATED_MLPS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


def _completed(model: nn.Module, styles: Mapping[str, str]) -> dict[str, str]:
    """Find the styles of blocks that a plan leaves out, by their structure; of modules, and of parameters.

    transformers' plans of many architectures name the experts alone. Taken for granted of a block's code is that it
    takes the number of heads from the sizes of its tensors (its `forward` does not read `num_heads`), and that it
    treats channels one by one; the second is not looked at here, but shows in the numbers of `meshpeft verify`.

    Args:
        model: The model.
        styles: Those of the plan, by full name: blocks with any of these are left alone.
    """
    planned = {name.rpartition(".")[0] for name in styles}
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if name not in planned:
            found |= {f"{name}.{own}": style for own, style in _styles_of_block(module).items()}
    return found


def _styles_of_block(block: Any) -> dict[str, str]:
    """Return the styles of a block's layers and parameters, by their own names; none for an unknown structure."""
    linears = {name: child for name, child in block.named_children() if type(child) is nn.Linear}
    others = [child for child in block.children() if child not in linears.values()]
    for gate, up, down in _GATED_MLPS:
        sizes = {linears[name].out_features for name in (gate, up) if name in linears}
        if linears.keys() == {gate, up, down} and sizes == {linears[down].in_features}:
            return {gate: "colwise", up: "colwise", down: "rowwise"}
    if not linears or any(layer_type_of(module) is not None for child in others for module in child.modules()):
        return {}
    own = [name for name, _ in block.named_parameters(recurse=False)]
    if "num_heads" in source_of(block.__class__.forward) or not set(own) <= {"sinks"}:
        return {}
    outputs = [name for name in _OUTPUTS if name in linears]
    if (
        linears.keys() == {*_ATTENTION, *outputs}
        and len(outputs) == 1
        and isinstance(getattr(block, "head_dim", None), int)
    ):
        # A norm of all heads needs them all; one of each head serves any.
        if any(tuple(weight.shape) != (block.head_dim,) for child in others for weight in child.parameters()):
            return {}
        norms = [name for name, child in block.named_children() if child in others and [*child.parameters()]]
        styles = dict.fromkeys(_ATTENTION, "colwise") | {outputs[0]: "rowwise"} | dict.fromkeys(own, "colwise")
        return styles | dict.fromkeys(norms, "replicated_with_grad_allreduce")
    query = "q_b_proj" if "q_b_proj" in linears else "q_proj"
    needed = {query, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    latents = {name for name, child in block.named_children() if child in others and [*child.parameters()]}
    is_latent = needed <= linears.keys() <= set(_LATENT) and latents <= {"q_a_layernorm", "kv_a_layernorm"}
    if is_latent and isinstance(getattr(block, "qk_rope_head_dim", None), int):
        return {
            query: "colwise",
            "kv_a_proj_with_mqa": "mla_kv_a_proj",
            "kv_b_proj": "colwise",
            "o_proj": "rowwise",
        }
    return {}


def _options(module: nn.Linear | nn.Embedding) -> dict[str, Any]:
    return {"device": module.weight.device, "dtype": module.weight.dtype, "perform_initialization": False}


def _filled(layer: _Linear, module: nn.Linear, made: dict[int, nn.Parameter]) -> _Linear:
    """Return the layer with its slices of the weight and bias of the module that it replaces."""
    layer.weight = _kept(layer.weight, module.weight, made)
    if layer.bias is not None:
        layer.bias = _kept(layer.bias, module.bias, made)
    return layer


def _column(
    module: nn.Linear,
    name: str,
    fused_parts: FusedParts | None,
    gather: bool,
    input_is_copied: bool,
    axis: ParallelAxis,
    made: dict[int, nn.Parameter],
) -> ColumnParallelLinear:
    with naming(name):
        layer = ColumnParallelLinear(
            module.in_features,
            module.out_features,
            module.bias is not None,
            gather,
            input_is_copied=input_is_copied,
            fused_parts=fused_parts,
            axis=axis,
            **_options(module),
        )
    return _filled(layer, module, made)


def _row(
    module: nn.Linear,
    name: str,
    input_is_parallel: bool,
    reduce_output: bool,
    axis: ParallelAxis,
    made: dict[int, nn.Parameter],
) -> RowParallelLinear:
    with naming(name):
        layer = RowParallelLinear(
            module.in_features,
            module.out_features,
            module.bias is not None,
            input_is_parallel,
            reduce_output=reduce_output,
            axis=axis,
            **_options(module),
        )
    return _filled(layer, module, made)


class _ScaledEmbedding(VocabParallelEmbedding):
    """Embeddings times a number that the architecture fixes (Gemma)."""

    embed_scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x [*] of indices -> [*, embedding_dim]."""
        return super().forward(x) * self.embed_scale.to(self.weight.dtype)


def _is_scaled(module: nn.Module) -> bool:
    return type(module).__name__.endswith("TextScaledWordEmbedding") and hasattr(module, "embed_scale")


def _replicated_embedding(model: nn.Module, axis: ParallelAxis) -> Tensor | None:
    """Return the weight of the input embedding, if it cannot be sharded."""
    module: Any = getattr(model, "get_input_embeddings", lambda: None)()
    if type(module) is nn.Embedding or _is_scaled(module):
        return module.weight if module.num_embeddings % axis.world_size else None
    return getattr(module, "weight", None)


def _embedding(module: Any, axis: ParallelAxis, made: dict[int, nn.Parameter]) -> VocabParallelEmbedding:
    cls = _ScaledEmbedding if _is_scaled(module) else VocabParallelEmbedding
    layer = cls(module.num_embeddings, module.embedding_dim, axis=axis, **_options(module))
    if isinstance(layer, _ScaledEmbedding):
        layer.register_buffer("embed_scale", module.embed_scale, persistent=False)
    layer.weight = _kept(layer.weight, module.weight, made)
    return layer


def _kept(new: nn.Parameter, full: Tensor, made: dict[int, nn.Parameter]) -> nn.Parameter:
    """Fill `new` with this rank's slice of a full parameter; return the one that was made of a tied one before."""
    if id(full) in made:
        return made[id(full)]
    keep_slice(new, full)
    made[id(full)] = new
    return new
