from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from meshpeft.hub import staging
from meshpeft.hub.adapter_config import CONFIG_NAME, WEIGHTS_NAME
from meshpeft.hub.staging import LOCK_NAME, DirectoryInUse, DirectoryLock, StagedFiles
from meshpeft.training.output import OutputDirectory, OutputError, RunState, run_state


def begin(path: Path, text: str = "", **options: bool) -> OutputDirectory:
    """A run up to its first steps."""
    output = OutputDirectory(path, **options)
    output.check()
    output.open()
    output.begin({"results": None})
    output.metrics.write_text(text)
    return output


def finish(output: OutputDirectory, text: str) -> None:
    """The end of a run, whose adapter holds `text`."""
    with StagedFiles(output.path) as staged:
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            (staged.folder / name).write_text(text)
        output.publish(staged)
    output.finish({"results": text})
    output.close()


def content(path: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in path.iterdir()}


def whole(text: str) -> dict[str, str]:
    record = json.dumps({"results": text}, indent=2) + "\n"
    return {WEIGHTS_NAME: text, CONFIG_NAME: text, "metrics.jsonl": text, "run.json": record}


def checkpoint(path: Path, step: int = 1) -> None:
    (path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)


def test_what_a_run_shows_while_it_goes_and_when_it_is_finished(tmp_path: Path) -> None:
    output = begin(tmp_path / "a" / "b", "one")
    assert content(tmp_path / "a" / "b").keys() == {"metrics.jsonl", "run.partial.json", LOCK_NAME}
    finish(output, "one")
    assert content(tmp_path / "a" / "b") == whole("one")
    assert run_state(tmp_path / "a" / "b") is RunState.FINISHED


def test_a_run_is_replaced_only_when_asked_and_only_by_a_finished_one(tmp_path: Path) -> None:
    path = tmp_path / "run"
    finish(begin(path, "one"), "one")
    (path / "notes.txt").write_text("mine")
    (path / "loss.png").write_text("of one")
    with pytest.raises(OutputError, match=r"holds a finished run.*--overwrite"):
        OutputDirectory(path).check()
    before = content(path)
    begin(path, "two", overwrite=True).close()
    assert content(path) == before
    finish(begin(path, "three", overwrite=True), "three")
    assert content(path) == {**whole("three"), "notes.txt": "mine"}


def test_files_that_are_not_a_run_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(OutputError, match="not a run's"):
        OutputDirectory(tmp_path, overwrite=True).check()
    with pytest.raises(OutputError, match="is a file"):
        OutputDirectory(tmp_path / "thesis.tex").check()
    with pytest.raises(OutputError, match=r"thesis\.tex is not a directory"):
        OutputDirectory(tmp_path / "thesis.tex" / "run").check()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_root_of_a_fresh_volume_is_free(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    finish(begin(tmp_path, "one"), "one")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("n" * 300, "File name too long"), ("a\0b", "null byte"), ("/", "holds files that are not a run's")],
    ids=["too long", "null byte", "the root"],
)
def test_a_name_that_no_output_can_have_is_a_sentence(name: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=sentence):
        OutputDirectory(tmp_path / name).check()


def test_a_long_name_is_no_trouble(tmp_path: Path) -> None:
    finish(begin(tmp_path / ("n" * 255), "one"), "one")


# -- places that cannot be written ---------------------------------------------------------------------------------


@contextmanager
def refuses(
    monkeypatch: pytest.MonkeyPatch, function: str, number: int, when: Callable[[Path], bool]
) -> Iterator[None]:
    """A function of `os` fails for the paths that `when` names."""
    real = getattr(os, function)

    def call(path: Any, *arguments: Any, **options: Any) -> Any:
        if not isinstance(path, int) and when(Path(path)):
            raise OSError(number, os.strerror(number))
        return real(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, function, call)
        yield


@pytest.mark.parametrize("function", ("mkdir", "open", "rename"))
def test_check_finds_what_would_fail_at_the_end_and_leaves_nothing(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        refuses(monkeypatch, function, errno.EACCES, lambda path: "run" in path.parts),
        pytest.raises(OutputError, match="run: cannot be written: Permission denied"),
    ):
        OutputDirectory(tmp_path / "a" / "run").check()
    assert not list(tmp_path.iterdir())
    OutputDirectory(tmp_path / "a" / "run").check()
    assert not list(tmp_path.iterdir())


