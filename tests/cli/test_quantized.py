"""Runs on a quantised base: packed, trained, saved, resumed, evaluated, exported and merged as the same base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.finetune_jobs import finetuned
from safetensors.torch import load_file

from meshpeft.cli.main import main

OPTIONS = ["--seq-length=48", "--batch-size=4", "--micro-batch-size=2", "--rank=4", "--lr=0.01", "--seed=3"]
SVDQUANT = ["--quantize", "nf4", "--lora-init-method", "svdquant", "--dtype", "float64", "--steps", "4"]


@pytest.fixture(scope="module")
def options(wide_base: Path, data: Path) -> list[str]:
    return ["finetune", "--model", str(wide_base), "--data", str(data), *OPTIONS]


def results(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())["results"]
    return found


@pytest.fixture(scope="module")
def run(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "one"
    assert main([*options, *SVDQUANT, "--output-dir", str(output), "--save-every", "2"]) == 0
    return output


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["evaluate", *arguments]) == 0
    return capsys.readouterr().out.split("loss: ")[1].split(" ")[0]


def test_a_run_says_what_it_packed(run: Path) -> None:
    weights = 2 * (64 * 128 + 64 * 64 + 64 * 256 + 128 * 64)
    packed = results(run)["packed"]
    assert (packed["layers"], packed["parameters"], packed["formats"]) == (8, weights, ["nf4"])
    assert packed["bytes"] / weights == 0.5625
    options = json.loads((run / "run.json").read_text())["options"]
    assert (options["quantize"], options["lora_init_method"]) == ("nf4", "svdquant")


def test_two_workers_pack_and_train_the_same(run: Path, wide_base: Path, data: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    finetuned(wide_base, data, two, *OPTIONS, *SVDQUANT, "--tp", "2")
    for name in ("held_out_loss_before", "held_out_loss_after"):
        # float64, sums in another order; the packed base is the same bit for bit.
        assert results(two)[name] == pytest.approx(results(run)[name], rel=1e-10)
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (two, run))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-7, atol=1e-9)


def test_evaluate_packs_the_base_again_unless_told_otherwise(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = ["--adapter", str(run)]
    assert evaluated(capsys, *adapter) == f"{results(run)['held_out_loss_after']:.4f}"
    assert evaluated(capsys, *adapter, "--quantize", "none") != evaluated(capsys, *adapter)


def test_a_resumed_run_goes_on_on_the_same_packed_base(run: Path, options: list[str], tmp_path: Path) -> None:
    source = ["--resume", str(run / "checkpoints" / "step-00000002")]
    assert main([*options, *SVDQUANT, "--output-dir", str(tmp_path / "run"), *source]) == 0
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "run", run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("changed", (["--quantize", "int4"], ["--quantize-block-size", "32"]))
def test_a_run_on_another_packed_base_is_not_resumed(
    changed: list[str], run: Path, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--output-dir", str(tmp_path / "run"), "--resume", str(run)]
    assert main([*options, *SVDQUANT, *arguments, *changed]) == 2
    name = changed[0].removeprefix("--").replace("-", "_")
    assert f"{name} is " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_merged_is_the_model_that_was_trained(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the base as it was before quantising: an adapter from the residual would count that twice."""
    merged, exported = tmp_path / "merged", tmp_path / "exported"
    assert main(["merge", "--adapter", str(run), "--to", str(merged), "--dtype", "float64"]) == 0
    assert main(["export", "--checkpoint", str(run), "--to", str(exported), "--format", "merged"]) == 0
    measure = ["--data", str(data), "--seq-length", "48", "--dtype", "float64"]
    want = evaluated(capsys, "--adapter", str(run), *measure)
    assert evaluated(capsys, "--model", str(merged), *measure) == want
    ours, theirs = (load_file(path / "model.safetensors") for path in (merged, exported))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_is_exported_without_its_base(run: Path, tmp_path: Path) -> None:
    assert main(["export", "--checkpoint", str(run), "--to", str(tmp_path / "adapter")]) == 0
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "adapter", run))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--lora-init-method", "svdquant"], "it is not quantised, so the adapter could not train; add --quantize nf4"),
        (["--quantize-block-size", "32"], "quantize_block_size=32: nothing is quantised; add --quantize"),
        (["--quantize", "nf4", "--quantize-block-size", "48"], "block_size=48: expected one of 32, 64"),
        (["--quantize", "nf4", "--quantize-block-size", "128"], "64 input features do not divide into blocks of 128"),
        ([*SVDQUANT, "--lora-a-init-method", "normal"], "both say how the adapter starts; leave one out"),
        ([*SVDQUANT, "--target-modules", "output_layer"], "output_layer is not quantised, and its adapter could not"),
    ],
)
def test_bad_combinations_are_refused_with_code_2(
    given: list[str], sentence: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*options, *given, "--output-dir", str(tmp_path / "run")]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "start",
    [
        "pissa",
        pytest.param("svdquant", marks=pytest.mark.slow),
        pytest.param("kaiming_zeros", marks=pytest.mark.slow),
        pytest.param(None, marks=pytest.mark.slow),
    ],
)
def test_two_workers_pack_and_train_half_of_the_experts_each(
    start: str | None, wide_experts_base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*OPTIONS, "--quantize", "nf4", "--dtype", "float64", "--steps", "3", "--eval-every", "0"]
    if start is not None:
        options += ["--lora-init-method", start, "--no-share-expert-adapters"]
    for name, layout in (("one", []), ("two", ["--ep", "2"])):
        finetuned(wide_experts_base, data, tmp_path / name, *options, *layout)
    one, two = tmp_path / "one", tmp_path / "two"
    assert results(two)["packed"] == results(one)["packed"]
    assert results(one)["packed"]["bytes"] <= 0.6 * results(one)["packed"]["parameters"]
    assert results(one)["held_out_loss_after"] < results(one)["held_out_loss_before"]
    for name in ("held_out_loss_before", "held_out_loss_after"):
        # float64, sums in another order; decomposed in float32, those of half of the experts may round otherwise.
        assert results(two)[name] == pytest.approx(results(one)[name], rel=1e-7 if start == "svdquant" else 1e-10)
    # The adapter's file, on the base that evaluate packs again.
    assert evaluated(capsys, "--adapter", str(two)) == f"{results(two)['held_out_loss_after']:.4f}"


