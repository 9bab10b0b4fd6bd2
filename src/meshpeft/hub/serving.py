"""What serving systems do not make of an adapter's file; docs/checkpoints.md has the whole table, and its sources."""

from __future__ import annotations

from torch import nn

from meshpeft.hub.linears import adapted_linears
from meshpeft.hub.places import AdapterFormat
from meshpeft.parallel.held_modules import held_module
from meshpeft.peft import adapter_wrappers
from meshpeft.peft.matching import decides

__all__ = ["serving_note"]

_DEFAULT_RANK = 16
"""The largest rank that vLLM has room for, unless `--max-lora-rank` says another."""


def serving_note(model: nn.Module, format: AdapterFormat, adapter_name: str | None = None) -> str | None:
    """Say what vLLM and SGLang do not serve of an adapter as it is written, and what to do; `None` for nothing.

    Args:
        model: with the adapter.
        format, adapter_name: see [`export_peft_adapter`][meshpeft.checkpoint.export_peft_adapter].
    """
    model = held_module(model)
    adapted = adapted_linears(model, adapter_name)
    refused = []
    if any(linear.magnitude is not None for linear in adapted):
        refused.append("DoRA")
    if any(decides(wrapper.to_wrap) for _, wrapper in adapter_wrappers(model)):
        refused.append("adapters on routers and gates (vLLM does in some families)")
    notes = []
    if refused:
        notes.append(f"vLLM and SGLang do not serve {', '.join(refused)}; meshpeft merge writes a model that they do")
    elif format == "peft" and any(linear.experts is not None for linear in adapted):
        notes.append(
            "vLLM and SGLang serve adapters of experts in the form peft-per-expert, which meshpeft export --format "
            "peft-per-expert writes of a checkpoint"
        )
    rank = max(linear.shape.rank for linear in adapted)
    if not refused and rank > _DEFAULT_RANK:
        notes.append(f"vLLM needs --max-lora-rank {rank} or more for this adapter, whose rank is above {_DEFAULT_RANK}")
    return "; ".join(notes) or None
