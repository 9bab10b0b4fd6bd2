"""The states of the primitives, followed by `spmd_types` through a fake world of hundreds of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import spmd_types as spmd
import torch
from helpers.simulate import fake_world
from helpers.small_network import SmallNetwork
from spmd_types import SpmdTypeError, checker
from spmd_types.types import I, P, PartitionSpec, R, S, Shard, V
from torch import Tensor

from meshpeft.parallel import (
    ColumnParallelLinear,
    ParallelAxis,
    ParallelGroupInfo,
    RowParallelLinear,
    VocabParallelEmbedding,
    all2all_hp2sp,
    convert,
    dropout,
    embedding,
    init_parallelism,
    layout,
    layout_of_tensor,
    linear,
    mp_copy,
    mp_gather,
    mp_reduce,
    mp_scatter,
    sp_gather,
    sp_reduce_scatter,
    vocab_parallel_cross_entropy,
)
from meshpeft.parallel.typing import parameter_type

TP, DP = 8, 64


@contextmanager
def checked() -> Iterator[ParallelGroupInfo]:
    with fake_world(TP * DP):
        info = init_parallelism(tensor_parallel=TP)
        with spmd.set_current_mesh(info.mesh), checker.typecheck(local=False):
            yield info


def typed(
    info: ParallelGroupInfo, shape: tuple[int, ...], state: Any, data_dim: int | None = 1, **options: Any
) -> Tensor:
    """A tensor without memory, in a state over tp, and divided over dp along a dim."""
    with checker.no_typecheck():
        x = torch.zeros(shape, device="meta", **options)
    spec: list[Any] = [None] * len(shape)
    if isinstance(state, Shard):
        spec[state.dim] = info.tp.group
    if data_dim is not None:
        spec[data_dim] = info.dp.group
    local = {info.tp.group: V if isinstance(state, Shard) else state, info.dp.group: R if data_dim is None else V}
    spmd.assert_type(x, local, partition_spec=PartitionSpec(*spec))
    return x


def state_of(x: Tensor, info: ParallelGroupInfo) -> Any:
    """Over tp: R, I, P, or S of a dim."""
    tp = spmd.normalize_axis(info.tp.group)
    state = spmd.get_axis_local_type(x, info.tp.group)
    if state is not V:
        return state
    (dim,) = (dim for dim, axes in enumerate(spmd.get_partition_spec(x)) if axes == tp)
    return S(dim)


TRANSITIONS: dict[str, tuple[Callable[[Tensor], Tensor], Any, Any]] = {
    "mp_copy": (mp_copy, I, R),
    "mp_reduce": (mp_reduce, P, I),
    "mp_scatter": (mp_scatter, I, S(2)),
    "mp_scatter, dim 0": (lambda x: mp_scatter(x, 0), I, S(0)),
    "mp_gather": (mp_gather, S(2), I),
    "mp_gather, dim -3": (lambda x: mp_gather(x, -3), S(0), I),
    "sp_gather": (sp_gather, S(0), R),
    "sp_reduce_scatter": (sp_reduce_scatter, P, S(0)),
    "all2all_hp2sp": (all2all_hp2sp, S(2), S(0)),
}


@pytest.mark.parametrize("given", (R, I, P, S(0), S(2)), ids=("R", "I", "P", "S0", "S2"))
@pytest.mark.parametrize("name", TRANSITIONS)
def test_each_collective_takes_one_state_and_gives_one(name: str, given: Any) -> None:
    function, source, target = TRANSITIONS[name]
    with checked() as info:
        x = typed(info, (16, 64, 16), given, requires_grad=True)
        if given == source:
            y = function(x)
            assert state_of(y, info) == target
            assert spmd.get_axis_local_type(y, info.dp.group) is V
        else:
            with pytest.raises(SpmdTypeError):
                function(x)


@pytest.mark.parametrize("state", (R, I, P, S(0), S(2)), ids=("R", "I", "P", "S0", "S2"))
def test_dropout_keeps_any_state_and_its_masks_must_differ_where_the_values_do(state: Any) -> None:
    with checked() as info:
        x = typed(info, (16, 64, 16), state, requires_grad=True)
        divided = isinstance(state, Shard)
        right, wrong = [info.dp, info.tp], [info.dp]
        if not divided:
            right, wrong = wrong, right
        assert state_of(dropout(x, 0.5, varying=right), info) == state
        with pytest.raises(SpmdTypeError, match=f"dropout: masks {'agree' if divided else 'differ'} over"):
            dropout(x, 0.5, varying=wrong)
        with pytest.raises(SpmdTypeError, match="dropout: masks agree over"):
            dropout(x, 0.5, varying=[axis for axis in right if axis is not info.dp])


def state_after(network: SmallNetwork, info: ParallelGroupInfo) -> tuple[Any, Any]:
    """The state of a network's loss over tp and dp."""
    for parameter in network.parameters():
        layout = layout_of_tensor(parameter)
        assert layout is not None
        declared = parameter_type(layout)
        spmd.assert_type(parameter, declared.local, partition_spec=declared.spec)
    ids, labels = (typed(info, (16, 64), R, dtype=torch.int64) for _ in range(2))
    loss = network(ids, labels).sum()
    return spmd.get_axis_local_type(loss, info.tp.group), spmd.get_axis_local_type(loss, info.dp.group)