def test_kaiming_zeros_starts_from_the_base(options: list[str], tmp_path: Path) -> None:
    arguments = ["--lora-init-method", "kaiming_zeros", "--steps", "1", "--lr", "1e-9", "--output-dir"]
    assert main([*options, *arguments, str(tmp_path / "run")]) == 0
    tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    a = tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"]
    # Kaiming with a = sqrt(5) is uniform up to 1 / sqrt(fan-in).
    assert 0.9 < float(a.abs().max()) * 128**0.5 <= 1.001
    b = tensors["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"]
    assert float(b.abs().max()) < 1e-8


@pytest.mark.slow
def test_the_embedded_model_learns_as_much_on_a_packed_base(tmp_path: Path) -> None:
    for name, quantize in (("full", []), ("nf4", ["--quantize", "nf4"])):
        arguments = ["finetune", "--tp", "2", "--steps", "40", "--eval-every", "0", *quantize]
        assert main([*arguments, "--output-dir", str(tmp_path / name)]) == 0
    full, nf4 = results(tmp_path / "full"), results(tmp_path / "nf4")
    assert nf4["packed"]["bytes"] <= 0.6 * nf4["packed"]["parameters"] and nf4["packed"]["layers"] == 16
    assert full["held_out_loss_after"] < 0.9 * full["held_out_loss_before"]
    assert nf4["held_out_loss_after"] < 1.03 * full["held_out_loss_after"]
