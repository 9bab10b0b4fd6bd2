"""The decoder, built from parallel layers; models of transformers in its place; their Hugging Face checkpoints."""

import importlib
from typing import Any

from meshpeft.models.attention import KVCache
from meshpeft.models.config import DecoderConfig, MoEConfig, RopeConfig, check_divisible
from meshpeft.models.decoder import Decoder
from meshpeft.models.errors import ModelError, UnsupportedModelError
from meshpeft.models.generate import generate
from meshpeft.models.hf_names import hf_module_name, hf_tensor_names, our_module_name
from meshpeft.models.language_model import LanguageModel
from meshpeft.models.load import load_pretrained, stored_dtype
from meshpeft.models.moe import MoELayer, Routing, TopKRouter
from meshpeft.models.save import save_pretrained

__all__ = [
    "Decoder",
    "DecoderConfig",
    "KVCache",
    "LanguageModel",
    "MoEConfig",
    "MoELayer",
    "ModelError",
    "RopeConfig",
    "Routing",
    "TopKRouter",
    "TransformersModel",
    "UnsupportedModelError",
    "check_divisible",
    "generate",
    "hf_module_name",
    "hf_tensor_names",
    "load_pretrained",
    "load_transformers",
    "make_transformers_model",
    "our_module_name",
    "save_pretrained",
    "stored_dtype",
    "transformers_config",
]

# Importing transformers' models takes seconds.
_LAZY = {
    "TransformersModel": "transformers_model",
    "load_transformers": "transformers_load",
    "make_transformers_model": "transformers_model",
    "transformers_config": "transformers_load",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"meshpeft.models.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
