"""Adapters: matching modules, wrapping them, the adapter modules, the fused functions."""

import importlib
from typing import TYPE_CHECKING, Any

from meshpeft.engines import register_engines
from meshpeft.parallel import all2all_hp2sp
from meshpeft.peft.adapter import (
    AdapterAttributes,
    LinearAdapter,
    LowRankAdapter,
    LowRankFactor,
    get_adapter_attributes_from_linear,
    init_method_const,
    init_method_kaiming_uniform,
    init_method_normal,
    normalize_dtype,
    pad_seq_to_mult,
    unpad_seq_to_mult,
)
from meshpeft.peft.canonical import CanonicalLoRA, LoRALinearSplitFC1UpGate, LoRALinearSplitQKV, ModuleDict
from meshpeft.peft.config import PEFTAttributeConfig, PEFTConfig
from meshpeft.peft.dora import DoRA, DoRALinear, GroupedExpertDoRAAdapter, ParallelLinearDoRAAdapter
from meshpeft.peft.errors import AdapterError
from meshpeft.peft.experts import GroupedExpertLinearAdapter
from meshpeft.peft.fused import Term, fused_dora, fused_dora_reference, fused_lora, fused_lora_reference
from meshpeft.peft.lora import LoRA, LoRALinear, LoRATopKRouter
from meshpeft.peft.matching import (
    ModuleMatcher,
    adapted_layers,
    adapter_wrappers,
    chunks_of,
    is_expert_linear,
    walk,
    wildcard_match,
)
from meshpeft.peft.method import PEFT, LowRankPEFT
from meshpeft.peft.named import NamedLoRALinear, disable_adapters, enable_adapters, is_peft_model
from meshpeft.peft.parameters import (
    ParameterCount,
    lora_plus_parameter_groups,
    print_trainable_parameters,
    trainable_parameters,
)
from meshpeft.peft.standalone import ParallelLinearAdapter
from meshpeft.peft.wrapper import AdapterTerm, AdapterWrapper, BaseOutput, base_of

__all__ = [
    "AdapterAttributes",
    "AdapterError",
    "AdapterTerm",
    "AdapterWrapper",
    "BaseOutput",
    "CanonicalLoRA",
    "DoRA",
    "DoRALinear",
    "GroupedExpertDoRAAdapter",
    "GroupedExpertLinearAdapter",
    "HAVE_TE",
    "LinearAdapter",
    "LoRA",
    "LoRALinear",
    "LoRALinearSplitFC1UpGate",
    "LoRALinearSplitQKV",
    "LoRATopKRouter",
    "LowRankAdapter",
    "LowRankFactor",
    "LowRankPEFT",
    "ModuleDict",
    "ModuleMatcher",
    "NamedLoRALinear",
    "PEFT",
    "PEFTAttributeConfig",
    "PEFTConfig",
    "ParallelLinearAdapter",
    "ParallelLinearDoRAAdapter",
    "ParameterCount",
    "TECL",
    "TERL",
    "Term",
    "adapted_layers",
    "adapter_wrappers",
    "all2all_hp2sp",
    "base_of",
    "chunks_of",
    "disable_adapters",
    "enable_adapters",
    "fused_dora",
    "fused_dora_reference",
    "fused_lora",
    "fused_lora_reference",
    "get_adapter_attributes_from_linear",
    "init_method_const",
    "init_method_kaiming_uniform",
    "init_method_normal",
    "is_expert_linear",
    "is_peft_model",
    "lora_plus_parameter_groups",
    "normalize_dtype",
    "pad_seq_to_mult",
    "print_trainable_parameters",
    "trainable_parameters",
    "unpad_seq_to_mult",
    "update_model",
    "walk",
    "wildcard_match",
]

register_engines()

if TYPE_CHECKING:
    from meshpeft.engines.transformer_engine import HAVE_TE, TECL, TERL
    from meshpeft.quantization.update import update_model

# Names of other packages, which import this one or are optional: looked up when they are asked for.
_ELSEWHERE = dict.fromkeys(("HAVE_TE", "TECL", "TERL"), "meshpeft.engines.transformer_engine")
_ELSEWHERE["update_model"] = "meshpeft.quantization.update"


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ELSEWHERE[name]), name)
