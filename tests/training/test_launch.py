from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import launch_jobs

from meshpeft.parallel import MeshPEFTError
from meshpeft.training.launch import LaunchError, WorkerDied, launch, number_of_workers


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
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert number_of_workers(tensor_parallel=2) == 6
    with pytest.raises(LaunchError, match="a multiple of 4"):
        number_of_workers(tensor_parallel=4)
    with pytest.raises(LaunchError, match="leave dp out or use dp=3"):
        number_of_workers(tensor_parallel=2, data_parallel=2)


def test_workers_are_connected_and_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launch(launch_jobs.write_sum, tmp_path, workers=2)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [(tmp_path / rank).read_text() for rank in ("0", "1")] == [f"3 {threads}", f"3 {threads}"]


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ("error", WorkerDied, r"worker 1 failed:\nTraceback(.|\n)*ZeroDivisionError: this one was first$"),
        ("bad input", MeshPEFTError, "^the file is truncated$"),
        ("kill", WorkerDied, r"^worker 1 was killed \(SIGKILL\)"),
    ],
)
def test_a_failing_worker_ends_the_run_with_its_own_report(how: str, kind: type[Exception], text: str) -> None:
    """Rank 0 loses its connection, and is not the one that is blamed."""
    with pytest.raises(kind, match=text):
        launch(launch_jobs.fail_on_rank_1, how, workers=2)


@pytest.mark.parametrize(
    ("how", "codes", "printed"),
    [
        ("never", [0, 0], ""),
        ("before", [2, 2], "no such file\n"),
        ("all", [2, 2], "not divisible\n"),
        ("after", [0, 2], "the file is truncated\n"),
    ],
)
def test_under_a_launcher_the_process_joins_and_one_worker_speaks(how: str, codes: list[int], printed: str) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    path = str(Path(__file__).parents[1])
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
