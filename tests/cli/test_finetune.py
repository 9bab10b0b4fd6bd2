"""The commands from end to end, on a random model of a few thousand parameters."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.finetune_jobs import finetuned
from safetensors.torch import load_file

from meshpeft.cli.main import main
from meshpeft.hub.tensor_files import TensorFileWriter
from meshpeft.training.output import OutputDirectory

OPTIONS = ["--seq-length=48", "--batch-size=4", "--micro-batch-size=2", "--rank=4", "--lr=0.01", "--seed=3"]


def finetune(base: Path, data: Path, output: Path, *options: str) -> dict[str, Any]:
    return finetuned(base, data, output, *OPTIONS, *options)


@pytest.fixture(scope="module")
def run(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process in float64."""
    output = tmp_path_factory.mktemp("runs") / "one"
    finetune(base, data, output, "--dtype", "float64", "--steps", "6", "--eval-every", "4")
    return output


def test_a_run_leaves_the_adapter_its_numbers_and_a_picture(run: Path) -> None:
    assert {path.name for path in run.iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "metrics.jsonl",
        "loss.png",
        "run.json",
    }
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "held_out_loss" in row] == [0, 4, 6]
    results = json.loads((run / "run.json").read_text())["results"]
    assert results["held_out_loss_after"] < results["held_out_loss_before"]
    assert list(run.parent.iterdir()) == [run]


def test_evaluate_finds_the_loss_that_the_run_reported(
    run: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = json.loads((run / "run.json").read_text())["results"]
    assert main(["evaluate", "--adapter", str(run)]) == 0
    assert f"loss: {results['held_out_loss_after']:.4f} nats" in capsys.readouterr().out


def test_evaluate_measures_the_whole_of_a_file_that_it_is_given(
    base: Path, data: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = data.read_text().splitlines(keepends=True)
    targets = sum(len(json.loads(line)["completion"]) + 1 for line in lines)
    assert main(["evaluate", "--model", str(base), "--data", str(data), "--seq-length", "48"]) == 0
    assert f"{targets:,} target tokens" in capsys.readouterr().out


def test_generate_continues_with_and_without_the_adapter(
    run: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for options in (["--model", str(base)], ["--adapter", str(run)]):
        command = ["generate", *options, "--dtype", "float64", "--prompt", "1 + 1 =", "--max-new-tokens", "8"]
        assert main(command) == 0
        first = capsys.readouterr().out
        assert main(command) == 0
        assert capsys.readouterr().out == first
        texts.append(first)
    assert texts[0] != texts[1]


@pytest.mark.parametrize(
    "layout",
    ["--tp 2 --sequence-parallel", "--cp 2", pytest.param("--tp 2 --cp 2 --sequence-parallel", marks=pytest.mark.slow)],
)
def test_workers_train_the_same_adapter(layout: str, base: Path, data: Path, run: Path, tmp_path: Path) -> None:
    """The command that launches them; the oracle has the layouts."""
    arguments = ["--model", str(base), "--data", str(data), "--output-dir", str(tmp_path / "two"), *OPTIONS]
    arguments += ["--dtype", "float64", "--steps", "6", "--eval-every", "4", *layout.split()]
    assert main(["finetune", *arguments]) == 0
    results, expected = (json.loads((path / "run.json").read_text())["results"] for path in (tmp_path / "two", run))
    # float64, sums in another order over six steps.
    assert results["held_out_loss_after"] == pytest.approx(expected["held_out_loss_after"], rel=1e-10)
    assert results["trainable_parameters"] == expected["trainable_parameters"]
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "two", run))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", ("canonical_lora", "dora"))
def test_every_method_trains_alike_on_one_and_on_two_workers(
    method: str, base: Path, data: Path, tmp_path: Path
) -> None:
    options = ["--method", method, "--dtype", "float64", "--steps", "3", "--eval-every", "0", "--rank", "4"]
    found = []
    for name, layout in (("one", []), ("two", ["--tp", "2", "--sequence-parallel", "--keep-token-shards"])):
        results = finetune(base, data, tmp_path / name, *options, *layout)
        assert results["held_out_loss_after"] < results["held_out_loss_before"]
        found.append((results["held_out_loss_after"], load_file(tmp_path / name / "adapter_model.safetensors")))
    (one_loss, one), (two_loss, two) = found
    assert two_loss == pytest.approx(one_loss, rel=1e-10)
    assert two.keys() == one.keys()
    assert any("lora_magnitude_vector" in name for name in one) == (method == "dora")
    for name, tensor in two.items():
        torch.testing.assert_close(tensor, one[name], rtol=1e-7, atol=1e-9)


def test_the_command_line_overrides_the_config_file(base: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "steps: 3\nlr: 1e-3\neval-every: 0\npacking: false\ntarget_modules: [linear_proj, linear_fc2]\n"
    )
    finetune(base, data, tmp_path / "run", "--config", str(tmp_path / "run.yaml"), "--steps", "1")
    options = json.loads((tmp_path / "run" / "run.json").read_text())["options"]
    # --lr is in OPTIONS, on the command line.
    assert (options["steps"], options["lr"], options["packing"]) == (1, 0.01, False)
    assert options["target_modules"] == ["linear_proj", "linear_fc2"]


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_the_adapter_of_a_half_precision_base_is_exported_in_float32(
    dtype: str, base: Path, data: Path, tmp_path: Path
) -> None:
    finetune(base, data, tmp_path / "run", "--dtype", dtype, "--steps", "1", "--eval-every", "0")
    exported = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}


