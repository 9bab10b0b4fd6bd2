"""A cross-section of many cases for `make test`; `make test-all` runs them all."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def thinned(cases: Iterable[Any], keep_one_in: int) -> list[Any]:
    """Mark every case slow but the first, and each `keep_one_in`-th after it. A tuple is a value for each parameter."""
    return [
        case
        if number % keep_one_in == 0
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for number, case in enumerate(cases)
    ]


def cross_section(keep_one_in: int, **axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrise a test over the product of the axes, all of it slow but each `keep_one_in`-th diagonal.

    A value of an axis keeps a fast case where another axis has `keep_one_in` values or more.

        @cross_section(2, method=METHODS, layout=LAYOUTS)
        def test_it(method: str, layout: dict[str, int]) -> None: ...
    """
    cases = [
        pytest.param(
            *(value for _, value in case),
            marks=[pytest.mark.slow] if sum(number for number, _ in case) % keep_one_in else [],
        )
        for case in product(*(enumerate(values) for values in axes.values()))
    ]
    return pytest.mark.parametrize(tuple(axes), cases, ids=lambda value: getattr(value, "__name__", str(value)))
