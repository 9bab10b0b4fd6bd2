"""The hidden stream of a transformers model between its blocks, and how a block takes it and gives it back.

A block here is an attention, an MLP, or any other module that a layer calls with its hidden states. Its linear layers
are sharded (`parallelize.py`); the code around them is transformers'. So the stream is converted where a block's call
begins and ends, once for all of its layers, by hooks:

| block | the stream -> in the block | in the block -> the stream |
|---|---|---|
| columns, then one row, and nothing else | -> R | P -> |
| any other | -> I | I -> |

Outside, the stream is I, or Shard(1) under sequence parallel: [batch, tokens / tp, hidden], the tokens of a row filled
up with zeros to a multiple of tp. So a block of columns and a row costs an all-reduce in each pass, or an all-gather
and a reduce-scatter under sequence parallel, however many columns take its input; any other gathers and keeps its
slice. Norms, and whatever else a layer does with single tokens, run on the shards, so that the gradients of their
parameters are partial. The states are those of `parallel/states.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from meshpeft.parallel import I, P, ParallelAxis, ParallelError, R, Shard, State, TensorLayout, convert, set_layout

__all__ = ["HiddenStream", "attach_stream", "layers_of_stream"]


@dataclass
class HiddenStream:
    """The hidden stream [batch, tokens, hidden] of one model.

    Attributes:
        axis: Tensor parallel.
        state: Its state between blocks: I or Shard(1).
        length: Number of tokens in a row, of the micro-batch that is computed; where the state is I, not used.
    """

    axis: ParallelAxis
    state: State = I
    length: int = 0

    def begin(self, hidden: Tensor) -> Tensor:
        """Convert what the first layer is given, I, to the state of the stream.

        Raises:
            ParallelError: It is more than one vector for each token.
        """
        if hidden.dim() != 3:
            raise ParallelError(
                f"hidden states of shape {tuple(hidden.shape)}: sequence parallel shards those of shape [batch, "
                "tokens, hidden]; leave it out"
            )
        self.length = hidden.shape[1]
        return self.leave(hidden, I)

    def end(self, hidden: Tensor) -> Tensor:
        """Convert what the last layer gives to I."""
        return self.enter(hidden, I)

    def enter(self, hidden: Tensor, state: State) -> Tensor:
        """Convert the stream to the state in which a block takes it, I or R: [batch, tokens, hidden]."""
        hidden = convert(hidden, self.state, state, self.axis)
        if self.state is I or hidden.shape[1] == self.length:
            return hidden
        return hidden[:, : self.length].contiguous()  # code after it takes views

    def leave(self, hidden: Tensor, state: State) -> Tensor:
        """Convert what a block gives, I or P [batch, tokens, hidden], to the state of the stream."""
        missing = 0 if self.state is I else -hidden.shape[1] % self.axis.world_size
        if missing:
            hidden = functional.pad(hidden, (0, 0, 0, missing))
        return convert(hidden, state, self.state, self.axis)

    def shard_others(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        """Convert what else a layer is given for every token, [batch, tokens, *] and I, as its hidden states."""
        hidden = next(iter((*args, *kwargs.values())))
        kept = hidden.shape[0], self.length

        def sharded(value: Any) -> Any:
            if not isinstance(value, Tensor) or value is hidden or value.is_complex():
                return value  # rotary angles are complex, or several tensors, and attention takes those of all tokens
            return self.leave(value, I) if value.dim() == 3 and tuple(value.shape[:2]) == kept else value

        return tuple(map(sharded, args)), {name: sharded(value) for name, value in kwargs.items()}

    def attach(self, block: nn.Module, inside: State, result: State) -> None:
        """Let a block take the stream in the state `inside`, and convert what it gives from the state `result`."""
        block.register_forward_pre_hook(partial(_given, partial(self.enter, state=inside)), with_kwargs=True)
        block.register_forward_hook(partial(_returned, partial(self.leave, state=result)))


def attach_stream(
    model: nn.Module,
    axis: ParallelAxis,
    blocks: Iterable[str],
    experts: Collection[str] = (),
    layers: str | None = None,
) -> None:
    """Convert the hidden stream of a model at its blocks, in place.

    Args:
        model: A model of transformers, with parallel layers.
        axis: Tensor parallel.
        blocks: Full names of blocks of columns, which take R, and one row, which gives P.
        experts: Full names of stacks of experts. A layer that calls one itself hands tokens on in a shape of its own,
            so that such a layer as a whole is a block.
        layers: Name of the list of layers between which the stream is Shard(1); `None`: it is I.
    """
    plain, stream = HiddenStream(axis), HiddenStream(axis, Shard(1))
    stack: Any = [] if layers is None else model.get_submodule(layers)
    called: dict[str, nn.Module] = {}
    for number, layer in enumerate(stack):
        own = _called(f"{layers}.{number}", layer)
        called |= {f"{layers}.{number}": layer} if any(name in own for name in experts) else own
    # Hooks run in the order in which they are attached: the stream begins before the first block, and ends last.
    if layers is not None:
        stack[0].register_forward_pre_hook(partial(_given, stream.begin), with_kwargs=True)
    for number, layer in enumerate(stack):
        if f"{layers}.{number}" not in called:
            layer.register_forward_pre_hook(stream.shard_others, with_kwargs=True)
    modules = {name: model.get_submodule(name) for name in blocks}
    for name, module in modules.items():
        (stream if name in called else plain).attach(module, R, P)
    attached = {id(module) for module in modules.values()}  # layers may share a block
    for module in called.values():
        if _is_norm(module):
            for parameter in module.parameters():
                set_layout(parameter, TensorLayout(tuple(parameter.shape), grad_partial=(axis,)))
        elif id(module) not in attached:
            stream.attach(module, I, I)
            attached.add(id(module))
    if layers is not None:
        stack[-1].register_forward_hook(partial(_returned, stream.end))


def layers_of_stream(model: nn.Module, sharded: Iterable[str]) -> str:
    """Find the name of the list of layers between which the hidden stream can be sharded.

    Args:
        model: A model of transformers.
        sharded: Full names of the modules that are sharded in any way, which those of a tower of images are not.

    Raises:
        ParallelError: There is not one such list.
    """
    sharded = list(sharded)
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(own.startswith(f"{name}.") for own in sharded)
    ]
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outer) != 1:
        raise ParallelError(
            f"{type(model).__name__}: sequence parallel shards the tokens between the layers of one list, and this "
            f"model has {len(outer)} ({', '.join(outer)}); leave it out"
        )
    return outer[0]


def _called(prefix: str, layer: nn.Module) -> dict[str, nn.Module]:
    """Find the modules with parameters that a layer's code calls itself, by full name."""
    found: dict[str, nn.Module] = {}
    for own, child in layer.named_children():
        name = f"{prefix}.{own}"
        if isinstance(child, nn.ModuleList):
            found |= _called(name, child)
        elif next(child.parameters(), None) is not None:
            found[name] = child
    return found


def _is_norm(module: nn.Module) -> bool:
    """Whether a module treats each token for itself: a norm over the channels."""
    return not [*module.children()] and all(parameter.dim() <= 1 for parameter in module.parameters())


def _given(change: Callable[[Tensor], Tensor], module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Change the first argument of a call, by place or by name."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    name = _first_parameter(type(module).forward)
    return args, {**kwargs, name: change(kwargs[name])}


def _returned(change: Callable[[Tensor], Tensor], module: nn.Module, args: Any, result: Any) -> Any:
    """Change what a call gives, or the first of several."""
    if isinstance(result, Tensor):
        return change(result)
    return type(result)((change(result[0]), *result[1:]))


@cache
def _first_parameter(forward: Callable[..., Any]) -> str:
    return list(inspect.signature(forward).parameters)[1]  # after self
