"""Records of runs, options in YAML, and metrics of checkpoints that anyone may have written."""

from __future__ import annotations

import json
from contextlib import redirect_stderr, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.fuzz import MANY, Raw, generators, guarded, json_bytes, mutated_bytes, mutated_json

from meshpeft.cli.arguments import parse
from meshpeft.data.tokenizers import end_tokens
from meshpeft.parallel.errors import MeshPEFTError
from meshpeft.training.adapters import adapter_method, base_quantizer
from meshpeft.training.config import ConfigError, FinetuneConfig, tensor_type
from meshpeft.training.report import MetricsLog, check_metrics

RUN = FinetuneConfig(
    model=Path("base"), data=(Path("a.jsonl"),), steps=3, quantize="nf4", target_modules=("linear_qkv", "*.0.*.x")
)


def used(path: Path) -> None:
    """What the commands make of a record."""
    run = FinetuneConfig.from_json(path)
    tensor_type(run.dtype)
    base_quantizer(run)
    adapter_method(run)
    json.dumps(run.as_json())


@MANY
def test_no_record_of_a_run_ends_in_a_traceback(count: int, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for rng in generators("run.json", count):
        path.write_bytes(mutated_json({"options": RUN.as_json(), "results": {}}, rng))
        with guarded(tmp_path, rng):
            used(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "float99"),
        ("dtype", "nn"),
        ("dtype", ["float32"]),
        ("rank", 2.5),
        ("rank", True),
        ("rank", 10**12),
        ("seq_length", 10**18),
        ("alpha", Raw("NaN")),
        ("alpha", Raw("1e999")),
        ("target_modules", "abc"),
        ("target_modules", [1]),
        ("quantize", "nf5"),
        ("data", {"a": 1}),
        ("model", 3),
        ("model", "a\0b"),
        ("output_dir", "\ud800"),
        ("data", ["a", "a\0b"]),
        ("seed", Raw("9" * 5000)),
    ],
)
def test_an_option_of_another_type_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(json_bytes({"options": {**RUN.as_json(), name: value}}))
    with guarded(tmp_path, name) as outcome:
        used(tmp_path / "run.json")
    assert isinstance(outcome.error, ConfigError) and str(tmp_path / "run.json") in str(outcome.error)


def test_a_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    for run in (RUN, FinetuneConfig(), RUN.resolved()):
        (tmp_path / "run.json").write_text(json.dumps({"options": run.as_json()}))
        assert FinetuneConfig.from_json(tmp_path / "run.json").as_json() == run.as_json()


OPTIONS = {"rank": 4, "alpha": 2.5, "target-modules": ["linear_qkv"], "packing": False, "model": "base", "clip": None}


@MANY
def test_no_file_of_options_ends_in_a_traceback(count: int, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    good = yaml.safe_dump(OPTIONS).encode()
    for number, rng in enumerate(generators("yaml", count)):
        # JSON is YAML.
        path.write_bytes(mutated_json(OPTIONS, rng) if number % 2 else mutated_bytes(good, rng))
        # tyro itself says which value is of another type.
        with guarded(tmp_path, rng), redirect_stderr(StringIO()), suppress(SystemExit):
            parse(FinetuneConfig, ["--config", str(path)], prog="meshpeft finetune").check()


@pytest.mark.parametrize(
    "text",
    [
        "rank: 2026-99-99",
        "rank: 0x" + "f" * 10_000,
        "rank: " + "9" * 5_000,
        "[" * 10_000,
        "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True))
        + "target_modules: *j\n",
        "target_modules: [{a: 1}]",
        "rank: !!python/object/apply:os.mkdir [ran]",
        "? [a, b]\n: 3",
        "a" * 10**6,
        "\x00",
    ],
)
def test_a_file_that_holds_no_options_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(text)
    with guarded(tmp_path, text[:40]) as outcome:
        parse(FinetuneConfig, ["--config", "run.yaml"], prog="meshpeft finetune")
    assert outcome.error is not None and not (tmp_path / "ran").exists()


ROWS = [
    {"step": 0, "held_out_loss": 2.5},
    {
        "step": 1,
        "loss": 2.0,
        "learning_rate": 0.1,
        "grad_norm": None,
        "skipped": "overflow",
        "tokens": 5,
        "seconds": 1.5,
    },
    {"step": 1, "held_out_loss": None},
]


@MANY
def test_no_metrics_of_a_checkpoint_end_in_a_traceback(count: int, tmp_path: Path) -> None:
    for rng in generators("metrics", count):
        try:
            rows = json.loads(mutated_json(ROWS, rng))
        except (ValueError, RecursionError):  # where a manifest is parsed, this is a sentence
            continue
        with guarded(tmp_path, rng):
            check_metrics(rows, "step-00000001")
            log = MetricsLog()
            log.restore(rows)
            log.write_to(tmp_path / "metrics.jsonl")
            log.close()
            assert log.series("held_out_loss")[1][0] < 1e30
            sum(log.series("tokens")[1]) + sum(log.series("seconds")[1])


class _Tokenizer:
    eos_token_id = 3


@MANY
def test_no_generation_config_ends_in_a_traceback(count: int, tmp_path: Path) -> None:
    good = {"eos_token_id": [1, 2], "bos_token_id": 0, "pad_token_id": 0, "max_length": 20, "do_sample": True}
    for rng in generators("generation_config", count):
        (tmp_path / "generation_config.json").write_bytes(mutated_json(good, rng))
        with guarded(tmp_path, rng):
            ends = end_tokens(tmp_path, _Tokenizer())  # type: ignore[arg-type]
            assert all(type(end) is int and 0 <= end < 2**31 for end in ends)


def test_errors_of_metrics_name_their_checkpoint() -> None:
    with pytest.raises(MeshPEFTError, match="step-1: a row of its metrics is"):
        check_metrics([{"step": "1"}], "step-1")
