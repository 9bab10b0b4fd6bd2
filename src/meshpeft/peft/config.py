"""Options of `update_model`, by patterns of layer names. `LoRA`, `DoRA` and their like have their own (`method.py`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from meshpeft.peft.adapter import normalize_dtype
from meshpeft.peft.errors import AdapterError
from meshpeft.peft.matching import wildcard_match

__all__ = ["LayerPattern", "LoRAInitMethod", "PEFTAttributeConfig", "PEFTConfig", "matches"]

LayerPattern: TypeAlias = str | Callable[[str], bool]
"""A layer's full name with `*` for any substring, or a predicate of it."""

LoRAInitMethod = Literal["kaiming_zeros", "svdquant", "pissa"]


@dataclass(frozen=True)
class PEFTAttributeConfig:
    """Attributes of the adapter on a layer.

    Attributes:
        enable: Whether there is one.
        rank: Rank, at least 1.
        scale: Factor of its output, above 0.
        lora_a_init: In-place initialiser of A, one of `torch.nn.init` or its dotted name.
        lora_b_init: In-place initialiser of B.
        lora_dtype: Parameter dtype: `bf16 fp16 fp32`, or a long form, which is shortened; `None` means the dtype that
            the base computes in, never one that it is stored in.
        lora_init_method: `kaiming_zeros`: A and B by their initialisers. `svdquant`: the best approximation of what
            quantising the layer's weight lost. `pissa`: the principal part of the weight, subtracted from the base.

    Raises:
        AdapterError: A value that is not allowed; the message names the field.
    """

    enable: bool = True
    rank: int = 64
    scale: float = 1.0
    lora_a_init: Callable[[Tensor], object] | str = nn.init.kaiming_uniform_
    lora_b_init: Callable[[Tensor], object] | str = nn.init.zeros_
    lora_dtype: str | torch.dtype | None = None
    lora_init_method: LoRAInitMethod = "kaiming_zeros"

    def __post_init__(self) -> None:
        if not isinstance(self.enable, bool):
            raise AdapterError(f"enable={self.enable!r}: expected True or False")
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise AdapterError(f"rank={self.rank!r}: expected an integer of at least 1")
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)):
            raise AdapterError(f"scale={self.scale!r}: expected a number above 0")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise AdapterError(f"scale={self.scale!r}: expected a finite number above 0")
        if self.lora_init_method not in get_args(LoRAInitMethod):
            allowed = ", ".join(get_args(LoRAInitMethod))
            raise AdapterError(f"lora_init_method={self.lora_init_method!r}: expected one of {allowed}")
        self._set("lora_a_init", _initializer("lora_a_init", self.lora_a_init))
        self._set("lora_b_init", _initializer("lora_b_init", self.lora_b_init))
        self._set("lora_dtype", normalize_dtype(self.lora_dtype))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def a_init(self) -> Callable[[Tensor], object]:
        """`lora_a_init` as a function."""
        return _initializer("lora_a_init", self.lora_a_init)

    @property
    def b_init(self) -> Callable[[Tensor], object]:
        """`lora_b_init` as a function."""
        return _initializer("lora_b_init", self.lora_b_init)


def _default_cfg() -> dict[LayerPattern, PEFTAttributeConfig | dict[str, Any]]:
    return {"*": {"rank": 64}}


