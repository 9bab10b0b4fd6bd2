"""How the layers of foreign packages lie on the mesh: one file for each package, imported when its classes are met.

| classes of | described by |
|---|---|
| `megatron.core` | `meshpeft.engines.megatron_core` |
| `transformer_engine` | `meshpeft.engines.transformer_engine`, `meshpeft.engines.te_layers` |
| `modelopt.torch.quantization` | `meshpeft.engines.modelopt`, imported right after it |
| `transformers.pytorch_utils` | `meshpeft.engines.transformers_conv1d` |
| `torch.nn`, divided by `transformers` | `meshpeft.engines.transformers_tp`, imported right after what divides |

Importing this package imports none of them.
"""

from __future__ import annotations

from meshpeft.engines.after_import import import_after
from meshpeft.parallel import register_engine

__all__ = ["register_engines"]


def register_engines() -> None:
    """Let the classes of every engine's package be described by the engine, once they are met."""
    register_engine("megatron.core", "meshpeft.engines.megatron_core")
    register_engine("transformer_engine", "meshpeft.engines.transformer_engine")
    register_engine("modelopt.torch.quantization", "meshpeft.engines.modelopt")
    # It quantises layers only if it knew their classes before.
    import_after("modelopt.torch.quantization", "meshpeft.engines.modelopt")
    register_engine("transformers.pytorch_utils", "meshpeft.engines.transformers_conv1d")
    # The layers keep the class that PyTorch gave them.
    import_after("transformers.distributed.tensor_parallel", "meshpeft.engines.transformers_tp")
