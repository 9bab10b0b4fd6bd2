"""Initialisation: the same values at every layout, with the statistics that each type's name promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from helpers.simulate import rank_values, simulate, the_same
from torch import Tensor, nn

from meshpeft.parallel import (
    ColumnParallelLinear,
    FusedParts,
    GroupedColumnParallelLinear,
    InitializationType,
    ParallelEmbedding,
    ParallelError,
    RowParallelLinear,
    TensorLayout,
    VocabParallelEmbedding,
    initialize_,
    initialize_model_parallel_affine_weight_,
    mp_scatter,
    named_init_,
    parallel_group_info,
    set_layout,
)

TYPES = [name for name in get_args(InitializationType) if name != "dirac"]
MODULES: dict[str, Callable[[InitializationType], nn.Module]] = {
    "column": lambda init: ColumnParallelLinear(12, 24, init_type=init),
    "strided column": lambda init: ColumnParallelLinear(12, 24, init_type=init, stride=3),
    "packed column": lambda init: ColumnParallelLinear(
        12, 24, init_type=init, fused_parts=FusedParts(("q", "k", "v"), (16, 4, 4), blocks=4)
    ),
    "row": lambda init: RowParallelLinear(24, 12, init_type=init),
    "strided row": lambda init: RowParallelLinear(24, 12, init_type=init, stride=2),
    "embedding": lambda init: ParallelEmbedding(12, 24, init_type=init),
    "vocabulary": lambda init: VocabParallelEmbedding(24, 12, init_type=init),
}


@pytest.mark.parametrize("init_type", TYPES)
def test_a_seed_gives_the_same_layers_at_every_layout(init_type: InitializationType) -> None:
    def layers(**mesh: int) -> list[Tensor]:
        with simulate(**mesh):
            found = []
            for make in MODULES.values():
                torch.manual_seed(5)
                module = make(init_type)
                found.append(the_same(module.master_weight))
                if getattr(module, "bias", None) is not None:
                    found.append(the_same(module.master_bias))
            return found

    alone = layers()
    for mesh in ({"tp": 2}, {"tp": 4}, {"tp": 2, "dp": 2}):
        assert all(torch.equal(*pair) for pair in zip(layers(**mesh), alone, strict=True))
    # The first layer's columns and rows differ from the next one's: they are drawn, not constant over dims.
    if init_type not in ("constant", "zeros", "ones"):
        assert alone[0].unique().numel() == alone[0].numel()


def filled(init_type: InitializationType, shape: tuple[int, int] = (200, 300), bias: bool = False) -> Tensor:
    torch.manual_seed(1)
    layer = ColumnParallelLinear(shape[1], shape[0], init_type=init_type, dtype=torch.float64)
    assert layer.bias is not None
    return layer.bias.detach() if bias else layer.weight.detach()


# Standard deviation, smallest and largest value possible, of 60,000 draws. fan_in is 300, fan_out 200.
STATISTICS: dict[str, tuple[float, float, float]] = {
    "normal": (0.01, -math.inf, math.inf),
    "biased_normal": (0.01, -math.inf, math.inf),
    "trunc_normal": (0.01, -2.0, 2.0),
    "uniform": (0.02 / math.sqrt(12), 0.0, 0.02),
    # kaiming with a=0, of rectifiers: variance 2 / fan_in
    "kaiming_normal": (math.sqrt(2 / 300), -math.inf, math.inf),
    "kaiming_uniform": (math.sqrt(2 / 300), -math.sqrt(6 / 300), math.sqrt(6 / 300)),
    # xavier with gain 1: variance 2 / (fan_in + fan_out)
    "xavier_normal": (math.sqrt(2 / 500), -math.inf, math.inf),
    "xavier_uniform": (math.sqrt(2 / 500), -math.sqrt(6 / 500), math.sqrt(6 / 500)),
}


@pytest.mark.parametrize("init_type", STATISTICS)
def test_statistics(init_type: InitializationType) -> None:
    std, low, high = STATISTICS[init_type]
    weight = filled(init_type)
    # The standard error of the deviation of 60,000 draws is below 0.3%; 2% is more than six of it.
    assert weight.std().item() == pytest.approx(std, rel=0.02)
    assert low <= weight.min().item() and weight.max().item() <= high
    if math.isfinite(high) and init_type != "trunc_normal":
        # 60,000 uniform draws fill the range.
        assert weight.max().item() - weight.min().item() == pytest.approx(high - low, rel=1e-3)
    expected_mean = 0.01 if init_type == "uniform" else 0.0
    assert weight.mean().item() == pytest.approx(expected_mean, abs=6 * std / math.sqrt(60_000))


def test_constants_and_orthogonal_rows() -> None:
    assert bool((filled("constant") == 0.02).all())
    assert bool((filled("zeros") == 0).all())
    assert bool((filled("ones") == 1).all())
    rows = filled("orthogonal")
    torch.testing.assert_close(rows @ rows.T, torch.eye(200, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("init_type", TYPES)
def test_biases(init_type: InitializationType) -> None:
    bias = filled(init_type, (3000, 25), bias=True)
    if init_type == "biased_normal":
        assert bias.std().item() == pytest.approx(0.01, rel=0.08)  # 3,000 draws: six standard errors
    elif init_type.startswith(("kaiming", "xavier")):
        bound = 1 / math.sqrt(25)
        assert bias.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert bias.abs().max().item() <= bound
    else:
        assert bool((bias == 0).all())


def test_the_bias_of_a_row_has_the_fan_of_the_full_matrix() -> None:
    """Its shard has a quarter of the inputs, and would draw from a range twice as wide."""
    with simulate(tp=4):
        bias = the_same(RowParallelLinear(100, 3000, init_type="kaiming_uniform").master_bias)
    assert bias.abs().max().item() == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize("make", [*MODULES.values(), lambda init: GroupedColumnParallelLinear(4, 6, 8, init)])
def test_dirac_explains_itself(make: Callable[[str], nn.Module]) -> None:
    with pytest.raises(ParallelError, match=r"init_type='dirac' needs a convolution weight of 3 to 5 dims, got shape"):
        make("dirac")


def test_dirac_on_a_convolution_keeps_its_input() -> None:
    weight = nn.Parameter(torch.empty(3, 3, 5))
    set_layout(weight, TensorLayout((3, 3, 5)))
    initialize_(weight, None, "dirac")
    x = torch.randn(1, 3, 9)
    assert torch.equal(nn.functional.conv1d(x, weight, padding=2), x)


def test_unknown_types_and_tensors_without_a_layout_are_errors() -> None:
    with pytest.raises(ParallelError, match="init_type='xaver': expected one of orthogonal, normal"):
        ColumnParallelLinear(4, 4, init_type="xaver")
    with pytest.raises(ParallelError, match=r"a weight of shape \(2, 2\) has no layout"):
        initialize_(torch.zeros(2, 2), None, "zeros")
    with pytest.raises(ParallelError, match=r"lm\.weight: the parameter has no layout"):
        named_init_(torch.zeros(2, 2), nn.init.zeros_, 0, "lm.weight")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_types_start_from_the_same_values_rounded_once(dtype: torch.dtype) -> None:
    def drawn(dtype: torch.dtype) -> Tensor:
        torch.manual_seed(2)
        return ColumnParallelLinear(8, 16, dtype=dtype).weight.detach()

    assert torch.equal(drawn(dtype), drawn(torch.float64).to(dtype))


def test_the_meta_device_and_perform_initialization_draw_nothing() -> None:
    before = torch.get_rng_state()
    ColumnParallelLinear(8, 16, device="meta")
    ColumnParallelLinear(8, 16, perform_initialization=False)
    ParallelEmbedding(8, 16, padding_idx=1, device="meta")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("partition_dim", (0, 1))
def test_a_dim_counts_from_the_end_too(partition_dim: int) -> None:
    size, local = (8, 12), [8, 12]
    local[partition_dim] //= 2
    with simulate(tp=2):
        made = []
        for dim in (partition_dim, partition_dim - 2):
            torch.manual_seed(0)
            made.append(torch.empty(local))
            initialize_model_parallel_affine_weight_(made[-1], *size, local[partition_dim], dim, "normal")
        assert torch.equal(*made)
        axis = parallel_group_info().tp
        front, back = (TensorLayout(size, ((dim, axis),)) for dim in (partition_dim, partition_dim - 2))
        assert front == back and back.local_shape == tuple(local)
        with pytest.raises(ParallelError, match="dim=2: a tensor of 2 dims has those from -2 to 1"):
            TensorLayout(size, ((2, axis),))
        with pytest.raises(ParallelError, match="dim=-3: a tensor of 2 dims"):
            mp_scatter(torch.zeros(size), dim=-3)


@pytest.mark.parametrize("stride", (1, 2, 3))
@pytest.mark.parametrize("partition_dim", (0, 1))
def test_stride_cuts_the_full_matrix_into_strips(partition_dim: int, stride: int) -> None:
    """Rank r holds strips r, r + world, ..: Megatron's meaning of the word."""
    size = (24, 5) if partition_dim == 0 else (5, 24)

    def drawn(tp: int) -> list[Tensor]:
        torch.manual_seed(3)
        with simulate(tp=tp):
            local = list(size)
            local[partition_dim] //= tp
            weight = torch.empty(local, dtype=torch.float64)
            initialize_model_parallel_affine_weight_(weight, *size, 24 // tp, partition_dim, "normal", stride)
            return rank_values(weight)

    (full,) = drawn(1)
    for tp in (2, 4):
        strips = full.chunk(stride * tp, partition_dim)
        for rank, weight in enumerate(drawn(tp)):
            assert torch.equal(weight, torch.cat(strips[rank::tp], partition_dim))


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ((8, 4, 4, 2), "partition_dim=2: expected 0"),
        ((8, 4, 3, 0), "per_partition_size=3: dim 0 of size 8 over tp=2 has partitions of 4"),
        ((7, 4, 3, 0), r"dim 0 of a tensor of shape \(7, 4\) cannot be split over tp=2"),
        ((8, 4, 4, 0, "normal", 3), "stride=3: size 8 does not divide into 3 x tp=2 strips"),
        ((8, 4, 4, 0, "normal", 0), "stride=0"),
        ((8, 4, 4, 0, "dirac"), "dirac"),
        ((8, 5, 4, 0), r"weight has shape \(4, 4\), expected \(4, 5\)"),
    ),
)
def test_affine_weights_that_do_not_fit(arguments: tuple, message: str) -> None:
    with simulate(tp=2), pytest.raises(ParallelError, match=message):
        initialize_model_parallel_affine_weight_(torch.zeros(4, 4), *arguments)


