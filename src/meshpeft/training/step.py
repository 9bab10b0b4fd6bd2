"""One optimizer step, and the measured loss: the arithmetic of training, and nothing else.

    micro-batches -> loss of each token, summed -> / target tokens of the global batch -> backward
        -> finalize_gradients -> clip -> AdamW

What the loss is divided by: the number of target tokens (labels that are not ignored) in the *global* batch, that of
all ranks of the token axes (dp, cp) and all micro-batches of the step. Every rank divides its sum by this one number
before the backward pass, and `finalize_gradients` adds the ranks up without dividing again. So loss and gradients are
means over the tokens of the global batch, however it is split over ranks and micro-batches. (Were each rank to divide
by its own number of targets, a token on a rank with few of them would weigh more.) The number comes with the batch
(`GlobalBatchSlice.global_target_tokens`) and costs no communication. A step without a target token divides by 1. Where
the routers' balance is part of the loss, each row's is weighted with its target tokens, and so divided by the same
number. float16's loss scale multiplies what is divided, and is taken out of the gradients before they are clipped.

A step whose loss or whose gradients' norm is not finite changes nothing: neither the adapter nor the optimizer's
state. The ranks decide together whether it is: one that went on alone would train another adapter.

Every rank runs the same code on its own micro-batches, equally many of them, and gets the same loss and norm.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from meshpeft.data.batches import IGNORED_LABEL, MicroBatch
from meshpeft.models import LanguageModel
from meshpeft.parallel.agreement import gathered
from meshpeft.parallel.errors import MeshPEFTError, first_few
from meshpeft.parallel.finite import on_ranks, true_on_all_ranks
from meshpeft.parallel.gradients import clip_gradients_, finalize_gradients, gradient_norm
from meshpeft.parallel.mesh import parallel_group_info
from meshpeft.parallel.states import all_reduce
from meshpeft.peft import lora_plus_parameter_groups

__all__ = [
    "LossScale",
    "NothingToTrain",
    "StepResult",
    "TrainStep",
    "adamw",
    "mean_loss",
    "parameters_to_train",
    "summed_loss",
]


class StepResult(NamedTuple):
    """What a step reports; scalars, the same on every rank.

    Attributes:
        loss: Cross entropy, mean over the target tokens of the global batch, in nats.
        grad_norm: Norm of all gradients before clipping; not finite where a gradient is not, on any rank.
        router_loss: Load-balancing loss, before its coefficient: the mean over the rows of the global batch, weighted
            with their target tokens; `None` if it is not part of what is trained.
        skipped: What was not finite, and where, if the step was not taken.
        rescaled: Whether float16's loss scale was too large for it, and is lower now.
    """

    loss: Tensor
    grad_norm: Tensor
    router_loss: Tensor | None = None
    skipped: str | None = None
    rescaled: bool = False


def summed_loss(model: LanguageModel, batch: MicroBatch) -> Tensor:
    """Sum -log p(label) over this micro-batch's target tokens, in nats: a scalar, `I` over tp.

    float32, or float64 for a float64 model.
    """
    losses: Tensor = _token_losses(model, batch)
    return losses.sum()


def summed_losses(model: LanguageModel, batch: MicroBatch) -> Tensor:
    """Compute `summed_loss` and the load-balancing loss of a model with experts.

    Returns:
        [2]: the cross entropy, and the sum over the rows of (load-balancing loss x target tokens). `I` over tp.
    """
    losses, balance = _token_losses(model, batch, return_router_loss=True)
    entropy = losses.sum()
    targets = (batch.labels != IGNORED_LABEL).sum(-1)
    return torch.stack((entropy, (balance * targets).sum().to(entropy.dtype)))


def _token_losses(model: LanguageModel, batch: MicroBatch, **options: bool) -> Any:
    return model.token_losses(
        batch.labels,
        batch.input_ids,
        position_ids=batch.position_ids,
        document_ids=batch.document_ids,
        spans=batch.spans,
        ignore_index=IGNORED_LABEL,
        count=batch.target_count,
        **options,
    )


class TrainStep:
    """Trains the parameters of `model` that are not frozen.

    Args:
        model: Model with its adapters; the trainable parameters are those at construction.
        optimizer: Optimizer of these parameters.
        clip: Largest gradient norm; 0 means no limit.
        loss_scale: Loss scale of float16; `None` for other types.
        router_aux_loss_coef: Coefficient of the routers' load-balancing loss; 0 leaves it out.
    """

    def __init__(
        self,
        model: LanguageModel,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float = 0.0,
        loss_scale: LossScale | None = None,
        router_aux_loss_coef: float = 0.0,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.clip = clip
        self.loss_scale = loss_scale
        self.router_aux_loss_coef = router_aux_loss_coef
        self.parameters = parameters_to_train(model)

    def __call__(
        self, micro_batches: Iterable[MicroBatch], target_tokens: int, *, lr: float | None = None
    ) -> StepResult:
        """Take one step on one global batch. The gradients, final and clipped, stay for the caller to read.

        Args:
            micro_batches: Micro-batches of this rank; equally many, of equal shapes, on every rank.
            target_tokens: Target tokens of the *global* batch, over all ranks and micro-batches: the loss is divided
                by it (`GlobalBatchSlice.global_target_tokens`, which every rank has without communication).
            lr: Learning rate of this step, times each group's own `lr_ratio`; by default the optimizer's as it is.
        """
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        scale = 1.0 if self.loss_scale is None else self.loss_scale.value
        total: Tensor | None = None
        for batch in micro_batches:
            summed = self._losses(batch)
            (self._weighted(summed) * (scale / max(1, target_tokens))).backward()
            total = summed.detach() if total is None else total + summed.detach()
        if total is None:
            raise ValueError("a step needs at least one micro-batch, on every rank")
        return self.finish(total, target_tokens, lr=lr)

    def finish(self, total: Tensor, target_tokens: int, *, lr: float | None = None) -> StepResult:
        """Sum the gradients of all micro-batches over the ranks, clip them, and let the optimizer take its step.

        Args:
            total: [1] or [2], summed losses of this rank's micro-batches.
            target_tokens, lr: See the call.
        """
        # Before the sums over ranks spread what one of them has.
        largest = _largest_gradients(self.parameters)
        finalize_gradients(self.parameters)
        if self.loss_scale is not None:
            self.loss_scale.unscale_(self.parameters)
        means = all_reduce(total, parallel_group_info().token_axis()) / max(1, target_tokens)
        norm = gradient_norm(self.parameters, spoiled_by=means)
        skipped, rescaled = None, False
        if not _is_finite(norm):
            norm = torch.full_like(norm, torch.nan)  # infinite on some ranks, maybe
            skipped, rescaled = self._skipped(total, largest)
        else:
            if self.loss_scale is not None:
                self.loss_scale.accept(norm)
            if self.clip:
                clip_gradients_(self.parameters, self.clip, norm=norm)
            if lr is not None:
                for group in self.optimizer.param_groups:
                    group["lr"] = lr * group.get("lr_ratio", 1.0)
            self.optimizer.step()
        return StepResult(means[0], norm, means[1] if self.router_aux_loss_coef else None, skipped, rescaled)

    def _skipped(self, total: Tensor, largest: list[Tensor]) -> tuple[str, bool]:
        """Describe why a step is not taken, and whether the loss scale was too large; if so, lower it. A collective.

        Args:
            total: Summed losses of this rank.
            largest: Largest values of this rank's gradients, before they were summed over ranks.
        """
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        bad = [
            names[id(parameter)]
            for parameter, value in zip(self.parameters, largest, strict=True)
            if not true_on_all_ranks(value.isfinite())
        ]
        found = gathered((not true_on_all_ranks(total.isfinite().all()), bad))
        losses = [rank for rank, (loss, _) in enumerate(found) if loss]
        # The scale multiplies what comes after the loss.
        if self.loss_scale is not None and not losses and self.loss_scale.value > 1:
            self.loss_scale.accept(torch.tensor(torch.nan))
            return f"float16 overflowed; the loss scale is {self.loss_scale.value:g} from now on", True
        what = []
        if losses:
            what.append("the loss" + on_ranks(losses, len(found)))
        gradients = list(dict.fromkeys(name for _, own in found for name in own))
        if gradients:
            ranks = [rank for rank, (_, own) in enumerate(found) if own]
            what.append(f"the gradient of {first_few(gradients)}" + on_ranks(ranks, len(found)))
        if not what:
            return "the norm of the gradients is larger than their type holds", False
        return " and ".join(what) + (" is" if len(what) == 1 else " are") + " not finite", False

    def _losses(self, batch: MicroBatch) -> Tensor:
        """Compute [1] or [2]: the summed cross entropy, and the routers' balance where it is trained."""
        if self.router_aux_loss_coef:
            return summed_losses(self.model, batch)
        return summed_loss(self.model, batch).unsqueeze(0)

    def _weighted(self, losses: Tensor) -> Tensor:
        return losses[0] + self.router_aux_loss_coef * losses[1] if self.router_aux_loss_coef else losses[0]


