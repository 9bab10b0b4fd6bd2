"""Saving and loading adapted Megatron models with its `dist_checkpointing`, in real processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers.megatron_cpu import megatron_on_cpu
from helpers.megatron_gpt import make_gpt
from helpers.megatron_runs import adapter_parameters, whole
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map, optim_state_to_sharding_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from meshpeft.models import DecoderConfig
from meshpeft.parallel import named_init_
from meshpeft.peft import PEFT


@dataclass(frozen=True)
class Layout:
    """Sizes of Megatron's `parallel_state`."""

    tp: int = 1
    ep: int = 1
    etp: int | None = None

    @property
    def sizes(self) -> dict[str, Any]:
        return {
            "tensor_model_parallel_size": self.tp,
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.etp,
        }


def save_and_load(
    method: PEFT,
    directory: Path,
    saved_at: Layout,
    loaded_at: Layout,
    config: DecoderConfig,
    metadata: dict[str, Any],
    grouped: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Save model and optimizer at one layout, load them at another; both, in full shapes."""
    with megatron_on_cpu(**saved_at.sizes):
        model, optimizer = _trainee(method, config, 0, grouped)
        dist_checkpointing.save(_sharded(model, optimizer, metadata), str(directory))
        saved = _whole(model, optimizer)
    with megatron_on_cpu(**loaded_at.sizes):
        model, optimizer = _trainee(method, config, 1, grouped)
        loaded = dist_checkpointing.load(_sharded(model, optimizer, metadata), str(directory))
        model.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
        return saved, _whole(model, optimizer)


def _trainee(method: PEFT, config: DecoderConfig, seed: int, grouped: bool) -> tuple[GPTModel, torch.optim.Optimizer]:
    """A model and its optimizer, of random parameters and states."""
    model = method(make_gpt(config, grouped=grouped))
    trainable = adapter_parameters(model)
    optimizer = torch.optim.SGD(trainable.values(), lr=0.1, momentum=0.9)
    for name, parameter in trainable.items():
        named_init_(parameter, lambda full: full.normal_(), seed, name)
        parameter.grad = parameter.detach() ** 2
    optimizer.step()
    return model, optimizer


def _sharded(model: GPTModel, optimizer: torch.optim.Optimizer, metadata: dict[str, Any]) -> dict[str, Any]:
    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    entries = model.sharded_state_dict(metadata=groups | metadata)
    state = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optim_state_to_sharding_state(state, get_param_id_to_sharded_param_map(entries, parameters))
    return {"model": entries, "optimizer": state}


def _whole(model: GPTModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {}
    for name, parameter in adapter_parameters(model).items():
        found[name] = whole(parameter, parameter)
        found[f"{name}/momentum"] = whole(parameter, optimizer.state[parameter]["momentum_buffer"])
    return found
