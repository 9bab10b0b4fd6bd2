"""A tensor whose values are in a store of sharded blocks: every operation sees those values, and keeps none."""

from __future__ import annotations

import io
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from meshpeft.parallel import ParallelAxis, ParallelError
from meshpeft.parallel.sharded_base import BlockStore, BlockTensor, gathered, stored_, stored_by_rows_
from meshpeft.peft import LoRA
from meshpeft.peft.wrapper import base_of
from meshpeft.verify.simulation import on_rank, simulate, the_same

X = torch.linspace(-2, 2, 30, dtype=torch.float64).view(5, 6)
INDEX = torch.tensor([[0, 7], [11, 4]])


def linear(seed: int, rows: int = 12, columns: int = 6) -> nn.Linear:
    """A frozen layer; nothing is drawn, for simulated ranks would draw a layer each."""
    layer = nn.Linear(columns, rows, device="meta")
    values = torch.arange(rows * (columns + 1), dtype=torch.float64).add(100 * seed).sin()
    weight, bias = values.split((rows * columns, rows))
    layer.weight = nn.Parameter(weight.reshape(rows, columns).clone(), requires_grad=False)
    layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer


def put(layer: nn.Module, store: BlockStore, rows: int | None = None) -> None:
    if rows is None:
        stored_([(layer, "weight")], store)
    else:
        stored_by_rows_([(layer, "weight")], store, rows)


OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "product": lambda w: X @ w.t(),
    "linear": lambda w: functional.linear(X, w),
    "rows": lambda w: w[3:7] * 2,
    "row": lambda w: w[5].sum(),
    "column": lambda w: w[:, 2].clone(),
    "reshaped": lambda w: w.view(3, 4, 6).transpose(0, 2).contiguous(),
    "split": lambda w: [part + 1 for part in w.split(5)],
    "looked up": lambda w: functional.embedding(INDEX, w),
    "another type": lambda w: w.float() * 2,
    "its bits": lambda w: w.view(torch.int64).sum(),
    "twice": lambda w: torch.cat((w, w.flip(0))),
    "detached": lambda w: w.detach().square(),
}


