"""MeshPEFT: fine-tuning with adapters over a mesh of devices, the same adapter at every layout."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
