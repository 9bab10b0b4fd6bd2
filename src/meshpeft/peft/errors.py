"""Errors about adapters that a user can mend."""

from __future__ import annotations

from meshpeft.parallel import MeshPEFTError

__all__ = ["AdapterError", "UnseenAdapterError"]


class AdapterError(MeshPEFTError):
    """Targets that match nothing, options that contradict each other, adapters used in a way they cannot be."""


class UnseenAdapterError(AdapterError, AttributeError):
    """Code reads the weight of a layer with an adapter, and would leave the adapter out."""
