"""What a layout does to the decoder: the state of every tensor, and the parallel layer in every place.

The other files of models/ say what is computed; which part of it a rank holds stands here alone.

| tensor | over tensor parallel | with sequence parallel |
|---|---|---|
| token ids, positions, masks | R | R |
| hidden stream, into and out of every block and norm | I | Shard(0): shards of the sequence |
| heads [seq, batch, heads, head_dim] | Shard(2) | Shard(2) |
| channels of an MLP | Shard(-1) | Shard(-1) |
| tokens at the router and the experts | Shard(0), scattered before and gathered after | Shard(0), as they come |
| logits | Shard(-1) | Shard(-1) |

Over context parallel, every tensor of tokens is sharded along the sequence, but for the keys and values that attention
meets, which are gathered: R (`gather_keys` in `spans.py`).

| parameter | sharded | its gradient |
|---|---|---|
| `embedding`, `output_layer` | by vocabulary, where tensor parallel divides it; else replicated | complete |
| `linear_qkv`, `linear_fc1` | column, by query groups and by channels | complete |
| `linear_proj`, `linear_fc2` | row | complete |
| experts' `linear_fc1`, `linear_fc2` | over expert parallel; column and row over expert-tensor parallel | complete |
| norms, gates | replicated | partial where the hidden stream is sharded |
| norms of heads, routers | replicated | partial |

Token axes (data and context parallel) shard the batch before the model has it; `ParallelGroupInfo.token_axes` names
them.

Where `--sequence-parallel` takes effect: `ModelSharding.of` makes the hidden stream (`hidden`) Shard(0) instead of I.
The third column follows from that one field: which `enter` and `exit` the linear layers get, that norms run on shards
and their gradients are partial, what the router sees, that the embedding scatters and the head gathers. A model of
transformers has the same with its tokens in the second dim, Shard(1): `HiddenStream` (`engines/hidden_stream.py`)
converts where its attention and MLP modules begin and end.

The last two rows are one rule: the gradient of a replicated parameter is partial exactly where the activation that it
meets is not I. The collectives are those of the layers (`parallel/linear.py`, `parallel/embedding.py`), of the token
dispatch (`parallel/dispatch.py`), and of the passages at the end of `ModelSharding`, each one `convert` between two
states stated here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshpeft.models.config import DecoderConfig, ModelError, MoEConfig
from meshpeft.parallel import (
    ColumnParallelLinear,
    FusedParts,
    GroupedColumnParallelLinear,
    GroupedRowParallelLinear,
    I,
    LinearLayout,
    ModelParallelConfig,
    P,
    ParallelAxis,
    R,
    RowParallelLinear,
    Shard,
    State,
    TensorLayout,
    VocabParallelEmbedding,
    convert,
    parallel_group_info,
    set_layout,
)
from meshpeft.parallel.states import take_slice
from meshpeft.parallel.typing import assert_state

__all__ = ["ModelSharding", "check_divisible"]


@dataclass(frozen=True)
class ModelSharding:
    """The layout of a decoder: handed to every constructor, which takes its layers and parameters from it.

    Without arguments, a model on one rank.

    Attributes:
        tp, ep, etp: Axes that shard dense layers, the experts of a layer, and each expert.
        cp: Axis that shards the tokens of every row.
        hidden: State of the hidden stream [seq, batch, hidden] over `tp`: I, or Shard(0) under sequence parallel.
        shards_vocabulary: Whether `tp` divides the vocabulary; otherwise table and head are replicated.
        device: Device of the parameters.
        dtype: Type of the parameters and activations.
        perform_initialization: Whether a new model draws its weights; otherwise they are left empty.
    """

    tp: ParallelAxis = field(default_factory=lambda: ParallelAxis("tp"))
    ep: ParallelAxis = field(default_factory=lambda: ParallelAxis("ep"))
    etp: ParallelAxis = field(default_factory=lambda: ParallelAxis("etp"))
    cp: ParallelAxis = field(default_factory=lambda: ParallelAxis("cp"))
    hidden: State = I
    shards_vocabulary: bool = True
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    perform_initialization: bool = True

    @classmethod
    def of(
        cls,
        config: DecoderConfig,
        parallel: ModelParallelConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ModelSharding:
        """Lay a decoder over the mesh as it is; arguments as in `Decoder`.

        Raises:
            ModelError: The sizes do not divide over the mesh, or are not the mesh's.
        """
        info = parallel_group_info()
        tp = info.tp
        if parallel is None:
            parallel = ModelParallelConfig(
                tensor_model_parallel_size=tp.world_size,
                context_parallel_size=info.cp.world_size,
                expert_model_parallel_size=1 if config.moe is None else info.ep.world_size,
                expert_tensor_parallel_size=info.etp.world_size,
            )
        check_divisible(config, parallel)
        etp = parallel.expert_tensor_parallel_size
        sizes = {
            "tensor_model_parallel_size": (parallel.tensor_model_parallel_size, tp),
            "context_parallel_size": (parallel.context_parallel_size, info.cp),
        }
        if config.moe is not None:
            sizes["expert_model_parallel_size"] = (parallel.expert_model_parallel_size, info.ep)
            sizes["expert_tensor_parallel_size"] = (tp.world_size if etp is None else etp, info.etp)
        for name, (size, axis) in sizes.items():
            if size != axis.world_size:
                raise ModelError(
                    f"{name}={size}, but the mesh has {axis.name}={axis.world_size}; call init_parallelism with the "
                    "same size first"
                )
        return cls(
            tp,
            info.ep,
            info.etp,
            info.cp,
            hidden=Shard(0) if parallel.sequence_parallel and tp.world_size > 1 else I,
            shards_vocabulary=config.vocab_size % tp.world_size == 0,
            device=torch.get_default_device() if device is None else torch.device(device),
            dtype=parallel.dtype if dtype is None else dtype,
            perform_initialization=parallel.perform_initialization,
        )

    @property
    def vocab(self) -> ParallelAxis:
        """The axis that shards the vocabulary."""
        return self.tp if self.shards_vocabulary else ParallelAxis("none")

    # The other states over tensor parallel.

    @property
    def tokens(self) -> State:
        """Token ids, positions, documents [batch, seq]: the same on every rank."""
        return R

    @property
    def at_vocabulary(self) -> State:
        """The hidden stream as table and head have it: full where the vocabulary is replicated."""
        return self.hidden if self.shards_vocabulary else I

    @property
    def heads(self) -> State:
        """Queries, keys and values [seq, batch, heads, head_dim]: each rank has its own query groups."""
        return Shard(2)

    @property
    def routed(self) -> State:
        """Tokens at the router [tokens, hidden]: each is routed by one rank."""
        return Shard(0)

    # The layers and parameters, in the order in which a token meets them: state of x -> state of y.

    def embedding(self, vocab_size: int, hidden_size: int) -> VocabParallelEmbedding:
        """`tokens` -> `at_vocabulary`."""
        return VocabParallelEmbedding(
            vocab_size,
            hidden_size,
            sequence_parallel=self.at_vocabulary is not I,
            axis=self.vocab,
            **self._empty,
        )

    def norm_weight(self, size: int) -> nn.Parameter:
        """`hidden` -> `hidden`: a replicated weight."""
        return self._replicated(size, self.hidden)

    def head_norm_weight(self, size: int) -> nn.Parameter:
        """`heads` -> `heads`: a replicated weight, for the channels of each head."""
        return self._replicated(size, self.heads)

    def linear_qkv(self, in_features: int, out_features: int, *, bias: bool, parts: FusedParts) -> ColumnParallelLinear:
        """`hidden` -> `heads`."""
        return self._column(in_features, out_features, bias, parts)

    def linear_proj(self, in_features: int, out_features: int, *, bias: bool) -> RowParallelLinear:
        """`heads` -> `hidden`."""
        return self._row(in_features, out_features, bias)

    def linear_fc1(self, in_features: int, out_features: int, *, bias: bool, parts: FusedParts) -> ColumnParallelLinear:
        """`hidden` -> Shard(-1), channels."""
        return self._column(in_features, out_features, bias, parts)

    def linear_fc2(self, in_features: int, out_features: int, *, bias: bool) -> RowParallelLinear:
        """Shard(-1), channels -> `hidden`."""
        return self._row(in_features, out_features, bias)

    def router_layout(self, in_features: int, out_features: int) -> LinearLayout:
        """`routed` -> `routed`: a replicated weight."""
        return self._plain(in_features, out_features, self.routed)

    def expert_fc1(self, moe: MoEConfig, in_features: int, *, parts: FusedParts) -> GroupedColumnParallelLinear:
        """Tokens of the local experts, R over `etp` -> Shard(-1), channels."""
        return GroupedColumnParallelLinear(
            moe.num_experts,
            in_features,
            sum(parts.sizes),
            fused_parts=parts,
            expert_axis=self.ep,
            axis=self.etp,
            config=moe,
            **self._empty,
        )

    def expert_fc2(self, moe: MoEConfig, out_features: int) -> GroupedRowParallelLinear:
        """Shard(-1), channels -> P over `etp`, summed where the tokens are combined."""
        return GroupedRowParallelLinear(
            moe.num_experts,
            moe.intermediate_size,
            out_features,
            expert_axis=self.ep,
            axis=self.etp,
            config=moe,
            **self._empty,
        )

    def gate_layout(self, in_features: int, out_features: int) -> LinearLayout:
        """`hidden` -> `hidden`: a replicated weight."""
        return self._plain(in_features, out_features, self.hidden)

    def output_layer(self, hidden_size: int, vocab_size: int) -> ColumnParallelLinear:
        """`at_vocabulary` -> Shard(-1) over `vocab`."""
        return ColumnParallelLinear(
            hidden_size,
            vocab_size,
            bias=False,
            gather_output=False,
            sequence_parallel=self.at_vocabulary is not I,
            axis=self.vocab,
            **self._empty,
        )

    def parameter(self, layout: TensorLayout) -> nn.Parameter:
        """Make an empty parameter."""
        made = nn.Parameter(torch.empty(layout.local_shape, device=self.device, dtype=self.dtype))
        set_layout(made, layout)
        return made

    # The passages of the hidden stream between layers of different states.

    def padding(self, length: int) -> int:
        """Return how many tokens are added to a row of `length`, so that `hidden` divides over tensor parallel."""
        return 0 if self.hidden is I else -length % self.tp.world_size

    def enter_blocks(self, embedded: Tensor) -> Tensor:
        """`at_vocabulary` -> `hidden`."""
        return convert(embedded, self.at_vocabulary, self.hidden, self.tp)

    def check(self, x: Tensor, state: State) -> None:
        """Check that x is in one of the states stated here, where the type checker runs."""
        assert_state(x, state, self.tp)

    def to_experts(self, hidden: Tensor) -> Tensor:
        """`hidden` [seq, batch, hidden] -> `routed` [own tokens, hidden]; zeros fill up what does not divide."""
        tokens = hidden.flatten(0, 1)
        return convert(self._padded(tokens) if self.hidden is I else tokens, self.hidden, self.routed, self.tp)

    def from_experts(self, own: Tensor, hidden: Tensor) -> Tensor:
        """Convert the experts' results, `routed`, to the state and shape of `hidden`, from which the tokens came."""
        tokens = convert(own, self.routed, self.hidden, self.tp)
        if self.hidden is I:  # without the padding
            tokens = tokens[: hidden.shape[0] * hidden.shape[1]]
        return tokens.view(hidden.shape)

    def own_tokens(self, values: Tensor) -> Tensor:
        """Take the values of this rank's `routed` tokens: [seq, batch, *], R -> [own tokens, *]. No gradient."""
        return take_slice(self._padded(values.flatten(0, 1)), self.tp, 0)

    def sum_over_tokens(self, values: Tensor) -> Tensor:
        """Add up what the ranks have of their own tokens: P -> I over tensor parallel, P -> R over context parallel.

        What is made of the sum is weighted with other targets on each rank of context parallel.
        """
        return convert(convert(convert(values, P, I, self.tp), P, I, self.cp), I, R, self.cp)

    def last_token(self, hidden: Tensor, length: int) -> Tensor:
        """Keep token number `length - 1` of `hidden`, on each rank: [1, batch, hidden]."""
        last = convert(hidden, self.hidden, I, self.tp)[length - 1 : length]
        return last if self.hidden is I else convert(last.expand(self.tp.world_size, -1, -1), I, self.hidden, self.tp)

    def leave_blocks(self, hidden: Tensor) -> Tensor:
        """`hidden` -> `at_vocabulary`."""
        return convert(hidden, self.hidden, self.at_vocabulary, self.tp)

    def gather_logits(self, logits: Tensor) -> Tensor:
        """Gather the full vocabulary: Shard(-1) -> I over `vocab`."""
        return convert(logits, Shard(-1), I, self.vocab)

    @property
    def _empty(self) -> dict[str, Any]:
        return {"device": self.device, "dtype": self.dtype, "perform_initialization": False}

    def _column(self, in_features: int, out_features: int, bias: bool, parts: FusedParts) -> ColumnParallelLinear:
        """`hidden` -> Shard(-1)."""
        return ColumnParallelLinear(
            in_features,
            out_features,
            bias=bias,
            gather_output=False,
            sequence_parallel=self.hidden is not I,
            fused_parts=parts,
            axis=self.tp,
            **self._empty,
        )

    def _row(self, in_features: int, out_features: int, bias: bool) -> RowParallelLinear:
        """Shard(-1) -> `hidden`."""
        return RowParallelLinear(
            in_features,
            out_features,
            bias=bias,
            input_is_parallel=True,
            sequence_parallel=self.hidden is not I,
            axis=self.tp,
            **self._empty,
        )

    def _plain(self, in_features: int, out_features: int, x: State) -> LinearLayout:
        return LinearLayout(in_features, out_features, axis=self.tp, x=x)

    def _replicated(self, size: int, x: State) -> nn.Parameter:
        partial = x is not I and self.tp.world_size > 1
        return self.parameter(TensorLayout((size,), grad_partial=(self.tp,) if partial else ()))

    def _padded(self, tokens: Tensor) -> Tensor:
        """[tokens, *] with rows of zeros behind, up to a multiple of the axis's size."""
        missing = -tokens.shape[0] % self.tp.world_size
        return functional.pad(tokens, (0, 0, 0, missing)) if missing else tokens


