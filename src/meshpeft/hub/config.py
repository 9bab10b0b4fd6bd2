"""Reading and writing the `config.json` of Hugging Face model families.

Defaults, old spellings (`rope_theta`, `rope_scaling`) and types are left to transformers' own configuration
classes. What they do not do is object: they accept any field and ignore what the model does not use. Here every
field of the file is implemented, known to change no number, at a neutral value, or an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, cast

from transformers import CONFIG_MAPPING, PretrainedConfig

from meshpeft.hub.families import FAMILIES, Family
from meshpeft.hub.limits import check_fields
from meshpeft.models.config import DecoderConfig, RopeConfig
from meshpeft.models.errors import ModelError, UnsupportedModelError
from meshpeft.parallel.errors import blamed_on, shown

__all__ = ["hf_config_of", "options_of"]


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
# Fields that change no logit and say nothing about the model.
_IRRELEVANT = _names(
    """
    architectures attn_implementation bad_words_ids begin_suppress_tokens decoder_start_token_id
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id id2label is_decoder label2id length_penalty
    max_length min_length model_type name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_scores prefix problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p use_bfloat16 _name_or_path _attn_implementation
    _attn_implementation_autoset _commit_hash
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
    """What `DecoderConfig` is made with; see [`DecoderConfig.from_hf`][meshpeft.models.DecoderConfig.from_hf]."""
    fields = dict(source.to_dict() if isinstance(source, PretrainedConfig) else source)
    check_fields(fields)
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
    """The configuration of a decoder's family, which may lack what it has no field for."""
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
