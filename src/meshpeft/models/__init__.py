"""The decoder, built from parallel layers, and its Hugging Face checkpoints."""

from meshpeft.models.cache import KVCache
from meshpeft.models.config import DecoderConfig, MoEConfig, RopeConfig, check_divisible
from meshpeft.models.decoder import Decoder
from meshpeft.models.errors import ModelError
from meshpeft.models.generate import generate
from meshpeft.models.hf_names import hf_module_name, hf_tensor_names, our_module_name
from meshpeft.models.language_model import LanguageModel
from meshpeft.models.load import load_pretrained, stored_dtype
from meshpeft.models.moe import MoELayer
from meshpeft.models.router import Routing, TopKRouter
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
    "check_divisible",
    "generate",
    "hf_module_name",
    "hf_tensor_names",
    "load_pretrained",
    "our_module_name",
    "save_pretrained",
    "stored_dtype",
]