def test_nothing_is_asked_of_the_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a mount point, or below a directory that cannot be written: only what is inside may be renamed."""
    path = tmp_path / "run"
    path.mkdir()
    outside = [
        refuses(monkeypatch, function, errno.EBUSY, lambda given: given.parent == tmp_path)
        for function in ("mkdir", "rename", "replace", "unlink", "rmdir")
    ]
    with outside[0], outside[1], outside[2], outside[3], outside[4]:
        finish(begin(path, "one"), "one")
        finish(begin(path, "two", overwrite=True), "two")
    assert content(path) == whole("two")


# -- a kill, or a failure, at any moment ---------------------------------------------------------------------------


CHANGES = ("mkdir", "rename", "replace", "unlink", "rmdir")


def killed_before(moment: int, job: Callable[[], None]) -> bool:
    """Run `job` in a process that dies before its change of the file system number `moment`; whether it ended first."""
    process = os.fork()
    if not process:
        made = 0

        def changed(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal made
                made += 1
                if made > moment:
                    os._exit(9)
                return real(*arguments, **options)

            return call

        try:
            for name in CHANGES:
                setattr(os, name, changed(getattr(os, name)))
            job()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, 9)
    return code == 0


def test_a_kill_at_any_moment_leaves_the_old_run_or_one_that_says_that_it_is_not_finished(tmp_path: Path) -> None:
    """Before each change of the file system of a run that replaces another, and has saved a checkpoint."""
    path, states = tmp_path / "run", []

    def replace() -> None:
        output = begin(path, "new", overwrite=True)
        checkpoint(path)
        finish(output, "new")

    for moment in range(100):
        shutil.rmtree(path, ignore_errors=True)
        finish(begin(path, "old"), "old")
        ended = killed_before(moment, replace)
        states.append(run_state(path))
        if states[-1] is RunState.FINISHED:
            text = (path / CONFIG_NAME).read_text()
            assert (path / WEIGHTS_NAME).read_text() == text and (path / "metrics.jsonl").read_text() == text
            assert json.loads((path / "run.json").read_text()) == {"results": text}
        else:
            assert states[-1] is RunState.UNFINISHED
            with pytest.raises(OutputError, match="holds the checkpoints of an interrupted run"):
                OutputDirectory(path).check()
        finish(begin(path, "again", overwrite=True, resume=True), "again")
        assert not [name for name in os.listdir(path) if name.startswith(".")]
        if ended:
            break
    assert ended and states.count(RunState.UNFINISHED) > 5 and len(states) > 20


def test_whatever_fails_at_the_end_the_finished_files_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rename of a publication fails once: the old run is as it was, the error says where the new files are."""
    failed = 0
    for failing in range(20):
        path = tmp_path / str(failing)
        finish(begin(path, "old"), "old")
        output = begin(path, "new", overwrite=True)
        calls = 0
        real = os.rename

        def rename(*arguments: Any, failing: int = failing, real: Any = real) -> None:
            nonlocal calls
            calls += 1
            if calls == failing + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(*arguments)

        with StagedFiles(path) as staged:
            for name in (WEIGHTS_NAME, CONFIG_NAME):
                (staged.folder / name).write_text("new")
            with monkeypatch.context() as patched:
                patched.setattr(os, "rename", rename)
                try:
                    output.publish(staged)
                    break
                except OSError as error:
                    failed += 1
                    text, _, place = str(error.strerror).partition("; the finished files are in ")
        assert text == "No space left on device"
        assert content(Path(place)) == {WEIGHTS_NAME: "new", CONFIG_NAME: "new"}
        output.close()
        found = {file.name: file.read_text() for file in path.iterdir() if file.is_file()}
        assert {name: found[name] for name in whole("old")} == whole("old")
        finish(begin(path, "again", overwrite=True), "again")
        assert content(Path(place)) == {WEIGHTS_NAME: "new", CONFIG_NAME: "new"}
    assert failed >= 5