def named(seed: int, name: str, layout: TensorLayout, init_fn: Callable[[Tensor], object] = nn.init.normal_) -> Tensor:
    parameter = nn.Parameter(torch.empty(layout.local_shape, dtype=torch.float64))
    set_layout(parameter, layout)
    named_init_(parameter, init_fn, seed, name)
    return the_same(layout.gather(parameter))


def test_named_values_are_a_function_of_seed_name_and_shape_only() -> None:
    expected = named(0, "layers.0.q", TensorLayout((8, 4)))
    torch.manual_seed(99)  # not of the global generator, nor of what was drawn before
    before = torch.get_rng_state()
    named(0, "layers.1.q", TensorLayout((8, 4)))
    assert torch.equal(named(0, "layers.0.q", TensorLayout((8, 4))), expected)
    assert torch.equal(torch.get_rng_state(), before)
    for tp in (2, 4):
        with simulate(tp=tp, dp=2):
            tp_axis = parallel_group_info().tp
            for layout in (
                TensorLayout((8, 4)),
                TensorLayout((8, 4), ((0, tp_axis),)),
                TensorLayout((8, 4), ((1, tp_axis),)),
            ):
                assert torch.equal(named(0, "layers.0.q", layout), expected)
    for other in (named(1, "layers.0.q", TensorLayout((8, 4))), named(0, "layers.1.q", TensorLayout((8, 4)))):
        assert not bool((other == expected).any())
    assert not torch.equal(named(0, "layers.0.q", TensorLayout((4, 8))).flatten(), expected.flatten())


