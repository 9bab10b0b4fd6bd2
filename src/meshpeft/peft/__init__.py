"""Adapters: matching modules, wrapping them, the adapter modules, the fused functions. Knows only `parallel`."""

from meshpeft.parallel import all2all_hp2sp
from meshpeft.peft.adapters import LinearAdapter, LowRankAdapter, LowRankFactor
from meshpeft.peft.base import PEFT, adapter_wrappers
from meshpeft.peft.canonical_lora import CanonicalLoRA, LoRALinearSplitFC1UpGate, LoRALinearSplitQKV, ModuleDict
from meshpeft.peft.counting import ParameterCount, print_trainable_parameters, trainable_parameters
from meshpeft.peft.errors import AdapterError
from meshpeft.peft.functional import fused_lora, fused_lora_reference
from meshpeft.peft.initialization import init_method_const, init_method_kaiming_uniform, init_method_normal
from meshpeft.peft.lora import LoRA, LoRALinear
from meshpeft.peft.low_rank import LowRankPEFT
from meshpeft.peft.matching import ModuleMatcher, is_expert_linear, wildcard_match
from meshpeft.peft.wrapper import AdapterWrapper, BaseOutput

__all__ = [
    "AdapterError",
    "AdapterWrapper",
    "BaseOutput",
    "CanonicalLoRA",
    "LinearAdapter",
    "LoRA",
    "LoRALinear",
    "LoRALinearSplitFC1UpGate",
    "LoRALinearSplitQKV",
    "LowRankAdapter",
    "LowRankFactor",
    "LowRankPEFT",
    "ModuleDict",
    "ModuleMatcher",
    "PEFT",
    "ParameterCount",
    "adapter_wrappers",
    "all2all_hp2sp",
    "fused_lora",
    "fused_lora_reference",
    "init_method_const",
    "init_method_kaiming_uniform",
    "init_method_normal",
    "is_expert_linear",
    "print_trainable_parameters",
    "trainable_parameters",
    "wildcard_match",
]
