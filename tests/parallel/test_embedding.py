"""The embeddings are `nn.Embedding` with the master table, every option included."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.simulate import per_rank, rank_values, simulate, the_same
from torch import Tensor, nn

from meshpeft.parallel import (
    ParallelEmbedding,
    ParallelError,
    TensorLayout,
    VocabParallelEmbedding,
    finalize_gradients,
    gradient_norm,
    layout_of_tensor,
)
from meshpeft.verify.simulation import count_collectives

VOCABULARY, WIDTH = 12, 8
INDICES = torch.tensor([[0, 3, 3, 11], [5, 3, 11, 7]])
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def whole(parameter: Tensor, value: Tensor) -> Tensor:
    layout = layout_of_tensor(parameter)
    assert layout is not None
    return the_same(layout.gather(value.to_dense() if value.is_sparse else value))


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padding_idx": 3},
    "padding, from the end": {"padding_idx": -1},
    "by frequency": {"scale_grad_by_freq": True},
    "sparse": {"sparse": True},
    "max_norm": {"max_norm": 0.5},
    "max_norm, 1": {"max_norm": 1.0, "norm_type": 1.0},
    "max_norm, inf": {"max_norm": 0.2, "norm_type": math.inf},
    "max_norm that no row exceeds": {"max_norm": 100.0},
    "all": {"padding_idx": 3, "max_norm": 0.4, "norm_type": 3.0, "scale_grad_by_freq": True},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("tp", (1, 2, 4))
def test_divided_along_the_embedding_dim(tp: int, name: str) -> None:
    options = OPTIONS[name]
    y_grad = torch.randn(*INDICES.shape, WIDTH, dtype=torch.float64)
    with simulate(tp=tp):
        layer = ParallelEmbedding(VOCABULARY, WIDTH, dtype=torch.float64, **options)
        table = the_same(layer.master_weight).clone()
        reference = nn.Embedding(VOCABULARY, WIDTH, dtype=torch.float64, **options)
        reference.weight.data.copy_(table)
        reference(INDICES).backward(y_grad)
        expected_grad = reference.weight.grad

        found = layer(INDICES)
        found.backward(per_rank(lambda rank: y_grad.clone()))
        assert rank_values(layer.weight.grad)[0].is_sparse == options.get("sparse", False)
        grad = per_rank(lambda rank: layer_grad(layer, rank))
        # Before max_norm the table is drawn; afterwards, renormalised in place, row by full row.
        assert relative(whole(layer.weight, layer.weight), reference.weight.detach()) < 1e-14
        assert relative(the_same(found), reference(INDICES).detach()) < 1e-14
        dense = expected_grad.to_dense() if expected_grad.is_sparse else expected_grad
        assert relative(whole(layer.weight, grad), dense) < 1e-14
        if "padding_idx" in options:
            assert bool((whole(layer.weight, grad)[options["padding_idx"]] == 0).all())
            assert bool((table[options["padding_idx"]] == 0).all())
        touched = (reference.weight.detach() - table).abs().amax(1) > 0
        assert bool(touched.any()) == (options.get("max_norm", 100.0) < 100.0)
        assert not bool(touched[[1, 2, 4]].any())  # not looked up


def layer_grad(layer: nn.Module, rank: int) -> Tensor:
    grad = rank_values(layer.weight.grad)[rank]
    return grad.to_dense() if grad.is_sparse else grad.clone()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", ((), (8,), (4, 1, 3)))
@pytest.mark.parametrize("kind", (ParallelEmbedding, VocabParallelEmbedding))
def test_any_leading_shape_and_type(kind: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randint(0, VOCABULARY, shape)
    with simulate(tp=2):
        layer = kind(VOCABULARY, WIDTH, dtype=dtype)
        assert torch.equal(the_same(layer(x)).detach(), the_same(layer.master_weight)[x])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_max_norm_in_other_types(dtype: torch.dtype) -> None:
    """The norm is taken in float32 at least; the reference here is float64 rounded to the type."""
    with simulate(tp=2):
        layer = ParallelEmbedding(VOCABULARY, WIDTH, max_norm=0.3, dtype=dtype)
        rows = the_same(layer.master_weight).double()
        norms = rows.norm(dim=1, keepdim=True)
        expected = (rows * torch.where(norms > 0.3, 0.3 / norms, torch.ones_like(norms)))[INDICES]
        found = the_same(layer(INDICES)).detach()
        assert found.dtype == dtype
        assert relative(found.double(), expected) < max(TOLERANCE[dtype], 1e-6)  # the guard of 1e-7 in the division


def test_max_norm_gives_every_data_parallel_rank_the_same_table() -> None:
    """Ranks look up different rows; a table renormalised by one rank alone would go its own way."""
    with simulate(tp=2, dp=2):
        layer = ParallelEmbedding(VOCABULARY, WIDTH, max_norm=0.1)
        layer(per_rank(lambda rank: INDICES[rank // 2]))
        norms = the_same(layer.master_weight).norm(dim=1)
        looked_up = torch.zeros(VOCABULARY, dtype=torch.bool)
        looked_up[INDICES.flatten()] = True
        assert bool((norms[looked_up] <= 0.1).all())
        assert bool((norms[~looked_up] > 0.1).all())


def test_sparse_gradients_are_summed_over_data_parallel_and_stay_sparse() -> None:
    table = torch.randn(VOCABULARY, WIDTH)
    weights = torch.randn(2, 4, WIDTH)
    reference = nn.Embedding(VOCABULARY, WIDTH, _weight=table.clone())
    (reference(INDICES) * weights).sum().backward()
    with simulate(tp=2, dp=2) as info:
        layer = ParallelEmbedding(VOCABULARY, WIDTH, sparse=True)
        mine = TensorLayout(tuple(weights.shape), ((0, info.dp),)).slice(weights)
        (layer(per_rank(lambda rank: INDICES[rank // 2 : rank // 2 + 1])) * mine).sum().backward()
        finalize_gradients(layer)
        assert layer.weight.grad.is_sparse
        grad = per_rank(lambda rank: layer_grad(layer, rank))
        assert relative(whole(layer.weight, grad), reference.weight.grad) < 1e-6
        assert the_same(gradient_norm(layer)).item() == pytest.approx(reference.weight.grad.norm().item(), rel=1e-6)


@pytest.mark.parametrize("sequence_parallel", (False, True))
@pytest.mark.parametrize("tp", (1, 2, 4))
def test_divided_along_the_vocabulary(tp: int, sequence_parallel: bool) -> None:
    x = torch.randint(0, VOCABULARY, (4, 3))
    y_grad = torch.randn(4, 3, WIDTH, dtype=torch.float64)
    with simulate(tp=tp) as info:
        layer = VocabParallelEmbedding(VOCABULARY, WIDTH, sequence_parallel=sequence_parallel, dtype=torch.float64)
        reference = nn.Embedding(VOCABULARY, WIDTH, _weight=the_same(layer.master_weight).clone())
        expected = reference(x)
        expected.backward(y_grad)
        layout = TensorLayout((4, 3, WIDTH), ((0, info.tp),) if sequence_parallel else ())
        with count_collectives() as calls:
            found = layer(x)
            forward = [call.name for call in calls]
            found.backward(layout.slice(y_grad).clone())
        assert torch.equal(the_same(layout.gather(found)), expected.detach())
        assert relative(whole(layer.weight, layer.weight.grad), reference.weight.grad) < 1e-14
        if tp == 1:
            assert calls == []
        elif sequence_parallel:
            assert (forward, [call.name for call in calls[1:]]) == (["reduce_scatter"], ["allgather"])
        else:
            assert (forward, calls[1:]) == (["allreduce"], [])


@pytest.mark.parametrize("index", (-1, VOCABULARY, 10**9))
@pytest.mark.parametrize("tp", (1, 2))
@pytest.mark.parametrize("kind", (ParallelEmbedding, VocabParallelEmbedding))
def test_an_index_outside_the_vocabulary_is_an_error(kind: Any, tp: int, index: int) -> None:
    """On a divided table it is in no rank's part, and would give a row of zeros."""
    with simulate(tp=tp):
        layer = kind(VOCABULARY, WIDTH)
        with pytest.raises((IndexError, RuntimeError), match=r"out of range|outside the vocabulary \[0, 12\)"):
            layer(torch.tensor([1, index]))


def test_sizes_that_do_not_fit() -> None:
    with simulate(tp=4):
        with pytest.raises(ParallelError, match=r"dim 1 of a tensor of shape \(12, 6\) cannot be split over tp=4"):
            ParallelEmbedding(12, 6)
        with pytest.raises(ParallelError, match=r"dim 0 of a tensor of shape \(10, 8\) cannot be split over tp=4"):
            VocabParallelEmbedding(10, 8)
    for index in (-13, 12):
        with pytest.raises(ParallelError, match=rf"padding_idx={index}: expected an index of 12 embeddings"):
            ParallelEmbedding(12, 8, padding_idx=index)
