"""What wrappers call the module they hold, which is in the wrapper's place and has the wrapper's name.

Names in checkpoints, exported adapters and patterns are those of the model without wrappers: compiled or not, in a
data-parallel wrapper or not, it reads what it wrote.
"""

from __future__ import annotations

from torch import nn

__all__ = ["COMPILED", "held_module", "is_held"]

COMPILED = "_orig_mod"
"""What `torch.compile` calls the module that it wraps."""

# Compilation, activation checkpointing, sharded data parallel.
_HELD = frozenset({COMPILED, "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def is_held(attribute: str, full_name: str) -> bool:
    """Whether a child is what a wrapper holds.

    Args:
        attribute: what its parent calls it. Data parallel and mixed precision say `module`, which is such a name only
            at the root.
        full_name: its parent's; empty for the model.
    """
    return attribute in _HELD or (attribute == "module" and not full_name)


def held_module(model: nn.Module) -> nn.Module:
    """The model without the wrappers around it."""
    for attribute, child in model.named_children():
        if is_held(attribute, ""):
            return held_module(child)
    return model