def test_a_rank_above_the_smaller_side_is_one_warning(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(base, data, tmp_path / "run", "--rank", "33", "--steps", "1", "--eval-every", "0")
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1
    assert re.match(r"meshpeft finetune: warning: .*above the layer's smaller side 32", printed[0])


def test_overwrite_replaces_a_run_and_a_failed_run_leaves_the_old_one(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    finetune(base, data, output, "--steps", "1", "--eval-every", "0")
    finetune(base, data, output, "--steps", "2", "--eval-every", "0", "--overwrite")
    capsys.readouterr()
    wild = ["--lr", "1e30", "--steps", "9", "--overwrite", "--weight-decay", "0", "--clip", "0"]
    arguments = ["--model", str(base), "--data", str(data), "--output-dir", str(output), *OPTIONS, *wild]
    assert main(["finetune", *arguments]) == 2
    error = capsys.readouterr().err
    assert "5 steps in a row were skipped" in error and "Use a lower --lr" in error
    assert json.loads((output / "run.json").read_text())["results"]["steps"] == 2
    assert list(tmp_path.iterdir()) == [output]


# -- nothing that comes after the training can lose it -------------------------------------------------------------

SHORT = ("--steps", "1", "--eval-every", "0")


def broken(*_: object, **__: object) -> Any:
    raise RuntimeError("broken\nin many lines")


def test_a_picture_and_samples_that_fail_are_warnings(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # cannot be imported
    monkeypatch.setattr("meshpeft.training.finetune.continuation", broken)
    finetune(base, data, tmp_path / "run", *SHORT)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json", "metrics.jsonl", "run.json"}
    said = capsys.readouterr()
    assert "loss.png could not be drawn: import of matplotlib.figure halted" in said.err
    assert said.err.count("there is no sample of what the model says: broken\n") == 2
    assert "the adapter (PEFT format), metrics.jsonl, run.json\n" in said.out and "held-out prompt" not in said.out


def test_a_record_that_cannot_be_written_is_a_warning(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OutputDirectory, "finish", broken)
    arguments = ["--model", str(base), "--data", str(data), "--output-dir", str(tmp_path / "run"), *OPTIONS, *SHORT]
    assert main(["finetune", *arguments]) == 0
    assert "run.json could not be written, so the run counts as unfinished: broken" in capsys.readouterr().err
    assert load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert main(["finetune", *arguments]) == 2
    assert "interrupted run" in capsys.readouterr().err


def test_an_adapter_that_does_not_fit_is_written_elsewhere(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tmp_path / "expected"
    finetune(base, data, expected, *SHORT)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "elsewhere"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "elsewhere").mkdir()
    write = TensorFileWriter.write

    def full(writer: TensorFileWriter, tensor: torch.Tensor) -> None:
        if "elsewhere" not in str(writer._file.name):
            raise OSError(28, "No space left on device")
        write(writer, tensor)

    monkeypatch.setattr(TensorFileWriter, "write", full)
    arguments = ["--model", str(base), "--data", str(data), "--output-dir", str(tmp_path / "run"), *OPTIONS, *SHORT]
    assert main(["finetune", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert f"writing {tmp_path / 'run'}: No space left on device; the finished adapter is in " in error
    found = load_file(Path(error.partition("the finished adapter is in ")[2]) / "adapter_model.safetensors")
    wanted = load_file(expected / "adapter_model.safetensors")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_metrics_and_checkpoints_are_there_while_the_run_goes_on(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is due after every step; the finished run keeps none."""
    seen: list[tuple[int, list[str]]] = []
    publish = OutputDirectory.publish

    def look(output: OutputDirectory, *arguments: Any) -> None:
        names = sorted(path.name for path in (output.path / "checkpoints").iterdir())
        seen.append((len(output.metrics.read_text().splitlines()), names))
        publish(output, *arguments)

    monkeypatch.setattr(OutputDirectory, "publish", look)
    for options, kept in (((), None), (("--save-every", "9"), ["step-00000003", "step-00000004"])):
        output = tmp_path / str(kept)
        finetune(base, data, output, "--steps", "4", "--eval-every", "0", "--save-minutes", "1e-9", *options)
        # Steps and two measurements; the last step has a checkpoint where they were asked for.
        assert seen.pop() == (6, kept or ["step-00000002", "step-00000003"])
        assert (output / "checkpoints").exists() == (kept is not None)


def test_resume_auto_says_that_a_run_is_finished(
    run: Path, base: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    arguments = ["finetune", "--model", str(base), "--data", str(data), "--output-dir", str(run), *OPTIONS]
    arguments += ["--dtype", "float64", "--steps", "6", "--eval-every", "4", "--resume", "auto"]
    monkeypatch.setattr("meshpeft.training.finetune.find_base", broken)  # no model is looked at
    for more in ([], ["--tp", "2"], ["--overwrite"]):
        assert main([*arguments, *more]) == 0
        assert "the run is finished, and nothing is left to do" in capsys.readouterr().out
    assert main([*arguments, "--steps", "7"]) == 2
    assert "holds a finished run whose steps is 6, not 7; choose another output directory" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before


@pytest.mark.slow
def test_nothing_is_written_into_the_home_directory(base: Path, data: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    caches = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR", "HF_HOME", "TORCH_HOME", "TORCHINDUCTOR_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in caches}
    arguments = ["--model", str(base), "--data", str(data), "--output-dir", str(tmp_path / "run"), *OPTIONS, *SHORT]
    subprocess.run(
        [sys.executable, "-m", "meshpeft.cli.main", "finetune", *arguments, "--tp", "2"],
        env={**environment, "HOME": str(home), "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=True,
    )
    assert (tmp_path / "run" / "loss.png").exists()
    assert not list(home.rglob("*"))
