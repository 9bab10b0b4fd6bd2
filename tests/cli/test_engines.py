"""Architectures without a native decoder from the command line, at one layout and another."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.byte_tokenizer import VOCABULARY, with_tokenizer
from helpers.finetune_jobs import finetuned
from helpers.peft_files import with_peft
from helpers.tiny_models import random_ids, reference, save_tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from meshpeft.cli.main import main

Base = Callable[[str], Path]
OPTIONS = [
    *("--seq-length=48", "--batch-size=4", "--micro-batch-size=2", "--rank=4", "--lr=0.01", "--seed=3"),
    *("--dtype=float64", "--steps=4", "--eval-every=0"),
]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Base:
    @cache
    def directory(family: str) -> Path:
        # 64 input features everywhere: two blocks of 32, so that quantised ones divide over two ranks.
        sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64}
        return with_tokenizer(save_tiny(family, tmp_path_factory.mktemp(family), **sizes))

    return directory


def finetune(base: Path, data: Path, output: Path, *options: str) -> dict[str, Any]:
    return finetuned(base, data, output, *OPTIONS, *options)


def series(run: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def assert_one_run(run: Path, other: Path) -> None:
    """Float64, sums in another order over four steps; transformers rounds some of them to float32 at every layout."""
    for name in ("loss", "grad_norm", "held_out_loss"):
        assert series(run, name) == pytest.approx(series(other, name), rel=1e-7)
    ours, theirs = load_file(run / WEIGHTS), load_file(other / WEIGHTS)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-7)


def test_two_processes_train_the_adapter_of_one(
    bases: Base, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = bases("phi3")
    found = finetune(base, data, tmp_path / "one", "--method=dora")
    assert found["held_out_loss_after"] < found["held_out_loss_before"]
    assert "engine: transformers (not native: model_type 'phi3' is not implemented)" in capsys.readouterr().out
    layout = ["--tp=2", "--sequence-parallel", "--activation-checkpointing"]
    finetune(base, data, tmp_path / "two", "--method=dora", *layout)
    assert_one_run(tmp_path / "two", tmp_path / "one")
    # peft and transformers make the same of it as a model into which it was merged.
    assert main(["merge", "--adapter", str(tmp_path / "two"), "--to", str(tmp_path / "merged"), "--dtype=float64"]) == 0
    ids = random_ids()
    with torch.no_grad():
        adapted = with_peft(base, tmp_path / "two")(ids).logits
        merged = reference(tmp_path / "merged")(ids).logits
        assert (adapted - reference(base)(ids).logits).abs().max() > 1e-3
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-10)


def test_a_quantised_run_goes_on_at_another_layout(bases: Base, data: Path, tmp_path: Path) -> None:
    """GPT-NeoX: q, k and v of one head after the other, in one layer."""
    base, run = bases("gpt_neox"), tmp_path / "run"
    options = ["--quantize=nf4", "--quantize-block-size=32", "--lora-init-method=svdquant"]
    options += ["--target-modules", "query_key_value", "dense_4h_to_h"]
    found = finetune(base, data, run, *options, "--save-every=2")
    assert found["packed"]["layers"] == 8  # four in each block; the head stays as it is
    checkpoint = run / "checkpoints" / "step-00000002"
    finetune(base, data, tmp_path / "on", *options, "--tp=2", "--resume", str(checkpoint))
    assert_one_run(tmp_path / "on", run)


def test_adapters_that_no_step_trained_are_named(
    bases: Base, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(bases("bart"), data, tmp_path / "run", "--steps=2", "--no-packing")
    written = load_file(tmp_path / "run" / WEIGHTS)
    unused = {name for name, factor in written.items() if "lora_B" in name and not factor.any()}
    assert len(unused) == 8 and all("encoder_attn" in name for name in unused)
    said = capsys.readouterr().err
    assert "encoder_attn.k_proj and 7 more layers: the adapters had no gradient in any step" in said
    finetune(bases("phi3"), data, tmp_path / "other", "--steps=1")
    assert "no gradient" not in capsys.readouterr().err


def test_data_parallel_on_a_model_that_native_layers_could_run(bases: Base, data: Path, tmp_path: Path) -> None:
    """The two engines are each other's check: data, positions, labels, loss."""
    base = bases("llama")
    finetune(base, data, tmp_path / "native", "--steps=1")
    finetune(base, data, tmp_path / "theirs", "--steps=1", "--engine=transformers", "--dp=2")
    # Before the first step the adapters, whose random values are by name, change nothing yet. transformers' norms and
    # rotary tables are of float32.
    for name in ("held_out_loss", "loss"):
        assert series(tmp_path / "theirs", name)[0] == pytest.approx(series(tmp_path / "native", name)[0], rel=1e-5)


