"""The one table between our module names and those of Hugging Face checkpoints.

Our names are Megatron's; fused modules have parts: `linear_qkv` is `q`, `k`, `v`, `linear_fc1` is `gate`, `up`.
Loading, saving, and the import and export of adapters all read this table.

Experts have two names there. The models of transformers stack them: `mlp.experts.gate_up_proj` and
`mlp.experts.down_proj` are parameters, gate and up one after the other. Checkpoints on the hub, which transformers
reads and writes too, have every expert by itself: `mlp.experts.7.gate_proj.weight`; Mixtral's call the layer, and the
projections, by names of their own.
"""

from __future__ import annotations

import re
from itertools import accumulate
from typing import NamedTuple

from meshpeft.models.decoder import Decoder
from meshpeft.models.errors import ModelError
from meshpeft.models.language_model import LanguageModel
from meshpeft.parallel.tensor_layout import TensorLayout

__all__ = [
    "OurModule",
    "StoredPart",
    "hf_module_name",
    "hf_tensor_names",
    "our_module_name",
    "packed_form",
    "stored_forms",
]

_GLOBAL: dict[tuple[str, str | None], str] = {
    ("embedding", None): "model.embed_tokens",
    ("decoder.final_layernorm", None): "model.norm",
    ("output_layer", None): "lm_head",
}
_PER_LAYER: dict[tuple[str, str | None], str] = {
    ("input_layernorm", None): "input_layernorm",
    ("self_attention.linear_qkv", "q"): "self_attn.q_proj",
    ("self_attention.linear_qkv", "k"): "self_attn.k_proj",
    ("self_attention.linear_qkv", "v"): "self_attn.v_proj",
    ("self_attention.q_layernorm", None): "self_attn.q_norm",
    ("self_attention.k_layernorm", None): "self_attn.k_norm",
    ("self_attention.linear_proj", None): "self_attn.o_proj",
    ("pre_mlp_layernorm", None): "post_attention_layernorm",
    ("mlp.linear_fc1", "gate"): "mlp.gate_proj",
    ("mlp.linear_fc1", "up"): "mlp.up_proj",
    ("mlp.linear_fc2", None): "mlp.down_proj",
    ("mlp.router", None): "mlp.gate",
    ("mlp.experts.linear_fc1", None): "mlp.experts.gate_up_proj",
    ("mlp.experts.linear_fc2", None): "mlp.experts.down_proj",
    ("mlp.shared_experts.linear_fc1", "gate"): "mlp.shared_expert.gate_proj",
    ("mlp.shared_experts.linear_fc1", "up"): "mlp.shared_expert.up_proj",
    ("mlp.shared_experts.linear_fc2", None): "mlp.shared_expert.down_proj",
    ("mlp.shared_experts.gate", None): "mlp.shared_expert_gate",
}
_EXPERTS = "mlp.experts"
_PER_EXPERT: dict[tuple[str, str | None], str] = {
    ("linear_fc1", "gate"): "gate_proj",
    ("linear_fc1", "up"): "up_proj",
    ("linear_fc2", None): "down_proj",
}
# What the checkpoints of a family call otherwise than the modules of transformers.
_OTHERWISE = {"mixtral": {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "mlp": "block_sparse_moe"}}
_ALIASES = {alias: name for names in _OTHERWISE.values() for name, alias in names.items()}

_GLOBAL_INVERSE = {hf: ours for ours, hf in _GLOBAL.items()}
_PER_LAYER_INVERSE = {hf: ours for ours, hf in _PER_LAYER.items()}
_PER_EXPERT_INVERSE = {hf: ours for ours, hf in _PER_EXPERT.items()}
_OUR_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_HF_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_HF_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(\w+)")


class OurModule(NamedTuple):
    """Which of our modules a Hugging Face name is of.

    Attributes:
        module: its full name.
        part: which part of a fused module; `None` where ours is not fused, or the name is of all parts.
        expert: which expert, over all ranks; `None` if it is not one expert's.
    """

    module: str
    part: str | None
    expert: int | None = None


def hf_module_name(
    module: str, part: str | None = None, *, expert: int | None = None, model_type: str | None = None
) -> str:
    """`decoder.layers.3.self_attention.linear_qkv`, `q` -> `model.layers.3.self_attn.q_proj`.

    Args:
        module: full name of a module of the decoder.
        part: which of a fused module's parts; `None` for a module that is not fused, and for the stacked experts:
            `decoder.layers.3.mlp.experts.linear_fc1` -> `model.layers.3.mlp.experts.gate_up_proj`, the parameter of
            transformers' model.
        expert: its number over all ranks: `decoder.layers.3.mlp.experts.linear_fc1`, `gate`, 5 ->
            `model.layers.3.mlp.experts.5.gate_proj`.
        model_type: name it as the family's checkpoints on the hub do (`mixtral`: `block_sparse_moe.experts.5.w1`);
            by default as transformers' modules.

    Raises:
        ModelError: the decoder has no such module, or it has no such part.
    """
    layer = _OUR_LAYER.fullmatch(module)
    if layer is None:
        found = _GLOBAL.get((module, part)) if expert is None else None
    elif expert is None:
        found = _PER_LAYER.get((layer[2], part))
    else:
        found = _expert_name(layer[2], part, expert)
    if found is None:
        whole = module if part is None else f"{module} ({part})"
        whole = whole if expert is None else f"expert {expert} of {whole}"
        raise ModelError(f"{whole} has no name in Hugging Face checkpoints")
    if layer is None:
        return found
    return f"model.layers.{layer[1]}.{_as_in_checkpoints(found, model_type)}"


