"""Blocks with a state over the sequence, linear attention and state spaces, sharded by their heads.

transformers' plans hold them in full on every rank, or gather what their layers give. What a head computes depends on
no other head, nor on channels of the convolution before it but its own. So a rank computes some heads with their slices
of every parameter, and the numbers of heads and channels that the code of the block reads are those of one rank:

| block | first layers | convolution | one number a head |
|---|---|---|---|
| gated delta net | q, k, v, z, and b, a, in several layers or blocks of one | q, k, v | `A_log`, `dt_bias` |
| Mamba-2 | gate, x, B, C, dt | x, B, C | `A_log`, `dt_bias`, `D` |

The heads of a group share keys and queries (B and C), and a norm behind them spans it: so it is the groups that are
sharded, and where the axis does not divide their number, every rank holds the block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from meshpeft.engines import source_of
from meshpeft.parallel import FusedParts

__all__ = ["RecurrentBlock", "hands_weight_on", "recurrent_block"]

# Before the weight that Mamba-2's blocks hand to a kernel in training, which then leaves out what the layer adds.
_HANDED_TO_KERNEL = "outproj_weight="


@dataclass(frozen=True)
class RecurrentBlock:
    """How the parts of such a block are sharded, by their names in it.

    Attributes:
        groups: Number of groups of heads, which is to divide.
        columns: First layers, each with its fused parts.
        row: The last layer.
        parameters: Parameters sharded along their first dim, each with its fused parts.
        shared: Modules with the same parameters for every head.
        counts: Numbers that the block's code reads: of heads, groups and channels, of its own and of the convolution.
    """

    groups: int
    columns: Mapping[str, FusedParts | None]
    row: str
    parameters: Mapping[str, FusedParts | None]
    shared: tuple[str, ...]
    counts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


_CHANNELS_OF_CONV = ("in_channels", "out_channels", "groups")


def recurrent_block(module: Any) -> RecurrentBlock | None:
    """Find how a block is sharded from the numbers and layers that it has; `None` for any other module."""
    if not isinstance(getattr(module, "conv1d", None), nn.Conv1d):
        return None
    return _gated_delta_net(module) or _mamba2(module)


def hands_weight_on(module: nn.Module) -> bool:
    """Whether a block hands the weight of its last layer to a kernel in training."""
    cls: Any = type(module)
    return bool(cls.__module__.startswith("transformers.")) and _HANDED_TO_KERNEL in source_of(cls)


def _gated_delta_net(block: Any) -> RecurrentBlock | None:
    names = ("num_k_heads", "num_v_heads", "key_dim", "value_dim")
    if not all(isinstance(getattr(block, name, None), int) for name in names):
        return None
    groups, heads, keys, values = (getattr(block, name) for name in names)
    of_conv = FusedParts(("q", "k", "v"), (keys, keys, values))
    # Qwen3-Next, Qwen3.5 and OLMo: what is one layer differs.
    forms: tuple[tuple[dict[str, FusedParts | None], str], ...] = (
        (
            {
                "in_proj_qkvz": FusedParts(("q", "k", "v", "z"), (keys, keys, values, values), blocks=groups),
                "in_proj_ba": FusedParts(("b", "a"), (heads, heads), blocks=groups),
            },
            "out_proj",
        ),
        ({"in_proj_qkv": of_conv, "in_proj_z": None, "in_proj_b": None, "in_proj_a": None}, "out_proj"),
        (dict.fromkeys(("q_proj", "k_proj", "v_proj", "g_proj", "a_proj", "b_proj")), "o_proj"),
    )
    found = next(((columns, row) for columns, row in forms if {*columns, row} == _linears_of(block)), None)
    if found is None:
        return None
    norm = "o_norm" if hasattr(block, "o_norm") else "norm"
    return _sharded(block, groups, *found, of_conv, ("A_log", "dt_bias"), (norm,), (*names, "conv_dim"))


def _mamba2(block: Any) -> RecurrentBlock | None:
    names = ("n_groups", "num_heads", "intermediate_size", "ssm_state_size")
    if _linears_of(block) != {"in_proj", "out_proj"} or not all(
        isinstance(getattr(block, name, None), int) for name in names
    ):
        return None
    groups, heads, channels, states = (getattr(block, name) for name in names)
    # A norm over all channels needs all ranks'.
    if getattr(getattr(block, "norm", None), "group_size", None) != channels // groups:
        return None
    of_group = groups * states
    of_conv = FusedParts(("x", "B", "C"), (channels, of_group, of_group))
    fused = FusedParts(("gate", "x", "B", "C", "dt"), (channels, channels, of_group, of_group, heads))
    parameters = ("A_log", "dt_bias", "D", "norm.weight")
    return _sharded(block, groups, {"in_proj": fused}, "out_proj", of_conv, parameters, (), (*names[:3], "conv_dim"))


def _linears_of(block: nn.Module) -> set[str]:
    return {name for name, child in block.named_children() if isinstance(child, nn.Linear)}


def _sharded(
    block: Any,
    groups: int,
    columns: Mapping[str, FusedParts | None],
    row: str,
    of_conv: FusedParts,
    of_heads: tuple[str, ...],
    shared: tuple[str, ...],
    counts: tuple[str, ...],
) -> RecurrentBlock | None:
    parameters: dict[str, FusedParts | None] = {
        f"conv1d.{name}": of_conv for name, _ in block.conv1d.named_parameters()
    }
    parameters |= dict.fromkeys(of_heads)
    known = {*parameters, *(f"{name}.weight" for name in shared)}
    known |= {f"{name}.{own}" for name in (*columns, row) for own in ("weight", "bias")}
    if not {name for name, _ in block.named_parameters()} <= known:
        return None
    return RecurrentBlock(groups, columns, row, parameters, shared, {"": counts, "conv1d": _CHANNELS_OF_CONV})
