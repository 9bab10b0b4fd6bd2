"""Models with experts from the command line: trained over expert parallel, written, refused where they do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.finetune_jobs import finetuned
from helpers.peft_files import with_peft
from helpers.tiny_models import random_ids, reference
from safetensors.torch import load_file

from meshpeft.checkpoint import load_peft_adapter
from meshpeft.cli.main import main
from meshpeft.models import load_pretrained

Base = Callable[[str], Path]
OPTIONS = [
    *("--seq-length=48", "--batch-size=4", "--micro-batch-size=2", "--rank=4", "--lr=0.01", "--seed=3"),
    *("--dtype=float64", "--steps=4", "--eval-every=0"),
]
ROUTED = ["--no-share-expert-adapters", "--normalize-moe-lora", "--router-aux-loss-coef=0.01"]


def finetune(base: Path, data: Path, output: Path, *options: str) -> dict[str, Any]:
    return finetuned(base, data, output, *OPTIONS, *options)


def rows(run: Path, name: str) -> list[float]:
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [row[name] for row in lines if name in row]


def assert_one_adapter(run: Path, other: Path) -> None:
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (run, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-7, atol=1e-9)


def assert_peft_computes_the_same(base: Path, run: Path) -> None:
    """With every key of the file in its place and every place with its key."""
    theirs = with_peft(base, run)
    ours = load_peft_adapter(load_pretrained(base, torch.float64), run)
    ids = random_ids()
    with torch.no_grad():
        logits, expected = ours(ids), theirs(ids).logits
        assert (logits - load_pretrained(base, torch.float64)(ids)).abs().max() > 1e-3
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)


def runs_agree(family: str, layout: list[str], options: list[str], base: Path, data: Path, to: Path) -> None:
    alone = finetune(base, data, to / "one", *options)
    assert alone["held_out_loss_after"] < alone["held_out_loss_before"]
    spread = finetune(base, data, to / "many", *options, *layout)
    # float64, sums in another order over four steps.
    for name in ("held_out_loss_before", "held_out_loss_after"):
        assert spread[name] == pytest.approx(alone[name], rel=1e-10)
    assert spread["trainable_parameters"] == alone["trainable_parameters"]
    for name in ("loss", "router_loss", "grad_norm"):
        assert rows(to / "many", name) == pytest.approx(rows(to / "one", name), rel=1e-9)
    assert_one_adapter(to / "many", to / "one")
    assert_peft_computes_the_same(base, to / "many")


def test_two_processes_with_half_of_the_experts_each(experts_base: Base, data: Path, tmp_path: Path) -> None:
    """Qwen3-MoE, an adapter for each expert, the routers' balance in the loss."""
    runs_agree("qwen3_moe", ["--ep", "2"], ROUTED, experts_base("qwen3_moe"), data, tmp_path)
    assert len(rows(tmp_path / "many", "router_loss")) == 4
    options = json.loads((tmp_path / "many" / "run.json").read_text())
    assert (options["layout"]["ep"], options["options"]["share_expert_adapters"]) == (2, False)
    # Half of the rank, by the two experts of a token; the file has one rank, and zeros behind theirs.
    exported = load_file(tmp_path / "many" / "adapter_model.safetensors")
    rows_of_a = exported["base_model.model.model.layers.0.mlp.experts.lora_A.weight"].view(8, 4, 20)
    assert [bool(row.any()) for row in rows_of_a.transpose(0, 1)] == [True, True, False, False]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "layout", "options"),
    [
        ("mixtral", ["--ep", "2"], []),
        ("qwen2_moe", ["--ep", "2", "--dp", "2"], ["--exclude-modules", "output_layer", "--rslora"]),
        ("mixtral", ["--tp", "2", "--ep", "2", "--etp", "1", "--sequence-parallel"], ["--method", "canonical_lora"]),
        ("qwen2_moe", ["--tp", "2", "--dp", "2", "--ep", "2"], ["--target-modules", "router", "*.experts.*"]),
    ],
    ids=str,
)
def test_every_family_and_layout(
    family: str, layout: list[str], options: list[str], experts_base: Base, data: Path, tmp_path: Path
) -> None:
    runs_agree(family, layout, options, experts_base(family), data, tmp_path)


