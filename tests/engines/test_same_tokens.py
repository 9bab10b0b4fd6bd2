"""Ranks of tensor parallel that are given other rows than each other, as trainers deal them out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny_models import random_ids, save_tiny
from helpers.transformers_runs import Division, load, loss_of
from helpers.workers import run_on_ranks

from meshpeft.models import load_pretrained
from meshpeft.parallel import ModelParallelConfig, ParallelError, init_parallelism
from meshpeft.peft import LoRA

METHOD = LoRA(target_modules=["q_proj", "o_proj"], dim=2)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


def calls(directory: Path, division: Division | str) -> list[str]:
    """What comes of calls: in evaluation, the first in training, and a later one, each with other rows per rank."""
    rank = init_parallelism(tensor_parallel=2).tp.rank
    if division == "decoder":
        base = load_pretrained(directory, torch.float64, ModelParallelConfig(tensor_model_parallel_size=2))
        model = LoRA(target_modules=["linear_qkv"], dim=2)(base)
    else:
        model = METHOD(load(directory, division))  # type: ignore[arg-type]
    found = []
    for training, ids in ((False, random_ids() + rank), (True, random_ids()), (True, random_ids() + rank)):
        model.train(training)
        try:
            model(ids % 90)
            found.append("")
        except ParallelError as error:
            found.append(str(error))
    again = METHOD(load(directory, "parallelize"))
    try:
        again(random_ids()[:, : 4 + rank])  # of other lengths
    except ParallelError as error:
        found.append(str(error))
    return found


@pytest.mark.parametrize("division", ["parallelize", "tp_plan", "decoder"])
def test_tokens_are_compared_once_in_the_first_training_call(directory: Path, division: str) -> None:
    for found in run_on_ranks(2, calls, directory, division):
        assert found[:3] == ["", "", ""] and "got other tokens" in found[3]


def test_one_process_has_nobody_to_compare_with(directory: Path) -> None:
    model = METHOD(load(directory, "parallelize"))
    assert not any(module._forward_pre_hooks for module in model.modules())
    loss_of(model)
