"""Stand-ins for Transformer Engine's layers as Megatron-Core wraps them, which can't be installed here.

They have the attributes that `meshpeft.engines.transformer_engine` reads, make the same collectives in the same places,
and return the same tuples. Sizes are this rank's, as theirs are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from meshpeft.engines import axis_of_group
from meshpeft.engines.transformer_engine import register_te_layers
from meshpeft.parallel import mp_copy, mp_reduce, sp_gather, sp_reduce_scatter


class StandInLinear(nn.Module):
    """As `TELinear`: undivided, with `parallel_mode=None`."""

    mode: str | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        config: Any,
        init_method: Any,
        bias: bool,
        skip_bias_add: bool = False,
        is_expert: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        dense, expert = parallel_state.get_tensor_model_parallel_group, parallel_state.get_expert_tensor_parallel_group
        self._tp_group = self.tp_group = expert() if is_expert else dense()
        self.axis = axis_of_group("etp" if is_expert else "tp", self._tp_group)
        self.in_features = in_features // (self.axis.world_size if "Row" in type(self).__name__ else 1)
        self.out_features = out_features // (self.axis.world_size if "Column" in type(self).__name__ else 1)
        # Their collectives are off where a dispatcher makes them.
        hidden = is_expert and (self.axis.world_size > 1 or config.expert_model_parallel_size > 1)
        self.parallel_mode = None if hidden else self.mode
        self.sequence_parallel = config.sequence_parallel and self.parallel_mode is not None
        self.te_return_bias = skip_bias_add and bias
        self.weight = nn.Parameter(torch.zeros(self.out_features, self.in_features, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros(self.out_features, dtype=config.params_dtype)) if bias else None

    def enter(self, x: Tensor) -> Tensor:
        if self.parallel_mode != "column":
            return x
        return sp_gather(x, 0, self.axis) if self.sequence_parallel else mp_copy(x, axis=self.axis)

    def exit(self, y: Tensor) -> Tensor:
        if self.parallel_mode == "row":
            y = sp_reduce_scatter(y, 0, self.axis) if self.sequence_parallel else mp_reduce(y, axis=self.axis)
        return y if self.bias is None or self.te_return_bias else y + self.bias

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y = self.exit(F.linear(self.enter(x), self.weight))
        return y, self.bias if self.te_return_bias else None


class StandInColumn(StandInLinear):
    mode = "column"


class StandInRow(StandInLinear):
    mode = "row"


class StandInLayerNormColumn(StandInLinear):
    """As `TELayerNormColumnParallelLinear`; the norm has no weights."""

    mode = "column"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.return_layernorm_output = False
        self.return_layernorm_output_gathered = False

    def forward(self, x: Tensor) -> Any:
        normalised = F.layer_norm(x, x.shape[-1:])
        entered = self.enter(normalised)
        y = self.exit(F.linear(entered, self.weight))
        if not self.return_layernorm_output:
            return y, self.bias if self.te_return_bias else None
        seen = entered if self.return_layernorm_output_gathered else normalised
        return (y, self.bias, seen) if self.te_return_bias else ((y, seen), None)


class StandInGrouped(nn.Module):
    """As `TEGroupedLinear`; sizes are global, and its products are made one expert after the other."""

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        pg_collection: Any,
        bias: bool = False,
        skip_bias_add: bool = False,
        is_expert: bool = True,
        **_: Any,
    ) -> None:
        super().__init__()
        column = "Column" in type(self).__name__
        self.config, self.num_gemms, self.sequence_parallel = config, num_gemms, False
        self.te_return_bias = skip_bias_add and bias
        self._pg_collection, self._tp_group = pg_collection, pg_collection.expt_tp
        size, self.expert_parallel = self._tp_group.size(), config.expert_model_parallel_size > 1
        hidden = size > 1 or self.expert_parallel  # their collectives are off: the dispatcher makes them
        self.parallel_mode = None if hidden else "column" if column else "row"
        self.in_features = input_size if column else input_size // size
        self.out_features = output_size // size if column else output_size
        dtype = config.params_dtype
        for index in range(num_gemms):
            weight = nn.Parameter(torch.zeros(self.out_features, self.in_features, dtype=dtype))
            weight.allreduce = not self.expert_parallel  # type: ignore[attr-defined]
            self.register_parameter(f"weight{index}", weight)
            if bias:
                self.register_parameter(f"bias{index}", nn.Parameter(torch.zeros(self.out_features, dtype=dtype)))

    def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, list[Tensor] | None]:
        biases = [getattr(self, f"bias{index}", None) for index in range(self.num_gemms)]
        inside = [None] * self.num_gemms if self.te_return_bias else biases
        y = [
            F.linear(rows, getattr(self, f"weight{index}"), bias)
            for index, (rows, bias) in enumerate(zip(x.split(m_splits), inside, strict=True))
        ]
        return torch.cat(y), biases if self.te_return_bias else None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Its weights, as those of Megatron's wrapper but for the states of float8."""
        ep, found = self._pg_collection.ep, {}
        for index in range(self.num_gemms):
            expert = (len(sharded_offsets), ep.rank() * self.num_gemms + index, ep.size() * self.num_gemms)
            found[f"{prefix}weight{index}"] = make_sharded_tensors_for_checkpoint(
                {"weight": self.get_parameter(f"weight{index}")},
                prefix,
                {"weight": 0 if "Column" in type(self).__name__ else 1},
                (*sharded_offsets, expert),
                tp_group=self._tp_group,
                dp_cp_group=metadata["dp_cp_group"],
            )[f"{prefix}weight"]
        for entry in found.values():
            entry.replica_id = (*entry.replica_id[:2], self._pg_collection.expt_dp.rank())
        return found


class StandInColumnGrouped(StandInGrouped):
    pass


class StandInRowGrouped(StandInGrouped):
    pass


register_te_layers(
    [StandInLinear, StandInGrouped],
    columns=[StandInColumn, StandInLayerNormColumn, StandInColumnGrouped],
    rows=[StandInRow, StandInRowGrouped],
)
