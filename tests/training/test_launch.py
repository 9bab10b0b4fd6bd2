from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import launch_jobs

from meshpeft.parallel import MeshPEFTError, ParallelError
from meshpeft.training.launch import LaunchError, RunInterrupted, WorkerDied, launch, number_of_workers, speaks_for_all


@pytest.mark.parametrize(
    ("sizes", "workers"),
    [
        ({}, 1),
        ({"tensor_parallel": 4}, 4),
        ({"tensor_parallel": 2, "data_parallel": 3}, 6),
        ({"tensor_parallel": 2, "expert_parallel": 4}, 8),
        ({"tensor_parallel": 2, "expert_parallel": 4, "expert_tensor_parallel": 1}, 4),
        ({"tensor_parallel": 2, "expert_parallel": 3, "expert_tensor_parallel": 1, "pipeline_parallel": 2}, 12),
    ],
)
def test_number_of_workers_is_the_smallest_world_that_fits(sizes: dict[str, int], workers: int) -> None:
    assert number_of_workers(**sizes) == workers


def test_a_world_that_does_not_fit_names_one_that_would(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LaunchError, match="dp that is a multiple of 2"):
        number_of_workers(tensor_parallel=2, data_parallel=3, expert_parallel=2)
    with pytest.raises(LaunchError, match="tp=0: expected a size of at least 1"):
        number_of_workers(tensor_parallel=0)
    for name, value in {"RANK": "0", "WORLD_SIZE": "6", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert number_of_workers(tensor_parallel=2) == 6
    with pytest.raises(LaunchError, match="a multiple of 4"):
        number_of_workers(tensor_parallel=4)
    with pytest.raises(LaunchError, match="leave dp out or use dp=3"):
        number_of_workers(tensor_parallel=2, data_parallel=2)


@pytest.mark.parametrize("rank", ["one", "", "7", "1"])
def test_a_process_of_a_world_that_makes_no_sense_says_so_itself(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other is sure to be there: what is in the environment may be left from another run."""
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(ParallelError):
        number_of_workers()
    assert speaks_for_all()
    for name, value in {"RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert not speaks_for_all()  # rank 0 does


def test_workers_are_connected_share_the_cores_and_listen_on_the_loopback_interface_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher's store has no credentials: whoever reaches it can write what the workers read."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = launch_jobs.listening(os.getpid())
    launch(launch_jobs.look_around, tmp_path, os.getpid(), workers=2)
    found = [json.loads((tmp_path / rank).read_text()) for rank in ("0", "1")]
    assert [worker["sum"] for worker in found] == [3, 3]
    assert [worker["threads"] for worker in found] == [max(1, len(os.sched_getaffinity(0)) // 2)] * 2
    ours = [host for worker in found for host, port in worker["listening"] if (host, port) not in before]
    assert len(ours) >= 3  # the store's, and one of gloo's in each worker
    assert set(ours) == {"127.0.0.1"}


# That a signal ends a run is seen with one of the command line, too.
@pytest.mark.parametrize("ignored", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_signal_that_the_caller_ignores_ends_no_run(ignored: bool, tmp_path: Path) -> None:
    """A hang-up ends a run, but not under nohup, which ignores it."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        if ignored:
            launch(launch_jobs.hang_up, tmp_path, os.getpid(), workers=2)
        else:
            with pytest.raises(RunInterrupted, match="SIGHUP") as raised:
                launch(launch_jobs.hang_up, tmp_path, os.getpid(), workers=2)
            assert raised.value.exit_code == 129
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert (tmp_path / "done").exists() == ignored


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ("error", WorkerDied, r"worker 1 failed:\nTraceback(.|\n)*ZeroDivisionError: this one was first$"),
        # Also from the command line.
        pytest.param("bad input", MeshPEFTError, "^the file is truncated$", marks=pytest.mark.slow),
        ("kill", WorkerDied, r"^worker 1 was killed \(SIGKILL\)"),
    ],
)
def test_a_failing_worker_ends_the_run_with_its_own_report(how: str, kind: type[Exception], text: str) -> None:
    """Rank 0 loses its connection, and is not the one that is blamed."""
    with pytest.raises(kind, match=text):
        launch(launch_jobs.fail_on_rank_1, how, workers=2)


def test_a_worker_that_fails_while_others_gather_a_weight_ends_the_run_with_its_own_report() -> None:
    with pytest.raises(WorkerDied, match=r"worker 1 failed:\nTraceback(.|\n)*ZeroDivisionError: this one was first$"):
        launch(launch_jobs.fail_beside_a_gather, workers=2)


@pytest.mark.parametrize(
    ("how", "codes", "printed"),
    [
        pytest.param("never", [0, 0], "", marks=pytest.mark.slow),
        ("before", [2, 2], "no such file\n"),
        ("all", [2, 2], "not divisible\n"),
        pytest.param("after", [0, 2], "the file is truncated\n", marks=pytest.mark.slow),
    ],
)
def test_under_a_launcher_the_process_joins_and_one_worker_speaks(how: str, codes: list[int], printed: str) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "helpers.launch_jobs", how],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=180)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == codes
    assert "".join(errors) == printed