def check_divisible(config: DecoderConfig, parallel: ModelParallelConfig) -> None:
    """Check that a decoder divides over the mesh. Needs no process group, and gives every rank the same answer.

    Raises:
        ModelError: A size does not divide, or there is no such layout; the message names the sizes that would work for
            the full model.
    """
    tp, ep = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    etp = tp if parallel.expert_tensor_parallel_size is None else parallel.expert_tensor_parallel_size
    if parallel.pipeline_model_parallel_size != 1:
        raise ModelError(
            f"pipeline_parallel={parallel.pipeline_model_parallel_size}: the decoder has no pipeline stages; use 1"
        )
    for name, size in (("tensor_parallel", tp), ("expert_parallel", ep), ("expert_tensor_parallel", etp)):
        if size < 1:
            raise ModelError(f"{name}={size}: expected at least 1")
    sizes = {"linear_qkv": (config.num_query_groups, "query groups")}
    if len(config.expert_layers) < config.num_layers:
        sizes["linear_fc1"] = (config.intermediate_size, "channels (intermediate_size)")
    moe = config.moe
    if moe is not None and moe.shared_intermediate_size is not None:
        sizes["shared_experts"] = (moe.shared_intermediate_size, "channels")
    _check_split(sizes, "tensor_parallel", tp)
    if moe is None:
        if ep != 1:
            raise ModelError(f"expert_parallel={ep}: a {config.model_type} model has no experts; use 1")
        return
    _check_split({"experts": (moe.num_experts, "experts of a layer")}, "expert_parallel", ep)
    _check_split({"experts": (moe.intermediate_size, "channels of an expert")}, "expert_tensor_parallel", etp)


def _check_split(sizes: Mapping[str, tuple[int, str]], axis: str, count: int) -> None:
    common = math.gcd(*(size for size, _ in sizes.values()))
    for name, (size, what) in sizes.items():
        if size % count:
            raise ModelError(f"{name}: {size} {what} cannot be split over {axis}={count}; use {_divisors(common)}")


def _divisors(number: int) -> str:
    """Return the divisors of a number as a choice: `1, 2 or 4`."""
    # Nobody has more processes; a number may be of any size.
    found = [str(value) for value in range(1, min(number, 4096) + 1) if number % value == 0]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"
