"""Real processes: gloo workers that are started once and used again by every test.

`run_on_ranks(2, job, *arguments)` runs `job(*arguments)` on ranks 0 and 1 with torch.distributed initialised, and
returns their results in order. A job is a module-level function of any module, a test's own too; its arguments and
results are pickled. Each job gets a process group of its own, so that one test leaves nothing to the next. A larger
world starts the ranks that are missing.

    def job(tp: int) -> list[float]:
        info = init_parallelism(tensor_parallel=tp)
        ...

    assert run_on_ranks(2, job, 2) == [...]
"""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing
import pickle
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from operator import attrgetter
from typing import Any

from torch.distributed import TCPStore

__all__ = ["WorkerFailed", "WorkersHung", "close_workers", "run_on_ranks"]

# Starting a worker imports torch: seconds, more on a busy machine.
START_SECONDS = 120.0
# How long the others may take to fail, or finish, once a rank has failed.
GRACE_SECONDS = 20.0


class WorkerFailed(AssertionError):
    """A job raised on a rank, or the rank's process died; the text is that rank's traceback."""


class WorkersHung(AssertionError):
    """A job did not end in time; the text names the ranks that did not answer."""


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection


class _Pool:
    def __init__(self) -> None:
        # Where the ranks meet. The system chooses the port: no other pool, nor another test process, can hold it. A
        # store in a file is asked every 10 ms, for each of the dozens of groups that a job may make.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._jobs = 0
        self._workers: list[_Worker] = []

    def run(
        self, world_size: int, function: Callable[..., Any], arguments: tuple[Any, ...], timeout: float
    ) -> list[Any]:
        """The function's result on each rank."""
        self._start(world_size)
        where = (function.__module__, sys.modules[function.__module__].__file__, function.__qualname__)
        message = pickle.dumps((self._jobs, world_size, where, pickle.dumps(arguments), timeout))
        self._jobs += 1
        ranks = self._workers[:world_size]
        for worker in ranks:
            worker.connection.send_bytes(message)
        return self._collect(ranks, timeout)

    def _start(self, world_size: int) -> None:
        """Start the ranks of this world that are not there yet."""
        context = multiprocessing.get_context("spawn")
        there = len(self._workers)
        for rank in range(there, world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._store.port, theirs, sys.path), daemon=True)
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours))
        self._collect(self._workers[there:], START_SECONDS)

    def close(self) -> None:
        """End the processes, whatever they do."""
        for worker in self._workers:
            worker.connection.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()

    def _collect(self, workers: list[_Worker], timeout: float) -> list[Any]:
        """Each one's answer. A pool in which a rank has not answered is of no use any more: it is closed."""
        waiting = {worker.connection: self._workers.index(worker) for worker in workers}
        results: dict[int, Any] = {}
        failures: list[tuple[float, int, str]] = []
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    succeeded, answer = pickle.loads(connection.recv_bytes())
                except EOFError:
                    succeeded, answer = False, (time.monotonic(), self._how_it_died(rank))
                if succeeded:
                    results[rank] = answer
                else:
                    when, text = answer
                    failures.append((when, rank, text))
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if waiting or any(not worker.process.is_alive() for worker in self._workers):
            self.close()
        if failures:
            # The first to fail is the cause; the others fail for want of it.
            raise WorkerFailed("\n".join(f"rank {rank}: {text}" for _, rank, text in sorted(failures)))
        if waiting:
            raise WorkersHung(f"no answer within {timeout:g} s from the ranks {sorted(waiting.values())}")
        return [results[rank] for rank in sorted(results)]

    def _how_it_died(self, rank: int) -> str:
        process = self._workers[rank].process
        process.join()
        code = process.exitcode or 0
        return "killed by " + signal.Signals(-code).name if code < 0 else f"the process ended with exit code {code}"

    @property
    def usable(self) -> bool:
        """Whether all processes are there."""
        return all(worker.process.is_alive() for worker in self._workers)


_pool: _Pool | None = None


def run_on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """Run `function(*arguments)` once on every rank of a gloo world.

    Args:
        world_size: number of processes; started when they are first needed, and kept.
        function: of a module, not a lambda nor a method.
        arguments: pickled.
        timeout: seconds, also of each collective.

    Returns:
        The results, by rank.

    Raises:
        WorkerFailed: an exception on a rank, or a process that died.
        WorkersHung: no answer in time.
    """
    global _pool
    if _pool is None or not _pool.usable:
        _pool = _Pool()
    return _pool.run(world_size, function, arguments, timeout)


def close_workers() -> None:
    """End all workers; the next use starts new ones."""
    global _pool
    if _pool is not None:
        _pool.close()
        _pool = None


def _serve(rank: int, port: int, connection: Connection, path: list[str]) -> None:
    """A worker's life: jobs until the connection closes."""
    sys.path[:] = path
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the test process ends its workers itself
    # Here, not above: the workers need them, the process that starts workers need not.
    import numpy as np
    import torch
    import torch.distributed as dist

    from meshpeft.parallel import destroy_parallelism

    torch.set_num_threads(1)
    _share_one_device()
    store = TCPStore("127.0.0.1", port, is_master=False)

    def run(
        job: int, world_size: int, where: tuple[str, str, str], arguments: bytes, timeout: float
    ) -> tuple[bool, Any]:
        # Each test starts from the same state, whichever ran before it.
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(str(job), store),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        try:
            result = _find(*where)(*pickle.loads(arguments))
            dist.barrier()  # no one leaves while another still reads from it
            return True, result
        except Exception:  # reported, and raised in the test
            # The time (of the machine's one monotonic clock) before leaving, at which the others fail too.
            return False, (time.monotonic(), traceback.format_exc())
        finally:
            destroy_parallelism()
            dist.destroy_process_group()

    connection.send_bytes(pickle.dumps((True, None)))
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(pickle.dumps(run(*pickle.loads(message))))
        # Groups are held by meshes and models, which are cycles, and a group's threads run while it lives. What is
        # left, imported modules above all, need not be looked through again.
        gc.collect()
        gc.freeze()


def _share_one_device() -> None:
    """Let all gloo groups of this process listen at one socket.

    By itself each group has a thread of its own for that, which wakes up every 10 ms, and ends at such a moment only.
    """
    from torch.distributed import distributed_c10d

    gloo = distributed_c10d.ProcessGroupGloo
    device = gloo.create_default_device()

    class _OneDevice(gloo):  # type: ignore[misc, valid-type]
        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
            options = gloo._Options()
            options._devices, options._timeout, options._threads = [device], timeout, 2
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = _OneDevice  # type: ignore[misc]


def _find(module_name: str, file: str, qualified_name: str) -> Callable[..., Any]:
    """The function. A test module is loaded from its file: with pytest's importlib mode its name leads nowhere."""
    module = sys.modules.get(module_name)
    if module is None:
        try:
            spec = importlib.util.find_spec(module_name)
        except ModuleNotFoundError:
            spec = None
        if spec is None or spec.origin != file:
            spec = importlib.util.spec_from_file_location(module_name, file)
        assert spec is not None and spec.loader is not None
        module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    function: Callable[..., Any] = attrgetter(qualified_name)(module)
    return function
