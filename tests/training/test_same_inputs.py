"""Ranks whose machines hold other files under the same names refuse to compute together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.byte_tokenizer import VOCABULARY, with_tokenizer
from helpers.tiny_models import save_tiny
from helpers.workers import run_on_ranks
from safetensors.torch import load_file, save_file

from meshpeft.cli.arguments import parse
from meshpeft.parallel import MeshPEFTError
from meshpeft.training import same_inputs
from meshpeft.training.config import EvaluateConfig, FinetuneConfig, GenerateConfig
from meshpeft.training.evaluate import evaluate
from meshpeft.training.finetune import finetune
from meshpeft.training.generate import generate

Q = "model.layers.1.self_attn.q_proj.weight"
COMMANDS: dict[str, tuple[type[Any], Callable[..., object], list[str]]] = {
    "finetune": (FinetuneConfig, finetune, ["--steps=1", "--batch-size=2", "--seq-length=32", "--rank=2"]),
    "evaluate": (EvaluateConfig, evaluate, ["--seq-length=32"]),
    "generate": (GenerateConfig, generate, ["--prompt=a", "--max-new-tokens=1"]),
}


def on_two_machines(
    command: str, machines: list[str], layout: str, more: list[list[str]], sampled_bytes: int, block_bytes: int
) -> str:
    """What ends a command whose rank 0 and 1 run on machines of these roots."""
    same_inputs.SAMPLED_BYTES, same_inputs._BLOCK_BYTES = sampled_bytes, block_bytes
    rank = dist.get_rank()
    root = Path(machines[rank])
    cls, function, options = COMMANDS[command]
    arguments = ["--model", str(root / "m"), *options, *layout.split(), *more[rank]]
    if command == "finetune":
        arguments += ["--output-dir", str(root / "o")]
    if command != "generate":
        arguments += ["--data", str(root / "d.jsonl")]
    config = parse(cls, arguments, command)
    try:
        function(config.resolved() if command == "finetune" else config)
    except MeshPEFTError as error:
        return str(error)
    return ""


@pytest.fixture
def machines(tmp_path: Path) -> list[Path]:
    first, second = tmp_path / "A", tmp_path / "B"
    with_tokenizer(save_tiny("llama", first / "m", vocab_size=VOCABULARY))
    (first / "d.jsonl").write_text("".join(json.dumps({"text": f"{n} and {n + 1}"}) + "\n" for n in range(20)))
    shutil.copytree(first, second)
    return [first, second]


def refusals(
    machines: list[Path],
    command: str,
    layout: str,
    more: list[list[str]] | None = None,
    sampled_bytes: int = same_inputs.SAMPLED_BYTES,
    block_bytes: int = same_inputs._BLOCK_BYTES,
) -> list[str]:
    """What each rank ends with."""
    roots = [str(machine) for machine in machines]
    return run_on_ranks(2, on_two_machines, command, roots, layout, more or [[], []], sampled_bytes, block_bytes)


def refusal(*arguments: Any, **options: Any) -> str:
    """The one sentence that both ranks end with."""
    first, second = refusals(*arguments, **options)
    assert first == second
    return first


def change_weights(machine: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = machine / "m" / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def one_element(values: torch.Tensor) -> torch.Tensor:
    """Not the first or last, which are always read."""
    values = values.clone()
    values[values.shape[0] // 3, 5] += 1e-3
    return values


def test_equal_copies_are_no_obstacle(machines: list[Path]) -> None:
    assert refusal(machines, "evaluate", "--tp 2") == ""


@pytest.mark.parametrize("layout", ["--tp 2", "--dp 2"])
def test_another_base_is_refused(machines: list[Path], layout: str) -> None:
    change_weights(machines[1], Q, lambda values: values * 1.5)
    for command, sampled_bytes in (("finetune", 1 << 20), ("finetune", 1000), ("evaluate", 1000), ("generate", 1000)):
        error = refusal(machines, command, layout, sampled_bytes=sampled_bytes)
        assert error.startswith("rank 1 (") and f"weights ({Q})" in error, command


def test_one_value_that_no_sample_holds_is_found_in_what_two_ranks_hold(
    machines: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    change_weights(machines[1], Q, one_element)
    with monkeypatch.context() as patch:
        patch.setattr(same_inputs, "SAMPLED_BYTES", 1)
        patch.setattr(same_inputs, "_BLOCK_BYTES", 32)
        samples = [dict(same_inputs._weights(machine / "m")) for machine in machines]
        assert samples[0] == samples[1]
    error = refusal(machines, "finetune", "--dp 2", sampled_bytes=1, block_bytes=32)
    assert "weights (decoder.layers.1.self_attention.linear_qkv" in error and "model.layers" not in error


def other_rows(machine: Path) -> None:
    lines = (machine / "d.jsonl").read_text().splitlines(keepends=True)
    (machine / "d.jsonl").write_text("".join(['{"text": "another"}\n', *lines[1:]]))


def other_tokenizer(machine: Path) -> None:
    path = machine / "m" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "{{ messages }}!"}))


def other_config(machine: Path) -> None:
    path = machine / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 5e5, "rms_norm_eps": 1e-3}))


def no_rows(machine: Path) -> None:
    (machine / "d.jsonl").unlink()


@pytest.mark.parametrize(
    ("change", "command", "words"),
    [
        (other_rows, "finetune", "data (training rows"),
        (other_rows, "evaluate", "data (rows)"),
        (other_tokenizer, "generate", "tokenizer (chat template)"),
        (other_config, "generate", "configuration (config.json: "),
        (no_rows, "evaluate", "d.jsonl"),
    ],
)
def test_other_files_are_named(machines: list[Path], change: Callable[[Path], None], command: str, words: str) -> None:
    change(machines[1])
    if change is no_rows:
        first, second = refusals(machines, command, "--tp 2")
        assert first.startswith("on rank 1, reading the model and the data: ") and words in first and words in second
        return
    assert words in refusal(machines, command, "--tp 2")


def test_other_options_are_named(machines: list[Path]) -> None:
    assert "options (--lr)" in refusal(machines, "finetune", "--dp 2", [["--lr=1e-3"], ["--lr=2e-3"]])