def test_what_was_trained_is_measured_and_continued(
    bases: Base, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run = bases("gemma"), tmp_path / "run"
    found = finetune(base, data, run, "--save-every=4")
    capsys.readouterr()
    assert main(["evaluate", "--adapter", str(run)]) == 0
    assert f"loss: {found['held_out_loss_after']:.4f}" in capsys.readouterr().out
    assert main(["generate", "--adapter", str(run), "--prompt", "12 + 34 =", "--max-new-tokens", "4"]) == 0
    assert main(["export", "--checkpoint", str(run), "--to", str(tmp_path / "adapter")]) == 0
    ours, theirs = load_file(run / WEIGHTS), load_file(tmp_path / "adapter" / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert main(["export", "--checkpoint", str(run), "--to", str(tmp_path / "merged"), "--format=merged"]) == 0
    assert main(["evaluate", "--model", str(tmp_path / "merged"), "--data", str(data), "--dtype=float64"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.model_type == "gemma"


@pytest.mark.parametrize(
    ("command", "options", "sentence"),
    [
        ("finetune", ["--engine=native"], "model_type 'phi3' is not implemented"),
        (
            "finetune",
            ["--ep=2", "--dp=2"],
            "Phi3ForCausalLM has no experts that can be sharded over ep=2",
        ),
        (
            "finetune",
            ["--tp=2", "--etp=1"],
            "etp=1: a phi3 model has no experts that can be sharded",
        ),
        ("finetune", ["--tp=3"], "cannot be split over tp=3"),
        (
            "finetune",
            ["--router-aux-loss-coef=0.1"],
            "router_aux_loss_coef=0.1: the transformers engine, which a phi3 model needs, has no load-balancing loss",
        ),
        ("finetune", ["--target-modules", "q_proj"], "'q_proj' matches no layer; nearest: qkv_proj"),
        ("plan", ["--tp=3"], "cannot be split over tp=3"),
        ("plan", ["--activation-checkpointing=selective"], "models of transformers compute layers again as they are"),
    ],
)
def test_what_the_engine_cannot_do_is_said_at_once(
    command: str,
    options: list[str],
    sentence: str,
    bases: Base,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = ["--data", str(data), "--output-dir", str(tmp_path / "run")]
    assert main([command, "--model", str(bases("phi3")), *output, *options]) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "option"),
    [
        (["--no-share-expert-adapters"], "share_expert_adapters=False"),
        (["--adapter-format=peft-per-expert"], "adapter_format=peft-per-expert"),
    ],
)
def test_options_for_experts_that_no_adapter_is_put_on_are_refused(
    options: list[str], option: str, bases: Base, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["finetune", "--model", str(bases("jetmoe")), "--data", str(data), *options]
    assert main([*command, "--output-dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert f"{option}: this jetmoe model has no experts that can be sharded or adapted" in said
    assert main(["finetune", "--data", str(data), *options, "--output-dir", str(tmp_path / "run")]) == 2
    assert f"{option}: this llama model has no layer with experts" in capsys.readouterr().err


def test_what_stays_without_an_adapter_is_said(
    bases: Base, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = bases("jetmoe")
    finetune(base, data, tmp_path / "run", "--steps=1")
    # Of each block: what is stacked are the experts; these alone have no adapter, nor the router.
    weights = {n: p for n, p in reference(base).model.layers.named_parameters() if p.dim() > 1}
    experts = sum(p.numel() for p in weights.values() if p.dim() == 3)
    share = experts / sum(p.numel() for p in weights.values())
    assert share > 0.3
    said = capsys.readouterr().out
    assert f"without an adapter: {share:.1%} of the weights of the blocks (model.layers.*.mlp" in said
