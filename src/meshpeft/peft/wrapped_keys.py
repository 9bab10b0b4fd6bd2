"""A wrapped layer's state-dict keys are those of the layer: wrapping must not rename the base model."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["hide_wrapping", "inside_wrapper", "restore_wrapping"]


def hide_wrapping(module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Name the base's tensors as if it were not wrapped, in the order in which they are; a state-dict hook."""
    inner = f"{prefix}to_wrap."
    for key in [key for key in state_dict if key.startswith(prefix)]:
        # Every key is taken out and put back, so that the order is kept.
        state_dict[prefix + key.removeprefix(inner) if key.startswith(inner) else key] = state_dict.pop(key)


def restore_wrapping(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_args: Any) -> None:
    """The opposite, before a state dict is loaded."""
    kept = (f"{prefix}to_wrap.", f"{prefix}adapter.")
    for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(kept)]:
        state_dict[f"{prefix}to_wrap.{key.removeprefix(prefix)}"] = state_dict.pop(key)


def inside_wrapper(base: nn.Module) -> dict[str, str]:
    """Key of the base -> the attribute of the wrapper under which it is, as `_fqn_modifiers` has to say it.

    `torch.distributed.checkpoint.state_dict` asks for that when it follows state-dict keys through a model.
    """
    return dict.fromkeys([*base._parameters, *base._buffers, *base._modules], "to_wrap")
