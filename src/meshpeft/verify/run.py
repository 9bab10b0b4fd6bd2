"""`meshpeft verify`: the proof for a run, from the run's own options."""

from __future__ import annotations

import re
import time
import warnings
from dataclasses import replace

from torch import nn

from meshpeft.models import Decoder, DecoderConfig
from meshpeft.parallel import MeshPEFTError
from meshpeft.training.adapters import add_adapter, check_adapter, describe_targets
from meshpeft.training.config import FinetuneConfig
from meshpeft.training.report import short_path
from meshpeft.training.setup import base_directory, check_base, workers_for
from meshpeft.verify.layout import TOLERANCE, Verdict, verify_layout

__all__ = ["NotExact", "verify_run"]


class NotExact(MeshPEFTError):
    """A layout whose numbers are not those of one process."""


def verify_run(config: FinetuneConfig) -> str:
    """Whether the run with these options would train the adapter that one process trains.

    Its model's structure, method, targets and layout are taken; not its weights and data. Dropout is left out, since
    its masks belong to a layout; a quantised base is checked in full, since packing a layer is the same at every
    layout.

    Args:
        config: of the run; one that could not be started is refused as `finetune` refuses it.

    Returns:
        What was checked and found, in lines.

    Raises:
        NotExact: an error above the tolerance, with the same lines.
        MeshPEFTError: options, model and layout do not fit together; a state is wrong.
    """
    config = config.resolved()
    config.check()
    world = workers_for(config)
    base = check_base(config.model, config)
    check_adapter(base, config)
    start = time.perf_counter()
    verdict = verify_layout(
        base,
        _Adapter(config),
        tp=config.tp,
        dp=world // config.tp,
        ep=config.ep,
        etp=config.etp,
        sequence_parallel=config.sequence_parallel,
        activation_checkpointing=config.activation_checkpointing,
        router_aux_loss_coef=config.router_aux_loss_coef,
        all_layers=_names_layers(config),
    )
    lines = [
        f"model: {short_path(base_directory(config.model))}, {_structure(base)}",
        f"{config.method}: rank {config.rank} on {describe_targets(config)}",
        *_findings(verdict, world, config),
        f"in {time.perf_counter() - start:.1f} s, without a GPU",
    ]
    if not verdict.is_exact:
        raise NotExact("\n".join(["this layout does not train the adapter of one process", *lines]))
    return "\n".join([*lines, "exact: this layout trains the adapter of one process"])


class _Adapter:
    """Puts the run's adapter on a model, in float64, with a B that does not hide A, and without dropout."""

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = replace(
            config, dtype="float64", dropout=0.0, lora_b_init_method="normal", lora_init_method=None, quantize=None
        )

    def __call__(self, model: Decoder) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a rank above the sides of a scaled-down layer
            add_adapter(model, self.config)
        return model


def _names_layers(config: FinetuneConfig) -> bool:
    patterns = (*(config.target_modules or ()), *(config.exclude_modules or ()))
    return any(re.search(r"layers\.\d", pattern) for pattern in patterns)


def _structure(base: DecoderConfig) -> str:
    sizes = (
        f"{base.model_type}, {base.num_layers} layers, {base.num_attention_heads} heads over {base.num_query_groups}"
    )
    return sizes if base.moe is None else f"{sizes}, {base.moe.num_experts} experts, top {base.moe.moe_router_topk}"


def _findings(verdict: Verdict, world: int, config: FinetuneConfig) -> list[str]:
    if verdict.states is None:
        states = "states: not followed in a model with experts; the numbers below are the proof"
    else:
        found = (
            ", ".join(f"{state} on {axis}" for axis, state in verdict.states.items()) or "one rank, nothing to check"
        )
        states = f"states at {world:,} ranks: every operation's operands agree; the loss is {found}"
    small = verdict.model
    errors = [
        f"  {name.replace('_', ' '):<14}{error:.1e}{'' if error < TOLERANCE else '   <- wrong'}"
        for name, error in verdict.errors.items()
    ]
    return [
        states,
        f"numbers, float64, {verdict.layout} against one rank ({small.num_layers} layers, hidden {small.hidden_size}):",
        *errors,
        f"  largest relative error allowed: {TOLERANCE:.0e}",
    ]
