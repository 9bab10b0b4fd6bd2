"""Errors about quantised bases that a user can mend."""

from __future__ import annotations

from meshpeft.parallel import MeshPEFTError

__all__ = ["QuantizationError"]


class QuantizationError(MeshPEFTError):
    """An unknown format, blocks that do not divide, a layer that cannot be packed, a residual that was not kept."""