def network(sequence_parallel: bool) -> SmallNetwork:
    with checker.no_typecheck():
        return SmallNetwork(64, 32, 64, sequence_parallel, torch.float32, "meta")


@pytest.mark.parametrize("sequence_parallel", (False, True))
def test_a_network_of_every_layer(sequence_parallel: bool) -> None:
    """The loss is the same over tensor parallel, and a sum that is still pending over data parallel."""
    with checked() as info:
        assert state_after(network(sequence_parallel), info) == (I, P)


def bias_before_the_reduction(self: RowParallelLinear, y: Tensor) -> Tensor:
    return mp_reduce(y + self.bias, axis=self.layout.axis)


def loss_of_the_slice(logits: Tensor, labels: Tensor, *_: Any) -> Tensor:
    return torch.logsumexp(logits, -1)


def instead(src: Any, dst: Any, *steps: tuple[Any, Any]) -> Callable[..., Tensor]:
    """`convert`, but that the conversion from src to dst takes these steps instead, or none."""

    def faulty(x: Tensor, given: Any, wanted: Any, axis: ParallelAxis) -> Tensor:
        for one, other in steps if (given, wanted) == (src, dst) else ((given, wanted),):
            x = convert(x, one, other, axis)
        return x

    return faulty


# What is broken: the modules whose conversions, what takes their place, and with or without sequence parallel.
LINEAR, EMBEDDING = (linear, layout), (embedding,)
FAULTS: dict[str, tuple[tuple[Any, ...], Callable[..., Tensor], bool]] = {
    "a row that is not reduced": (LINEAR, instead(P, I), False),
    "a row that is not reduced, sequence parallel": (LINEAR, instead(P, S(0)), True),
    "a row that is reduced twice": (LINEAR, instead(P, I, (P, I), (P, I)), False),
    "a row that is reduced, not scattered": (LINEAR, instead(P, S(0), (P, I)), True),
    "a column whose input gradient is not reduced": (LINEAR, instead(I, R), False),
    "a column that does not gather its tokens": (LINEAR, instead(S(0), R), True),
    "a column that gathers without reducing backward": (LINEAR, instead(S(0), R, (S(0), I)), True),
    "an embedding that is not reduced": (EMBEDDING, instead(P, I), False),
    "an embedding that is not scattered": (EMBEDDING, instead(P, S(0), (P, I)), True),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_a_type_error(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    modules, faulty, sequence_parallel = FAULTS[fault]
    for module in modules:
        monkeypatch.setattr(module, "convert", faulty)
    with checked() as info, pytest.raises(SpmdTypeError):
        state_after(network(sequence_parallel), info)


def test_a_bias_that_is_added_on_every_rank_is_a_type_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowParallelLinear, "exit", bias_before_the_reduction)
    with checked() as info, pytest.raises(SpmdTypeError):
        state_after(network(sequence_parallel=False), info)


def test_a_nonlinearity_of_a_slice_of_the_vocabulary_is_a_type_error() -> None:
    with checked() as info:
        logits = typed(info, (16, 64, 32), S(2), requires_grad=True)
        labels = typed(info, (16, 64), R, dtype=torch.int64)
        assert state_of(vocab_parallel_cross_entropy(logits, labels), info) is I
        with pytest.raises(SpmdTypeError):
            torch.logsumexp(logits, -1)
        for state in (R, I, P, S(0)):
            with pytest.raises(SpmdTypeError):
                vocab_parallel_cross_entropy(typed(info, (16, 64, 32), state, requires_grad=True), labels)


def test_types_of_parameters_follow_their_layouts() -> None:
    """Divided: S. Its gradient a summand: R. Neither: I."""
    with checked() as info, checker.no_typecheck():
        column = ColumnParallelLinear(16, 32, gather_output=False, device="meta")
        row = RowParallelLinear(32, 16, input_is_parallel=True, sequence_parallel=True, device="meta")
        whole = RowParallelLinear(32, 16, device="meta")
        table = VocabParallelEmbedding(32, 16, device="meta")
        expected = {
            column.weight: (V, (info.tp.group, None)),
            column.bias: (V, (info.tp.group,)),
            row.weight: (V, (None, info.tp.group)),
            row.bias: (R, (None,)),
            whole.bias: (I, (None,)),
            table.weight: (V, (info.tp.group, None)),
        }
        for parameter, (state, spec) in expected.items():
            found = parameter_type(layout_of_tensor(parameter))
            assert found.local == {info.tp.group: state, info.dp.group: R}
            assert tuple(found.spec) == tuple(PartitionSpec(*spec))
        assert parameter_type(layout_of_tensor(column.weight)).local.keys() == {info.tp.group, info.dp.group}
        assert isinstance(info.tp, ParallelAxis)
