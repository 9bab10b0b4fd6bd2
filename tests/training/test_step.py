from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from helpers.simulate import per_rank, rank_values, simulate
from torch import Tensor
from torch.nn import functional

from meshpeft.data.batches import GlobalBatchSlice, PackedRows, RowSampler, pack_documents
from meshpeft.data.documents import Document
from meshpeft.models import Decoder, DecoderConfig
from meshpeft.parallel import ModelParallelConfig
from meshpeft.peft import LoRA
from meshpeft.training.step import LossScale, NothingToTrain, StepResult, TrainStep, adamw, mean_loss, summed_loss

CONFIG = DecoderConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=4,
    initializer_range=0.2,
)


def decoder(dtype: torch.dtype = torch.float64) -> Decoder:
    model = Decoder(CONFIG, dtype=dtype)
    # B starts away from 0, so that A has a gradient, too.
    LoRA(dim=2, alpha=2, lora_B_init_method="normal", lora_dtype=torch.promote_types(dtype, torch.float32))(model)
    return model


@pytest.fixture
def rows() -> PackedRows:
    """Four rows whose numbers of targets differ: 9, 3, 1 and 11."""
    numbers = np.random.RandomState(0)
    documents = []
    for length, targets in ((10, 9), (8, 3), (5, 1), (12, 11)):
        mask = np.arange(length) >= length - targets
        documents.append(Document(numbers.randint(0, 32, length).astype(np.int32), mask))
    return pack_documents(documents, 12, packing=False)


def batch(rows: PackedRows, micro_batch_size: int) -> GlobalBatchSlice:
    return RowSampler(rows=rows, batch_size=4, micro_batch_size=micro_batch_size).micro_batches(0)


def one_step(rows: PackedRows, micro_batch_size: int, **options: float) -> tuple[StepResult, list[Tensor], Decoder]:
    model = decoder()
    step = TrainStep(model, adamw(model, lr=0.1), **options)
    micro_batches = batch(rows, micro_batch_size)
    result = step(micro_batches, micro_batches.global_target_tokens)
    return result, [parameter.grad for parameter in step.parameters if parameter.grad is not None], model


