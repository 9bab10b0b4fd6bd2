"""`ModelParallelConfig`: the fields of Megatron-Core's that a layer reads; Megatron's own is accepted in its place."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from meshpeft.parallel.errors import ParallelError

__all__ = ["ModelParallelConfig"]


@dataclass
class ModelParallelConfig:
    """How a model is sharded and initialised.

    Attributes:
        tensor_model_parallel_size: Ranks that share one dense layer.
        pipeline_model_parallel_size: Stages.
        expert_model_parallel_size: Ranks that shard the experts.
        expert_tensor_parallel_size: Ranks that share one expert; `None` means the tensor-parallel size.
        sequence_parallel: Shard activations over tensor parallel along the sequence, from the end of the embedding to
            the start of the head. The `enter` of a column-parallel layer gathers them (Shard(0) -> R), the `exit` of
            a row-parallel layer reduce-scatters (P -> Shard(0)); between layers, norms and dropout have shards. The
            table of all states is in `models/sharding.py`.
        params_dtype: Type of new parameters; `bf16` and `fp16` override it.
        bf16, fp16: compute in that type. Not both.
        use_cpu_initialization: Draw new parameters on the CPU (this package always does).
        perform_initialization: Draw new parameters at all; `False` leaves them uninitialised, to be loaded.
        cpu_offloading: An engine's layers move activations to the CPU; nothing here reads it.
        context_parallel_size: Ranks that share the tokens of every row.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    sequence_parallel: bool = False
    params_dtype: torch.dtype = torch.float32
    bf16: bool = False
    fp16: bool = False
    use_cpu_initialization: bool = False
    perform_initialization: bool = True
    cpu_offloading: bool = False
    context_parallel_size: int = 1

    def __post_init__(self) -> None:
        if self.bf16 and self.fp16:
            raise ParallelError("bf16=True and fp16=True: choose one")

    @property
    def dtype(self) -> torch.dtype:
        """The type of new parameters."""
        if self.bf16:
            return torch.bfloat16
        return torch.float16 if self.fp16 else self.params_dtype
