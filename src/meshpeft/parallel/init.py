"""Initialisation that does not depend on the layout: draw the full tensor, keep this rank's slice.

Two ways to agree on what is drawn. An adapter's parameter knows its name: its values are a function of (seed, full
name, global shape), see `named_init_`. A primitive layer does not: the ranks that hold copies or slices of it agree on
a seed first, see `initialize_`. Starts that are made from W instead (PiSSA, SVDQuant) are in `quantization/starts.py`.

Draws are made on the CPU in float64 and rounded once, so that every type and device starts from the same values.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Literal, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._local_tensor import maybe_disable_local_tensor_mode

from meshpeft.parallel.errors import ParallelError
from meshpeft.parallel.layout import FusedParts, TensorLayout, layout_of_tensor
from meshpeft.parallel.mesh import ParallelAxis, parallel_group_info

__all__ = [
    "InitializationType",
    "draw_full",
    "initialize_",
    "initialize_model_parallel_affine_weight_",
    "named_init_",
    "stride_parts",
]

InitializationType = Literal[
    "orthogonal",
    "normal",
    "biased_normal",
    "uniform",
    "kaiming_uniform",
    "kaiming_normal",
    "xavier_uniform",
    "xavier_normal",
    "trunc_normal",
    "dirac",
    "constant",
    "zeros",
    "ones",
]

# The constants of the system that names these types (mlfab's `init_`): a normal of this standard deviation
# (truncated at +-2), a uniform in [0, SCALE), the constant SCALE.
STD = 0.01
SCALE = 0.02

_WEIGHT_INIT: dict[str, Callable[[Tensor], Tensor]] = {
    "orthogonal": nn.init.orthogonal_,
    "normal": lambda t: nn.init.normal_(t, std=STD),
    "biased_normal": lambda t: nn.init.normal_(t, std=STD),
    "uniform": lambda t: nn.init.uniform_(t, b=SCALE),
    "kaiming_uniform": nn.init.kaiming_uniform_,
    "kaiming_normal": nn.init.kaiming_normal_,
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "trunc_normal": lambda t: nn.init.trunc_normal_(t, std=STD),
    "dirac": nn.init.dirac_,
    "constant": lambda t: nn.init.constant_(t, SCALE),
    "zeros": nn.init.zeros_,
    "ones": nn.init.ones_,
}


def _weight_init(init_type: str, shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    if init_type not in get_args(InitializationType):
        raise ParallelError(f"init_type={init_type!r}: expected one of {', '.join(get_args(InitializationType))}")
    if init_type == "dirac" and len(shape) not in (3, 4, 5):
        raise ParallelError(
            f"init_type='dirac' needs a convolution weight of 3 to 5 dims, got shape {shape}; "
            "for a linear or embedding weight choose another init_type, for instance 'orthogonal'"
        )
    return _WEIGHT_INIT[init_type]


def _bias_init(init_type: str, fan_in: int) -> Callable[[Tensor], Tensor]:
    if init_type == "biased_normal":
        return lambda t: nn.init.normal_(t, std=STD)
    if init_type.startswith(("kaiming", "xavier")) and fan_in > 0:
        bound = 1 / math.sqrt(fan_in)
        return lambda t: nn.init.uniform_(t, -bound, bound)
    return nn.init.zeros_


def draw_full(shape: tuple[int, ...], init_fn: Callable[[Tensor], object], seed: int) -> Tensor:
    """A float64 CPU tensor of `shape` filled in place by `init_fn` from `seed`; no global generator is disturbed."""
    with maybe_disable_local_tensor_mode(), torch.random.fork_rng(devices=[]), torch.no_grad():
        # Not torch.manual_seed: that seeds the generators of all GPUs too, which fork_rng does not restore here.
        torch.default_generator.manual_seed(seed)
        full = torch.empty(shape, dtype=torch.float64, device="cpu")
        init_fn(full)
        return full


def _fill_(local: Tensor, layout: TensorLayout, init_fn: Callable[[Tensor], object], seed: int) -> None:
    # Each expert's matrix is drawn by itself, so that fans are those of one expert.
    matrices = layout.is_stacked

    def fill(full: Tensor) -> None:
        for matrix in full if matrices else (full,):
            init_fn(matrix)

    with torch.no_grad():
        local.copy_(layout.slice(draw_full(layout.global_shape, fill, seed)))


def _agreed_seed() -> int:
    """A seed from the default generator that all ranks of this pipeline stage share. A collective."""
    info = parallel_group_info()
    axis = info.joined(axis.name for axis in info.weight_axes())
    seed = torch.empty((), dtype=torch.int64).random_()
    if axis.world_size == 1:
        return int(seed)
    device = torch.device("cuda") if dist.get_backend(axis.group) == "nccl" else torch.device("cpu")
    seed = seed.to(device)
    dist.broadcast(seed, group=axis.group, group_src=0)
    return int(seed)


def initialize_(weight: Tensor, bias: Tensor | None, init_type: InitializationType) -> None:
    """Fill the local slices of a layer's weight and bias. Every rank of the stage calls it in the same order.

    A collective (of one integer) where there is more than one rank; nothing at all on the meta device.

    Args:
        weight: a parameter with a layout (`set_layout`).
        bias: Likewise, or `None`. Zero, but for `biased_normal` (drawn like the weight) and the kaiming and
            xavier types (uniform within 1/sqrt(fan_in)).
        init_type: Fan-in and fan-out are those of the full matrix; of stacked experts, those of one expert.

    Raises:
        ParallelError: An unknown `init_type`, or `dirac` on a tensor without 3 to 5 dims.
    """
    layout = layout_of_tensor(weight)
    if layout is None:
        raise ParallelError(f"a weight of shape {tuple(weight.shape)} has no layout; call set_layout on it first")
    init_fn = _weight_init(init_type, layout.global_shape[1:] if layout.is_stacked else layout.global_shape)
    if weight.is_meta:
        return
    _fill_(weight, layout, init_fn, _agreed_seed())
    if bias is not None:
        bias_layout = cast(TensorLayout, layout_of_tensor(bias))
        _fill_(bias, bias_layout, _bias_init(init_type, layout.global_shape[-1]), _agreed_seed())


def initialize_model_parallel_affine_weight_(
    weight: Tensor,
    out_features: int,
    in_features: int,
    per_partition_size: int,
    partition_dim: int,
    init_type: InitializationType = "xavier_normal",
    stride: int = 1,
    axis: ParallelAxis | None = None,
) -> None:
    """Initializes an affine weight tensor for model-parallel training: draws the full matrix, keeps a slice.

    Args:
        weight: This rank's slice, `[per_partition_size, in_features]` or `[out_features, per_partition_size]`.
        out_features: Rows of the full matrix.
        in_features: Columns of the full matrix.
        per_partition_size: Size of the slice along `partition_dim`.
        partition_dim: 0 (out) or 1 (in); -2 and -1 are the same, counted from the end.
        init_type: Initialization type.
        stride: The full matrix is cut into `stride * world_size` strips along `partition_dim`, and rank r holds
            strips r, r + world_size, ..
        axis: Axis that shards the matrix; tensor parallel by default.

    Raises:
        ParallelError: Sizes that do not fit each other; an unknown `init_type`.
    """
    axis = parallel_group_info().tp if axis is None else axis
    shape = (out_features, in_features)
    if partition_dim not in (0, 1, -2, -1):
        raise ParallelError(f"partition_dim={partition_dim}: expected 0 (out) or 1 (in); -1 is the last, 1")
    partition_dim %= len(shape)
    layout = TensorLayout(
        shape,
        ((partition_dim, axis),),
        fused_parts=stride_parts(shape[partition_dim], stride, axis),
        fused_dim=partition_dim,
    )
    if per_partition_size != layout.local_shape[partition_dim]:
        raise ParallelError(
            f"per_partition_size={per_partition_size}: dim {partition_dim} of size {shape[partition_dim]} over "
            f"{axis.name}={axis.world_size} has partitions of {layout.local_shape[partition_dim]}"
        )
    if tuple(weight.shape) != layout.local_shape:
        raise ParallelError(f"weight has shape {tuple(weight.shape)}, expected {layout.local_shape}")
    init_fn = _weight_init(init_type, shape)
    if not weight.is_meta:
        _fill_(weight, layout, init_fn, _agreed_seed())


def stride_parts(size: int, stride: int, axis: ParallelAxis) -> FusedParts | None:
    """The fused parts that `stride` stands for: that many equal parts, each sharded over the axis on its own.

    Raises:
        ParallelError: `size` is not a multiple of `stride * world_size`.
    """
    if stride == 1:
        return None
    if stride < 1 or size % (stride * axis.world_size):
        raise ParallelError(
            f"stride={stride}: size {size} does not divide into {stride} x {axis.name}={axis.world_size} strips"
        )
    return FusedParts(tuple(str(index) for index in range(stride)), (size // stride,) * stride)


def named_init_(parameter: Tensor, init_fn: Callable[[Tensor], object], seed: int, name: str) -> None:
    """Fill a parameter as a function of (seed, full name, global shape), never of rank, order or layout.

    Args:
        parameter: Has a layout; filled in place, rounded once to its type.
        init_fn: Fills a full tensor in place, for instance one of `torch.nn.init`. It sees the global shape; for
            stacked experts, the shape of one expert at a time, so that fans are per expert.
        seed: Seed of the run.
        name: The parameter's full name, the same at every layout (layer and expert numbers are global).
    """
    layout = layout_of_tensor(parameter)
    if layout is None:
        raise ParallelError(f"{name}: the parameter has no layout; call set_layout on it first")
    if parameter.is_meta:
        return
    digest = hashlib.sha256(repr((int(seed), name, layout.global_shape)).encode()).digest()
    # A seed is a signed 64-bit integer, of which torch's CPU generator reads the low 32 bits.
    _fill_(parameter, layout, init_fn, int.from_bytes(digest[:8], "little") >> 1)