def _expert_name(module: str, part: str | None, expert: int) -> str | None:
    experts, _, linear = module.rpartition(".")
    found = _PER_EXPERT.get((linear, part)) if experts == _EXPERTS else None
    return None if found is None else f"{_EXPERTS}.{expert}.{found}"


def _as_in_checkpoints(name: str, model_type: str | None) -> str:
    other = _OTHERWISE.get(model_type or "", {})
    return ".".join(other.get(component, component) for component in name.split("."))


def our_module_name(hf_module: str) -> OurModule:
    """`model.layers.3.self_attn.q_proj` -> (`decoder.layers.3.self_attention.linear_qkv`, `q`, None).

    Takes both names of experts, and those of every family's checkpoints.

    Raises:
        ModelError: the decoder has no such module.
    """
    layer = _HF_LAYER.fullmatch(hf_module)
    if layer is None:
        found, expert = _GLOBAL_INVERSE.get(hf_module), None
    else:
        name = ".".join(_ALIASES.get(component, component) for component in layer[2].split("."))
        one = _HF_EXPERT.fullmatch(name)
        if one is None:
            found, expert = _PER_LAYER_INVERSE.get(name), None
        else:
            linear, part = _PER_EXPERT_INVERSE.get(one[2], (None, None))
            found, expert = None if linear is None else (f"{_EXPERTS}.{linear}", part), int(one[1])
    if found is None:
        raise ModelError(f"the decoder has no module for {hf_module!r}")
    return OurModule(found[0] if layer is None else f"decoder.layers.{layer[1]}.{found[0]}", found[1], expert)


class StoredPart(NamedTuple):
    """The tensors of a file that hold one of the pieces of a parameter.

    See [`TensorLayout.pieces`][meshpeft.parallel.TensorLayout.pieces].

    Attributes:
        names: of one tensor; or of one for each expert, without the expert dim.
        per_expert: whether it is one for each expert.
        shape: global, of each of these tensors.
        start: where the piece begins in it, along the packed dim.
        blocks: in how many runs it lies there: equally long, equally far from one to the next.
    """

    names: tuple[str, ...]
    per_expert: bool
    shape: tuple[int, ...]
    start: int = 0
    blocks: int = 1


def stored_forms(model: LanguageModel, parameter: str, layout: TensorLayout) -> list[list[StoredPart]]:
    """List the forms in which files may hold a parameter or persistent buffer of a model; the first is written.

    In each form there is a part for each of `layout.pieces()`. The form that is written is that of the hub.

    Raises:
        ModelError: the parameter has no name there (an adapter's, for instance).
    """
    if isinstance(model, Decoder):
        return _forms_of_family(parameter, layout, model.config.model_type)
    return [packed_form(model.stored_names.get(parameter, parameter), layout)]


def _forms_of_family(parameter: str, layout: TensorLayout, model_type: str) -> list[list[StoredPart]]:
    module, _, attribute = parameter.rpartition(".")
    # Some files use the names of the modules of transformers where the family has others.
    families = [model_type, None] if model_type in _OTHERWISE else [None]
    if f".{_EXPERTS}." in module:
        return [
            *(_each_expert(module, attribute, layout, family) for family in families),
            packed_form(hf_module_name(module), layout),
        ]

    def name(part: str | None, family: str | None) -> str:
        return f"{hf_module_name(module, part, model_type=family)}.{attribute}"

    return [
        [StoredPart((name(piece.part, family),), False, piece.global_shape) for piece in layout.pieces()]
        for family in families
    ]


def _each_expert(module: str, attribute: str, layout: TensorLayout, family: str | None) -> list[StoredPart]:
    stored = []
    for piece in layout.pieces():
        names = tuple(
            f"{hf_module_name(module, piece.part, expert=expert, model_type=family)}.{attribute}"
            for expert in range(layout.global_shape[0])
        )
        stored.append(StoredPart(names, True, piece.global_shape[1:]))
    return stored


def packed_form(name: str, layout: TensorLayout) -> list[StoredPart]:
    """A parameter as one tensor, whose parts are packed as one rank would hold them."""
    fused_parts = layout.fused_parts
    if fused_parts is None:
        return [StoredPart((name,), False, layout.global_shape)]
    starts = accumulate(fused_parts.chunks(1), initial=0)
    return [
        StoredPart((name,), False, layout.global_shape, start, fused_parts.local_blocks(1))
        for start, _ in zip(starts, fused_parts.names, strict=False)
    ]


def hf_tensor_names(parameter: str, layout: TensorLayout, model_type: str = "") -> list[str]:
    """Names of the tensors that a parameter is written as: piece by piece, and for each expert if it is of experts.

    Args:
        parameter: its full name.
        layout: of the parameter.
        model_type: of the configuration.

    Raises:
        ModelError: the parameter has no name there (an adapter's, for instance).
    """
    return [name for part in _forms_of_family(parameter, layout, model_type)[0] for name in part.names]
