"""Column- and row-parallel layers are `nn.Linear` with the master weights, whatever their options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.simulate import simulate, the_same
from torch import Tensor, nn

from meshpeft.parallel import (
    ColumnParallelLinear,
    FusedParts,
    I,
    LayerType,
    LinearLayout,
    P,
    ParallelAxis,
    ParallelEmbedding,
    ParallelError,
    R,
    RowParallelLinear,
    Shard,
    State,
    TensorLayout,
    convert,
    differs,
    finalize_gradients,
    layer_type_of,
    layout_of,
    layout_of_tensor,
    parallel_group_info,
    register_layer_type,
)
from meshpeft.verify.simulation import count_collectives

IN, OUT = 16, 32
COLUMNS: dict[str, dict[str, Any]] = {
    "gathered": {},
    "gathered, no bias": {"bias": False},
    "gathered, strided": {"stride": 2},
    "gathered, fused": {"fused_parts": FusedParts(("q", "k", "v"), (16, 8, 8), blocks=4)},
    "divided": {"gather_output": False},
    "divided, strided": {"gather_output": False, "stride": 4},
    "sharded, fused": {"gather_output": False, "fused_parts": FusedParts(("gate", "up"), (16, 16))},
    "sequence": {"gather_output": False, "sequence_parallel": True},
    "sequence, no bias": {"gather_output": False, "sequence_parallel": True, "bias": False},
}
ROWS: dict[str, dict[str, Any]] = {
    "whole input": {},
    "whole input, no bias": {"bias": False},
    "whole input, strided": {"stride": 2},
    "divided input": {"input_is_parallel": True},
    "divided input, strided": {"input_is_parallel": True, "stride": 4},
    "sequence": {"input_is_parallel": True, "sequence_parallel": True},
    "sequence, no bias": {"input_is_parallel": True, "sequence_parallel": True, "bias": False},
}
CASES = [*((ColumnParallelLinear, name) for name in COLUMNS), *((RowParallelLinear, name) for name in ROWS)]
# Rounding of sums of 32 terms, relative to the largest: 32 units in the last place are far above it and far below any
# term that is missing or doubled.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 4e-6, torch.bfloat16: 4e-2}


def make(kind: type, name: str, dtype: torch.dtype, **more: Any) -> Any:
    torch.manual_seed(4)
    options = (COLUMNS if kind is ColumnParallelLinear else ROWS)[name]
    # Its bias is drawn, not zero, so that one that is added twice, or not at all, shows.
    return kind(IN, OUT, init_type="kaiming_uniform", dtype=dtype, **options, **more)


def sharded_like(options: dict[str, Any], kind: type, shape: torch.Size, which: str) -> TensorLayout:
    """How the input or the output of a layer lies on the mesh."""
    layout, last = layout_of(options["layer"]), len(shape) - 1
    state = layout.x if which == "input" else layout.y
    if not isinstance(state, Shard):
        return TensorLayout(tuple(shape))
    fused_parts = None if state == Shard(0) else layout.in_fused_parts if which == "input" else layout.fused_parts
    return TensorLayout(tuple(shape), ((state.dim, parallel_group_info().tp),), fused_parts, last)


def copied(layout: TensorLayout, full: Tensor) -> Tensor:
    """Each rank's own copy of its slice (a replicated slice is the tensor itself, on all simulated ranks at once)."""
    return layout.slice(full).clone()