@pytest.mark.parametrize("rows", [None, 5], ids=["one block", "blocks of rows"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_sees_the_values(operation: str, rows: int | None) -> None:
    expected = OPERATIONS[operation](linear(0).weight)
    with simulate(dp=2) as info:
        store, first, layer = BlockStore(info.dp), linear(1), linear(0)
        stored_([(first, "weight")], store)  # another block, so that this one does not begin the buffer
        put(layer, store, rows)
        assert isinstance(layer.weight, BlockTensor) and isinstance(layer.weight, nn.Parameter)
        found = OPERATIONS[operation](layer.weight)
        found = [the_same(part) for part in (found if isinstance(found, list) else [found])]
    expected = expected if isinstance(expected, list) else [expected]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_one_operation_may_take_tensors_of_several_blocks() -> None:
    layers = [linear(seed) for seed in range(3)]
    expected = torch.cat([layer.weight for layer in layers])
    with simulate(dp=2) as info:
        store = BlockStore(info.dp)
        for layer in layers:
            stored_([(layer, "weight")], store)
        assert torch.equal(the_same(torch.cat([layer.weight for layer in layers])), expected)


def loss_and_gradient(layers: list[nn.Linear], adapter: Tensor) -> tuple[Tensor, Tensor]:
    hidden = X
    for layer in layers:
        hidden = torch.tanh(layer(hidden) + (hidden @ adapter.t()) @ adapter)
    loss = hidden.square().sum()
    (gradient,) = torch.autograd.grad(loss, adapter)
    return loss, gradient


@pytest.mark.parametrize("count", [3, 8])
def test_a_block_is_gathered_once_a_pass_and_kept_at_the_turns(count: int) -> None:
    """Two blocks are in memory when the direction changes, so these are not gathered again."""
    adapter = torch.arange(12, dtype=torch.float64).view(2, 6).cos().requires_grad_()
    expected = loss_and_gradient([linear(seed, 6) for seed in range(count)], adapter)
    with simulate(dp=2) as info:
        store, layers = BlockStore(info.dp), [linear(seed, 6) for seed in range(count)]
        for layer in layers:
            stored_([(layer, "weight")], store)
        gathers = []
        for _ in range(3):
            before = store.gathers
            found = loss_and_gradient(layers, adapter)
            gathers.append(store.gathers - before)
            assert all(torch.equal(the_same(a), b) for a, b in zip(found, expected, strict=True))
        assert gathers[1:] == [2 * count - 4] * 2
        block = -(-layers[0].weight.nbytes // 128) * 128  # both ranks' parts begin at multiples of 64 bytes
        assert store.nbytes == count * block // 2 and store.buffer_bytes == 2 * block
        assert store.gathered_bytes == store.gathers * block // 2


def test_a_block_that_was_not_expected_is_gathered_in_the_other_s_place() -> None:
    with simulate(dp=2) as info:
        store, layers = BlockStore(info.dp), [linear(seed) for seed in range(4)]
        for layer in layers:
            stored_([(layer, "weight")], store)
        for number in (0, 3, 1, 1, 2, 0, 3):
            assert torch.equal(the_same(layers[number].weight + 0), linear(number).weight)


def test_a_weight_is_replaced_as_a_whole_only() -> None:
    with simulate(dp=2) as info:
        store, layer = BlockStore(info.dp), linear(0)
        stored_([(layer, "weight"), (layer, "bias")], store)
        new = linear(1).weight.detach().clone()
        with torch.no_grad():
            layer.weight.copy_(new)
            assert torch.equal(the_same(layer.weight + 0), new)
            assert torch.equal(the_same(layer.bias + 0), linear(0).bias)
            with pytest.raises(ParallelError, match="as a whole"):
                layer.weight[:2].copy_(new[:2])
            with pytest.raises(ParallelError, match="read-only"):
                layer.weight.mul_(2)
        assert torch.equal(the_same(layer.weight + 0), new)


@pytest.mark.parametrize(("to", "source"), [(2, 1), (0, 1), (1, 0), (0, 2)])
def test_a_weight_is_replaced_by_another_of_its_store(to: int, source: int) -> None:
    """Reading one starts to gather the next, which may be the one that is replaced."""
    with simulate(dp=2) as info:
        store, layers = BlockStore(info.dp), [linear(seed) for seed in range(3)]
        for layer in layers:
            stored_([(layer, "weight")], store)
        with torch.no_grad():
            layers[to].weight.copy_(layers[source].weight)
        for number, layer in enumerate(layers):
            assert torch.equal(the_same(layer.weight + 0), linear(source if number == to else number).weight)


IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda w: w.mul_(2),
    "of a view": lambda w: w[1:3].zero_(),
    "out": lambda w: torch.mul(X[:1], 2, out=w.detach()[:1]),
    "in a list": lambda w: torch._foreach_mul_([w.detach()], 2.0),
}


@pytest.mark.parametrize("operation", IN_PLACE)
def test_nothing_is_written_into_what_was_gathered(operation: str) -> None:
    with simulate(dp=2) as info:
        store, layer = BlockStore(info.dp), linear(0)
        put(layer, store)
        with torch.no_grad(), pytest.raises(ParallelError, match="read-only"):
            IN_PLACE[operation](layer.weight)
        assert torch.equal(the_same(layer.weight + 0), linear(0).weight)


def test_a_store_goes_where_its_module_goes_and_not_with_a_copy() -> None:
    def places() -> set[str]:
        return {shard.device.type for shard in store.shards}

    with FakeTensorMode():
        model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(2))).requires_grad_(False)
        store = BlockStore(ParallelAxis("dp"))
        for layer in model:
            put(layer, store)
        copies = [value.to("meta") for value in model.state_dict().values()]
        assert not any(isinstance(value, BlockTensor) for value in copies) and places() == {"cpu"}
        with pytest.raises(ParallelError, match="lose its values"):
            model.to("meta")
        assert places() == {"cpu"}
        model[0].weight.to("cuda:0")
        assert places() == {"cuda"}
        assert (model[1].weight + 0).device.type == "cpu" and places() == {"cpu"}
        model.to("cuda:0")
        assert places() == {"cuda"} and {p.device.type for p in model.parameters()} == {"cuda"}


