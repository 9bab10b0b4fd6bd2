from __future__ import annotations

import pytest

from meshpeft.parallel import ParallelError, init_parallelism
from meshpeft.parallel.launcher_world import launcher_world

GOOD = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def set_world(monkeypatch: pytest.MonkeyPatch) -> object:
    def set_variables(**changes: str | None) -> None:
        for name, value in {**GOOD, **changes}.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    return set_variables


def test_the_world_is_what_the_launcher_set(set_world) -> None:
    set_world()
    assert launcher_world() == (1, 2, 1, ("127.0.0.1", 29500), None)
    set_world(RANK="0", WORLD_SIZE="1", LOCAL_RANK=None, MASTER_ADDR=None, MASTER_PORT=None)
    assert launcher_world() == (0, 1, 0, None, None)
    set_world(**dict.fromkeys(GOOD))
    assert launcher_world() is None


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"RANK": None}, "WORLD_SIZE='2' is set and RANK is not"),
        ({"WORLD_SIZE": None}, "RANK='1' is set and WORLD_SIZE is not"),
        ({"RANK": "2"}, "RANK=2: expected an integer from 0 to 1"),
        ({"RANK": "-1"}, "RANK='-1': expected an integer from 0 to 1"),
        ({"RANK": "one"}, "RANK='one': expected an integer from 0 to 1"),
        ({"RANK": ""}, "RANK='': expected an integer from 0 to 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: expected an integer of at least 1"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE='2.0': expected an integer of at least 1"),
        ({"WORLD_SIZE": "9" * 5000}, "expected an integer of at least 1"),
        ({"LOCAL_RANK": "7"}, "LOCAL_RANK=7: expected an integer from 0 to 1"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
        ({"LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE='two': expected an integer from 1 to 2"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0: expected an integer from 1 to 2"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not: the processes cannot meet"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not: the processes cannot meet"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not: the processes cannot meet"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http': expected an integer from 1 to 65535"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536: expected an integer from 1 to 65535"),
    ],
)
def test_a_world_that_makes_no_sense_is_an_error_and_no_hang(changes, text, set_world) -> None:
    set_world(**changes)
    with pytest.raises(ParallelError, match=text) as raised:
        init_parallelism()
    assert len(str(raised.value)) < 400


def test_a_rank_that_was_started_twice_is_an_error(set_world) -> None:
    """The second rank 0 finds the first one's port taken."""
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        set_world(RANK="0", LOCAL_RANK="0", MASTER_PORT=str(taken.getsockname()[1]))
        with pytest.raises(ParallelError, match="RANK=0 cannot meet the other processes of WORLD_SIZE=2 at "):
            init_parallelism()
