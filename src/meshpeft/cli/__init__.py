"""The command line: parses, calls and prints."""

from __future__ import annotations
