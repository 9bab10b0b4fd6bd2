"""A cross-section of many cases for `make test`; `make test-all` runs them all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def thinned(cases: Iterable[Any], keep_one_in: int) -> list[Any]:
    """Mark every case slow but the first, and each `keep_one_in`-th after it."""
    return [
        case if number % keep_one_in == 0 else pytest.param(case, marks=pytest.mark.slow)
        for number, case in enumerate(cases)
    ]
