from __future__ import annotations

import errno
import logging
import os
import pty
import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from meshpeft.training.report import Report
from meshpeft.training.streams import plain_warnings

# What a run does with its streams: it prints, does its work, and leaves a file as its result.
RUN = """
import sys
from meshpeft.training.streams import make_streams_lenient
make_streams_lenient(end_without_reader={ends})
from rich.console import Console
Console().print("Grüße ✓", markup=False)
opened = open(sys.argv[1], "w")
print("printed", flush=True)
print("said", file=sys.stderr, flush=True)
assert sys.stdin.read() == ""
opened.write("result")
"""


def run(tmp_path, redirections: str = "", *, ends: bool = False, **options) -> subprocess.CompletedProcess:
    (tmp_path / "run.py").write_text(RUN.format(ends=ends))
    command = f'exec "{sys.executable}" run.py result {redirections}'
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(["sh", "-c", command], cwd=tmp_path, timeout=60, check=False, **streams)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_a_run_whose_streams_were_closed_does_its_work(closed: str, tmp_path) -> None:
    done = run(tmp_path, closed)
    assert done.returncode == 0, done.stderr
    # Nothing that was printed went into the file that would have got the stream's descriptor.
    assert (tmp_path / "result").read_text() == "result"


@pytest.mark.parametrize(
    ("variables", "printed"),
    [
        ({"PYTHONIOENCODING": "ascii"}, b"Gr??e ?\nprinted\n"),
        ({"PYTHONIOENCODING": "latin-1"}, b"Gr\xfc\xdfe ?\nprinted\n"),
        ({"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}, b"Gr??e ?\nprinted\n"),
    ],
)
def test_a_character_that_the_output_lacks_is_replaced(variables, printed, tmp_path) -> None:
    done = run(tmp_path, env={**os.environ, **variables})
    assert (done.returncode, done.stdout, done.stderr) == (0, printed, b"said\n")


@pytest.mark.parametrize("ends", [False, True])
def test_output_that_nobody_reads_ends_only_commands_that_just_print(ends: bool, tmp_path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run(tmp_path, ends=ends, stdout=writer)
    os.close(writer)
    assert (done.returncode == 0) is not ends
    assert (tmp_path / "result").exists() is not ends


def test_a_terminal_that_hung_up_and_a_full_disk_end_no_run(tmp_path) -> None:
    ours, terminal = pty.openpty()
    os.close(ours)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        os.write(terminal, b"x")
    with open("/dev/full", "wb") as full:
        for stream in (terminal, full):
            assert run(tmp_path, stdout=stream, stderr=stream).returncode == 0
            assert (tmp_path / "result").read_text() == "result"
    os.close(terminal)


def test_streams_that_the_caller_has_replaced_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    from meshpeft.training.streams import make_streams_lenient

    before = (sys.stdin, sys.stdout, sys.stderr)
    make_streams_lenient()
    assert (sys.stdin, sys.stdout, sys.stderr) == before


def test_a_report_that_nobody_reads_is_a_broken_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich would end the process with exit code 1 instead."""

    def gone(*_: Any) -> int:
        raise BrokenPipeError

    report: Any = Report(SimpleNamespace(world=SimpleNamespace(rank=0)))  # type: ignore[arg-type]
    monkeypatch.setattr(sys.stdout, "write", gone)
    with pytest.raises(BrokenPipeError):
        report.say("a line")


def test_a_warning_of_ours_is_one_sentence_of_rank_0(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with plain_warnings("meshpeft finetune"):
        warnings.warn("the data are few", stacklevel=1)
        monkeypatch.setenv("RANK", "1")
        warnings.warn("the data are few indeed", stacklevel=1)
    assert capsys.readouterr().err == "meshpeft finetune: warning: the data are few\n"


def test_what_other_packages_say_to_their_developers_is_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def noise() -> None:
        for category in (DeprecationWarning, FutureWarning):
            warnings.warn_explicit("isinstance(treespec, LeafSpec) is deprecated", category, "_pytree.py", 1)
        logging.getLogger("torchao").warning("Failed to load _C_cutlass.so")

    monkeypatch.setattr(sys, "warnoptions", [])
    with plain_warnings("meshpeft finetune"):
        warnings.simplefilter("always")
        noise()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "warnoptions", ["always"])

    def told() -> None:
        with plain_warnings("meshpeft finetune"):
            warnings.simplefilter("always")
            noise()

    with pytest.warns(FutureWarning, match="LeafSpec"):
        told()
