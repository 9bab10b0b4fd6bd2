"""The type check: the model's forward, once, at the full world size, on a fake process group without memory.

Every tensor gets its state on every mesh axis from its layout, and `spmd_types` follows the states through the
forward: a missing reduction, a partial value that meets a full one or a nonlinearity, a factor that is summed twice
is an error before a GPU hour is spent. Backward code is not checked; that is what the oracle's numbers are for.
"""

from __future__ import annotations

from collections.abc import Callable

import spmd_types as spmd
import torch
from spmd_types import checker
from spmd_types.types import PartitionSpec, V
from torch import Tensor, nn

from meshpeft.data.context import ContextShard
from meshpeft.models import Decoder, DecoderConfig, LanguageModel
from meshpeft.models.spans import Spans
from meshpeft.parallel import (
    ModelParallelConfig,
    ParallelError,
    ParallelGroupInfo,
    init_parallelism,
    layout_of_tensor,
)
from meshpeft.parallel.typing import parameter_type
from meshpeft.verify.simulation import fake_world

__all__ = ["loss_states", "typecheck_layout"]


def typecheck_layout(
    config: DecoderConfig,
    adapt: Callable[[LanguageModel], nn.Module] | None = None,
    *,
    tp: int = 1,
    dp: int = 1,
    cp: int = 1,
    sequence_parallel: bool = False,
    seq_length: int = 128,
) -> dict[str, str]:
    """Check the states of a decoder and its adapters at `tp * cp * dp` ranks, in this process.

    Args:
        config: Configuration of the model, at its real size: nothing is allocated.
        adapt: Adds the adapters, for instance a `LoRA`.
        tp, dp, cp: Sizes of the axes.
        sequence_parallel: Token shards between layers.
        seq_length: Tokens of the row that is run.

    Returns:
        The loss's state on each axis of more than one rank: `I` on tp, `P` on dp and cp, whose sums are pending.

    Raises:
        ParallelError: A state is wrong; the checker's message names the operation and its operands' states.
    """
    with fake_world(tp * cp * dp):
        mesh = init_parallelism(tp, context_parallel=cp)
        parallel = ModelParallelConfig(
            tensor_model_parallel_size=tp, context_parallel_size=cp, sequence_parallel=sequence_parallel
        )
        model = Decoder(config, parallel, device="meta", dtype=torch.float32)
        if adapt is not None:
            adapt(model)
        shard = ContextShard(0, cp, tp)
        places, spans = shard.of_rows([[seq_length]], shard.padded(seq_length))
        tokens = torch.zeros(places.shape, dtype=torch.long, device="meta")
        try:
            return loss_states(model, tokens, spans, mesh)
        except spmd.SpmdTypeError as error:
            sizes = f"tp={tp}, cp={cp}, dp={dp}"
            raise ParallelError(f"{sizes}, sequence_parallel={sequence_parallel}: {error}") from error


def loss_states(model: Decoder, tokens: Tensor, spans: Spans, mesh: ParallelGroupInfo) -> dict[str, str]:
    """Run the checker over one forward and the loss; see `typecheck_layout`."""
    axes = {axis.name: axis.process_group for axis in mesh.weight_axes() if axis.world_size > 1}
    if mesh.mesh is None or not axes:
        return {}
    rows = PartitionSpec(axes.get("dp"), axes.get("cp"))
    token_axes = {axis.name for axis in mesh.token_axes()}
    local = {group: V if name in token_axes else model.sharding.tokens for name, group in axes.items()}
    labels, positions = torch.zeros_like(tokens), torch.zeros_like(tokens)
    with spmd.set_current_mesh(mesh.mesh), checker.typecheck(local=False):
        for tensor in (tokens, labels, positions):
            spmd.assert_type(tensor, local, partition_spec=rows)
        for name, parameter in model.named_parameters():
            layout = layout_of_tensor(parameter)
            if layout is None:
                raise ParallelError(f"{name} has no layout")
            declared = parameter_type(layout)
            spmd.assert_type(parameter, declared.local, partition_spec=declared.spec)
        loss = model.token_losses(labels, tokens, positions, spans=spans).sum()
        return {name: spmd.get_axis_local_type(loss, group).value for name, group in axes.items()}
