"""The world that a launcher (torchrun, Slurm, Kubernetes) describes in the environment, and the group made of it.

`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT` are read and checked here,
before any process waits for another: leftovers of another run are an error and no hang.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import NamedTuple

import torch
import torch.distributed as dist

from meshpeft.parallel.errors import ParallelError, first_line

__all__ = ["LauncherWorld", "is_joined", "launcher_world", "start_process_group"]

_HIGHEST_PORT = 65535
# After so long without the others a process says for whom it waits; torch itself gives up after 10 or 30 minutes.
_SILENT_SECONDS = 60.0


class LauncherWorld(NamedTuple):
    """This process's place in the world that its launcher started.

    Attributes:
        rank: Index in `[0, world_size)`.
        world_size: Number of processes, over all machines.
        local_rank: This process's index on its machine; 0 where the launcher sets none.
        address: Host and port at which the processes meet; `None` in a world of one process that has no need to.
        local_world_size: Number of processes on this machine; `None` where the launcher does not say.
    """

    rank: int
    world_size: int
    local_rank: int
    address: tuple[str, int] | None
    local_world_size: int | None = None


def is_joined() -> bool:
    """Whether a launcher started this process as one of its workers."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launcher_world() -> LauncherWorld | None:
    """Read the world from the environment; `None` if no launcher described one.

    Raises:
        ParallelError: a variable is missing, not a number, or does not fit the others. Such a world would fail in its
            first collective, or wait for processes that do not exist.
    """
    if not is_joined():
        for given, missing in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
            if given in os.environ:
                raise ParallelError(
                    f"{given}={os.environ[given]!r} is set and {missing} is not; a launcher sets both. Set {missing} "
                    f"too, or unset {given}"
                )
        return None
    world_size = _integer("WORLD_SIZE", 1, None)
    rank = _integer("RANK", 0, world_size - 1)
    local_rank = _integer("LOCAL_RANK", 0, world_size - 1) if "LOCAL_RANK" in os.environ else 0
    local_size = _integer("LOCAL_WORLD_SIZE", 1, world_size) if "LOCAL_WORLD_SIZE" in os.environ else None
    if "MASTER_ADDR" not in os.environ and "MASTER_PORT" not in os.environ and world_size == 1:
        return LauncherWorld(rank, world_size, local_rank, None, local_size)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ParallelError(
                f"RANK={rank} and WORLD_SIZE={world_size} are set and {name} is not: the processes cannot meet. Set "
                "MASTER_ADDR and MASTER_PORT to the host of rank 0 and a free port there, or unset RANK and WORLD_SIZE "
                "to let meshpeft start its own processes"
            )
    address = os.environ["MASTER_ADDR"], _integer("MASTER_PORT", 1 if world_size > 1 else 0, _HIGHEST_PORT)
    return LauncherWorld(rank, world_size, local_rank, address, local_size)


def start_process_group() -> bool:
    """Start the default process group that the environment describes, unless there is one.

    Returns:
        Whether there is a process group now.

    Raises:
        ParallelError: The variables make no sense, or the processes do not meet.
    """
    if dist.is_available() and dist.is_initialized():
        return True
    world = launcher_world()
    if world is None or world.address is None:
        return False
    if torch.cuda.is_available():
        if world.local_rank >= torch.cuda.device_count():
            raise ParallelError(
                f"LOCAL_RANK={world.local_rank}, and this machine has {torch.cuda.device_count()} GPUs; start one "
                "process for each GPU"
            )
        torch.cuda.set_device(world.local_rank)
    meeting = f"the other processes of WORLD_SIZE={world.world_size} at {world.address[0]}:{world.address[1]}"
    waiting = threading.Timer(
        _SILENT_SECONDS,
        logging.getLogger("meshpeft").warning,
        (f"meshpeft: RANK={world.rank} still waits for {meeting}",),
    )
    waiting.daemon = True
    waiting.start()
    try:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    except (dist.DistError, ValueError, OSError) as error:
        raise ParallelError(
            f"RANK={world.rank} cannot meet {meeting}: {first_line(error)}; check that each rank was started "
            "once, and that MASTER_ADDR and MASTER_PORT are those of rank 0"
        ) from error
    finally:
        waiting.cancel()
    return True


def _integer(name: str, least: int, most: int | None) -> int:
    """The variable's value, which lies in `[least, most]`."""
    given = os.environ[name].strip()
    expected = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"
    # Ten digits hold every value that makes sense; isdecimal() also takes digits of other scripts.
    if not (given.isascii() and given.isdecimal() and len(given) <= 10):
        raise ParallelError(f"{name}={given[:40]!r}: expected {expected}; it is set by the launcher, or left from one")
    value = int(given)
    if value < least or (most is not None and value > most):
        raise ParallelError(f"{name}={value}: expected {expected}; it is set by the launcher, or left from one")
    return value
