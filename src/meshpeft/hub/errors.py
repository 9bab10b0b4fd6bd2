"""The error of a checkpoint or an adapter file that cannot be written, or is not what the model needs."""

from __future__ import annotations

from meshpeft.parallel.errors import MeshPEFTError

__all__ = ["CheckpointError"]


class CheckpointError(MeshPEFTError):
    """Names the first thing that is wrong; the model and the files are as they were."""