@pytest.mark.slow
def test_the_per_expert_form_is_evaluated_merged_and_exported_again(
    experts_base: Base, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """DoRA has no other; the checkpoint of a run gives the file that the run wrote."""
    base, run = experts_base("qwen2_moe"), tmp_path / "run"
    options = ["--method", "dora", "--adapter-format", "peft-per-expert", "--save-every", "4"]
    results = finetune(base, data, run, *options, "--ep", "2")
    capfd.readouterr()
    assert main(["evaluate", "--adapter", str(run), "--ep", "2"]) == 0
    assert f"loss: {results['held_out_loss_after']:.4f} nats" in capfd.readouterr().out
    assert main(["generate", "--adapter", str(run), "--ep", "2", "--prompt", "1 + 1 =", "--max-new-tokens", "4"]) == 0
    assert capfd.readouterr().out
    arguments = ["--checkpoint", str(run), "--to", str(tmp_path / "again"), "--format", "peft-per-expert"]
    assert main(["export", *arguments]) == 0
    assert "(PEFT format, every expert by itself)" in capfd.readouterr().out
    assert_one_adapter(tmp_path / "again", run)
    assert main(["merge", "--adapter", str(run), "--to", str(tmp_path / "merged"), "--dtype", "float64"]) == 0
    ids = random_ids()
    with torch.no_grad():
        ours = load_peft_adapter(load_pretrained(base, torch.float64), run)(ids)
        torch.testing.assert_close(reference(tmp_path / "merged")(ids).logits, ours, rtol=0, atol=1e-11)


@pytest.mark.slow
def test_a_run_goes_on_at_another_expert_parallel_size(experts_base: Base, data: Path, tmp_path: Path) -> None:
    base, options = experts_base("mixtral"), [*ROUTED, "--save-every", "2"]
    finetune(base, data, tmp_path / "whole", *options, "--ep", "2")
    for number, layout in enumerate((["--tp", "2", "--etp", "1"], ["--dp", "2"])):
        run = tmp_path / str(number)
        half = "checkpoints/step-00000002"
        shutil.copytree(tmp_path / "whole" / half, run / half)
        finetune(base, data, run, *options, "--resume", "auto", *layout)
        assert_one_adapter(run, tmp_path / "whole")


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence on stderr of a command that ends with code 2."""
    capsys.readouterr()  # what making the model printed, where this test is the first to need it
    code = main(arguments)
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--ep", "0"], "ep=0: expected at least 1"),
        (["--ep", "3"], "experts: 8 experts of a layer cannot be split over expert_parallel=3; use 1, 2, 4 or 8"),
        (["--etp", "3"], "20 channels of an expert cannot be split over expert_tensor_parallel=3; use 1, 2, 4, 5, 10"),
        (["--dp", "3", "--ep", "2"], "dp=3 makes 3 processes, which pp*ep*etp=2 does not divide; use a dp that is a"),
        (
            ["--normalize-moe-lora", "--rank", "5"],
            "experts.linear_fc1: dim=5 is not divisible by moe_router_topk=2; use a multiple of 2",
        ),
        (["--router-aux-loss-coef", "-0.5"], "router_aux_loss_coef=-0.5: expected at least 0"),
        (["--method", "dora"], "adapts this parameter with LoRA only, not with DoRA; export in the form"),
        (["--method", "dora", "--target-modules", "router"], "mlp.router: DoRA cannot adapt a router"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_do_not_fit_the_experts(
    options: list[str],
    sentence: str,
    experts_base: Base,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = ["finetune", "--model", str(experts_base("qwen3_moe")), "--data", str(data)]
    assert sentence in refused([*run, "--output-dir", str(tmp_path / "run"), *options], capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_router_that_chooses_more_experts_than_there_are(
    experts_base: Base, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(experts_base("qwen3_moe"), tmp_path / "broken"))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 9}))
    run = ["finetune", "--model", str(broken), "--data", str(data), "--output-dir", str(tmp_path / "run")]
    assert "the router chooses 9 experts per token, and there are 8; use a top-k of at most 8" in refused(run, capsys)
    assert list(tmp_path.iterdir()) == [broken]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--ep", "2"], "expert_parallel=2: a llama model has no experts; use 1"),
        (["--etp", "2"], "etp=2: a llama model has no experts; leave it out"),
        (["--normalize-moe-lora"], "normalize_moe_lora=True: this llama model has no layer with experts; leave it out"),
        (["--router-aux-loss-coef", "0.1"], "router_aux_loss_coef=0.1: this llama model has no layer with experts"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_model_without_experts_takes_no_options_for_them(
    options: list[str], sentence: str, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["finetune", "--model", str(base), "--data", str(data), "--output-dir", str(tmp_path / "run")]
    assert sentence in refused([*run, *options], capsys)
    assert list(tmp_path.iterdir()) == []
