"""Low-rank adapters: the factors A and B with their layout, initialisation, dropout and options."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshpeft.parallel import (
    LinearLayout,
    ParallelAxis,
    Shard,
    ShardedTensors,
    State,
    TensorLayout,
    differs,
    dropout,
    layout_of,
    layout_of_tensor,
    named_init_,
    set_layout,
)
from meshpeft.peft.errors import AdapterError
from meshpeft.peft.fused import Term, product

__all__ = [
    "AdapterAttributes",
    "DropoutPosition",
    "DtypeName",
    "InitMethod",
    "LinearAdapter",
    "LowRankAdapter",
    "LowRankFactor",
    "adapter_dtype",
    "check_options",
    "get_adapter_attributes_from_linear",
    "init_method_const",
    "init_method_kaiming_uniform",
    "init_method_normal",
    "init_method_of",
    "normalize_dtype",
    "pad_seq_to_mult",
    "unpad_seq_to_mult",
]


DropoutPosition = Literal["pre", "post"]


def check_options(dim: int, alpha: float, dropout: float, dropout_position: str) -> None:
    """Check the options of a low-rank adapter.

    Raises:
        AdapterError: A rank that is no integer or below 1, a non-finite alpha, a dropout outside [0, 1), an unknown
            position.
    """
    given: tuple[tuple[str, Any, type, str], ...] = (
        ("dim", dim, Integral, "an integer, the rank"),
        ("alpha", alpha, Real, "a number"),
        ("dropout", dropout, Real, "a number"),
    )
    for name, value, kind, expected in given:
        if isinstance(value, bool) or not isinstance(value, kind):
            raise AdapterError(f"{name}={value!r}: expected {expected}")
    if dim < 1:
        raise AdapterError(f"dim={dim}: the rank of an adapter is at least 1")
    if not math.isfinite(alpha):
        raise AdapterError(f"alpha={alpha}: expected a finite number; the adapter is scaled by alpha / dim")
    if not 0 <= dropout < 1:
        raise AdapterError(f"dropout={dropout}: expected a probability of at least 0 and below 1")
    if dropout_position not in ("pre", "post"):
        raise AdapterError(f"dropout_position={dropout_position!r}: expected 'pre' or 'post'")


class LowRankFactor(ShardedTensors, nn.Module):
    """One factor: a weight [out, in] and nothing else.

    Args:
        layout: Layout of the weight, of which this rank's slice is made.
        init_method: `xavier normal kaiming zero`.
        name: Full name of the weight; with `seed` and the global shape it decides the values.
        seed: Seed of the run.
        dtype, device: Parameter dtype and device.
        initialize: Whether to initialise the weight; otherwise it is left empty.
    """

    def __init__(
        self,
        layout: TensorLayout,
        init_method: str,
        name: str,
        seed: int,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        initialize: bool = True,
    ) -> None:
        super().__init__()
        init_fn = init_method_of(init_method)
        self.layout = layout  # also here: sharded data parallel replaces our parameters by some without a layout
        self.weight = nn.Parameter(torch.empty(layout.local_shape, dtype=dtype, device=device))
        set_layout(self.weight, layout)
        self.start: Tensor | None
        self.register_buffer("start", None)
        if initialize:
            named_init_(self.weight, init_fn, seed, name)

    def keep_start(self, values: Tensor | None = None) -> None:
        """Keep a copy of the factor as `start`, also in checkpoints: its product was moved from the base's weight.

        Args:
            values: Factor in more digits than a narrow weight has; by default the weight as it is now. Kept in float32
                or the weight's wider type.
        """
        layout = layout_of_tensor(self.weight)
        start = self.weight.detach() if values is None else values
        start = start.to(torch.promote_types(self.weight.dtype, torch.float32), copy=True)
        if layout is not None:
            set_layout(start, layout)
        self.start = start

    def forward(self, x: Tensor) -> Tensor:
        """x [*, in] -> x Wᵀ [*, out] in x's type."""
        return product(x, self.weight)

    def extra_repr(self) -> str:
        """Return the local shape."""
        return "x".join(str(size) for size in self.weight.shape)


