"""Cross entropy over a vocabulary that is sharded: of logits that exist, and of a head whose logits never do.

`vocab_parallel_cross_entropy` takes logits. `vocab_parallel_linear_cross_entropy` takes hidden states and the head, and
makes product, softmax and gradient for a chunk of tokens at a time: only one chunk's logits exist, tokens without a
label never reach the head, and one all-gather of two numbers a token follows the last chunk.

The loss is one number for each token, and nothing here divides it. Training divides the sum by the number of labels
that are not ignored in the global batch, over dp, cp and all micro-batches (`meshpeft.training.step`).

With the logits z of a token, its label y, and the vocabulary without y in two steps, this rank's part r and all of it,

    l_r = log sum over v in r, v != y, of exp(z_v)        l = log sum over r of exp(l_r)
    loss = log(1 + exp(l - z_y))                          1 - p_y = sigmoid(l - z_y)
    dloss/dz_v = (1 - p_y) exp(l_r - l) exp(z_v - l_r)    for v != y
    dloss/dz_y = -(1 - p_y)

The gathered numbers are l_r and z_y. No term of a confident token is a difference of two numbers that are nearly equal,
as those of softmax(z) - onehot(y) and of lse(z) - z_y are: at p_y near 1 they lose every digit of a narrow type.

The row of the hidden state's gradient depends on its own token alone. So where the head is frozen, the gradient of the
loss made in the forward pass is exact for any gradient that later arrives for each token, and nothing else is kept. The
gradient of an adapter on the head is a sum over tokens: it can be made then only if all get the same gradient, as from
a sum of the losses, and if the whole vocabulary is on one rank, for l is known after the last chunk. Where that holds
it is made in the forward pass; else the head's product is made once more in the backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import spmd_types as spmd
import torch
import torch.distributed as dist
from spmd_types import rules
from spmd_types.types import I
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed._local_tensor import LocalTensor
from torch.nn import functional

from meshpeft.parallel.errors import ParallelError
from meshpeft.parallel.mesh import ParallelAxis, on_each_rank, parallel_group_info
from meshpeft.parallel.states import all_gather, all_reduce
from meshpeft.parallel.typing import typed_linear

__all__ = [
    "UNSCALED",
    "AdaptedHead",
    "FrozenHead",
    "LogitScaling",
    "count_targets",
    "default_loss_chunk",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
]

# Logits that exist at a time, in float32: a CPU is fastest where they stay near its caches, a GPU needs large products.
_CHUNK_BYTES = {"cpu": 64 << 20}
_CHUNK_BYTES_OF_OTHERS = 512 << 20
# Fewer tokens than this make the product slow whatever the vocabulary.
_LEAST_CHUNK = 128


@on_each_rank
def _local_targets(
    labels: Tensor, rank: int, rows: int, vocabulary: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Each label's place in this rank's slice (0 where another rank holds it), whether it is held here, and counts."""
    counted = labels != ignore_index
    # Without it a label that no rank holds would give a plausible loss. Asynchronous on a GPU.
    inside = ((labels >= 0) & (labels < vocabulary)) | ~counted
    torch._assert_async(inside.all(), f"a label is neither in [0, {vocabulary}) nor ignore_index={ignore_index}")
    local = labels - rank * rows
    held = (local >= 0) & (local < rows) & counted
    return local * held, held, counted


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int, axis: ParallelAxis) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        maximum = all_reduce(logits.amax(-1), axis, dist.ReduceOp.MAX).to(dtype)
        shifted = logits.to(dtype) - maximum.unsqueeze(-1)
        rows = logits.shape[-1]
        index, held, counted = _local_targets(labels, axis.rank, rows, rows * axis.world_size, ignore_index)
        # Filled, not multiplied: a logit may be -inf (a token that is ruled out), and padding may hold anything.
        target = shifted.gather(-1, index.unsqueeze(-1)).squeeze(-1).masked_fill(~held, 0)
        exponentials = shifted.exp_()
        # One collective carries both sums: [2, *].
        sums = all_reduce(torch.stack((exponentials.sum(-1), target)), axis)
        loss = (sums[0].log() - sums[1]).masked_fill(~counted, 0)
        ctx.save_for_backward(exponentials.div_(sums[0].unsqueeze(-1)), index, held, counted)
        ctx.dtype = logits.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        softmax, index, held, counted = ctx.saved_tensors
        scale = (grads[0] * counted).unsqueeze(-1)
        grad = softmax * scale
        grad.scatter_add_(-1, index.unsqueeze(-1), -scale * held.unsqueeze(-1))
        return grad.to(ctx.dtype), None, None, None

    @staticmethod
    def spmd_typecheck(*, logits: Tensor, labels: Tensor, axis: ParallelAxis) -> Any:
        rules.ignore(labels)
        names = "abcdefgh"[: logits.dim() - 1]
        if axis.world_size == 1:
            return rules.einsum(f"{names}_->{names}", logits)
        # The vocabulary is summed over the axis inside: a stand-in for max, exp and sum, which are not linear.
        partial = rules.einsum(f"{names}v->{names}", logits)
        return rules.all_reduce(partial, axis.process_group, dst=I)


