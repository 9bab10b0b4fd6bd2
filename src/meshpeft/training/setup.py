"""What finetune, evaluate and generate have in common: where they run."""

from __future__ import annotations

import torch

from meshpeft.parallel.mesh import ParallelGroupInfo, init_parallelism
from meshpeft.training.config import LayoutConfig
from meshpeft.training.launch import number_of_workers

__all__ = ["device", "join_mesh", "workers_for"]


def device() -> torch.device:
    """This worker's GPU, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def workers_for(layout: LayoutConfig) -> int:
    """How many processes the options ask for; see [`number_of_workers`][meshpeft.training.launch.number_of_workers]."""
    return number_of_workers(layout.tp, layout.dp, expert_parallel=layout.ep, expert_tensor_parallel=layout.etp)


def join_mesh(layout: LayoutConfig) -> ParallelGroupInfo:
    """Make the groups that the options ask for. Every worker calls it."""
    return init_parallelism(tensor_parallel=layout.tp, expert_parallel=layout.ep, expert_tensor_parallel=layout.etp)
