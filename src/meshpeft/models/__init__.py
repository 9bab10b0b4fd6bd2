"""The decoder, built from parallel layers, and models of transformers in its place.

Reading and writing their Hugging Face directories is `meshpeft.hub`'s; the names are offered here too.
"""

import importlib
from typing import TYPE_CHECKING, Any

from meshpeft.models.attention import KVCache
from meshpeft.models.config import DecoderConfig, ModelError, MoEConfig, RopeConfig, UnsupportedModelError
from meshpeft.models.decoder import Decoder
from meshpeft.models.generate import generate
from meshpeft.models.language_model import LanguageModel
from meshpeft.models.moe import MoELayer, Routing, TopKRouter
from meshpeft.models.sharding import ModelSharding, check_divisible

if TYPE_CHECKING:
    from meshpeft.hub.load import load_pretrained, stored_dtype
    from meshpeft.hub.names import hf_module_name, hf_tensor_names, our_module_name
    from meshpeft.hub.save import save_pretrained
    from meshpeft.hub.transformers_load import load_transformers, transformers_config
    from meshpeft.models.transformers_model import TransformersModel, make_transformers_model

__all__ = [
    "Decoder",
    "DecoderConfig",
    "KVCache",
    "LanguageModel",
    "MoEConfig",
    "MoELayer",
    "ModelError",
    "ModelSharding",
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

_LAZY = {
    # Importing transformers' models takes seconds.
    "TransformersModel": "meshpeft.models.transformers_model",
    "make_transformers_model": "meshpeft.models.transformers_model",
    # Of a package above this one.
    "hf_module_name": "meshpeft.hub.names",
    "hf_tensor_names": "meshpeft.hub.names",
    "load_pretrained": "meshpeft.hub.load",
    "load_transformers": "meshpeft.hub.transformers_load",
    "our_module_name": "meshpeft.hub.names",
    "save_pretrained": "meshpeft.hub.save",
    "stored_dtype": "meshpeft.hub.load",
    "transformers_config": "meshpeft.hub.transformers_load",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
