"""Rotary position embedding (RoFormer, arXiv 2104.09864) with the scalings of Llama-family checkpoints.

The angles are computed in float32, or in float64 for a float64 model, from the configuration alone: there is no
buffer that a checkpoint, a meta device or a cast could lose.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from meshpeft.models.config_parts import RopeConfig

__all__ = ["apply_rotary", "inverse_frequencies", "rotary_tables"]


def inverse_frequencies(rope: RopeConfig, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Angle per position of each channel pair, in radians: [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=dtype, device=device) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


def _llama3(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those in between blended."""
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_max_position_embeddings / wavelengths
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * frequencies / rope.factor + kept * frequencies


def rotary_tables(rope: RopeConfig, head_dim: int, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position.

    Args:
        position_ids: [batch, seq], replicated.
        dtype: of the activations, and of the result; computed in float32 at least.

    Returns:
        Two tensors [seq, batch, 1, head_dim], replicated; the halves of the last dim are equal.
    """
    wide = torch.promote_types(dtype, torch.float32)
    frequencies = inverse_frequencies(rope, head_dim, wide, position_ids.device)
    angles = position_ids.t().to(wide)[..., None] * frequencies
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate the channel pairs (i, i + head_dim / 2) of x [seq, batch, heads, head_dim] by their angles."""
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat((-second, first), dim=-1) * sines
