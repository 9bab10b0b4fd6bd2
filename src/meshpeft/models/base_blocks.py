"""Which parameters of a model make up each block of a base that is sharded over its replicas.

A block is a layer of the model's stack: the weights of its linear layers. Those of its experts, which have other
replicas, are a block of another store. What stands before and behind the stack, embedding and head, is cut into blocks
no larger than a layer. Norms, biases, convolutions, and whatever else is small stay on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from meshpeft.parallel import layer_type_of, layout_of_tensor, parallel_group_info
from meshpeft.parallel.embedding import VocabParallelEmbedding
from meshpeft.parallel.mesh import ParallelAxis
from meshpeft.parallel.sharded_base import BlockStore, is_stored, stored_, stored_by_rows_

__all__ = ["BaseBlocks", "ShardBase", "base_stores", "layer_stacks", "rows_of_tables", "shard_axes", "shard_base"]


ShardBase: TypeAlias = int | Literal["all", "none"]
"""Over how many of its dp * cp replicas a base is sharded."""


def shard_axes(shards: ShardBase) -> tuple[ParallelAxis, ParallelAxis]:
    """The axes over which a base is sharded, see `ParallelGroupInfo.replica_axes`."""
    counts: dict[ShardBase, int | None] = {"all": None, "none": 1}
    return parallel_group_info().replica_axes(shards if isinstance(shards, int) else counts[shards])


@dataclass(eq=False)
class BaseBlocks:
    """The blocks of a model, in the order in which they are stored.

    Args:
        model: Of either engine; its parameters may be on the meta device.
        shards: Over how many replicas.

    Attributes:
        dense, expert: Their stores.
    """

    model: nn.Module
    shards: ShardBase = "all"
    dense: BlockStore = field(init=False)
    expert: BlockStore = field(init=False)

    def __post_init__(self) -> None:
        self.dense, self.expert = map(BlockStore, shard_axes(self.shards))
        self._layers = {name: layer for stack in layer_stacks(self.model) for name, layer in stack}

    @property
    def layers(self) -> list[str]:
        """Full names of the layers."""
        return list(self._layers)

    def layer_of(self, name: str) -> str | None:
        """Return the full name of the layer that a parameter is in; `None` for those outside of the layers."""
        return next((layer for layer in self._prefixes_of(name) if layer in self._layers), None)

    @staticmethod
    def _prefixes_of(name: str) -> Iterator[str]:
        parts = name.split(".")
        return (".".join(parts[:count]) for count in range(1, len(parts)))

    def store_layer(self, name: str) -> None:
        """Put the weights of a layer, all of which hold values, into its blocks. No collective."""
        for store, is_expert in ((self.dense, False), (self.expert, True)):
            held = [
                (module, own)
                for module, own in _weights(self._layers[name].modules())
                if _is_expert(module._parameters[own]) is is_expert
            ]
            if held and store.axis.world_size > 1:
                _freeze(held)
                stored_(held, store)

    def store_tables(self) -> None:
        """Put embedding and head, and other weights outside of the layers, into theirs."""
        for held in self.tables().values():
            self.store_table(held)

    def store_table(self, held: list[tuple[nn.Module, str]], read: Callable[[int, int], Tensor] | None = None) -> None:
        """Put one weight outside of the layers into its blocks; `read` gives rows of one without values."""
        _freeze(held)
        parameter = held[0][0]._parameters[held[0][1]]
        assert parameter is not None
        rows = rows_of_tables(self.model)
        stored_by_rows_(held, self.dense, min(rows or parameter.shape[0], parameter.shape[0]), read)

    def tables(self) -> dict[int, list[tuple[nn.Module, str]]]:
        """Map the id of each weight outside of the layers that is sharded to the modules and names that hold it."""
        found: dict[int, list[tuple[nn.Module, str]]] = {}
        if self.dense.axis.world_size > 1:
            inside = {id(module) for layer in self._layers.values() for module in layer.modules()}
            for module, own in _weights(module for module in self.model.modules() if id(module) not in inside):
                found.setdefault(id(module._parameters[own]), []).append((module, own))
        return found


def shard_base(model: nn.Module, shards: ShardBase = "all") -> list[BlockStore]:
    """Shard the weights of a model that is in memory over its replicas, in place, and freeze them. No collective.

    Args:
        model: A language model of either engine, without adapters or with.
        shards: Over how many of the dp * cp replicas.

    Returns:
        The stores of its dense weights and of its experts'.

    Raises:
        ParallelError: The number does not divide that of replicas.
    """
    blocks = BaseBlocks(model, shards)
    for name in blocks.layers:
        blocks.store_layer(name)
    blocks.store_tables()
    return [store for store in (blocks.dense, blocks.expert) if store.shards]


def base_stores(model: nn.Module) -> list[BlockStore]:
    """The stores of a model's sharded base; none where it is not sharded."""
    parameters: list[Any] = list(model.parameters())
    return list(dict.fromkeys(parameter.store for parameter in parameters if is_stored(parameter)))


# Of models whose tables were looked at before: it takes a walk over all modules, and a forward pass asks.
_rows: WeakKeyDictionary[nn.Module, int | None] = WeakKeyDictionary()


def rows_of_tables(model: nn.Module) -> int | None:
    """Count the rows of embedding and head that have the size of the largest layer; `None` where all do.

    A sharded base holds, and the loss multiplies by, so many at a time: by as many where it is not sharded, so that the
    numbers are the same.
    """
    if model not in _rows:
        _rows[model] = _rows_of_tables(model)
    return _rows[model]


def _rows_of_tables(model: nn.Module) -> int | None:
    layers = [layer for stack in layer_stacks(model) for _, layer in stack]
    sizes = [
        sum(
            parameter.nbytes
            for module, own in _weights(layer.modules(), also_stored=True)
            if (parameter := module._parameters[own]) is not None and not _is_expert(parameter)
        )
        for layer in layers
    ]
    get: Any = getattr(model, "get_output_embeddings", lambda: getattr(model, "output_layer", None))
    head = getattr(get(), "to_wrap", get())
    weight = getattr(head, "weight", None)
    if not isinstance(weight, nn.Parameter) or not sizes or weight.dim() != 2:
        return None
    rows = max(1, max(sizes) // (weight.shape[1] * weight.dtype.itemsize))
    return None if rows >= weight.shape[0] else rows


def layer_stacks(model: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """Yield the lists of layers of a model that are not in another list."""
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
            yield [(f"{name}.{own}", layer) for own, layer in module.named_children()]


def _weights(modules: Iterable[nn.Module], *, also_stored: bool = False) -> Iterator[tuple[nn.Module, str]]:
    """Yield the weights of linear layers and tables, as holder and name, that are not in a store yet, or all."""
    for module in modules:
        if layer_type_of(module) is None and not isinstance(module, VocabParallelEmbedding | nn.Embedding):
            continue
        for name, parameter in module._parameters.items():
            if name in _STORED and parameter is not None and (also_stored or not is_stored(parameter)):
                yield module, name


_STORED = ("weight", "weight_packed", "weight_scale")


def _is_expert(parameter: nn.Parameter | None) -> bool:
    layout = None if parameter is None else layout_of_tensor(parameter)
    return layout is not None and layout.expert


def _freeze(held: Iterable[tuple[nn.Module, str]]) -> None:
    for module, name in held:
        parameter = module._parameters[name]
        if parameter is not None:
            parameter.requires_grad_(False)
