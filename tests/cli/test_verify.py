"""`meshpeft verify`: the options of a fine-tune, proven right or wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.faults import complete_beside
from helpers.thinned import thinned
from helpers.tiny_models import save_tiny

from meshpeft.cli.main import main
from meshpeft.parallel import R, gradients

CHECKS = {"loss", "grad norm", "gradient", "weight", "held-out", "export", "merged", "resume"}


def errors_in(printed: str) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in re.findall(r"^  ([a-z -]+?)\s+(\d\.\de[-+]\d+|inf)", printed, re.MULTILINE)
    }


@pytest.mark.parametrize(
    "options",
    (
        ["--method", "dora", "--tp", "4", "--dp", "64", "--sequence-parallel", "--keep-token-shards"],
        [
            "--method",
            "canonical_lora",
            "--tp",
            "2",
            "--target-modules",
            "*.layers.2.*.linear_q",
            "*.layers.0.*.linear_v",
            "--lora-dtype",
            "bf16",
        ],
        ["--tp", "2", "--dp", "8", "--shard-base", "4"],
    ),
    ids=("dora", "layers by number", "sharded base"),
)
def test_a_layout_of_the_embedded_model_is_exact(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *options]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith("exact:")
    assert ("not checked: rounding of bf16 adapters" in printed) == ("bf16" in options)
    errors = errors_in(printed)
    assert set(errors) == CHECKS
    assert max(errors.values()) < 1e-10


def test_a_layout_of_experts_is_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_tiny("qwen2_moe", tmp_path / "base")
    options = ["--tp", "2", "--ep", "2", "--etp", "1", "--rank", "4", "--router-aux-loss-coef", "0.1"]
    assert main(["verify", "--model", str(base), *options]) == 0
    errors = errors_in(capsys.readouterr().out)
    assert max(errors.values()) < 1e-10


TRANSFORMERS = {
    "gpt_neox": ["--tp", "2", "--method", "dora", "--target-modules", "*.layers.1.*", "gpt_neox.layers.0.mlp.*"],
    # One head of keys and values on each rank; a scaled and tied embedding.
    "gemma": ["--tp", "4", "--dp", "2", "--activation-checkpointing"],
    # Without a plan, and with layers that differ.
    "bamba": ["--dp", "2", "--target-modules", "q_proj", "v_proj", "gate_proj"],
    "phi3": ["--tp", "2", "--dp", "2", "--exclude-modules", "lm_head", "down_proj"],
}


@pytest.mark.parametrize("family", thinned(TRANSFORMERS, 2))
def test_a_layout_of_a_transformers_model_is_exact(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny(family, tmp_path / "base")
    capsys.readouterr()
    assert main(["verify", "--model", str(base), *TRANSFORMERS[family]]) == 0
    printed = capsys.readouterr().out
    assert "states: not followed in transformers' code" in printed
    errors = errors_in(printed)
    assert set(errors) == CHECKS
    assert max(errors.values()) < 1e-10


def test_a_wrong_layout_of_a_transformers_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_tiny("phi3", tmp_path / "base")
    complete_beside(monkeypatch, R)
    assert main(["verify", "--model", str(base), "--tp", "2"]) == 2
    assert errors_in(capsys.readouterr().err)["gradient"] > 1e-3


@pytest.mark.parametrize("fault", ("sum of dA dropped", "sum over data parallel dropped"))
def test_a_wrong_layout_is_refused_with_its_errors(
    fault: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "sum of dA dropped":
        complete_beside(monkeypatch, R)
        # The states would already say so; here the numbers are asked.
        monkeypatch.setattr("meshpeft.verify.layout.typecheck_layout", lambda *args, **kwargs: {})
    else:
        right = gradients.gradient_axes
        monkeypatch.setattr(gradients, "gradient_axes", lambda layout: right(layout)[:-1])
    assert main(["verify", "--tp", "2", "--dp", "2"]) == 2
    printed = capsys.readouterr().err
    assert "does not train the adapter of one process" in printed
    assert errors_in(printed)["gradient"] > 1e-3
    assert re.search(r"gradient .*<- wrong", printed)


def test_options_that_make_no_run_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--tp", "3"]) == 2
    assert "query groups" in capsys.readouterr().err
    assert main(["verify", "--dp", "4", "--shard-base", "3"]) == 2
    assert "use 1 or 2 or 4" in capsys.readouterr().err
    assert main(["verify", "--target-modules", "linear_qvk"]) == 2
    assert "nearest: linear_qkv" in capsys.readouterr().err
