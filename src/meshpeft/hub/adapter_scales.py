"""One rank and one scale for all adapters of a file; the rank and scale that each of them has here.

Serving systems scale a whole file by `lora_alpha / r` (vLLM's `PEFTHelper`; SGLang's `LoRAAdapter`, which does not know
`use_rslora` either) and ignore `rank_pattern` and `alpha_pattern`, or refuse them. So every file that we write has
one `r`, the largest rank, and one `lora_alpha`. An adapter of another rank or scale is written as an equal one that has
these: A's rows and B's columns get zeros behind them, and B is multiplied with s / (lora_alpha / r). Both are exact but
for the rounding of that product, which is none where the factor is a power of two.

Our readers find the ranks and alphas as they were in the header of the weights' file, under `meshpeft.scales`, which
other readers ignore. They change how the adapter is held, and never what it computes.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meshpeft.hub.adapter_config import AdapterShape, PeftConfig
from meshpeft.hub.tensor_files import CheckpointError
from meshpeft.parallel.errors import reason_of

__all__ = ["AS_THEY_ARE", "FileScale", "OwnAdapter", "Written"]

_KEY = "meshpeft.scales"
_TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}
# Four units in the last place of a float64: what the products and quotients below are rounded by.
_ROUNDING = 2.0**-50


@dataclass(frozen=True)
class Written:
    """How a file stores the factors of one adapter.

    Attributes:
        rank: Rank of the matrices; `None` for the adapter's own.
        b_factor: Factor of B.
    """

    rank: int | None = None
    b_factor: float = 1.0

    def b_dtype(self, own: torch.dtype) -> torch.dtype:
        """Type of B in the file: its own, where that holds every product exactly, else float32 or wider."""
        if self.b_factor == 1 or (_is_power_of_two(self.b_factor) and own != torch.float16):  # which is short of range
            return own
        return torch.promote_types(own, torch.float32)

    def b_in_file(self, values: Tensor) -> Tensor:
        """Scale B to the file's scale, rounded once."""
        if self.b_factor == 1:
            return values
        return (values.double() * self.b_factor).to(self.b_dtype(values.dtype))

    def b_from_file(self, values: Tensor, own: torch.dtype | None) -> Tensor:
        """Scale the file's B to the adapter's own scale.

        Args:
            values: Values in the file.
            own: Type of the result; `None` for that of the values.
        """
        own = values.dtype if own is None else own
        if self.b_factor in (0, 1):  # a scale of zero leaves nothing of B in the file
            return values.to(own)
        return (values.double() / self.b_factor).to(own)


AS_THEY_ARE = Written()


@dataclass(frozen=True)
class OwnAdapter:
    """An adapter's own shape and type, where the file has others.

    Attributes:
        shape: Rank and alpha.
        b_dtype: Type of B, where the file has another.
    """

    shape: AdapterShape
    b_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class FileScale:
    """The rank and scale of a file, and the adapters in it that have others.

    Attributes:
        shape: Rank and alpha of the whole file for every reader: `lora_alpha / r` is the scale.
        use_rslora: Whether the adapters are scaled by alpha / sqrt(rank) here.
        own: The adapters as they are here, by the names in the file.
    """

    shape: AdapterShape
    use_rslora: bool
    own: Mapping[str, OwnAdapter]

    @classmethod
    def common(cls, shapes: Sequence[AdapterShape], use_rslora: bool) -> AdapterShape | None:
        """Choose rank and alpha of a file with adapters of these shapes; `None` where all have one plain scale already.

        The scale is one of theirs: that from which most others differ by a power of two.
        """
        if len(set(shapes)) == 1 and not use_rslora:
            return None
        scales = Counter(shape.scale(use_rslora) for shape in shapes)

        def exact(scale: float) -> tuple[int, int, float]:
            held = sum(count for other, count in scales.items() if _is_power_of_two(_ratio(other, scale)))
            return held, scales[scale], scale

        rank = max(shape.rank for shape in shapes)
        chosen = max((scale for scale in scales if scale), key=exact, default=0.0)
        return AdapterShape.of_scale(rank, chosen, False)

    def written(self, shape: AdapterShape) -> Written:
        """Return how the file stores an adapter of this shape."""
        return Written(self.shape.rank, _ratio(shape.scale(self.use_rslora), self.shape.scale(False)))

    def _holds(self, shape: AdapterShape) -> bool:
        """Whether an adapter of this shape can be in the file."""
        factor, scale = self.written(shape).b_factor, shape.scale(self.use_rslora)
        scaled = math.isfinite(factor) and bool(factor) if scale else True
        return shape.rank <= self.shape.rank and scaled and (bool(self.shape.alpha) or not scale)

    def as_metadata(self) -> dict[str, str]:
        """Make the entry of the file's header."""
        adapters = {
            name: {
                "r": own.shape.rank,
                "lora_alpha": own.shape.alpha,
                **({} if own.b_dtype is None else {"b_type": str(own.b_dtype).removeprefix("torch.")}),
            }
            for name, own in self.own.items()
        }
        content = {
            "r": self.shape.rank,
            "lora_alpha": self.shape.alpha,
            "use_rslora": self.use_rslora,
            "adapters": adapters,
        }
        return {_KEY: json.dumps(content, separators=(",", ":"))}

    @classmethod
    def read(cls, metadata: Mapping[str, str], config: PeftConfig, where: object) -> FileScale | None:
        """Read the entry in a file's header; `None` where there is none, or it was written for another config.

        Args:
            metadata: Entries of the header, of a file whose values are those that were written with it.
            config: Configuration of the adapter, which other readers use.
            where: The file, for messages.

        Raises:
            CheckpointError: The entry is damaged.
        """
        if _KEY not in metadata:
            return None
        try:
            content = json.loads(metadata[_KEY])
            found = cls(
                _shape(content),
                _typed(content["use_rslora"], bool),
                {name: _own(entry) for name, entry in _typed(content["adapters"], dict).items()},
            )
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{where}: {_KEY} in its header is damaged: {reason_of(error)}") from error
        if not all(found._holds(own.shape) for own in found.own.values()):
            raise CheckpointError(
                f"{where}: {_KEY} in its header is damaged: a rank or scale that the file has no room for"
            )
        same = config.default == found.shape and not (config.use_rslora or config.rank_pattern or config.alpha_pattern)
        return found if same else None


def _ratio(scale: float, other: float) -> float:
    """Divide scale by other; the result is a power of two where it is one except for rounding."""
    if other == 0:
        return 1.0
    ratio = scale / other
    mantissa, exponent = math.frexp(ratio)
    nearest = math.copysign(0.5 if abs(mantissa) < 0.75 else 1.0, mantissa)
    return math.ldexp(nearest, exponent) if math.isclose(mantissa, nearest, rel_tol=_ROUNDING) else ratio


def _is_power_of_two(number: float) -> bool:
    return abs(math.frexp(number)[0]) == 0.5


def _shape(entry: Any) -> AdapterShape:
    rank, alpha = _typed(entry["r"], int), entry["lora_alpha"]
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha) or rank < 1:
        raise ValueError("a rank or alpha that is none")
    return AdapterShape(rank, alpha)


def _own(entry: Any) -> OwnAdapter:
    return OwnAdapter(_shape(entry), _TYPES[entry["b_type"]] if "b_type" in entry else None)


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}")
    return value