def _largest_gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Return the largest absolute value in each parameter's gradient on this rank, without waiting for it."""
    grads = []
    for parameter in parameters:
        grad = parameter.grad
        if grad is not None and grad.is_sparse:
            grad = grad.coalesce().values()
        grads.append(parameter.new_zeros(1) if grad is None or grad.numel() == 0 else grad.detach())
    # One kernel for many parameters, as in PyTorch's own norm for clipping; adapters have hundreds of small ones.
    return list(torch._foreach_norm(grads, torch.inf))


def _is_finite(norm: Tensor) -> bool:
    if isinstance(norm, FakeTensor):  # it has no value: the step is that of any other time
        return True
    return true_on_all_ranks(norm.isfinite())


@torch.no_grad()
def mean_loss(model: LanguageModel, micro_batches: Iterable[MicroBatch], target_tokens: int) -> Tensor:
    """Compute the loss without training: the mean over `target_tokens`; arguments and result as for a step."""
    was_training = model.training
    model.eval()
    total: Tensor | None = None
    for batch in micro_batches:
        summed = summed_loss(model, batch)
        total = summed if total is None else total + summed
    model.train(was_training)
    if total is None:
        raise ValueError("a loss needs at least one micro-batch, on every rank")
    return all_reduce(total, parallel_group_info().token_axis()) / max(1, target_tokens)


