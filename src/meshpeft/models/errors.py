"""The errors of a model directory, a configuration or a request that this package cannot serve."""

from __future__ import annotations

from meshpeft.parallel.errors import MeshPEFTError

__all__ = ["ModelError", "UnsupportedModelError"]


class ModelError(MeshPEFTError):
    """A model that cannot be built, read or written as asked; the text says what was given and what to do."""


class UnsupportedModelError(ModelError):
    """A model that has something which the native decoder does not have; another engine may run it."""
