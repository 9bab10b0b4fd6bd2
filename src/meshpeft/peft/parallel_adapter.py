"""The adapter beside a base layer whose forward hides its collectives: its own communication, on tensors of rank size.

| base | forward | backward | gradient still partial |
|---|---|---|---|
| column | h = x A^T, A replicated; h passes through `mp_copy`; Delta = h B^T, B S(0) | all-reduce of dh | none |
| column, sequence parallel | h on local tokens, all-gather h | reduce-scatter dh | dA |
| column whose dx the producer reduces | h = x A^T, no collective | none | dA |
| column, output gathered | Delta = x A^T B^T, B gathered | dB is sliced | none |
| row | h = x A^T, A S(1), all-reduce h; Delta = h B^T, B replicated | dh is complete | none |
| row, input whole | Delta = x A^T B^T, A gathered | dA is sliced | none |
| row, sequence parallel | reduce-scatter h along tokens | all-gather dh | dB |
| row whose base leaves a partial | no reduction: Delta is a partial too | | dB |
| the same, activation not identity | all-reduce h, each rank takes its columns of B | all-reduce dh | dB |
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from meshpeft.parallel import (
    LinearLayout,
    ModelParallelConfig,
    ParallelAxis,
    TensorLayout,
    all2all_hp2sp,
    gather_features,
    layout_of_tensor,
    mp_copy,
    mp_gather,
    mp_reduce,
    mp_scatter,
    sp_gather,
    sp_reduce_scatter,
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
from meshpeft.peft.standalone_layout import copied, gate_and_up, layout_of_flags, parameter_type, place

__all__ = ["ParallelLinearAdapter"]

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
        in_features, out_features: of the unsharded base layer.
        dim: adapter bottleneck dimension (rank).
        base_linear_name: full name of the base layer; with the seed it decides the initial values. B of a `linear_fc1`
            is divided, and stored, as two matrices, gate and up (unless the config says `gated_linear_unit=False`).
        activation: `identity relu gelu swish silu tanh sigmoid`; another name is the identity, with a warning.
        column_init_method: of linear_in, `xavier normal kaiming zero`.
        row_init_method: of linear_out.
        input_is_parallel: the base is row parallel.
        dropout: probability.
        model_parallel_config: sequence parallel and the type of the parameters are read from it; never changed.
        alpha: the output is scaled by alpha / dim; `None` means dim.
        dropout_position: `pre` (on the input) or `post` (on the output).
        a2a_experimental: on a row-parallel base under sequence parallel, divide B along the output features and
            exchange its output by an all-to-all, instead of scattering h.
        is_expert: the base belongs to one expert: expert-tensor parallel, whose dispatcher gathers tokens and sums
            outputs. Tokens are padded to a multiple of its size.
        disable_sequence_parallel_comm: the input comes with all tokens although the config is sequence parallel.
        base_linear_is_parallel: false for a base with an undivided weight.
        layout: of the base, where it is known; the flags above are then not read.
        fused: the adapter joins its base between `enter` and `exit` (activation `identity`), see `LowRankAdapter`.
        dropout_recompute, path, use_rslora, keep_token_shards, seed, dtype, device: as in `LowRankAdapter`.
        kwargs: other names are ignored, with a warning.

    Raises:
        NotImplementedError: an unknown init method.
        AdapterError: as in `check_options`; an activation between fused factors; a layout that cannot run beside
            its base.
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
                sequence_parallel=layout is not None and layout.sequence_parallel
            )
        config: Any = model_parallel_config
        if layout is None:
            layout = layout_of_flags(
                in_features,
                out_features,
                input_is_parallel,
                is_expert,
                config.sequence_parallel,
                disable_sequence_parallel_comm,
                base_linear_is_parallel,
                gate_and_up(base_linear_name, out_features, config),
            )
        row_of_sequence = layout.shard == "in" and layout.sequence_parallel and not layout.output_is_partial
        use_a2a = a2a_experimental and row_of_sequence and not fused
        # Megatron sums what is marked over dense tensor parallel, and only if its config is sequence parallel.
        marks = not fused and config.sequence_parallel and not layout.is_expert
        factor_a, copy_a = place(layout.factor_a(dim, fused=fused), fused or marks)
        factor_b, copy_b = place(layout.factor_b(dim, fused=fused), fused or marks)
        if use_a2a:
            hidden_parallel = ((0, layout.axis),)
            factor_b = TensorLayout((layout.out_features, dim), hidden_parallel, data_axis=layout.data_axis)
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
            dtype=parameter_type(config) if dtype is None else dtype,
            device=device,
            initialize=config.perform_initialization,
            factor_layouts=(factor_a, factor_b),
        )
        self.config = model_parallel_config
        self.is_expert = is_expert or layout.is_expert
        self.activation = self._get_activation_fn(activation)
        self._a2a, self._marks, self._copy_a, self._copy_b = use_a2a, marks, copy_a, copy_b
        self._mark(self.linear_in.weight)
        self._mark(self.linear_out.weight)

    @staticmethod
    def _check_layout(layout: LinearLayout | None, fused: bool, activation: str) -> None:
        if fused and (layout is None or activation != "identity"):
            raise AdapterError(
                f"an adapter that joins its base needs the base's layout, and activation='identity' instead of "
                f"{activation!r}: between its factors the values may be summands"
            )
        if layout is not None and layout.is_stacked:
            raise AdapterError("grouped experts get a GroupedExpertLinearAdapter")
        if not fused and layout is not None and layout.in_fused_parts is not None:
            raise AdapterError("an adapter beside a row-parallel layer with a stride is not possible; use a fused one")

    @property
    def is_linear(self) -> bool:
        """Whether the activation is the identity."""
        return isinstance(self.activation, nn.Identity)

    def _mark(self, parameter: nn.Parameter) -> None:
        """Tell the engine's gradient finalisation which parameters it has to sum over tensor parallel."""
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
            x: the base's input, in the state that the base takes it.

        Returns:
            The adapter's output, scaled, in the state of the base's output.
        """
        return self.delta(x, self.linear_in.weight, self.linear_out.weight)

    def delta_of_dropped(self, x: Tensor, a: Tensor, b: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Return the adapter's output for given local factors A [r, in] and B [out, r]; `offsets` is `None`."""
        padding = 0
        if self.is_expert:
            x, padding = pad_seq_to_mult(x, self.layout.axis.world_size)
        a, b = copied(a, self._copy_a), copied(b, self._copy_b)
        layout = self.layout
        whole = self._is_whole_outside
        if whole and layout.shard == "in":
            a = mp_gather(a, -1, layout.axis)
        if whole and layout.shard == "out":
            b = gather_features(b, layout, 0)
        h = self._bottleneck(x, a) * self.scale
        delta = product(h, b)
        if self._a2a:
            delta = all2all_hp2sp(delta, self.layout.axis)
        if layout.gather_output and not whole:
            delta = gather_features(delta, layout)
        return unpad_seq_to_mult(delta, padding)

    @property
    def _is_whole_outside(self) -> bool:
        """Whether input and output are the same on every rank, so that whole factors serve, and no activation moves."""
        layout = self.layout
        if layout.sequence_parallel or layout.input_grad_is_reduced_outside or layout.output_is_partial:
            return False
        return layout.gather_output if layout.shard == "out" else layout.shard == "in" and not layout.input_is_parallel

    def _bottleneck(self, x: Tensor, a: Tensor) -> Tensor:
        """act(x A^T) [*, r], in the state in which B takes it; the collectives are on [tokens, r]."""
        layout, axis = self.layout, self.layout.axis
        if self._is_whole_outside or layout.shard is None:
            return self.activation(product(x, a))
        if layout.shard == "out":
            h: Tensor = self.activation(product(x, a))
            if layout.input_grad_is_reduced_outside:
                return h
            return sp_gather(h, 0, axis) if layout.sequence_parallel else mp_copy(h, axis=axis)
        h = product(x if layout.input_is_parallel else mp_scatter(x, -1, axis), a)
        if layout.output_is_partial:
            if isinstance(self.activation, nn.Identity):
                return h
            return mp_copy(self.activation(mp_reduce(h, axis=axis)), axis=axis) * _own_columns(h, axis)
        if self._a2a:
            return mp_copy(self.activation(mp_reduce(h, axis=axis)), axis=axis)
        return self.activation(sp_reduce_scatter(h, 0, axis) if layout.sequence_parallel else mp_reduce(h, axis=axis))


def _own_columns(h: Tensor, axis: ParallelAxis) -> Tensor:
    """[r] of ones and zeros: the columns of h that are this rank's to multiply, each column on one rank."""
    rank, size = h.shape[-1], axis.world_size
    owner = torch.arange(rank) * size // rank
    masks = (owner == torch.arange(size).unsqueeze(1)).to(dtype=h.dtype, device=h.device)
    return TensorLayout((size, rank), ((0, axis),)).slice(masks)[0]
