"""What cannot be saved or loaded: each is a sentence that names the first difference, and changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoint_jobs import train
from helpers.oracle_runs import OPTIONS, make_model
from helpers.simulate import simulate
from torch import Tensor, nn

from meshpeft.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from meshpeft.models import Decoder
from meshpeft.parallel import ModelParallelConfig
from meshpeft.peft import CanonicalLoRA, DoRA, LoRA, LowRankPEFT

DEFAULT_PARTS = CanonicalLoRA().target_modules


def adapted(seed: int = 0, base_seed: int | None = None, method: type[LowRankPEFT] = LoRA, **options: Any) -> Decoder:
    base = make_model(ModelParallelConfig())
    if base_seed is not None:
        base.reset_parameters(base_seed)
    return method(**{**OPTIONS, "seed": seed, **options})(base)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer, range(1))
    save_checkpoint(model, folder, step=1, optimizer=optimizer)
    return folder / "step-00000001"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_seed": 1}, r"another base model: decoder.final_layernorm.*|another base model: .* has other values"),
        ({"dim": 2}, r"linear_fc1: rank is 4 in .*step-00000001, 2 in the model"),
        ({"alpha": 9}, r"linear_fc1: alpha is 8.0 in .*, 9.0 in the model"),
        ({"use_rslora": True}, r"use_rslora is False in .*, True in the model"),
        (
            {"target_modules": ["linear_proj"]},
            r"another target set: .* has an adapter on decoder.layers.0.mlp.linear_fc1",
        ),
        ({"target_modules": ["*"]}, r"another target set: the model has an adapter on output_layer"),
        (
            {"method": DoRA},
            r"linear_fc1: another method: .*step-00000001 was made with LoRALinear, the model has DoRALinear",
        ),
        (
            {"method": CanonicalLoRA, "target_modules": DEFAULT_PARTS},
            r"linear_fc1: another method: .* LoRALinear, the model has LoRALinearSplitFC1UpGate",
        ),
        ({"lora_dtype": torch.float32}, r"linear_in.weight has type float64 in .*, float32 in the model"),
    ],
    ids=["base", "rank", "alpha", "scale", "fewer targets", "more targets", "dora", "canonical", "type"],
)
def test_a_checkpoint_of_another_model_is_refused(options: dict[str, Any], message: str, saved: Path) -> None:
    model = adapted(**options)
    before = state(model)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model, saved)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_another_optimizer_is_refused(saved: Path, tmp_path: Path) -> None:
    model = adapted()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for optimizer, message in (
        (torch.optim.AdamW(parameters[1:]), "group 0 of the optimizer differs from that in .*linear_qkv"),
        (torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:]}]), "has 2 groups, in .* it had 1"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(model, saved, optimizer=optimizer)
        assert not optimizer.state
    save_checkpoint(model, tmp_path, step=1)
    with pytest.raises(CheckpointError, match="holds no optimizer state"):
        load_checkpoint(model, tmp_path, optimizer=torch.optim.AdamW(parameters))


class Refusing(torch.optim.AdamW):
    """Changes itself, and then finds the state wanting, as torch's own do without a `step`."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        raise KeyError("momentum")


def test_an_optimizer_that_refuses_its_state_leaves_everything_as_it_was(saved: Path) -> None:
    model = adapted(seed=1)
    optimizer = Refusing([parameter for parameter in model.parameters() if parameter.requires_grad])
    before, generator = state(model), torch.get_rng_state()
    with pytest.raises(CheckpointError, match=r"manifest.json is inconsistent: it lacks 'momentum'"):
        load_checkpoint(model, saved, optimizer=optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert not optimizer.state and torch.equal(torch.get_rng_state(), generator)


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = adapted()
    stranger = torch.optim.AdamW([nn.Parameter(torch.zeros(3))])
    with pytest.raises(CheckpointError, match=r"parameter of shape \(3,\) that is not one of the model's"):
        save_checkpoint(model, tmp_path, step=1, optimizer=stranger)
    with pytest.raises(CheckpointError, match="extra values must be plain JSON"):
        save_checkpoint(model, tmp_path, step=1, extra={"tensor": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="step=-1"):
        save_checkpoint(model, tmp_path, step=-1)
    with pytest.raises(CheckpointError, match="nothing to train"):
        save_checkpoint(make_model(ModelParallelConfig()).requires_grad_(False), tmp_path, step=1)
    with simulate(tp=2), pytest.raises(CheckpointError, match="simulated ranks"):
        save_checkpoint(model, tmp_path, step=1)
    assert not list(tmp_path.iterdir())
