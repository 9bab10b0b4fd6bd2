"""The loss from hidden states is that of all logits, whatever is made at a time, sent or left out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.simulate import per_rank, rank_values, simulate
from helpers.workers import run_on_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint as checkpointed

from meshpeft.parallel import (
    AdaptedHead,
    ColumnParallelLinear,
    FrozenHead,
    LogitScaling,
    ParallelError,
    init_parallelism,
    parallel_group_info,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)
from meshpeft.parallel import loss as loss_module
from meshpeft.parallel.states import all_gather, take_slice
from meshpeft.verify.simulation import Collective, count_collectives

SEQ, BATCH, HIDDEN, VOCABULARY = 8, 2, 8, 24
SCALINGS = (LogitScaling(), LogitScaling(0.3), LogitScaling(1.5, cap=4.0))
IGNORED = ("none", "some", "all")
TOLERANCE = 1e-12


def case(seed: int, ignored: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [seq, batch, hidden], labels, and a gradient for each token's loss."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SEQ, BATCH, HIDDEN, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (SEQ, BATCH), generator=generator)
    left_out = {
        "none": torch.zeros(SEQ, BATCH, dtype=torch.bool),
        "some": torch.rand(SEQ, BATCH, generator=generator) < 0.4,
        "all": torch.ones(SEQ, BATCH, dtype=torch.bool),
    }[ignored]
    return x, labels.masked_fill(left_out, -100), torch.randn(SEQ, BATCH, generator=generator, dtype=torch.float64)


# Drawn here: inside a simulation a generator goes on from rank to rank.
_WEIGHT, _BIAS = torch.randn(VOCABULARY, HIDDEN + 1, dtype=torch.float64, generator=torch.Generator()).split(
    (HIDDEN, 1), 1
)


def weights() -> tuple[Tensor, Tensor]:
    """W [vocabulary, hidden] and b [vocabulary]."""
    return _WEIGHT.clone(), _BIAS.flatten()


def dense(x: Tensor, labels: Tensor, upstream: Tensor, scaling: LogitScaling = SCALINGS[0]) -> tuple[Tensor, ...]:
    """Loss, and gradients of x, W and b, by PyTorch on one rank."""
    w, b = weights()
    x, w, b = (tensor.clone().requires_grad_() for tensor in (x, w, b))
    logits = scaling.logits(F.linear(x, w, b))
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    loss.backward(upstream)
    return loss.detach(), x.grad, w.grad, b.grad


def column(sequence_parallel: bool) -> ColumnParallelLinear:
    """The head of `weights` on this mesh."""
    layer = ColumnParallelLinear(
        HIDDEN, VOCABULARY, gather_output=False, sequence_parallel=sequence_parallel, dtype=torch.float64
    )
    for parameter, full in zip((layer.weight, layer.bias), weights(), strict=True):
        parameter.data.copy_(take_slice(full, parallel_group_info().tp, 0))
    return layer.requires_grad_(False)


def compute(
    layer: ColumnParallelLinear,
    x: Tensor,
    labels: Tensor,
    upstream: Tensor,
    scaling: LogitScaling,
    rows_at_a_time: int | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """As `dense`, of a column on this mesh, whose parameters may be trained; x and its gradient in full."""
    axis, sharded = layer.layout.axis, layer.layout.takes_token_shards
    own = (take_slice(x, axis, 0) if sharded else x.clone()).detach().requires_grad_()
    head: FrozenHead | AdaptedHead
    if layer.weight.requires_grad:
        parameters = list(layer.parameters())
        rows = layer.weight.shape[0]
        head = AdaptedHead(lambda x, _: F.linear(x, layer.weight, layer.bias), rows, parameters, scaling=scaling)
    else:
        head = FrozenHead(lambda: layer.weight, layer.bias, scaling, rows_at_a_time=rows_at_a_time)
    loss = vocab_parallel_linear_cross_entropy(layer.enter(own), head, labels, **options)
    loss.backward(upstream)
    assert own.grad is not None
    dx = all_gather(own.grad, axis, 0) if sharded else own.grad
    grads = [all_gather(p.grad, axis, 0) for p in layer.parameters() if p.grad is not None]
    return loss.detach(), dx, *grads


def largest_error(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Over all simulated ranks."""
    errors = [
        (value - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)
        for tensor, wanted in zip(found, expected, strict=False)
        for value in rank_values(tensor)
    ]
    return float(torch.stack(errors).max())