def vocab_parallel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    axis: ParallelAxis | None = None,
) -> Tensor:
    """-log softmax(logits)[label] for each token. logits S(-1), labels I -> loss I; backward I -> S(-1).

    Two collectives of one number per token (the maximum; the two sums), none in the backward pass.

    Args:
        logits: [*, vocab / world_size], this rank's slice of the vocabulary.
        labels: [*] of indices into the full vocabulary, the same on every rank.
        ignore_index: Tokens with this label have loss 0 and no gradient.
        axis: Axis that shards the vocabulary; tensor parallel by default.

    Returns:
        [*], in nats, in float32 or the wider type of the logits.

    Raises:
        ParallelError: The shapes do not fit.
        RuntimeError: a label is neither an index of the vocabulary nor `ignore_index` (on a GPU, when it gets there).
    """
    axis = parallel_group_info().tp if axis is None else axis
    if logits.shape[:-1] != labels.shape:
        raise ParallelError(
            f"logits of shape {tuple(logits.shape)} need labels of shape {tuple(logits.shape[:-1])}, "
            f"got {tuple(labels.shape)}"
        )
    loss: Tensor = _CrossEntropy.apply(logits, labels, ignore_index, axis)
    return loss


class LogitScaling(NamedTuple):
    """What becomes of a head's product z: logits are cap tanh(scale z / cap), or scale z where there is no cap."""

    scale: float = 1.0
    cap: float | None = None

    def logits(self, z: Tensor) -> Tensor:
        """z [*] -> logits [*], in the type of z. Differentiable."""
        if self.cap is not None:
            return (z * (self.scale / self.cap)).tanh() * self.cap
        return z if self.scale == 1 else z * self.scale

    def logits_(self, z: Tensor) -> Tensor:
        """z [*] -> logits [*], in place."""
        if self.cap is not None:
            return z.mul_(self.scale / self.cap).tanh_().mul_(self.cap)
        return z if self.scale == 1 else z.mul_(self.scale)

    def slope(self, logits: Tensor) -> Tensor | None:
        """Return dlogits/dz at these logits [*]; `None` where it is `scale` everywhere."""
        if self.cap is None:
            return None
        return logits.div(self.cap).square_().clamp_(max=1).neg_().add_(1).mul_(self.scale)


UNSCALED = LogitScaling()
"""Logits that are the product itself."""


@dataclass(frozen=True, eq=False)
class FrozenHead:
    """A head z = x Wᵀ + b that gets no gradient.

    Attributes:
        weight: W [vocab / world_size, hidden], S(0); or a function that makes it (dequantised, gathered), which is
            called once in each forward pass, and nothing keeps its result.
        bias: b [vocab / world_size].
        scaling: What becomes of z.
        vocabulary: Size of the vocabulary over all ranks, where there are rows beyond it so that it divides; these take
            no part. By default all rows do.
        rows_at_a_time: Rows of W that are multiplied by at a time; `None` for all. Of a sharded base they are gathered
            together.
    """

    weight: Tensor | Callable[[], Tensor]
    bias: Tensor | None = None
    scaling: LogitScaling = UNSCALED
    vocabulary: int | None = None
    rows_at_a_time: int | None = None


