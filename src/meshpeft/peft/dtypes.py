"""Names of the types that adapter parameters can have."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from meshpeft.peft.errors import AdapterError

__all__ = ["DtypeName", "adapter_dtype", "normalize_dtype"]

DtypeName = Literal["bf16", "fp16", "fp32"]

_TYPES: dict[DtypeName, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_LONG_FORMS: dict[str, DtypeName] = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "float": "fp32",
}


def normalize_dtype(value: str | torch.dtype | None) -> DtypeName | None:
    """The short name of a type: `bf16`, `fp16` or `fp32`; `None` stays `None`.

    Args:
        value: a short name; a long form (`bfloat16 float16 half float32 float`), also with `torch.` in front; or the
            torch type itself.

    Raises:
        AdapterError: anything else; adapters are never stored in a type made for quantised weights.

    Example:
        >>> normalize_dtype("torch.bfloat16")
        'bf16'
    """
    if value is None:
        return None
    if isinstance(value, (str, torch.dtype)):
        name = str(value).removeprefix("torch.")
        for short in get_args(DtypeName):
            if short == _LONG_FORMS.get(name, name):
                return short
    raise AdapterError(
        f"lora_dtype={value!r}: expected {', '.join(get_args(DtypeName))}, or {', '.join(_LONG_FORMS)} (with or "
        "without torch. in front); None is the type that the base computes in"
    )


def adapter_dtype(value: str | torch.dtype | None) -> torch.dtype | None:
    """The torch type that a `lora_dtype` names; `None` stays `None`.

    `torch.float64` is taken too, as the type itself: exactness is tested in it.

    Raises:
        AdapterError: see `normalize_dtype`.
    """
    if value is torch.float64:
        return torch.float64
    name = normalize_dtype(value)
    return None if name is None else _TYPES[name]