class LowRankAdapter(ShardedTensors, nn.Module):
    """A [r, in] as `linear_in.weight` and B [out, r] as `linear_out.weight`, with what is needed to apply them.

    Args:
        layout: Layout of the base layer.
        dim: Rank r.
        alpha: The output is scaled by alpha / dim; `None` means dim.
        dropout: Probability; on the input (`pre`) or the output (`post`) of the adapter.
        dropout_position: `pre` or `post`.
        dropout_recompute: Make the mask again in the backward pass instead of keeping it.
        lora_A_init_method, lora_B_init_method: `xavier normal kaiming zero`.
        name: Full name of the base layer.
        path: Path of this adapter below the base's name; parameters are initialised as
            `{name}.{path}.linear_in.weight`, ..
        fused: Run inside the base's GEMM, between `enter` and `exit`; otherwise standalone.
        use_rslora: Scale by alpha / sqrt(dim) instead (rank-stabilised LoRA, Kalajdzievski 2023).
        keep_token_shards: Where the base gathers its input from the ranks of a sequence-parallel axis, keep only this
            rank's tokens for the gradient of A.
        seed, dtype, device: Seed, dtype and device of the parameters.
        initialize: Whether to initialise the parameters; otherwise they are left empty.
        factor_layouts: Layouts of A and B, where they differ from those that `layout` gives.

    Raises:
        AdapterError: See `check_options`.
        NotImplementedError: Unknown init method.
    """

    def __init__(
        self,
        layout: LinearLayout,
        dim: int,
        alpha: float | None = None,
        *,
        dropout: float = 0.0,
        dropout_position: DropoutPosition = "pre",
        dropout_recompute: bool = False,
        lora_A_init_method: str = "xavier",
        lora_B_init_method: str = "zero",
        name: str = "",
        path: str = "adapter",
        fused: bool = True,
        use_rslora: bool = False,
        keep_token_shards: bool = False,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        initialize: bool = True,
        factor_layouts: tuple[TensorLayout, TensorLayout] | None = None,
    ) -> None:
        super().__init__()
        alpha = dim if alpha is None else alpha
        check_options(dim, alpha, dropout, dropout_position)
        smaller = min(layout.in_features, layout.out_features)
        if dim > smaller:
            warnings.warn(
                f"{name or 'adapter'}: dim={dim} is above the layer's smaller side {smaller}: a rank of {smaller} "
                "already expresses every change of its weight",
                stacklevel=2,
            )
        self.layout, self.fused = layout, fused
        self.dim, self.alpha, self.use_rslora = dim, alpha, use_rslora
        self.dropout, self.dropout_position, self.dropout_recompute = dropout, dropout_position, dropout_recompute
        self.keep_token_shards = keep_token_shards
        self.base_name, self.seed = name, seed
        options: tuple[Any, ...] = (seed, dtype, device, initialize)
        layout_a, layout_b = factor_layouts or (layout.factor_a(dim, inside=fused), layout.factor_b(dim, inside=fused))
        self.linear_in = LowRankFactor(layout_a, lora_A_init_method, f"{name}.{path}.linear_in.weight", *options)
        self.linear_out = LowRankFactor(layout_b, lora_B_init_method, f"{name}.{path}.linear_out.weight", *options)

    @property
    def scale(self) -> float:
        """s in y += s (x Aᵀ) Bᵀ."""
        return self.alpha / (math.sqrt(self.dim) if self.use_rslora else self.dim)

    share_expert_adapters: bool | None = None
    """On grouped experts, whether one pair of factors serves all of them; `None` on other layers."""

    @property
    def is_linear(self) -> bool:
        """Whether the adapter is a change of its layer's weight: no activation is between its factors."""
        return True

    @property
    def magnitude(self) -> nn.Parameter | None:
        """DoRA's m, [out] or [experts, out] local; `None` for other methods."""
        return None

    @property
    def start(self) -> tuple[Tensor, Tensor] | None:
        """A and B of the part that PiSSA moved from the base's weight to the adapter; `None` without PiSSA."""
        a, b = self.linear_in.start, self.linear_out.start
        return None if a is None or b is None else (a, b)

    @property
    def token_axis(self) -> ParallelAxis | None:
        """Axis over which each rank keeps its own tokens of the adapter's input; `None` where it keeps all."""
        layout = self.layout
        gathered = self.fused and layout.takes_token_shards and layout.axis.world_size > 1
        return layout.axis if self.keep_token_shards and gathered else None

    def keep_start(self) -> None:
        """Keep a copy of the factors as they are now: s B A is what PiSSA moved from the base's weight to the adapter.

        What the adapter changes is then s (B A - B_start A_start), which is what is exported.
        """
        self.linear_in.keep_start()
        self.linear_out.keep_start()

    def delta(self, x: Tensor, a: Tensor, b: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Return s (x' Aᵀ) Bᵀ in plain operations, for factors that may be those of several adapters together.

        Args:
            x: [*, in], the base's input; for a fused adapter after its `enter`.
            a: A [r, in]; on grouped experts also a stack of them.
            b: B [out, r]; likewise.
            offsets: As in `Term`.

        Returns:
            [*, out], in the state of the base's output; for a fused adapter before its `exit`.
        """
        dropped = self.drop_input(x)
        return self.drop_output(self.delta_of_dropped(x if dropped is None else dropped, a, b, offsets))

    def delta_of_dropped(self, x: Tensor, a: Tensor, b: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Return `delta` of an input that dropout was applied to already; the output is not dropped."""
        raise NotImplementedError

    def term(self, x: Tensor, offsets: Tensor | None = None, factors: tuple[Tensor, Tensor] | None = None) -> Term:
        """Return the term of a call on the base's input x, with dropout drawn; for a fused adapter.

        Args:
            x: [*, in], after the base's `enter`.
            offsets: As in `Term`.
            factors: A and B of several adapters together; by default the adapter's own.
        """
        a, b = factors or (self.linear_in.weight, self.linear_out.weight)
        return Term(a, b, self.scale, self.drop_input(x), self.token_axis, offsets)

    @property
    def drops_output(self) -> bool:
        """Whether dropout applies to the adapter's output in the current mode."""
        return self.dropout_position == "post" and self._drops()

    def drop_input(self, x: Tensor) -> Tensor | None:
        """Return x after dropout; `None` where the adapter takes x itself."""
        if self.dropout_position != "pre" or not self._drops():
            return None
        return self._drop(x, self.layout.states(inside=self.fused)[0])

    def drop_output(self, delta: Tensor) -> Tensor:
        """Return the adapter's output, after dropout where that applies to the output."""
        return self._drop(delta, self.layout.states(inside=self.fused)[1]) if self.drops_output else delta

    def _drops(self) -> bool:
        return self.training and self.dropout > 0

    def _drop(self, x: Tensor, state: State) -> Tensor:
        """Apply dropout to an activation that is in `state` on the layer's axis.

        Masks differ always over the axes that shard tokens and over expert parallel, and over the layer's axis where it
        shards the activation. Over every other axis they agree, also where the activation is partial: the mask of a sum
        is that of its summands.

        | layer | adapter | on the input (pre) | on the output (post) |
        |---|---|---|---|
        | column | fused | agree: R | differ: Shard(-1) |
        | column | standalone | agree; differ on token shards | differ; agree where y is gathered |
        | row | fused | differ: Shard(-1) | agree: P |
        | row | standalone | differ; agree where x comes full | agree; differ on token shards |
        | replicated | either | agree; differ on token shards | the same |

        A mask is drawn from a seed that all ranks share, mixed with the rank's index on the axes where masks differ
        (`parallel/random.py`).
        """
        layout = self.layout
        varying = [*layout.token_axes, *([] if layout.expert_axis is None else [layout.expert_axis])]
        if differs(state):
            varying.append(layout.axis)
        return dropout(x, self.dropout, varying=varying, recompute=self.dropout_recompute)

    def extra_repr(self) -> str:
        """Return rank, scale and dropout."""
        return f"dim={self.dim}, scale={self.scale:g}, dropout={self.dropout}, fused={self.fused}"


class LinearAdapter(LowRankAdapter):
    """Adapter that runs inside the GEMM of its layer: `nn.Linear` and this package's layers.

    Args:
        base: Layer; its registered layout gives the shapes.
        dim, alpha, options: As in `LowRankAdapter`.
        layout: Layout of the adapted part of the layer, if that is not all of it.

    Raises:
        NotImplementedError: No layout is registered for the type of `base`.
    """

    def __init__(
        self,
        base: nn.Module,
        dim: int = 32,
        alpha: float | None = None,
        *,
        layout: LinearLayout | None = None,
        **options: Any,
    ) -> None:
        super().__init__(layout_of(base) if layout is None else layout, dim, alpha, **options)

    def delta_of_dropped(self, x: Tensor, a: Tensor, b: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Return s (x Aᵀ) Bᵀ without dropout; arguments as in `delta`."""
        return product(product(x, a, offsets) * self.scale, b, offsets)

    def forward(self, x: Tensor) -> Tensor:
        """x [*, in] -> output of the adapter [*, out]; see `delta`."""
        return self.delta(x, self.linear_in.weight, self.linear_out.weight)


InitMethod = Callable[[Tensor], Tensor]


def init_method_normal(sigma: float) -> InitMethod:
    """Create an initialization method based on normal distribution N(0, sigma).

    Args:
        sigma: Standard deviation.

    Returns:
        A function that fills a tensor in place, and returns it.
    """

    def init_(tensor: Tensor) -> Tensor:
        return nn.init.normal_(tensor, mean=0.0, std=sigma)

    return init_


def init_method_kaiming_uniform(val: float) -> InitMethod:
    """Create an initialization method based on Kaiming uniform distribution.

    Args:
        val: Parameter `a` (negative slope).

    Returns:
        A function that fills a tensor in place, and returns it.
    """

    def init_(tensor: Tensor) -> Tensor:
        return nn.init.kaiming_uniform_(tensor, a=val)

    return init_


def init_method_const(val: float) -> InitMethod:
    """Create an initialization method that sets all values to a constant.

    Args:
        val: The constant.

    Returns:
        A function that fills a tensor in place, and returns it.
    """

    def init_(tensor: Tensor) -> Tensor:
        return nn.init.constant_(tensor, val)

    return init_


_INIT_METHODS: dict[str, InitMethod] = {
    "xavier": nn.init.xavier_normal_,
    "normal": init_method_normal(0.2),
    "kaiming": init_method_kaiming_uniform(math.sqrt(5)),
    "zero": init_method_const(0.0),
}


def init_method_of(name: str) -> InitMethod:
    """Return an initialiser by name: `xavier` (normal), `normal` N(0, 0.2), `kaiming` (uniform, a=√5) or `zero`.

    Fans are those of the full matrix, because the full matrix is drawn.

    Raises:
        NotImplementedError: Another name.
    """
    if name not in _INIT_METHODS:
        raise NotImplementedError(f"init method {name!r} is not one of {', '.join(_INIT_METHODS)}")
    return _INIT_METHODS[name]


def pad_seq_to_mult(x: Tensor, mult: int) -> tuple[Tensor, int]:
    """Pad sequence length to be a multiple of mult.

    Args:
        x: [tokens, *].
        mult: The padded length is a multiple of this; at least 1.

    Returns:
        x with zeros appended, [tokens + padding, *] (x itself if there is nothing to pad), and the padding.
    """
    if mult < 1:
        raise AdapterError(f"mult={mult}: expected at least 1")
    padding = -x.shape[0] % mult
    if padding == 0:
        return x, 0
    return F.pad(x, [0, 0] * (x.dim() - 1) + [0, padding]), padding


def unpad_seq_to_mult(x: Tensor, pad_len: int) -> Tensor:
    """Remove sequence padding that was added by pad_seq_to_mult.

    Args:
        x: [tokens + pad_len, *].
        pad_len: Number of padding elements.

    Returns:
        [tokens, *]; x itself if there is no padding.
    """
    if not 0 <= pad_len <= x.shape[0]:
        raise AdapterError(f"pad_len={pad_len} cannot be removed from a sequence of {x.shape[0]}")
    return x if pad_len == 0 else x[: x.shape[0] - pad_len]


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
    """Return the short name of a dtype: `bf16`, `fp16` or `fp32`; `None` stays `None`.

    Args:
        value: Short name; long form (`bfloat16 float16 half float32 float`), also with `torch.` in front; or the torch
            dtype itself.

    Raises:
        AdapterError: Anything else; adapters are never stored in a type made for quantised weights.

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
    """Return the torch dtype that a `lora_dtype` names; `None` stays `None`.

    `torch.float64` is accepted too, as the dtype itself: exactness is tested in it.

    Raises:
        AdapterError: See `normalize_dtype`.
    """
    if value is torch.float64:
        return torch.float64
    name = normalize_dtype(value)
    return None if name is None else _TYPES[name]


class AdapterAttributes(NamedTuple):
    """Attributes of a base linear layer. What they cannot express (groups, partial outputs) is in its layout.

    Attributes:
        input_is_parallel: Whether the layer is row parallel: its weight is sharded along the input features.
        in_features, out_features: Sizes of the unsharded layer.
        disable_sequence_parallel_comm: Whether the adapter makes no sequence-parallel collective: there is no sequence
            parallel, or the input comes gathered already.
        base_linear_is_parallel: Whether the layer's weight is sharded at all.
    """

    input_is_parallel: bool
    in_features: int
    out_features: int
    disable_sequence_parallel_comm: bool
    base_linear_is_parallel: bool


def get_adapter_attributes_from_linear(m: nn.Module) -> AdapterAttributes:
    """Return attributes of the base layer, read from its registered layout.

    Args:
        m: Linear module.

    Raises:
        NotImplementedError: No layout is registered for the layer's type; the message names it.
    """
    layout = layout_of(m)
    parallel = layout.shard is not None
    communicates = parallel and Shard(0) in (layout.x, layout.y)
    return AdapterAttributes(
        input_is_parallel=layout.shard == "in",
        in_features=layout.in_features,
        out_features=layout.out_features,
        disable_sequence_parallel_comm=not communicates,
        base_linear_is_parallel=parallel,
    )