def check(kind: type, name: str, tp: int, leading: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(*leading, IN, dtype=torch.float64).to(dtype)
    with simulate(tp=tp):
        layer = make(kind, name, dtype)
        weight, bias = the_same(layer.master_weight), layer.master_bias
        bias = None if bias is None else the_same(bias)
        y = F.linear(x, weight, bias)
        y_grad = torch.randn_like(y)
        inputs = [x.clone(), weight, *([] if bias is None else [bias])]
        for tensor in inputs:
            tensor.requires_grad_()
        F.linear(inputs[0], weight, bias).backward(y_grad)

        input_layout = sharded_like({"layer": layer}, kind, x.shape, "input")
        output_layout = sharded_like({"layer": layer}, kind, y.shape, "output")
        local = copied(input_layout, x).requires_grad_()
        out = layer(local)
        out.backward(copied(output_layout, y_grad))
        finalize_gradients(layer)

        def compare(found: Tensor, expected: Tensor) -> None:
            assert found.dtype == dtype and found.shape == expected.shape
            error = (found - expected).detach().abs().max() / expected.detach().abs().max()
            assert error.item() < TOLERANCE[dtype]

        compare(the_same(output_layout.gather(out)), y)
        compare(the_same(input_layout.gather(local.grad)), inputs[0].grad)
        for parameter, expected in zip((layer.weight, layer.bias), inputs[1:], strict=False):
            compare(the_same(layout_of_tensor(parameter).gather(parameter.grad)), expected.grad)


@pytest.mark.parametrize(("kind", "name"), CASES)
@pytest.mark.parametrize("tp", (1, 2, 4))
def test_layers_are_linear(kind: type, name: str, tp: int) -> None:
    check(kind, name, tp, (4, 3), torch.float64)


@pytest.mark.parametrize("leading", ((), (4,), (8, 1, 3)))
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("kind", "name"), ((ColumnParallelLinear, "sequence"), (RowParallelLinear, "sequence")))
def test_any_leading_shape_and_type(kind: type, name: str, dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    if not leading:  # a vector has no sequence
        name = "gathered" if kind is ColumnParallelLinear else "divided input"
    check(kind, name, 2, leading, dtype)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_enter_gemm_exit_is_the_layer(kind: type, name: str) -> None:
    """What adapters rely on; on every rank, to the bit up to the bias that the GEMM may add itself."""
    with simulate(tp=2):
        layer = make(kind, name, torch.float64)
        x = torch.randn(4, 3, IN, dtype=torch.float64)
        local = copied(sharded_like({"layer": layer}, kind, x.shape, "input"), x)
        entry = layer_type_of(layer)
        assert entry is not None and entry.takes_adapters_inside
        by_steps = entry.exit(layer, F.linear(entry.enter(layer, local), entry.weight(layer)))
        difference = by_steps - layer(local)
        assert max(value.abs().max().item() for value in difference._local_tensors.values()) < 1e-14


# Forward and backward collectives of each kind of layer, of the whole activation each.
SENT: dict[tuple[type, str], tuple[list[str], list[str]]] = {
    (ColumnParallelLinear, "gathered"): (["allgather"], ["allreduce"]),
    (ColumnParallelLinear, "divided"): ([], ["allreduce"]),
    (ColumnParallelLinear, "sequence"): (["allgather"], ["reduce_scatter"]),
    (RowParallelLinear, "whole input"): (["allreduce"], ["allgather"]),
    (RowParallelLinear, "divided input"): (["allreduce"], []),
    (RowParallelLinear, "sequence"): (["reduce_scatter"], ["allgather"]),
}


@pytest.mark.parametrize(("kind", "name"), SENT)
def test_what_is_sent(kind: type, name: str) -> None:
    with simulate(tp=2):
        layer = make(kind, name, torch.float32)
        x = torch.randn(4, 3, IN)
        local = copied(sharded_like({"layer": layer}, kind, x.shape, "input"), x).requires_grad_()
        with count_collectives() as calls:
            y = layer(local)
            forward = [call.name for call in calls]
            y.backward(torch.ones_like(y))
        assert (forward, [call.name for call in calls[len(forward) :]]) == SENT[kind, name]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_one_rank_computes_what_linear_computes_to_the_bit(kind: type, name: str) -> None:
    layer = make(kind, name, torch.float32)
    x = torch.randn(4, 3, IN, requires_grad=True)
    with count_collectives() as calls:
        entered, expected = layer.enter(x), F.linear(x, layer.weight, layer.bias)
        found = layer(x)
    assert calls == []
    assert entered is x
    if name == "gathered, fused":  # per query group in the weight, q then k then v in what is gathered
        expected = torch.cat(layer.layout.fused_parts.split(expected, -1, 1), -1)
    assert torch.equal(found, expected)
    if layer.bias is None:
        assert layer.exit(expected) is expected
    if layer.layout.fused_parts is None and layer.layout.in_fused_parts is None:
        # Not a copy either: it is the parameter's own memory.
        assert layer.master_weight.data_ptr() == layer.weight.data_ptr()


def test_the_bias_of_a_row_is_added_once_and_is_its_master_bias() -> None:
    with simulate(tp=4):
        layer = RowParallelLinear(IN, OUT, init_type="zeros", dtype=torch.float64)
        with torch.no_grad():
            layer.bias.fill_(3.0)
        assert torch.equal(the_same(layer.master_bias), torch.full((OUT,), 3.0, dtype=torch.float64))
        assert torch.equal(
            the_same(layer(torch.randn(2, IN, dtype=torch.float64))), the_same(layer.master_bias).expand(2, -1)
        )


@pytest.mark.parametrize("tp", (1, 2, 4))
def test_layers_that_share_a_copied_input_and_leave_a_partial_output(tp: int) -> None:
    """Two columns on one copy, and a row whose output the caller reduces: y, and every gradient, of one rank."""
    torch.manual_seed(0)
    weights = [torch.randn(OUT, IN, dtype=torch.float64), torch.randn(OUT, IN, dtype=torch.float64)]
    back, bias = torch.randn(IN, OUT, dtype=torch.float64), torch.randn(IN, dtype=torch.float64)
    x = torch.randn(3, IN, dtype=torch.float64)

    def run(size: int) -> list[Tensor]:
        with simulate(tp=size) as mesh:
            options: dict[str, Any] = {"dtype": torch.float64}
            columns = [ColumnParallelLinear(IN, OUT, False, False, input_is_copied=True, **options) for _ in weights]
            row = RowParallelLinear(OUT, IN, True, True, reduce_output=False, **options)
            with torch.no_grad():
                for layer, full in zip((*columns, row), (*weights, back), strict=True):
                    layer.weight.copy_(layer.layout.weight().slice(full))
                row.bias.copy_(bias)
            given = x.clone().requires_grad_()
            with count_collectives() as calls:
                copied = convert(given, I, R, mesh.tp)
                y = convert(row(columns[0](copied) * columns[1](copied)), P, I, mesh.tp)
                y.square().sum().backward()
            assert [call.name for call in calls] == ["allreduce"] * (2 if size > 1 else 0)
            finalize_gradients([row.bias])
            gradients = [layer.weight.grad for layer in (*columns, row)]
            layouts = [layer.layout.weight() for layer in (*columns, row)]
            whole = [layout.gather(grad) for layout, grad in zip(layouts, gradients, strict=True)]
            return [the_same(tensor) for tensor in (y, given.grad, row.bias.grad, *whole)]

    for found, expected in zip(run(tp), run(1), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (ColumnParallelLinear, {"input_is_copied": True}),
        (ColumnParallelLinear, {"input_is_copied": True, "gather_output": False, "sequence_parallel": True}),
        (RowParallelLinear, {"reduce_output": False}),
        (RowParallelLinear, {"reduce_output": False, "input_is_parallel": True, "sequence_parallel": True}),
    ],
)
def test_states_that_exclude_each_other_are_refused(layer: Any, options: dict[str, bool]) -> None:
    with pytest.raises(
        ParallelError, match=r"(input_is_copied=True|reduce_output=False) needs sequence_parallel=False"
    ):
        layer(IN, OUT, **options)


