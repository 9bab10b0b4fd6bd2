from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.tiny_models import save_tiny
from torch.distributed._local_tensor import maybe_disable_local_tensor_mode


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