@pytest.mark.parametrize("trained", (False, True), ids=("frozen", "trained"))
@pytest.mark.parametrize("ignored", IGNORED)
@pytest.mark.parametrize(("tp", "sequence_parallel"), ((1, False), (2, False), (2, True), (4, True)))
def test_loss_and_gradients_are_those_of_all_logits(
    tp: int, sequence_parallel: bool, ignored: str, trained: bool
) -> None:
    x, labels, upstream = case(1, ignored)
    expected = {scaling: dense(x, labels, upstream, scaling) for scaling in SCALINGS}
    with simulate(tp=tp):
        for scaling, chunk in zip(SCALINGS, (5, None, 7), strict=True):
            layer = column(sequence_parallel).requires_grad_(trained)
            found = compute(layer, x, labels, upstream, scaling, chunk=chunk)
            assert len(found) == (4 if trained else 2)
            assert largest_error(found, expected[scaling]) < TOLERANCE


@pytest.mark.parametrize("rows", (1, 5, 6))
@pytest.mark.parametrize("ignored", IGNORED)
@pytest.mark.parametrize("tp", (1, 2))
def test_a_frozen_head_may_be_read_some_rows_at_a_time(tp: int, ignored: str, rows: int) -> None:
    x, labels, upstream = case(1, ignored)
    expected = {scaling: dense(x, labels, upstream, scaling) for scaling in SCALINGS}
    with simulate(tp=tp):
        for scaling, chunk in zip(SCALINGS, (5, None, 7), strict=True):
            found = compute(column(False), x, labels, upstream, scaling, rows, chunk=chunk)
            assert largest_error(found, expected[scaling]) < TOLERANCE


@pytest.mark.parametrize("alike", (True, False))
@pytest.mark.parametrize("ignored", IGNORED)
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_a_sum_of_losses_has_its_gradients_from_the_forward_pass(
    scaling: LogitScaling, ignored: str, alike: bool
) -> None:
    x, labels, upstream = case(1, ignored)
    w, generator = weights()[0], torch.Generator().manual_seed(3)
    products = 0

    def factors() -> list[Tensor]:
        generator.manual_seed(3)
        return [torch.randn(size, generator=generator).double().requires_grad_() for size in ((2, HIDDEN), (24, 2))]

    def product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return F.linear(x, w) + x @ a.t() @ b.t()

    def run(through_logits: bool) -> tuple[Tensor, ...]:
        own, (a, b) = x.clone().requires_grad_(), factors()
        if through_logits:
            loss = vocab_parallel_cross_entropy(scaling.logits(product(own, a, b)), labels)
        else:
            head = AdaptedHead(lambda rows, _: product(rows, a, b), VOCABULARY, [a, b], scaling=scaling)
            loss = vocab_parallel_linear_cross_entropy(own, head, labels, chunk=5)
        (loss.sum() * 0.7 if alike else (loss * upstream).sum()).backward()
        return loss.detach(), own.grad, a.grad, b.grad

    with simulate():
        expected, products = run(True), 0
        assert largest_error(run(False), expected) < TOLERANCE
    chunks = max(1, math.ceil(int((labels != -100).sum()) / 5))
    assert products == (chunks if alike else 2 * chunks)