@dataclass
class PEFTConfig:
    """Layers that get an adapter, and its attributes.

    Attributes:
        adapter_name: Name of the adapter; several of different names on one model are summed.
        adapter_type: `lora`.
        adapter_cfg: Pattern of full layer names (`*` for any substring), or a predicate of them -> the attributes, or
            a dict of them. A later pattern that matches replaces all that an earlier one gave: after
            `{"*": {"rank": 32}, "*output_layer*": {"enable": False}}` the output layer has no adapter.
        freeze_base_model: Freeze all that is not an adapter; otherwise it is left as it is.
        freeze_lora_weights: Freeze this adapter.
        seed: With a parameter's name and global shape it decides its initial values.

    Raises:
        AdapterError: A value that is not allowed; the message names the field (and the pattern).

    Example:
        >>> update_model(model, PEFTConfig(adapter_cfg={"*linear_fc*": {"rank": 16, "scale": 2.0}}))
    """

    adapter_name: str = "default"
    adapter_type: str = "lora"
    adapter_cfg: Mapping[LayerPattern, PEFTAttributeConfig | dict[str, Any]] = field(default_factory=_default_cfg)
    freeze_base_model: bool = True
    freeze_lora_weights: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.adapter_name, str) or not self.adapter_name.isidentifier():
            raise AdapterError(
                f"adapter_name={self.adapter_name!r}: expected letters, digits and underscores, no digit first, for it "
                "becomes part of parameter names"
            )
        if hasattr(nn.ModuleDict(), self.adapter_name):
            raise AdapterError(f"adapter_name={self.adapter_name!r} is reserved; choose another")
        if self.adapter_type != "lora":
            raise AdapterError(f"adapter_type={self.adapter_type!r}: expected 'lora'")
        for option in ("freeze_base_model", "freeze_lora_weights"):
            if not isinstance(getattr(self, option), bool):
                raise AdapterError(f"{option}={getattr(self, option)!r}: expected True or False")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise AdapterError(f"seed={self.seed!r}: expected an integer")
        if not isinstance(self.adapter_cfg, Mapping) or not self.adapter_cfg:
            raise AdapterError(
                f"adapter_cfg={self.adapter_cfg!r}: expected at least one pattern with its attributes, such as "
                "{'*': {'rank': 64}}"
            )
        self.adapter_cfg = {pattern: _attributes(pattern, value) for pattern, value in self.adapter_cfg.items()}

    @classmethod
    def of(cls, config: PEFTConfig | Mapping[str, Any]) -> PEFTConfig:
        """Return a configuration, or make one from a dict of its fields.

        Raises:
            AdapterError: Unknown field; a value that is not allowed.
        """
        if isinstance(config, PEFTConfig):
            return replace(config)  # checked again: its fields and patterns may have been changed since
        if not isinstance(config, Mapping):
            raise AdapterError(f"expected a PEFTConfig or a dict of its fields, got {config!r}")
        made: PEFTConfig = _from_mapping(cls, config, "PEFTConfig")
        return made

    def attributes_of(self, name: str) -> PEFTAttributeConfig | None:
        """Return the attributes of the last pattern that matches a full name; `None` without one, or if disabled."""
        found = None
        for pattern, attributes in self.adapter_cfg.items():
            if matches(pattern, name):
                found = attributes
        assert not isinstance(found, dict)
        return found if found is not None and found.enable else None


def matches(pattern: LayerPattern, name: str) -> bool:
    """Whether a pattern matches a full name."""
    return bool(wildcard_match(pattern, name)) if isinstance(pattern, str) else bool(pattern(name))


def _attributes(pattern: object, value: object) -> PEFTAttributeConfig:
    if not isinstance(pattern, str) and not callable(pattern):
        raise AdapterError(f"adapter_cfg: pattern {pattern!r} is neither a string nor a function of a layer's name")
    try:
        if isinstance(value, PEFTAttributeConfig):
            return value
        if isinstance(value, Mapping):
            return _from_mapping(PEFTAttributeConfig, value, "PEFTAttributeConfig")
        raise AdapterError(f"expected a PEFTAttributeConfig or a dict of its fields, got {value!r}")
    except AdapterError as error:
        raise AdapterError(f"adapter_cfg[{pattern!r}]: {error}") from error


def _from_mapping(cls: type[Any], values: Mapping[str, Any], label: str) -> Any:
    known = [each.name for each in fields(cls)]
    unknown = [name for name in values if name not in known]
    if unknown:
        raise AdapterError(f"{label} has no field {', '.join(map(repr, unknown))}; it has {', '.join(known)}")
    return cls(**values)


def _initializer(option: str, value: object) -> Callable[[Tensor], object]:
    """Return an in-place initialiser of `torch.nn.init` that needs nothing but the tensor."""
    name = value.removeprefix("torch.nn.init.") if isinstance(value, str) else getattr(value, "__name__", "")
    found: Callable[[Tensor], object] | None = getattr(nn.init, name, None)
    named = isinstance(value, str) and value.startswith("torch.nn.init.")
    if found is None or not name.endswith("_") or not (named or found is value):
        raise AdapterError(
            f"{option}={value!r}: expected an in-place initialiser of torch.nn.init, such as torch.nn.init.zeros_, or "
            "its dotted name"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            found(torch.empty(2, 2))
    except (TypeError, ValueError) as error:
        raise AdapterError(
            f"{option}={value!r}: it cannot fill a matrix without further arguments ({error})"
        ) from error
    return found