def test_the_generators_of_gpus_are_not_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.manual_seed` seeds them all, and what is restored afterwards is the CPU's: dropout would repeat itself."""
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeds every GPU too"))
    named(0, "layers.0.q", TensorLayout((8, 4)))
    ColumnParallelLinear(8, 16)


def test_stacked_experts_are_drawn_one_by_one() -> None:
    """With the fans of one expert, the same at every expert-parallel size, and each its own."""
    shapes = []

    def init_fn(matrix: Tensor) -> None:
        shapes.append(tuple(matrix.shape))
        nn.init.kaiming_uniform_(matrix)

    expected = named(0, "experts.a", TensorLayout((4, 8, 50), expert=True), init_fn)
    assert shapes == [(8, 50)] * 4
    # 1,600 uniform draws come within 1% of their bound, of one expert's fan_in.
    assert expected.abs().max().item() == pytest.approx(math.sqrt(6 / 50), rel=0.01)
    assert len({tuple(matrix.flatten().tolist()) for matrix in expected}) == 4
    with simulate(tp=2, dp=2, ep=2, etp=2) as info:
        layout = TensorLayout((4, 8, 50), ((0, info.ep), (1, info.etp)), expert=True)
        assert torch.equal(named(0, "experts.a", layout, init_fn), expected)
