"""The standalone adapter, for a base layer whose forward hides its collectives: its own, of [tokens, r].

h = x Aᵀ runs on x as it is outside the base. A column converts h from the state of x to R, a row from P to the state
of y; Δ = s h Bᵀ then is in the state of y (`LinearLayout.bottleneck_states`; the states are those of
`parallel/states.py`). So:

| base | h, forward | h, backward | gradient still partial |
|---|---|---|---|
| column | I -> R, nothing | all-reduce | none |
| column, sequence parallel | Shard(0) -> R, all-gather | reduce-scatter | dA |
| column whose x is R: the module around it reduces dx (†) | R, nothing | nothing | dA |
| row | P -> I, all-reduce | nothing | none |
| row, sequence parallel | P -> Shard(0), reduce-scatter | all-gather | dB |
| row, sequence parallel, `a2a_experimental` | P -> I -> R, all-reduce | all-reduce | none |
| row whose y is P: the module around it reduces y (†) | P, nothing | nothing | dB |

With `a2a_experimental` B is sharded along the output features, and an all-to-all exchanges Δ, Shard(-1) -> Shard(0).

(†) Experts, between the calls of a token dispatcher; and layers of a transformers model in a block of columns and a
row: its hidden stream is converted where the block begins and ends (`engines/hidden_stream.py`), with sequence parallel
or without.

Who sums what is still partial: the table of `decide_gradient_sum`.

Two more cases are outside the rule. Where x and y are both I, the sharded factor is gathered instead of an activation.
And an activation between the factors is not linear in a partial h: on a row that leaves a partial, h is reduced first,
and each rank multiplies its own columns of B.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from meshpeft.parallel import (
    FusedParts,
    I,
    LinearLayout,
    ModelParallelConfig,
    P,
    ParallelAxis,
    R,
    Shard,
    TensorLayout,
    all2all_hp2sp,
    convert,
    convert_parts,
    layout_of_tensor,
    parallel_group_info,
)
from meshpeft.peft.adapter import (
    DropoutPosition,
    InitMethod,
    LowRankAdapter,
    init_method_of,
    pad_seq_to_mult,
    unpad_seq_to_mult,
)
from meshpeft.peft.errors import AdapterError
from meshpeft.peft.fused import product

__all__ = ["ParallelLinearAdapter", "decide_gradient_sum", "summed_in_backward"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "swish": nn.SiLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


class ParallelLinearAdapter(LowRankAdapter):
    """Parallel Linear Adapter for Parameter-Efficient Fine-Tuning (PEFT) in distributed settings.

    input -> linear_in -> activation -> linear_out -> alpha / dim. Called with what the base layer is called with; its
    output is in the state of the base layer's output, to be added to it.

    Args:
        in_features, out_features: Sizes of the unsharded base layer.
        dim: Adapter bottleneck dimension (rank).
        base_linear_name: Full name of the base layer; with the seed it decides the initial values. B of a `linear_fc1`
            is sharded, and stored, as two matrices, gate and up (unless the config has `gated_linear_unit=False`).
        activation: `identity relu gelu swish silu tanh sigmoid`; another name is the identity, with a warning.
        column_init_method: Init method of linear_in, `xavier normal kaiming zero`.
        row_init_method: Init method of linear_out.
        input_is_parallel: Whether the base is row parallel.
        dropout: Probability.
        model_parallel_config: Config from which sequence parallel and the parameter dtype are read; never changed.
        alpha: The output is scaled by alpha / dim; `None` means dim.
        dropout_position: `pre` (on the input) or `post` (on the output).
        a2a_experimental: On a row-parallel base under sequence parallel, shard B along the output features and
            exchange its output by an all-to-all, instead of scattering h.
        is_expert: Whether the base belongs to one expert: expert-tensor parallel, whose dispatcher gathers tokens and
            sums outputs. Tokens are padded to a multiple of its size.
        disable_sequence_parallel_comm: The input comes with all tokens although the config is sequence parallel.
        base_linear_is_parallel: Whether the base's weight is sharded.
        layout: Layout of the base, where it is known; the flags above are then not read.
        fused: Run inside the base's GEMM (activation `identity`), see `LowRankAdapter`.
        dropout_recompute, path, use_rslora, keep_token_shards, seed, dtype, device: As in `LowRankAdapter`.
        kwargs: Other names are ignored, with a warning.

    Raises:
        NotImplementedError: Unknown init method.
        AdapterError: As in `check_options`; an activation between fused factors; a layout of which no standalone
            adapter is possible.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        dim: int,
        base_linear_name: str,
        activation: str = "swish",
        column_init_method: str = "xavier",
        row_init_method: str = "zero",
        input_is_parallel: bool = False,
        dropout: float = 0.0,
        model_parallel_config: ModelParallelConfig | None = None,
        alpha: float | None = None,
        dropout_position: DropoutPosition = "post",
        a2a_experimental: bool = False,
        is_expert: bool = False,
        disable_sequence_parallel_comm: bool = True,
        base_linear_is_parallel: bool = True,
        *,
        layout: LinearLayout | None = None,
        fused: bool = False,
        dropout_recompute: bool = False,
        path: str = "adapter",
        use_rslora: bool = False,
        keep_token_shards: bool = False,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs:
            warnings.warn(f"ParallelLinearAdapter: {', '.join(kwargs)} not known and ignored", stacklevel=2)
        self._check_layout(layout, fused, activation)
        if model_parallel_config is None:
            model_parallel_config = ModelParallelConfig(
                sequence_parallel=layout is not None and Shard(0) in (layout.x, layout.y)
            )
        config: Any = model_parallel_config
        if layout is None:
            layout = _layout_of_flags(
                in_features,
                out_features,
                input_is_parallel,
                is_expert,
                config.sequence_parallel,
                disable_sequence_parallel_comm,
                base_linear_is_parallel,
                _gate_and_up(base_linear_name, out_features, config),
            )
        use_a2a = a2a_experimental and not fused and layout.shard == "in" and layout.y == Shard(0)
        # Megatron sums what is marked over dense tensor parallel, and only if its config is sequence parallel.
        marks = not fused and config.sequence_parallel and not layout.is_expert
        factor_a, factor_b = layout.factor_a(dim, inside=fused), layout.factor_b(dim, inside=fused)
        if use_a2a:
            hidden_parallel = ((0, layout.axis),)
            factor_b = TensorLayout((layout.out_features, dim), hidden_parallel, data_axis=layout.data_axis)
        factor_a, sum_a = decide_gradient_sum(factor_a, layout, inside=fused, marked=marks)
        factor_b, sum_b = decide_gradient_sum(factor_b, layout, inside=fused, marked=marks)
        super().__init__(
            layout,
            dim,
            alpha,
            dropout=dropout,
            dropout_position=dropout_position,
            dropout_recompute=dropout_recompute,
            lora_A_init_method=column_init_method,
            lora_B_init_method=row_init_method,
            name=base_linear_name,
            path=path,
            fused=fused,
            use_rslora=use_rslora,
            keep_token_shards=keep_token_shards,
            seed=seed,
            dtype=_parameter_type(config) if dtype is None else dtype,
            device=device,
            initialize=config.perform_initialization,
            factor_layouts=(factor_a, factor_b),
        )
        self.config = model_parallel_config
        self.is_expert = is_expert or layout.is_expert
        self.activation = self._get_activation_fn(activation)
        self._a2a, self._marks, self._sum_a, self._sum_b = use_a2a, marks, sum_a, sum_b
        self._mark(self.linear_in.weight)
        self._mark(self.linear_out.weight)

    @staticmethod
    def _check_layout(layout: LinearLayout | None, fused: bool, activation: str) -> None:
        if fused and (layout is None or activation != "identity"):
            raise AdapterError(
                f"a fused adapter needs the base's layout, and activation='identity' instead of "
                f"{activation!r}: between its factors the values may be partial"
            )
        if layout is not None and layout.is_stacked:
            raise AdapterError("grouped experts get a GroupedExpertLinearAdapter")
        if not fused and layout is not None and layout.in_fused_parts is not None:
            raise AdapterError("a row-parallel layer with a stride cannot have a standalone adapter; use a fused one")

    @property
    def is_linear(self) -> bool:
        """Whether the activation is the identity."""
        return isinstance(self.activation, nn.Identity)

    def _mark(self, parameter: nn.Parameter) -> None:
        """Set the mark of parameters that the engine's gradient finalisation sums over tensor parallel."""
        layout = layout_of_tensor(parameter)
        if self._marks and layout is not None and layout.grad_partial:
            parameter.sequence_parallel = True  # type: ignore[attr-defined]  # Megatron's own convention

    def _get_activation_fn(self, activation: str) -> nn.Module:
        """Get activation function by name; the identity, with a warning, if the name is not known."""
        if activation not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            warnings.warn(f"activation {activation!r} is not one of {known}; using identity", stacklevel=3)
        return _ACTIVATIONS.get(activation, nn.Identity)()

    def _get_init_fn(self, init_method: str) -> InitMethod:
        """Get initialization function by method name; see `init_method_of`."""
        return init_method_of(init_method)

    def forward(self, x: Tensor) -> Tensor:
        """Forward pass of the parallel linear adapter.

        Args:
            x: Input of the base, in the state in which the base takes it.

        Returns:
            The adapter's output, scaled, in the state of the base's output.
        """
        return self.delta(x, self.linear_in.weight, self.linear_out.weight)

    def delta_of_dropped(self, x: Tensor, a: Tensor, b: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Return the adapter's output for given local factors A [r, in] and B [out, r]; `offsets` is `None`."""
        layout, axis, padding = self.layout, self.layout.axis, 0
        if self.is_expert:
            x, padding = pad_seq_to_mult(x, axis.world_size)
        a, b = summed_in_backward(a, self._sum_a), summed_in_backward(b, self._sum_b)
        if layout.is_full_outside and layout.shard == "in":
            a = convert(a, Shard(-1), I, axis)
        if layout.is_full_outside and layout.shard == "out":
            b = convert_parts(b, Shard(0), I, axis, layout.fused_parts, dim=0)
        delta = product(self._bottleneck(x, a) * self.scale, b)
        if self._a2a:
            delta = all2all_hp2sp(delta, axis)
        elif layout.shard == "out" and not layout.is_full_outside:
            delta = convert_parts(delta, Shard(-1), layout.y, axis, layout.fused_parts)
        return unpad_seq_to_mult(delta, padding)

    def _bottleneck(self, x: Tensor, a: Tensor) -> Tensor:
        """Return act(x Aᵀ) [*, r] in the state in which B takes it; the collectives are on [tokens, r]."""
        layout, axis = self.layout, self.layout.axis
        if layout.shard != "in" or layout.is_full_outside:
            h: Tensor = self.activation(product(x, a))
            return h if layout.is_full_outside else convert(h, *layout.bottleneck_states, axis)
        h = product(convert(x, layout.x, Shard(-1), axis), a)
        if self._a2a:
            return convert(self.activation(convert(h, P, I, axis)), I, R, axis)
        if layout.y is P and not self.is_linear:
            return convert(self.activation(convert(h, P, I, axis)), I, R, axis) * _own_columns(h, axis)
        activated: Tensor = self.activation(convert(h, *layout.bottleneck_states, axis))
        return activated


def decide_gradient_sum(
    stated: TensorLayout, base: LinearLayout, *, inside: bool, marked: bool = False
) -> tuple[TensorLayout, tuple[ParallelAxis, ...]]:
    """Decide who sums the partial gradient of an adapter's parameter.

    | adapter | who |
    |---|---|
    | fused | `finalize_gradients`, after the last backward pass |
    | standalone, sequence parallel (†), not an expert | `finalize_gradients`, or Megatron's, which reads the mark |
    | standalone, on grouped experts | `finalize_gradients`, or the engine, where `LinearLayout.engine_sums_gradient` |
    | any other | the backward pass, see `summed_in_backward` |

    (†) By the adapter's `model_parallel_config`; without one, where x or y of the layer is Shard(0).

    Args:
        stated: The parameter's layout, by the layout of its base.
        base: The layout of the base layer.
        inside: The adapter is fused: it runs inside the base, between its `enter` and `exit`.
        marked: The parameter carries the mark that Megatron's finalisation reads.

    Returns:
        The parameter's layout, with the axes that are left to a sum after the backward pass as `grad_partial`; and the
        axes over which the backward pass sums.
    """
    summed_later = inside or marked
    if base.is_stacked and not inside:
        # No mark on grouped experts: their engine sums some layouts, or without an engine finalize_gradients sums all.
        summed_later = base.engine_sums_gradient is None or base.engine_sums_gradient(stated)
    if summed_later:
        return stated, ()
    return replace(stated, grad_partial=()), stated.grad_partial


def summed_in_backward(parameter: Tensor, axes: tuple[ParallelAxis, ...]) -> Tensor:
    """Return a parameter as it enters the forward pass: I -> R over `axes`, where its gradient is then summed."""
    for axis in axes:
        parameter = convert(parameter, I, R, axis)
    return parameter


def _layout_of_flags(
    in_features: int,
    out_features: int,
    input_is_parallel: bool,
    is_expert: bool,
    sequence_parallel: bool,
    disable_sequence_parallel_comm: bool,
    base_linear_is_parallel: bool,
    fused_parts: FusedParts | None = None,
) -> LinearLayout:
    """Return the layout that the documented flags describe, with the parts of the output features if there are any.

    Experts see gathered tokens and leave their sums to the token dispatcher.
    """
    info = parallel_group_info()
    axis = info.etp if is_expert else info.tp
    token_shards = sequence_parallel and not is_expert
    sizes = (in_features, out_features)
    if not base_linear_is_parallel:
        return LinearLayout(*sizes, axis=axis, x=Shard(0) if token_shards else I, fused_parts=fused_parts)
    communicates = token_shards and not disable_sequence_parallel_comm
    if input_is_parallel:
        y = P if is_expert else Shard(0) if communicates else I
        return LinearLayout(*sizes, shard="in", axis=axis, y=y, fused_parts=fused_parts)
    x = Shard(0) if communicates else R if is_expert or sequence_parallel else I
    return LinearLayout(*sizes, shard="out", axis=axis, x=x, fused_parts=fused_parts)


def _parameter_type(config: Any) -> torch.dtype:
    """Return the type of new parameters by a parallel config, ours or Megatron's."""
    if config.bf16:
        return torch.bfloat16
    return torch.float16 if config.fp16 else config.params_dtype


def _gate_and_up(base_linear_name: str, out_features: int, config: Any) -> FusedParts | None:
    """Return the parts of a `linear_fc1`, which is sharded as two matrices, `[gate shard; up shard]`; else `None`.

    It is gated unless its config (Megatron's) has `gated_linear_unit=False`, or its size cannot be halved.
    """
    gated = getattr(config, "gated_linear_unit", True) and out_features % 2 == 0
    if not gated or base_linear_name.rpartition(".")[2] != "linear_fc1":
        return None
    return FusedParts(("gate", "up"), (out_features // 2, out_features // 2))


def _own_columns(h: Tensor, axis: ParallelAxis) -> Tensor:
    """Return [r] of ones and zeros: the columns of h that this rank multiplies, each column on one rank."""
    rank, size = h.shape[-1], axis.world_size
    owner = torch.arange(rank) * size // rank
    masks = (owner == torch.arange(size).unsqueeze(1)).to(dtype=h.dtype, device=h.device)
    return TensorLayout((size, rank), ((0, axis),)).slice(masks)[0]
