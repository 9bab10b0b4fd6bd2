"""The pool of real processes that other tests rely on."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from helpers.workers import WorkerFailed, WorkersHung, run_on_ranks
from torch import Tensor

from meshpeft.parallel import init_parallelism


@dataclass
class Answer:
    """A type of this test module, which no path leads to: workers must load it from its file."""

    rank: int
    total: Tensor
    threads: int
    process: int


def add_up(value: Tensor) -> Answer:
    total = value * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return Answer(dist.get_rank(), total, torch.get_num_threads(), os.getpid())


def fail(how: str) -> None:
    if how == "all":
        raise ZeroDivisionError(f"on rank {dist.get_rank()}")
    if dist.get_rank() == 1:
        if how == "one":
            raise ZeroDivisionError("this was the cause")
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    dist.all_reduce(torch.ones(1))


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def make_groups() -> None:
    info = init_parallelism(tensor_parallel=2)
    assert threads() > 4 * 2
    everything: list[object] = [info]
    everything.append(everything)  # a cycle, as models are


def processes() -> list[int]:
    return [answer.process for answer in run_on_ranks(2, add_up, torch.ones(1))]


def test_every_rank_answers_and_the_processes_are_used_again() -> None:
    first = run_on_ranks(2, add_up, torch.tensor([2.0]))
    second = run_on_ranks(2, add_up, torch.tensor([1.0]))
    assert [answer.rank for answer in first] == [0, 1]
    assert [answer.total.item() for answer in first + second] == [6.0, 6.0, 3.0, 3.0]
    assert [answer.process for answer in first] == [answer.process for answer in second]
    assert first[0].threads == 1


def test_no_thread_of_a_jobs_groups_is_left_to_the_next() -> None:
    before = run_on_ranks(2, threads)
    run_on_ranks(2, make_groups)
    assert run_on_ranks(2, threads) == before


def test_an_error_on_all_ranks_is_raised_here_and_costs_no_process() -> None:
    before = processes()
    with pytest.raises(WorkerFailed, match=r"(?s)rank 0: Traceback.*in fail.*ZeroDivisionError: on rank 0"):
        run_on_ranks(2, fail, "all")
    assert processes() == before


def test_the_error_of_one_rank_comes_first() -> None:
    with pytest.raises(WorkerFailed) as caught:
        run_on_ranks(2, fail, "one")
    assert str(caught.value).startswith("rank 1: Traceback")
    assert "this was the cause" in str(caught.value)
    assert len(processes()) == 2


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced() -> None:
    before = processes()
    with pytest.raises(WorkerFailed, match="rank 1: killed by SIGKILL"):
        run_on_ranks(2, fail, "dies")
    assert not set(processes()) & set(before)


@pytest.mark.slow
def test_a_hung_worker_ends_the_job_and_the_pool() -> None:
    before = processes()
    with pytest.raises(WorkersHung, match=r"within 1 s from the ranks \[.*1\]"):
        run_on_ranks(2, fail, "hangs", timeout=1.0)
    assert not set(processes()) & set(before)
