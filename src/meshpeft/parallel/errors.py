"""The errors a user can mend: their text names what was given, what was expected, and what to do."""

from __future__ import annotations

__all__ = ["MeshPEFTError", "ParallelError", "first_line"]


class MeshPEFTError(ValueError):
    """Base of every error about the user's input; the command line prints it and exits with code 2."""


class ParallelError(MeshPEFTError):
    """Sizes that do not divide, axes that do not exist, layers used in a way their layout does not allow."""


def first_line(error: Exception) -> str:
    """What the first line of another package's error says, for a message of ours; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