# -- owners --------------------------------------------------------------------------------------------------------


def own_and_wait(path: str, ready: Any, end: Any) -> None:
    output = begin(Path(path), "theirs")
    (Path(path) / ".meshpeft-00000000.partial").mkdir()
    checkpoint(Path(path))
    ready.set()
    end.wait()
    output.close()


@pytest.fixture
def live_run(tmp_path: Path) -> Iterator[tuple[Path, Any]]:
    """The directory of a run that goes on, and its process."""
    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    process = context.Process(target=own_and_wait, args=(str(tmp_path / "run"), ready, end))
    process.start()
    try:
        assert ready.wait(60)
        yield tmp_path / "run", process
    finally:
        if process.is_alive():
            end.set()
        process.join(60)


@pytest.mark.parametrize("options", ({}, {"overwrite": True}, {"resume": True}, {"overwrite": True, "resume": True}))
def test_a_run_that_goes_on_is_left_alone(options: dict[str, bool], live_run: tuple[Path, Any]) -> None:
    path, process = live_run
    before = content_and_folders(path)
    sentence = rf"run: process {process.pid} on .* \(since 20.*\) is writing there; wait for it, or choose another"
    output = OutputDirectory(path, **options)
    for refuses in (output.check, output.open):
        with pytest.raises(OutputError, match=sentence) as refused:
            refuses()
        assert "interrupted" not in str(refused.value)
    output.clear()
    for write in (StagedFiles, lambda path: DirectoryLock(path).acquire()):
        with pytest.raises(DirectoryInUse, match="is writing there"):
            write(path)
    assert content_and_folders(path) == before


def test_what_a_killed_run_left_is_cleaned_up(live_run: tuple[Path, Any]) -> None:
    path, process = live_run
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    with pytest.raises(OutputError, match="holds the checkpoints of an interrupted run; go on with --resume auto"):
        OutputDirectory(path).check()
    output = begin(path, "mine", resume=True)
    finish(output, "mine")
    assert {name for name in os.listdir(path) if name != "checkpoints"} == whole("mine").keys()


def test_a_process_that_is_forked_meanwhile_owns_nothing(tmp_path: Path) -> None:
    """It may outlive the run: a lock that it kept would make the directory look like one of a run that goes on."""
    lock = DirectoryLock(tmp_path)
    lock.acquire()
    context = multiprocessing.get_context("fork")
    runs = context.Event()
    process = context.Process(target=lambda: (runs.set(), signal.pause()))
    process.start()
    try:
        assert runs.wait(60)
        # As when the parent is killed: its lock file stays, and its descriptor is closed.
        file, _ = staging._held.pop(lock.directory)
        os.close(file)
        with DirectoryLock(tmp_path):
            pass
    finally:
        process.kill()
        process.join()


def test_a_lock_that_another_machine_left_is_named(tmp_path: Path) -> None:
    signed = {"host": "node7", "process": 12, "since": "2026-11-29 10:00:00 +0000"}
    (tmp_path / LOCK_NAME).write_text(json.dumps(signed))
    output = OutputDirectory(tmp_path)
    with pytest.warns(UserWarning, match=r"process 12 on node7 \(since 2026-11-29 .*\) has not ended its work there"):
        output.open()
    output.close()


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    left = tmp_path / ".meshpeft-00000000.partial"  # whose it is cannot be known
    left.mkdir()
    output = OutputDirectory(tmp_path)
    with pytest.warns(UserWarning, match="this file system has no locks, so nothing keeps a second run out"):
        output.open()
    output.close()
    assert left.is_dir()


def content_and_folders(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() if file.is_file() else "" for file in path.rglob("*")}


# -- modes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", (0o022, 0o077, 0o002))
def test_modes_follow_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with StagedFiles(tmp_path / "run") as staged:
            for name, mode in (("private", 0o600), ("read only", 0o444), ("usual", 0o666)):
                (staged.folder / name).touch()
                (staged.folder / name).chmod(mode)
            staged.publish(["private", "read only", "usual"])
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "run").iterdir()} == {0o666 & ~umask}
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o777 & ~umask
