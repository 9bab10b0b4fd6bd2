from __future__ import annotations

from pathlib import Path

import pytest

from meshpeft.training.output import OutputDirectory, OutputError


def write_run(path: Path, text: str, **options: bool) -> OutputDirectory:
    output = OutputDirectory(path, **options)
    output.check()
    (output.open() / "run.json").write_text(text)
    return output


def test_the_output_appears_when_it_is_whole(tmp_path: Path) -> None:
    output = write_run(tmp_path / "a" / "b", "one")
    assert not (tmp_path / "a" / "b").exists()
    output.commit()
    assert (tmp_path / "a" / "b" / "run.json").read_text() == "one"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_a_run_is_replaced_only_when_asked_and_only_by_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "run"
    write_run(path, "one").commit()
    with pytest.raises(OutputError, match=r"holds a finished run.*--overwrite"):
        OutputDirectory(path).check()
    output = write_run(path, "two", overwrite=True)
    output.discard()
    assert (path / "run.json").read_text() == "one"
    write_run(path, "three", overwrite=True).commit()
    assert (path / "run.json").read_text() == "three"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_files_that_are_not_a_run_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(OutputError, match="not a run's"):
        OutputDirectory(tmp_path, overwrite=True).check()
    with pytest.raises(OutputError, match="is a file"):
        OutputDirectory(tmp_path / "thesis.tex").check()
    with pytest.raises(OutputError, match=r"thesis\.tex is not a directory"):
        OutputDirectory(tmp_path / "thesis.tex" / "run").check()


def test_a_stage_that_a_killed_run_left_is_thrown_away(tmp_path: Path) -> None:
    (OutputDirectory(tmp_path / "run").open() / "half").touch()
    output = write_run(tmp_path / "run", "whole")
    output.commit()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]
