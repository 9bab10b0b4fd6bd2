from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from helpers.workers import close_workers

from meshpeft.parallel import destroy_parallelism


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    """Every test starts from the same random state, and leaves no process group to the next."""
    torch.manual_seed(0)
    yield
    left = dist.is_initialized()
    destroy_parallelism()
    if left:
        dist.destroy_process_group()
    assert not left, "the test left a process group; use helpers.simulate or helpers.workers"


def pytest_sessionfinish() -> None:
    close_workers()