class NothingToTrain(MeshPEFTError):
    """A model all of whose parameters are frozen."""


def parameters_to_train(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require a gradient, each once, in the order of the modules (the same on every rank).

    Raises:
        NothingToTrain: There are none.
    """
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not found:
        raise NothingToTrain("every parameter of the model is frozen; add an adapter first")
    return found


def adamw(model: nn.Module, *, lr: float, weight_decay: float = 0.01, lr_ratio: float = 1.0) -> torch.optim.AdamW:
    """Make AdamW (arXiv 1711.05101) over the trainable parameters of `model`, with betas 0.9 and 0.999.

    Args:
        model: Model with its adapters.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        lr_ratio: Learning rate of B factors over `lr` (LoRA+). Every group keeps its own as `lr_ratio`, so
            that a schedule can change them together.
    """
    parameters: list[nn.Parameter] | list[dict[str, Any]] = parameters_to_train(model)
    if lr_ratio != 1:
        parameters = lora_plus_parameter_groups(model, lr, lr_ratio, weight_decay)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    for group in optimizer.param_groups:
        group["lr_ratio"] = group["lr"] / lr
    return optimizer


@dataclass
class LossScale:
    """The factor on a float16 loss that keeps small gradients from vanishing (arXiv 1710.03740).

    It is halved by a step whose gradients overflow, which is then skipped, and doubled after `growth_interval`
    steps without one. The verdict comes from the global gradient norm, so every rank has the same scale.

    Attributes:
        value: The current factor, a power of two.
        growth_interval: Good steps before the next doubling.
        good_steps: Since the factor last changed.
    """

    value: float = 2.0**15
    growth_interval: int = 500
    good_steps: int = 0

    def unscale_(self, parameters: list[nn.Parameter]) -> None:
        """Divide the gradients, in place, by the factor that their loss was multiplied by."""
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(1 / self.value)

    def accept(self, grad_norm: Tensor) -> bool:
        """Return whether a step with this norm (of unscaled gradients, over all ranks) is taken; adapt the factor."""
        if not bool(grad_norm.isfinite()):
            self.value = max(1.0, self.value / 2)
            self.good_steps = 0
            return False
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.value *= 2
            self.good_steps = 0
        return True
