"""transformers' models as a float64 reference."""

from __future__ import annotations

from transformers import PreTrainedModel

from meshpeft.verify.transformers_layout import Float64ForFloat32, lift_float32


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, cast to float64 with its float32 islands lifted; its forward does that by itself."""
    model.double()
    model.config._experts_implementation = "eager"  # the grouped kernel refuses float64
    with Float64ForFloat32():
        for module in model.modules():
            if hasattr(module, "inv_freq") and hasattr(module, "original_inv_freq"):
                # Rebuilt, not cast: the frequencies themselves were computed in float32.
                rebuilt = type(module)(module.config)
                module.inv_freq = rebuilt.inv_freq
                module.original_inv_freq = rebuilt.original_inv_freq
    lift_float32(model)
    return model
