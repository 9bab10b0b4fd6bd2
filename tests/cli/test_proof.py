"""What a run on a model of transformers proves of its layout before it starts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
from helpers.byte_tokenizer import VOCABULARY, with_tokenizer
from helpers.tiny_models import save_tiny

from meshpeft.cli import commands
from meshpeft.cli.main import main
from meshpeft.training import finetune as finetune_module
from meshpeft.training.base import find_base
from meshpeft.training.config import FinetuneConfig
from meshpeft.verify import transformers_layout
from meshpeft.verify.run import NotExact, prove_run

Base = Callable[[str], Path]
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Gemma 3n takes statistics over channels of the MLP, which tensor parallel shards.
SPARSE = "gemma3n_text"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Base:
    @cache
    def directory(family: str) -> Path:
        options = {"vocab_size_per_layer_input": VOCABULARY} if family == SPARSE else {}
        return with_tokenizer(save_tiny(family, tmp_path_factory.mktemp(family), vocab_size=VOCABULARY, **options))

    return directory


def test_a_layout_at_which_their_code_computes_something_else_does_not_start(
    bases: Base, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["finetune", "--model", str(bases(SPARSE)), "--data", str(data), "--tp=2", "--rank=4"]
    command += ["--target-modules", *TARGETS, "--output-dir", str(tmp_path / "run")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "this layout does not train the adapter of one process" in said
    assert "<- wrong" in said
    assert not (tmp_path / "run").exists()


def test_an_exact_layout_is_said_to_be_so(bases: Base) -> None:
    config = FinetuneConfig(model=bases("granitemoe"), tp=2, ep=2, etp=1, rank=4).resolved()
    found = prove_run(config, find_base(config.model))
    assert found.startswith("checked: tp=2 dp=1 ep=2 etp=1 micro-batch=2 trains the adapter of one process")


def test_a_structure_that_cannot_be_made_small_is_said_and_runs(bases: Base) -> None:
    config = FinetuneConfig(model=bases("phi3"), tp=2, rank=4).resolved()
    with mock.patch.object(transformers_layout, "_scaled_down", side_effect=ValueError("too odd")):
        found = prove_run(config, find_base(config.model))
    assert found.startswith("not checked before the run: no small phi3 model of this structure could be made")


@pytest.mark.parametrize(
    ("family", "options", "proven"),
    [
        ("phi3", ["--dp=2"], True),
        ("phi3", [], False),
        ("llama", ["--tp=2"], False),
    ],
)
def test_which_runs_are_proven_before_they_start(
    family: str, options: list[str], proven: bool, bases: Base, data: Path, tmp_path: Path
) -> None:
    with (
        mock.patch.object(commands, "_prove", side_effect=NotExact("not so")) as prove,
        mock.patch.object(finetune_module, "launch") as launch,
    ):
        output = ["--output-dir", str(tmp_path / "run")]
        code = main(["finetune", "--model", str(bases(family)), "--data", str(data), *output, *options])
    assert (code, prove.called, launch.called) == ((2, True, False) if proven else (0, False, True))
