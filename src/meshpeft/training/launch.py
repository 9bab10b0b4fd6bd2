"""The processes of a run: started here or joined, placed on the mesh, and interrupted by signals.

`meshpeft finetune --tp 2` is one process that starts two workers through PyTorch's elastic launcher and
waits. Under a launcher that sets `RANK` and `WORLD_SIZE` (torchrun, Slurm with the two exported) it is one
of the workers already, and starts none. With one worker nothing is started and torch.distributed is unused.

A failing worker writes a report into a directory that all share; the parent ends the rest and raises the report of the
worker that failed *first*, since the others then fail too, for want of it.

A signal that ends a run (Ctrl-C, a scheduler's SIGTERM, a terminal's SIGHUP) is handled between two steps, by all ranks
together (`Interruption`).
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import tempfile
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from meshpeft.checkpoint.coordination import cpu_group
from meshpeft.parallel.errors import MeshPEFTError, ParallelError
from meshpeft.parallel.launcher_world import is_joined, launcher_world
from meshpeft.parallel.mesh import ParallelGroupInfo, check_shards, destroy_parallelism, init_parallelism
from meshpeft.training.config import LayoutConfig
from meshpeft.training.streams import make_streams_lenient, plain_warnings

__all__ = [
    "Interruption",
    "LaunchError",
    "RunInterrupted",
    "WorkerDied",
    "device",
    "heeded_signals",
    "join_mesh",
    "launch",
    "number_of_workers",
    "speaks_for_all",
    "workers_for",
]

# A worker that lost its connection waits before it dies: the launcher is to see the one that broke it first.
LOST_CONNECTION_GRACE_SECONDS = 2.0
# How long workers may take to end after SIGTERM before SIGKILL.
SHUTDOWN_SECONDS = 5
# Processes of one machine meet on its own address, not on a name that has to be looked up.
_LOOPBACK = "127.0.0.1"
_LOOPBACK_RENDEZVOUS = "meshpeft-loopback"


class LaunchError(MeshPEFTError):
    """The processes asked for cannot be started here, or do not fit those that are running."""


class WorkerDied(RuntimeError):
    """A worker ended with an error of its own. The text is its traceback, or how it was killed."""


@dataclass(frozen=True)
class _Report:
    """Why a worker failed: `sentence` for bad input and interruptions (with the signal's number), else `traceback`."""

    rank: int
    time_ns: int
    lost_connection: bool
    sentence: str | None = None
    traceback: str = ""
    interrupted_by: int | None = None


def number_of_workers(
    tensor_parallel: int = 1,
    data_parallel: int | None = None,
    pipeline_parallel: int = 1,
    expert_parallel: int = 1,
    expert_tensor_parallel: int | None = None,
    context_parallel: int = 1,
) -> int:
    """Count the processes that the sizes need; `data_parallel=None` takes the smallest number that fits.

    Returns:
        The world size given by a launcher, else `pp * dp * cp * tp`, else the smallest number that both
        `pp * cp * tp` and `pp * ep * etp` divide.

    Raises:
        LaunchError: The sizes do not fit together, or not the launcher's world; it names what would.
        ParallelError: The launcher's variables make no sense.
    """
    etp = tensor_parallel if expert_tensor_parallel is None else expert_tensor_parallel
    sizes = {"tp": tensor_parallel, "cp": context_parallel, "pp": pipeline_parallel, "ep": expert_parallel, "etp": etp}
    if data_parallel is not None:
        sizes["dp"] = data_parallel
    for name, size in sizes.items():
        if size < 1:
            raise LaunchError(f"{name}={size}: expected a size of at least 1")
    dense = pipeline_parallel * context_parallel * tensor_parallel
    expert = pipeline_parallel * expert_parallel * etp
    smallest = math.lcm(dense, expert)
    wanted = smallest if data_parallel is None else dense * data_parallel
    if wanted % smallest:
        raise LaunchError(
            f"dp={data_parallel} makes {wanted} processes, which pp*ep*etp={expert} does not divide; "
            f"use a dp that is a multiple of {smallest // dense}"
        )
    joined = launcher_world()
    if joined is None:
        return wanted
    world = joined.world_size
    if world % smallest:
        raise LaunchError(f"WORLD_SIZE={world} processes were started, but these sizes need a multiple of {smallest}")
    if data_parallel is not None and world != wanted:
        raise LaunchError(
            f"WORLD_SIZE={world} processes were started, but pp*dp*tp={wanted}; leave dp out or use dp={world // dense}"
        )
    return world


def launch(
    function: Callable[..., object], *arguments: Any, workers: int, shutdown_seconds: int = SHUTDOWN_SECONDS
) -> None:
    """Run `function(*arguments)` once on each worker, and return when all are done.

    Args:
        function: Importable by name (workers are fresh processes), as are the types of `arguments`.
        workers: See `number_of_workers`.
        shutdown_seconds: How long workers may take to end when they are asked to, before they are killed.

    Raises:
        MeshPEFTError: A worker found the input at fault; the sentence is the worker's.
        RunInterrupted: A signal came, and the workers made an end of their own.
        WorkerDied: A worker failed otherwise; the others have been ended.
    """
    if is_joined():
        _work(function, *arguments)
        return
    if workers == 1:
        function(*arguments)
        return
    if torch.cuda.is_available() and torch.cuda.device_count() < workers:
        raise LaunchError(
            f"{workers} workers need a GPU each, and this machine has {torch.cuda.device_count()}; "
            f"use smaller sizes, or start the workers on several machines with torchrun"
        )
    with tempfile.TemporaryDirectory(prefix="meshpeft-") as reports, _quiet_launcher():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=workers,
            run_id=uuid.uuid4().hex,
            rdzv_backend=_LOOPBACK_RENDEZVOUS,
            local_addr=_LOOPBACK,
            max_restarts=0,
            shutdown_timeout=shutdown_seconds,
            signals_to_handle=",".join(number.name for number in heeded_signals()),
        )
        try:
            with _signal_handlers_restored(), _loopback_interface():
                elastic_launch(config, _reporting_work)(Path(reports), function, *arguments)
        except ChildFailedError as error:
            raise _root_cause(Path(reports), error) from None
        except SignalException as error:
            for report in _reports(Path(reports)):
                if report.interrupted_by is not None:
                    raise RunInterrupted(str(report.sentence), report.interrupted_by) from None
            raise RunInterrupted(
                f"ended by {signal.Signals(error.sigval).name}, with nothing to save", int(error.sigval)
            ) from None