def test_a_part_of_a_weight_is_not_pickled() -> None:
    with simulate(dp=2) as info:
        layer = linear(0)
        put(layer, BlockStore(info.dp))
        with pytest.raises(ParallelError, match="save_pretrained"):
            torch.save(layer.state_dict(), io.BytesIO())


def test_a_copy_of_a_module_has_a_store_of_its_own() -> None:
    with simulate(dp=2) as info:
        store = BlockStore(info.dp)
        model = nn.Sequential(linear(0), linear(1, 6, 12))
        model[0].weight.of_an_engine = "kept"  # type: ignore[union-attr]
        for layer in model:
            stored_([(layer, "weight")], store)
        copied = deepcopy(model)
        first, second = (layer.weight for layer in copied)
        assert first.store is second.store is not store and first.of_an_engine == "kept"  # type: ignore[union-attr]
        with torch.no_grad():
            first.copy_(torch.zeros_like(linear(0).weight))
        assert torch.equal(the_same(model[0].weight + 0), linear(0).weight)  # type: ignore[operator]
        assert copied.float()[1].weight.dtype == torch.float32
        assert isinstance(copied[1].weight, BlockTensor)


def test_what_is_trained_is_not_stored() -> None:
    with simulate(dp=2) as info, pytest.raises(ParallelError, match="freeze the base"):
        stored_([(linear(0).requires_grad_(), "weight")], BlockStore(info.dp))


def test_tied_parameters_stay_one() -> None:
    first, second = linear(0), linear(0)
    second.weight = first.weight
    with simulate(dp=2) as info:
        store = BlockStore(info.dp)
        stored_([(first, "weight"), (second, "weight")], store)
        assert first.weight is second.weight
        assert on_rank(gathered(second.weight), 1).equal(linear(0).weight)


@pytest.mark.parametrize(("shards", "of_experts"), [(1, 1), (2, 1), (4, 2), (None, 2)])
def test_experts_are_sharded_over_what_expert_parallel_leaves_of_a_group(shards: int | None, of_experts: int) -> None:
    with simulate(dp=4, ep=2) as info:
        dense, expert = info.replica_axes(shards)
        assert (dense.world_size, expert.world_size) == (shards or 4, of_experts)


def test_a_number_that_does_not_divide_is_refused() -> None:
    with simulate(dp=2, cp=2) as info, pytest.raises(ParallelError, match=r"dp times cp is 4, .* use 1 or 2 or 4"):
        info.replica_axes(3)


@pytest.mark.parametrize("adapted", [False, True], ids=("bare", "adapted"))
def test_a_compiled_layer_reads_its_weights_outside_of_the_graph(adapted: bool) -> None:
    torch._dynamo.reset()
    layers = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)).requires_grad_(False)
    whole, x = deepcopy(layers), torch.randn(3, 16, requires_grad=True)
    stored_([(layers[0], "weight"), (layers[2], "weight")], BlockStore(ParallelAxis("dp")))
    if adapted:
        for model in (whole, layers):
            LoRA(["0", "2"], dim=2, lora_B_init_method="normal")(model)
        layers.load_state_dict(whole.state_dict(), strict=False)
    compiled = torch.compile(layers, backend="aot_eager")
    for change in (1.0, 2.0):
        with torch.no_grad():
            for model in (whole, layers):
                weight = base_of(model[0]).weight
                weight.copy_(weight * change)
        found, expected = compiled(x), whole(x)
        assert torch.equal(found, expected)
        assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (found, expected)))