@pytest.mark.parametrize("tp", (1, 2, 4))
def test_the_documented_example(tp: int) -> None:
    vocab_size, in_features, out_features, bias, bsz, tsz = 32, 8, 16, True, 3, 5
    with simulate(tp=tp):
        # Create a parallel embedding layer.
        parallel_embedding = ParallelEmbedding(
            num_embeddings=vocab_size,
            embedding_dim=in_features,
        )
        # Create a column parallel linear layer.
        column_parallel_linear = ColumnParallelLinear(
            in_features=in_features,
            out_features=out_features,
            bias=bias,
            gather_output=False,
        )
        # Create a row parallel linear layer.
        row_parallel_linear = RowParallelLinear(
            in_features=out_features,
            out_features=out_features,
            bias=bias,
            input_is_parallel=True,
        )
        # Applies the two linear layers together.
        x = the_same(torch.randint(0, vocab_size - 1, (bsz, tsz)))
        y = row_parallel_linear(column_parallel_linear(parallel_embedding(x)))
        masters = [
            the_same(tensor)
            for tensor in (
                parallel_embedding.master_weight,
                column_parallel_linear.master_weight,
                column_parallel_linear.master_bias,
                row_parallel_linear.master_weight,
                row_parallel_linear.master_bias,
            )
        ]
        y.sum().backward()
        grads = [
            the_same(layout_of_tensor(parameter).gather(parameter.grad))
            for parameter in (parallel_embedding.weight, column_parallel_linear.weight, row_parallel_linear.weight)
        ]
        y = the_same(y)

    model = nn.Sequential(
        nn.Embedding(vocab_size, in_features),
        nn.Linear(in_features, out_features, bias=bias),
        nn.Linear(out_features, out_features, bias=bias),
    )
    for parameter, master in zip(model.parameters(), masters, strict=True):
        parameter.data.copy_(master)
    expected = model(x)
    expected.sum().backward()
    # float32: sums of at most 16 terms of order one.
    torch.testing.assert_close(y, expected.detach(), rtol=1e-5, atol=1e-6)
    for grad, layer in zip(grads, model, strict=True):
        torch.testing.assert_close(grad, layer.weight.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    (
        (lambda: ColumnParallelLinear(4, 6), "out_features=6 cannot be split over tp=4; use 1 or 2 or 3 or 6"),
        (lambda: RowParallelLinear(10, 4), "in_features=10 cannot be split over tp=4; use 1 or 2 or 5"),
        (
            lambda: ColumnParallelLinear(4, 8, sequence_parallel=True),
            "sequence_parallel=True needs gather_output=False",
        ),
        (
            lambda: RowParallelLinear(8, 4, sequence_parallel=True),
            "sequence_parallel=True needs input_is_parallel=True",
        ),
        (lambda: ColumnParallelLinear(4, 8, stride=3), "stride=3: size 8 does not divide into 3 x tp=4 strips"),
        (lambda: RowParallelLinear(8, 4, stride=4), "stride=4: size 8 does not divide into 4 x tp=4 strips"),
        (
            lambda: ColumnParallelLinear(4, 16, stride=2, fused_parts=FusedParts(("a", "b"), (8, 8))),
            "stride=2 and fused_parts both order the rows; give one",
        ),
        (lambda: ColumnParallelLinear(4, 16, fused_parts=FusedParts(("a", "b"), (8, 4))), "do not add up to dim 0"),
        (
            lambda: ColumnParallelLinear(4, 12, fused_parts=FusedParts(("a", "b"), (6, 6), 2)),
            "2 blocks do not divide over 4",
        ),
    ),
)
def test_options_that_do_not_fit_are_refused(build: Callable[[], nn.Module], message: str) -> None:
    with simulate(tp=4), pytest.raises(ParallelError, match=message):
        build()


