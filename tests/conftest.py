from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.tiny_models import save_tiny
from helpers.workers import close_workers
from torch.distributed._local_tensor import maybe_disable_local_tensor_mode

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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a small random model of a family; made once."""
    made: dict[str, Path] = {}

    def directory(family: str) -> Path:
        if family not in made:
            # A test may ask for its first model inside a simulation, where new tensors are simulated ones.
            with maybe_disable_local_tensor_mode():
                made[family] = save_tiny(family, tmp_path_factory.mktemp(family))
        return made[family]

    return directory


def pytest_sessionfinish() -> None:
    close_workers()
