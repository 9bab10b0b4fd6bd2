"""The error about adapters that a user can mend."""

from __future__ import annotations

from meshpeft.parallel.errors import MeshPEFTError

__all__ = ["AdapterError"]


class AdapterError(MeshPEFTError):
    """Targets that match nothing, options that contradict each other, adapters used in a way they cannot be."""
