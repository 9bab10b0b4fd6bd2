"""Padding of token sequences to a multiple; differentiable, so that what is padded still trains."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from meshpeft.peft.errors import AdapterError

__all__ = ["pad_seq_to_mult", "unpad_seq_to_mult"]


def pad_seq_to_mult(x: Tensor, mult: int) -> tuple[Tensor, int]:
    """Pad sequence length to be a multiple of mult.

    Args:
        x: [tokens, *].
        mult: the number that the padded length is a multiple of; at least 1.

    Returns:
        x with zeros behind it, [tokens + padding, *] (x itself if there is nothing to pad), and the padding.
    """
    if mult < 1:
        raise AdapterError(f"mult={mult}: expected at least 1")
    padding = -x.shape[0] % mult
    if padding == 0:
        return x, 0
    return F.pad(x, [0, 0] * (x.dim() - 1) + [0, padding]), padding


def unpad_seq_to_mult(x: Tensor, pad_len: int) -> Tensor:
    """Remove sequence padding that was added by pad_seq_to_mult.

    Args:
        x: [tokens + pad_len, *].
        pad_len: number of padding elements.

    Returns:
        [tokens, *]; x itself if there is no padding.
    """
    if not 0 <= pad_len <= x.shape[0]:
        raise AdapterError(f"pad_len={pad_len} cannot be removed from a sequence of {x.shape[0]}")
    return x if pad_len == 0 else x[: x.shape[0] - pad_len]
