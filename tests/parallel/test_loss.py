"""Cross entropy over a divided vocabulary is PyTorch's, and never sends the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.simulate import rank_values, simulate, the_same
from torch import Tensor

from meshpeft.parallel import ParallelError, TensorLayout, vocab_parallel_cross_entropy
from meshpeft.verify.simulation import Collective, count_collectives

VOCABULARY = 24


def along_vocabulary(logits: Tensor, info: Any) -> TensorLayout:
    return TensorLayout(tuple(logits.shape), ((logits.dim() - 1, info.tp),))


def compute(tp: int, logits: Tensor, labels: Tensor, y_grad: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the logits, both whole."""
    with simulate(tp=tp) as info:
        layout = along_vocabulary(logits, info)
        local = layout.slice(logits).clone().requires_grad_()
        loss = vocab_parallel_cross_entropy(local, labels, **options)
        loss.backward(y_grad)
        return the_same(loss).detach(), the_same(layout.gather(local.grad))


def reference(logits: Tensor, labels: Tensor, y_grad: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """In float64, by PyTorch."""
    wide = logits.double().requires_grad_()
    loss = F.cross_entropy(wide.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=ignore_index)
    loss.backward(y_grad.double().flatten())
    return loss.detach().view(labels.shape), wide.grad


def random_case(dtype: torch.dtype, shape: tuple[int, ...] = (5, 3), scale: float = 3.0) -> tuple[Tensor, ...]:
    logits = (torch.randn(*shape, VOCABULARY, dtype=torch.float64) * scale).to(dtype)
    labels = torch.randint(0, VOCABULARY, shape)
    return logits, labels, torch.randn(shape, dtype=torch.promote_types(dtype, torch.float32))


# The loss is computed in float32 or wider. Of a bfloat16 logit's gradient 8 bits are kept: half a unit of them is 2e-3.
@pytest.mark.parametrize(
    ("dtype", "loss_tolerance", "grad_tolerance"),
    ((torch.float64, 1e-14, 1e-14), (torch.float32, 1e-6, 1e-6), (torch.bfloat16, 1e-6, 4e-3)),
)
@pytest.mark.parametrize("tp", (1, 2, 4))
def test_values_and_gradients(tp: int, dtype: torch.dtype, loss_tolerance: float, grad_tolerance: float) -> None:
    logits, labels, y_grad = random_case(dtype)
    labels.view(-1)[[0, 7]] = -100
    loss, grad = compute(tp, logits, labels, y_grad)
    expected_loss, expected_grad = reference(logits, labels, y_grad)
    assert (loss.dtype, grad.dtype) == (torch.promote_types(dtype, torch.float32), dtype)
    assert (loss.double() - expected_loss).abs().max() < loss_tolerance * expected_loss.max()
    assert (grad.double() - expected_grad).abs().max() < grad_tolerance * expected_grad.abs().max()
    assert bool((loss.view(-1)[[0, 7]] == 0).all())
    assert bool((grad.view(-1, VOCABULARY)[[0, 7]] == 0).all())


@pytest.mark.parametrize("shape", ((6,), (1, 1), (2, 3, 4), (0,)))
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    logits, labels, y_grad = random_case(torch.float64, shape)
    loss, grad = compute(2, logits, labels, y_grad)
    expected_loss, expected_grad = reference(logits, labels, y_grad)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("tp", (1, 2, 4))
def test_nothing_counted_has_no_loss_and_no_gradient(tp: int) -> None:
    logits, labels, y_grad = random_case(torch.float32)
    loss, grad = compute(tp, logits, torch.full_like(labels, -1), y_grad, ignore_index=-1)
    assert bool((loss == 0).all()) and bool((grad == 0).all())


@pytest.mark.parametrize("ignore_index", (0, 5, VOCABULARY - 1))
@pytest.mark.parametrize("tp", (1, 4))
def test_an_index_of_the_vocabulary_can_be_ignored(tp: int, ignore_index: int) -> None:
    logits, labels, y_grad = random_case(torch.float64)
    labels[0] = ignore_index
    loss, grad = compute(tp, logits, labels, y_grad, ignore_index=ignore_index)
    expected_loss, expected_grad = reference(logits, labels, y_grad, ignore_index)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("tp", (1, 2, 4))
def test_huge_logits_do_not_overflow(tp: int) -> None:
    """Also where the largest logit is another rank's, a thousand above everything here."""
    logits, labels, y_grad = random_case(torch.float64, scale=1.0)
    logits[..., 0] += 1e4
    logits[..., -1] -= 1e4
    labels[0], labels[1] = 0, VOCABULARY - 1
    loss, grad = compute(tp, logits, labels, y_grad)
    expected_loss, expected_grad = reference(logits, labels, y_grad)
    assert bool(loss.isfinite().all())
    torch.testing.assert_close(loss, expected_loss, rtol=1e-13, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("tp", (1, 2, 4))
def test_tokens_that_are_ruled_out(tp: int) -> None:
    """Logits of -inf, a whole rank's slice of them even."""
    logits, labels, y_grad = random_case(torch.float64)
    logits[..., : VOCABULARY // 2] = -torch.inf
    labels = labels % (VOCABULARY // 2) + VOCABULARY // 2
    loss, grad = compute(tp, logits, labels, y_grad)
    expected_loss, expected_grad = reference(logits, labels, y_grad)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("tp", (1, 2, 4))
def test_an_ignored_token_may_hold_anything(tp: int) -> None:
    """Padding that no query may attend to comes out as NaN; PyTorch's loss is 0 there."""
    logits, labels, _ = random_case(torch.float64)
    logits[0, 0], labels[0, 0] = torch.nan, -100
    with simulate(tp=tp) as info:
        loss = the_same(vocab_parallel_cross_entropy(along_vocabulary(logits, info).slice(logits), labels))
    assert loss[0, 0] == 0
    assert bool(loss.isfinite().all())


@pytest.mark.parametrize("tp", (2, 4))
def test_two_collectives_of_one_number_per_token_and_none_backward(tp: int) -> None:
    logits, labels, _ = random_case(torch.float32, (7,))
    with simulate(tp=tp) as info:
        local = along_vocabulary(logits, info).slice(logits).clone().requires_grad_()
        with count_collectives() as calls:
            vocab_parallel_cross_entropy(local, labels).sum().backward()
    assert calls == [Collective("allreduce", 7, itemsize=4), Collective("allreduce", 14, itemsize=4)]


def test_the_input_is_left_alone() -> None:
    """Exponentials are taken in place, of a copy."""
    logits, labels, y_grad = random_case(torch.float64)
    before = logits.clone()
    compute(1, logits, labels, y_grad)
    loss = vocab_parallel_cross_entropy(logits, labels)
    assert torch.equal(logits, before)
    assert not loss.requires_grad


@pytest.mark.parametrize("label", (-1, VOCABULARY, 10**9))
@pytest.mark.parametrize("tp", (1, 2))
def test_a_label_that_no_rank_holds_is_an_error(tp: int, label: int) -> None:
    """It would be a plausible loss: that of a logit equal to the largest."""
    logits, labels, y_grad = random_case(torch.float32)
    labels[1, 1] = label
    with pytest.raises(RuntimeError, match=r"a label is neither in \[0, 24\) nor ignore_index=-100"):
        compute(tp, logits, labels, y_grad)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ParallelError, match=r"logits of shape \(2, 3, 4\) need labels of shape \(2, 3\), got \(6,\)"):
        vocab_parallel_cross_entropy(torch.zeros(2, 3, 4), torch.zeros(6, dtype=torch.int64))


def test_the_largest_logit_is_found_across_groups_of_their_own() -> None:
    """Data-parallel ranks have other tokens; their maxima do not meet."""
    logits, labels, _ = random_case(torch.float64, (4,))
    with simulate(tp=2, dp=2) as info:
        by_token = TensorLayout(tuple(logits.shape), ((0, info.dp), (1, info.tp)))
        mine = TensorLayout((4,), ((0, info.dp),)).slice(labels)
        loss = vocab_parallel_cross_entropy(by_token.slice(logits), mine)
        expected = F.cross_entropy(logits, labels, reduction="none").chunk(2)
        for rank, value in enumerate(rank_values(loss)):
            torch.testing.assert_close(value, expected[rank // 2], rtol=1e-13, atol=1e-14)
