"""`config.json` of the Hugging Face model families, and the `DecoderConfig` that it describes.

Defaults, old spellings (`rope_theta`, `rope_scaling`) and types are left to transformers' own configuration classes.
These accept any field and ignore what the model does not use. Here every field of the file is implemented, known to
change no number, at a neutral value, or an error. What the families differ in is one entry each in `FAMILIES`.

Sizes that no model has are refused before a number from a fetched file decides over memory and time: transformers'
configuration classes make a list of their layers, and models make modules and tables, before any weight is looked at.
What the files hold is compared with the configuration as soon as they are open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import CONFIG_MAPPING, PretrainedConfig

from meshpeft.hub.coded_files import coding_of
from meshpeft.models import DecoderConfig, ModelError, MoEConfig, RopeConfig, UnsupportedModelError
from meshpeft.parallel.errors import blamed_on, shown

__all__ = [
    "FAMILIES",
    "MOST_EXPERTS",
    "MOST_LAYERS",
    "Family",
    "check_fields",
    "few_modules",
    "hf_config_of",
    "options_of",
]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Fields that change no logit, kept so that a directory is written back as it was read.
_KEPT = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "max_position_embeddings",
    "max_window_layers",
    "output_router_logits",
    "router_aux_loss_coef",
    "use_cache",
    "pretraining_tp",
    "dtype",
)
# Fields that change no logit and describe nothing of the model.
_IRRELEVANT = _names(
    """
    architectures attn_implementation bad_words_ids begin_suppress_tokens decoder_start_token_id
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id id2label is_decoder is_llama_config label2id length_penalty
    max_length min_length model_type name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_scores prefix problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype
    torchscript transformers.js_config transformers_version typical_p unk_token_id use_bfloat16
    _attn_implementation _attn_implementation_autoset _commit_hash _model_name_or_path _name_or_path
    _pre_quantization_dtype
    """
)
_COMMON = _names(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    head_dim hidden_act initializer_range rms_norm_eps tie_word_embeddings rope_parameters rope_theta
    rope_scaling original_max_position_embeddings attention_dropout
    """
)
_ROPE_FIELDS = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}


def options_of(source: Mapping[str, Any] | PretrainedConfig) -> dict[str, Any]:
    """Read the arguments of `DecoderConfig` from a `config.json`.

    See `DecoderConfig.from_hf`.
    """
    fields = dict(source.to_dict() if isinstance(source, PretrainedConfig) else source)
    check_fields(fields)
    coding_of(fields.pop("quantization_config", None))
    model_type = fields.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UnsupportedModelError(
            f"model_type {shown(model_type)} is not implemented; implemented: {', '.join(FAMILIES)}"
        )
    architectures = fields.get("architectures") or ()
    if not isinstance(architectures, list | tuple):
        raise ModelError(f"architectures={shown(architectures)}: expected a list of names")
    for architecture in architectures:
        if architecture != family.architecture:
            raise UnsupportedModelError(
                f"architecture {shown(architecture)} is not implemented; expected {family.architecture!r}"
            )
    for name, value in fields.items():
        _refuse_unknown(name, value, family, str(model_type))
    hf = _transformers_config(str(model_type), fields)
    if hf.hidden_act != "silu":
        raise UnsupportedModelError(f"hidden_act {shown(hf.hidden_act)} is not implemented; implemented: 'silu'")
    if hf.attention_dropout:
        raise UnsupportedModelError(f"attention_dropout={shown(hf.attention_dropout)} is not implemented; set it to 0")
    with blamed_on(f"invalid configuration of a {model_type} model", ModelError):
        return _options(hf, str(model_type), family)


def _options(hf: Any, model_type: str, family: Family) -> dict[str, Any]:
    return {
        "vocab_size": hf.vocab_size,
        "hidden_size": hf.hidden_size,
        "intermediate_size": hf.intermediate_size,
        "num_layers": hf.num_hidden_layers,
        "num_attention_heads": hf.num_attention_heads,
        "num_query_groups": hf.num_key_value_heads,
        "head_dim": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        "model_type": model_type,
        "rope": _rope(hf.rope_parameters),
        "rms_norm_eps": hf.rms_norm_eps,
        "tie_word_embeddings": bool(hf.tie_word_embeddings),
        "initializer_range": hf.initializer_range,
        "other": {name: getattr(hf, name) for name in _KEPT if hasattr(hf, name)},
        **family.read(hf),
    }


