"""What a rank holds and how ranks talk. Knows nothing of adapters."""

from meshpeft.parallel.class_registry import register_engine
from meshpeft.parallel.collectives import (
    all2all_hp2sp,
    mp_copy,
    mp_gather,
    mp_reduce,
    mp_scatter,
    sp_gather,
    sp_reduce_scatter,
)
from meshpeft.parallel.config import ModelParallelConfig
from meshpeft.parallel.containers import (
    ContainerType,
    container_type_of,
    describe_layers,
    fused_parts_of,
    global_names,
    register_container_type,
)
from meshpeft.parallel.dispatch import DispatchPlan, combine_tokens, dispatch_tokens
from meshpeft.parallel.embedding import ParallelEmbedding, VocabParallelEmbedding
from meshpeft.parallel.errors import MeshPEFTError, ParallelError
from meshpeft.parallel.experts import GroupedColumnParallelLinear, GroupedRowParallelLinear
from meshpeft.parallel.gradients import clip_gradients_, finalize_gradients, gradient_axes, gradient_norm
from meshpeft.parallel.grouped_gemm import (
    group_of_rows,
    group_offsets,
    grouped_add_mm_,
    grouped_linear,
    grouped_mm,
    grouped_outer,
    grouped_sum,
)
from meshpeft.parallel.held_modules import COMPILED, held_module, is_held
from meshpeft.parallel.init import (
    InitializationType,
    initialize_,
    initialize_model_parallel_affine_weight_,
    named_init_,
)
from meshpeft.parallel.layer_layout import LinearLayout
from meshpeft.parallel.layer_types import (
    LayerType,
    derive_layer_types,
    does_more_than_its_type,
    layer_type_of,
    layout_of,
    register_layer_type,
)
from meshpeft.parallel.linear import ColumnParallelLinear, RowParallelLinear, gather_features
from meshpeft.parallel.loss import vocab_parallel_cross_entropy
from meshpeft.parallel.mesh import (
    ParallelAxis,
    ParallelGroupInfo,
    destroy_parallelism,
    init_parallelism,
    is_simulated,
    on_each_rank,
    parallel_group_info,
    register_mesh_provider,
)
from meshpeft.parallel.random import draw_seed, dropout, dropout_mask, set_seed
from meshpeft.parallel.sharded_tensor import ShardedStateDict, ShardedTensor, ShardedTensors, sharded_state_dict
from meshpeft.parallel.tensor_layout import FusedParts, Piece, TensorLayout, layout_of_tensor, set_layout

__all__ = [
    "COMPILED",
    "ColumnParallelLinear",
    "ContainerType",
    "DispatchPlan",
    "GroupedColumnParallelLinear",
    "GroupedRowParallelLinear",
    "InitializationType",
    "LayerType",
    "LinearLayout",
    "MeshPEFTError",
    "ModelParallelConfig",
    "FusedParts",
    "ParallelAxis",
    "ParallelEmbedding",
    "ParallelError",
    "ParallelGroupInfo",
    "Piece",
    "RowParallelLinear",
    "ShardedStateDict",
    "ShardedTensor",
    "ShardedTensors",
    "TensorLayout",
    "VocabParallelEmbedding",
    "all2all_hp2sp",
    "clip_gradients_",
    "combine_tokens",
    "container_type_of",
    "describe_layers",
    "destroy_parallelism",
    "derive_layer_types",
    "does_more_than_its_type",
    "dispatch_tokens",
    "draw_seed",
    "dropout",
    "dropout_mask",
    "finalize_gradients",
    "gather_features",
    "global_names",
    "gradient_axes",
    "gradient_norm",
    "group_of_rows",
    "held_module",
    "group_offsets",
    "grouped_add_mm_",
    "grouped_linear",
    "grouped_mm",
    "grouped_outer",
    "grouped_sum",
    "init_parallelism",
    "initialize_",
    "initialize_model_parallel_affine_weight_",
    "is_held",
    "is_simulated",
    "layer_type_of",
    "layout_of",
    "layout_of_tensor",
    "mp_copy",
    "mp_gather",
    "mp_reduce",
    "mp_scatter",
    "named_init_",
    "on_each_rank",
    "fused_parts_of",
    "parallel_group_info",
    "register_container_type",
    "register_engine",
    "register_layer_type",
    "register_mesh_provider",
    "set_layout",
    "set_seed",
    "sharded_state_dict",
    "sp_gather",
    "sp_reduce_scatter",
    "vocab_parallel_cross_entropy",
]
