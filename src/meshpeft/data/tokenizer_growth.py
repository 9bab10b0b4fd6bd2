"""How much longer a tokenizer makes a text before it makes tokens of it.

A normalizer may replace a character by a long text, and what comes of it again: forty replacements of ``a`` by ``aa``
make terabytes of one letter, inside of a call that nothing interrupts.
"""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from meshpeft.models import ModelError

__all__ = ["check_growth"]

# The most that is known of a tokenizer in use is 3: a mark of three bytes for a space.
_MOST = 256


def check_growth(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the replacements of a tokenizer do not make a text longer without bound.

    Raises:
        ModelError: they may make it more than 256 times as long.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    for name in ("normalizer", "decoder"):
        part = getattr(backend, name, None)
        if part is None:
            continue
        growth = _growth(json.loads(part.__getstate__()))
        if growth > _MOST:
            raise ModelError(
                f"the replacements of its {name} may make a text {growth:.3g} times as long; expected {_MOST} at most"
            )


def _growth(part: Any) -> float:
    """The factor by which a normalizer or decoder makes a text longer at most."""
    if isinstance(part, list):
        growth = 1.0
        for step in part:
            growth = min(growth * _growth(step), 1e100)
        return growth
    if not isinstance(part, dict):
        return 1.0
    if part.get("type") == "Replace":
        replaced = part.get("pattern", {}).get("String") or ""
        # An expression may find nothing, between all characters.
        return max(1.0, len(part["content"]) / len(replaced) if replaced else len(part["content"]) + 1.0)
    return _growth([value for value in part.values() if isinstance(value, list)])