@dataclass(frozen=True, eq=False)
class AdaptedHead:
    """A head with an adapter, or one that is trained itself.

    Its product is computed again in the backward pass, unless gradients could be made in the forward pass: see the
    module.

    Attributes:
        product: Some rows of x, and the same rows of x' or `None` -> z [n, vocab / world_size] of those rows, S(-1), in
            memory of its own. Every token by itself, without collectives, and twice the same.
        rows: vocab / world_size, the number of rows of W that this rank holds.
        parameters: What gets a gradient in `product`. Hooks on one of them run for each chunk, and on the sum.
        dropped: x' [*, hidden], x after dropout, where the product takes it.
        scaling, vocabulary: As in `FrozenHead`.
    """

    product: Callable[[Tensor, Tensor | None], Tensor]
    rows: int
    parameters: Sequence[Tensor] = ()
    dropped: Tensor | None = None
    scaling: LogitScaling = UNSCALED
    vocabulary: int | None = None


def default_loss_chunk(rows: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return how many tokens have logits at a time: 64 MiB of them on a CPU, 512 MiB elsewhere; at least 128 tokens.

    Args:
        rows: Size of the vocabulary on this rank.
        dtype: Type of the hidden states; logits are counted in float32 or wider.
        device: Device of the hidden states.
    """
    size = rows * torch.promote_types(dtype, torch.float32).itemsize
    return max(_LEAST_CHUNK, _CHUNK_BYTES.get(device.type, _CHUNK_BYTES_OF_OTHERS) // max(1, size))


def count_targets(labels: Tensor, ignore_index: int = -100) -> int:
    """Count the labels that are not ignored, on the host. Labels without values count all of them.

    On simulated ranks whose labels differ, it is the largest number of any rank.
    """
    if isinstance(labels, LocalTensor):
        return max(count_targets(own, ignore_index) for own in labels._local_tensors.values())
    if labels.is_meta or isinstance(labels, FakeTensor):
        return labels.numel()
    return int((labels != ignore_index).sum())


def vocab_parallel_linear_cross_entropy(
    x: Tensor,
    head: Tensor | FrozenHead | AdaptedHead,
    labels: Tensor,
    ignore_index: int = -100,
    axis: ParallelAxis | None = None,
    *,
    chunk: int | None = None,
    count: int | None = None,
) -> Tensor:
    """-log softmax(logits)[label] for each token, whose logits are made a chunk of tokens at a time.

    x R, head S(0), labels I -> loss I; the gradient of x is P. Minus the loss is the label's log-probability, exact
    for any gradient per token. One collective, an all-gather of two numbers for each token that counts, none in the
    backward pass, whatever the number of chunks. See the module for the formulas.

    Kept for the backward pass: with a frozen head the gradient of x, [tokens that count, hidden]; else x, two numbers a
    token, and gradients that were made already. The logits are computed in x's type, everything after them in float32
    or wider.

    Args:
        x: [*, hidden], after the head's `enter`.
        head: W [vocab / world_size, hidden] itself, which may be trained; or how logits come from x.
        labels: [*] of indices into the full vocabulary, the same on every rank of the axis.
        ignore_index: Tokens with this label have loss 0 and no gradient; they are not multiplied by the head, and may
            hold anything.
        axis: Axis that shards the vocabulary; tensor parallel by default.
        chunk: Tokens of a chunk; `default_loss_chunk` by default. Changes memory and speed, no number.
        count: Number of labels that are not ignored (`count_targets`), or a larger one, for labels on a GPU, which
            would be waited for.

    Returns:
        [*], in nats, in float32 or the wider type of x.

    Raises:
        ParallelError: The shapes do not fit, or `chunk` is below 1.
        RuntimeError: a label is neither an index of the vocabulary nor `ignore_index`, or more than `count` labels are
            not ignored (on a GPU, when it gets there).
    """
    axis = parallel_group_info().tp if axis is None else axis
    if x.shape[:-1] != labels.shape:
        raise ParallelError(
            f"hidden states of shape {tuple(x.shape)} need labels of shape {tuple(x.shape[:-1])}, "
            f"got {tuple(labels.shape)}"
        )
    if chunk is not None and chunk < 1:
        raise ParallelError(f"chunk={chunk}: expected at least 1 token")
    if isinstance(head, Tensor):
        head = FrozenHead(head)
    if isinstance(head, FrozenHead):
        parameters = [part for part in (head.weight, head.bias) if isinstance(part, Tensor) and part.requires_grad]
        head = _trained(head, parameters) if parameters else head
    if spmd.is_type_checking():
        return _in_plain_operations(x, head, labels, ignore_index, axis)
    if count is None or isinstance(labels, LocalTensor):
        count = count_targets(labels, ignore_index)
    tokens = _Tokens(labels.reshape(-1), ignore_index, axis, min(count, labels.numel()), chunk)
    loss: Tensor
    if isinstance(head, FrozenHead):
        autocast = _Autocast.now(x.device.type)
        if autocast.enabled:
            x = x.to(autocast.dtype)
        with autocast.off():
            loss = _FrozenHeadLoss.apply(x, head, tokens, x.requires_grad and torch.is_grad_enabled())
    else:
        loss = _AdaptedHeadLoss.apply(head, tokens, torch.is_grad_enabled(), x, head.dropped, *head.parameters)
    return loss.view(labels.shape)


def _trained(head: FrozenHead, parameters: Sequence[Tensor]) -> AdaptedHead:
    """Make the form that gives W or b, the parameters, a gradient."""
    weight = head.weight if isinstance(head.weight, Tensor) else head.weight()
    return AdaptedHead(
        lambda rows, _: functional.linear(rows, weight, head.bias),
        weight.shape[0],
        parameters,
        scaling=head.scaling,
        vocabulary=head.vocabulary,
    )


def _in_plain_operations(
    x: Tensor, head: FrozenHead | AdaptedHead, labels: Tensor, ignore_index: int, axis: ParallelAxis
) -> Tensor:
    """Compute the loss through all logits: the twin for the type checker, which sees inside it."""
    if isinstance(head, FrozenHead):
        weight = head.weight if isinstance(head.weight, Tensor) else head.weight()
        z = typed_linear(x, weight, head.bias)
    else:
        z = head.product(x, head.dropped)
    return vocab_parallel_cross_entropy(head.scaling.logits(z), labels, ignore_index, axis)


@dataclass(frozen=True, eq=False)
class _Tokens:
    """The tokens that reach the head, and the chunks in which they do.

    Attributes:
        labels: [tokens].
        ignore_index, axis, count, chunk: Arguments.
    """

    labels: Tensor
    ignore_index: int
    axis: ParallelAxis
    count: int
    chunk: int | None

    def chosen(self) -> tuple[Tensor, Tensor]:
        """Return the places [count] of the tokens that reach the head, in order, and their labels [count]."""
        return _first_counted(self.labels, self.count, self.ignore_index)

    def chunks(self, rows: int, x: Tensor) -> Iterator[slice]:
        """Yield slices of the chosen tokens; one of none where there are none, so that every rank reads its head."""
        size = default_loss_chunk(rows, x.dtype, x.device) if self.chunk is None else self.chunk
        for start in range(0, max(1, self.count), size):
            yield slice(start, min(start + size, self.count))

    def local(self, labels: Tensor, rows: int, vocabulary: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Call `_local_targets` on some labels, for `rows` on each rank."""
        full = rows * self.axis.world_size if vocabulary is None else vocabulary
        return _local_targets(labels, self.axis.rank, rows, full, self.ignore_index)

    def logits_(self, z: Tensor, head: FrozenHead | AdaptedHead, rows: int | None = None, start: int = 0) -> Tensor:
        """z [n, columns] -> logits in place: -inf in columns beyond the vocabulary.

        Args:
            z: Columns from `start` on, of `rows` on this rank; all of them by default.
            head: Has the vocabulary.
        """
        logits, vocabulary = head.scaling.logits_(z), head.vocabulary
        rows = z.shape[1] if rows is None else rows
        if vocabulary is None or vocabulary == rows * self.axis.world_size:
            return logits
        return logits.masked_fill_(_beyond(z, self.axis.rank, rows, start, vocabulary), -torch.inf)


@on_each_rank
def _first_counted(labels: Tensor, count: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    ignored = labels == ignore_index
    # A number that is too small would leave tokens out of a plausible loss.
    torch._assert_async((~ignored).sum() <= count, f"more than count={count} labels are not ignored")
    # Not nonzero(), whose size is not known on the host.
    kept = ignored.to(torch.uint8).argsort(stable=True)[:count]
    return kept, labels[kept]


@on_each_rank
def _beyond(z: Tensor, rank: int, rows: int, start: int, vocabulary: int) -> Tensor:
    first = rank * rows + start
    return torch.arange(first, first + z.shape[1], device=z.device) >= vocabulary


class _Chunk:
    """One chunk's logits on this rank, taken apart into the label's own and the others.

    Attributes:
        target: [n] logits of the labels; 0 where another rank holds them.
        slope, own_slope: dlogits/dz [n, rows], and at the labels [n]; `None` where it is one number.
        exponentials: exp(logits - largest) [n, rows], 0 at the labels, in the memory of the logits.
        total: Their sums [n, 1].
        others: l_r [n].
    """

    def __init__(self, logits: Tensor, scaling: LogitScaling, index: Tensor, held: Tensor) -> None:
        at, held_here = index.unsqueeze(1), held.unsqueeze(1)
        own = logits.gather(1, at)
        # Filled, not multiplied: a logit may be -inf (a token that is ruled out), and padding may hold anything.
        self.target = own.masked_fill(~held_here, 0).squeeze(1)
        self.slope = scaling.slope(logits)
        self.own_slope = None if self.slope is None else self.slope.gather(1, at).squeeze(1)
        logits.scatter_(1, at, own.masked_fill(held_here, -torch.inf))
        # Clamped, for a rank all of whose tokens are ruled out.
        largest = logits.amax(1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
        self.exponentials = logits.sub_(largest).exp_()
        self.total = self.exponentials.sum(1, keepdim=True)
        self.others = (largest + self.total.log()).squeeze(1)

    def gradient_(self, scaling: LogitScaling, index: Tensor, counted: Tensor) -> Tensor:
        """Compute dloss/dz [n, rows] of tokens whose full vocabulary is on this rank, in the memory of the logits."""
        missing = _loss_of(self.others, self.target)[1].masked_fill(~counted, 0).unsqueeze(1)
        own = missing * (scaling.scale if self.own_slope is None else self.own_slope.unsqueeze(1))
        factor = missing / self.total.clamp(min=torch.finfo(missing.dtype).tiny)
        dz = self.exponentials.mul_(factor * scaling.scale if self.slope is None else factor)
        if self.slope is not None:
            dz.mul_(self.slope)
        return dz.scatter_(1, index.unsqueeze(1), -own)


def _over_ranks(others: Tensor, target: Tensor, axis: ParallelAxis) -> tuple[Tensor, Tensor]:
    """l_r and z_y of this rank, both [count] -> l and z_y of all ranks. One all-gather."""
    if axis.world_size == 1 or others.shape[0] == 0:
        return others, target
    every = all_gather(torch.stack((others, target)).unsqueeze(0), axis, 0)  # [world_size, 2, count]
    return every[:, 0].logsumexp(0), every[:, 1].sum(0)


def _loss_of(others: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """l, z_y [count] -> the loss and 1 - p_y."""
    margin = others - target
    return torch.logaddexp(margin, torch.zeros_like(margin)), margin.sigmoid()


def _spread(values: Tensor, places: Tensor, like: Tensor) -> Tensor:
    """values [count] at their places among the tokens, and zeros elsewhere: the shape of `like` [tokens]."""
    return values.new_zeros(like.shape[0]).index_copy_(0, places, values)


class _FrozenHeadLoss(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, head: FrozenHead, tokens: _Tokens, needs_gradient: bool) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        w = (head.weight if isinstance(head.weight, Tensor) else head.weight()).detach().to(x.dtype)
        rows, wide = w.shape[0], torch.promote_types(x.dtype, torch.float32)
        places, labels = tokens.chosen()
        index, held, counted = tokens.local(labels, rows, head.vocabulary)
        at_a_time = min(rows, head.rows_at_a_time or rows)
        chunks = list(tokens.chunks(at_a_time, x))
        # Made from w, which differs over the axis, and so do they; x may be one tensor for all simulated ranks.
        others = w.new_empty(tokens.count, dtype=wide)
        target, own_slope = torch.empty_like(others), torch.full_like(others, head.scaling.scale)
        grad = w.new_empty((tokens.count, x.shape[-1])) if needs_gradient else None
        # The rows of the labels, in the end to be subtracted: read again where W is at hand.
        own_rows = torch.empty_like(grad) if grad is not None and at_a_time < rows else None
        # Made once: fresh pages for every chunk would cost as much as the softmax.
        product = w.new_empty((chunks[0].stop, at_a_time))
        logits = product if wide == x.dtype else torch.empty_like(product, dtype=wide)
        for start, some in zip(range(0, rows, at_a_time), w.split(at_a_time), strict=True):
            width = some.shape[0]
            inside = held if width == rows else held & (index >= start) & (index < start + width)
            local = index if width == rows else (index - start) * inside
            bias = None if head.bias is None else head.bias[start : start + width]
            for part in chunks:
                size = part.stop - part.start
                z = torch.mm(flat.index_select(0, places[part]), some.t(), out=product[:size, :width])
                z = z if logits is product else logits[:size, :width].copy_(z)
                if bias is not None:
                    z.add_(bias)
                z = tokens.logits_(z, head, rows, start)
                chunk = _Chunk(z, head.scaling, local[part], inside[part])
                if start == 0:
                    others[part], target[part] = chunk.others, chunk.target
                if grad is not None:
                    if chunk.slope is not None and chunk.own_slope is not None:
                        chunk.exponentials.mul_(chunk.slope)
                        own_slope[part] = torch.where(inside[part], chunk.own_slope, own_slope[part])
                    total = chunk.total.clamp(min=torch.finfo(wide).tiny)
                    into = grad[part] if start == 0 else torch.empty_like(grad[part])
                    if logits is product:
                        torch.mm(chunk.exponentials, some, out=into).div_(total)
                    else:
                        # Divided first: sums over the vocabulary may be more than float16 holds.
                        torch.mm(torch.div(chunk.exponentials, total, out=product[:size, :width]), some, out=into)
                if start > 0:
                    both = torch.logaddexp(others[part], chunk.others)
                    if grad is not None:
                        lowest = torch.finfo(wide).min
                        shares = (some_others - both.clamp(min=lowest) for some_others in (others[part], chunk.others))
                        share, more = (difference.exp()[:, None] for difference in shares)
                        grad[part].mul_(share).add_(into.mul_(more))
                    others[part] = both
                    target[part] += chunk.target
                if own_rows is not None:
                    found = some[local[part]]
                    own_rows[part] = torch.where(inside[part, None], found, own_rows[part]) if start else found
        own_others = others
        others, target = _over_ranks(others, target, tokens.axis)
        loss, missing = _loss_of(others, target)
        if grad is not None:
            # exp(-inf - -inf) is none: of a vocabulary of which the label is all that is not ruled out.
            share = missing * (own_others - others.clamp(min=torch.finfo(wide).min)).exp()
            if head.scaling.cap is None:
                share = share * head.scaling.scale
            own = (missing * own_slope).masked_fill(~held, 0)
            for part in chunks:
                found = w[index[part]] if own_rows is None else own_rows[part]
                grad[part].mul_(share[part, None]).sub_(found.mul_(own[part, None]))
            # Where simulated ranks have unequal numbers of tokens, some of these are not counted.
            grad.masked_fill_(~counted.unsqueeze(1), 0)
            ctx.save_for_backward(grad, places)
            ctx.chunks, ctx.shape = chunks, x.shape
        return _spread(loss.masked_fill(~counted, 0), places, tokens.labels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        unit, places = ctx.saved_tensors
        upstream = grads[0].index_select(0, places).unsqueeze(1)
        dx = unit.new_zeros((ctx.shape[:-1].numel(), unit.shape[1]))
        for part in ctx.chunks:
            dx.index_copy_(0, places[part], (unit[part] * upstream[part]).to(unit.dtype))
        return dx.view(ctx.shape), None, None, None


class _AdaptedHeadLoss(Function):
    @staticmethod
    def forward(
        ctx: Any,
        head: AdaptedHead,
        tokens: _Tokens,
        needs_gradient: bool,
        x: Tensor,
        dropped: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        places, labels = tokens.chosen()
        needed = ctx.needs_input_grad[3:]
        ahead = None
        if needs_gradient and any(needed) and _can_be_ahead(head, tokens, x, parameters):
            ahead = _Gradients(tokens.count, needed)
        of_chunks = []
        for part in tokens.chunks(head.rows, x):
            inputs, kept = _rows(x, dropped, places[part]), _Kept()
            with torch.set_grad_enabled(ahead is not None), kept:
                z = head.product(*_requiring(inputs, needed))
            wide = torch.promote_types(z.dtype, torch.float32)
            logits = tokens.logits_(z.detach().to(wide, copy=ahead is not None and kept.may_hold(z)), head)
            index, held, counted = tokens.local(labels[part], head.rows, head.vocabulary)
            chunk = _Chunk(logits, head.scaling, index, held)
            of_chunks.append((chunk.others, chunk.target))
            if ahead is not None:
                dz = chunk.gradient_(head.scaling, index, counted).to(z.dtype)
                ahead.add(z, dz, (*inputs, *parameters), part)
        others, target = (torch.cat(parts) for parts in zip(*of_chunks, strict=True))
        others, target = _over_ranks(others, target, tokens.axis)
        loss, missing = _loss_of(others, target)
        counted = labels != tokens.ignore_index
        ctx.head, ctx.tokens, ctx.autocast = head, tokens, _Autocast.now(x.device.type)
        # The parameters are those that `product` reads: saved, they are checked to be as they were.
        saved = (x, dropped, places, labels, others, missing.masked_fill(~counted, 0), *parameters)
        ctx.save_for_backward(*saved, *(() if ahead is None else ahead.found))
        return _spread(loss.masked_fill(~counted, 0), places, tokens.labels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, dropped, places, labels, others, missing, *rest = ctx.saved_tensors
        head, tokens, needed = ctx.head, ctx.tokens, ctx.needs_input_grad[3:]
        parameters, unit = rest[: len(head.parameters)], rest[len(head.parameters) :]
        chunks = list(tokens.chunks(head.rows, x))
        if unit and not any(grads[0].stride()):  # one number for all tokens, as the gradient of a sum is
            one = grads[0][:1]
            of_rows = [None if grad is None else _scaled_rows(grad, one, places, chunks, x) for grad in unit[:2]]
            of_parameters = [None if total is None else total * one for total in unit[2:]]
        else:
            factor = grads[0].index_select(0, places) * missing
            found = _Gradients(x.shape[:-1].numel(), needed)
            for part in chunks:
                inputs = _rows(x, dropped, places[part])
                with torch.enable_grad(), ctx.autocast.on():
                    z = head.product(*_requiring(inputs, needed))
                dz = _gradient_of_logits(z, head, tokens, labels[part], others[part], factor[part])
                found.add(z, dz, (*inputs, *parameters), places[part])
            of_rows = [None if grad is None else grad.view(x.shape) for grad in found.found[:2]]
            of_parameters = found.found[2:]
        sums = (
            None if total is None else total.to(parameter.dtype)
            for total, parameter in zip(of_parameters, parameters, strict=True)
        )
        return None, None, None, *of_rows, *sums


def _can_be_ahead(head: AdaptedHead, tokens: _Tokens, x: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Whether gradients can be made in the forward pass, as if the gradient of every loss were 1.

    Not where ranks share the vocabulary: its normalisers are known after the last chunk. Not in float16, whose range
    needs the scale of the loss. Not of a head that is trained itself: they would be as large, until the backward pass.
    """
    size = sum(parameter.numel() for parameter in parameters)
    return tokens.axis.world_size == 1 and x.dtype != torch.float16 and 2 * size <= head.rows * x.shape[-1]


class _Kept(torch.autograd.graph.saved_tensors_hooks):
    """What a graph keeps that is used up in the forward pass: as it is, past recomputation and offload."""

    def __init__(self) -> None:
        self._storages: set[int] = set()
        super().__init__(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        if _is_plain(tensor):
            self._storages.add(tensor.untyped_storage().data_ptr())
        return tensor

    def may_hold(self, tensor: Tensor) -> bool:
        """Whether the graph may keep this tensor's memory, so that it must not change."""
        return not _is_plain(tensor) or tensor.untyped_storage().data_ptr() in self._storages


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta


def _scaled_rows(grad: Tensor, one: Tensor, places: Tensor, chunks: Sequence[slice], x: Tensor) -> Tensor:
    """grad [count, hidden] times `one` [1], at the places of the tokens, in the shape of x, and zeros elsewhere."""
    full = grad.new_zeros((x.shape[:-1].numel(), x.shape[-1]))
    for part in chunks:
        full.index_copy_(0, places[part], (grad[part] * one).to(grad.dtype))
    return full.view(x.shape)


class _Gradients:
    """The gradients of x, x' and the parameters of an `AdaptedHead`, chunk after chunk.

    Attributes:
        found: Those of x and x', [rows, hidden]; of the parameters, in float32 or wider. `None` for what needs none.
    """

    def __init__(self, rows: int, needed: Sequence[bool]) -> None:
        self.found: list[Tensor | None] = [None] * len(needed)
        self._rows, self._needed = rows, needed

    def add(self, z: Tensor, dz: Tensor, tensors: Sequence[Tensor | None], at: slice | Tensor) -> None:
        """Add those of one chunk.

        Args:
            z: Product of the chunk [n, rows].
            dz: Its gradient.
            tensors: The chunk's rows of x and x', and the parameters.
            at: Where these rows are among all.
        """
        wanted = [tensor for tensor, needs in zip(tensors, self._needed, strict=True) if needs and tensor is not None]
        made = iter(torch.autograd.grad(z, wanted, dz, allow_unused=True))
        for number, (tensor, needs) in enumerate(zip(tensors, self._needed, strict=True)):
            grad = next(made) if needs and tensor is not None else None
            if grad is None:
                continue
            before = self.found[number]
            if number >= 2:
                grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
                self.found[number] = grad if before is None else before.add_(grad)
                continue
            if before is None:
                before = self.found[number] = grad.new_zeros((self._rows, grad.shape[-1]))
            if isinstance(at, slice):
                before[at].copy_(grad)
            else:
                before.index_copy_(0, at, grad)


def _requiring(inputs: tuple[Tensor, Tensor | None], needed: Sequence[bool]) -> tuple[Tensor, Tensor | None]:
    """Return the rows, after those whose gradient is needed are marked, where gradients are made."""
    for rows, needs in zip(inputs, needed, strict=False):
        if needs and rows is not None and torch.is_grad_enabled():
            rows.requires_grad_()
    return inputs


def _rows(x: Tensor, dropped: Tensor | None, places: Tensor) -> tuple[Tensor, Tensor | None]:
    """x, x' [*, hidden] -> rows [n, hidden] of them, detached."""

    def of(whole: Tensor) -> Tensor:
        return whole.detach().reshape(-1, whole.shape[-1]).index_select(0, places)

    return of(x), None if dropped is None else of(dropped)


def _gradient_of_logits(
    z: Tensor, head: AdaptedHead, tokens: _Tokens, labels: Tensor, others: Tensor, factor: Tensor
) -> Tensor:
    """Compute the gradient of z [n, rows] of one chunk.

    Args:
        z: Product of the head.
        head, tokens: Arguments.
        labels: [n].
        others: l [n], over all ranks.
        factor: [n] gradient of the loss, times 1 - p_y; 0 where a token does not count.
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    index, held, _ = tokens.local(labels, head.rows, head.vocabulary)
    logits = tokens.logits_(z.detach().to(wide, copy=True), head)
    slope = head.scaling.slope(logits)
    at = index.unsqueeze(1)
    own = factor.unsqueeze(1) * (head.scaling.scale if slope is None else slope.gather(1, at))
    dz = logits.sub_(others.clamp(min=torch.finfo(wide).min).unsqueeze(1)).exp_()
    dz.mul_(head.scaling.scale if slope is None else slope).mul_(factor.unsqueeze(1))
    dz.scatter_(1, at, torch.where(held.unsqueeze(1), -own, dz.gather(1, at)))
    return dz.to(z.dtype)


@dataclass(frozen=True)
class _Autocast:
    """The state of autocast, which a backward pass does not have.

    Attributes:
        device: Type of the device.
        enabled: Whether it is on; `None` where there is none for the device.
        dtype: Its type.
    """

    device: str
    enabled: bool | None
    dtype: torch.dtype | None = None

    @classmethod
    def now(cls, device: str) -> _Autocast:
        """Return the state as it is."""
        if not torch.amp.is_autocast_available(device):
            return cls(device, None)
        return cls(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))

    def on(self) -> contextlib.AbstractContextManager[Any]:
        """Set the state inside the context."""
        if self.enabled is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device, self.dtype, self.enabled)

    def off(self) -> contextlib.AbstractContextManager[Any]:
        """Turn it off inside the context."""
        return contextlib.nullcontext() if self.enabled is None else torch.autocast(self.device, enabled=False)
