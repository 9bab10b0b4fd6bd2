"""Adapters on models that transformers itself sharded, in two processes."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import save_tiny
from helpers.transformers_runs import (
    TARGETS,
    Run,
    collectives_of,
    describe,
    largest_error,
    logits_with_dropout,
    merge,
    train,
)
from helpers.workers import run_on_ranks
from torch import Tensor
from transformers import AutoModelForCausalLM

from meshpeft.peft import PEFT, CanonicalLoRA, DoRA, LoRA
from meshpeft.verify.simulation import Collective

# Float64, two orders of summation, two steps: some 1e-14.
TOLERANCE = 1e-10
# B starts at random: with the usual zeros the first step would not see A at all.
OPTIONS: dict[str, Any] = {"dim": 4, "alpha": 8, "lora_B_init_method": "normal"}
METHODS = {"lora": LoRA, "dora": DoRA, "canonical": CanonicalLoRA}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def directory(family: str) -> Path:
        return save_tiny(family, tmp_path_factory.mktemp(family))

    return directory


def method_of(name: str, family: str) -> PEFT:
    method: PEFT = METHODS[name](target_modules=TARGETS[family], **OPTIONS)
    return method


@cache
def one_process(directory: Path, family: str, method: str) -> Run:
    return train(directory, "none", method_of(method, family))


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("gemma", "lora"),
        ("gemma", "dora"),
        ("phi3", "lora"),
        ("phi3", "dora"),
        ("gpt_neox", "lora"),
        ("gpt_neox", "dora"),
        ("gpt_neox", "canonical"),
        ("llama", "dora"),
        ("deepseek_v2", "lora"),
    ],
)
def test_gradients_are_those_of_one_process(directories: Any, family: str, method: str) -> None:
    directory = directories(family)
    want = one_process(directory, family, method)
    for got in run_on_ranks(2, train, directory, "tp_plan", method_of(method, family)):
        assert largest_error(got, want) < TOLERANCE


def test_adapters_have_the_layout_of_the_layers_that_transformers_divided(directories: Any) -> None:
    # Hidden size 32, MLP 48. (shard, gathers its output or takes it divided, weight, A, B), local.
    phi3 = {
        "self_attn.qkv_proj": ("out", True, (32, 32), (4, 32), (32, 4)),
        "self_attn.o_proj": ("in", False, (32, 16), (4, 16), (32, 4)),
        "mlp.gate_up_proj": ("out", True, (48, 32), (4, 32), (48, 4)),
        "mlp.down_proj": ("in", False, (32, 24), (4, 24), (32, 4)),
    }
    neox = {
        "attention.query_key_value": ("out", False, (48, 32), (4, 32), (48, 4)),
        "attention.dense": ("in", True, (32, 16), (4, 16), (32, 4)),
        "mlp.dense_h_to_4h": ("out", False, (24, 32), (4, 32), (24, 4)),
        "mlp.dense_4h_to_h": ("in", True, (32, 24), (4, 24), (32, 4)),
    }
    for family, want in (("phi3", phi3), ("gpt_neox", neox)):
        for got in run_on_ranks(2, describe, directories(family), "tp_plan"):
            assert got == want


def test_the_mesh_may_be_made_by_init_parallelism_too(directories: Any) -> None:
    directory, method = directories("gemma"), method_of("lora", "gemma")
    want = one_process(directory, "gemma", "lora")
    for got in run_on_ranks(2, train, directory, "tp_plan", method, True):
        assert largest_error(got, want) < TOLERANCE


@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("family", ["gemma", "phi3"])
def test_dropout_leaves_equal_on_all_ranks_what_the_layers_leave_equal(
    directories: Any, family: str, position: Any
) -> None:
    method = LoRA(target_modules=TARGETS[family], dropout=0.5, dropout_position=position, **OPTIONS)
    one, other = run_on_ranks(2, logits_with_dropout, directories(family), "tp_plan", method)
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def added_by(family: str, method: str, ranks: int) -> Counter[Collective]:
    """What adapters of rank 4 on two blocks of width 32 and MLPs of 48 communicate, by the styles of their layers."""
    blocks, tokens, rank = 2, 26, 4
    if family == "gemma":  # five columns all-reduce the gradient of h, two rows h itself
        return Counter({Collective("allreduce", tokens * rank): 7 * blocks})
    # Phi-3's layers take and give whole activations, so that factors are gathered, and DoRA's magnitudes.
    factors = {64: blocks, 96: blocks + 1, 32: blocks, 48: blocks}  # B of qkv; gate and up, head; A of o; of down
    wide = {64: blocks, 96: blocks + 1}
    added = Counter({Collective("allgather", width * rank // ranks): times for width, times in factors.items()})
    if method == "dora":
        added.update({Collective("allgather", width // ranks): times for width, times in wide.items()})
    return added


@pytest.mark.parametrize("family", ["gemma", "phi3"])
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_adapters_communicate_only_tensors_of_rank_size(directories: Any, family: str, method: str, ranks: int) -> None:
    adapters = method_of(method, family)
    for adapted, base in run_on_ranks(ranks, collectives_of, directories(family), "tp_plan", adapters):
        assert Counter(adapted) - Counter(base) == added_by(family, method, ranks)
        assert Counter(base) - Counter(adapted) == Counter()


def saved_weights(directory: Path) -> dict[str, Tensor]:
    """A saved model's weights as one process reads them; a weight of two names under both."""
    return dict(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).state_dict())


def check_merging(ranks: int, directory: Path, method: PEFT, tmp_path: Path) -> None:
    merge(directory, "none", method, tmp_path / "one")
    for got in run_on_ranks(ranks, merge, directory, "tp_plan", method, tmp_path / "divided"):
        torch.testing.assert_close(got.merged, got.adapted, rtol=0, atol=1e-11)
        assert got.base_is_back and torch.equal(got.unmerged, got.adapted)
    want, merged, base = (
        saved_weights(tmp_path / "one"),
        saved_weights(tmp_path / "divided"),
        saved_weights(directory),
    )
    assert merged.keys() == want.keys()
    changed = {name for name in want if not torch.equal(want[name], base[name])}
    assert len(changed) == len(want) - sum("norm" in name or "embed" in name or "bias" in name for name in want)
    for name, weight in want.items():
        # One addition of products to each weight, and DoRA's norm over divided rows.
        torch.testing.assert_close(merged[name], weight, rtol=0, atol=1e-13 * float(weight.abs().max()))


# Between them: every style, parts that are divided each, a head of its own and a tied one.
MERGED = [("phi3", "lora"), ("phi3", "dora"), ("gemma", "dora")]


@pytest.mark.parametrize(("family", "method"), MERGED)
def test_adapters_are_merged_into_divided_weights_as_into_those_of_one_process(
    directories: Any, family: str, method: str, tmp_path: Path
) -> None:
    targets = sorted({*TARGETS[family], "lm_head"})
    check_merging(2, directories(family), METHODS[method](target_modules=targets, **OPTIONS), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize(("family", "method"), [*MERGED, ("gpt_neox", "lora"), ("gpt_neox", "dora"), ("llama", "lora")])
def test_adapters_are_merged_at_other_sizes(
    directories: Any, family: str, method: str, ranks: int, tmp_path: Path
) -> None:
    targets = sorted({*TARGETS[family], "lm_head"})
    check_merging(ranks, directories(family), METHODS[method](target_modules=targets, **OPTIONS), tmp_path)