@pytest.mark.parametrize("micro_batch_size", (1, 2, 3))
def test_gradient_accumulation_equals_one_batch(rows: PackedRows, micro_batch_size: int) -> None:
    """The mean is over the tokens of the whole batch, not of micro-batches that hold different numbers of them."""
    whole, whole_grads, whole_model = one_step(rows, 4)
    split, split_grads, split_model = one_step(rows, micro_batch_size)
    # float64, sums in another order.
    torch.testing.assert_close(split, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(split_grads, whole_grads, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(split_model.state_dict(), whole_model.state_dict(), rtol=1e-8, atol=1e-10)


def test_the_loss_is_the_mean_over_all_target_tokens(rows: PackedRows) -> None:
    model = decoder()
    micro_batches = batch(rows, 4)
    (everything,) = micro_batches
    logits = model(everything.input_ids, document_ids=everything.document_ids)
    expected = functional.cross_entropy(logits.flatten(0, 1), everything.labels.flatten())
    torch.testing.assert_close(
        mean_loss(model, batch(rows, 3), micro_batches.global_target_tokens), expected, rtol=1e-12, atol=0
    )
    assert int((everything.labels >= 0).sum()) == micro_batches.global_target_tokens == 24


def test_a_row_of_padding_has_no_loss_and_no_gradient(rows: PackedRows) -> None:
    model = decoder()
    loss = summed_loss(model, rows.gather(np.array([-1])))
    loss.backward()
    assert loss.item() == 0
    assert all(torch.count_nonzero(p.grad) == 0 for p in model.parameters() if p.grad is not None)


def test_clipping_reports_the_norm_before_and_leaves_the_direction(rows: PackedRows) -> None:
    free, free_grads, _ = one_step(rows, 2)
    clipped, clipped_grads, _ = one_step(rows, 2, clip=1e-3)
    torch.testing.assert_close(clipped.grad_norm, free.grad_norm)
    norm = torch.stack([grad.square().sum() for grad in clipped_grads]).sum().sqrt()
    # The clipping factor is max / (norm + 1e-6).
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)
    scale = norm / free.grad_norm
    torch.testing.assert_close(clipped_grads, [grad * scale for grad in free_grads])


def test_only_adapters_move_and_the_learning_rate_is_the_one_given(rows: PackedRows) -> None:
    before = {name: value.clone() for name, value in decoder().state_dict().items()}
    model = decoder()
    step = TrainStep(model, adamw(model, lr=123.0, weight_decay=0.0))
    micro_batches = batch(rows, 4)
    step(micro_batches, micro_batches.global_target_tokens, lr=1e-3)
    for name, value in model.state_dict().items():
        moved = (value - before[name]).abs().max().item()
        # AdamW's first step moves every value by lr.
        assert moved == pytest.approx(1e-3 if ".adapter." in name else 0, rel=1e-3), name


def test_a_model_without_trainable_parameters_is_refused() -> None:
    model = Decoder(CONFIG).requires_grad_(False)
    with pytest.raises(NothingToTrain, match="add an adapter"):
        adamw(model, lr=1.0)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_trains_float32_adapters(rows: PackedRows, dtype: torch.dtype) -> None:
    """The same gradients as float64 from the same weights, to the precision of the base's type."""
    model, exact = decoder(dtype), decoder()
    exact.load_state_dict(model.state_dict())
    scale = LossScale() if dtype == torch.float16 else None
    micro_batches = batch(rows, 2)
    found = TrainStep(model, adamw(model, lr=0.1), loss_scale=scale)
    expected = TrainStep(exact, adamw(exact, lr=0.1))
    loss = found(micro_batches, micro_batches.global_target_tokens).loss
    assert loss.item() == pytest.approx(
        expected(micro_batches, micro_batches.global_target_tokens).loss.item(), rel=1e-2
    )
    for ours, theirs in zip(found.parameters, expected.parameters, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert ours.dtype == ours.grad.dtype == torch.float32
        # bfloat16 has 8 bits: an error of 2^-8 in each of some tens of roundings.
        difference = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert difference.item() < 0.05


def test_a_step_that_overflows_is_skipped_and_halves_the_scale(rows: PackedRows) -> None:
    model = decoder(torch.float16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scale = LossScale(value=2.0**40)
    micro_batches = batch(rows, 2)
    step = TrainStep(model, adamw(model, lr=0.1), clip=1.0, loss_scale=scale)
    result = step(micro_batches, micro_batches.global_target_tokens)
    assert not result.grad_norm.isfinite() and result.loss.isfinite()
    assert scale.value == 2.0**39
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_the_scale_grows_after_enough_good_steps() -> None:
    scale = LossScale(value=4.0, growth_interval=2)
    verdicts: list[Callable[[], bool]] = [
        lambda: scale.accept(torch.tensor(1.0)),
        lambda: scale.accept(torch.tensor(float("nan"))),
        lambda: scale.accept(torch.tensor(1.0)),
        lambda: scale.accept(torch.tensor(1.0)),
    ]
    assert [(verdict(), scale.value) for verdict in verdicts] == [(True, 4), (False, 2), (True, 2), (True, 4)]


@pytest.mark.parametrize("what", ["gradient", "loss"])
@pytest.mark.parametrize("rank", [0, 3])
def test_no_rank_takes_a_step_that_is_not_finite_on_one(rows: PackedRows, what: str, rank: int) -> None:
    """Whichever parameter it is, replicated or sharded: where one rank alone left it out, the copies would differ."""
    with simulate(tp=2, dp=2):
        model = Decoder(CONFIG, ModelParallelConfig(tensor_model_parallel_size=2), dtype=torch.float64)
        LoRA(dim=2, alpha=2, lora_B_init_method="normal")(model)
        step = TrainStep(model, adamw(model, lr=0.1), clip=1.0)
        before = [parameter.detach().clone() for parameter in step.parameters]
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        micro_batch = rows.gather(np.array([0, 1]))
        for place in range(len(names) if what == "gradient" else 1):
            with spoiled(step, what, place, rank):
                result = step([micro_batch], 24)
            assert all(math.isnan(value.item()) for value in rank_values(result.grad_norm))
            assert result.skipped is not None and (names[place] if what == "gradient" else "the loss") in result.skipped
        for parameter, values in zip(step.parameters, before, strict=True):
            assert all(torch.equal(*pair) for pair in zip(rank_values(parameter), rank_values(values), strict=True))
        assert not step.optimizer.state
        assert step([micro_batch], 24).skipped is None


@contextmanager
def spoiled(step: TrainStep, what: str, place: int, rank: int) -> Iterator[None]:
    """One rank's gradient of one parameter is NaN, or its loss."""
    nan = per_rank(lambda own: torch.full((), math.nan if own == rank else 0.0, dtype=torch.float64))
    if what == "loss":
        losses = step._losses
        step._losses = lambda batch: losses(batch) + nan  # type: ignore[method-assign]
    else:
        hook = step.parameters[place].register_hook(lambda grad: grad + nan)
    try:
        yield
    finally:
        if what == "loss":
            del step._losses
        else:
            hook.remove()
