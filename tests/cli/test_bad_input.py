"""Bad input: one clear sentence, exit code 2, nothing written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from meshpeft.cli.main import main

Broken = Callable[[Path], None]


def without_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def truncated(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def of_another_architecture(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))


def without_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()


def without_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence on stderr of a command that ends with code 2."""
    code = main(arguments)
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert printed.err.startswith(f"meshpeft {arguments[0]}: ") and printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--rank", "0"], "rank=0: expected at least 1"),
        (["--tp", "3"], "4 query groups cannot be split over tensor_parallel=3; use 1, 2 or 4"),
        (["--tp", "0"], "tp=0: expected at least 1"),
        pytest.param(
            ["--offload-activations"],
            "offload_activations: there is no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="is done with a GPU"),
        ),
        (["--lr", "-1"], "lr=-1.0: expected a number above 0"),
        (["--dropout", "1"], "dropout=1.0: expected a probability"),
        (["--steps", "2", "--epochs", "3"], "steps=2 and epochs=3.0 were both given; leave one out"),
        (["--target-modules", "linear_qvk"], "'linear_qvk' matches no layer; nearest: linear_qkv"),
        (["--target-modules", "*.layers.9.*.linear_qkv"], "matches no layer; nearest:"),
        (["--target-modules"], "target_modules is empty"),
        (["--data", "absent.jsonl"], "absent.jsonl: no such file"),
        (["--config", "absent.yaml"], "absent.yaml: cannot be read: No such file or directory"),
    ],
)
def test_finetune_refuses_options_that_make_no_run(
    options: list[str],
    sentence: str,
    base: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = ["finetune", "--model", str(base), "--data", str(data), "--output-dir", str(tmp_path / "run")]
    assert sentence in refused([*run, *options], capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("breaks", "sentence"),
    [
        (without_weights, "holds no weights"),
        (truncated, "model.safetensors is truncated"),
        (of_another_architecture, "no engine has this model. Native: model_type 'unheard_of' is not implemented"),
        (without_tokenizer, "the tokenizer cannot be read"),
        (without_config, "config.json does not exist"),
    ],
)
def test_finetune_refuses_a_broken_model(
    breaks: Broken, sentence: str, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    breaks(broken)
    run = ["finetune", "--model", str(broken), "--data", str(data), "--output-dir", str(tmp_path / "run")]
    assert sentence in refused(run, capsys)
    assert list(tmp_path.iterdir()) == [broken]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"question": "?", "answer": "!"}\n', "no usable column; found 'question', 'answer', expected"),
        ("", "holds no records"),
        ('{"text": "one"}\n', "cannot be split into training and held-out data"),
    ],
)
def test_finetune_refuses_unusable_data(
    content: str, sentence: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(content)
    run = ["finetune", "--model", str(base), "--data", str(bad), "--output-dir", str(tmp_path / "run")]
    assert sentence in refused(run, capsys)
    assert list(tmp_path.iterdir()) == [bad]


def test_finetune_refuses_to_touch_another_run(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text("{}")
    run = ["finetune", "--model", str(base), "--data", str(data), "--output-dir", str(tmp_path)]
    assert "holds a finished run" in refused(run, capsys)
    assert (tmp_path / "run.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("learning-rate: 1\nrank: 3", "no option is called 'learning-rate'; the options are tp, dp"),
        ("batch_sizes: 4", "no option is called 'batch_sizes'; did you mean batch_size?"),
        ("- rank", "expected options and their values"),
        ("rank: [", "line 1: is not YAML: expected the node content"),
        ("lr: 1\n] rank: 3\n", "line 2: is not YAML"),
        ("rank: 0", "rank=0: expected at least 1"),
    ],
)
def test_a_config_file_is_checked(
    content: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(content)
    assert sentence in refused(["finetune", "--config", str(tmp_path / "run.yaml")], capsys)


def test_an_unknown_option_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["finetune", "--batch-sizes", "4"])
    assert end.value.code == 2
    assert "--batch-size" in capsys.readouterr().err


def test_nothing_is_said_when_nobody_reads_the_output() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "meshpeft.cli.main", "--help"]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetun"]) == 2
    assert "there is no command 'finetun'; did you mean finetune?" in capsys.readouterr().err
    assert main([]) == 2


@pytest.mark.parametrize("command", ("evaluate", "generate"))
def test_a_directory_without_adapter_is_refused(command: str, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = ["--prompt", "x"] if command == "generate" else []
    assert "holds no adapter" in refused([command, "--adapter", str(base), *prompt], capsys)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x", "--chat"], "chat template cannot be used"),
        (["--prompt", "x", "--top-p", "0"], "top_p=0.0: expected a probability"),
        (["--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens=0: expected at least 1"),
    ],
)
def test_generate_refuses_options_that_make_no_text(
    options: list[str], sentence: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refused(["generate", "--model", str(base), *options], capsys)


def test_workers_say_it_once_and_the_code_is_2(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The data is read by the workers: both fail, one sentence is printed."""
    (tmp_path / "empty.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", "--model", str(base), "--data", "empty.jsonl", "--tp", "2", "--output-dir", "run"]) == 2
    expected = "meshpeft finetune: empty.jsonl: holds no records; at least one is needed.\n"
    assert capfd.readouterr() == ("", expected)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.jsonl"]