@pytest.mark.parametrize(
    ("context", "dtype", "forward", "backward"),
    [
        (torch.no_grad, torch.float64, 4, 0),
        (torch.inference_mode, torch.float64, 4, 0),
        (torch.enable_grad, torch.float64, 4, 0),
        (torch.enable_grad, torch.float16, 4, 4),  # whose range needs the scale of the loss
        (partial(checkpointed, use_reentrant=False), torch.float64, 4, 4),
        (partial(checkpointed, use_reentrant=True), torch.float64, 4, 4),
    ],
    ids=("no_grad", "inference_mode", "grad", "float16", "recomputed", "recomputed, reentrant"),
)
def test_how_often_the_product_is_made(context: Any, dtype: torch.dtype, forward: int, backward: int) -> None:
    x, labels, _ = case(1, "none")
    w, x = weights()[0].to(dtype), x.to(dtype).requires_grad_()
    b = torch.zeros(VOCABULARY, HIDDEN, dtype=dtype)[:, :2].clone().requires_grad_()
    products, with_graph = 0, set[bool]()

    def product(rows: Tensor, _: Any) -> Tensor:
        nonlocal products
        products += 1
        with_graph.add(torch.is_grad_enabled())
        return F.linear(rows, w) + rows[:, :2] @ b.t()

    def loss(x: Tensor) -> Tensor:
        head = AdaptedHead(product, VOCABULARY, [b])
        return vocab_parallel_linear_cross_entropy(x, head, labels, chunk=4).sum()

    with simulate():
        if context in (torch.no_grad, torch.inference_mode):
            with context():
                loss(x)
            assert with_graph == {False}
            assert products == forward
            return
        value = context()(loss)(x) if context is torch.enable_grad else context(loss, x)
        made, products = products, 0
        value.backward()
    assert (made, products) == (forward, backward)