def speaks_for_all() -> bool:
    """Return whether this process prints an error: true on exactly one of those that fail and call this.

    Before the workers are connected they all fail alike, and rank 0 speaks; afterwards the first to ask does.
    """
    if not is_joined():
        return True
    if not dist.is_initialized():
        try:
            world = launcher_world()
        except ParallelError:  # it is what this process has to say, perhaps alone: no rank is sure to be there
            return True
        return world is None or world.rank == 0
    try:
        asked: int = dist.distributed_c10d._get_default_store().add("meshpeft/failures", 1)
    except RuntimeError:  # the store went down with the worker that held it
        return True
    return asked == 1


def _work(function: Callable[..., object], *arguments: Any) -> None:
    """Run the body of a worker: its share of the cores, the function, and a clean end."""
    world = launcher_world()
    if "OMP_NUM_THREADS" not in os.environ and world is not None and world.local_world_size is not None:
        torch.set_num_threads(max(1, _available_cores() // world.local_world_size))
    function(*arguments)
    # Only after success: a failing worker must end at once, not wait for the others here.
    destroy_parallelism()
    if dist.is_initialized():
        dist.destroy_process_group()


def _reporting_work(reports: Path, function: Callable[..., object], *arguments: Any) -> None:
    make_streams_lenient()
    try:
        with plain_warnings("meshpeft"):
            _work(function, *arguments)
    except Exception as error:
        report = _Report(
            rank=int(os.environ["RANK"]),
            time_ns=time.time_ns(),
            lost_connection=_is_lost_connection(error),
            sentence=str(error) if isinstance(error, MeshPEFTError) else None,
            traceback=traceback.format_exc(),
            interrupted_by=error.number if isinstance(error, RunInterrupted) else None,
        )
        part = reports / f"{report.rank}.part"
        part.write_text(json.dumps(asdict(report)))
        part.rename(reports / f"{report.rank}.json")
        if report.lost_connection:
            time.sleep(LOST_CONNECTION_GRACE_SECONDS)
        raise


def _is_lost_connection(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in text or "connection" in text or "peer" in text)
    )


def _reports(directory: Path) -> list[_Report]:
    return [_Report(**json.loads(path.read_text())) for path in directory.glob("*.json")]


def _root_cause(directory: Path, error: ChildFailedError) -> MeshPEFTError | WorkerDied:
    """Find the first failure: reports in order of time, lost connections last."""
    reports = _reports(directory)
    rank, failure = error.get_first_failure()
    first = min(reports, key=lambda report: (report.lost_connection, report.time_ns), default=None)
    if first is None or (first.lost_connection and all(report.rank != rank for report in reports)):
        return WorkerDied(f"worker {rank} {_how_it_ended(failure)}")
    if first.interrupted_by is not None:
        return RunInterrupted(str(first.sentence), first.interrupted_by)
    if first.sentence is not None:
        return MeshPEFTError(first.sentence)
    return WorkerDied(f"worker {first.rank} failed:\n{first.traceback.rstrip()}")


def _how_it_ended(failure: ProcessFailure) -> str:
    if failure.exitcode == -signal.SIGKILL:
        return "was killed (SIGKILL), as happens when memory runs out; try a smaller --micro-batch-size"
    if failure.exitcode < 0:
        return f"was ended by a signal ({failure.signal_name()})"
    return f"ended with exit code {failure.exitcode} and left no traceback"


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _quiet_launcher() -> Iterator[None]:
    """Silence the launcher's log: it repeats every failure, which `launch` raises once."""
    noisy = ("torch.distributed.elastic", "torch.multiprocessing")
    names = [name for name in logging.root.manager.loggerDict if name.startswith(noisy)]
    states = {name: logging.getLogger(name).disabled for name in names}
    for name in names:
        logging.getLogger(name).disabled = True
    try:
        yield
    finally:
        for name, state in states.items():
            logging.getLogger(name).disabled = state


@contextmanager
def _signal_handlers_restored() -> Iterator[None]:
    """Put the caller's signal handlers back: the launcher installs its own and leaves them."""
    handlers = {number: signal.getsignal(number) for number in heeded_signals()}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class _LoopbackRendezvous(RendezvousHandler):
    """Where the workers of one machine meet: a store that other machines cannot reach.

    The launcher's own rendezvous listens on every address, without credentials, and reads a pickle from the store.
    """

    def __init__(self) -> None:
        listener = socket.create_server((_LOOPBACK, 0))
        self._port: int = listener.getsockname()[1]
        # The store owns the socket from now on.
        self._store = dist.TCPStore(  # type: ignore[attr-defined]  # documented, and left out of its __all__
            _LOOPBACK, self._port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )

    @property
    def use_agent_store(self) -> bool:
        """Workers use this store, and open none of their own."""
        return True

    def get_backend(self) -> str:
        """Name the rendezvous."""
        return _LOOPBACK_RENDEZVOUS

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet alone: the launcher is the only one."""
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo(_LOOPBACK, self._port))

    def is_closed(self) -> bool:
        """Return False: nobody closes it."""
        return False

    def set_closed(self) -> None:
        """Do nothing: there is no other launcher to notify."""

    def num_nodes_waiting(self) -> int:
        """Count the launchers that wait to join: none."""
        return 0

    def get_run_id(self) -> str:
        """Identify the run."""
        return _LOOPBACK_RENDEZVOUS

    def shutdown(self) -> bool:
        """Nothing is left to be shut down: the store goes with the launcher."""
        return True


rendezvous_handler_registry.register(_LOOPBACK_RENDEZVOUS, lambda parameters: _LoopbackRendezvous())


@contextmanager
def _loopback_interface() -> Iterator[None]:
    """Let gloo's connections listen on the loopback interface too, unless the user has chosen one.

    By default they listen where the host's name points, which other machines may reach.
    """
    name = "GLOO_SOCKET_IFNAME"
    loopback = next((interface for _, interface in socket.if_nameindex() if interface in ("lo", "lo0")), None)
    if loopback is None or name in os.environ:
        yield
        return
    os.environ[name] = loopback
    try:
        yield
    finally:
        del os.environ[name]


_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def heeded_signals() -> list[signal.Signals]:
    """List the signals that end a run: those that ask for it, less those that the caller ignores.

    Under `nohup` a run ignores SIGHUP, and goes on when its terminal is gone; a shell's background job may ignore
    SIGINT.
    """
    return [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


class RunInterrupted(MeshPEFTError):
    """A run that was stopped by a signal and can be continued.

    Args:
        text: What was saved, and how to resume.
        number: Number of the signal.
    """

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.number = number

    @property
    def exit_code(self) -> int:
        """By the shell's convention."""
        return 128 + self.number


class Interruption:
    """Records the signals that would end the process; a context manager, for the main thread.

    Ranks agree between two steps (`requested`) on what follows.
    """

    def __init__(self) -> None:
        self._number = 0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._note) for number in heeded_signals()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A second signal stops a lone process at once. Workers get a second one from their launcher, too.
        if self._number and "RANK" not in os.environ:
            raise KeyboardInterrupt
        self._number = number

    def requested(self, due: bool = False) -> tuple[int, bool]:
        """Agree on the signal that any rank got, or 0, and whether a checkpoint is due on any. A collective.

        Args:
            due: Whether a checkpoint is due by this rank's clock.
        """
        # Not the checkpoints' group: a save may be under way.
        group = cpu_group("interruptions")
        if group is None:
            return self._number, due
        asked = torch.tensor([self._number, int(due)])
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=group)
        return int(asked[0]), bool(asked[1])


def device() -> torch.device:
    """Return this worker's GPU, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def workers_for(layout: LayoutConfig) -> int:
    """Count the processes that the options need; see `number_of_workers`.

    Raises:
        LaunchError, ParallelError: The sizes do not fit together.
    """
    world = number_of_workers(
        layout.tp,
        layout.dp,
        expert_parallel=layout.ep,
        expert_tensor_parallel=layout.etp,
        context_parallel=layout.cp,
    )
    if isinstance(layout.shard_base, int):
        check_shards(layout.shard_base, world // layout.tp)
    elif layout.shard_base == "all" and world == layout.tp:
        warnings.warn(
            "shard_base=all: there is one copy of the base, so nothing is sharded; --dp and --cp make more copies",
            stacklevel=2,
        )
    return world


def join_mesh(layout: LayoutConfig) -> ParallelGroupInfo:
    """Make the groups that the options ask for. Every worker calls it."""
    return init_parallelism(
        tensor_parallel=layout.tp,
        expert_parallel=layout.ep,
        expert_tensor_parallel=layout.etp,
        context_parallel=layout.cp,
    )
