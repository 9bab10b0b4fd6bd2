"""One optimizer step, and the measured loss: the arithmetic of training, and nothing else.

    micro-batches -> logits -> cross entropy, summed -> / target tokens of the global batch -> backward
        -> finalize_gradients -> clip -> AdamW

Every rank runs the same code on its own micro-batches, equally many of them, and gets the same loss and norm.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from meshpeft.models import Decoder
from meshpeft.parallel.communication import all_reduce
from meshpeft.parallel.gradients import clip_gradients_, finalize_gradients, gradient_norm
from meshpeft.parallel.loss import vocab_parallel_cross_entropy
from meshpeft.parallel.mesh import parallel_group_info
from meshpeft.training.optimizer import LossScale, parameters_to_train
from meshpeft.training.packing import IGNORED_LABEL, MicroBatch

__all__ = ["StepResult", "TrainStep", "mean_loss", "summed_loss"]


class StepResult(NamedTuple):
    """What a step reports; scalars, the same on every rank.

    Attributes:
        loss: mean over the target tokens of the global batch, in nats.
        grad_norm: of all gradients before clipping; not finite where float16 overflowed and the step was skipped.
    """

    loss: Tensor
    grad_norm: Tensor


def summed_loss(model: Decoder, batch: MicroBatch) -> Tensor:
    """The sum of -log p(label) over this micro-batch's target tokens, in nats: a scalar, `I` over tp.

    float32, or float64 for a float64 model.
    """
    logits = model(batch.input_ids, position_ids=batch.position_ids, document_ids=batch.document_ids)
    return vocab_parallel_cross_entropy(logits, batch.labels, ignore_index=IGNORED_LABEL).sum()


class TrainStep:
    """Trains the parameters of `model` that are not frozen.

    Args:
        model: with its adapters; the trainable parameters are those of this moment.
        optimizer: over these parameters.
        clip: largest gradient norm; 0 means no limit.
        loss_scale: for float16; `None` otherwise.
    """

    def __init__(
        self,
        model: Decoder,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float = 0.0,
        loss_scale: LossScale | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.clip = clip
        self.loss_scale = loss_scale
        self.parameters = parameters_to_train(model)

    def __call__(
        self, micro_batches: Iterable[MicroBatch], target_tokens: int, *, lr: float | None = None
    ) -> StepResult:
        """One step on one global batch. The gradients, final and clipped, are left for the caller to read.

        Args:
            micro_batches: this data-parallel rank's; equally many, of equal shapes, on every rank.
            target_tokens: of the *global* batch, over all ranks and micro-batches.
            lr: the learning rate of this step, times each group's own `lr_ratio`; by default the optimizer's as it is.
        """
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        scale = 1.0 if self.loss_scale is None else self.loss_scale.value
        total: Tensor | None = None
        for batch in micro_batches:
            summed = summed_loss(self.model, batch)
            (summed * (scale / max(1, target_tokens))).backward()
            total = summed.detach() if total is None else total + summed.detach()
        if total is None:
            raise ValueError("a step needs at least one micro-batch, on every rank")
        finalize_gradients(self.parameters)
        if self.loss_scale is not None:
            self.loss_scale.unscale_(self.parameters)
        norm = clip_gradients_(self.parameters, self.clip) if self.clip else gradient_norm(self.parameters)
        if lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group.get("lr_ratio", 1.0)
        if self.loss_scale is None or self.loss_scale.accept(norm):
            self.optimizer.step()
        return StepResult(all_reduce(total, parallel_group_info().dp) / max(1, target_tokens), norm)


@torch.no_grad()
def mean_loss(model: Decoder, micro_batches: Iterable[MicroBatch], target_tokens: int) -> Tensor:
    """The loss without training: the mean over `target_tokens`, arguments and result as for a step."""
    was_training = model.training
    model.eval()
    total: Tensor | None = None
    for batch in micro_batches:
        summed = summed_loss(model, batch)
        total = summed if total is None else total + summed
    model.train(was_training)
    if total is None:
        raise ValueError("a loss needs at least one micro-batch, on every rank")
    return all_reduce(total, parallel_group_info().dp) / max(1, target_tokens)