@pytest.mark.parametrize("trained", (False, True), ids=("frozen", "trained"))
@pytest.mark.parametrize(("tp", "dp"), ((2, 2),))
def test_ranks_with_other_tokens_may_have_other_numbers_of_them(tp: int, dp: int, trained: bool) -> None:
    """One has labels for some of its tokens, the other for none."""
    cases = [case(1, "some"), case(2, "all")]
    with simulate(tp=tp, dp=dp):
        x, labels, upstream = (per_rank(lambda rank, part=part: cases[rank // tp][part].clone()) for part in range(3))
        layer = column(tp > 1).requires_grad_(trained)
        loss, dx, *dw = compute(layer, x, labels, upstream, SCALINGS[0], chunk=5)
        for rank in range(tp * dp):
            expected = dense(*cases[rank // tp])
            for found, wanted in zip((loss, dx, *dw), expected, strict=False):
                torch.testing.assert_close(rank_values(found)[rank], wanted, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("chunk", (3, 1000))
@pytest.mark.parametrize("trained", (False, True), ids=("frozen", "trained"))
def test_one_all_gather_of_two_numbers_a_token_whatever_the_chunks(trained: bool, chunk: int) -> None:
    x, labels, _ = case(1, "some")
    count = int((labels != -100).sum())
    with simulate(tp=2):
        layer = column(sequence_parallel=False).requires_grad_(trained)
        head = AdaptedHead(lambda x, _: F.linear(x, layer.weight), VOCABULARY // 2, [layer.weight])
        x.requires_grad_()
        with count_collectives() as calls:
            form = head if trained else FrozenHead(layer.weight)
            vocab_parallel_linear_cross_entropy(x, form, labels, chunk=chunk).sum().backward()
    assert calls == [Collective("allgather", 2 * count)]


class _Sizes(TorchDispatchMode):
    """Records the number of elements of everything that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


@pytest.mark.parametrize("trained", (False, True), ids=("frozen", "trained"))
def test_nothing_of_tokens_times_vocabulary_is_made(trained: bool) -> None:
    tokens, chunk, hidden, vocabulary = 1024, 32, 4, 512
    x = torch.randn(tokens, hidden, requires_grad=True)
    w = torch.randn(vocabulary, hidden, requires_grad=trained)
    labels = torch.randint(0, vocabulary, (tokens,))
    with _Sizes() as sizes:
        vocab_parallel_linear_cross_entropy(x, w, labels, chunk=chunk).sum().backward()
    assert sizes.largest == chunk * vocabulary


def test_ignored_tokens_never_reach_the_head() -> None:
    """They may hold anything, and are not multiplied."""
    x, labels, upstream = case(1, "some")
    counted = labels != -100
    spoiled = x.masked_fill(~counted.unsqueeze(-1), torch.nan)
    rows: list[int] = []

    def product(x: Tensor, _: Tensor | None) -> Tensor:
        rows.append(x.shape[0])
        return F.linear(x, *weights())

    for head in (AdaptedHead(product, VOCABULARY), FrozenHead(*weights())):
        own = spoiled.clone().requires_grad_()
        loss = vocab_parallel_linear_cross_entropy(own, head, labels, chunk=5)
        loss.backward(upstream)
        expected = dense(x, labels, upstream)
        torch.testing.assert_close((loss.detach(), own.grad), expected[:2], rtol=TOLERANCE, atol=TOLERANCE)
    assert sum(rows) == 2 * int(counted.sum())  # forward, and again backward


def test_the_weight_is_read_once_also_by_a_rank_without_labels() -> None:
    """A weight that is gathered from ranks with other tokens hangs if one of them does not read it."""
    for ignored in ("all", "some"):
        x, labels, upstream = case(1, ignored)
        read: list[str] = []

        def source(read: list[str] = read) -> Tensor:
            read.append("source")
            return weights()[0]

        loss = vocab_parallel_linear_cross_entropy(x.requires_grad_(), FrozenHead(source), labels, chunk=5)
        loss.backward(upstream)
        assert read == ["source"]
        multiplied: list[int] = []

        def product(x: Tensor, _: Any, multiplied: list[int] = multiplied) -> Tensor:
            multiplied.append(len(x))
            return x @ weights()[0].t()

        vocab_parallel_linear_cross_entropy(x, AdaptedHead(product, VOCABULARY), labels).backward(upstream)
        assert len(multiplied) == 2


def test_without_gradients_no_gradient_is_made() -> None:
    x, labels, _ = case(1, "some")
    x.requires_grad_()
    w = weights()[0]
    with torch.no_grad():
        loss = vocab_parallel_linear_cross_entropy(x, w, labels)
        trained = vocab_parallel_linear_cross_entropy(x, w.clone().requires_grad_(), labels)
    assert not loss.requires_grad and not trained.requires_grad
    torch.testing.assert_close(loss, trained, rtol=TOLERANCE, atol=TOLERANCE)


def test_the_graph_can_be_used_twice() -> None:
    """PyTorch's own linear cross entropy cannot."""
    x, labels, upstream = case(1, "some")
    for w in (weights()[0], weights()[0].requires_grad_()):
        own = x.clone().requires_grad_()
        loss = vocab_parallel_linear_cross_entropy(own, w, labels)
        first, second = (torch.autograd.grad(loss, own, upstream, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32, torch.float64))
def test_a_confident_token_keeps_its_gradient(dtype: torch.dtype) -> None:
    """As softmax minus one-hot it would be lost in the rounding of numbers near one: by 18% in some libraries."""
    # Logits that are exact in every type: 16 for the label, 0 for three others.
    labels = torch.tensor([2, 0])
    x = torch.zeros(2, 4, dtype=dtype).scatter_(1, labels[:, None], 16.0)
    missing = 3 * math.exp(-16) / (1 + 3 * math.exp(-16))
    expected = torch.full((2, 4), missing / 3, dtype=torch.float64).scatter_(1, labels[:, None], -missing)
    # The margin of 15 nats is rounded to float32; of a bfloat16 number 8 bits are kept, in three operations.
    tolerance = 1e-14 if dtype == torch.float64 else max(2e-6, 4 * torch.finfo(dtype).eps)
    for w in (torch.eye(4, dtype=dtype), torch.eye(4, dtype=dtype, requires_grad=True)):
        own = x.clone().requires_grad_()
        loss = vocab_parallel_linear_cross_entropy(own, w, labels)
        loss.sum().backward()
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        assert float(loss[0].detach()) == pytest.approx(math.log1p(3 * math.exp(-16)), rel=max(1e-14, tolerance))
        assert own.grad is not None
        torch.testing.assert_close(own.grad.double(), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("tp", (1, 2))
def test_tokens_that_are_ruled_out(tp: int) -> None:
    """Logits of -inf: a rank that holds nothing else, and a label that is all that is left."""
    x, labels, upstream = case(1, "none")
    for left in (VOCABULARY // 2, 1):
        w, _ = weights()
        bias = torch.zeros(VOCABULARY, dtype=torch.float64)
        bias[left:] = -torch.inf
        own = x.clone().requires_grad_()
        loss = F.cross_entropy(F.linear(own, w, bias).flatten(0, 1), labels.flatten() % left, reduction="none")
        loss.backward(upstream.flatten())
        with simulate(tp=tp) as info:
            head = FrozenHead(take_slice(w, info.tp, 0), take_slice(bias, info.tp, 0))
            parts = [head, AdaptedHead(lambda x, _, h=head: F.linear(x, h.weight, h.bias), VOCABULARY // tp)]
            for form in parts:
                mine = x.clone().requires_grad_()
                layer = column(sequence_parallel=False)
                found = vocab_parallel_linear_cross_entropy(layer.enter(mine), form, labels % left, chunk=5)
                found.backward(upstream)
                for rank in range(tp):
                    expected = loss.detach().view(SEQ, BATCH), own.grad
                    values = rank_values(found)[rank], rank_values(mine.grad)[rank]
                    torch.testing.assert_close(values, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("trained", (False, True), ids=("frozen", "trained"))
@pytest.mark.parametrize("tp", (1, 4))
def test_rows_that_pad_the_vocabulary_take_no_part(tp: int, trained: bool) -> None:
    """21 tokens over 4 ranks of 6 rows; the last ones hold anything, and the last rank nothing else but padding."""
    for vocabulary in (21, 18):
        x, labels, upstream = case(1, "some")
        labels = torch.where(labels == -100, labels, labels % vocabulary)
        w, _ = weights()
        own = x.clone().requires_grad_()
        loss = F.cross_entropy((own @ w[:vocabulary].t()).flatten(0, 1), labels.flatten(), reduction="none")
        loss.backward(upstream.flatten())
        with simulate(tp=tp) as info:
            local = take_slice(w, info.tp, 0)
            head: Any = FrozenHead(local, vocabulary=vocabulary)
            if trained:
                head = AdaptedHead(lambda x, _, w=local: x @ w.t(), VOCABULARY // tp, vocabulary=vocabulary)
            mine = x.clone().requires_grad_()
            layer = column(sequence_parallel=False)
            found = vocab_parallel_linear_cross_entropy(layer.enter(mine), head, labels, chunk=5)
            found.backward(upstream)
            errors = largest_error((found.detach(), mine.grad), (loss.detach().view(SEQ, BATCH), own.grad))
            assert errors < TOLERANCE


@pytest.mark.parametrize(("label", "tp"), ((-1, 1), (VOCABULARY, 2), (10**9, 2)))
@pytest.mark.parametrize("trained", (False, True), ids=("frozen", "trained"))
def test_a_label_that_no_rank_holds_is_an_error(trained: bool, tp: int, label: int) -> None:
    x, labels, upstream = case(1, "none")
    labels[1, 1] = label
    with simulate(tp=tp), pytest.raises(RuntimeError, match=r"a label is neither in \[0, 24\) nor ignore_index=-100"):
        compute(column(sequence_parallel=False).requires_grad_(trained), x, labels, upstream, SCALINGS[0])


def test_a_count_that_is_too_small_is_an_error_and_one_too_large_changes_nothing() -> None:
    x, labels, upstream = case(1, "some")
    count = int((labels != -100).sum())
    expected = dense(x, labels, upstream)
    for more in (0, 3, 100):
        found = compute(column(False), x, labels, upstream, SCALINGS[0], count=count + more, chunk=5)
        assert largest_error(found, expected) < TOLERANCE
    with pytest.raises(RuntimeError, match=f"more than count={count - 1} labels are not ignored"):
        compute(column(False), x, labels, upstream, SCALINGS[0], count=count - 1)


def test_bad_arguments() -> None:
    x, labels = torch.zeros(2, 3, 4), torch.zeros(6, dtype=torch.int64)
    with pytest.raises(ParallelError, match=r"shape \(2, 3, 4\) need labels of shape \(2, 3\), got \(6,\)"):
        vocab_parallel_linear_cross_entropy(x, torch.zeros(5, 4), labels)
    with pytest.raises(ParallelError, match="chunk=0: expected at least 1 token"):
        vocab_parallel_linear_cross_entropy(x, torch.zeros(5, 4), labels.view(2, 3), chunk=0)


def test_under_autocast_the_product_is_autocasts_and_the_loss_is_not() -> None:
    x, labels, upstream = (tensor.float() if tensor.is_floating_point() else tensor for tensor in case(1, "some"))
    w = weights()[0].float()
    expected = None
    for head in (w, w.clone().requires_grad_()):
        own = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = vocab_parallel_linear_cross_entropy(own, head, labels)
            logits = F.linear(x, w)
        loss.backward(upstream)
        assert loss.dtype == torch.float32 and own.grad is not None and own.grad.dtype == torch.float32
        torch.testing.assert_close(loss.detach(), vocab_parallel_cross_entropy(logits, labels), rtol=1e-5, atol=1e-5)
        expected = own.grad if expected is None else expected
        torch.testing.assert_close(own.grad, expected, rtol=2e-2, atol=2e-2)


def real_ranks(ignored: str) -> list[float]:
    """Losses on a rank of two."""
    init_parallelism(tensor_parallel=2)
    x, labels, upstream = case(1, ignored)
    found = compute(column(sequence_parallel=True), x, labels, upstream, SCALINGS[0], chunk=5)
    return [
        float((value - wanted).abs().max()) for value, wanted in zip(found, dense(x, labels, upstream), strict=False)
    ]


@pytest.mark.parametrize("ignored", ("some", "all"))
def test_real_processes(ignored: str) -> None:
    for errors in run_on_ranks(2, real_ranks, ignored):
        assert max(errors) < TOLERANCE


# Faults that are put in, and have to be seen by the comparison with all logits.


@contextmanager
def of_one_rank(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The sum over the vocabulary is that of one rank."""
    right = loss_module._over_ranks
    patch.setattr(loss_module, "_over_ranks", lambda others, target, axis: (others, right(others, target, axis)[1]))
    yield


@contextmanager
def without_the_label(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The label's own part of the gradient is left out."""
    right = loss_module._local_targets

    def local_targets(*arguments: Any) -> Any:
        index, held, counted = right(*arguments)
        return index, held & False, counted

    patch.setattr(loss_module, "_local_targets", local_targets)
    yield


@contextmanager
def labels_of_other_tokens(patch: pytest.MonkeyPatch) -> Iterator[None]:
    right = loss_module._first_counted

    def first_counted(labels: Tensor, count: int, ignore_index: int) -> Any:
        kept, chosen = right(labels, count, ignore_index)
        return kept.roll(1), chosen

    patch.setattr(loss_module, "_first_counted", first_counted)
    yield


@pytest.mark.parametrize("trained", (False, True), ids=("frozen", "trained"))
@pytest.mark.parametrize("fault", (of_one_rank, without_the_label, labels_of_other_tokens))
def test_a_fault_is_seen(fault: Any, trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels, upstream = case(1, "some")
    with simulate(tp=2), fault(monkeypatch):
        found = compute(column(False).requires_grad_(trained), x, labels, upstream, SCALINGS[0], chunk=5)
        assert largest_error(found, dense(x, labels, upstream)) > 1e-3