def hf_config_of(config: DecoderConfig) -> PretrainedConfig:
    """Make the transformers configuration of a decoder's family, which may lack what it has no field for."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"model_type {config.model_type!r} is not implemented; implemented: {', '.join(FAMILIES)}"
        )
    rope = {"rope_theta": config.rope.theta, "rope_type": config.rope.kind}
    rope |= {name: getattr(config.rope, name) for name in sorted(_ROPE_FIELDS[config.rope.kind])}
    fields: dict[str, Any] = {
        "architectures": [family.architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "hidden_act": "silu",
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_parameters": rope,
        **family.write(config),
        **config.other,
    }
    if family.states_head_dim or config.head_dim * config.num_attention_heads != config.hidden_size:
        fields["head_dim"] = config.head_dim
    written: PretrainedConfig = _transformers_config(config.model_type, fields)
    return written


def _refuse_unknown(name: str, value: Any, family: Family, model_type: str) -> None:
    known = name in _COMMON or name in family.fields or name in _KEPT or name in _IRRELEVANT
    if known or name.startswith("unsloth_"):
        return
    # None, False, 0 and empty lists switch a feature off.
    if not value:
        return
    raise UnsupportedModelError(
        f"config field {name}={shown(value)} is not implemented for model_type {model_type!r} and may change numbers; "
        f"remove it if it does not"
    )


def _transformers_config(model_type: str, fields: Mapping[str, Any]) -> Any:
    with blamed_on(f"invalid configuration of a {model_type} model", ModelError):
        # A copy: the class completes the rope dictionary in place.
        return CONFIG_MAPPING[model_type](**deepcopy({k: v for k, v in fields.items() if k != "model_type"}))


def _rope(parameters: Mapping[str, Any]) -> RopeConfig:
    kind = parameters.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in _ROPE_FIELDS:
        raise UnsupportedModelError(
            f"rope type {shown(kind)} is not implemented; implemented: {', '.join(_ROPE_FIELDS)}"
        )
    partial = parameters.get("partial_rotary_factor")
    if partial not in (None, 1, 1.0):
        raise UnsupportedModelError(f"partial_rotary_factor={shown(partial)} is not implemented; use 1.0")
    for name, value in parameters.items():
        known = name in ("rope_type", "type", "rope_theta", "partial_rotary_factor") or name in _ROPE_FIELDS[kind]
        if not known and value is not None:
            raise UnsupportedModelError(f"rope field {name}={shown(value)} is not implemented for rope type {kind!r}")
    values: dict[str, Any] = {name: parameters.get(name) for name in ("rope_theta", *_ROPE_FIELDS[kind])}
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ModelError(f"rope field {name}={shown(value)} of rope type {kind!r}: expected a number")
    return RopeConfig(theta=values.pop("rope_theta"), kind=cast(Any, kind), **values)


@dataclass(frozen=True)
class Family:
    """What one family's configuration class has that others do not have, or have otherwise.

    Attributes:
        architecture: Class name in the checkpoints of its language models.
        fields: Fields that are implemented beyond `_COMMON`.
        read: Gives the family's own arguments of `DecoderConfig`, from a transformers configuration.
        write: The inverse; gives the family's own fields.
        states_head_dim: The class always gives `head_dim`; elsewhere it is written only where it does not follow from
            other sizes.
    """

    architecture: str
    fields: frozenset[str]
    read: Callable[[Any], dict[str, Any]]
    write: Callable[[DecoderConfig], dict[str, Any]]
    states_head_dim: bool = True


def _read_llama(hf: Any) -> dict[str, Any]:
    biased = bool(hf.attention_bias)
    return {"qkv_bias": biased, "projection_bias": biased, "mlp_bias": bool(hf.mlp_bias)}


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


def _read_mistral(hf: Any) -> dict[str, Any]:
    return {"sliding_windows": _windows([hf.sliding_window] * hf.num_hidden_layers)}


def _write_mistral(config: DecoderConfig) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window(0)}


def _read_qwen2(hf: Any) -> dict[str, Any]:
    kinds = {"full_attention": None, "sliding_attention": hf.sliding_window}
    for kind in hf.layer_types:
        if kind not in kinds:
            raise UnsupportedModelError(f"layer_types: {kind!r} is not implemented; implemented: {', '.join(kinds)}")
    if hf.sliding_window is None and "sliding_attention" in hf.layer_types:
        raise ModelError("layer_types names sliding_attention, but sliding_window or use_sliding_window is not set")
    return {"qkv_bias": True, "sliding_windows": _windows([kinds[kind] for kind in hf.layer_types])}


def _write_qwen2(config: DecoderConfig) -> dict[str, Any]:
    windows = config.sliding_windows or (None,) * config.num_layers
    window = next((window for window in windows if window is not None), None)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }


def _read_qwen3(hf: Any) -> dict[str, Any]:
    biased = bool(hf.attention_bias)
    return {**_read_qwen2(hf), "qkv_bias": biased, "projection_bias": biased, "qk_norm": True}


def _write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    return {**_write_qwen2(config), "attention_bias": config.qkv_bias}


def _windows(windows: list[int | None]) -> tuple[int | None, ...] | None:
    return tuple(windows) if any(window is not None for window in windows) else None


def _read_mixtral(hf: Any) -> dict[str, Any]:
    moe = MoEConfig(hf.num_local_experts, hf.num_experts_per_tok, hf.intermediate_size)
    return {**_read_mistral(hf), "moe": moe}


def _write_mixtral(config: DecoderConfig) -> dict[str, Any]:
    moe = _experts_of(config)
    return {
        **_write_mistral(config),
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.moe_router_topk,
    }


def _read_qwen_moe(hf: Any, shared_intermediate_size: int | None = None) -> MoEConfig:
    return MoEConfig(
        hf.num_experts,
        hf.num_experts_per_tok,
        hf.moe_intermediate_size,
        normalize_weights=bool(hf.norm_topk_prob),
        shared_intermediate_size=shared_intermediate_size,
        sparse_step=hf.decoder_sparse_step,
        dense_layers=tuple(hf.mlp_only_layers),
    )


def _write_qwen_moe(config: DecoderConfig) -> dict[str, Any]:
    moe = _experts_of(config)
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.moe_router_topk,
        "moe_intermediate_size": moe.intermediate_size,
        "norm_topk_prob": moe.normalize_weights,
        "decoder_sparse_step": moe.sparse_step,
        "mlp_only_layers": list(moe.dense_layers),
    }


def _read_qwen2_moe(hf: Any) -> dict[str, Any]:
    moe = _read_qwen_moe(hf, hf.shared_expert_intermediate_size)
    return {**_read_qwen2(hf), "qkv_bias": bool(hf.qkv_bias), "moe": moe}


def _write_qwen2_moe(config: DecoderConfig) -> dict[str, Any]:
    return {
        **_write_qwen2(config),
        **_write_qwen_moe(config),
        "qkv_bias": config.qkv_bias,
        "shared_expert_intermediate_size": _experts_of(config).shared_intermediate_size,
    }


def _read_qwen3_moe(hf: Any) -> dict[str, Any]:
    biased = bool(hf.attention_bias)
    return {
        **_read_mistral(hf),
        "qkv_bias": biased,
        "projection_bias": biased,
        "qk_norm": True,
        "moe": _read_qwen_moe(hf),
    }


def _write_qwen3_moe(config: DecoderConfig) -> dict[str, Any]:
    window = config.sliding_window(0)
    return {
        **_write_qwen_moe(config),
        "attention_bias": config.qkv_bias,
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }


def _experts_of(config: DecoderConfig) -> MoEConfig:
    if config.moe is None:
        raise ModelError(f"a {config.model_type} model has experts, and this configuration has none")
    return config.moe


_SLIDING = frozenset({"sliding_window", "use_sliding_window", "layer_types"})
_EXPERTS = frozenset({"num_experts", "num_local_experts", "num_experts_per_tok"})
_QWEN_EXPERTS = _EXPERTS | {"moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", frozenset({"attention_bias", "mlp_bias"}), _read_llama, _write_llama),
    "mistral": Family("MistralForCausalLM", frozenset({"sliding_window"}), _read_mistral, _write_mistral),
    "qwen2": Family("Qwen2ForCausalLM", _SLIDING, _read_qwen2, _write_qwen2, states_head_dim=False),
    "qwen3": Family("Qwen3ForCausalLM", _SLIDING | {"attention_bias"}, _read_qwen3, _write_qwen3),
    "mixtral": Family(
        "MixtralForCausalLM", _EXPERTS | {"sliding_window"}, _read_mixtral, _write_mixtral, states_head_dim=False
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        _QWEN_EXPERTS | _SLIDING | {"qkv_bias", "shared_expert_intermediate_size"},
        _read_qwen2_moe,
        _write_qwen2_moe,
        states_head_dim=False,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        _QWEN_EXPERTS | {"sliding_window", "use_sliding_window", "attention_bias"},
        _read_qwen3_moe,
        _write_qwen3_moe,
        states_head_dim=False,
    ),
}


MOST_LAYERS = 1_024
"""The deepest models that were published have 1,000 layers, the deepest in use 126."""
MOST_EXPERTS = 8_192
"""Of a layer; the most in use are 2,048."""
_LARGEST = 2**31 - 1
_DEEPEST = 16
_MODULES_OF_A_TENSOR = 16


def check_fields(fields: Mapping[str, Any], source: object = "the configuration") -> None:
    """Check that no number of a parsed `config.json` is beyond what any model has.

    Args:
        fields: Content, with nested configurations.
        source: The file, for messages.

    Raises:
        ModelError: A number of layers or experts, or another size, is too large or negative; a number is NaN;
            configurations are nested deep.
    """
    for name, value in fields.items():
        _check_value(name, value, source, 1)


def _check_value(name: str, value: Any, source: object, depth: int) -> None:
    if depth > _DEEPEST:
        raise ModelError(f"{source}: {shown(name)} is nested more than {_DEEPEST} deep; no configuration is")
    if isinstance(value, Mapping):
        for inner, part in value.items():
            _check_value(str(inner), part, source, depth + 1)
    elif isinstance(value, list):
        for part in value:
            _check_value(name, part, source, depth + 1)
    elif isinstance(value, float) and math.isnan(value):
        raise ModelError(f"{source}: {shown(name)} is NaN; expected a number")
    elif isinstance(value, int) and abs(value) > _most(name):
        raise ModelError(f"{source}: {name}={shown(value)}: no model has more than {_most(name):,}")


def _most(name: str) -> float:
    """Largest integer in a field of this name; infinity where it is no size."""
    if "theta" in name or name in ("max_length", "model_max_length"):
        return math.inf
    # Sizes per layer are sizes.
    if "layer" in name and "size" not in name:
        return MOST_LAYERS
    return MOST_EXPERTS if "experts" in name else _LARGEST


@contextmanager
def few_modules(tensors: int, source: object) -> Iterator[None]:
    """Stop a model that is being made from a configuration when it has far more modules than its files have tensors.

    Only the model's own code tells which of a configuration's fields are numbers of layers, heads or experts.

    Args:
        tensors: How many the files hold.
        source: The directory, for the message.

    Raises:
        ModelError: There are too many.
    """
    most, made = 2_000 + _MODULES_OF_A_TENSOR * tensors, 0

    def count(*_: nn.Module | str | None) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise ModelError(
                f"{source}: its config.json describes a model of more than {most:,} modules, and its weights are "
                f"{tensors:,} tensors; one of them is of another model"
            )

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