def test_layers_say_what_they_are() -> None:
    with simulate(tp=2):
        assert (
            repr(ColumnParallelLinear(4, 8)) == "ColumnParallelLinear(in_features=4, out_features=8, bias=True, tp=2)"
        )


def test_layer_types_are_found_by_their_nearest_class() -> None:
    class Special(nn.Linear):
        pass

    class Unknown(nn.Module):
        pass

    assert layer_type_of(Special(2, 3)) is layer_type_of(nn.Linear(2, 3))
    assert layout_of(Special(2, 3)).out_features == 3
    register_layer_type(Special, LayerType(lambda module: LinearLayout(7, 7), lambda module: module.weight))
    assert layout_of(Special(2, 3)).in_features == 7
    assert not layer_type_of(Special(2, 3)).takes_adapters_inside
    assert layer_type_of(Unknown()) is None
    with pytest.raises(NotImplementedError, match=r"layers of type .*Unknown; known: .*ColumnParallelLinear"):
        layout_of(Unknown())


# DESIGN's tables of the fused and of the standalone adapter: the gradients that are partial over the axis (of A, B, m),
# whether masks of the adapter's input and output differ over it, and what a standalone h is converted from and to.
@pytest.mark.parametrize(
    ("shard", "states", "fused", "standalone", "masks_fused", "masks_standalone", "bottleneck"),
    (
        ("out", (I, Shard(-1)), "a", "", "o", "o", (I, R)),
        ("out", (I, I), "a", "", "o", "", (I, R)),
        ("out", (Shard(0), Shard(-1)), "a", "a", "o", "io", (Shard(0), R)),
        ("out", (R, Shard(-1)), "a", "a", "o", "o", (R, R)),
        ("in", (Shard(-1), I), "bm", "", "i", "i", (P, I)),
        ("in", (I, I), "bm", "", "i", "", (P, I)),
        ("in", (Shard(-1), Shard(0)), "bm", "bm", "i", "io", (P, Shard(0))),
        ("in", (Shard(-1), P), "bm", "bm", "i", "i", (P, P)),
        (None, (I, I), "", "", "", "", (I, I)),
        (None, (Shard(0), Shard(0)), "abm", "abm", "io", "io", (Shard(0), Shard(0))),
    ),
)
def test_what_follows_from_the_states_of_a_layer(
    shard: Any,
    states: tuple[State, State],
    fused: str,
    standalone: str,
    masks_fused: str,
    masks_standalone: str,
    bottleneck: tuple[State, State],
) -> None:
    layout = LinearLayout(8, 12, shard, ParallelAxis("tp", world_size=2), *states)
    for inside, partial, masks in ((True, fused, masks_fused), (False, standalone, masks_standalone)):
        layouts = {
            "a": layout.factor_a(4, inside=inside),
            "b": layout.factor_b(4, inside=inside),
            "m": layout.magnitude(inside=inside),
        }
        assert "".join(name for name, tensor in layouts.items() if tensor.grad_partial) == partial
        x, y = layout.states(inside=inside)
        assert "i" * differs(x) + "o" * differs(y) == masks
    assert layout.bottleneck_states == bottleneck
    shards = {"out": ([], [0], [0]), "in": ([1], [], []), None: ([], [], [])}[shard]
    assert tuple([dim for dim, _ in tensor.shards] for tensor in layouts.values()) == shards
    assert [tensor.global_shape for tensor in layouts.values()] == [(4, 8), (12, 4), (12,)]


@pytest.mark.parametrize(
    ("shard", "x", "y"), (("out", P, None), ("in", R, None), ("out", None, P), (None, I, Shard(0)))
)
def test_states_that_a_layer_cannot_have(shard: Any, x: State | None, y: State | None) -> None:
    with pytest.raises(ParallelError, match=r"takes x in one of .* and gives y in one of .*; got x="):
        LinearLayout(8, 12, shard, ParallelAxis("tp", world_size=2), x, y)
