"""The one table between our module names and those of Hugging Face checkpoints.

Our names are Megatron's; fused modules have parts: `linear_qkv` is `q`, `k`, `v`, `linear_fc1` is `gate`, `up`.
Loading, saving, and the import and export of adapters all read this table.
"""

from __future__ import annotations

import re

from meshpeft.models.errors import ModelError
from meshpeft.parallel.tensor_layout import TensorLayout

__all__ = ["hf_module_name", "hf_tensor_names", "our_module_name"]

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
}
_GLOBAL_INVERSE = {hf: ours for ours, hf in _GLOBAL.items()}
_PER_LAYER_INVERSE = {hf: ours for ours, hf in _PER_LAYER.items()}
_OUR_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_HF_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def hf_module_name(module: str, part: str | None = None) -> str:
    """`decoder.layers.3.self_attention.linear_qkv`, `q` -> `model.layers.3.self_attn.q_proj`.

    Args:
        module: full name of a module of the decoder.
        part: which of a fused module's parts; `None` for a module that is not fused.

    Raises:
        ModelError: the decoder has no such module, or it has no such part.
    """
    layer = _OUR_LAYER.fullmatch(module)
    found = _GLOBAL.get((module, part)) if layer is None else _PER_LAYER.get((layer[2], part))
    if found is None:
        whole = module if part is None else f"{module} ({part})"
        raise ModelError(f"{whole} has no name in Hugging Face checkpoints")
    return found if layer is None else f"model.layers.{layer[1]}.{found}"


def our_module_name(hf_module: str) -> tuple[str, str | None]:
    """`model.layers.3.self_attn.q_proj` -> (`decoder.layers.3.self_attention.linear_qkv`, `q`).

    Raises:
        ModelError: the decoder has no such module.
    """
    layer = _HF_LAYER.fullmatch(hf_module)
    found = _GLOBAL_INVERSE.get(hf_module) if layer is None else _PER_LAYER_INVERSE.get(layer[2])
    if found is None:
        raise ModelError(f"the decoder has no module for {hf_module!r}")
    return found if layer is None else (f"decoder.layers.{layer[1]}.{found[0]}", found[1])


def hf_tensor_names(parameter: str, layout: TensorLayout) -> list[str]:
    """Names of the tensors that a parameter is stored as, one for each of `layout.pieces()`.

    Raises:
        ModelError: the parameter has no name there (an adapter's, for instance).
    """
    module, _, attribute = parameter.rpartition(".")
    return [f"{hf_module_name(module, piece.part)}.{attribute}" for piece in layout.pieces()]
