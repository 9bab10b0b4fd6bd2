"""What workers do in the tests of launching; in a module of its own, so that fresh processes can import it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch import nn

from meshpeft.parallel import MeshPEFTError, init_parallelism
from meshpeft.parallel.launcher_world import is_joined
from meshpeft.parallel.sharded_base import BlockStore, stored_
from meshpeft.training.launch import launch, number_of_workers, speaks_for_all


def listening(pid: int) -> list[tuple[str, int]]:
    """Addresses and ports at which a process listens."""
    connections = psutil.Process(pid).net_connections("tcp")
    return [tuple(found.laddr) for found in connections if found.status == psutil.CONN_LISTEN]


def look_around(directory: Path, launcher: int) -> None:
    """Each worker leaves the sum over the workers of rank + 1, its number of threads, and where it listens.

    Rank 0 also leaves where the launcher does. All are connected meanwhile.
    """
    info = init_parallelism(tensor_parallel=2)
    total = torch.tensor([float(info.tp.rank + 1)])
    dist.all_reduce(total, group=info.tp.group)
    places = listening(os.getpid()) + (listening(launcher) if info.tp.rank == 0 else [])
    found = {"sum": total.item(), "threads": torch.get_num_threads(), "listening": places}
    (directory / f"{info.tp.rank}").write_text(json.dumps(found))
    dist.all_reduce(torch.ones(1), group=info.tp.group)


def hang_up(directory: Path, launcher: int) -> None:
    """Rank 0 sends the launcher a hang-up, and leaves a file if it lives on."""
    info = init_parallelism(tensor_parallel=2)
    if info.tp.rank == 0:
        os.kill(launcher, signal.SIGHUP)
        time.sleep(1.5)
        (directory / "done").touch()
    dist.all_reduce(torch.ones(1), group=info.tp.group)


def fail_on_rank_1(how: str) -> None:
    """Rank 1 fails while rank 0 waits for it in a collective."""
    info = init_parallelism(tensor_parallel=2)
    if info.tp.rank == 1:
        if how == "error":
            raise ZeroDivisionError("this one was first")
        if how == "bad input":
            raise MeshPEFTError("the file is truncated")
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1), group=info.tp.group)


def fail_beside_a_gather() -> None:
    """Rank 1 fails while rank 0 waits for its part of a sharded weight."""
    dp = init_parallelism().dp
    layer = nn.Linear(8, 8).requires_grad_(False)
    stored_([(layer, "weight")], BlockStore(dp))
    if dp.rank == 1:
        raise ZeroDivisionError("this one was first")
    layer(torch.ones(1, 8))


def joined(how: str) -> int:
    """What the command line does under a launcher: the exit code, and at most one worker that prints."""
    assert is_joined()
    try:
        launch(fail_joined, how, workers=number_of_workers(tensor_parallel=2))
    except MeshPEFTError as error:
        if speaks_for_all():
            print(error, file=sys.stderr)
        return 2
    return 0


def fail_joined(how: str) -> None:
    """Fails on every rank before they are connected, or on rank 1 afterwards, or not at all."""
    if how == "before":
        raise MeshPEFTError("no such file")
    info = init_parallelism(tensor_parallel=2)
    if how == "after" and info.tp.rank == 1:
        raise MeshPEFTError("the file is truncated")
    if how == "all":
        dist.all_reduce(torch.ones(1), group=info.tp.group)
        raise MeshPEFTError("not divisible")


if __name__ == "__main__":
    sys.exit(joined(sys.argv[1]))
