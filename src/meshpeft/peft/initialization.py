"""How an adapter's factors start."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["InitMethod", "init_method_const", "init_method_kaiming_uniform", "init_method_normal", "init_method_of"]

InitMethod = Callable[[Tensor], Tensor]


def init_method_normal(sigma: float) -> InitMethod:
    """Create an initialization method based on normal distribution N(0, sigma).

    Args:
        sigma: standard deviation.

    Returns:
        A function that fills a tensor in place, and returns it.
    """

    def init_(tensor: Tensor) -> Tensor:
        return nn.init.normal_(tensor, mean=0.0, std=sigma)

    return init_


def init_method_kaiming_uniform(val: float) -> InitMethod:
    """Create an initialization method based on Kaiming uniform distribution.

    Args:
        val: the `a` parameter (negative slope).

    Returns:
        A function that fills a tensor in place, and returns it.
    """

    def init_(tensor: Tensor) -> Tensor:
        return nn.init.kaiming_uniform_(tensor, a=val)

    return init_


def init_method_const(val: float) -> InitMethod:
    """Create an initialization method that sets all values to a constant.

    Args:
        val: the constant.

    Returns:
        A function that fills a tensor in place, and returns it.
    """

    def init_(tensor: Tensor) -> Tensor:
        return nn.init.constant_(tensor, val)

    return init_


_METHODS: dict[str, InitMethod] = {
    "xavier": nn.init.xavier_normal_,
    "normal": init_method_normal(0.2),
    "kaiming": init_method_kaiming_uniform(math.sqrt(5)),
    "zero": init_method_const(0.0),
}


def init_method_of(name: str) -> InitMethod:
    """The initialization called `name`: `xavier` (normal), `normal` N(0, 0.2), `kaiming` (uniform, a=√5), `zero`.

    Fans are those of the full matrix, because the full matrix is what is drawn.

    Raises:
        NotImplementedError: another name.
    """
    if name not in _METHODS:
        raise NotImplementedError(f"init method {name!r} is not one of {', '.join(_METHODS)}")
    return _METHODS[name]
